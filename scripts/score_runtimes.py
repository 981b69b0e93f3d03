#!/usr/bin/env python3
"""Score a trained network on all test images in the runtimes that deploy it, in float32 and in int8.

    python scripts/score_runtimes.py RUN/last.pth.tar --config RUN/args.yaml --data-dir DIR --output results/NAME

`eager` is the network in PyTorch, and `reparam` re-parameterized. For the runtimes it is re-parameterized too, and
exported for one image at a time. int8 is calibrated with training images, in the transform of the test images;
mnn_int8_weights has weights in int8, and computes in float32. Writes runtimes.csv and runtimes.md:
  top1        in percent
  agreement   percent of the images with PyTorch's class
  error       largest difference from PyTorch's logits, in percent of their range
  bytes       of the files that the runtime loads, and of a state dict in PyTorch
  median_ms   of one image on one thread, of this machine and while it does what else it does

Runtimes that are not installed are skipped by name. The exit status is 1 if another failed.
"""
import argparse
import random
import time
from pathlib import Path
from typing import Tuple

import numpy as np
import timm.data
import torch
import yaml
from runtimes import MODES, choose_installed, describe_error
from script_utils import BadInput, check_interrupt, create_model, number, requirements, run_script, write_file
from timm.models import load_checkpoint
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

with requirements():
    import pandas as pd

NAMES = ['eager', 'reparam', *(name for name, mode in MODES.items() if mode.packages)]


def load_network(args: argparse.Namespace) -> nn.Module:
    kwargs = {k: v for k in ('num_classes', 'in_chans') if (v := getattr(args, k)) is not None}
    network = create_model(args.model, **kwargs).eval().requires_grad_(False)
    try:
        load_checkpoint(network, str(args.checkpoint), weights_only=True)
    except Exception as e:  # damaged files and those of other networks have many ways to fail
        raise BadInput(
            f'{args.checkpoint} is no checkpoint of --model {args.model}: {type(e).__name__}: {e} Give the options of '
            f'its training.') from None
    return network


def create_data(args: argparse.Namespace, network: nn.Module) -> Tuple[DataLoader, torch.Tensor]:
    """Batches of test images, and training images to calibrate with."""
    config = timm.data.resolve_data_config(vars(args), model=network)
    transform = timm.data.create_transform(**config, is_training=False)
    datasets = []
    for split in (args.train_split, args.val_split):
        try:
            # timm would take all images of the folder
            if not args.dataset and not Path(args.data_dir, split).is_dir():
                raise ValueError(f'{Path(args.data_dir, split)} is no folder. Give --train-split and --val-split.')
            datasets.append(timm.data.create_dataset(
                args.dataset, root=args.data_dir, split=split, transform=transform, class_map=args.class_map,
                input_img_mode='L' if config['input_size'][0] == 1 else 'RGB'))
        except Exception as e:  # each source of data has errors of its own
            raise BadInput(
                f'--data-dir {args.data_dir} has no {split} images of --dataset {args.dataset or "(a folder)"}: '
                f'{e}') from None
    train, test = datasets
    indices = random.Random(0).sample(range(len(train)), min(args.calibration, len(train)))
    images = torch.stack([train[i][0] for i in tqdm(indices, 'Loading images to calibrate with', leave=False)])
    return DataLoader(test, batch_size=64), images


def compute_logits(
        mode: str, network: nn.Module, loader: DataLoader, calibration: torch.Tensor,
) -> Tuple[np.ndarray, float, float]:
    """Logits of all images, one at a time, milliseconds of one, and bytes of the files."""
    predict, size = MODES[mode].build(network, calibration.split(1), 1)
    logits, seconds = [], []
    for images, _ in tqdm(loader, mode, leave=False):
        check_interrupt()
        for image in images.split(1):
            start = time.perf_counter()
            found = predict(image)
            seconds.append(time.perf_counter() - start)
            logits.append(torch.as_tensor(found).clone())  # runtimes use the memory again
    return torch.cat(logits).numpy(), 1e3 * np.median(seconds), size


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('checkpoint', type=Path, metavar='CHECKPOINT', help="checkpoint of timm's train.py, or a state dict")
    add('--config', type=Path, metavar='FILE', help="args.yaml of the run, or a recipe: timm's options as defaults")
    add('--output', type=Path, default=Path('output/runtimes'), metavar='DIR', help='folder (default: %(default)s)')
    add('--runtimes', nargs='+', choices=NAMES, default=NAMES, metavar='NAME', help=f'out of {", ".join(NAMES)}')
    add('--calibration', type=number(int, 2), default=512, metavar='N',
        help='training images that int8 is calibrated with (default: %(default)s)')
    for option in ('model', 'dataset', 'data-dir', 'class-map', 'interpolation'):
        add(f'--{option}', default='', metavar='NAME', help="as in timm's train.py")
    for option, kind in (('num-classes', int), ('in-chans', int), ('img-size', int), ('crop-pct', float)):
        add(f'--{option}', type=kind, metavar='N', help="as in timm's train.py")
    for option in ('mean', 'std'):
        add(f'--{option}', type=float, nargs='+', metavar='X', help="as in timm's train.py")
    add('--train-split', default='train', metavar='NAME', help='(default: %(default)s)')
    add('--val-split', default='validation', metavar='NAME', help='(default: %(default)s)')
    return parser


def main(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if args.config:
        try:
            options = dict(yaml.safe_load(args.config.read_text(encoding='utf-8')))
        except (OSError, ValueError, TypeError, yaml.YAMLError) as e:
            raise BadInput(f"--config {args.config} is no args.yaml of timm's train.py. {describe_error(e)}") from None
        options.pop('output', None)  # of training
        parser.set_defaults(**{k: v for k, v in options.items() if k in vars(args) and v is not None})
        args = parser.parse_args()
    if not args.model:
        parser.error('--model is not given, and --config has none')
    network = load_network(args)
    loader, calibration = create_data(args, network)
    torch.set_num_threads(1)

    labels, expected = [], []
    for images, targets in tqdm(loader, 'PyTorch', leave=False):
        check_interrupt()
        labels.append(targets.numpy())
        expected.append(network(images).numpy())
    labels, expected = np.concatenate(labels), np.concatenate(expected)
    rows, failures = [], []
    for mode in choose_installed(args.runtimes)[0]:
        try:
            logits, milliseconds, size = compute_logits(mode, network, loader, calibration)
        except Exception as e:  # each runtime has errors of its own
            failures.append(f'{mode} failed: {describe_error(e)}')
            continue
        classes = logits.argmax(1)
        rows.append({
            'runtime': mode,
            'top1': 100 * (classes == labels).mean(),
            'agreement': 100 * (classes == expected.argmax(1)).mean(),
            'error': 100 * np.abs(logits - expected).max() / np.ptp(expected),
            'bytes': size,
            'median_ms': milliseconds,
        })
    table = pd.DataFrame(rows, columns=['runtime', 'top1', 'agreement', 'error', 'bytes', 'median_ms'])
    text = table.to_markdown(index=False, floatfmt=('', '.2f', '.2f', '.2f', '.0f', '.2f'))
    args.output.mkdir(parents=True, exist_ok=True)
    write_file(args.output / 'runtimes.csv', table.to_csv(index=False, float_format='%.4f').encode())
    write_file(args.output / 'runtimes.md', f'{text}\n'.encode())
    print(text)
    if failures:
        raise BadInput('; '.join(failures))


if __name__ == '__main__':
    run_script(main, create_parser())
