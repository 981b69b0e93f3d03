"""The commands of docs/small_datasets.md run timm's own scripts, and the results are what their files say.

Training is on handwritten digits, in a folder of images in place of CIFAR-10, and in files of Fashion-MNIST's format.
"""
import gzip
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import yaml
from pages import assert_equal_to
from PIL import Image
from script_runner import error_line, run_script
from timm_scripts import ROOT, assert_learned, best_top1, needs_repo, result, run_command, save_digits
from torch.utils.flop_counter import FlopCounterMode

import draw_training_curves  # isort: skip

PAGE = (ROOT / 'docs' / 'small_datasets.md').read_text(encoding='utf-8')
CHANNELS = {'cifar10': 3, 'fashion_mnist': 1}
SMALL = ['--workers', '1', '--batch-size', '16']
# 20 steps an epoch without warm-up, as few steps learn little of it
QUICK = ['--epochs', '3', '--lr', '0.02', '--warmup-epochs', '0', '--bn-momentum', '0.5', '--log-interval', '1']


@pytest.fixture(scope='module')
def workspace(tmp_path_factory) -> Path:
    """320 digits to train on and 64 to test on: a folder `cifar10`, and what the page makes of Debian's files."""
    workspace = tmp_path_factory.mktemp('small_datasets')
    package = workspace / 'package'
    package.mkdir()
    save_digits(workspace / 'cifar10', classes=10, train=320, test=64)
    for folder, name in (('train', 'train'), ('test', 't10k')):
        paths = sorted((workspace / 'cifar10' / folder).glob('*/*.png'))
        images = np.stack([Image.open(path).convert('L') for path in paths])
        labels = np.array([int(path.parent.name) for path in paths], 'uint8')
        for kind, array in (('images-idx3', images), ('labels-idx1', labels)):
            header = np.array([0x800 + array.ndim, *array.shape], '>i4').tobytes()
            (package / f'{name}-{kind}-ubyte.gz').write_bytes(gzip.compress(header + array.tobytes()))
    code = re.search(r'^mkdir -p DIR.*?^done$', PAGE, re.MULTILINE | re.DOTALL)[0]
    code = code.replace('/usr/share/datasets/fashion-mnist', 'package').replace('DIR/', 'fashion_mnist/')
    subprocess.run(['bash', '-euc', code], cwd=workspace, check=True)
    return workspace


@pytest.fixture(scope='module')
def run(workspace):
    """Function that runs a command of the page with some text in it, and returns what it logged and printed."""

    def run(text, *args, data='cifar10', folder='RUN'):
        places = {'DIR': workspace / data, 'OUT': workspace / data / 'out', 'RUN': folder, 'hbonet_035': 'hbonet_010'}
        return run_command('small_datasets.md', text, *args, cwd=workspace, places=places)

    return run


@pytest.fixture(scope='module', params=CHANNELS)
def trained(run, workspace, request):
    """The data, the folder of a run on them, and what was printed."""
    output = run(f'RECIPES/{request.param}.yaml', *SMALL, *QUICK, data=request.param)
    return request.param, workspace / request.param / 'out' / 'hbonet_010-seed0', output


@needs_repo
def test_train_and_validate(run, trained, tmp_path):
    data, folder, output = trained
    assert_learned(folder, epochs=3)
    assert f'input_size: ({CHANNELS[data]}, 32, 32)' in output
    shutil.copy(folder / 'model_best.pth.tar', tmp_path / 'last.pth.tar')
    text = '--split test' if data == 'cifar10' else '--dataset torch/fashion_mnist'
    found = result(run(text, *SMALL, data=data, folder=tmp_path))
    assert found['top1'] == pytest.approx(best_top1(output), abs=1e-4)


@needs_repo
def test_other_images(run, workspace):
    """The options of the page's table, all at once."""
    table = re.findall(r'^\|.+\| `(--[^|]+)` \| (?:`(--[^|]+)`|the same) \|$', PAGE, re.MULTILINE)
    train = ' '.join(options for options, _ in table).split()
    validate = ' '.join(other or options for options, other in table).split()
    for source, place in (('train', 'train'), ('test', 'holdout')):
        for label in '01':
            shutil.copytree(workspace / 'cifar10' / source / label, workspace / 'other' / place / label)
    for path in sorted((workspace / 'other' / 'holdout' / '1').iterdir())[::2]:
        path.unlink()  # so that no score of all images is one of these
    output = run('RECIPES/cifar10.yaml', *SMALL, *QUICK, '--epochs', '1', *train, data='other')
    assert 'input_size: (1, 64, 64)' in output
    folder = workspace / 'other' / 'out' / 'hbonet_010-seed0'
    found = result(run('--split test', *SMALL, *validate, data='other', folder=folder))
    assert found['top1'] == pytest.approx(best_top1(output), abs=1e-4)
    correct = found['top1'] / 100 * len([*(workspace / 'other' / 'holdout').glob('*/*')])
    assert correct == pytest.approx(round(correct), abs=1e-3)


