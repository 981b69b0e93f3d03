"""The quickstart trains, saves, loads back and draws, classifies photographs, and says what is wrong with its input."""
import re
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

from script_runner import error_line, run_script  # isort: skip

import quickstart  # isort: skip
from script_utils import BadInput, read_image  # isort: skip

FILES = {'config.json', 'model.safetensors', 'predictions.png'}


def run(*args: object) -> Tuple[int, str, str]:
    return run_script('quickstart.py', *args)


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> Tuple[Path, str, str]:
    """Result of a short training, and what was printed. A folder of the same name was there before."""
    output = tmp_path_factory.mktemp('quickstart') / 'trained'
    output.mkdir()
    (output / 'config.json').write_text('mine')
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(quickstart, 'INPUT_SIZE', (1, 32, 32))  # for speed
        status, out, err = run('--output', output, '--epochs', 3, '--seed', 1, '--device', 'cpu')
    assert status == 0, err
    assert [path.read_text() for path in output.iterdir()] == ['mine']
    return output.with_name('trained-1'), out, err


@pytest.fixture(scope='module')
def photo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('photos') / 'china.jpg'
    Image.fromarray(load_sample_image('china.jpg')).save(path)
    return path


def test_training_leaves_a_whole_result_that_scores_as_printed(trained):
    output, out, err = trained
    assert {path.name for path in output.iterdir()} == FILES
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
    labels, probs = test_set.labels, np.full((360, 10), 0.05)
    probs[np.arange(360), labels] = 0.55
    probs[7] = np.roll(probs[7], 1)
    probs[8] = np.eye(10)[(labels[8] + 1) % 10]  # more confident
    drawn = [axes for axes in quickstart.draw(test_set, torch.from_numpy(probs).log()).axes if axes.get_title()]
    assert sorted(axes.get_title() for axes in drawn[:-2]) == sorted(
        2 * [f'{i} read as {i}\n55% sure' for i in range(10)])
    assert [axes.get_title() for axes in drawn[-2:]] == [
        f'{labels[i]} read as {(labels[i] + 1) % 10}\n{sure}% sure' for i, sure in ((8, 100), (7, 55))]
    assert np.array_equal(drawn[-2].images[0].get_array(), test_set.images[8])


def test_an_interrupted_run_leaves_nothing_half_written(tmp_path, monkeypatch):
    def interrupt(*args: Any) -> None:
        assert list(tmp_path.rglob('model.safetensors'))
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, 'fit', lambda model, train_set, test_set, epochs, device: quickstart.predict(
        model, quickstart.create_loader(model, test_set, device)))
    monkeypatch.setattr(quickstart, 'draw', interrupt)
    status, _, err = run('--output', tmp_path / 'out', '--device', 'cpu')
    assert (status, error_line(err)) == (130, 'quickstart.py: interrupted.')
    assert not list((tmp_path / 'out').iterdir())


def test_photographs_get_their_top_5_by_published_weights(photo, server):
    status, out, err = run(photo, photo, '--device', 'cpu')
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


def test_what_is_wrong_is_told_in_one_line(photo, release_site, tmp_path):
    release_site.reset()  # there are no weights
    (tmp_path / 'text.png').write_text('some text')
    (tmp_path / 'cut.jpg').write_bytes(photo.read_bytes()[:20000])
    for status, args, message in (
            (1, [photo], '--model hbonet_100 cannot be created.*local-dir:FOLDER'),
            (1, [photo, '--model', 'hbonet_42'], '--model hbonet_42 cannot be created.*hbonet_010'),
            (1, [photo, '--model', 'local-dir:nowhere'], '--model local-dir:nowhere cannot.*FileNotFoundError'),
            *((1, [photo, path], f'{path} cannot be read as an image') for path in (
                tmp_path / 'text.png', tmp_path / 'cut.jpg', tmp_path, tmp_path / 'nowhere.jpg')),
            (1, ['--output', tmp_path / 'text.png' / 'far' / 'below'], f'--output {tmp_path}.* cannot be made'),
            (2, ['--epochs', '0'], 'argument --epochs: must be a whole number of at least 1'),
            (2, ['--seed', '0.5'], 'argument --seed: must be a whole number'),
            (2, ['--device', 'meta'], "argument --device: 'meta' cannot be used"),
            (2, ['--model', 'hbonet_100'], '--model is for photographs'),
    ):
        found, out, err = run(*args)
        assert (found, out) == (status, ''), err
        assert re.match(f'quickstart.py: error: {message}', error_line(err)), err


# scripts/script_utils.py's reading of images

PIXELS = np.random.RandomState(0).randint(0, 256, (4, 6), dtype=np.uint8)


@pytest.mark.parametrize('suffix', ['png', 'tiff', 'pgm'])
def test_16_bits_are_scaled_by_their_range(suffix, tmp_path):
    path = tmp_path / f'deep.{suffix}'
    Image.fromarray(PIXELS.astype(np.uint16) * 257).save(path)
    assert np.array_equal(np.asarray(read_image(path, 'L')), PIXELS)
    assert np.array_equal(np.asarray(read_image(path)), np.stack([PIXELS] * 3, -1))


def test_colors_transparency_and_animations(tmp_path):
    red, white = (255, 0, 0), (255, 255, 255)
    animation = dict(save_all=True, append_images=[Image.new('RGB', (6, 4), 'blue')])
    for name, image, options, color in (
            ('clear.png', Image.new('RGBA', (6, 4), (*red, 0)), {}, white),
            ('clear_gray.png', Image.new('LA', (6, 4), (76, 0)), {}, white),
            ('key.png', Image.new('RGB', (6, 4), red), dict(transparency=red), white),
            ('palette.png', Image.new('RGB', (6, 4), red).quantize(2), dict(transparency=0), white),
            ('cmyk.jpg', Image.new('CMYK', (6, 4), (0, 255, 255, 0)), dict(quality=95), red),
            ('animation.gif', Image.new('RGB', (6, 4), 'red'), animation, red),
    ):
        image.save(tmp_path / name, **options)
        found = np.asarray(read_image(tmp_path / name)).astype(int)
        assert found.shape == (4, 6, 3) and np.abs(found - color).max() < 10, name


def test_a_photograph_is_turned_as_the_camera_was_held(tmp_path):
    image, exif = Image.fromarray(PIXELS).transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6
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
