"""scripts/train_voc.py trains and scores SSDLite on a VOCdevkit folder, and says what is wrong with bad input."""
import codecs
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageDraw
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.transforms import v2

from script_runner import SCRIPTS, error_line, run_script  # isort: skip

import train_voc  # isort: skip
import training  # isort: skip
import voc  # isort: skip
from script_utils import BadInput  # isort: skip

SMALL = ['--model', 'hbonet_010', '--image-size', 64, '--batch-size', 8, '--workers', 0, '--device', 'cpu']
BRIEF = [*SMALL, '--epochs', 1, '--augmentation', 'hflip']
COLORS = dict(aeroplane='red', bottle='lime')
XML = """<annotation>
	<folder>VOC2007</folder>
	<source><database>The VOC2007 Database</database></source>
	<size><width>{width}</width><height>{height}</height><depth>3</depth></size>
	<segmented>0</segmented>
{objects}</annotation>
"""
OBJECT = """	<object>
		<name>{}</name>
		<pose>Unspecified</pose>
		<truncated>0</truncated>
		<difficult>{}</difficult>
		<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>
	</object>
"""


def draw_split(root: Path, year: str, image_set: str, count: int, seed: int) -> None:
    """Add a split of noise images with a coloured rectangle each to a VOCdevkit folder."""
    rs = np.random.RandomState(seed)
    folder = root / f'VOC{year}'
    for part in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
        (folder / part).mkdir(parents=True, exist_ok=True)
    names = [f'{seed:03}{i:03}' for i in range(count)]
    for name in names:
        image = Image.fromarray(rs.randint(0, 100, (64, 64, 3)).astype(np.uint8))
        w, h = rs.randint(28, 40, 2)
        x, y = rs.randint(0, 65 - w), rs.randint(0, 65 - h)
        kind = list(COLORS)[rs.randint(2)]
        ImageDraw.Draw(image).rectangle((x, y, x + w - 1, y + h - 1), fill=COLORS[kind])
        image.save(folder / 'JPEGImages' / f'{name}.jpg', quality=95)
        objects = OBJECT.format(kind, 0, x + 1, y + 1, x + w, y + h)
        (folder / 'Annotations' / f'{name}.xml').write_text(XML.format(width=64, height=64, objects=objects))
    (folder / 'ImageSets' / 'Main' / f'{image_set}.txt').write_text(''.join(f'{n}\n' for n in names))


def draw_voc(root: Path, count: int) -> Path:
    draw_split(root, '2007', 'trainval', count, seed=1)
    draw_split(root, '2012', 'trainval', count, seed=2)
    draw_split(root, '2007', 'test', min(count, 16), seed=3)
    return root


@pytest.fixture(scope='module')
def devkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_voc(tmp_path_factory.mktemp('data') / 'VOCdevkit', 24)


@pytest.fixture
def small_devkit(tmp_path: Path) -> Path:
    return draw_voc(tmp_path / 'VOCdevkit', 4)


def run(*args: object) -> Tuple[int, str, str]:
    return run_script('train_voc.py', *args)


def read_summary(output: Path) -> List[Dict[str, str]]:
    with open(output / 'summary.csv', newline='') as file:
        return list(csv.DictReader(file))


def score_line(stdout: str) -> str:
    line, = (x for x in stdout.splitlines() if x.startswith('mAP at IoU 0.5'))
    return line


@pytest.fixture(scope='module')
def trained(devkit: Path, tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Any]:
    """A short training run, and what it printed."""
    output = tmp_path_factory.mktemp('trained') / 'run'
    status, out, err = run(
        devkit.parent, '--output', output, *SMALL, '--epochs', 26, '--eval-every', 20, '--augmentation', 'hflip',
        '--lr', 0.05)
    assert status == 0, err
    return dict(output=output, stdout=out, stderr=err)


def test_training_lowers_the_loss_and_finds_objects_in_unseen_images(trained):
    rows = read_summary(trained['output'])
    assert [int(r['epoch']) for r in rows] == list(range(1, 27))
    assert float(rows[-1]['loss']) < 0.4 * float(rows[0]['loss'])
    assert float(rows[-1]['map_11point']) > 0.3
    assert float(rows[-1]['map_area']) > 0.3
    assert [r['epoch'] for r in rows if r['map_area']] == ['20', '26']
    assert f'11-point {float(rows[-1]["map_11point"]):.4f}' in score_line(trained['stdout'])
    assert 'Epoch 26' in trained['stderr']  # progress
    assert sorted(p.name for p in trained['output'].iterdir()) == ['detections.png', 'last.pth', 'summary.csv']


