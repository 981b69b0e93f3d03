#!/usr/bin/env python3
"""Train and evaluate a timm model for person re-identification on Market-1501.

Identity cross entropy and batch-hard triplet loss on the model's pooled features, then CMC rank-1, rank-5, rank-10 and
mAP under the single-query protocol, with a picture of the top matches. Runs on a GPU if there is one, and on several
processes with torchrun. See docs/market1501.md.
"""
import argparse
import math
import os
import pickle
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import timm
import timm.data
import timm.optim
import timm.scheduler
import timm.utils
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

try:
    from matplotlib.figure import Figure
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.miners import BatchHardMiner
    from pytorch_metric_learning.samplers import MPerClassSampler
    from torchmetrics.functional.retrieval import retrieval_average_precision, retrieval_hit_rate
    from tqdm import tqdm
except ModuleNotFoundError as e:
    sys.exit(f"train_market1501.py needs {e.name}, which is not installed. Run: pip install 'timm-hbonet[scripts]'")

TRAIN, QUERY, GALLERY = 'bounding_box_train', 'query', 'bounding_box_test'
DISTRACTOR = 0  # junk is -1
FILE_NAME = re.compile(r'(-1|\d{4})_c(\d)s\d_\d{6}_\d{2}\.jpg')
RANKS = (1, 5, 10)
EVAL_BATCH_SIZE = 128
# what makes a run what it is, a run can only be resumed with the same
RUN_OPTIONS = (
    'model', 'image_size', 'identities_per_batch', 'images_per_identity', 'epochs', 'lr', 'weight_decay', 'amp', 'seed',
    'world_size')


class BadInput(Exception):
    """A file or an option that the user has to change. The message is one line."""


class Sample(NamedTuple):
    path: Path
    identity: int
    camera: int


class Features(NamedTuple):
    """Embeddings (N, D) of unit length with identities (N,) and cameras (N,)."""
    embeddings: torch.Tensor
    identities: torch.Tensor
    cameras: torch.Tensor


class Images(Dataset):
    def __init__(self, samples: Sequence[Sample], labels: Sequence[int], transform: Callable):
        self.samples = samples
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tuple[torch.Tensor, int]:
        path = self.samples[index].path
        try:
            with Image.open(path) as image:
                image = image.convert('RGB')
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
            raise BadInput(f'cannot read {path} as an image: {e}. Extract it again from the archive.') from None
        return self.transform(image), self.labels[index]


