"""The quickstart trains, saves, loads back and draws, classifies photographs, and says what is wrong with its input."""
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image
from sklearn.model_selection import train_test_split
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from timm.models import save_for_hf

SCRIPT = Path(__file__).parents[1] / 'scripts' / 'quickstart.py'


def run_process(*args: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)
    assert 'Traceback' not in result.stderr
    return result


@pytest.fixture
def run(monkeypatch, capsys):
    """Function that runs the script in this process, for what is written to stdout and how it ends."""

    def run(*args: object):
        monkeypatch.setattr(sys, 'argv', [str(SCRIPT), *map(str, args)])
        error = None
        try:
            runpy.run_path(str(SCRIPT), run_name='__main__')
        except SystemExit as e:  # a text is printed, and makes exit status 1
            error = e.code
        out, err = capsys.readouterr()
        return (out, error) if error != 2 else (out, err)

    return run


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Result of a short training, in a folder that had an earlier one, and what was printed."""
    output = tmp_path_factory.mktemp('quickstart') / 'trained'
    (output / 'checkpoints').mkdir(parents=True)
    (output / 'checkpoints' / 'checkpoint-7.pth.tar').touch()
    (output / 'config.json').write_text('of an earlier run')
    result = run_process('--output', output, '--epochs', 3, '--seed', 1)
    assert result.returncode == 0, result.stderr
    return output, result


@pytest.fixture(scope='module')
def photo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('photos') / 'china.jpg'
    Image.fromarray(load_sample_image('china.jpg')).save(path)
    return path


@pytest.fixture(scope='module')
def imagenet_model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('models') / 'hbonet_010'
    torch.manual_seed(0)
    model = timm.create_model('hbonet_010', pretrained_cfg_overlay=dict(input_size=(3, 96, 96)))
    torch.nn.init.normal_(model.classifier.weight)
    save_for_hf(model, str(path), safe_serialization=True)
    return path


def test_training_leaves_a_whole_result_and_nothing_else(trained):
    output, _ = trained
    assert list(output.parent.iterdir()) == [output]
    files = {str(path.relative_to(output)) for path in output.rglob('*') if path.is_file()}
    assert files == {
        'checkpoints/checkpoint-2.pth.tar', 'checkpoints/last.pth.tar', 'config.json', 'model.safetensors',
        'predictions.png'}


def test_the_saved_model_scores_as_printed(trained):
    output, result = trained
    model = timm.create_model(f'local-dir:{output}', pretrained=True).eval()
    assert model.pretrained_cfg['architecture'] == 'hbonet_035'
    digits = load_digits()
    _, images, _, labels = train_test_split(
        digits.images, digits.target, test_size=360, stratify=digits.target, random_state=0)
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    images = [Image.fromarray((image / 16 * 255).round().astype(np.uint8)) for image in images]
    with torch.inference_mode():
        preds = model(torch.stack([transform(image) for image in images])).argmax(1).numpy()
    top1 = 100 * (preds == labels).mean()

    assert top1 > 40  # 10 by chance
    assert f'Top-1 on the 360 held-out digits: {top1:.2f} %' in result.stdout
    assert f"Loaded back by timm.create_model('local-dir:{output}', pretrained=True): {top1:.2f} %" in result.stdout


def test_training_shows_its_progress(trained):
    _, result = trained
    losses = re.findall(r'Epoch +(\d) of 3: loss (\S+), top-1 held out \S+ %', result.stdout)
    assert [epoch for epoch, _ in losses] == ['1', '2', '3']
    assert float(losses[2][1]) < 0.7 * float(losses[0][1])
    assert re.search(r'Training: 100%.* 66/66 ', result.stderr)


def test_the_picture_shows_right_and_wrong_predictions(trained):
    output, _ = trained
    with Image.open(output / 'predictions.png') as image:
        assert image.format == 'PNG'
        pixels = np.asarray(image.convert('RGB'))
    assert pixels.shape == (720, 1440, 3)
    titles = [(pixels == color).all(-1) for color in ((0, 100, 0), (139, 0, 0))]
    assert titles[0][:450].sum() > 1000 and titles[1][450:].sum() > 300
    assert not titles[0][450:].any() and not titles[1][:450].any()


def test_a_photograph_gets_its_top_5_of_imagenet(run, photo, imagenet_model):
    out, error = run(photo, '--model', f'local-dir:{imagenet_model}')
    assert error is None

    model = timm.create_model(f'local-dir:{imagenet_model}', pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.inference_mode(), Image.open(photo) as image:
        probs, indices = model(transform(image)[None]).softmax(-1)[0].topk(5)
    labels = [ImageNetInfo().index_to_description(index) for index in indices.tolist()]
    expected = [f'{prob:8.2%}  {label}' for prob, label in zip(probs.tolist(), labels, strict=True)]
    assert out.splitlines() == [str(photo), *expected]


def test_a_photograph_is_classified_with_published_weights_by_default(run, photo, server):
    out, error = run(photo, photo)  # two, with a progress bar
    assert error is None
    model = timm.create_model('hbonet_100', pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.inference_mode(), Image.open(photo) as image:
        index = model(transform(image)[None]).argmax().item()
    lines = out.splitlines()
    assert len(lines) == 12 and lines[:6] == lines[6:]
    assert lines[1].endswith(f'%  {ImageNetInfo().index_to_description(index)}')


def test_a_photograph_gets_the_labels_of_the_trained_model(run, photo, trained):
    out, error = run(photo, '--model', f'local-dir:{trained[0]}')
    assert error is None
    assert re.fullmatch(r'(?s).*china\.jpg\n( *[\d.]+%  \d\n){5}', out)


def test_a_photograph_is_turned_as_the_camera_was_held(run, photo, imagenet_model, tmp_path):
    upright, turned = tmp_path / 'upright.png', tmp_path / 'turned.png'
    with Image.open(photo) as image:
        image.save(upright)
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees clockwise
        image.transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
    out, _ = run(upright, turned, '--model', f'local-dir:{imagenet_model}')
    lines = out.splitlines()
    assert lines[1:6] == lines[7:]


def test_weights_that_cannot_be_had(photo, server, tmp_path):
    server.reset()
    result = run_process(photo, HF_HOME=str(tmp_path / 'huggingface'), TORCH_HOME=str(tmp_path / 'torch'))
    assert result.returncode == 1
    assert 'quickstart.py: cannot load --model hbonet_100' in result.stderr
    assert 'run this once where the Hugging Face Hub or GitHub can be reached' in result.stderr
    assert '--model local-dir:FOLDER' in result.stderr
    assert not result.stdout


@pytest.mark.parametrize('model, message', [
    ('hbonet_42', 'hbonet_42 is not a model that timm knows. Of this family it knows hbonet_010, '),
    ('local-dir:nowhere', 'cannot load --model local-dir:nowhere. FileNotFoundError: .*nowhere'),
    ('somewhere:hbonet_100', 'cannot load --model somewhere:hbonet_100. '),
])
def test_a_model_that_does_not_exist(run, photo, model, message):
    _, error = run(photo, '--model', model)
    assert re.search(message, error)


def test_a_photograph_that_does_not_exist(run, photo, tmp_path):
    out, error = run(photo, tmp_path / 'nowhere.jpg')
    assert error == f'quickstart.py: there is no photograph {tmp_path / "nowhere.jpg"}.'
    assert not out


@pytest.mark.parametrize('content', [b'', b'some text', b'cut'])
def test_a_photograph_that_is_none(run, photo, tmp_path, content):
    path = tmp_path / 'broken.jpg'
    path.write_bytes(photo.read_bytes()[:20000] if content == b'cut' else content)
    _, error = run(path)
    assert error.startswith(f'quickstart.py: cannot read {path} as an image: ')
    assert error.endswith('Give a photograph that is a JPEG, PNG or WebP file.')


def test_a_folder_of_photographs_is_none(run, photo):
    _, error = run(photo.parent)
    assert error.startswith(f'quickstart.py: cannot read {photo.parent} as an image: ')


@pytest.mark.parametrize('args, message', [
    (['--epochs', '0'], '--epochs must be at least 1, got 0'),
    (['--seed', '-1'], '--seed must be from 0 to 4294967295, got -1'),
    (['--model', 'hbonet_100'], '--model is for photographs, give at least one PHOTO'),
])
def test_arguments_out_of_range(run, args, message):
    _, error = run(*args)
    assert error.splitlines()[-1] == f'quickstart.py: error: {message}'


def test_other_files_are_not_replaced(run, tmp_path):
    (tmp_path / 'thesis.tex').write_text('years of work')
    _, error = run('--output', tmp_path)
    assert error == (
        f'quickstart.py: --output {tmp_path} holds files that are not from this script (thesis.tex). '
        f'Give a new or an empty folder.')
    assert [path.name for path in tmp_path.iterdir()] == ['thesis.tex']


@pytest.mark.parametrize('name', ['file', 'file/below'])
def test_output_that_cannot_be_a_folder(run, tmp_path, name):
    (tmp_path / 'file').touch()
    _, error = run('--output', tmp_path / name)
    assert error.startswith(f'quickstart.py: cannot write to --output {tmp_path / name}: ')