def test_evaluation_takes_the_model_from_the_file_and_gives_the_score_of_training(trained, devkit, tmp_path):
    status, out, _ = run(
        devkit, '--evaluate', trained['output'] / 'last.pth', '--output', tmp_path / 'out', '--device', 'cpu',
        '--workers', 0)
    assert status == 0
    assert score_line(out) == score_line(trained['stdout'])
    pictures = [folder / 'detections.png' for folder in (tmp_path / 'out', trained['output'])]
    with Image.open(pictures[0]) as picture, Image.open(pictures[1]) as same:
        assert picture.size == (2 + 4 * 322, 2 + 2 * 322)  # eight images
        assert picture.tobytes() == same.tobytes()


def test_picture_has_the_boxes_in_their_places(devkit, tmp_path, monkeypatch):
    model = train_voc.create_detector('hbonet_010', 64)
    found = dict(boxes=torch.tensor([[8., 16., 40., 48.]]), labels=torch.tensor([1]), scores=torch.tensor([0.9]))
    faint = {**found, 'scores': torch.tensor([0.2])}
    monkeypatch.setattr(model, 'forward', lambda images: [found])
    args = train_voc.create_parser().parse_args([str(devkit), '--device', 'cpu'])
    test_set = voc.VOC(devkit, '2007', 'test', v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]), True)
    train_voc.draw_detections(model, test_set, tmp_path / 'found.png', args)
    monkeypatch.setattr(model, 'forward', lambda images: [faint])
    train_voc.draw_detections(model, test_set, tmp_path / 'plain.png', args)
    with Image.open(tmp_path / 'found.png') as image, Image.open(tmp_path / 'plain.png') as plain:
        changed = (np.asarray(image) != np.asarray(plain)).any(-1)[2:322, 2:322]
    rows, columns = changed.any(1).nonzero()[0], changed.any(0).nonzero()[0]
    assert changed[80, 40:200].mean() > 0.9 and changed[80:240, 40].mean() > 0.9  # five times as large as the image
    assert abs(rows.max() - 240) < 5 and abs(columns.min() - 40) < 5


def test_resumed_run_equals_an_uninterrupted_one(small_devkit, tmp_path, monkeypatch):
    args = [small_devkit, *SMALL, '--batch-size', 4, '--epochs', 2]
    assert run(*args, '--output', tmp_path / 'whole')[0] == 0

    def interrupt(path: Path, content: bytes) -> None:
        write_file(path, content)
        if path.name == 'summary.csv':
            raise KeyboardInterrupt

    write_file = training.write_file
    with monkeypatch.context() as patch:
        patch.setattr(training, 'write_file', interrupt)
        status, _, err = run(*args, '--output', tmp_path / 'run')
    assert status == 130
    assert error_line(err).startswith('train_voc.py: interrupted.')
    last = tmp_path / 'run' / 'last.pth'
    assert f'--resume {last}' in err
    before = last.read_bytes()
    # options come from the file
    assert run(small_devkit, '--output', tmp_path / 'run', '--resume', last, '--device', 'cpu', '--workers', 0)[0] == 0
    assert last.read_bytes() == before  # another folder is written

    whole, parts = (torch.load(tmp_path / n / 'last.pth', weights_only=True) for n in ('whole', 'run-1'))
    assert all(whole[k] == parts[k] for k in ('epoch', 'history', 'options'))
    torch.testing.assert_close(whole['state_dict'], parts['state_dict'], rtol=0, atol=0)
    torch.testing.assert_close(whole['optimizer']['state'], parts['optimizer']['state'], rtol=0, atol=0)
    assert (tmp_path / 'whole/summary.csv').read_bytes() == (tmp_path / 'run-1/summary.csv').read_bytes()

    status, _, err = run(small_devkit, '--resume', tmp_path / 'whole/last.pth', '--output', tmp_path / 'none')
    assert status == 1 and 'has all 2 epochs' in err
    assert not (tmp_path / 'none').exists()
    (small_devkit / 'VOC2012/ImageSets/Main/trainval.txt').write_text('002000\n002001\n')
    status, _, err = run(small_devkit, '--resume', last, '--output', tmp_path / 'none')
    assert status == 1 and 'other images' in err


