"""Runs the commands of the pages in docs/ with timm's own scripts, from a checkout that TIMM_REPO names.

A script of a checkout imports the timm beside it, so that this also proves registration in a timm that is not
installed.
"""
import argparse
import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / 'scripts' / 'recipes'
REPO = os.environ.get('TIMM_REPO')

needs_repo = pytest.mark.skipif(
    not REPO,
    reason='git clone https://github.com/huggingface/pytorch-image-models, and set TIMM_REPO to that folder',
)


def run_command(page: str, text: str, *args: object, cwd: Path, places: Dict[str, object]) -> str:
    """Run the shortest command of a page with some text in it, and get what it logged and printed.

    Args:
        args: Are appended, and come first where the command has them too.
        places: What stands for the names with which a word of the page starts, such as DIR.
    """
    lines = (ROOT / 'docs' / page).read_text(encoding='utf-8').replace('\\\n', ' ')
    commands = re.findall(r'^((?:python|timmx) .*)$', lines, re.MULTILINE)
    words = shlex.split(min((command for command in commands if text in command), key=len))
    places = {'RECIPES': RECIPES, **places}
    names = '|'.join(map(re.escape, places))
    words = [re.sub(rf'^({names})', lambda m: str(places[m[0]]), word) for word in words]
    words[:1] = ['-m', 'timmx'] if words[0] == 'timmx' else []
    words = [str(Path(REPO) / word) if word.endswith('.py') else word for word in words]
    process = subprocess.run(
        [sys.executable, *words, *map(str, args)],
        cwd=cwd,
        env={**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1'},
        capture_output=True, text=True, timeout=240)
    output = process.stderr + process.stdout
    assert process.returncode == 0, output
    return output


def save_digits(folder: Path, classes: int, **splits: int) -> None:
    """Write handwritten digits as a folder of RGB images, with so many of them in each split."""
    digits = load_digits(n_class=classes)
    for i, split in enumerate(split for split, count in splits.items() for _ in range(count)):
        path = folder / split / str(digits.target[i]) / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[i] * 15.9).astype('uint8')).resize((28, 28)).convert('RGB').save(path)


def load_checkpoint(path: Path) -> Dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def read_csv(path: Path) -> List[Dict[str, str]]:
    with open(path) as f:
        return list(csv.DictReader(f))


def learning_rates(output: str) -> List[float]:
    """What train.py logs at each step, with --log-interval 1."""
    return [float(x) for x in re.findall(r'LR: (\S+)', output)]


def best_top1(output: str) -> float:
    """What train.py prints at its end."""
    return float(re.search(r'Best metric: (\S+)', output)[1])


def result(output: str) -> Dict[str, Any]:
    """What validate.py and benchmark.py print at their end."""
    return json.loads(output.split('--result')[1])


def assert_learned(folder: Path, epochs: int = 2) -> None:
    """Assert that a run has all its epochs, that its loss fell, and that its weights are finite."""
    rows = read_csv(folder / 'summary.csv')
    assert [int(row['epoch']) for row in rows] == list(range(epochs))
    losses = [float(row['train_loss']) for row in rows]
    assert losses[-1] < losses[0]
    assert all(torch.isfinite(v).all() for v in load_checkpoint(folder / 'last.pth.tar')['state_dict'].values())
