"""scripts/train_voc.py trains and scores SSDLite on a VOCdevkit folder, and says what is wrong with bad input."""
import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Dict, List

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageDraw

for package in ('faster_coco_eval', 'torchmetrics', 'torchvision', 'tqdm'):
    pytest.importorskip(package, reason='needs pip install timm-hbonet[scripts]')

SCRIPTS = Path(__file__).parent.parent / 'scripts'
sys.path.insert(0, str(SCRIPTS))
import train_voc  # noqa: E402

SMALL = [
    '--model', 'hbonet_025', '--image-size', '96', '--batch-size', '8', '--opt', 'adamw', '--lr', '0.01',
    '--workers', '0', '--device', 'cpu']
CLASSES = dict(aeroplane='red', bottle='lime', tvmonitor='blue')
XML = """<annotation>
	<folder>{folder}</folder>
	<filename>{name}.jpg</filename>
	<source><database>The VOC2007 Database</database><annotation>PASCAL VOC2007</annotation></source>
	<size><width>{width}</width><height>{height}</height><depth>3</depth></size>
	<segmented>0</segmented>
{objects}</annotation>
"""
OBJECT = """	<object>
		<name>{name}</name>
		<pose>Unspecified</pose>
		<truncated>0</truncated>
		<difficult>{difficult}</difficult>
		<bndbox><xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax></bndbox>
	</object>
"""


