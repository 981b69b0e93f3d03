"""The quickstart trains, saves, loads back and draws, classifies photographs, and says what is wrong with its input."""
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Tuple

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image
from sklearn.model_selection import train_test_split
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from timm.models import save_for_hf

from script_runner import SCRIPTS, error_line, heed_ctrl_c, run_script  # isort: skip

import quickstart  # isort: skip
from script_utils import BadInput, read_image  # isort: skip

FILES = {
    'checkpoints/checkpoint-2.pth.tar', 'checkpoints/last.pth.tar', 'config.json', 'model.safetensors',
    'predictions.png'}


def run(*args: object) -> Tuple[int, str, str]:
    return run_script('quickstart.py', *args)


def list_files(folder: Path) -> set:
    return {path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file()}


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> Tuple[Path, str, str]:
    """Result of a short training, and what was printed."""
    output = tmp_path_factory.mktemp('quickstart') / 'trained'
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(quickstart, 'INPUT_SIZE', (1, 32, 32))  # for speed
        status, out, err = run('--output', output, '--epochs', 3, '--seed', 1, '--device', 'cpu')
    assert status == 0, err
    return output, out, err


@pytest.fixture(scope='module')
def photo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('photos') / 'china.jpg'
    Image.fromarray(load_sample_image('china.jpg')).save(path)
    return path


@pytest.fixture(scope='module')
def imagenet_model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp('models') / 'hbonet_010'
    torch.manual_seed(0)
    model = timm.create_model('hbonet_010', pretrained_cfg_overlay=dict(input_size=(3, 96, 96)))
    torch.nn.init.normal_(model.classifier.weight)
    save_for_hf(model, str(path), safe_serialization=True)
    return f'local-dir:{path}'


def test_training_leaves_a_whole_result_and_nothing_else(trained):
    output, _, _ = trained
    assert list(output.parent.iterdir()) == [output]
    assert list_files(output) == FILES
    assert {path.name for path in output.iterdir()} == {name.split('/')[0] for name in FILES}


def test_the_saved_model_scores_as_printed_on_unseen_digits(trained):
    output, out, _ = trained
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

    assert top1 > 30  # 10 by chance
    assert f'{top1:.2f} %' in out and f"'local-dir:{output}'" in out and str(output / 'predictions.png') in out


def test_training_shows_its_progress(trained):
    _, out, err = trained
    losses = re.findall(r'Epoch +(\d) of 3: loss (\S+),', out)
    assert [epoch for epoch, _ in losses] == ['1', '2', '3']
    assert float(losses[2][1]) < 0.9 * float(losses[0][1])
    assert re.search(r'Training: 100%.* 66/66 ', err)


def test_the_picture_shows_right_and_wrong_predictions(tmp_path, monkeypatch):
    figures = []
    figure = quickstart.Figure
    monkeypatch.setattr(quickstart, 'Figure', lambda **kwargs: figures.append(figure(**kwargs)) or figures[0])
    _, test_set = quickstart.load_splits()
    probs = np.full((360, 10), 0.05)
    probs[np.arange(360), test_set.labels] = 0.55
    probs[7] = np.eye(10)[(test_set.labels[7] + 1) % 10]
    quickstart.draw(test_set, probs, tmp_path / 'predictions.png')
    with Image.open(tmp_path / 'predictions.png') as image:
        assert image.format == 'PNG'
    upper, lower = figures[0].subfigs
    right = [axes.get_title() for axes in upper.axes if axes.get_title()]
    assert sorted(right) == sorted(2 * [f'{i} read as {i}\n55% sure' for i in range(10)])
    wrong = [axes for axes in lower.axes if axes.get_title()]
    label = test_set.labels[7]
    assert [axes.get_title() for axes in wrong] == [f'{label} read as {(label + 1) % 10}\n100% sure']
    assert np.array_equal(wrong[0].images[0].get_array(), test_set.images[7])


