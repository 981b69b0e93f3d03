"""The training loop of the training scripts. A run can end at any time, and continue to the result of a whole one."""
import argparse
import hashlib
import io
import itertools
import math
import os
import shutil
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from script_utils import (
    BadInput,
    add_run_options,
    check_interrupt,
    create_output_dir,
    number,
    requirements,
    write_file,
)
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import NativeScaler, distribute_bn, init_distributed_device, random_seed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

with requirements():
    import pandas as pd

CHECKPOINT_KEYS = {'script', 'options', 'images', 'world_size', 'history', 'epoch', 'state_dict', 'optimizer'}
# every other option makes a run what it is, and is kept in its checkpoints
FREE_OPTIONS = {
    'data', 'output', 'output_dir', 'evaluate', 'resume', 'init', 'predict', 'export', 'min_score', 'allow_overlap',
    'pretrained', 'device', 'workers', 'distributed', 'rank', 'local_rank', 'world_size'}
# what a model is made with
MODEL_OPTIONS = {'model', 'image_size', 'classes', 'min_ratio'}


def add_training_options(
        parser: argparse.ArgumentParser,
        output: str,
        epochs: int,
        batch_size: int,
        lr: float,
) -> None:
    add = parser.add_argument
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        '--resume', type=Path, metavar='FILE',
        help='continue the run of this last.pth, with the options it had, in a new folder beside its own')
    start.add_argument('--evaluate', type=Path, metavar='FILE', help='only evaluate the model of this last.pth')
    start.add_argument('--init', type=Path, metavar='FILE',
        help='start from the weights of this last.pth, all but the last layer of its classes')
    add_run_options(parser, output, epochs)
    add('--model', default='hbonet_100', metavar='NAME', help='timm model (default: %(default)s)')
    add('--pretrained', action='store_true', help="start from the model's pretrained weights")
    add('--batch-size', type=number(int, 2), default=batch_size, metavar='N',
        help='images in a batch of each process (default: %(default)s)')
    add('--lr', type=number(float, 1e-9), default=lr, metavar='X',
        help='learning rate after warm-up, then a cosine to 0 (default: %(default)s)')
    add('--weight-decay', type=number(float, 0), default=5e-4, metavar='X',
        help='not on norms and biases (default: %(default)s)')
    add('--allow-overlap', action='store_true', help='go on if what is tested on is trained on too')
    add('--amp', action='store_true', help='mixed precision')
    add('--amp-dtype', choices=['bfloat16', 'float16'], default='bfloat16', help='(default: %(default)s)')
    add('--workers', type=number(int, 0), default=min(4, os.cpu_count() or 1), metavar='N',
        help='processes that load images, for each process (default: %(default)s)')


def start_run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Optional[Dict[str, Any]]:
    """Set up the device and processes. Options are taken from a checkpoint, which is returned."""
    checkpoint, path = None, args.resume or args.evaluate or args.init
    if path:
        checkpoint = load_checkpoint(path, parser.prog)
        options = dict(checkpoint['options'])
        vars(args).update({'model': options['model']} if args.init else options)
        if args.resume:
            args.output = args.resume.resolve().parent
        parser.parse_args(namespace=args)  # what the command line says is stronger
        for name in options if args.resume else {'model'} if args.init else MODEL_OPTIONS & set(options):
            if getattr(args, name) != options[name]:
                raise BadInput(
                    f'{path} was made with --{name.replace("_", "-")} {options[name]}, not {getattr(args, name)}. '
                    f'Leave the option out, or give another file.')
    init_distributed_device(args)
    return checkpoint


def load_checkpoint(path: Path, script: str) -> Dict[str, Any]:
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        if checkpoint['script'] == script and checkpoint.keys() >= CHECKPOINT_KEYS:
            return checkpoint
        reason = f'it was written by {checkpoint["script"]}, or is not whole'
    except OSError as e:
        reason = e.strerror or e
    except Exception:  # damaged files and those of other programs have many ways to fail
        reason = 'it is damaged or of another program'
    raise BadInput(f'{path} cannot be read as a checkpoint: {reason}. Give a last.pth that {script} wrote.')


def check_overlap(args: argparse.Namespace, images: Dict[str, Sequence[Any]]) -> None:
    """Compare lists, each with all others.

    Raises:
        BadInput: If one has an image or identity of another, and it is not allowed.
    """
    for (name, first), (other, second) in itertools.combinations(images.items(), 2):
        known = set(first)
        both = [i for i in dict.fromkeys(second) if i in known]
        if both and not args.allow_overlap:
            raise BadInput(
                f'{both[0]} is in {name} and in {other}, and so are {len(both)} of the {len(set(second))} of {other}. '
                f'Their score would say nothing of what is new. Give other data, or --allow-overlap.')


def restore(path: Path, *parts: Any) -> int:
    """Load weights and what else is given from a checkpoint. Returns the number of epochs that it had."""
    with fitting(path):
        return resume_checkpoint(parts[0], str(path), *parts[1:], log_info=False)


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, KeyError) as e:
        raise BadInput(
            f'{path} does not fit the model: {e} Give a file that was written with this --model, and these versions of '
            f'timm and timm-hbonet.') from None


def write_run(folder: Path, state: Dict[str, Any], is_best: bool) -> None:
    """Write a checkpoint in the layout of timm's CheckpointSaver, and the history of the run as a table.

    The saver itself deletes the last checkpoint before it renames the next, so that a kill in between leaves none.
    """
    content = io.BytesIO()
    torch.save(state, content)
    for name in ['best.pth', 'last.pth'] if is_best else ['last.pth']:
        write_file(folder / name, content.getvalue())
    write_file(folder / 'summary.csv', pd.DataFrame(state['history']).to_csv(index=False).encode())