class ReidModel(nn.Module):
    """Embeddings (B, D) and identity logits (B, num_classes) of a timm model."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        embeddings = self.backbone.forward_head(self.backbone.forward_features(x), pre_logits=True)
        return embeddings, self.backbone.get_classifier()(embeddings)


def read_split(root: Path, split: str) -> List[Sample]:
    """List a folder of the data set, sorted by name: persons, in the gallery also distractors, never junk.

    Raises:
        BadInput: If the folder is missing or empty, or a name is not one of Market-1501.
    """
    folder = root / split
    samples = []
    for path in sorted(folder.glob('*.jpg')):
        match = FILE_NAME.fullmatch(path.name)
        if not match:
            raise BadInput(
                f'{path} is not named as in Market-1501, IDENTITY_cCAMERAsSEQUENCE_FRAME_BOX.jpg such as '
                f'0002_c1s1_000451_03.jpg. Rename or remove it.')
        sample = Sample(path, *map(int, match.groups()))
        if sample.identity > DISTRACTOR or (sample.identity == DISTRACTOR and split == GALLERY):
            samples.append(sample)
    if not samples:
        raise BadInput(
            f'{folder} {"has no images of persons" if folder.is_dir() else "is missing"}. Give with --data the '
            f'extracted archive of Market-1501, the folder that has {TRAIN}, {QUERY} and {GALLERY}.')
    return samples


def read_train(root: Path) -> List[Sample]:
    samples = read_split(root, TRAIN)
    counts = Counter(s.identity for s in samples)
    for sample in samples:
        if counts[sample.identity] == 1:
            raise BadInput(
                f'{sample.path} is the only image of identity {sample.identity:04}, and the triplet loss needs two of '
                f'each. Add another, or remove it.')
    return samples


def read_test(root: Path) -> Tuple[List[Sample], List[Sample]]:
    query, gallery = read_split(root, QUERY), read_split(root, GALLERY)
    found = {(s.identity, s.camera) for s in gallery}
    cameras = {s.camera for s in gallery}
    for sample in query:
        if not any((sample.identity, camera) in found for camera in cameras - {sample.camera}):
            raise BadInput(
                f'{sample.path} has no match: {root / GALLERY} has no image of identity {sample.identity:04} from '
                f'another camera than {sample.camera}. Add one, or remove the query.')
    return query, gallery


def rank_gallery(query: Features, gallery: Features) -> Iterator[torch.Tensor]:
    """Give for each query the indices (M,) of gallery images, best match first.

    By the single-query protocol, images of the query's identity from the query's own camera are left out.
    """
    chunks = zip(*(values.split(EVAL_BATCH_SIZE) for values in query), strict=True)  # all at once may not fit in memory
    for embeddings, identities, cameras in chunks:
        orders = (embeddings @ gallery.embeddings.T).argsort(dim=1, descending=True, stable=True)
        ignored = (gallery.identities == identities[:, None]) & (gallery.cameras == cameras[:, None])
        for order, ignore in zip(orders, ignored, strict=True):
            yield order[~ignore[order]]


def compute_metrics(query: Features, gallery: Features) -> Dict[str, float]:
    """Compute mAP and CMC in percent. Each query must have a match in the gallery from another camera."""
    values = []
    rankings = tqdm(rank_gallery(query, gallery), total=len(query.identities), desc='Ranking', unit='query')
    for identity, ranking in zip(query.identities, rankings, strict=True):
        relevant = gallery.identities[ranking] == identity
        # torchmetrics counts no match that has a score of 0 or less, so scores are ranks and not similarities
        scores = torch.arange(len(ranking), 0, -1, dtype=torch.float32)
        values.append([
            retrieval_average_precision(scores, relevant),
            *(retrieval_hit_rate(scores, relevant, top_k=rank) for rank in RANKS)])
    return dict(zip(('mAP', *(f'rank-{r}' for r in RANKS)), (100 * torch.tensor(values).mean(0)).tolist(), strict=True))


def create_transform(args: argparse.Namespace, data_config: Dict[str, Any], is_training: bool) -> Callable:
    height, width = args.image_size
    transforms = [v2.Resize((height, width), interpolation=v2.InterpolationMode(data_config['interpolation']))]
    if is_training:
        # 10 pixels at the usual 256 x 128
        transforms += [v2.RandomHorizontalFlip(), v2.Pad(height // 25), v2.RandomCrop((height, width))]
    transforms += [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(data_config['mean'], data_config['std']),
    ]
    if is_training:
        transforms.append(v2.RandomErasing())
    return v2.Compose(transforms)


@torch.inference_mode()
def extract(model: ReidModel, samples: Sequence[Sample], args: argparse.Namespace, desc: str) -> Features:
    transform = create_transform(args, timm.data.resolve_model_data_config(model.backbone), is_training=False)
    identities = [s.identity for s in samples]
    loader = DataLoader(Images(samples, identities, transform), EVAL_BATCH_SIZE, num_workers=args.workers)
    model.eval()
    embeddings = []
    for images, _ in tqdm(loader, desc=desc, unit='batch'):
        with torch.autocast(args.device_type, torch.bfloat16, enabled=args.amp):
            embeddings.append(model(images.to(args.device))[0].float())
    embeddings = F.normalize(torch.cat(embeddings)).cpu()
    return Features(embeddings, torch.tensor(identities), torch.tensor([s.camera for s in samples]))


def evaluate(model: ReidModel, test: Tuple[List[Sample], List[Sample]], args: argparse.Namespace) -> None:
    query, gallery = (extract(model, s, args, d) for s, d in zip(test, ('Query', 'Gallery'), strict=True))
    metrics = compute_metrics(query, gallery)
    path = args.output / 'matches.png'
    draw_matches(test, query, gallery, path)
    print(', '.join(f'{name} {value:.2f} %' for name, value in metrics.items()))
    print(f'Picture of the top matches: {path}')


def draw_matches(test: Tuple[List[Sample], List[Sample]], query: Features, gallery: Features, path: Path) -> None:
    """Draw some queries, evenly chosen, each with its 10 best matches."""
    rows = torch.linspace(0, len(test[0]) - 1, min(8, len(test[0]))).long()
    figure = Figure(figsize=(11, 2.2 * len(rows)), dpi=100, layout='constrained')
    places = figure.subplots(len(rows), 11, squeeze=False)
    for axes in places.flat:
        axes.axis('off')
    rankings = rank_gallery(Features(*(values[rows] for values in query)), gallery)
    for row, index, ranking in zip(places, rows.tolist(), rankings, strict=True):
        wanted = test[0][index]
        shown = [(wanted, 'query', 'black')]
        for i in ranking[:10].tolist():
            sample = test[1][i]
            name = 'distractor' if sample.identity == DISTRACTOR else f'{sample.identity:04}'
            shown.append((sample, name, 'limegreen' if sample.identity == wanted.identity else 'red'))
        for axes, (sample, name, color) in zip(row, shown, strict=False):
            with Image.open(sample.path) as image:
                axes.imshow(image.convert('RGB'))
            axes.set_title(f'{name}\ncamera {sample.camera}', fontsize=8, color='black')
            axes.axis('on')
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(color=color, linewidth=3)
    partial = path.with_name(f'.{path.name}')
    figure.savefig(partial, format='png')
    os.replace(partial, path)


def load_checkpoint(path: Path, args: argparse.Namespace, options: Sequence[str]) -> Dict[str, Any]:
    """Open a checkpoint of this script.

    Raises:
        BadInput: If it is none, or its run had other `options` than `args`.
    """
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        made_with = checkpoint['options']
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError) as e:
        reason = str(e).splitlines()[0] if isinstance(e, OSError) else 'it is damaged or not from this script'
        raise BadInput(f'cannot open {path}: {reason}. Give a last.pth that this script wrote.') from None
    for name in options:
        if made_with[name] != getattr(args, name):
            title = name.replace('_', ' ')
            raise BadInput(
                f'{path} was made with {title} {made_with[name]}, not {getattr(args, name)}. Run with the same '
                f'{title}, or give another file.')
    return checkpoint


def create_model(args: argparse.Namespace, num_classes: int, pretrained: bool) -> ReidModel:
    try:
        model = timm.create_model(args.model, pretrained=pretrained, num_classes=num_classes)
        if hasattr(model, 'set_input_size'):
            model.set_input_size(img_size=tuple(args.image_size))
        return ReidModel(model).to(args.device)
    except Exception as e:  # each source of models and weights has errors of its own
        raise BadInput(f'cannot create --model {args.model}. {type(e).__name__}: {" ".join(str(e).split())}') from None


def train(args: argparse.Namespace) -> None:
    samples, test = read_train(args.data), read_test(args.data)
    identities = sorted({s.identity for s in samples})
    if len(identities) < args.identities_per_batch:
        raise BadInput(
            f'{args.data / TRAIN} has {len(identities)} identities, fewer than --identities-per-batch '
            f'{args.identities_per_batch}. Give a smaller number.')
    last = args.output / 'last.pth'
    checkpoint = load_checkpoint(args.resume, args, RUN_OPTIONS) if args.resume else None
    if checkpoint and checkpoint['identities'] != identities:
        raise BadInput(f'{args.resume} was trained on other identities than {args.data / TRAIN}. Give the same --data.')
    if last.exists() and not checkpoint:
        raise BadInput(f'{last} is of an earlier run. Continue it with --resume {last}, or give another --output.')

    timm.utils.random_seed(args.seed)
    model = create_model(args, len(identities), args.pretrained and not checkpoint)
    optimizer = timm.optim.create_optimizer_v2(model, opt='adam', lr=args.lr, weight_decay=args.weight_decay)
    batch_size = args.identities_per_batch * args.images_per_identity
    epoch_size = max(batch_size, len(samples) // args.world_size)
    updates_per_epoch = epoch_size // batch_size
    scheduler, _ = timm.scheduler.create_scheduler_v2(
        optimizer,
        num_epochs=args.epochs,
        warmup_epochs=args.epochs // 12,
        warmup_lr=args.lr / 100,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    start_epoch = 0
    if checkpoint:
        model.backbone.load_state_dict(checkpoint['state_dict'])
        optimizer.load_state_dict(checkpoint['optimizer'])
        start_epoch = checkpoint['epoch']
        scheduler.step_update(start_epoch * updates_per_epoch)

    transform = create_transform(args, timm.data.resolve_model_data_config(model.backbone), is_training=True)
    labels = [identities.index(s.identity) for s in samples]
    dataset = Images(samples, labels, transform)
    miner, triplet_loss = BatchHardMiner(), TripletMarginLoss(margin=0.3)
    parallel = DistributedDataParallel(model) if args.distributed else model
    for epoch in range(start_epoch, args.epochs):
        # a seed and a sampler for each epoch, so that a resumed run draws what an uninterrupted one does
        timm.utils.random_seed(args.seed + epoch * args.world_size, args.rank)
        sampler = MPerClassSampler(labels, args.images_per_identity, batch_size, epoch_size)
        loader = DataLoader(dataset, batch_size, sampler=sampler, num_workers=args.workers)
        losses = timm.utils.AverageMeter()
        parallel.train()
        progress = tqdm(loader, desc=f'Epoch {epoch + 1}', unit='batch', disable=not timm.utils.is_primary(args))
        for update, (images, targets) in enumerate(progress, epoch * updates_per_epoch + 1):
            images, targets = images.to(args.device), targets.to(args.device)
            with torch.autocast(args.device_type, torch.bfloat16, enabled=args.amp):
                embeddings, logits = parallel(images)
            embeddings = embeddings.float()
            loss = F.cross_entropy(logits.float(), targets) + triplet_loss(
                embeddings, targets, miner(embeddings, targets))
            value = loss.item()
            if not math.isfinite(value):
                raise BadInput(f'the loss is {value} in epoch {epoch + 1}. Train with a smaller --lr.')
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step_update(update)
            losses.update(value)
            progress.set_postfix(loss=f'{losses.avg:.3f}')
        if timm.utils.is_primary(args):
            state = {
                'options': {name: getattr(args, name) for name in RUN_OPTIONS},
                'identities': identities,
                'epoch': epoch + 1,
                'state_dict': model.backbone.state_dict(),
                'optimizer': optimizer.state_dict(),
            }
            torch.save(state, last.with_name('.last.pth'))
            os.replace(last.with_name('.last.pth'), last)
            print(f'Epoch {epoch + 1} of {args.epochs}: loss {losses.avg:.3f}', flush=True)

    if timm.utils.is_primary(args):
        evaluate(model, test, args)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--data', type=Path, required=True, metavar='DIR', help=f'folder that has {TRAIN}, {QUERY} and {GALLERY}')
    add('--output', type=Path, default=Path('output/market1501'), metavar='DIR',
        help='folder for last.pth, the checkpoint of the last epoch, and matches.png (default: %(default)s)')
    add('--resume', type=Path, metavar='FILE', help='last.pth of a run to continue, with the same options')
    add('--evaluate', type=Path, metavar='FILE', help='last.pth to evaluate, with the same model and size')
    add('--model', default='hbonet_100', metavar='NAME', help='timm model (default: %(default)s)')
    add('--pretrained', action='store_true', help='start from the pretrained weights of the model')
    add('--image-size', type=int, nargs=2, default=[256, 128], metavar=('HEIGHT', 'WIDTH'), help='(default: 256 128)')
    add('--identities-per-batch', type=int, default=16, metavar='P', help='per process (default: %(default)s)')
    add('--images-per-identity', type=int, default=4, metavar='K', help='in a batch, 2 or more (default: %(default)s)')
    add('--epochs', type=int, default=120, metavar='N', help='a 12th of them warms up (default: %(default)s)')
    add('--lr', type=float, default=3.5e-4, help='learning rate of Adam, with cosine decay (default: %(default)s)')
    add('--weight-decay', type=float, default=5e-4, help='not on norms and biases (default: %(default)s)')
    add('--amp', action='store_true', help='mixed precision, bfloat16')
    add('--workers', type=int, default=4, metavar='N', help='processes that load images (default: %(default)s)')
    add('--seed', type=int, default=0, help='seed of weights, batches and augmentation (default: %(default)s)')
    args = parser.parse_args()
    if args.resume and args.evaluate:
        parser.error('--evaluate trains nothing, give it without --resume')
    least = dict(image_size=1, identities_per_batch=2, images_per_identity=2, epochs=1, workers=0, seed=0)
    for name, minimum in least.items():
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [value]) < minimum:
            parser.error(f'--{name.replace("_", "-")} must be at least {minimum}, got {value}')
    return args


def main() -> None:
    args = parse_args()
    args.device_type = args.device = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        timm.utils.init_distributed_device(args)
        if args.evaluate:
            test = read_test(args.data)
            checkpoint = load_checkpoint(args.evaluate, args, ('model', 'image_size'))
            model = create_model(args, len(checkpoint['identities']), pretrained=False)
            model.backbone.load_state_dict(checkpoint['state_dict'])
            evaluate(model, test, args)
        else:
            train(args)
    except BadInput as e:
        message = str(e).strip().rpartition('BadInput: ')[2]  # a loader's worker puts its traceback before the message
    except OSError as e:
        message = f'cannot write to --output {args.output}: {e}. Give another folder.'
    except KeyboardInterrupt:
        message = f'interrupted. To continue after the last whole epoch, give --resume {args.output / "last.pth"}.'
    else:
        if args.distributed:
            torch.distributed.destroy_process_group()
        return
    sys.exit(f'train_market1501.py: {message}')


if __name__ == '__main__':
    main()