@needs_repo
@pytest.mark.parametrize('trained', ['fashion_mnist'], indirect=True)  # three channels: test_clients.py
def test_export_of_one_channel(run, trained, workspace):
    pytest.importorskip('timmx', reason='timmx needs Python 3.11')
    options = '--in-chans 1 --input-size 1 32 32'
    assert f'`{options}`' in PAGE
    run('timmx', *options.split(), folder=trained[1])
    checkpoint = str(trained[1] / 'last.pth.tar')
    model = timm.create_model('hbonet_010', num_classes=10, in_chans=1, checkpoint_path=checkpoint).eval()
    images = torch.randn(3, 1, 32, 32)
    found = onnxruntime.InferenceSession(workspace / 'hbonet_010.onnx').run(None, {'input': images.numpy()})[0]
    assert_equal_to(found, model(images))


@pytest.fixture
def write(tmp_path):
    """Function that writes a run of so many epochs. Has written two of one model and one of another, of two epochs."""

    def write(name, *top1):
        rows = [f'{epoch},{2 - epoch},{1.5 - epoch},{value},99,0.1' for epoch, value in enumerate(top1)]
        (tmp_path / name).write_text('\n'.join(['epoch,train_loss,eval_loss,eval_top1,eval_top5,lr', *rows]))

    write('small-seed0.csv', 70, 80)
    write('small-seed1.csv', 71, 83)
    write('large-seed7.csv', 88, 87)
    write('other.csv')
    return write


def test_curves_and_table(write, tmp_path):
    status, output, _ = run_script('draw_training_curves.py', tmp_path)
    assert status == 0
    assert [re.split(r' *\| *', line)[1:-1] for line in output.splitlines()[2:]] == [
        ['`large`', '7', '87.00', '87.00', '', '1.000', '0.500'],
        ['`small`', '0, 1', '80.00, 83.00', '81.50', '2.12', '1.000', '0.500']]
    with Image.open(tmp_path / 'curves.png') as picture:
        assert (picture.format, picture.size) == ('PNG', (1000, 420))

    top1, loss = draw_training_curves.draw(draw_training_curves.read_runs(tmp_path)).axes
    assert [(line.get_label(), *line.get_xydata().ravel()) for line in top1.lines] == [
        ('large', 1, 88, 2, 87), ('small', 1, 70.5, 2, 81.5)]
    assert top1.collections[1].get_datalim(top1.transData).get_points().tolist() == [[1, 70], [2, 83]]
    assert {tuple(line.get_ydata()) for line in loss.lines} == {(2, 1)}


@pytest.mark.parametrize('name, top1, message', [
    ('small-seed1.csv', [71], 'small-seed1.csv has 1 epochs, other runs have 2. Finish or remove it.'),
    ('small-seed1.csv', [], 'small-seed1.csv has 0 epochs'),
    ('small-seed1.csv', [71, 'nothing'], 'small-seed1.csv is not a summary.csv of train.py with epoch, train_loss'),
])
def test_errors(write, tmp_path, name, top1, message):
    write(name, *top1)
    status, _, error = run_script('draw_training_curves.py', tmp_path)
    assert status == 1 and message in error_line(error)
    assert not (tmp_path / 'curves.png').exists()


def test_places_that_are_wrong(write, tmp_path):
    (tmp_path / 'empty').mkdir()
    for args, message in (
            ([tmp_path / 'empty'], 'empty has no MODEL-seedN.csv.'),
            ([tmp_path, '--output', tmp_path / 'empty'], 'empty cannot be written: Is a directory')):
        status, _, error = run_script('draw_training_curves.py', *args)
        assert status == 1 and message in error_line(error)
    assert not list(tmp_path.glob('.*'))  # nothing half-written stays


@pytest.mark.parametrize('data', CHANNELS)
def test_results_are_those_of_the_files(data, tmp_path):
    results = ROOT / 'results' / data
    page = (results / 'README.md').read_text(encoding='utf-8')
    for runs in {path.parent for path in results.rglob('*-seed*.csv')}:
        status, table, _ = run_script('draw_training_curves.py', runs, '--output', tmp_path / 'curves.png')
        assert status == 0 and table in page
    epochs = yaml.safe_load((ROOT / f'scripts/recipes/{data}.yaml').read_text())['epochs']
    paths = list(results.glob('*-seed*.csv'))
    assert {len(path.read_text().splitlines()) for path in paths} == {1 + epochs}

    rows = re.findall(r'^\| `(\w+)` \| ([\d.]+) \| ([\d.]+) \|$', page, re.MULTILINE)
    assert {path.name.partition('-')[0] for path in paths} == {name for name, *_ in rows}
    for name, *costs in rows:
        model = timm.create_model(name, num_classes=10, in_chans=CHANNELS[data]).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, CHANNELS[data], 32, 32))
        parameters = sum(p.numel() for p in model.parameters())
        assert costs == [f'{counter.get_total_flops() / 2e6:.3f}', f'{parameters / 1e6:.3f}']