def autocast(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(torch.device(args.device).type, getattr(torch, args.amp_dtype), enabled=args.amp)


def train(
        args: argparse.Namespace,
        script: str,
        model: torch.nn.Module,
        weights: torch.nn.Module,
        opt: str,
        warmup_epochs: int,
        create_loader: Callable[[int], DataLoader],
        compute_loss: Callable[[torch.nn.Module, Any], torch.Tensor],
        images: Sequence[str],
        checkpoint: Optional[Dict[str, Any]] = None,
        evaluate: Callable[[int], Dict[str, float]] = lambda epoch: {},
        best_by: str = '',
        last_layers: Tuple[str, ...] = (),
) -> None:
    """Train, and after each epoch write `last.pth` and `summary.csv` to a new folder.

    Args:
        args: Options of the script.
        script: Its name.
        model: What `compute_loss` is called with, in the form for several processes if there are.
        weights: The part of the model that is saved.
        opt: timm optimizer.
        warmup_epochs: Epochs in which the learning rate rises.
        create_loader: Gives the loader of an epoch. Numbers that it draws are seeded by the epoch.
        compute_loss: Gives the loss of the model for a batch.
        images: Names that say which data are trained on.
        checkpoint: That of `args.resume` or `args.init`.
        evaluate: Gives scores after an epoch. Those whose name starts with map are printed.
        best_by: Name of a score. The epoch that has the highest is kept in `best.pth` too.
        last_layers: Beginnings of the names of weights that `args.init` leaves out.

    Raises:
        BadInput: If the checkpoint is of another run, nothing is learned, or a file cannot be written.
    """
    digest = hashlib.sha256('\n'.join(images).encode()).hexdigest()
    updates = len(create_loader(0))
    optimizer = create_optimizer_v2(model, opt, lr=args.lr, weight_decay=args.weight_decay)
    scaler = NativeScaler(torch.device(args.device).type) if args.amp and args.amp_dtype == 'float16' else None
    scheduler, _ = create_scheduler_v2(
        optimizer, 'cosine', args.epochs, warmup_epochs=warmup_epochs, warmup_lr=args.lr / 100, step_on_epochs=False,
        updates_per_epoch=updates)
    start_epoch, history = 0, []
    if args.init:
        own = {k: v for k, v in weights.state_dict().items() if k.startswith(last_layers)}
        with fitting(args.init):
            weights.load_state_dict({**checkpoint['state_dict'], **own})
    elif checkpoint:
        made_with = (checkpoint['images'], checkpoint['world_size'])
        if made_with != (digest, args.world_size):
            raise BadInput(
                f'{args.resume} is of a run with other images or in {made_with[1]} processes, not {args.world_size}. '
                f'Continue it with the data and the number of processes that it had.')
        start_epoch, history = restore(args.resume, weights, optimizer, scaler), checkpoint['history']
        if start_epoch >= args.epochs:
            raise BadInput(f'{args.resume} has all {args.epochs} epochs. Give it to --evaluate.')
    scores = [row[best_by] for row in history if best_by in row]
    if args.rank == 0:
        create_output_dir(args)
        if scores:
            shutil.copy(args.resume.with_name('best.pth'), args.output_dir)

    parallel = DistributedDataParallel(model) if args.distributed else model
    for epoch in range(start_epoch, args.epochs):
        # all random numbers of an epoch follow from its number, so a resumed run draws those of a whole one
        random_seed(args.seed + epoch * args.world_size, args.rank)
        model.train()
        start = time.monotonic()
        mean = torch.zeros((), device=args.device)
        progress = tqdm(create_loader(epoch), f'Epoch {epoch + 1}', leave=False, disable=args.rank > 0)
        for update, batch in enumerate(progress, epoch * updates + 1):
            check_interrupt()
            loss = compute_loss(parallel, batch)
            if not math.isfinite(loss.item()):
                raise BadInput(f'The loss is {loss.item()} in epoch {epoch + 1}. Train anew with a lower --lr.')
            optimizer.zero_grad()
            if scaler:
                scaler(loss, optimizer)
            else:
                loss.backward()
                optimizer.step()
            lr = optimizer.param_groups[0]['lr']
            scheduler.step_update(update)
            mean += loss.detach() / (updates * args.world_size)
        if args.distributed:
            dist.all_reduce(mean)
            distribute_bn(model, args.world_size, reduce=True)
        if mean == 0:
            raise BadInput(
                f'The loss of epoch {epoch + 1} is exactly 0: its batches had nothing to learn from. Check the data.')
        seconds = round(time.monotonic() - start, 1)
        row = dict(epoch=epoch + 1, loss=mean.item(), lr=lr, seconds=seconds)
        row.update(evaluate(epoch))
        history.append(row)
        is_best = row.get(best_by, -1) > max(scores, default=-1)
        scores.append(row.get(best_by, -1))
        if args.rank == 0:
            state = dict(
                script=script, options={k: v for k, v in vars(args).items() if k not in FREE_OPTIONS}, images=digest,
                world_size=args.world_size, history=history, epoch=epoch, version=2, arch=args.model,
                state_dict=weights.state_dict(), optimizer=optimizer.state_dict())
            if scaler:
                state[scaler.state_dict_key] = scaler.state_dict()
            write_run(args.output_dir, state, is_best)
            found = ''.join(
                f', {k.replace("map", "mAP")} {v:.4f}' for k, v in row.items() if k.lower().startswith(('map', 'rank')))
            print(
                f'Epoch {epoch + 1} of {args.epochs}: loss {mean:.4f}, learning rate {lr:.3g}, '
                f'{seconds} s{found}', flush=True)
