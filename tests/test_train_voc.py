"""scripts/train_voc.py trains and scores SSDLite on data in VOC's layout, and says what is wrong with bad input."""
import codecs
import json
import os
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Tuple
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import timm
import torch
from pandas import DataFrame
from PIL import Image, ImageDraw
from torchvision.transforms import v2

from pages import run_page  # isort: skip
from script_runner import error_line, fail_script, read_csv, run_script, run_two_processes  # isort: skip

import train_voc  # isort: skip
import voc  # isort: skip
from script_utils import BadInput  # isort: skip

run = partial(run_script, 'train_voc.py')
fail = partial(fail_script, 'train_voc.py')
CPU = ['--workers', 0, '--device', 'cpu']
SMALL = ['--model', 'hbonet_010', '--image-size', 64, '--batch-size', 8, *CPU]
BRIEF = [*SMALL, '--batch-size', 4, '--epochs', 1, '--augmentation', 'hflip']
XML_FILE, PICTURE, LIST = 'Annotations/no 101.xml', 'JPEGImages/no 100.jpg', 'ImageSets/Main/trainval.txt'
ANIMALS = ('bus', 'cat', 'cow', 'dog')
COLORS = {'white cell': 'white', 'green cell': 'lime'}
XML = '<annotation>\n<size><width>{}</width><height>{}</height><depth>3</depth></size>\n{}</annotation>\n'
OBJECT = """<object>
<name>{}</name><pose>Unspecified</pose><difficult>0</difficult>
<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>
</object>
"""


def draw_list(folder: Path, image_list: str, count: int, seed: int, classes: Sequence[str] = tuple(COLORS)) -> None:
    """Add a list of noise images with a coloured rectangle each to a folder in VOC's layout."""
    rs = np.random.RandomState(seed)
    for part in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
        (folder / part).mkdir(parents=True, exist_ok=True)
    names = [f'no {seed}{i:02}' for i in range(count)]
    for i, name in enumerate(names):
        image = Image.fromarray(rs.randint(0, 100, (64, 64, 3)).astype(np.uint8))
        w, h = rs.randint(28, 40, 2)
        x, y = rs.randint(0, 65 - w), rs.randint(0, 65 - h)
        ImageDraw.Draw(image).rectangle((x, y, x + w - 1, y + h - 1), fill=list(COLORS.values())[i % 2])
        image.save(folder / 'JPEGImages' / f'{name}{(".jpg", ".JPG", ".png")[i % 3]}', quality=95)
        objects = OBJECT.format(classes[i % 2], x + 1, y + 1, x + w, y + h)
        (folder / 'Annotations' / f'{name}.xml').write_text(XML.format(64, 64, objects))
    (folder / 'ImageSets/Main' / f'{image_list}.txt').write_text(''.join(f'{n}\n' for n in names))


def draw_cells(folder: Path, trainval: int, others: int) -> Path:
    for seed, (name, count) in enumerate(dict(trainval=trainval, val=others, test=others).items(), 1):
        draw_list(folder, name, count, seed)
    return folder


@pytest.fixture(scope='module')
def many_cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_cells(tmp_path_factory.mktemp('data') / 'cells', 48, 16)


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    return draw_cells(tmp_path / 'cells', 4, 4)


def score_line(stdout: str) -> str:
    line, = (x for x in stdout.splitlines() if x.startswith('mAP at IoU 0.5'))
    return line


def create_detector(*options: object, classes: int = 2, pretrained: bool = False) -> train_voc.SSD:
    options = '--model', 'hbonet_010', '--device', 'cpu', *map(str, options)
    args = train_voc.create_parser().parse_args(options)
    args.classes = range(classes)
    return train_voc.create_detector(args, pretrained).eval()


@pytest.fixture(scope='module')
def trained(many_cells: Path, tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Any]:
    """A short training run, and what it printed."""
    output = tmp_path_factory.mktemp('trained') / 'run'
    status, out, err = run(
        many_cells, '--output', output, *SMALL, '--epochs', 26, '--eval-every', 20, '--augmentation', 'hflip',
        '--lr', 0.05, '--val-list', 'val')
    assert status == 0, err
    return dict(output=output, stdout=out, stderr=err)


def test_training_lowers_the_loss_and_finds_objects_in_unseen_images(trained):
    rows = read_csv(trained['output'] / 'summary.csv')
    assert [int(r['epoch']) for r in rows] == list(range(1, 27))
    assert [r['epoch'] for r in rows if r['map_area']] == ['20', '26']
    last = {k: float(v) for k, v in rows[-1].items()}
    assert last['loss'] < 0.4 * float(rows[0]['loss'])
    assert last['map_11point'] > 0.3 and last['map_area'] > 0.3 and last['map_50_95'] > 0.05
    assert sum(last[f'{c} AP area'] for c in COLORS) / 2 == pytest.approx(last['map_area'])
    assert 'train: 48 images with green cell 24, white cell 24\n' in trained['stdout']
    assert f'mAP_area {float(rows[19]["map_area"]):.4f}' in trained['stdout'] and 'Epoch 26' in trained['stderr']


