"""The quickstart trains, saves, loads back and draws, classifies photographs, and says what is wrong with its input."""
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Tuple

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image
from sklearn.model_selection import train_test_split
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config

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



def test_training_leaves_a_whole_result_that_scores_as_printed(trained):
    output, out, err = trained
    assert list(output.parent.iterdir()) == [output]
    assert list_files(output) == FILES
    losses = [float(loss) for loss in re.findall(r'Epoch +\d of 3: loss (\S+),', out)]
    assert len(losses) == 3 and losses[2] < 0.9 * losses[0]
    assert re.search(r'Training: 100%.* 66/66 ', err)

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


def test_the_picture_shows_right_and_wrong_predictions():
    _, test_set = quickstart.load_splits()
    probs = np.full((360, 10), 0.05)
    probs[np.arange(360), test_set.labels] = 0.55
    probs[7] = np.roll(probs[7], 1)
    probs[8] = np.eye(10)[(test_set.labels[8] + 1) % 10]  # more confident
    upper, lower = quickstart.draw(test_set, torch.from_numpy(probs).log()).subfigs
    right = [axes.get_title() for axes in upper.axes if axes.get_title()]
    assert sorted(right) == sorted(2 * [f'{i} read as {i}\n55% sure' for i in range(10)])
    wrong = [axes for axes in lower.axes if axes.get_title()]
    assert [axes.get_title() for axes in wrong] == [
        f'{test_set.labels[i]} read as {(test_set.labels[i] + 1) % 10}\n{sure}% sure'
        for i, sure in ((8, 100), (7, 55))]
    assert np.array_equal(wrong[0].images[0].get_array(), test_set.images[8])


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


def test_photographs_get_their_top_5_by_published_weights(photo, server):
    status, out, err = run(photo, photo, '--device', 'cpu')  # two, with a progress bar
    assert status == 0 and '2/2' in err

    model = timm.create_model('hbonet_100', pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.inference_mode(), Image.open(photo) as image:
        probs, indices = model(transform(image)[None]).softmax(-1)[0].topk(5)
    labels = [ImageNetInfo().index_to_description(index) for index in indices.tolist()]
    expected = [f'{prob:8.2%}  {label}' for prob, label in zip(probs.tolist(), labels, strict=True)]
    assert out.splitlines() == 2 * [str(photo), *expected]


def test_a_photograph_gets_the_labels_of_the_trained_model(photo, trained):
    status, out, _ = run(photo, '--model', f'local-dir:{trained[0]}', '--device', 'cpu')
    assert status == 0
    assert re.fullmatch(r'(?s).*china\.jpg\n( *[\d.]+%  \d\n){5}', out)


def test_weights_that_cannot_be_had(photo, server):
    server.reset()
    status, out, err = run(photo, '--device', 'cpu')
    line = error_line(err)
    assert status == 1 and not out
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


# scripts/script_utils.py's reading of images

PIXELS = np.random.RandomState(0).randint(0, 256, (4, 6), dtype=np.uint8)


@pytest.mark.parametrize('suffix', ['png', 'tiff', 'pgm'])
def test_16_bits_are_scaled_by_their_range(suffix, tmp_path):
    path = tmp_path / f'deep.{suffix}'
    Image.fromarray(PIXELS.astype(np.uint16) * 257).save(path)
    assert np.array_equal(np.asarray(read_image(path, 'L')), PIXELS)
    assert np.array_equal(np.asarray(read_image(path)), np.stack([PIXELS] * 3, -1))


@pytest.mark.parametrize('mode, color, key', [
    ('RGBA', (255, 0, 0, 0), None), ('LA', (76, 0), None), ('L', 76, 76), ('RGB', (255, 0, 0), (255, 0, 0)),
    ('P', 1, 1)])
def test_what_is_transparent_is_white(mode, color, key, tmp_path):
    image = Image.new(mode, (6, 4), color)
    if mode == 'P':
        image.putpalette([0, 0, 0, 255, 0, 0])
    image.paste({'RGBA': (0, 0, 0, 255), 'LA': (0, 255), 'RGB': (0, 0, 0)}.get(mode, 0), (0, 0, 3, 4))
    image.save(tmp_path / 'picture.png', **({} if key is None else {'transparency': key}))
    found = np.asarray(read_image(tmp_path / 'picture.png'))
    assert (found[:, :3] == 0).all() and (found[:, 3:] == 255).all()


@pytest.mark.parametrize('image, options', [
    (Image.new('CMYK', (6, 4), (0, 255, 255, 0)), dict(format='JPEG', quality=95)),
    (Image.new('RGB', (6, 4), 'red'), dict(
        format='GIF', save_all=True, append_images=[Image.new('RGB', (6, 4), 'blue')])),
], ids=['CMYK', 'animation'])
def test_other_kinds_of_files_are_read(image, options, tmp_path):
    image.save(tmp_path / 'picture', **options)
    found = np.asarray(read_image(tmp_path / 'picture')).astype(int)
    assert np.abs(found - (255, 0, 0)).max() < 10  # red


@pytest.mark.parametrize('orientation', range(1, 9))
def test_a_photograph_is_turned_as_the_camera_was_held(orientation, tmp_path):
    turns = 'FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_90 TRANSVERSE ROTATE_270'.split()
    image, exif = Image.fromarray(PIXELS), Image.Exif()
    if orientation > 1:
        image = image.transpose(Image.Transpose[turns[orientation - 2]])
    exif[0x0112] = orientation
    image.save(tmp_path / 'turned.png', exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / 'turned.png', 'L')), PIXELS)


def test_images_that_are_refused(tmp_path, monkeypatch):
    for dtype in (np.int32, np.float32):
        Image.fromarray(PIXELS.astype(dtype)).save(tmp_path / 'deep.tiff')
        with pytest.raises(BadInput, match='deep.tiff.*32 bits'):
            read_image(tmp_path / 'deep.tiff')
    Image.fromarray(PIXELS).save(tmp_path / 'bomb.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 10)  # it could fill the memory
    with pytest.raises(BadInput, match='bomb.png'):
        read_image(tmp_path / 'bomb.png')
