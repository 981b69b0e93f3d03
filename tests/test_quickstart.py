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


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> Tuple[Path, str]:
    """Result of a short training, and what was printed. A folder of the same name was there before."""
    output = tmp_path_factory.mktemp('quickstart') / 'trained'
    output.mkdir()
    (output / 'config.json').write_text('mine')
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(quickstart, 'INPUT_SIZE', (1, 32, 32))  # for speed
        args = ['--output', output, '--epochs', 3, '--seed', 1, '--device', 'cpu']
        status, out, err = run_script('quickstart.py', *args)
    assert status == 0, err
    assert re.search(r'Training: 100%.* 66/66 ', err)
    assert [path.read_text() for path in output.iterdir()] == ['mine']
    return output.with_name('trained-1'), out


@pytest.fixture(scope='module')
def photo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('photos') / 'china.jpg'
    Image.fromarray(load_sample_image('china.jpg')).save(path)
    return path


def test_training_leaves_a_result_that_scores_as_printed(trained):
    output, out = trained
    assert {path.name for path in output.iterdir()} == {'config.json', 'model.safetensors', 'predictions.png'}
    losses = [float(loss) for loss in re.findall(r'Epoch +\d of 3: loss (\S+),', out)]
    assert len(losses) == 3 and losses[2] < 0.9 * losses[0]

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
    assert f'digits: {top1:.2f} %' in out and f"'local-dir:{output}', pretrained=True): {top1:.2f} %" in out


def test_the_picture_begins_with_the_worst_mistakes():
    _, test_set = quickstart.load_splits()
    labels, probs = test_set.labels, np.full((360, 10), 0.05)
    probs[np.arange(360), labels] = 0.55
    probs[7] = np.roll(probs[7], 1)
    probs[8] = np.eye(10)[(labels[8] + 1) % 10]  # more confident
    figure = quickstart.draw(test_set, torch.from_numpy(probs).log())
    assert figure.get_suptitle().startswith('358 of 360 ')
    first, second, *others = figure.axes
    assert len(others) == 28 and all(axes.get_title().endswith('\n55% sure') for axes in others)
    for axes, i, sure in ((first, 8, 100), (second, 7, 55)):
        assert axes.get_title() == f'{labels[i]} read as {(labels[i] + 1) % 10}\n{sure}% sure'
        assert np.array_equal(axes.images[0].get_array(), test_set.images[i])


def test_an_interrupted_run_leaves_nothing_half_written(tmp_path, monkeypatch):
    def interrupt(*args: Any) -> None:
        assert list(tmp_path.rglob('model.safetensors'))
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, 'fit', lambda model, train_set, test_set, epochs, device: quickstart.predict(
        model, quickstart.create_loader(model, test_set, device)))
    monkeypatch.setattr(quickstart, 'draw', interrupt)
    status, _, err = run_script('quickstart.py', '--output', tmp_path / 'out', '--device', 'cpu')
    assert (status, error_line(err)) == (130, 'quickstart.py: interrupted.')
    assert not list((tmp_path / 'out').iterdir())


def test_photographs_get_their_top_5_by_published_weights(photo, server):
    status, out, err = run_script('quickstart.py', photo, photo, '--device', 'cpu')
    assert status == 0 and '2/2' in err

    model = timm.create_model('hbonet_100', pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.inference_mode(), Image.open(photo) as image:
        probs, indices = model(transform(image)[None]).softmax(-1)[0].topk(5)
    labels = [ImageNetInfo().index_to_description(index) for index in indices.tolist()]
    expected = [f'{prob:8.2%}  {label}' for prob, label in zip(probs.tolist(), labels, strict=True)]
    assert out.splitlines() == 2 * [str(photo), *expected]


def test_a_photograph_gets_the_labels_of_the_trained_model(photo, trained):
    _, out, _ = run_script('quickstart.py', photo, '--model', f'local-dir:{trained[0]}', '--device', 'cpu')
    assert re.fullmatch(r'(?s).*china\.jpg\n( *[\d.]+%  \d\n){5}', out)


def test_what_is_wrong_is_told_in_one_line(photo, release_site, tmp_path):
    release_site.reset()  # there are no weights
    (tmp_path / 'text.png').write_text('some text')
    (tmp_path / 'cut.jpg').write_bytes(photo.read_bytes()[:20000])
    for status, args, message in (
            (1, [photo], '--model hbonet_100 cannot be created.*local-dir:DIR'),
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
        found, out, err = run_script('quickstart.py', *args)
        assert (found, out) == (status, ''), err
        assert re.match(f'quickstart.py: error: {message}', error_line(err)), err


# How scripts read images

PIXELS = np.random.RandomState(0).randint(0, 256, (4, 6), dtype=np.uint8)
DEEP = Image.fromarray(PIXELS.astype(np.uint16) * 257)
TURNED = Image.fromarray(PIXELS).transpose(Image.Transpose.ROTATE_90)
EXIF = Image.Exif()
EXIF[0x0112] = 6  # the camera was held so
RED = Image.new('RGB', (6, 4), 'red')
CLEAR, GRAY = Image.new('RGBA', (6, 4), (255, 0, 0, 0)), Image.new('LA', (6, 4), (76, 0))
CMYK, BLUE = Image.new('CMYK', (6, 4), (0, 255, 255, 0)), Image.new('RGB', (6, 4), 'blue')


@pytest.mark.parametrize('name, image, options, pixels', [
    ('16_bits.png', DEEP, {}, PIXELS[..., None]),
    ('16_bits.tiff', DEEP, {}, PIXELS[..., None]),
    ('16_bits.pgm', DEEP, {}, PIXELS[..., None]),
    ('turned.png', TURNED, dict(exif=EXIF), PIXELS[..., None]),
    ('clear.png', CLEAR, {}, (255, 255, 255)),
    ('clear_gray.png', GRAY, {}, (255, 255, 255)),
    ('key.png', RED, dict(transparency=(255, 0, 0)), (255, 255, 255)),
    ('palette.png', RED.quantize(2), dict(transparency=0), (255, 255, 255)),
    ('cmyk.jpg', CMYK, dict(quality=95), (255, 0, 0)),
    ('animation.gif', RED, dict(save_all=True, append_images=[BLUE]), (255, 0, 0)),
])
def test_images_are_read_as_they_are_seen(tmp_path, name, image, options, pixels):
    image.save(tmp_path / name, **options)
    found = np.asarray(read_image(tmp_path / name)).astype(int)
    assert found.shape == (4, 6, 3) and np.abs(found - pixels).max() <= name.endswith('.jpg')


def test_images_that_are_refused(tmp_path, monkeypatch):
    for dtype in (np.int32, np.float32):
        Image.fromarray(PIXELS.astype(dtype)).save(tmp_path / 'deep.tiff')
        with pytest.raises(BadInput, match='deep.tiff.*32 bits'):
            read_image(tmp_path / 'deep.tiff')
    Image.fromarray(PIXELS).save(tmp_path / 'bomb.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 10)  # it could fill the memory
    with pytest.raises(BadInput, match='bomb.png'):
        read_image(tmp_path / 'bomb.png')