def test_torchrun_trains_and_scores_in_two_processes(small_devkit, tmp_path):
    command = [
        sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2, SCRIPTS / 'train_voc.py',
        small_devkit, '--output', tmp_path / 'run', *BRIEF, '--batch-size', 4, '--amp']
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    status, out, _ = run(
        small_devkit, '--evaluate', tmp_path / 'run/last.pth', '--output', tmp_path / 'score', '--device', 'cpu',
        '--workers', 0)
    assert status == 0
    assert score_line(result.stdout) == score_line(out)
    status, _, err = run(small_devkit, '--resume', tmp_path / 'run/last.pth', '--device', 'cpu')
    assert status == 1 and '2 processes' in err


@pytest.mark.skipif(not hasattr(torch.amp, 'GradScaler'), reason='PyTorch before 2.3 scales on CUDA only')
def test_float16_on_a_processor_scales_the_loss(small_devkit, tmp_path):
    status, _, err = run(small_devkit, '--output', tmp_path / 'run', *BRIEF, '--amp', '--amp-dtype', 'float16')
    assert status == 0, err
    assert torch.load(tmp_path / 'run/last.pth', weights_only=True)['amp_scaler']['scale'] > 1


def target(*objects: tuple) -> Dict[str, torch.Tensor]:
    """Target of (class, difficult, box) triples."""
    names, difficult, boxes = zip(*objects, strict=True)
    labels = torch.tensor([voc.CLASSES.index(n) + 1 for n in names])
    return dict(boxes=torch.tensor(boxes).float(), labels=labels, difficult=torch.tensor(difficult))


def detections(*found: tuple) -> Dict[str, torch.Tensor]:
    """Detections of (class, score, box) triples."""
    names, scores, boxes = zip(*found, strict=True)
    return dict(target(*((n, False, b) for n, b in zip(names, boxes, strict=True))), scores=torch.tensor(scores))


def test_score_equals_a_computation_by_hand():
    box = {i: (20 * i, 0, 20 * i + 10, 10) for i in range(10)}
    cat, dog, cow, bus = 'cat', 'dog', 'cow', 'bus'
    targets = [
        target((cat, False, box[0]), (cat, False, box[1]), (cat, True, (40, 0, 60, 20)), (cow, True, box[8])),
        target((cat, False, box[0]), (cat, False, box[1]), *((dog, False, b) for b in box.values())),
    ]
    found = [
        detections(
            (cat, 0.9, box[0]),  # right
            (cat, 0.85, (40, 0, 60, 20)), (cat, 0.84, (40, 0, 60, 18)),  # ignored, both on the difficult cat
            (cat, 0.8, box[0]),  # wrong, that cat has been found
            (cat, 0.7, (44, 4, 50, 10)),  # wrong, inside the difficult cat but with an IoU of 0.09
            (bus, 0.9, box[5]),  # of a class without objects, which does not count
        ),
        detections(
            (cat, 0.6, box[0]),  # right
            (dog, 0.9, box[0]), (dog, 0.8, box[1]), (dog, 0.7, (40, 0, 50, 5)),  # right, the last with an IoU of 0.5
        ),
    ]
    score = voc.voc_score(found, targets)
    # precision by recall: cat 1 to 1/4, 2/4 to 2/4; dog 1 to 3/10
    cat_11point, dog_11point = (3 * 1 + 3 * 0.5) / 11, 4 / 11
    assert score.ap_11point == pytest.approx({cat: cat_11point, dog: dog_11point}, abs=1e-12)
    assert score.ap_area == pytest.approx({cat: 0.25 * 1 + 0.25 * 0.5, dog: 0.3}, abs=1e-12)
    assert score.map_11point == pytest.approx((cat_11point + dog_11point) / 2, abs=1e-12)
    assert score.map_area == pytest.approx((0.375 + 0.3) / 2, abs=1e-12)


