"""scripts/score_runtimes.py scores what a checkpoint computes, in each runtime that is installed."""
import importlib.util

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from networks import needs_onnx_exporter
from PIL import Image
from script_runner import error_line, run_script
from sklearn.datasets import load_digits

needs_mobile = [
    pytest.param(name, marks=pytest.mark.skipif(not importlib.util.find_spec(package), reason=f'needs {package}'))
    for name, package in (('ExecuTorch', 'executorch'), ('LiteRT', 'litert_torch'), ('ncnn', 'pnnx'), ('MNN', 'MNN'))]
CONFIG = 'model: hbonet_010\nnum_classes: 10\nin_chans: 1\nimg_size: 32\nmean: [0.3]\nstd: [0.4]\nseed: 7\nlr: 0.1\n'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A checkpoint, the options of its run, and digits: 10 to calibrate with, 20 to score."""
    folder = tmp_path_factory.mktemp('run')
    digits = load_digits()
    for i, (image, label) in enumerate(zip(digits.images[:30], digits.target, strict=False)):
        path = folder / 'data' / ('train' if i < 10 else 'validation') / str(label) / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((15 * image).astype(np.uint8)).resize((28, 28)).save(path)
    torch.manual_seed(0)
    model = timm.create_model('hbonet_010', num_classes=10, in_chans=1)
    images = torch.from_numpy(digits.images[:64, None] / 16).float().repeat_interleave(4, 2).repeat_interleave(4, 3)
    with torch.no_grad():  # statistics of digits, or logits are near 0
        for _ in range(20):
            model(images)
    torch.save({'state_dict': model.state_dict()}, folder / 'last.pth.tar')
    (folder / 'args.yaml').write_text(CONFIG)
    return folder


def score(folder, *args, checkpoint='last.pth.tar'):
    return run_script(
        'score_runtimes.py', folder / checkpoint, '--config', folder / 'args.yaml', '--data-dir', folder / 'data',
        '--calibration', 10, '--output', folder / 'output', *args)


def compute_logits(folder):
    """Logits and labels, by timm alone."""
    model = timm.create_model(
        'hbonet_010', num_classes=10, in_chans=1, checkpoint_path=str(folder / 'last.pth.tar')).eval()
    transform = timm.data.create_transform((1, 32, 32), mean=(0.3,), std=(0.4,), interpolation='bicubic')
    dataset = timm.data.create_dataset(
        '', folder / 'data', split='validation', transform=transform, input_img_mode='L')
    images, labels = zip(*dataset, strict=True)
    with torch.no_grad():
        return model(torch.stack(images)), torch.tensor(labels)


def check_rows(folder, name, precisions):
    table = pd.read_csv(folder / 'output' / 'runtimes.csv').set_index(['runtime', 'precision'])
    logits, labels = compute_logits(folder)
    rows = table.loc[name]
    assert list(rows.index) == precisions
    for precision, row in rows.iterrows():
        if precision == 'float32':
            assert row.top1 == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
            assert row.agreement == 100 and row.error < 0.01
        else:  # random weights amplify the error
            assert 0 < row.error < 50
        assert row.median_ms > 0 and row.bytes > 0
    if len(rows) > 1:
        assert rows.bytes.iloc[-1] < 0.7 * rows.bytes.iloc[0]
    return table


def test_pytorch(folder):
    status, stdout, _ = score(folder, '--runtimes', 'PyTorch', 'PyTorch, re-parameterized')
    assert status == 0
    check_rows(folder, 'PyTorch', ['float32'])
    table = check_rows(folder, 'PyTorch, re-parameterized', ['float32'])
    assert len(table) == 2
    assert stdout == (folder / 'output' / 'runtimes.md').read_text()
    assert '| PyTorch, re-parameterized | float32' in stdout


@needs_onnx_exporter
def test_onnxruntime(folder):
    assert score(folder, '--runtimes', 'ONNX Runtime')[0] == 0
    check_rows(folder, 'ONNX Runtime', ['float32', 'int8'])


@needs_onnx_exporter
def test_openvino_without_nncf(folder, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: find_spec(name) if name != 'nncf' else None)
    status, _, stderr = score(folder, '--runtimes', 'OpenVINO')
    assert status == 0 and 'score_runtimes.py: skipping OpenVINO int8: needs nncf\n' in stderr
    check_rows(folder, 'OpenVINO', ['float32'])


@needs_onnx_exporter
@pytest.mark.parametrize('name', needs_mobile)
def test_mobile(folder, name):
    status, _, stderr = score(folder, '--runtimes', name)
    assert status == 0, stderr
    check_rows(folder, name, {
        'ncnn': ['float32'], 'MNN': ['float32', 'int8 weights', 'int8']}.get(name, ['float32', 'int8']))


def test_a_runtime_that_fails_is_named_and_the_others_are_scored(folder, monkeypatch):
    def fail(job):
        raise ValueError('no such\noperator')

    import score_runtimes
    monkeypatch.setitem(score_runtimes.RUNTIMES, ('PyTorch, re-parameterized', 'float32'), (fail, ()))
    status, _, stderr = score(folder, '--runtimes', 'PyTorch', 'PyTorch, re-parameterized')
    assert status == 1
    assert error_line(stderr) == (
        'score_runtimes.py: error: PyTorch, re-parameterized float32 failed: ValueError: no such operator')
    assert len(check_rows(folder, 'PyTorch', ['float32'])) == 1


@pytest.mark.parametrize('args, checkpoint, message', [
    ([], 'none.pth', 'none.pth is no checkpoint of --model hbonet_010: FileNotFoundError'),
    (['--num-classes', '3'], 'last.pth.tar', 'is no checkpoint of --model hbonet_010: RuntimeError'),
    (['--data-dir', 'nowhere'], 'last.pth.tar', '--data-dir nowhere has no train images of --dataset (a folder)'),
    (['--calibration', '1'], 'last.pth.tar', 'argument --calibration: must be a whole number of at least 2'),
    (['--runtimes', 'TensorRT'], 'last.pth.tar', "invalid choice: 'TensorRT'"),
    (['--model', 'hbonet_000'], 'last.pth.tar', '--model hbonet_000 cannot be created'),
], ids=str)
def test_bad_input(folder, args, checkpoint, message):
    status, _, stderr = score(folder, *args, checkpoint=checkpoint)
    assert status in (1, 2) and message in error_line(stderr)
