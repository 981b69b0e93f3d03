"""The training loop of the training scripts. A run can end at any time, and continue to the result of a whole one."""
import argparse
import csv
import hashlib
import io
import itertools
import math
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from PIL import Image
from script_utils import BadInput, add_run_options, check_interrupt, create_output_dir, number, progress, write_file
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import NativeScaler, distribute_bn, init_distributed_device, random_seed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Sampler

# every other option makes a run what it is, and is kept in its checkpoints
FREE_OPTIONS = {
    'data', 'output', 'output_dir', 'evaluate', 'resume', 'init', 'predict', 'export', 'min_score', 'allow_overlap',
    'pretrained', 'device', 'workers', 'distributed', 'rank', 'local_rank', 'world_size', 'script'}
MODEL_OPTIONS = {'model', 'image_size', 'classes', 'min_ratio'}  # what a model is made with


def add_options(parser: argparse.ArgumentParser, output: str, epochs: int, batch_size: int, lr: float) -> None:
    add = parser.add_argument
    start = parser.add_mutually_exclusive_group().add_argument
    start('--resume', type=Path, metavar='FILE',
        help='continue the run of this last.pth, with the options it had, in a new folder beside its own')
    start('--evaluate', type=Path, metavar='FILE', help='only evaluate the model of this last.pth')
    start('--init', type=Path, metavar='FILE',
        help='start a new run from the weights of this last.pth; the last layer is new if the classes are others')
    add_run_options(parser, output, epochs)
    add('--model', default='hbonet_100', metavar='NAME', help='timm model (default: %(default)s)')
    add('--pretrained', action='store_true', help="start from the model's pretrained weights")
    add('--batch-size', type=number(int, 2), default=batch_size, metavar='N', help='per process (default: %(default)s)')
    add('--lr', type=number(float, 1e-9), default=lr, metavar='X', help='learning rate (default: %(default)s)')
    add('--weight-decay', type=number(float, 0), default=5e-4, metavar='X', help='(default: %(default)s)')
    add('--allow-overlap', action='store_true', help='go on if what is tested on is trained on too')
    add('--amp', action='store_true', help='mixed precision')
    add('--amp-dtype', choices=['bfloat16', 'float16'], default='bfloat16', help='(default: %(default)s)')
    add('--eval-every', type=number(int, 1), default=10, metavar='N', help='number of epochs (default: %(default)s)')
    add('--workers', type=number(int, 0), default=min(4, os.cpu_count() or 1), metavar='N',
        help='processes that load images, for each process (default: %(default)s)')


def start_run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Optional[Dict[str, Any]]:
    """Set up the device and processes. Options are taken from a checkpoint, which is returned."""
    checkpoint, path, args.script = None, args.resume or args.evaluate or args.init, parser.prog
    if path:
        checkpoint = load_checkpoint(path, parser.prog)
        options = dict(checkpoint['options'])
        made = {k: options[k] for k in MODEL_OPTIONS - {'classes'} & set(options)}  # by which other classes start too
        vars(args).update(made if args.init else options)
        if args.resume:
            args.output = args.resume.resolve().parent
        parser.parse_args(namespace=args)  # what the command line says is stronger
        for name in options if args.resume else {'model'} if args.init else MODEL_OPTIONS & set(options):
            if getattr(args, name) != options[name]:
                raise BadInput(
                    f'{path} was made with --{name.replace("_", "-")} {options[name]}, not {getattr(args, name)}. '
                    f'Leave the option out, or give another file.')
    init_distributed_device(args)
    if args.rank > 0:  # the first process evaluates, and speaks for all
        if args.evaluate:
            sys.exit()
        sys.stdout = open(os.devnull, 'w')
    return checkpoint


def load_checkpoint(path: Path, script: str) -> Dict[str, Any]:
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        if checkpoint['script'] == script:
            return checkpoint
        reason = f'it was written by {checkpoint["script"]}'
    except OSError as e:
        reason = e.strerror or e
    except Exception:  # damaged files and those of other programs have many ways to fail
        reason = 'it is damaged or of another program'
    raise BadInput(f'{path} cannot be read as a checkpoint: {reason}. Give a last.pth that {script} wrote.')


