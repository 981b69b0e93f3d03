"""scripts/score_runtimes.py scores what a checkpoint computes. tests/test_benchmark.py has each runtime."""
import importlib
import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import yaml
from networks import create_network, needs_onnx_exporter
from PIL import Image
from script_runner import error_line, run_script

runtimes = importlib.import_module('runtimes')
CONFIG = {
    'model': 'hbonet_010', 'num_classes': 10, 'in_chans': 1, 'img_size': 32, 'mean': [0.3], 'std': [0.4], 'lr': 0.1,
    'output': 'of training',
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A checkpoint, the options of its run, and images: 10 to calibrate with, 20 to score."""
    folder = tmp_path_factory.mktemp('run')
    pixels = np.random.default_rng(0).integers(256, size=(30, 28, 28), dtype=np.uint8)
    for i, image in enumerate(pixels):
        path = folder / 'data' / ('train' if i < 10 else 'validation') / str(i % 10) / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    network = create_network('hbonet_010', torch.float32, num_classes=10, in_chans=1)
    torch.save({'state_dict': network.state_dict()}, folder / 'last.pth.tar')
    (folder / 'args.yaml').write_text(yaml.safe_dump(CONFIG))
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
    transform = timm.data.create_transform((1, 32, 32), mean=(0.3,), std=(0.4,), interpolation='bilinear')
    calibration, test = (
        timm.data.create_dataset('', 'data', split=split, transform=transform, input_img_mode='L')
        for split in ('train', 'validation'))
    images, labels = zip(*test, strict=True)
    return model.requires_grad_(False), torch.stack([x for x, _ in calibration]), torch.stack(images), labels


def read_table():
    return pd.read_csv('output/runtimes/runtimes.csv').set_index('runtime')


def check_rows(names, change=lambda logits: logits):
    """Check the scores of runtimes that change PyTorch's logits."""
    table = read_table()
    assert list(table.index) == names
    model, _, images, labels = load_run()
    expected = model(images).numpy()
    logits = change(expected)
    assert table.top1.tolist() == pytest.approx([100 * (logits.argmax(1) == labels).mean()] * len(names))
    agreement, error = (logits.argmax(1) == expected.argmax(1)).mean(), abs(logits - expected).max()
    assert table.agreement.tolist() == pytest.approx([100 * agreement] * len(names))
    assert table.error.tolist() == pytest.approx([100 * error / np.ptp(expected)] * len(names), abs=0.01)
    assert (table.median_ms > 0).all() and (table.bytes > 0).all()


def test_pytorch():
    status, stdout, _ = score('--runtimes', 'eager', 'reparam')
    assert status == 0
    check_rows(['eager', 'reparam'])
    assert stdout == Path('output/runtimes/runtimes.md').read_text()
    assert '| reparam' in stdout


@needs_onnx_exporter
def test_onnxruntime():
    status, _, stderr = score('--runtimes', 'onnxruntime', 'onnxruntime')
    assert status == 0, stderr
    check_rows(['onnxruntime'])
    score('--runtimes', 'onnxruntime', 'onnxruntime_int8')
    table = read_table()
    assert 0.01 < table.error['onnxruntime_int8'] < 50  # how much it is depends on rounding
    assert table.bytes['onnxruntime_int8'] < 0.7 * table.bytes['onnxruntime']


def test_scores_of_other_logits_and_images_to_calibrate_with(monkeypatch):
    model, calibration, *_ = load_run()

    def export(network, batches, folder):
        found, expected = ({image.numpy().tobytes() for image in images} for images in (batches, calibration))
        assert len(batches) == len(found) == 4 and found < expected
        (folder / 'model').write_text('12345')
        return [folder / 'model']

    def load(files, threads):
        assert threads == 1
        return lambda images: -model(images)

    monkeypatch.setitem(runtimes.MODES, 'ncnn', runtimes.Runtime(export, load, ('torch',)))
    status, _, stderr = score('--runtimes', 'ncnn', '--calibration', 4)
    assert status == 0, stderr
    check_rows(['ncnn'], np.negative)
    assert read_table().bytes['ncnn'] == 5


def test_a_runtime_that_is_not_installed_is_named(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: find_spec(name) if name != 'nncf' else None)
    status, _, stderr = score('--runtimes', 'eager', 'openvino_int8')
    assert status == 0 and 'Skipping openvino_int8: needs nncf. Run: pip install nncf\n' in stderr
    check_rows(['eager'])


def test_a_runtime_that_fails_is_named_and_the_others_are_scored(monkeypatch):
    def fail(network, batches, folder):
        raise ValueError('no such\noperator')

    monkeypatch.setitem(runtimes.MODES, 'ncnn', runtimes.Runtime(fail, None, ('torch',)))
    status, _, stderr = score('--runtimes', 'ncnn', 'eager')
    assert status == 1
    assert error_line(stderr) == 'score_runtimes.py: error: ncnn failed: ValueError: no such operator'
    check_rows(['eager'])


@pytest.mark.parametrize('args, checkpoint, message', [
    ([], 'none.pth', 'none.pth is no checkpoint of --model hbonet_010: FileNotFoundError'),
    (['--num-classes', '3'], 'last.pth.tar', 'is no checkpoint of --model hbonet_010: RuntimeError'),
    (['--val-split', 'tset'], 'last.pth.tar', 'data/tset is no folder'),
    (['--config', 'last.pth.tar'], 'last.pth.tar', "is no args.yaml of timm's train.py"),
    (['--data-dir', 'nowhere'], 'last.pth.tar', '--data-dir nowhere has no train images of --dataset (a folder)'),
    (['--calibration', '1'], 'last.pth.tar', 'argument --calibration: must be a whole number of at least 2'),
    (['--runtimes', 'TensorRT'], 'last.pth.tar', "invalid choice: 'TensorRT'"),
    (['--model', 'hbonet_000'], 'last.pth.tar', '--model hbonet_000 cannot be created'),
], ids=str)
def test_bad_input(args, checkpoint, message):
    status, _, stderr = score(*args, checkpoint=checkpoint)
    assert status in (1, 2) and message in error_line(stderr)