def draw_split(root: Path, year: str, image_set: str, count: int, seed: int) -> None:
    """Add a split of noise images with one or two coloured shapes each to a VOCdevkit folder."""
    rs = np.random.RandomState(seed)
    folder = root / f'VOC{year}'
    for part in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
        (folder / part).mkdir(parents=True, exist_ok=True)
    names = []
    for i in range(count):
        width, height = int(rs.randint(96, 129)), int(rs.randint(96, 129))
        image = Image.fromarray(rs.randint(0, 100, (height, width, 3)).astype(np.uint8))
        draw = ImageDraw.Draw(image)
        objects = ''
        for left in (0, width // 2)[:rs.randint(1, 3)]:
            w, h = rs.randint(36, 48, 2)
            x, y = left + rs.randint(0, width // 2 - w + 1), rs.randint(0, height - h + 1)
            name = list(CLASSES)[rs.randint(3)]
            shape = draw.ellipse if name == 'bottle' else draw.rectangle
            shape((x, y, x + w - 1, y + h - 1), fill=CLASSES[name])
            objects += OBJECT.format(name=name, difficult=0, xmin=x + 1, ymin=y + 1, xmax=x + w, ymax=y + h)
        name = f'{seed:03}{i:03}' if year == '2007' else f'2012_{seed:03}{i:03}'
        names.append(name)
        image.save(folder / 'JPEGImages' / f'{name}.jpg', quality=95)
        (folder / 'Annotations' / f'{name}.xml').write_text(
            XML.format(folder=folder.name, name=name, width=width, height=height, objects=objects))
    (folder / 'ImageSets' / 'Main' / f'{image_set}.txt').write_text(''.join(f'{n}\n' for n in names))


def draw_voc(root: Path, count: int = 8) -> None:
    """Make a VOCdevkit folder, with `count` images in each trainval split and others in the test split."""
    draw_split(root, '2007', 'trainval', count, seed=1)
    draw_split(root, '2012', 'trainval', count, seed=2)
    draw_split(root, '2007', 'test', 8, seed=3)


def run_script(*args: object, launcher: List[str] = ()) -> subprocess.CompletedProcess:
    command = [sys.executable, *launcher, str(SCRIPTS / 'train_voc.py'), *map(str, args)]
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.run(command, capture_output=True, text=True, timeout=250, env=env)


def run_here(monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    """Run in this process, which has the libraries loaded."""
    monkeypatch.setattr(sys, 'argv', ['train_voc.py', *map(str, args)])
    train_voc.main()


def read_summary(output: Path) -> List[Dict[str, str]]:
    with open(output / 'summary.csv', newline='') as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope='module')
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp('data') / 'VOCdevkit'
    draw_voc(root)
    return root


@pytest.fixture(scope='module')
def large_voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough images to learn from for others."""
    root = tmp_path_factory.mktemp('data') / 'VOCdevkit'
    draw_voc(root, 41)
    return root


@pytest.fixture(scope='module')
def trained(large_voc: Path, tmp_path_factory: pytest.TempPathFactory) -> Dict[str, object]:
    """A short training run, and what it printed."""
    output = tmp_path_factory.mktemp('trained')
    result = run_script(
        large_voc, '--output', output, *SMALL, '--epochs', 40, '--eval-every', 20, '--augmentation', 'hflip')
    assert result.returncode == 0, result.stderr
    return dict(output=output, stdout=result.stdout, stderr=result.stderr)


def score_line(stdout: str) -> str:
    line, = (x for x in stdout.splitlines() if x.startswith('mAP at IoU 0.5'))
    return line


def test_training_lowers_the_loss_and_finds_objects_in_unseen_images(trained):
    rows = read_summary(trained['output'])
    assert [int(r['epoch']) for r in rows] == list(range(40))
    assert float(rows[-1]['train_loss']) < 0.25 * float(rows[0]['train_loss'])
    assert float(rows[-1]['eval_map_11point']) > 0.5
    assert float(rows[-1]['eval_map_area']) > 0.5
    assert [r['epoch'] for r in rows if r['eval_map_area']] == ['19', '39']
    assert f'11-point {float(rows[-1]["eval_map_11point"]):.4f}' in score_line(trained['stdout'])
    assert 'epoch 39:   0%' in trained['stderr']  # progress; whether a bar is drawn at its end depends on the time


def test_picture_shows_the_detections(trained, large_voc):
    with Image.open(trained['output'] / 'detections.png') as file:
        picture = np.asarray(file.convert('RGB')).astype(int)
    assert picture.shape == (2 + 2 * 322, 2 + 4 * 322, 3)
    names = (large_voc / 'VOC2007/ImageSets/Main/test.txt').read_text().split()
    changed = []
    for i, name in enumerate(names[:8]):
        with Image.open(large_voc / f'VOC2007/JPEGImages/{name}.jpg') as file:
            plain = np.asarray(file.resize((320, 320), Image.Resampling.BILINEAR)).astype(int)
        top, left = 2 + 322 * (i // 4), 2 + 322 * (i % 4)
        changed.append((np.abs(picture[top:top + 320, left:left + 320] - plain).max(axis=2) > 60).mean())
    assert max(changed) < 0.2  # lines and captions on the images of these names
    assert sum(c > 0.001 for c in changed) >= 4


def test_evaluation_alone_gives_the_score_of_training(trained, large_voc, tmp_path, monkeypatch, capsys):
    run_here(
        monkeypatch, large_voc, '--evaluate', trained['output'] / 'last.pth', '--output', tmp_path, '--workers', 0,
        '--device', 'cpu')
    assert score_line(capsys.readouterr().out) == score_line(trained['stdout'])
    assert [p.name for p in tmp_path.iterdir()] == ['detections.png']


def test_resumed_run_equals_an_uninterrupted_one(voc, tmp_path, monkeypatch):
    args = [voc, *SMALL, '--epochs', 4, '--eval-every', 2]
    run_here(monkeypatch, *args, '--output', tmp_path / 'whole')

    train_epoch = train_voc.train_epoch

    def interrupted(model, loader, optimizer, scaler, scheduler, epoch, args):
        if epoch == 2:
            raise KeyboardInterrupt
        return train_epoch(model, loader, optimizer, scaler, scheduler, epoch, args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_voc, 'train_epoch', interrupted)
        run_here(patch, *args, '--output', tmp_path / 'parts')
    assert len(read_summary(tmp_path / 'parts')) == 2
    run_here(monkeypatch, *args, '--output', tmp_path / 'parts', '--resume', tmp_path / 'parts' / 'last.pth')

    whole, parts = (torch.load(tmp_path / n / 'last.pth', weights_only=True) for n in ('whole', 'parts'))
    for key in ('epoch', 'best', 'state_dict'):
        torch.testing.assert_close(whole[key], parts[key], rtol=0, atol=0)
    torch.testing.assert_close(whole['optimizer']['state'], parts['optimizer']['state'], rtol=0, atol=0)
    assert read_summary(tmp_path / 'whole') == read_summary(tmp_path / 'parts')


def test_torchrun_trains_and_scores_in_two_processes(voc, tmp_path, monkeypatch, capsys):
    result = run_script(
        voc, '--output', tmp_path, *SMALL, '--model', 'mobilenetv2_100', '--epochs', 1, '--batch-size', 4,
        '--amp', 'bfloat16',
        launcher=['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2'])
    assert result.returncode == 0, result.stderr
    run_here(
        monkeypatch, voc, '--evaluate', tmp_path / 'last.pth', '--output', tmp_path, '--amp', 'bfloat16', '--device',
        'cpu', '--workers', 0)
    assert score_line(result.stdout) == score_line(capsys.readouterr().out)


def target(*objects: tuple) -> Dict[str, torch.Tensor]:
    """Target of (class, difficult, box) triples."""
    names, difficult, boxes = zip(*objects, strict=True)
    labels = torch.tensor([train_voc.CLASSES.index(n) + 1 for n in names])
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
    score = train_voc.voc_score(found, targets)
    # precision by recall: cat 1 to 1/4, 2/4 to 2/4; dog 1 to 3/10
    cat_11point, dog_11point = (3 * 1 + 3 * 0.5) / 11, 4 / 11
    assert score.map_11point == pytest.approx((cat_11point + dog_11point) / 2, abs=1e-6)
    assert score.ap_area == pytest.approx({cat: 0.25 * 1 + 0.25 * 0.5, dog: 0.3}, abs=1e-4)
    assert score.map_area == pytest.approx((0.375 + 0.3) / 2, abs=1e-4)


def test_boxes_are_corners_in_pixels(tmp_path):
    path = tmp_path / 'a.xml'
    objects = OBJECT.format(name='person', difficult=1, xmin=1, ymin=2, xmax=50, ymax='40.5')
    path.write_text(XML.format(folder='VOC2007', name='a', width=50, height=60, objects=objects))
    boxes, labels, difficult = train_voc.read_objects(path)
    assert boxes.tolist() == [[0, 1, 50, 40.5]]
    assert [train_voc.CLASSES[i - 1] for i in labels] == ['person']
    assert difficult.tolist() == [True]


@pytest.mark.parametrize('name', ['hbonet_010', 'mobilenetv2_100'])
def test_detector_takes_any_backbone_of_stride_32(name):
    model = train_voc.create_detector(name, 320).eval()
    with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16):
        maps = model.backbone(torch.zeros(1, 3, 320, 320))
        outputs = model.head(list(maps.values()))
    assert [m.shape[-1] for m in maps.values()] == [20, 10, 5, 3, 2, 1]
    assert {v.dtype for v in outputs.values()} == {torch.float32}  # coordinates keep their precision


def test_backbone_starts_from_pretrained_weights(server):
    model = train_voc.create_detector('hbonet_010', 96, pretrained=True)
    expected = timm.create_model('hbonet_010', pretrained=True).conv_stem[0].weight
    torch.testing.assert_close(dict(model.backbone.features.named_parameters())['conv_stem.0.weight'], expected)


def bad_split(root: Path) -> str:
    (root / 'VOC2012/ImageSets/Main/trainval.txt').unlink()
    return 'VOC2012/ImageSets/Main/trainval.txt is missing. Unpack the published VOC2012 trainval archive'


def bad_class(root: Path) -> str:
    path = root / 'VOC2007/Annotations/001000.xml'
    path.write_text(path.read_text().replace('<name>', '<name>un', 1))
    return '001000.xml has an object of the unknown class'


def empty_box(root: Path) -> str:
    path = root / 'VOC2012/Annotations/2012_002003.xml'
    path.write_text(XML.format(folder='VOC2012', name='2012_002003', width=96, height=96, objects=OBJECT.format(
        name='dog', difficult=0, xmin=5, ymin=5, xmax=5, ymax=40)))
    return "2012_002003.xml has an empty or inverted box of 'dog': xmin 5, ymin 5, xmax 5, ymax 40. Correct the box"


def inverted_box(root: Path) -> str:
    path = root / 'VOC2012/Annotations/2012_002003.xml'
    path.write_text(XML.format(folder='VOC2012', name='2012_002003', width=96, height=96, objects=OBJECT.format(
        name='dog', difficult=0, xmin=5, ymin=50, xmax=25, ymax=40)))
    return "2012_002003.xml has an empty or inverted box of 'dog': xmin 5, ymin 50, xmax 25, ymax 40. Correct the box"


def bad_xml(root: Path) -> str:
    (root / 'VOC2007/Annotations/001002.xml').write_text('<annotation><object>')
    return '001002.xml cannot be read as a VOC annotation'


@pytest.mark.parametrize('spoil', [bad_split, bad_class, empty_box, inverted_box, bad_xml])
def test_bad_data_is_named_before_training(spoil, voc, tmp_path, monkeypatch):
    root = shutil.copytree(voc, tmp_path / 'VOCdevkit')
    expected = spoil(root)
    with pytest.raises(SystemExit) as error:
        run_here(monkeypatch, root, '--output', tmp_path / 'out', *SMALL)
    assert error.value.code.startswith(f'error: {root}/VOC')
    assert expected in error.value.code


def test_unreadable_image_ends_the_program_with_a_line(voc, tmp_path):
    root = shutil.copytree(voc, tmp_path / 'VOCdevkit')
    path = root / 'VOC2012/JPEGImages/2012_002001.jpg'
    path.write_bytes(path.read_bytes()[:1000])
    result = run_script(root, '--output', tmp_path / 'out', *SMALL, '--workers', 1)  # read by another process
    assert result.returncode == 1
    assert f'error: {path} cannot be read as an image' in result.stderr
    assert 'Unpack the published archive again' in result.stderr
    assert 'Traceback' not in result.stderr


@pytest.mark.parametrize('option', ['--resume', '--evaluate'])
def test_file_that_is_no_checkpoint_is_refused(option, voc, tmp_path, monkeypatch):
    path = tmp_path / 'weights.pth'
    for content in (None, {'state_dict': {}}, Path('a pickled object')):
        if content is not None:
            torch.save(content, path)
        with pytest.raises(SystemExit, match=f'error: {path} cannot be read as a checkpoint of this script'):
            run_here(monkeypatch, voc, '--output', tmp_path / 'out', *SMALL, option, path)


def test_resume_refuses_the_checkpoint_of_another_model(trained, voc, tmp_path, monkeypatch):
    path = trained['output'] / 'last.pth'
    with pytest.raises(SystemExit, match=f'{path} is of --model hbonet_025 --image-size 96, not hbonet_010 at 96'):
        run_here(monkeypatch, voc, '--output', tmp_path, *SMALL, '--model', 'hbonet_010', '--resume', path)


@pytest.mark.parametrize('options,message', [
    (['--model', 'vit_tiny_patch16_224'], 'has features at strides'),
    (['--model', 'hbonet_999'], 'Unknown model'),
    (['--batch-size', '99'], 'Lower --batch-size'),
])
def test_options_that_cannot_work_are_named(options, message, voc, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=message):
        run_here(monkeypatch, voc, '--output', tmp_path, *SMALL, *options)
