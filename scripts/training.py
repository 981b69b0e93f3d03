"""The training loop of the training scripts. A run can end at any time, and continue to the result of a whole one."""
import argparse
import csv
import hashlib
import io
import math
import os
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Sequence

import torch
import torch.distributed as dist
from script_utils import BadInput, add_run_options, check_interrupt, create_output_dir, number, write_file
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import NativeScaler, distribute_bn, init_distributed_device, random_seed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

CHECKPOINT_KEYS = {'script', 'options', 'images', 'world_size', 'history', 'epoch', 'state_dict', 'optimizer'}
# every other option makes a run what it is, and is kept in its checkpoints
FREE_OPTIONS = {
    'data', 'output', 'output_dir', 'evaluate', 'resume', 'pretrained', 'device', 'workers', 'distributed', 'rank',
    'local_rank', 'world_size'}


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
        '--resume', type=Path, metavar='FILE', help='continue the run of this last.pth, with the options it had')
    start.add_argument('--evaluate', type=Path, metavar='FILE', help='only evaluate the model of this last.pth')
    add_run_options(parser, output, epochs)
    add('--model', default='hbonet_100', metavar='NAME', help='timm model (default: %(default)s)')
    add('--pretrained', action='store_true', help="start from the model's pretrained weights")
    add('--batch-size', type=number(int, 2), default=batch_size, metavar='N',
        help='images in a batch of each process (default: %(default)s)')
    add('--lr', type=number(float, 1e-9), default=lr, metavar='X',
        help='learning rate after warm-up, then a cosine to 0 (default: %(default)s)')
    add('--weight-decay', type=number(float, 0), default=5e-4, metavar='X',
        help='not on norms and biases (default: %(default)s)')
    add('--amp', action='store_true', help='mixed precision')
    add('--amp-dtype', choices=['bfloat16', 'float16'], default='bfloat16', help='(default: %(default)s)')
    add('--workers', type=number(int, 0), default=min(4, os.cpu_count() or 1), metavar='N',
        help='processes that load images, for each process (default: %(default)s)')


def start_run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Optional[Dict[str, Any]]:
    """Set up the device and processes. Options are taken from a checkpoint, which is returned."""
    checkpoint, path = None, args.resume or args.evaluate
    if path:
        checkpoint = load_checkpoint(path, parser.prog)
        options = dict(checkpoint['options'])
        vars(args).update(options)
        parser.parse_args(namespace=args)  # what the command line says is stronger
        for name in options if args.resume else ('model', 'image_size'):
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


def restore(path: Path, *parts: Any) -> int:
    """Load weights and what else is given from a checkpoint. Returns the number of epochs that it had."""
    try:
        return resume_checkpoint(parts[0], str(path), *parts[1:], log_info=False)
    except (RuntimeError, ValueError, KeyError) as e:
        raise BadInput(
            f'{path} does not fit the model: {e} Give a file that was written with these versions of timm and '
            f'timm-hbonet.') from None


def write_run(folder: Path, state: Dict[str, Any]) -> None:
    """Write a checkpoint in the layout of timm's CheckpointSaver, and the history of the run as a table.

    The saver itself deletes the last checkpoint before it renames the next, so that a kill in between leaves none.
    """
    content, table = io.BytesIO(), io.StringIO(newline='')
    torch.save(state, content)
    writer = csv.DictWriter(table, state['history'][-1])
    writer.writeheader()
    writer.writerows(state['history'])
    write_file(folder / 'last.pth', content.getvalue())
    write_file(folder / 'summary.csv', table.getvalue().encode())


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
        checkpoint: That of `args.resume`.
        evaluate: Gives scores after an epoch.

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
    if checkpoint:
        made_with = (checkpoint['images'], checkpoint['world_size'])
        if made_with != (digest, args.world_size):
            raise BadInput(
                f'{args.resume} is of a run with other images or in {made_with[1]} processes, not {args.world_size}. '
                f'Continue it with the data and the number of processes that it had.')
        start_epoch, history = restore(args.resume, weights, optimizer, scaler), checkpoint['history']
        if start_epoch >= args.epochs:
            raise BadInput(f'{args.resume} has all {args.epochs} epochs. Give it to --evaluate.')
    if args.rank == 0:
        create_output_dir(args)

    parallel = DistributedDataParallel(model) if args.distributed else model
    for epoch in range(start_epoch, args.epochs):
        # all random numbers of an epoch follow from its number, so a resumed run draws those of a whole one
        random_seed(args.seed + epoch * args.world_size, args.rank)
        model.train()
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
            scheduler.step_update(update)
            mean += loss.detach() / (updates * args.world_size)
        if args.distributed:
            dist.all_reduce(mean)
            distribute_bn(model, args.world_size, reduce=True)
        if mean == 0:
            raise BadInput(
                f'The loss of epoch {epoch + 1} is exactly 0: its batches had nothing to learn from. Check the data.')
        history.append(dict(epoch=epoch + 1, loss=mean.item(), **evaluate(epoch)))
        if args.rank == 0:
            state = dict(
                script=script, options={k: v for k, v in vars(args).items() if k not in FREE_OPTIONS}, images=digest,
                world_size=args.world_size, history=history, epoch=epoch, version=2, arch=args.model,
                state_dict=weights.state_dict(), optimizer=optimizer.state_dict())
            if scaler:
                state[scaler.state_dict_key] = scaler.state_dict()
            write_run(args.output_dir, state)
            print(f'Epoch {epoch + 1} of {args.epochs}: loss {mean:.4f}', flush=True)
