"""The commands of docs/fashion_mnist.md run timm's own scripts, and results/fashion_mnist is what its files say.

Training is on handwritten digits, in files of the format of Fashion-MNIST.
"""
import gzip
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from pages import assert_equal_to
from PIL import Image
from safetensors.torch import load_file
from script_runner import error_line, run_script
from sklearn.datasets import load_digits
from timm_scripts import (
    RECIPES,
    ROOT,
    assert_learned,
    best_top1,
    learning_rates,
    load_checkpoint,
    needs_repo,
    result,
    run_command,
)
from torch.utils.flop_counter import FlopCounterMode

RESULTS = ROOT / 'results' / 'fashion_mnist'
SMALL = ['--workers', '1', '--batch-size', '16']
# 20 steps an epoch without warm-up, as few steps learn little of it
QUICK = ['--epochs', '3', '--lr', '0.02', '--warmup-epochs', '0', '--bn-momentum', '0.5', '--log-interval', '1']


def images_and_labels():
    """320 digits to train on, and 64 to test on."""
    digits = load_digits()
    images = np.stack([
        np.asarray(Image.fromarray((x * 15.9).astype('uint8')).resize((28, 28))) for x in digits.images[:384]])
    labels = digits.target[:384].astype('uint8')
    return {'train': (images[:320], labels[:320]), 't10k': (images[320:], labels[320:])}


