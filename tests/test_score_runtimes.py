"""scripts/score_runtimes.py scores what a checkpoint computes. tests/test_benchmark.py has each runtime."""
import importlib
import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from networks import needs_onnx_exporter
from PIL import Image
from script_runner import error_line, run_script
from sklearn.datasets import load_digits

runtimes = importlib.import_module('runtimes')
CONFIG = '''
model: hbonet_010
num_classes: 10
in_chans: 1
img_size: 32
mean: [0.3]
std: [0.4]
output: trained
lr: 0.1
'''


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


@pytest.fixture(autouse=True)
def in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)


def score(*args, checkpoint='last.pth.tar'):
    return run_script(
        'score_runtimes.py', checkpoint, '--config', 'args.yaml', '--data-dir', 'data', '--calibration', 10, *args)


def load_run():
    """The network, images to calibrate with, those to score and their labels, by timm alone."""
    model = timm.create_model('hbonet_010', num_classes=10, in_chans=1, checkpoint_path='last.pth.tar').eval()
    transform = timm.data.create_transform((1, 32, 32), mean=(0.3,), std=(0.4,), interpolation='bicubic')
    calibration, test = (
        timm.data.create_dataset('', 'data', split=split, transform=transform, input_img_mode='L')
        for split in ('train', 'validation'))
    images, labels = zip(*test, strict=True)
    return model.requires_grad_(False), torch.stack([x for x, _ in calibration]), torch.stack(images), labels


def check_rows(names):
    table = pd.read_csv('output/runtimes/runtimes.csv').set_index('runtime')
    assert list(table.index) == names
    model, calibration, images, labels = load_run()
    expected = model(images).numpy()
    for name, row in table.iterrows():
        logits = expected
        if 'int8' in name:
            predict, _ = runtimes.MODES[name].build(model, calibration.split(1), 1)
            logits = np.concatenate([predict(image).copy() for image in images.split(1)])
            assert row.bytes < 0.7 * table.bytes.iloc[0]
        assert row.top1 == pytest.approx(100 * (logits.argmax(1) == labels).mean())
        assert row.agreement == pytest.approx(100 * (logits.argmax(1) == expected.argmax(1)).mean())
        assert row.error == pytest.approx(100 * abs(logits - expected).max() / np.ptp(expected), abs=0.01)
        assert row.median_ms > 0 and row.bytes > 0


def test_pytorch():
    status, stdout, _ = score('--runtimes', 'eager', 'reparam')
    assert status == 0
    check_rows(['eager', 'reparam'])
    assert stdout == Path('output/runtimes/runtimes.md').read_text()
    assert '| reparam' in stdout


@needs_onnx_exporter
def test_onnxruntime():
    names = ['onnxruntime', 'onnxruntime_int8']
    status, _, stderr = score('--runtimes', *names, names[0])
    assert status == 0, stderr
    check_rows(names)


def test_a_runtime_that_is_not_installed_is_named(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: find_spec(name) if name != 'nncf' else None)
    status, _, stderr = score('--runtimes', 'eager', 'openvino_int8')
    assert status == 0 and 'Skipping openvino_int8: needs nncf. Run: pip install nncf\n' in stderr
    check_rows(['eager'])


def test_a_runtime_that_fails_is_named_and_the_others_are_scored(monkeypatch):
    def fail(network, batches, folder):
        raise ValueError('no such\noperator')

    monkeypatch.setitem(runtimes.MODES, 'ncnn', runtimes.Runtime(fail, None, ()))
    status, _, stderr = score('--runtimes', 'ncnn', 'eager')
    assert status == 1
    assert error_line(stderr) == 'score_runtimes.py: error: ncnn failed: ValueError: no such operator'
    check_rows(['eager'])


@pytest.mark.parametrize('args, checkpoint, message', [
    ([], 'none.pth', 'none.pth is no checkpoint of --model hbonet_010: FileNotFoundError'),
    (['--num-classes', '3'], 'last.pth.tar', 'is no checkpoint of --model hbonet_010: RuntimeError'),
    (['--data-dir', 'nowhere'], 'last.pth.tar', '--data-dir nowhere has no train images of --dataset (a folder)'),
    (['--calibration', '1'], 'last.pth.tar', 'argument --calibration: must be a whole number of at least 2'),
    (['--runtimes', 'TensorRT'], 'last.pth.tar', "invalid choice: 'TensorRT'"),
    (['--model', 'hbonet_000'], 'last.pth.tar', '--model hbonet_000 cannot be created'),
], ids=str)
def test_bad_input(args, checkpoint, message):
    status, _, stderr = score(*args, checkpoint=checkpoint)
    assert status in (1, 2) and message in error_line(stderr)
