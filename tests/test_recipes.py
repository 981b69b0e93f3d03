"""The commands of docs/imagenet.md, with the recipes, run timm's own scripts. Training is on two classes of handwritten
digits, and what comes after it is of a run of fine-tuning, as on the page.
"""
import math
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from pages import run_page
from safetensors.torch import load_file
from timm.models import load_state_dict
from timm_scripts import RECIPES, best_top1, learning_rates, needs_repo, result, run_command, save_digits

SMALL = ['--model', 'hbonet_010', '--num-classes', '2', '--img-size', '64']
# so that 32 steps are enough to learn something
QUICK = ['--epochs', '2', '--lr', '0.01', '--scale', '0.8', '1', '--bn-momentum', '0.5', '--log-interval', '1']
LOADER = ['--workers', '1', '--batch-size', '16', '--device', 'cpu']
BENCHMARK = [
    '--batch-size', '4', '--img-size', '32', '--num-warm-iter', '1', '--num-bench-iter', '5', '--device', 'cpu']

pytestmark = needs_repo


@pytest.fixture(scope='module')
def workspace(tmp_path_factory) -> Path:
    workspace = tmp_path_factory.mktemp('recipes')
    save_digits(workspace / 'digits', classes=2, train=256, validation=64)
    return workspace


@pytest.fixture(scope='module')
def run(workspace):
    """Function that runs a command of the page with some text in it, and returns what it logged and printed."""

    def run(text, *args, page='imagenet.md', folder='RUN'):
        return run_command(page, text, *args, cwd=workspace, places={'DIR': workspace / 'digits', 'RUN': folder})

    return run


@pytest.fixture(scope='module')
def train(run, workspace):
    """Function that trains with a command of the page, and returns the folder of the run and what was printed."""

    def train(name, text, *args, **places):
        options = [*SMALL, *QUICK, *LOADER, '--output', 'output', '--experiment', name]
        return workspace / 'output' / name, run(text, *options, *args, **places)

    return train


@pytest.fixture(scope='module')
def in1k(train):
    """A run with the ImageNet recipe."""
    return train('in1k', 'hbonet_in1k.yaml --data-dir DIR')


@pytest.fixture(scope='module')
def finetune(train, in1k):
    """A run with the fine-tuning recipe that starts from the weights of the other."""
    start = ['--pretrained-path', in1k[0] / 'last.pth.tar', '--lr', '0.003']
    return train('finetune', 'hbonet_finetune.yaml', *start)


@pytest.fixture(scope='module')
def predicted_top1(run, finetune, workspace) -> float:
    """Of the moving average, by inference.py, in float32. Training scores it in bfloat16."""
    run('inference.py', *SMALL, *LOADER, folder=finetune[0])
    rows = pd.read_csv(workspace / 'results' / 'predictions.csv')
    assert len(rows) == 64
    return 100 * (rows['filename'].str.split('/').str[-2].astype(int) == rows['index']).mean()


def cosine(steps):
    """The protocol's schedule from the learning rate of these runs."""
    return [0.005 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]


def test_imagenet_recipe_follows_the_protocol(in1k):
    recipe = yaml.safe_load((RECIPES / 'hbonet_in1k.yaml').read_text())
    expected = dict(model='hbonet_100', epochs=150, batch_size=256, lr=0.05, scale=[0.08, 1.])
    assert {k: recipe[k] for k in expected} == expected

    folder, output = in1k
    assert best_top1(output) > 60  # 50 is chance
    assert learning_rates(output) == pytest.approx(cosine(32), rel=1e-3)
    checkpoint = torch.load(folder / 'last.pth.tar', weights_only=False)
    expected = dict(
        sched='cosine', train_interpolation='bilinear', hflip=0.5, vflip=0., color_jitter=None, aa=None,
        aug_repeats=0, reprob=0., mixup=0., cutmix=0., smoothing=0., drop=0., drop_path=None, clip_grad=None,
        model_ema=False, amp=False)
    args = vars(checkpoint['args'])
    assert {k: args[k] for k in expected} == expected

    # weight decay is for biases and norms too
    groups = checkpoint['optimizer']['param_groups']
    assert {(group['momentum'], group['nesterov'], group['weight_decay']) for group in groups} == {(0.9, False, 4e-5)}
    parameters = [k for k in checkpoint['state_dict'] if not k.endswith(('mean', 'var', 'num_batches_tracked'))]
    assert sum(len(group['params']) for group in groups) == len(parameters)


def test_resume(train, in1k, tmp_path):
    (tmp_path / 'last.pth.tar').write_bytes((in1k[0] / 'checkpoint-0.pth.tar').read_bytes())
    _, output = train('resume', '--resume', '--grad-checkpointing', folder=tmp_path)
    assert learning_rates(output) == pytest.approx(cosine(32)[16:], rel=1e-3)


def test_finetuning_recipe(finetune):
    folder, output = finetune
    assert best_top1(output) > 60
    checkpoint = torch.load(folder / 'last.pth.tar', weights_only=False)
    args = vars(checkpoint['args'])
    assert all(args[k] for k in ('pretrained', 'model_ema', 'amp', 'channels_last'))
    assert args['amp_dtype'] == 'bfloat16'
    # one learning rate for each layer
    assert len({group['lr_scale'] for group in checkpoint['optimizer']['param_groups']}) > 9


def test_validate_gives_the_scores_of_training(run, finetune):
    folder, output = finetune
    found = run('python validate.py', *SMALL, *LOADER, folder=folder)
    assert result(found)['top1'] == pytest.approx(best_top1(output), abs=1e-4)


def test_average_and_clean_checkpoints(run, finetune, workspace, monkeypatch):
    folder, _ = finetune
    run('avg_checkpoints.py', folder=folder)
    first, last = (load_state_dict(folder / f'checkpoint-{i}.pth.tar', weights_only=False) for i in (0, 1))
    average = torch.load(workspace / 'average.pth', weights_only=True)
    assert average.keys() == last.keys()
    torch.testing.assert_close(
        {k: v.double() for k, v in average.items()}, {k: (first[k].double() + last[k].double()) / 2 for k in last})

    run('clean_checkpoint.py', folder=folder)
    monkeypatch.chdir(workspace)
    run_page('imagenet.md', 'Safetensors')
    torch.testing.assert_close(load_file('clean.safetensors'), dict(last), rtol=0, atol=0)


@pytest.mark.parametrize('page', ['imagenet.md', 'deployment.md'])
def test_onnx_export_and_validate(run, finetune, predicted_top1, page):
    run('onnx_export.py', *SMALL, '--checkpoint', finetune[0] / 'model_best.pth.tar', page=page)
    output = run('onnx_validate.py', '--img-size', '64', '--workers', '1')
    assert predicted_top1 > 60
    assert float(re.search(r'\* Prec@1 (\S+)', output)[1]) == pytest.approx(predicted_top1, abs=1e-3)


def test_benchmark(run):
    found = result(run('python benchmark.py', '--model', 'hbonet_010', *BENCHMARK))
    assert found['infer_samples_per_sec'] > 0 and found['train_samples_per_sec'] > 0