def test_a_second_run_works_and_overwrites_nothing(tmp_path, monkeypatch):
    def fit(model: Any, *args: Any) -> None:
        args[-1].mkdir()
        for name in ('checkpoint-2.pth.tar', 'last.pth.tar'):
            (args[-1] / name).touch()

    monkeypatch.setattr(quickstart, 'fit', fit)  # as this is about files
    output = tmp_path / 'out'
    for path in (output, tmp_path / 'out-1'):
        status, out, _ = run('--output', output, '--device', 'cpu')
        assert status == 0
        assert list_files(path) == FILES and str(path / 'predictions.png') in out
        for name in FILES:
            (path / name).write_text('mine')
    assert all((output / name).read_text() == 'mine' for name in FILES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['out', 'out-1']


def test_an_interrupted_run_leaves_nothing_half_written(tmp_path):
    command = [sys.executable, str(SCRIPTS / 'quickstart.py'), '--output', str(tmp_path / 'out'), '--device', 'cpu']
    with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c,
    ) as process:
        while not list(tmp_path.glob('out/.*/checkpoints')):  # the test's own timeout is the bound
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
    assert process.returncode == 130
    assert error_line(stderr) == 'quickstart.py: interrupted.'
    assert not list((tmp_path / 'out').iterdir())


@pytest.mark.parametrize('name', ['file/below', 'file/far/below'])
def test_output_that_cannot_be_a_folder(tmp_path, name):
    (tmp_path / 'file').touch()
    status, _, err = run('--output', tmp_path / name)
    assert status == 1 and error_line(err).startswith(f'quickstart.py: error: --output {tmp_path / name}')


