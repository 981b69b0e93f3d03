"""A user trains and evaluates re-identification on a folder in the format of Market-1501."""
import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Tuple

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageDraw
from sklearn.metrics import average_precision_score

pytest.importorskip(
    'pytorch_metric_learning', reason="needs pytorch-metric-learning, run: pip install 'timm-hbonet[scripts]'")
pytest.importorskip('torchmetrics', reason="needs torchmetrics, run: pip install 'timm-hbonet[scripts]'")

SCRIPT = Path(__file__).parents[1] / 'scripts/train_market1501.py'
sys.path.insert(0, str(SCRIPT.parent))

import train_market1501  # noqa: E402
from train_market1501 import Features, compute_metrics, rank_gallery, read_split, read_test  # noqa: E402

TRAIN_IDENTITIES, TEST_IDENTITIES, CAMERAS = range(1, 25), range(25, 37), range(1, 4)
COLORS = ((200, 40, 40), (40, 160, 60), (40, 70, 200), (220, 200, 50), (235, 235, 235), (30, 30, 30))
OPTIONS = [
    '--model', 'hbonet_025', '--image-size', '64', '32', '--identities-per-batch', '8', '--lr', '3e-3',
    '--workers', '0']
ENVIRONMENT = {**os.environ, 'CUDA_VISIBLE_DEVICES': ''}  # the same to the bit only on a CPU