def check_overlap(args: argparse.Namespace, images: Dict[str, Sequence[Any]]) -> None:
    """Raise BadInput if a list has an image or identity of another, and it is not allowed."""
    for (name, first), (other, second) in itertools.combinations(images.items(), 2):
        both = sorted(set(first) & set(second))
        if both and not args.allow_overlap:
            raise BadInput(
                f'{both[0]} is in {name} and in {other}, and so are {len(both)} of the {len(set(second))} of {other}. '
                f'Their score would say nothing of what is new. Give other data, or --allow-overlap.')


def restore(path: Path, checkpoint: Dict[str, Any], model: torch.nn.Module, own: Tuple[str, ...] = (), **parts) -> None:
    """Load weights, but those whose names start with `own`, and the states of other parts."""
    try:
        kept = {k: v for k, v in model.state_dict().items() if k.startswith(own)}
        model.load_state_dict({**checkpoint['state_dict'], **kept})
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    except (RuntimeError, ValueError, KeyError) as e:
        raise BadInput(
            f'{path} does not fit the model: {e} Give a file that was written with this --model, and these versions of '
            f'timm and timm-hbonet.') from None


def load_model(args: argparse.Namespace, checkpoint: Dict[str, Any], model: torch.nn.Module) -> None:
    """Restore what `--evaluate` names, and make the folder for what comes of it."""
    restore(args.evaluate, checkpoint, model)
    create_output_dir(args)


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write CSV in UTF-8, and names of files that are not in it as they are."""
    writer = csv.writer(content := io.StringIO(), lineterminator='\n')
    writer.writerows([columns, *rows])
    write_file(path, content.getvalue().encode(errors='surrogateescape'))


def write_grid(path: Path, rows: Sequence[Sequence[Image.Image]], size: Tuple[int, int]) -> None:
    """Write a picture of rows of images, each at the upper left of a tile."""
    picture = Image.new('RGB', (size[0] * max(map(len, rows)), size[1] * len(rows)), 'white')
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            picture.paste(image, (size[0] * x, size[1] * y))
    picture.save(content := io.BytesIO(), 'PNG')
    write_file(path, content.getvalue())


def autocast(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(torch.device(args.device).type, getattr(torch, args.amp_dtype), enabled=args.amp)


def train(
        args: argparse.Namespace,
        model: torch.nn.Module,
        weights: torch.nn.Module,
        opt: str,
        warmup_epochs: int,
        dataset: Sequence,
        create_sampler: Callable[[int], Sampler],
        collate: Callable[[Sequence], Any],
        compute_loss: Callable[[torch.nn.Module, Any], torch.Tensor],
        evaluate: Callable[[], Dict[str, float]],
        images: Sequence[str],
        checkpoint: Optional[Dict[str, Any]],
        best_by: str = '',
        last_layers: Tuple[str, ...] = (),
) -> Dict[str, float]:
    """Train, and after each epoch write `last.pth` and `summary.csv` to a new folder. Returns the last scores.

    Args:
        weights: The part of the model that is saved.
        evaluate: Gives scores. Called in the first process only. Those of a class (name AP) are not printed.
        images: Names that say which data are trained on.
        best_by: Name of a score. The epoch of the highest is kept in `best.pth`, and is the model's in the end.
        last_layers: Beginnings of the names of weights that `args.init` leaves out if it has other `args.classes`.
    """
    digest = hashlib.sha256('\n'.join(images).encode()).hexdigest()
    # a last, smaller batch is dropped: one of a single image has no statistics on a map of 1 x 1
    loader = partial(DataLoader, dataset, args.batch_size, collate_fn=collate, num_workers=args.workers, drop_last=True)
    updates = len(loader(sampler=create_sampler(0)))
    if not updates:
        raise BadInput(
            f'{args.data} has {len(dataset)} images to train on, fewer than --batch-size {args.batch_size} in each of '
            f'{args.world_size} processes. Lower --batch-size.')
    optimizer = create_optimizer_v2(model, opt, lr=args.lr, weight_decay=args.weight_decay)
    scaler = NativeScaler(torch.device(args.device).type) if args.amp and args.amp_dtype == 'float16' else None
    parts = dict(optimizer=optimizer, **({scaler.state_dict_key: scaler} if scaler else {}))
    scheduler, _ = create_scheduler_v2(
        optimizer, 'cosine', args.epochs, warmup_epochs=warmup_epochs, warmup_lr=args.lr / 100, step_on_epochs=False,
        updates_per_epoch=updates)
    start_epoch, history, scores = 0, [], {}
    if args.init:
        own = last_layers if checkpoint['options']['classes'] != args.classes else ()
        restore(args.init, checkpoint, weights, own)
    elif checkpoint:
        if (checkpoint['images'], checkpoint['world_size']) != (digest, args.world_size):
            raise BadInput(
                f'{args.resume} is of a run with other images or in {checkpoint["world_size"]} processes, not '
                f'{args.world_size}. Continue it with the data and the number of processes that it had.')
        start_epoch, history = checkpoint['epoch'] + 1, checkpoint['history']
        if start_epoch >= args.epochs:
            raise BadInput(
                f'{args.resume} has all {args.epochs} epochs. To train longer, start a new run from it, '
                f'--init {args.resume}. To score it, --evaluate {args.resume}.')
        restore(args.resume, checkpoint, weights, **parts)
    best = max((row[best_by] for row in history if best_by in row), default=-1)
    if args.rank == 0:
        create_output_dir(args)
        if best >= 0:
            shutil.copy(args.resume.with_name('best.pth'), args.output_dir)

    parallel = DistributedDataParallel(model) if args.distributed else model
    for epoch in range(start_epoch, args.epochs):
        # all random numbers of an epoch follow from its number, so a resumed run draws those of a whole one
        random_seed(args.seed + epoch * args.world_size, args.rank)
        model.train()
        start = time.monotonic()
        mean = torch.zeros((), device=args.device)
        batches = progress(loader(sampler=create_sampler(epoch)), f'Epoch {epoch + 1}')
        for update, batch in enumerate(batches, epoch * updates + 1):
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
        if args.rank > 0:
            continue
        seconds = round(time.monotonic() - start, 1)
        scores = evaluate() if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs else {}
        history.append(dict(epoch=epoch + 1, loss=mean.item(), lr=lr, seconds=seconds, **scores))
        state = dict(
            script=args.script, options={k: v for k, v in vars(args).items() if k not in FREE_OPTIONS},
            images=digest, world_size=args.world_size, history=history, epoch=epoch, version=2, arch=args.model,
            state_dict=weights.state_dict(), **{k: part.state_dict() for k, part in parts.items()})
        torch.save(state, content := io.BytesIO())
        # the layout is that of timm's CheckpointSaver, which deletes the last file before it renames the next
        for name in ['best.pth', 'last.pth'] if scores.get(best_by, -1) > best else ['last.pth']:
            write_file(args.output_dir / name, content.getvalue())
        best = max(best, scores.get(best_by, -1))
        columns = list(dict.fromkeys(k for row in history for k in row))
        write_table(args.output_dir / 'summary.csv', columns, ([row.get(k, '') for k in columns] for row in history))
        found = ''.join(f', {k.replace("map", "mAP")} {v:.4f}' for k, v in scores.items() if ' AP ' not in k)
        print(
            f'Epoch {epoch + 1} of {args.epochs}: loss {mean:.4f}, learning rate {lr:.3g}, {seconds} s{found}',
            flush=True)
    if best_by and args.rank == 0:
        checkpoint = load_checkpoint(args.output_dir / 'best.pth', args.script)
        weights.load_state_dict(checkpoint['state_dict'])
        print(f'The best of the val list is of epoch {checkpoint["epoch"] + 1}, and is tested now.')
    if args.distributed:
        dist.destroy_process_group()
    return scores