def test_a_photograph_gets_its_top_5_of_imagenet(photo, imagenet_model):
    status, out, _ = run(photo, '--model', imagenet_model, '--device', 'cpu')
    assert status == 0

    model = timm.create_model(imagenet_model, pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.inference_mode(), Image.open(photo) as image:
        probs, indices = model(transform(image)[None]).softmax(-1)[0].topk(5)
    labels = [ImageNetInfo().index_to_description(index) for index in indices.tolist()]
    expected = [f'{prob:8.2%}  {label}' for prob, label in zip(probs.tolist(), labels, strict=True)]
    assert out.splitlines() == [str(photo), *expected]


def test_a_photograph_is_classified_with_published_weights_by_default(photo, server):
    status, out, err = run(photo, photo, '--device', 'cpu')  # two, with a progress bar
    assert status == 0 and '2/2' in err
    model = timm.create_model('hbonet_100', pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.inference_mode(), Image.open(photo) as image:
        index = model(transform(image)[None]).argmax().item()
    lines = out.splitlines()
    assert len(lines) == 12 and lines[:6] == lines[6:]
    assert lines[1].endswith(f'%  {ImageNetInfo().index_to_description(index)}')


def test_a_photograph_gets_the_labels_of_the_trained_model(photo, trained):
    status, out, _ = run(photo, '--model', f'local-dir:{trained[0]}', '--device', 'cpu')
    assert status == 0
    assert re.fullmatch(r'(?s).*china\.jpg\n( *[\d.]+%  \d\n){5}', out)


def test_weights_that_cannot_be_had(photo, server, tmp_path):
    server.reset()
    environment = {**os.environ, 'HF_HOME': str(tmp_path / 'huggingface'), 'TORCH_HOME': str(tmp_path / 'torch')}
    command = [sys.executable, str(SCRIPTS / 'quickstart.py'), str(photo)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    line = error_line(result.stderr)
    assert result.returncode == 1 and not result.stdout
    assert line.startswith('quickstart.py: error: --model hbonet_100') and 'local-dir:FOLDER' in line


@pytest.mark.parametrize('model, known', [
    ('hbonet_42', 'hbonet_010'), ('local-dir:nowhere', 'FileNotFoundError'), ('somewhere:hbonet_100', 'somewhere')])
def test_a_model_that_does_not_exist(photo, model, known):
    status, out, err = run(photo, '--model', model)
    assert status == 1 and not out
    assert error_line(err).startswith(f'quickstart.py: error: --model {model}') and known in err


@pytest.mark.parametrize('args, name', [
    (['--epochs', '0'], '--epochs'),
    (['--seed', '-1'], '--seed'),
    (['--seed', '0.5'], '--seed'),
    (['--device', 'meta'], '--device'),
    (['--model', 'hbonet_100'], '--model'),
])
def test_arguments_out_of_range(args, name):
    status, _, err = run(*args)
    assert status == 2 and error_line(err).startswith('quickstart.py: error: ') and name in error_line(err)


def test_photographs_that_are_none(photo, tmp_path):
    cut, empty, text = tmp_path / 'cut.jpg', tmp_path / 'empty.jpg', tmp_path / 'text.png'
    cut.write_bytes(photo.read_bytes()[:20000])
    empty.touch()
    text.write_text('some text')
    for path in (cut, empty, text, tmp_path, tmp_path / 'nowhere.jpg'):
        status, out, err = run(photo, path)
        assert status == 1 and not out
        assert error_line(err).startswith(f'quickstart.py: error: {path} cannot be read as an image')


PIXELS = np.random.RandomState(0).randint(0, 256, (4, 6), dtype=np.uint8)


@pytest.mark.parametrize('suffix', ['png', 'tiff', 'pgm'])
def test_16_bits_are_scaled_by_their_range(suffix, tmp_path):
    path = tmp_path / f'deep.{suffix}'
    Image.fromarray(PIXELS.astype(np.uint16) * 257).save(path)
    assert np.array_equal(np.asarray(read_image(path, 'L')), PIXELS)
    assert np.array_equal(np.asarray(read_image(path)), np.stack([PIXELS] * 3, -1))


@pytest.mark.parametrize('dtype', [np.int32, np.float32])
def test_32_bits_have_no_known_range(dtype, tmp_path):
    path = tmp_path / 'deep.tiff'
    Image.fromarray(PIXELS.astype(dtype)).save(path)
    with pytest.raises(BadInput, match='deep.tiff.*32 bits'):
        read_image(path)


@pytest.mark.parametrize('mode, color, key', [
    ('RGBA', (255, 0, 0, 0), None), ('LA', (76, 0), None), ('L', 76, 76), ('RGB', (255, 0, 0), (255, 0, 0)),
    ('P', 1, 1)])
def test_what_is_transparent_is_white(mode, color, key, tmp_path):
    opaque = {'RGBA': (0, 0, 0, 255), 'LA': (0, 255), 'L': 0, 'RGB': (0, 0, 0), 'P': 0}
    image = Image.new(mode, (6, 4), color)
    if mode == 'P':
        image.putpalette([0, 0, 0, 255, 0, 0])
    image.paste(opaque[mode], (0, 0, 3, 4))
    for options in [{}] if key is None else [{}, {'transparency': key}]:
        image.save(tmp_path / 'picture.png', **options)
        found = np.asarray(read_image(tmp_path / 'picture.png'))
        assert (found[:, :3] == 0).all()
        assert (found[:, 3:] == 255).all() == bool(options or key is None)


def save_cmyk(path: Path) -> None:
    Image.new('CMYK', (6, 4), (0, 255, 255, 0)).save(path, 'JPEG', quality=95)


def save_animation(path: Path) -> None:
    first, second = Image.new('RGB', (6, 4), 'red'), Image.new('RGB', (6, 4), 'blue')
    first.save(path, 'GIF', save_all=True, append_images=[second])


@pytest.mark.parametrize('save', [save_cmyk, save_animation])
def test_other_kinds_of_files_are_read(save: Callable[[Path], None], tmp_path):
    save(tmp_path / 'picture')
    found = np.asarray(read_image(tmp_path / 'picture')).astype(int)
    assert np.abs(found - (255, 0, 0)).max() < 10  # red


@pytest.mark.parametrize('orientation', range(1, 9))
def test_a_photograph_is_turned_as_the_camera_was_held(orientation, tmp_path):
    upright = Image.fromarray(PIXELS)
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270}.get(orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    (upright.transpose(turn) if turn is not None else upright).save(tmp_path / 'turned.png', exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / 'turned.png', 'L')), PIXELS)


def test_an_image_that_could_fill_the_memory_is_refused(tmp_path, monkeypatch):
    Image.fromarray(PIXELS).save(tmp_path / 'bomb.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 10)
    with pytest.raises(BadInput, match='bomb.png'):
        read_image(tmp_path / 'bomb.png')