def draw_person(identity: int, camera: int, shot: int) -> Image.Image:
    """Draw a person whose clothes tell the identity, as a camera with its own light and background sees it."""
    outfit = identity * 7 % 36  # each identity its own
    shirt, trousers, stripes = COLORS[outfit // 6], COLORS[outfit % 6], identity % 3
    view = np.random.RandomState(identity * 1000 + camera * 100 + shot)
    image = Image.new('RGB', (32, 64), tuple(np.random.RandomState(5000 + camera).randint(60, 200, 3).tolist()))
    draw = ImageDraw.Draw(image)
    x, y = view.randint(-3, 4, 2).tolist()
    draw.ellipse((12 + x, 4 + y, 20 + x, 14 + y), fill=(200, 160, 130))
    draw.rectangle((8 + x, 14 + y, 24 + x, 36 + y), fill=shirt)
    for i in range(stripes):
        draw.rectangle((8 + x, 17 + 6 * i + y, 24 + x, 19 + 6 * i + y), fill=trousers)
    draw.rectangle((10 + x, 36 + y, 15 + x, 60 + y), fill=trousers)
    draw.rectangle((17 + x, 36 + y, 22 + x, 60 + y), fill=trousers)
    light = np.random.RandomState(6000 + camera).uniform(0.8, 1.1, 3) * view.uniform(0.9, 1.1)
    pixels = np.asarray(image) * light + view.normal(0, 8, (64, 32, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def add_image(root: Path, split: str, identity: int, camera: int, shot: int, image: Image.Image) -> Path:
    name = f'{identity:04}' if identity >= 0 else '-1'
    path = root / split / f'{name}_c{camera}s1_{shot:06}_01.jpg'
    image.save(path, quality=95)
    return path


@pytest.fixture(scope='module')
def market(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp('Market-1501')
    for split in ('bounding_box_train', 'query', 'bounding_box_test'):
        (root / split).mkdir()
        (root / split / 'Thumbs.db').write_bytes(b'as in the published archive')
    for identity in TRAIN_IDENTITIES:
        for camera in CAMERAS:
            for shot in range(3):
                add_image(root, 'bounding_box_train', identity, camera, shot, draw_person(identity, camera, shot))
    for identity in TEST_IDENTITIES:
        for camera in CAMERAS:
            add_image(root, 'query', identity, camera, 0, draw_person(identity, camera, 0))
            for shot in range(1, 3):
                add_image(root, 'bounding_box_test', identity, camera, shot, draw_person(identity, camera, shot))
    noise = np.random.RandomState(0)
    for shot in range(10):
        for identity in (-1, 0):
            pixels = noise.randint(0, 256, (64, 32, 3), dtype=np.uint8)
            add_image(root, 'bounding_box_test', identity, 1 + shot % 3, shot, Image.fromarray(pixels))
    return root


def read_metrics(output: str) -> Dict[str, float]:
    return {name: float(value) for name, value in re.findall(r'(mAP|rank-\d+) ([\d.]+) %', output)}


def read_losses(output: str) -> List[float]:
    return [float(loss) for loss in re.findall(r'^Epoch \d+ of \d+: loss ([\d.]+)$', output, re.MULTILINE)]


def run_main(*args: object) -> Tuple[str, str]:
    """Run the script in this process. Returns what it prints, and its progress or the message that it fails with."""
    with (
            pytest.MonkeyPatch.context() as monkeypatch,
            contextlib.redirect_stdout(io.StringIO()) as stdout,
            contextlib.redirect_stderr(io.StringIO()) as stderr,
    ):
        monkeypatch.setattr(sys, 'argv', ['train_market1501.py', *map(str, args)])
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
        try:
            train_market1501.main()
        except SystemExit as e:
            assert isinstance(e.code, str), stderr.getvalue()  # Python prints it, and exits with status 1
            return stdout.getvalue(), e.code
    return stdout.getvalue(), stderr.getvalue()


@pytest.fixture(scope='module')
def trained(market: Path, tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Any]:
    output = tmp_path_factory.mktemp('trained')
    stdout, stderr = run_main('--data', market, '--output', output, *OPTIONS, '--epochs', 28)
    return dict(output=output, stdout=stdout, stderr=stderr)


@pytest.fixture
def copy(market: Path, tmp_path: Path) -> Path:
    return shutil.copytree(market, tmp_path / 'Market-1501')


def test_training_learns_to_recognize_unseen_persons(trained: Dict[str, Any]) -> None:
    losses, metrics = read_losses(trained['stdout']), read_metrics(trained['stdout'])
    print('losses', losses, 'metrics', metrics)
    assert len(losses) == 28
    assert losses[-1] < 0.8 * losses[0]
    # by chance: 4 of the 80 gallery images of a query match, so rank-1 is 5 % and mAP about 10 %
    assert metrics['rank-1'] > 30
    assert metrics['mAP'] > 35
    assert metrics['rank-1'] <= metrics['rank-5'] <= metrics['rank-10'] <= 100
    assert 'Epoch 28: 100%' in trained['stderr']  # progress
    assert sorted(p.name for p in trained['output'].iterdir()) == ['last.pth', 'matches.png']


def test_evaluation_only_gives_the_same_figures(
        market: Path, trained: Dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(market / 'query', tmp_path / 'test/query')
    shutil.copytree(market / 'bounding_box_test', tmp_path / 'test/bounding_box_test')
    printed, _ = run_main(
        '--data', tmp_path / 'test', '--output', tmp_path, '--evaluate', trained['output'] / 'last.pth', *OPTIONS)
    assert read_metrics(printed) == read_metrics(trained['stdout'])
    assert (tmp_path / 'matches.png').read_bytes() == (trained['output'] / 'matches.png').read_bytes()


def test_checkpoint_loads_into_timm(trained: Dict[str, Any]) -> None:
    model = timm.create_model(
        'hbonet_025', num_classes=len(TRAIN_IDENTITIES), checkpoint_path=str(trained['output'] / 'last.pth'))
    saved = torch.load(trained['output'] / 'last.pth', weights_only=True)['state_dict']
    assert torch.equal(model.classifier.weight, saved['classifier.weight'])


def test_picture_frames_matches_green_and_others_red(trained: Dict[str, Any]) -> None:
    with Image.open(trained['output'] / 'matches.png') as image:
        assert image.format == 'PNG'
        assert image.size == (1100, 1760)  # 8 queries
        pixels = np.asarray(image.convert('RGB')).reshape(-1, 3)
    for color in ((50, 205, 50), (255, 0, 0)):  # CSS limegreen and red
        assert (pixels == color).all(1).sum() > 1000


def test_run_that_was_killed_resumes_to_the_same_result(
        market: Path, tmp_path: Path) -> None:
    options = ['--data', market, *OPTIONS, '--model', 'hbonet_010', '--epochs', 3, '--workers', 1]
    uninterrupted, _ = run_main(*options, '--output', tmp_path / 'uninterrupted')

    command = [sys.executable, SCRIPT, *options, '--output', tmp_path / 'killed']
    with subprocess.Popen(
            list(map(str, command)), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as process:
        assert read_losses(process.stdout.readline()) == read_losses(uninterrupted)[:1]
        process.kill()
    last = tmp_path / 'killed/last.pth'
    _, message = run_main(*options, '--output', tmp_path / 'killed')
    assert f'{last} is of an earlier run' in message and '--resume' in message
    resumed, _ = run_main(*options, '--output', tmp_path / 'killed', '--resume', last)

    assert read_losses(resumed) == read_losses(uninterrupted)[1:]
    assert read_metrics(resumed) == read_metrics(uninterrupted)
    a, b = (torch.load(tmp_path / f / 'last.pth', weights_only=True) for f in ('uninterrupted', 'killed'))
    assert a['epoch'] == b['epoch'] == 3
    assert all(torch.equal(a['state_dict'][k], b['state_dict'][k]) for k in a['state_dict'])
    assert a['optimizer']['param_groups'] == b['optimizer']['param_groups']


def test_torchrun_trains_two_processes_as_one_model(market: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2, SCRIPT,
        '--data', market, '--output', tmp_path, *OPTIONS, '--model', 'hbonet_010', '--epochs', 1, '--amp']
    result = subprocess.run(
        list(map(str, command)), env=ENVIRONMENT, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stderr
    assert len(read_losses(result.stdout)) == 1
    assert len(read_metrics(result.stdout)) == 4
    # 216 images, half for each process, are 3 batches of 32
    assert '3/3' in result.stderr
    assert torch.load(tmp_path / 'last.pth', weights_only=True)['options']['world_size'] == 2


def make_features(*rows: Sequence[float]) -> Features:
    """Features of rows (angle in degrees, identity, camera)."""
    angles, identities, cameras = torch.tensor(rows).T
    embeddings = torch.stack([angles.deg2rad().cos(), angles.deg2rad().sin()], 1)
    return Features(embeddings, identities.long(), cameras.long())


def test_metrics_are_those_computed_by_hand() -> None:
    gallery = make_features(
        (1, 7, 1),  # ignored for the first query, same identity and camera
        (2, 8, 1),  # same camera, but another person
        (3, 7, 2),
        (4, 0, 3),  # distractor
        (5, 7, 3),
        (100, 9, 1),
        (170, 8, 2),  # ends farther than a right angle from the query, of negative similarity
    )
    query = make_features((0, 7, 1), (60, 8, 3))
    assert [r.tolist() for r in rank_gallery(query, gallery)] == [[1, 2, 3, 4, 5, 6], [5, 4, 3, 2, 1, 0, 6]]
    # first: matches at ranks 2 and 4, AP = (1/2 + 2/4) / 2; second: at ranks 5 and 7, AP = (1/5 + 2/7) / 2
    metrics = compute_metrics(query, gallery)
    assert metrics == pytest.approx({
        'mAP': 100 * (1 / 2 + (1 / 5 + 2 / 7) / 2) / 2, 'rank-1': 0, 'rank-5': 100, 'rank-10': 100})
    one = compute_metrics(make_features((3, 7, 1), (60, 8, 3)), gallery)
    assert (one['rank-1'], one['rank-5']) == (50, 100)


def test_metrics_match_those_of_scikit_learn_in_chunks() -> None:
    generator = torch.Generator().manual_seed(0)
    features = []
    for count in (300, 500):
        embeddings = torch.randn(count, 8, generator=generator)
        identities = torch.randint(0, 10, (count,), generator=generator)
        cameras = torch.randint(1, 7, (count,), generator=generator)
        features.append(Features(torch.nn.functional.normalize(embeddings), identities, cameras))
    query, gallery = features
    precisions = []
    for embedding, identity, camera in zip(*query, strict=True):
        valid = ~((gallery.identities == identity) & (gallery.cameras == camera))
        precisions.append(average_precision_score(
            (gallery.identities == identity)[valid], (gallery.embeddings @ embedding)[valid]))
    assert compute_metrics(query, gallery)['mAP'] == pytest.approx(100 * np.mean(precisions), abs=1e-3)


def test_junk_is_dropped_and_distractors_are_in_the_gallery_only(copy: Path) -> None:
    for split in ('bounding_box_train', 'query'):
        for identity in (-1, 0):
            add_image(copy, split, identity, 1, 0, draw_person(1, 1, 0))
    query, gallery = read_test(copy)
    assert len(query) == 12 * 3 and min(s.identity for s in query) == 25
    assert len(gallery) == 12 * 3 * 2 + 10 and sum(s.identity == 0 for s in gallery) == 10
    assert min(s.identity for s in read_split(copy, 'bounding_box_train')) == 1
    sample = query[-1]
    assert (sample.path.name, sample.identity, sample.camera) == ('0036_c3s1_000000_01.jpg', 36, 3)


def remove_gallery(root: Path) -> List[str]:
    shutil.rmtree(root / 'bounding_box_test')
    return [f'{root / "bounding_box_test"} is missing', '--data']


def empty_query(root: Path) -> List[str]:
    for path in (root / 'query').glob('*.jpg'):
        path.unlink()
    return [f'{root / "query"} has no images of persons', '--data']


def misname(root: Path) -> List[str]:
    path = root / 'bounding_box_train/0002_c1s1_000000_01.jpg'
    path.rename(path.with_name('person2.jpg'))
    return [f'{path.with_name("person2.jpg")} is not named as in Market-1501', 'Rename or remove']


def truncate(root: Path) -> List[str]:
    path = root / 'bounding_box_test/0025_c1s1_000001_01.jpg'
    path.write_bytes(path.read_bytes()[:500])
    return [f'cannot read {path} as an image: ', 'Extract it again']


def leave_single_image(root: Path) -> List[str]:
    path = add_image(root, 'bounding_box_train', 99, 1, 0, draw_person(99, 1, 0))
    return [f'{path} is the only image of identity 0099', 'Add another, or remove']


def leave_single_camera(root: Path) -> List[str]:
    for path in (root / 'bounding_box_test').glob('0030_c[23]*.jpg'):
        path.unlink()
    return [f'{root / "query/0030_c1s1_000000_01.jpg"} has no match', 'another camera than 1']


@pytest.mark.parametrize(
    'spoil', [remove_gallery, empty_query, misname, leave_single_image, leave_single_camera, truncate])
def test_spoilt_data_set_is_named(
        spoil: Callable[[Path], List[str]], copy: Path, trained: Dict[str, Any]) -> None:
    expected = spoil(copy)
    arguments = ['--data', copy, '--output', copy / 'output', *OPTIONS, '--workers', 1]
    if spoil is truncate:
        arguments += ['--evaluate', trained['output'] / 'last.pth']
    _, message = run_main(*arguments)
    assert message.startswith('train_market1501.py: ')
    assert all(e in message for e in expected), message
    assert '\n' not in message
    assert not list((copy / 'output').iterdir())


def test_checkpoint_that_does_not_fit_is_named(
        market: Path, copy: Path, tmp_path: Path, trained: Dict[str, Any]) -> None:
    last = trained['output'] / 'last.pth'
    options = ['--data', market, '--output', tmp_path / 'output', *OPTIONS, '--epochs', 28]
    for option in ('--resume', '--evaluate'):
        _, message = run_main(*options, option, last, '--model', 'hbonet_010')
        assert f'{last} was made with model hbonet_025, not hbonet_010. Run with the same model' in message
    assert 'made with lr 0.003, not 0.1' in run_main(*options, '--resume', last, '--lr', 0.1)[1]
    for path in (copy / 'bounding_box_train').glob('0001_*.jpg'):
        path.unlink()
    _, message = run_main(*options, '--resume', last, '--data', copy)
    assert f'{last} was trained on other identities than {copy}' in message

    picture = trained['output'] / 'matches.png'
    absent, pickled = tmp_path / 'absent.pth', tmp_path / 'pickled.pth'
    torch.save({'options': Path('x')}, pickled)  # not opened, as a pickle can run code
    for path, reason in ((absent, 'No such file'), (picture, 'damaged'), (pickled, 'not from this script')):
        _, message = run_main(*options, '--evaluate', path)
        assert f'cannot open {path}: ' in message and reason in message
    assert not list((tmp_path / 'output').iterdir())


def test_bad_options_are_named(market: Path, tmp_path: Path) -> None:
    options = ['--data', market, '--output', tmp_path, *OPTIONS]
    assert 'cannot create --model hbonet_101' in run_main(*options, '--model', 'hbonet_101')[1]
    _, message = run_main(*options, '--identities-per-batch', 25)
    assert 'has 24 identities, fewer than --identities-per-batch 25' in message
    assert 'the loss is nan in epoch 1. Train with a smaller --lr' in run_main(*options, '--lr', 1e30)[1]