def test_evaluation_takes_all_from_the_file_and_gives_the_score_of_training(trained, many_cells, tmp_path):
    options = ['--output', tmp_path / 'out', '--device', 'cpu', '--workers', 0]
    status, out, _ = run(many_cells, '--evaluate', trained['output'] / 'best.pth', *options)
    assert status == 0 and 'test: 16 images with green cell 8, white cell 8\n' in out
    assert score_line(out) == score_line(trained['stdout'])  # that of the best of the val list, on the test list
    files = [folder / 'detections.png' for folder in (tmp_path / 'out', trained['output'])]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_best_is_the_first_epoch_of_the_highest_score_also_of_before_an_interruption(cells, tmp_path, monkeypatch):
    scores = [DataFrame({'11point': [0], 'area': [v], '50_95': [0]}) for v in (0.2, 0.4, 0.4, 0.1, 0.3)]
    scores.insert(3, KeyboardInterrupt)
    monkeypatch.setattr(train_voc, 'evaluate', Mock(side_effect=scores))
    args = [cells, *BRIEF, '--epochs', 4, '--eval-every', 1, '--val-list', 'val', '--output', tmp_path / 'run']
    assert run(*args)[0] == 130
    status, out, _ = run(cells, '--resume', tmp_path / 'run/last.pth', *CPU)
    assert status == 0 and 'The best of the val list is of epoch 2, and is tested' in out and 'area 0.3000' in out
    for folder in ('run', 'run-1'):
        assert torch.load(tmp_path / folder / 'best.pth', weights_only=True)['epoch'] == 1  # from 0


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Function that lets the detector find one white cell in each image, with a score."""
    def find(score: float, scale: int = 1) -> None:
        boxes = torch.tensor([[8., 16., 40., 48.]]) * scale
        monkeypatch.setattr(train_voc.SSD, 'forward', lambda self, images: [
            dict(boxes=boxes, labels=torch.tensor([2]), scores=torch.tensor([score])) for _ in images])
    return find


def test_picture_has_true_boxes_on_the_left_and_found_ones_on_the_right(trained, cells, found, tmp_path):
    found(0.9)
    options = ['--evaluate', trained['output'] / 'last.pth', *CPU, '--output', tmp_path / 'o']
    spoil(annotate(cells, (1, 5, 30, 40)), ['dog', 'white cell'])
    Image.new('RGB', (64, 64)).save(cells / 'JPEGImages/no 101.JPG')
    (cells / 'ImageSets/Main/test.txt').write_text('no 101')
    assert run(cells, *options)[0] == 0
    with Image.open(tmp_path / 'o/detections.png') as image:
        picture = np.asarray(image).astype(int)
    for color, left, box in (((0, 255, 0), 0, (0, 4, 40)), ((255, 255, 0), train_voc.TILE, (8, 16, 48))):
        ys, xs = (abs(picture[:, left:left + 64] - color) < 60).all(-1).nonzero()
        assert (xs.min(), ys.min(), ys.max()) == pytest.approx(box, abs=2)  # the name may be wider than the box
    found(0.2)
    assert run(cells, *options)[0] == 0
    with Image.open(tmp_path / 'o-1/detections.png') as image:
        note = (abs(np.asarray(image).astype(int) - (255, 255, 0)) < 60).all(-1)[:64, train_voc.TILE:]
    assert note.any() and not note[32:].any()  # no box, but words above


def test_photographs_are_drawn_and_listed(trained, found, tmp_path):
    photos = [tmp_path / 'a/photo.jpg', tmp_path / 'b/photo.jpg']
    for photo, size in zip(photos, ((90, 60), (60, 120)), strict=True):
        photo.parent.mkdir()
        Image.new('RGB', size).save(photo)
    options = ['--evaluate', trained['output'] / 'last.pth', *CPU, '--output', tmp_path / 'out', '--predict']
    found(0.75)
    status, out, _ = run(*options, *photos)
    assert status == 0 and f'2 objects in 2 photographs: {tmp_path / "out"}' in out
    row = dict(xmin='8.0000', ymin='16.0000', xmax='40.0000', ymax='48.0000', score='0.7500') | {'class': 'white cell'}
    assert read_csv(tmp_path / 'out/detections.csv') == [dict(row, photo=str(p)) for p in photos]
    for name, size in (('1_photo.png', (90, 60)), ('2_photo.png', (60, 120))):
        with Image.open(tmp_path / 'out' / name) as image:
            assert image.size == size and image.getpixel((8, 40)) == (255, 255, 0)
    status, out, _ = run(*options, photos[0], '--min-score', 0.8)
    assert status == 0 and '0 objects in 1 photographs' in out and 'A --min-score below 0.8 gives more' in out
    assert read_csv(tmp_path / 'out-1/detections.csv') == [] and (tmp_path / 'out-1/1_photo.png').exists()
    none = tmp_path / 'none.jpg'
    for wanted, listed in (([none, photos[0]], 1), ([none], 0)):  # broken ones are named after the others are done
        status, out, err = run(*options, *wanted)
        assert status == 1 and f'{none} cannot be read' in error_line(err) and ('objects in 1 ' in out) == listed


def test_exported_detector_finds_the_same_by_the_code_of_the_page(trained, many_cells, tmp_path, monkeypatch):
    pytest.importorskip('onnxruntime')
    monkeypatch.chdir(tmp_path)
    path = trained['output'] / 'last.pth'
    status, out, err = run('--evaluate', path, '--export', '--output', 'output/onnx', '--device', 'cpu')
    assert status == 0 and '1 green cell, 2 white cell' in out and not err
    model = create_detector('--image-size', 64)
    model.load_state_dict(torch.load(path, weights_only=True)['state_dict'])
    for size in ((64, 64), (90, 50)):
        with Image.open(many_cells / 'JPEGImages/no 301.JPG') as image:
            image.resize(size).save('photo.png')
        with Image.open('photo.png') as image, torch.inference_mode():
            expected = model([train_voc.to_tensor(image)])[0]
        Path('photo.png').rename('photo.jpg')
        found = run_page('voc.md', 'Use the detector elsewhere')
        assert expected['scores'][0] > 0.1
        best = {k: torch.from_numpy(found[k][:5]) for k in expected}
        torch.testing.assert_close(best, {k: expected[k][:5] for k in best}, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('classes, layers', [([*COLORS, 'red'], 6), (sorted(COLORS), 0)])
def test_init_takes_all_weights_but_the_layer_of_other_classes(classes, layers, trained, cells, tmp_path):
    first, last = trained['output'] / 'last.pth', tmp_path / 'out/last.pth'
    options = [cells, '--init', first, '--output', last.parent, *BRIEF[4:], '--lr', 1e-9, '--classes', *classes]
    assert run(*options)[0] == 0
    before, after = (torch.load(path, weights_only=True)['state_dict'] for path in (first, last))
    new = [
        name for name, _ in create_detector(classes=len(classes)).named_parameters()
        if before[name].shape != after[name].shape or not torch.allclose(before[name], after[name], atol=1e-5)]
    assert len(new) == 2 * layers and all('classification_head' in name and '.1.' in name for name in new)
    assert torch.load(last, weights_only=True)['options']['image_size'] == 64  # as it was made
    assert '--model hbonet_010, not hbonet_025' in fail(*options, '--model', 'hbonet_025')


def test_each_epoch_has_all_images_in_another_order_and_flipped_anew(cells, tmp_path, monkeypatch):
    drawn = []

    def record(*args: Any) -> Any:
        batch = load_batch(*args)
        drawn.extend((s.image.name, image.mean(0)) for s, image in zip(args[-1], batch[0], strict=True))
        return batch

    load_batch = train_voc.load_batch
    monkeypatch.setattr(train_voc, 'load_batch', record)
    assert run(cells, '--output', tmp_path / 'run', *BRIEF, '--epochs', 3)[0] == 0
    epochs = [dict(drawn[i:i + 4]) for i in (0, 4, 8)]  # what follows are tests
    assert len({tuple(sorted(e)) for e in epochs}) == 1 and len({tuple(e) for e in epochs}) > 1
    assert any(not torch.equal(epochs[0][name], e[name]) for e in epochs for name in e)


def test_resumed_run_equals_an_uninterrupted_one(cells, tmp_path, monkeypatch):
    args = [cells, *SMALL, '--batch-size', 4, '--epochs', 2, '--eval-every', 1, '--val-list', 'val']
    if hasattr(torch.amp, 'GradScaler'):  # since PyTorch 2.3 also on a processor
        args += ['--amp', '--amp-dtype', 'float16']
    assert run(*args, '--output', tmp_path / 'whole')[0] == 0
    interrupted = Mock(wraps=train_voc.evaluate, side_effect=[DEFAULT, KeyboardInterrupt])
    with monkeypatch.context() as patch:
        patch.setattr(train_voc, 'evaluate', interrupted)
        status, _, err = run(*args, '--output', tmp_path / 'run')
    last = tmp_path / 'run' / 'last.pth'
    assert status == 130 and error_line(err).startswith('train_voc.py: interrupted.') and f'--resume {last}' in err
    before = last.read_bytes()
    # options come from the file, and the folder is a new one beside it
    assert run(cells, '--resume', last, '--device', 'cpu', '--workers', 0)[0] == 0
    assert last.read_bytes() == before
    whole, parts = (torch.load(tmp_path / n / 'last.pth', weights_only=True) for n in ('whole', 'run-1'))
    for row in (*whole['history'], *parts['history']):
        del row['seconds']
    assert ('amp_scaler' in whole) == hasattr(torch.amp, 'GradScaler')
    assert all(whole.get(k) == parts.get(k) for k in ('epoch', 'history', 'options', 'amp_scaler'))
    torch.testing.assert_close(whole['state_dict'], parts['state_dict'], rtol=0, atol=0)
    torch.testing.assert_close(whole['optimizer']['state'], parts['optimizer']['state'], rtol=0, atol=0)
    message = fail(cells, '--resume', tmp_path / 'whole/last.pth', '--output', tmp_path / 'none')
    assert 'has all 2 epochs' in message and f'--init {tmp_path / "whole/last.pth"}' in message
    assert not (tmp_path / 'none').exists()
    (cells / LIST).write_text('no 103\nno 100\nno 101\nno 102\n')
    assert 'other images' in fail(cells, '--resume', last, '--output', tmp_path / 'none')


def test_torchrun_trains_and_scores_in_two_processes(cells, tmp_path):
    options = ['--output', tmp_path / 'run', *BRIEF, '--batch-size', 2, '--amp', '--val-list', 'val']
    printed, _ = run_two_processes('train_voc.py', cells, *options)
    status, out, _ = run(cells, '--evaluate', tmp_path / 'run/best.pth', *CPU, '--output', tmp_path / 'score')
    assert status == 0 and score_line(printed) == score_line(out)
    assert 'in 2 processes, not' in fail(cells, '--resume', tmp_path / 'run/last.pth', '--device', 'cpu')


def score(objects: Sequence[tuple], found: Sequence[tuple]) -> DataFrame:
    """Scores of an image with objects (class, difficult, box), where (class, score, box) are found."""
    target, detections = (dict(
        boxes=torch.tensor([box for *_, box in rows]).reshape(-1, 4).float(),
        labels=torch.tensor([ANIMALS.index(name) + 1 for name, *_ in rows], dtype=torch.long),
    ) for rows in (objects, found))
    target['difficult'] = torch.tensor([difficult for _, difficult, _ in objects])
    detections['scores'] = torch.tensor([score for _, score, _ in found])
    return voc.voc_score([detections], [target], ANIMALS)


def test_recalls_are_compared_in_whole_numbers():
    box = {i: (20 * i, 0, 20 * i + 10, 10) for i in range(10)}
    scores = score([*(('dog', False, b) for b in box.values()), ('cow', True, box[8])], [
        ('dog', 0.9, box[0]), ('dog', 0.8, box[1]), ('dog', 0.7, (40, 0, 50, 5)),  # right, the last with an IoU of 0.5
        ('bus', 0.9, box[5]), ('cow', 0.9, box[5])])  # classes without objects that count
    assert list(scores.index) == ['dog']
    # precision 1 up to a recall of 3 / 10
    assert list(scores.loc['dog'])[:2] == pytest.approx([4 / 11, 0.3], abs=1e-12)


def test_a_second_detection_is_wrong_even_if_it_overlaps_another_object():
    # COCO's rule would give it to the second object; VOC looks at the best overlap alone
    scores = score(
        [('cat', False, (0, 0, 10, 10)), ('cat', False, (0, 2, 10, 12))],
        [('cat', 0.9, (0, 0, 10, 10)), ('cat', 0.8, (0, 0, 10, 11))])
    assert scores.area['cat'] == pytest.approx(0.5, abs=1e-12)


def test_score_at_0_50_to_0_95_is_coco_s():
    scores = score(
        [('cat', False, (0, 0, 100, 100)), ('dog', True, (0, 0, 50, 50)), ('dog', False, (50, 0, 60, 9))],
        # IoU 0.82 is above 7 of the 10 thresholds; what is in a part of a crowd is not wrong
        [('cat', 0.9, (0, 0, 100, 82)), ('dog', 0.9, (0, 0, 20, 20)), ('dog', 0.8, (50, 0, 60, 9))])
    assert list(scores['50_95']) == pytest.approx([0.7, 1], abs=1e-6)


def test_nothing_found_scores_0():
    assert (score([('cat', False, (0, 0, 10, 10))], []) == 0).all(axis=None)


def draw_case(seed: int) -> Tuple[List[Dict[str, torch.Tensor]], List[Dict[str, torch.Tensor]]]:
    """Detections and targets with duplicates, near misses, overlapping and difficult objects, of three classes.

    No class has a multiple of 5 objects, with which a recall can be one of the 11 points, up to others' rounding.
    """
    rs = np.random.RandomState(seed)
    count = [17, 23, 31]
    objects = np.repeat([1, 2, 3], np.add(count, 6))
    difficult = np.concatenate([rs.permutation(n + 6) < 6 for n in count])
    images = rs.randint(0, 12, len(objects))
    corners = rs.randint(0, 60, (len(objects), 2))
    boxes = np.concatenate([corners, corners + rs.randint(10, 60, (len(objects), 2))], 1)
    repeated = rs.randint(0, len(objects), 150)
    shifted = boxes[repeated] + rs.randint(-8, 9, (150, 4))
    shifted[:, 2:] = np.maximum(shifted[:, 2:], shifted[:, :2] + 3)
    labels = np.where(rs.rand(150) < 0.85, objects[repeated], rs.randint(1, 4, 150))
    places = np.where(rs.rand(150) < 0.9, images[repeated], rs.randint(0, 12, 150))
    scores = rs.permutation(150) / 150

    def split(places: np.ndarray, **values: np.ndarray) -> List[Dict[str, torch.Tensor]]:
        return [{k: torch.from_numpy(v[places == n]) for k, v in values.items()} for n in range(12)]

    return (
        split(places, boxes=shifted.astype(np.float32), labels=labels, scores=scores),
        split(images, boxes=boxes.astype(np.float32), labels=objects, difficult=difficult))


@pytest.mark.parametrize('case', json.loads((Path(__file__).parent / 'data/voc_ap.json').read_text())['cases'])
def test_score_equals_that_of_chainercv(case):
    """Expected: eval_detection_voc of chainercv 0.13.1, with corners as it takes them (the last pixel included)."""
    score = voc.voc_score(*draw_case(case['seed']), ANIMALS)
    assert list(score['area']) == pytest.approx(case['ap_area'], abs=1e-12)
    assert list(score['11point']) == pytest.approx(case['ap_11point'], abs=1e-12)


def annotate(root: Path, *objects: tuple, size: Tuple[int, int] = (64, 64)) -> Path:
    """Write an annotation with dogs at (xmin, ymin, xmax, ymax)."""
    path = root / XML_FILE
    objects = ''.join(OBJECT.format('dog', *o) for o in objects)
    path.write_text(XML.format(*size, objects))
    return path


def read(root: Path) -> voc.Sample:
    return voc.read_annotation(root / XML_FILE, root / 'JPEGImages/no 101.JPG')


@pytest.mark.parametrize('box, corners', [
    ((1, 2, 50, '40.5'), (0, 1, 50, 40.5)),
    ((0, 0, 63, 63), (0, 0, 63, 63)),  # counts from 0
    ((1, 1, 65, 65), (0, 0, 64, 64)),
    ((-20, 5, 90, 9), (0, 4, 64, 9)),  # cut off
    ((5, 7, 5, 7), (4, 6, 5, 7)),  # one pixel
    ((1, 1, 1, 1), (0, 0, 1, 1)),
    ((64, 64, 64, 64), (63, 63, 64, 64)),
])
def test_boxes_are_corners_in_pixels_of_the_image(box, corners, cells):
    annotate(cells, box)
    assert read(cells)[2:] == (('dog',), (corners,), (False,))


@pytest.mark.parametrize('box', [
    (65, 1, 70, 10), (1, -9, 10, 0), (0, 0, 0, 0), (9, 1, 8, 10), (1, 9, 10, 8), ('nan', 1, 9, 9), (1, 1, 'inf', 9),
    ('', 1, 9, 9), ('nine', 1, 9, 9), ('1_0', 1, 20, 9), (0.1, 0.1, 0.9, 0.9), (0, 0, 1, 1)])
def test_boxes_that_are_none_are_named(box, cells):
    path = annotate(cells, (1, 1, 9, 9), box)
    numbers = not any(isinstance(v, str) for v in box)
    with pytest.raises(BadInput) as error:
        read(cells)
    message = str(error.value)
    assert str(path) in message and 'object 2' in message
    assert all(str(v) in message for v in box if numbers or isinstance(v, str))
    assert ('normalized' in message) == (numbers and max(box) <= 1)


def spoil(path: Path, content: Any) -> Path:
    """Write bytes, or replace a text by another, and so on."""
    if isinstance(content, bytes):
        path.write_bytes(content)
        return path
    text = path.read_text()
    for old, new in zip(content[::2], content[1::2], strict=True):
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path


@pytest.mark.parametrize('name, content, reason', [
    (LIST, b'', 'names nothing'),
    (LIST, b'no 100\n\nno 109\n', 'line 3'),
    (LIST, b'no 100 1 2\n', 'line 1'),
    (LIST, b'no 100\nno 101\nno 100.jpg\n', 'line 3'),
    (LIST, 'no 100\nb\u00fccher\n'.encode('latin-1'), 'line 2'),
    (LIST, 'no 100\n'.encode('utf-16-le'), 'in UTF-8'),
    ('JPEGImages/no 100.jpeg', b'', 'no 100.jpeg and no 100.jpg are there'),
    ('JPEGImages/no 101.JPG', b'no picture', 'image'),
    (XML_FILE, ['<name>', '<title>'], 'line 4, column 20: mismatched tag'),
    (XML_FILE, ['green', 'a&b'], 'line 4, column'),
    (XML_FILE, ['<annotation>', '\n<?xml version="1.0"?><annotation>'], 'line 2, column 1: XML or text'),
    (XML_FILE, ['<difficult>0', '<difficult>Unspecified'], "'Unspecified'. Write 0 or 1"),
    (XML_FILE, ['<difficult>0', '<difficult>1</difficult><difficult>0'], 'once'),
    (XML_FILE, ['<width>64', '<width>63'], '63 x 64'),
    (XML_FILE, ['<height>64</height>', ''], '0 <height>'),
    (XML_FILE, ['</bndbox>', '</bndbox><bndbox/>'], 'object 1: <object> has 2 <bndbox>'),
    (XML_FILE, ['</name>', '</name><name>cell</name>'], '2 <name>'),
    (XML_FILE, ['<xmin>', '<xmin>1</xmin><xmin>'], '2 <xmin>'),
    (XML_FILE, ['<object>', '<objects><object>', '</object>', '</object></objects>'], 'directly below'),
    (XML_FILE, ['object>', 'Object>'], 'directly below'),
    (XML_FILE, b'<annotations><image/></annotations>', 'its root is <annotations>'),
    (XML_FILE, b'<?xml version="1.0" encoding="klingon"?><annotation/>', 'klingon'),
    (XML_FILE, '<annotation>\n<name>\u00fc'.encode('latin-1'), 'line 2, column 7: it is not utf-8. Save'),
    (XML_FILE, b'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><annotation>&b;</annotation>', 'b'),
], ids=lambda value: value if isinstance(value, str) else '')
def test_bad_data_is_named_before_training(name, content, reason, cells, tmp_path):
    path = spoil(cells / name, content)
    message = fail(cells, '--output', tmp_path / 'out', *BRIEF)
    assert (str(path) in message or str(cells / LIST) in message) and reason in message
    assert not (tmp_path / 'out').exists()


def test_up_to_20_files_are_named_in_one_run(many_cells, tmp_path):
    root = shutil.copytree(many_cells, tmp_path / 'cells')
    (root / 'Annotations/no 300.xml').unlink()
    assert f'{root / "Annotations/no 300.xml"} cannot be read: No such file' in fail(root, *BRIEF)
    for path in sorted((root / 'Annotations').glob('no 1*'))[:25]:
        path.write_text('<annotation>')
    status, _, err = run(root, *BRIEF)
    assert status == 1 and error_line(err).endswith('26 are wrong: those above, and 6 more.')
    assert err.count('.xml, line 1') == 20


@pytest.mark.parametrize('changes, names', [
    (['<size><width>64</width><height>64</height><depth>3</depth></size>\n', ''], 1),
    (['<width>64</width><height>64</height>', '<width>0</width><height>0</height>'], 1),
    (['<difficult>0</difficult>', '<difficult/>'], 1),
    (['<difficult>0</difficult>', ''], 1),
    (['<pose>', '<deleted>1</deleted><pose>'], 0),
    (['</object>', '<part><name>head</name><bndbox><xmin>2</xmin></bndbox></part></object>'], 1),
], ids=str)
def test_annotations_that_people_have_are_read(changes, names, cells):
    path = spoil(cells / XML_FILE, changes)
    assert read(cells).names == ('green cell',) * names and not any(read(cells).difficult)
    text = '<?xml version="1.0" encoding="GBK"?>\n' + path.read_text().replace('green cell', '\u7ec6\u80de')
    path.write_bytes(text.encode('gbk'))
    assert read(cells).names == ('\u7ec6\u80de',) * names


@pytest.mark.parametrize('content', [
    b'no 100\r\n\r\n  no 101 \r\nno 102',
    codecs.BOM_UTF8 + b'no 100\nno 101\nno 102\n',
    'no 100\nno 101\nno 102\n'.encode('utf-16'),
    b'no 100.jpg\nno 101.JPG\nno 102.png\n',
    b'no 100  1\nno 101 -1\nno 102  0\n',
])
def test_lists_that_people_have_are_read(content, cells):
    (cells / LIST).write_bytes(content)
    samples = voc.read_samples(dict(train=[cells / LIST]))['train']
    assert [s.image.name for s in samples] == ['no 100.jpg', 'no 101.JPG', 'no 102.png']
    images = {name: [Path(f'{name}.jpg')] for name in ('no', 'no 1')}
    assert voc.find_image(cells, images, 'no 1')[0] == 'no 1'  # a name, and no class list's line for "no"
    Image.new('L', (64, 64)).save(cells / 'JPEGImages/no 100.PNG')
    (cells / LIST).write_text('no 100.PNG\n')  # the listed extension decides
    sample, = voc.read_samples(dict(train=[cells / LIST]))['train']
    (image,), (target,) = voc.load_batch(v2.ToImage(), list(COLORS), [sample])
    assert sample.image.name == 'no 100.PNG' and image.shape == (3, 64, 64) and target['labels'].tolist() == [1]


def test_pictures_are_not_turned_away_from_their_boxes(cells):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new('RGB', (64, 32))
    image.paste('white', (0, 0, 32, 32))
    image.save(cells / 'JPEGImages/no 101.JPG', exif=exif)
    annotate(cells, (1, 1, 32, 32), size=(64, 32))
    (image,), (found,) = voc.load_batch(v2.ToImage(), ['dog'], [read(cells)])
    assert image.shape == (3, 32, 64)
    left, top, right, bottom = found['boxes'].int()[0].tolist()
    assert image[:, top:bottom, left:right].float().mean() > 200
    annotate(cells, (1, 1, 32, 32), size=(32, 64))  # for the turned picture
    with pytest.raises(BadInput, match='no 101.JPG'):
        read(cells)


def test_damaged_images_are_named_before_training_and_in_it(cells, tmp_path, monkeypatch):
    path, args = cells / PICTURE, [cells, '--output', tmp_path / 'out', *BRIEF, '--workers', 1]
    whole, read_data = path.read_bytes(), train_voc.read_data
    path.write_bytes(whole[:900])  # the header can be read
    assert f'{path} cannot be read as an image' in fail(*args) and not (tmp_path / 'out').exists()

    def read_then_damage(args: Any) -> Any:
        path.write_bytes(whole)
        samples = read_data(args)
        path.write_bytes(whole[:900])
        return samples

    monkeypatch.setattr(train_voc, 'read_data', read_then_damage)
    assert fail(*args).startswith(f'train_voc.py: error: {path} cannot be read as an image')  # by another process


def test_data_that_cannot_be_scored_are_named(cells, tmp_path):
    args = [cells, '--output', tmp_path / 'none', *BRIEF]
    path = spoil(cells / 'Annotations/no 301.xml', ['green', 'red'])
    for options in ([], ['--classes', *COLORS]):
        message = fail(*args, *options)
        assert f"{path} with class 'red cell'" in message and 'give all classes of all lists to --classes' in message
    spoil(path, ['red', 'green'])
    message = fail(*args, '--classes', 'white cell')
    assert f"{cells / XML_FILE} and 3 others with class 'green cell', not one of white cell." in message
    assert 'twice: cell, cell' in fail(*args, '--classes', 'cell', 'cell')
    assert f'no 100 is in {cells / LIST}, line 1 too' in run(*args, '--train-lists', 'trainval', 'trainval')[2]
    (cells / 'ImageSets/Main/test.txt').write_text('no 300\nno 103\nno 102\n')
    assert 'no 102.png is in the train list and in the test list, and so are 2 of the 3' in fail(*args)
    assert run(*args, '--allow-overlap')[0] == 0
    assert 'the val list and in the test list' in fail(*args, '--test-list', 'val', '--val-list', 'val')
    for path in (cells / 'Annotations').glob('no 1*.xml'):
        path.write_text(XML.format(64, 64, ''))
    assert str(cells / LIST) in (message := fail(*args)) and 'no objects' in message
    assert 'has no ImageSets/Main' in fail(tmp_path, *args[1:])
    assert 'DIR' in run(*args[1:])[2]


def test_an_epoch_without_objects_is_an_error(cells, tmp_path, monkeypatch):
    monkeypatch.setattr(v2.RandomHorizontalFlip, 'forward', lambda self, image, target: (
        image, {k: v if k == 'difficult' else v[:0] for k, v in target.items()}))
    assert 'epoch 1 is exactly 0' in fail(cells, '--output', tmp_path / 'out', *BRIEF)
    assert not (tmp_path / 'out/last.pth').exists()


def test_published_lists_and_classes_of_voc_are_the_defaults(tmp_path):
    devkit = tmp_path / 'VOCdevkit'
    for seed, (year, name) in enumerate([('2007', 'trainval'), ('2012', 'trainval'), ('2007', 'test')], 1):
        draw_list(devkit / f'VOC{year}', name, 4, seed, ('bottle', 'aeroplane'))
    status, out, _ = run(devkit.parent, '--output', tmp_path / 'a', *BRIEF)
    assert status == 0 and 'train: 8 images with aeroplane 4, bicycle 0, bird 0, boat 0, bottle 4, bus 0' in out
    assert torch.load(tmp_path / 'a/last.pth', weights_only=True)['options']['classes'] == list(voc.CLASSES)
    shutil.rmtree(devkit / 'VOC2012')
    (tmp_path / 'classes.txt').write_text('bottle\n\naeroplane\n')
    status, out, _ = run(devkit, '--output', tmp_path / 'b', *BRIEF, '--classes', tmp_path / 'classes.txt')
    assert status == 0 and 'has VOC2007 only' in out and 'train: 4 images with bottle 2, aeroplane 2\n' in out
    lists = ['--train-lists', 'VOC2007/test', '--test-list', 'VOC2007/trainval.txt']
    status, out, _ = run(devkit, '--output', tmp_path / 'c', *BRIEF, *lists)
    assert status == 0 and 'only' not in out and 'test: 4 images' in out


def test_bccd_is_read():
    folder = Path(os.environ.get('BCCD_DIR', ''), 'ImageSets/Main')
    if not folder.is_dir():
        pytest.skip('BCCD_DIR must name folder BCCD of git clone https://github.com/Shenggan/BCCD_Dataset')
    lists = {k: [folder / f'{k}.txt'] for k in ('trainval', 'test')}
    samples = voc.read_samples(lists)
    assert {k: len(v) for k, v in samples.items()} == dict(trainval=292, test=72)
    counts = Counter(n for part in samples.values() for s in part for n in s.names)
    assert counts == dict(RBC=4155, WBC=372, Platelets=361)


@pytest.mark.parametrize('name', ['hbonet_010', 'mobilenetv2_100'])
def test_detector_takes_any_backbone_of_stride_32_and_computes_boxes_in_float32(name):
    model, boxes = create_detector('--model', name), []
    with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16):
        maps = model.backbone(torch.zeros(1, 3, 320, 320))
        outputs = model.head(list(maps.values()))
    assert [m.shape[-1] for m in maps.values()] == [20, 10, 5, 3, 2, 1]
    assert {v.dtype for v in outputs.values()} == {torch.float32}
    model.anchor_generator.register_forward_hook(lambda module, args, output: boxes.append(output[0]))
    for enabled in (False, True):
        with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            model([torch.zeros(3, 320, 320)])
    assert boxes[0].dtype == torch.float32 and torch.equal(*boxes)


def test_min_ratio_is_the_size_of_the_smallest_default_boxes():
    assert create_detector('--min-ratio', 0.05).anchor_generator.scales[0] == 0.05


def test_backbone_starts_from_pretrained_weights_and_says_what_to_do_without_any(server, cells, tmp_path):
    features = create_detector(pretrained=True).backbone.features
    expected = timm.create_model('hbonet_010', pretrained=True, features_only=True, out_indices=(-2, -1))
    assert all(torch.equal(a, b) for a, b in zip(features.parameters(), expected.parameters(), strict=True))
    server.repositories.clear()
    server.pages.clear()
    message = fail(cells, '--output', tmp_path / 'out', *BRIEF, '--model', 'hbonet_025', '--pretrained')
    assert 'Found no weights for hbonet_025' in message and '/hbonet_0_25.pth' in message and '--file FILE' in message
    assert 'pretrained_cfg_overlay' not in message and 'cache_dir' not in message


@pytest.mark.parametrize('content', [
    None, b'text', {'state_dict': {}}, {'script': 'train_market1501.py'}])
def test_file_that_is_no_checkpoint_is_refused(content, cells, tmp_path):
    path = tmp_path / 'weights.pth'
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    for option in ('--resume', '--evaluate', '--init'):
        assert f'{path} cannot be read as a checkpoint' in fail(cells, '--output', tmp_path / 'out', option, path)
    assert not (tmp_path / 'out').exists()


def test_checkpoint_of_other_options_or_parts_is_named(trained, cells, tmp_path):
    path = trained['output'] / 'last.pth'
    for option, value in (('--model', 'hbonet_025'), ('--image-size', 96), ('--lr', 0.1), ('--seed', 1)):
        for other in ('--resume', '--evaluate') if option in ('--model', '--image-size') else ('--resume',):
            message = fail(cells, other, path, option, value, '--device', 'cpu')
            assert all(e in message for e in (str(path), option, str(value)))
    checkpoint, path = torch.load(path, weights_only=True), tmp_path / 'other.pth'
    checkpoint['state_dict'].popitem()
    torch.save(checkpoint, path)
    assert f'{path} does not fit the model' in fail(cells, '--evaluate', path, *CPU, '--output', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('status, options, message', [
    (1, ['--model', 'vit_tiny_patch16_224'], '--model'),
    (1, ['--model', 'hbonet_999'], '--model hbonet_999'),
    (1, ['--batch-size', 99], '--batch-size'),
    (1, ['--lr', '1e18', '--batch-size', 2], '--lr'),
    (2, ['--predict', 'photo.jpg'], '--evaluate FILE'),
    (2, ['--export'], '--evaluate FILE'),
    *((2, options, options[0]) for options in (
        ['--device', 'meta'], ['--device', 'quantum'], ['--epochs', 0], ['--epochs', 1.5], ['--epochs', '9' * 400],
        ['--eval-every', 0], ['--batch-size', 1], ['--lr', 0], ['--lr', 'nan'], ['--weight-decay', 'inf'],
        ['--workers', -1], ['--seed', 2 ** 32], ['--image-size', 0], ['--min-ratio', 1], ['--min-score', 2],
        ['--resume', 'last.pth', '--evaluate', 'last.pth'])),
])
def test_options_that_cannot_work_are_named(status, options, message, cells, tmp_path):
    found, _, err = run(cells, '--output', tmp_path / 'out', *BRIEF, *options)
    line = error_line(err)
    assert found == status and line.startswith('train_voc.py: error: ') and message in line
    assert not (tmp_path / 'out/last.pth').exists()


def test_no_file_is_overwritten(cells, tmp_path):
    mine = tmp_path / 'out/last.pth'
    mine.parent.mkdir()
    mine.write_text('years of work')
    for number in (1, 2):
        assert run(cells, '--output', tmp_path / 'out', *BRIEF)[0] == 0
        assert {p.name for p in (tmp_path / f'out-{number}').iterdir()} == {'detections.png', 'last.pth', 'summary.csv'}
    assert [p.name for p in mine.parent.iterdir()] == ['last.pth'] and mine.read_text() == 'years of work'
    status, _, err = run(cells, '--output', mine / 'below', *BRIEF)
    assert status == 1 and f'--output {mine / "below"}' in err