def test_a_second_detection_is_wrong_even_if_it_overlaps_another_object():
    # COCO's rule would give it to the second object; VOC looks at the best overlap alone
    targets = [target(('cat', False, (0, 0, 10, 10)), ('cat', False, (0, 2, 10, 12)))]
    found = [detections(('cat', 0.9, (0, 0, 10, 10)), ('cat', 0.8, (0, 0, 10, 11)))]
    assert voc.voc_score(found, targets).ap_area['cat'] == pytest.approx(0.5, abs=1e-12)


def test_nothing_found_scores_0():
    found = [dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long), scores=torch.zeros(0))]
    score = voc.voc_score(found, [target(('cat', False, (0, 0, 10, 10)))])
    assert (score.map_11point, score.map_area) == (0, 0)
    with pytest.raises(BadInput, match='no object that is not difficult'):
        voc.voc_score(found, [target(('cat', True, (0, 0, 10, 10)))])


def draw_case(seed: int) -> Tuple[List[Dict[str, torch.Tensor]], List[Dict[str, torch.Tensor]]]:
    """Detections and targets with duplicates, near misses, overlapping and difficult objects, of three classes.

    Boxes are of whole pixels. No class has a multiple of 5 objects, with which a recall can be one of the 11 points,
    where other implementations are at the mercy of rounding.
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
    tensor = torch.from_numpy
    return [
        dict(boxes=tensor(shifted[i]).float(), labels=tensor(labels[i]), scores=tensor(scores[i]))
        for i in (places == n for n in range(12))
    ], [
        dict(boxes=tensor(boxes[i]).float(), labels=tensor(objects[i]), difficult=tensor(difficult[i]))
        for i in (images == n for n in range(12))
    ]


@pytest.mark.parametrize('case', json.loads((Path(__file__).parent / 'data/voc_ap.json').read_text())['cases'])
def test_score_equals_that_of_chainercv(case):
    """Expected: eval_detection_voc of chainercv 0.13.1, with corners as it takes them (the last pixel included)."""
    score = voc.voc_score(*draw_case(case['seed']))
    assert list(score.ap_area.values()) == pytest.approx(case['ap_area'], abs=1e-12)
    assert list(score.ap_11point.values()) == pytest.approx(case['ap_11point'], abs=1e-12)


def annotate(root: Path, *objects: tuple, width: int = 64, height: int = 64) -> Path:
    """Write the annotation of an image of 64 x 64 pixels in the 2012 split, with (xmin, ymin, xmax, ymax) of dogs."""
    path = root / 'VOC2012/Annotations/002001.xml'
    objects = ''.join(OBJECT.format('dog', 0, *o) for o in objects)
    path.write_text(XML.format(width=width, height=height, objects=objects))
    return path


def read(root: Path) -> Tuple[torch.Tensor, ...]:
    annotation = voc.read_annotation(root / 'VOC2012/Annotations/002001.xml', root / 'VOC2012/JPEGImages/002001.jpg')
    return annotation['boxes'].tolist(), annotation['labels'].tolist(), annotation['difficult'].tolist()


@pytest.mark.parametrize('box, corners', [
    ((1, 2, 50, '40.5'), [0, 1, 50, 40.5]),
    ((0, 0, 63, 63), [0, 0, 63, 63]),  # counts from 0
    ((1, 1, 65, 65), [0, 0, 64, 64]),
    ((-20, 5, 90, 9), [0, 4, 64, 9]),  # cut off
    ((5, 7, 5, 7), [4, 6, 5, 7]),  # one pixel
    ((64, 64, 64, 64), [63, 63, 64, 64]),
])
def test_boxes_are_corners_in_pixels_of_the_image(box, corners, small_devkit):
    annotate(small_devkit, box)
    assert read(small_devkit) == ([corners], [voc.CLASSES.index('dog') + 1], [False])


def test_parts_of_persons_and_missing_flags_are_as_published(small_devkit):
    path = annotate(small_devkit)
    objects = OBJECT.format('person', 1, 1, 1, 9, 9).replace('</object>', (
        '<part><name>head</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part></object>'))
    objects += OBJECT.format('cat', 0, 1, 1, 9, 9).replace('<difficult>0</difficult>', '')
    path.write_text(XML.format(width=64, height=64, objects=objects))
    assert read(small_devkit) == ([[0, 0, 9, 9]] * 2, [15, 8], [True, False])
    annotate(small_devkit)
    assert read(small_devkit) == ([], [], [])  # an image without objects


@pytest.mark.parametrize('box', [
    (65, 1, 70, 10), (1, -9, 10, 0), (0, 0, 0, 0), (9, 1, 8, 10), (1, 9, 10, 8), ('nan', 1, 9, 9), (1, 1, 'inf', 9),
    ('', 1, 9, 9), ('nine', 1, 9, 9)])
def test_boxes_that_are_none_are_named(box, small_devkit):
    path = annotate(small_devkit, (1, 1, 9, 9), box)
    with pytest.raises(BadInput) as error:
        read(small_devkit)
    message = str(error.value)
    numbers = all(isinstance(v, int) for v in box)
    assert str(path) in message and 'object 2' in message
    assert all(str(v) in message for v in box if numbers or not isinstance(v, int))


def replace(path: str, old: str, new: str) -> Callable[[Path], str]:
    def spoil(root: Path) -> str:
        text = (root / path).read_text()
        assert old in text
        (root / path).write_text(text.replace(old, new, 1))
        return str(root / path)
    return spoil


def write(path: str, content: bytes) -> Callable[[Path], str]:
    def spoil(root: Path) -> str:
        (root / path).write_bytes(content)
        return str(root / path)
    return spoil


def remove(path: str) -> Callable[[Path], str]:
    def spoil(root: Path) -> str:
        target = root / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        return str(target)
    return spoil


XML_FILE, PICTURE = 'VOC2007/Annotations/001002.xml', 'VOC2012/JPEGImages/002001.jpg'
SPLIT = 'VOC2012/ImageSets/Main/trainval.txt'


@pytest.mark.parametrize('spoil, reason', [
    (remove(SPLIT), 'No such file'),
    (remove('VOC2012'), 'published archives'),
    (write(SPLIT, b''), 'no images'),
    (write(SPLIT, b'002000\n\n002009\n'), 'line 3'),
    (write(SPLIT, b'002000 1 2\n'), 'line 1'),
    (write(SPLIT, b'002000\n002001\n002000\n'), 'line 3'),
    (write(SPLIT, '002000\nb\u00fccher\n'.encode('latin-1')), 'line 2'),
    (write(SPLIT, '002000\n'.encode('utf-16-le')), 'line 1'),  # without a mark it is not told from UTF-8
    (replace(XML_FILE, '<name>', '<name>un'), 'object 1'),
    (replace(XML_FILE, '<name>', '<title>'), 'mismatched tag'),
    (replace(XML_FILE, '<difficult>0', '<difficult>maybe'), 'maybe'),
    (replace(XML_FILE, '<width>64', '<width>63'), '63 x 64'),
    (replace(XML_FILE, '<height>64</height>', ''), 'size/height'),
    (write(XML_FILE, b''), 'no element found'),
    (write(XML_FILE, b'<?xml version="1.0" encoding="klingon"?><annotation/>'), 'encoding'),
    (write(XML_FILE, b'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><annotation>&b;</annotation>'), 'b'),
    (write(PICTURE, b'no picture'), 'image'),
], ids=lambda value: value if isinstance(value, str) else '')
def test_bad_data_is_named_before_training(spoil, reason, small_devkit, tmp_path):
    path = spoil(small_devkit)
    status, out, err = run(small_devkit, '--output', tmp_path / 'out', *BRIEF)
    message = error_line(err)
    assert status == 1
    assert message.startswith('train_voc.py: error: ') and path in message and reason in message
    assert not out and not (tmp_path / 'out').exists()


@pytest.mark.parametrize('path', [XML_FILE, PICTURE])
def test_missing_files_are_named_with_their_line(path, small_devkit, tmp_path):
    (small_devkit / path).unlink()
    status, _, err = run(small_devkit, '--output', tmp_path / 'out', *BRIEF)
    split = small_devkit / Path(path).parts[0] / 'ImageSets/Main/trainval.txt'
    line = split.read_text().split().index(Path(path).stem) + 1
    assert status == 1 and str(small_devkit / path) in err and f'{split}, line {line}' in err


@pytest.mark.parametrize('content', [
    b'002000\r\n\r\n  002001 \r\n002003',
    codecs.BOM_UTF8 + b'002000\n002001\n002003\n',
    '002000\n002001\n002003\n'.encode('utf-16'),
    b'002000.jpg\n002001.JPG\n002003.jpeg\n',
    b'002000  1\n002001 -1\n002003  0\n',
])
def test_lists_that_people_have_are_read(content, small_devkit):
    path = small_devkit / SPLIT
    path.write_bytes(content)
    assert list(voc.read_split(path)) == ['002000', '002001', '002003']


@pytest.mark.parametrize('mode', ['L', 'CMYK'])
def test_pictures_of_other_modes_are_read(mode, small_devkit):
    path = small_devkit / 'VOC2007/JPEGImages/003000.jpg'
    with Image.open(path) as image:
        image.convert(mode).save(path)
    image, _ = voc.VOC(small_devkit, '2007', 'test', v2.ToImage(), quiet=True)[0]
    assert image.shape == (3, 64, 64)


def test_pictures_are_not_turned_away_from_their_boxes(small_devkit):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new('RGB', (64, 32))
    image.paste('white', (0, 0, 32, 32))
    image.save(small_devkit / 'VOC2012/JPEGImages/002001.jpg', exif=exif)
    annotate(small_devkit, (1, 1, 32, 32), height=32)
    image, found = voc.VOC(small_devkit, '2012', 'trainval', v2.ToImage(), quiet=True)[1]
    assert image.shape == (3, 32, 64)
    left, top, right, bottom = found['boxes'].int()[0].tolist()
    assert image[:, top:bottom, left:right].float().mean() > 200
    annotate(small_devkit, (1, 1, 32, 32), width=32, height=64)  # for the turned picture
    with pytest.raises(BadInput, match='002001.jpg'):
        voc.VOC(small_devkit, '2012', 'trainval', v2.ToImage(), quiet=True)


def test_unreadable_image_ends_the_program_with_a_line(small_devkit, tmp_path):
    path = small_devkit / PICTURE
    path.write_bytes(path.read_bytes()[:900])  # the header can be read
    status, _, err = run(small_devkit, '--output', tmp_path / 'out', *BRIEF, '--workers', 1)  # by another process
    assert status == 1
    assert error_line(err).startswith(f'train_voc.py: error: {path} cannot be read as an image')


def test_a_split_without_objects_is_an_error(small_devkit, tmp_path):
    for path in (small_devkit / 'VOC2007/Annotations').glob('001*.xml'):
        path.write_text(XML.format(width=64, height=64, objects=''))
    split = small_devkit / 'VOC2007/ImageSets/Main/trainval.txt'
    status, _, err = run(small_devkit, '--output', tmp_path / 'none', *BRIEF)
    assert status == 1 and str(split) in error_line(err) and 'no objects' in err


def test_an_epoch_without_objects_is_an_error(small_devkit, tmp_path, monkeypatch):
    monkeypatch.setattr(v2.RandomHorizontalFlip, 'forward', lambda self, image, target: (
        image, {**target, 'boxes': target['boxes'][:0], 'labels': target['labels'][:0]}))
    status, _, err = run(small_devkit, '--output', tmp_path / 'out', *BRIEF)
    assert status == 1 and 'epoch 1 is exactly 0' in error_line(err)
    assert not (tmp_path / 'out/last.pth').exists()


@pytest.mark.parametrize('name', ['hbonet_010', 'mobilenetv2_100'])
def test_detector_takes_any_backbone_of_stride_32(name):
    model = train_voc.create_detector(name, 320).eval()
    with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16):
        maps = model.backbone(torch.zeros(1, 3, 320, 320))
        outputs = model.head(list(maps.values()))
    assert [m.shape[-1] for m in maps.values()] == [20, 10, 5, 3, 2, 1]
    assert {v.dtype for v in outputs.values()} == {torch.float32}  # coordinates keep their precision


def test_further_maps_are_those_of_torchvision():
    expected = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).backbone.extra[1:]
    extra = train_voc.create_detector('hbonet_010', 64).backbone.extra[1:]  # the first has the backbone's channels
    assert str(extra) == str(expected)
    for a, b in zip(extra.state_dict().values(), expected.state_dict().values(), strict=True):
        assert a.shape == b.shape
        if a.dim() == 4 and a.numel() > 10000:
            assert a.std() == pytest.approx(b.std().item(), rel=0.05)


def test_backbone_starts_from_pretrained_weights(server):
    features = train_voc.create_detector('hbonet_010', 96, pretrained=True).backbone.features
    expected = timm.create_model('hbonet_010', pretrained=True, features_only=True, out_indices=(-2, -1))
    assert all(torch.equal(a, b) for a, b in zip(features.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize('option', ['--resume', '--evaluate'])
@pytest.mark.parametrize('content', [
    None, b'text', {'state_dict': {}}, Path('a pickled object'), {'script': 'train_market1501.py'}])
def test_file_that_is_no_checkpoint_is_refused(option, content, devkit, tmp_path):
    path = tmp_path / 'weights.pth'
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    status, _, err = run(devkit, '--output', tmp_path / 'out', option, path, '--device', 'cpu')
    assert status == 1 and f'train_voc.py: error: {path} cannot be read as a checkpoint' in err
    assert not (tmp_path / 'out').exists()


def test_checkpoint_of_other_options_is_named(trained, devkit, tmp_path):
    path = trained['output'] / 'last.pth'
    for option, value, others in (
            ('--model', 'hbonet_025', ('--resume', '--evaluate')), ('--image-size', 96, ('--resume', '--evaluate')),
            ('--lr', 0.1, ('--resume',)), ('--epochs', 33, ('--resume',)), ('--seed', 1, ('--resume',))):
        for other in others:
            status, _, err = run(devkit, '--output', tmp_path / 'out', other, path, option, value, '--device', 'cpu')
            assert status == 1 and str(path) in err and option in err and str(value) in err


@pytest.mark.parametrize('status, options, message', [
    (1, ['--model', 'vit_tiny_patch16_224'], '--model'),
    (1, ['--model', 'hbonet_999'], '--model hbonet_999'),
    (1, ['--batch-size', 99], '--batch-size'),
    (1, ['--lr', '1e18', '--batch-size', 4], '--lr'),
    (2, ['--device', 'meta'], '--device'),
    (2, ['--device', 'quantum'], '--device'),
    (2, ['--epochs', 0], '--epochs'),
    (2, ['--epochs', 1.5], '--epochs'),
    (2, ['--epochs', '9' * 400], '--epochs'),
    (2, ['--eval-every', 0], '--eval-every'),
    (2, ['--batch-size', 1], '--batch-size'),
    (2, ['--lr', 0], '--lr'),
    (2, ['--lr', -0.1], '--lr'),
    (2, ['--lr', 'nan'], '--lr'),
    (2, ['--weight-decay', 'inf'], '--weight-decay'),
    (2, ['--workers', -1], '--workers'),
    (2, ['--seed', 2 ** 32], '--seed'),
    (2, ['--image-size', 0], '--image-size'),
    (2, ['--resume', 'last.pth', '--evaluate', 'last.pth'], '--resume'),
])
def test_options_that_cannot_work_are_named(status, options, message, small_devkit, tmp_path):
    found, _, err = run(small_devkit, '--output', tmp_path / 'out', *BRIEF, *options)
    line = error_line(err)
    assert found == status and line.startswith('train_voc.py: error: ') and message in line
    assert not (tmp_path / 'out/last.pth').exists()


def test_no_file_is_overwritten(small_devkit, tmp_path):
    mine = tmp_path / 'out/last.pth'
    mine.parent.mkdir()
    mine.write_text('years of work')
    for number in (1, 2):
        assert run(small_devkit, '--output', tmp_path / 'out', *BRIEF)[0] == 0
        assert {p.name for p in (tmp_path / f'out-{number}').iterdir()} == {'detections.png', 'last.pth', 'summary.csv'}
    assert [p.name for p in mine.parent.iterdir()] == ['last.pth'] and mine.read_text() == 'years of work'
    status, _, err = run(small_devkit, '--output', mine / 'below', *BRIEF)
    assert status == 1 and f'--output {mine / "below"}' in err