@pytest.fixture(scope='module')
def workspace(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp('fashion_mnist')


@pytest.fixture(scope='module')
def data(workspace) -> Path:
    """What the page's shell commands make of Debian's files."""
    package = workspace / 'package'
    package.mkdir()
    for split, (images, labels) in images_and_labels().items():
        for kind, array in ((f'images-idx{images.ndim}', images), ('labels-idx1', labels)):
            header = np.array([0x800 + array.ndim, *array.shape], '>i4').tobytes()
            (package / f'{split}-{kind}-ubyte.gz').write_bytes(gzip.compress(header + array.tobytes()))
    page = (ROOT / 'docs' / 'fashion_mnist.md').read_text(encoding='utf-8')
    code = re.search(r'^mkdir -p DIR.*?^done$', page, re.MULTILINE | re.DOTALL)[0]
    code = code.replace('/usr/share/datasets/fashion-mnist', str(package)).replace('DIR/', f'{workspace}/data/')
    subprocess.run(['bash', '-euc', code], check=True)
    return workspace / 'data'


@pytest.fixture(scope='module')
def run(workspace, data):
    """Function that runs a command of the page with some text in it, and returns what it logged and printed."""

    def run(text, *args, folder='RUN'):
        places = {'DIR': data, 'OUT': workspace / 'out', 'RUN': folder, 'hbonet_035': 'hbonet_010'}
        return run_command('fashion_mnist.md', text, *args, cwd=workspace, places=places)

    return run


@pytest.fixture(scope='module')
def trained(run, workspace):
    """The folder of a run, and what was printed."""
    output = run('train.py', *SMALL, *QUICK)
    return workspace / 'out' / 'hbonet_010-seed0', output


def cosine(steps):
    return [0.01 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]


def test_recipe_values():
    """results/fashion_mnist is of this recipe: a change asks for other runs."""
    assert yaml.safe_load((RECIPES / 'fashion_mnist.yaml').read_text()) == dict(
        dataset='torch/fashion_mnist', num_classes=10, in_chans=1, img_size=32, mean=[0.286], std=[0.353],
        interpolation='bilinear', crop_pct=1., epochs=15, batch_size=256, workers=1, opt='sgd', momentum=0.9,
        weight_decay=1e-4, sched='cosine', sched_on_updates=True, lr=0.1, min_lr=0., warmup_epochs=1, warmup_lr=1e-3,
        train_interpolation='bilinear', scale=[0.6, 1.], ratio=[0.9, pytest.approx(1 / 0.9)], hflip=0.5,
        color_jitter=None, smoothing=0., drop=0., channels_last=True)


@needs_repo
def test_train(trained):
    folder, output = trained
    assert_learned(folder, epochs=3)
    assert 'input_size: (1, 32, 32)' in output
    assert learning_rates(output) == pytest.approx(cosine(60), rel=1e-3)
    checkpoint = load_checkpoint(folder / 'last.pth.tar')
    assert checkpoint['state_dict']['conv_stem.conv.weight'].shape[1] == 1
    assert checkpoint['state_dict']['classifier.weight'].shape[0] == 10
    assert {(x['momentum'], x['nesterov']) for x in checkpoint['optimizer']['param_groups']} == {(0.9, True)}


@needs_repo
def test_resume(run, trained, workspace, tmp_path):
    shutil.copy(trained[0] / 'checkpoint-0.pth.tar', tmp_path / 'last.pth.tar')
    output = run('--resume', *SMALL, *QUICK, folder=tmp_path)
    assert 'Train: 0' not in output
    assert learning_rates(output) == pytest.approx(cosine(60)[20:], rel=1e-3)
    rows = (workspace / 'out' / 'hbonet_010-seed0-resumed' / 'summary.csv').read_text().splitlines()
    assert [row.partition(',')[0] for row in rows] == ['epoch', '1', '2']


@needs_repo
def test_validate_gives_the_top1_of_training(run, trained, tmp_path):
    shutil.copy(trained[0] / 'model_best.pth.tar', tmp_path / 'last.pth.tar')
    found = result(run('validate.py', *SMALL, folder=tmp_path))
    assert found['top1'] == pytest.approx(best_top1(trained[1]), abs=1e-4)


@needs_repo
def test_avg_checkpoints(run, trained, workspace, tmp_path):
    states = []
    for epoch in range(3):
        # as the last of the page's five epochs, and two that are not among them
        name = 'model_best.pth.tar' if epoch == 0 else f'checkpoint-{12 + epoch}.pth.tar'
        shutil.copy(trained[0] / f'checkpoint-{epoch}.pth.tar', tmp_path / name)
        states.append(load_checkpoint(tmp_path / name)['state_dict'])
    run('avg_checkpoints.py', folder=tmp_path)
    average = load_file(workspace / 'average.safetensors')
    assert average.keys() == states[0].keys()
    for k, v in average.items():
        torch.testing.assert_close(v.double(), (states[1][k].double() + states[2][k].double()) / 2)


@needs_repo
def test_clean_and_export(run, trained, workspace):
    run('clean_checkpoint.py', folder=trained[0])
    expected = load_checkpoint(trained[0] / 'last.pth.tar')['state_dict']
    cleaned = load_file(workspace / 'clean.safetensors')
    assert cleaned.keys() == expected.keys() and all(torch.equal(v, expected[k]) for k, v in cleaned.items())

    for module in ('timmx', 'onnx', 'onnxscript', 'onnxslim', 'onnxruntime'):
        pytest.importorskip(module, reason=f'{module} is not installed: pip install -e ".[test]", Python 3.11')
    import onnxruntime
    run('timmx')
    model = timm.create_model('hbonet_010', num_classes=10, in_chans=1).eval()
    model.load_state_dict(cleaned)
    images = torch.randn(3, 1, 32, 32)
    found = onnxruntime.InferenceSession(workspace / 'hbonet_010.onnx').run(None, {'input': images.numpy()})[0]
    assert_equal_to(found, model(images))


@pytest.fixture
def runs(tmp_path):
    """Two runs of one model and one of another, of two epochs, as files and as a folder of train.py."""
    pytest.importorskip('matplotlib', reason="needs matplotlib: pip install -e '.[scripts]'")

    def write(name, *top1):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        rows = [f'{epoch},{2 - epoch},{1.5 - epoch},{value},99,0.1' for epoch, value in enumerate(top1)]
        path.write_text('\n'.join(['epoch,train_loss,eval_loss,eval_top1,eval_top5,lr', *rows]))

    write('small-seed0.csv', 70, 80)
    write('small-seed1.csv', 71, 83)
    write('large-seed7/summary.csv', 88, 87)
    write('other.csv')
    return write


def test_curves_and_table(runs, tmp_path):
    status, output, error = run_script('draw_training_curves.py', tmp_path)
    assert status == 0 and error == ''
    assert output.splitlines()[2:] == [
        '| `large` | 7 | 87.00 | 87.00 |  | 87.00 to 87.00 | 1.000 | 0.500 |',
        '| `small` | 0, 1 | 80.00, 83.00 | 81.50 | 2.12 | 80.00 to 83.00 | 1.000 | 0.500 |',
    ]
    with Image.open(tmp_path / 'curves.png') as picture:
        assert picture.format == 'PNG' and picture.width > 1000

    import draw_training_curves
    top1, loss = draw_training_curves.draw(draw_training_curves.read_runs(tmp_path)).axes
    assert [(line.get_label(), *line.get_xydata().ravel()) for line in top1.lines] == [
        ('large', 1, 88, 2, 87), ('small', 1, 70.5, 2, 81.5)]
    assert {tuple(line.get_ydata()) for line in loss.lines} == {(2, 1)}
    assert {tuple(x) for x in top1.collections[1].get_paths()[0].vertices} >= {(1, 70), (1, 71), (2, 80), (2, 83)}


@pytest.mark.parametrize('break_it, message', [
    (lambda write: write('small-seed1.csv', 71), 'same number of epochs, and have large-seed7 2, small-seed0 2, '
     'small-seed1 1. Finish or remove the short ones.'),
    (lambda write: write('small-seed1.csv'), 'must have the epochs from 0 in order, and has []'),
    (lambda write: write('small-seed1.csv', 71, 'nothing'), 'is not a summary.csv of train.py with epoch, train_loss'),
])
def test_errors(runs, tmp_path, break_it, message):
    break_it(runs)
    status, _, error = run_script('draw_training_curves.py', tmp_path)
    assert status == 1 and message in error_line(error)
    assert not (tmp_path / 'curves.png').exists()


def test_folder_without_runs(tmp_path):
    pytest.importorskip('matplotlib', reason="needs matplotlib: pip install -e '.[scripts]'")
    status, _, error = run_script('draw_training_curves.py', tmp_path)
    assert status == 1 and error_line(error).endswith('has no MODEL-seedN.csv and no MODEL-seedN/summary.csv.')


def test_results_are_those_of_the_files(tmp_path):
    pytest.importorskip('matplotlib', reason="needs matplotlib: pip install -e '.[scripts]'")
    page = (RESULTS / 'README.md').read_text(encoding='utf-8')
    for folder in (RESULTS, RESULTS / 'four_epochs'):
        status, table, _ = run_script('draw_training_curves.py', folder, '--output', tmp_path / 'curves.png')
        assert status == 0 and table in page
    assert (RESULTS / 'curves.png').exists() and '](curves.png)' in page

    epochs = yaml.safe_load((RECIPES / 'fashion_mnist.yaml').read_text())['epochs']
    assert {len(path.read_text().splitlines()) for path in RESULTS.glob('*-seed*.csv')} == {1 + epochs}


def test_costs_in_the_results():
    page = (RESULTS / 'README.md').read_text(encoding='utf-8')
    rows = re.findall(r'^\| `(\w+)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$', page, re.MULTILINE)
    assert {path.name.partition('-')[0] for path in RESULTS.glob('*-seed*.csv')} == {name for name, *_ in rows}
    for name, *cells in rows:
        expected = []
        for chs, size, classes in ((1, 32, 10), (3, 224, 1000)):
            model = timm.create_model(name, num_classes=classes, in_chans=chs).eval()
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                model(torch.zeros(1, chs, size, size))
            macs = f'{counter.get_total_flops() / 2e6:.{3 if size == 32 else 1}f}'
            expected += [macs, f'{sum(p.numel() for p in model.parameters()) / 1e6:.3f}']
        assert cells == expected
