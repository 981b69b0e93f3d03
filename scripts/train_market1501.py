#!/usr/bin/env python3
"""Train and evaluate a timm model for person re-identification on Market-1501.

Identity cross entropy and batch-hard triplet loss on the model's pooled features, then CMC rank-1, rank-5, rank-10 and
mAP under the single-query protocol, with a picture of the top matches. Runs on a GPU if there is one, and in several
processes with torchrun. See docs/market1501.md.
"""
import argparse
import io
import re
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from script_utils import (
    BadInput,
    create_model,
    create_output_dir,
    number,
    read_image,
    requirements,
    run_script,
    write_file,
)
from timm.data import resolve_model_data_config
from timm.utils import random_seed
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm
from training import add_training_options, autocast, restore, start_run, train

with requirements():
    from matplotlib.figure import Figure
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.miners import BatchHardMiner
    from pytorch_metric_learning.samplers import MPerClassSampler

TRAIN, QUERY, GALLERY = 'bounding_box_train', 'query', 'bounding_box_test'
DISTRACTOR = 0  # junk is -1
FILE_NAME = re.compile(r'(-1|[0-9]{4})_c([0-9])s[0-9]_[0-9]{6}_[0-9]{2}(\.(jpe?g|png))+', re.IGNORECASE)
RANKS = (1, 5, 10)
EVAL_BATCH_SIZE = 128


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
        return self.transform(read_image(self.samples[index].path)), self.labels[index]


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
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.startswith('.') or path.name.lower() in ('thumbs.db', 'desktop.ini'):
            continue  # of a file manager
        match = FILE_NAME.fullmatch(path.name)
        if not match:
            raise BadInput(
                f'{path} is not named as in Market-1501, IDENTITY_cCAMERAsSEQUENCE_FRAME_BOX.jpg (or .jpeg, .png) like '
                f'0002_c1s1_000451_03.jpg. Rename or remove it.')
        sample = Sample(path, int(match[1]), int(match[2]))
        if sample.identity > DISTRACTOR or (sample.identity == DISTRACTOR and split == GALLERY):
            samples.append(sample)
    if not samples:
        raise BadInput(
            f'{folder} {"has no images of persons" if folder.is_dir() else "is missing"}. Give the folder that the '
            f'archive of Market-1501 makes, with {TRAIN}, {QUERY} and {GALLERY}.')
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
    rankings = tqdm(
        rank_gallery(query, gallery), 'Ranking', total=len(query.identities), unit='query', leave=False)
    for identity, ranking in zip(query.identities, rankings, strict=True):
        ranks = (gallery.identities[ranking] == identity).nonzero().flatten() + 1  # of the matches
        precisions = torch.arange(1, len(ranks) + 1) / ranks.double()
        values.append([precisions.mean(), *(ranks[0] <= rank for rank in RANKS)])
    means = torch.tensor(values, dtype=torch.double).mean(0)
    return dict(zip(('mAP', *(f'rank-{r}' for r in RANKS)), (100 * means).tolist(), strict=True))


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
    transform = create_transform(args, resolve_model_data_config(model.backbone), is_training=False)
    identities = [s.identity for s in samples]
    loader = DataLoader(Images(samples, identities, transform), EVAL_BATCH_SIZE, num_workers=args.workers)
    model.eval()
    embeddings = []
    for images, _ in tqdm(loader, desc, leave=False):
        with autocast(args):
            embeddings.append(model(images.to(args.device))[0].float())
    embeddings = F.normalize(torch.cat(embeddings)).cpu()
    return Features(embeddings, torch.tensor(identities), torch.tensor([s.camera for s in samples]))


def evaluate(model: ReidModel, test: Tuple[List[Sample], List[Sample]], args: argparse.Namespace) -> None:
    query, gallery = (extract(model, s, args, d) for s, d in zip(test, ('Query', 'Gallery'), strict=True))
    metrics = compute_metrics(query, gallery)
    path = args.output_dir / 'matches.png'
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
            axes.imshow(read_image(sample.path))
            axes.set_title(f'{name}\ncamera {sample.camera}', fontsize=8, color='black')
            axes.axis('on')
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(color=color, linewidth=3)
    content = io.BytesIO()
    figure.savefig(content, format='png')
    write_file(path, content.getvalue())


def create_reid_model(args: argparse.Namespace, pretrained: bool = False) -> ReidModel:
    model = create_model(args.model, pretrained=pretrained, num_classes=args.num_classes)
    if not isinstance(model.get_classifier(), nn.Linear):
        raise BadInput(f'--model {args.model} has no linear classifier. Choose one that has, as hbonet_100.')
    if hasattr(model, 'set_input_size'):
        try:
            model.set_input_size(img_size=tuple(args.image_size))
        except Exception as e:  # each of timm's families has errors of its own
            raise BadInput(f'--model {args.model} does not take --image-size {args.image_size}: {e}') from None
    return ReidModel(model).to(args.device)


def train_reid(args: argparse.Namespace, script: str, checkpoint: Optional[Dict[str, Any]]) -> ReidModel:
    samples = read_train(args.data)
    identities = sorted({s.identity for s in samples})
    if len(identities) * args.images_per_identity < args.batch_size:
        raise BadInput(
            f'{args.data / TRAIN} has {len(identities)} identities, with --images-per-identity '
            f'{args.images_per_identity} too few for --batch-size {args.batch_size}. Give a smaller one.')
    args.num_classes = len(identities)
    random_seed(args.seed)
    model = create_reid_model(args, args.pretrained and not checkpoint)
    transform = create_transform(args, resolve_model_data_config(model.backbone), is_training=True)
    labels = [identities.index(s.identity) for s in samples]
    dataset = Images(samples, labels, transform)
    epoch_size = max(args.batch_size, len(samples) // args.world_size)
    miner, triplet_loss = BatchHardMiner(), TripletMarginLoss(margin=0.3)

    def create_loader(epoch: int) -> DataLoader:
        sampler = MPerClassSampler(labels, args.images_per_identity, args.batch_size, epoch_size)
        return DataLoader(dataset, args.batch_size, sampler=sampler, num_workers=args.workers)

    def compute_loss(parallel: nn.Module, batch: Tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        images, targets = (values.to(args.device) for values in batch)
        with autocast(args):
            embeddings, logits = parallel(images)
        embeddings = embeddings.float()
        return F.cross_entropy(logits.float(), targets) + triplet_loss(embeddings, targets, miner(embeddings, targets))

    train(
        args, script, model, model.backbone, opt='adam', warmup_epochs=args.epochs // 12, create_loader=create_loader,
        compute_loss=compute_loss, images=[s.path.name for s in samples], checkpoint=checkpoint)
    return model


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('data', type=Path, metavar='DIR', help=f'folder that has {TRAIN}, {QUERY} and {GALLERY}')
    add_training_options(parser, 'market1501', epochs=120, batch_size=64, lr=3.5e-4)
    add('--image-size', type=number(int, 1), nargs=2, default=[256, 128], metavar=('HEIGHT', 'WIDTH'),
        help='(default: 256 128)')
    add('--images-per-identity', type=number(int, 2), default=4, metavar='N',
        help='in a batch, a divisor of --batch-size (default: %(default)s)')
    return parser


def main(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    checkpoint = start_run(args, parser)
    if args.batch_size % args.images_per_identity or args.batch_size == args.images_per_identity:
        parser.error(
            f'--batch-size must be 2 or more times --images-per-identity {args.images_per_identity}, got '
            f'{args.batch_size}')
    test = read_test(args.data)
    if args.evaluate:
        model = create_reid_model(args)
        restore(args.evaluate, model.backbone)
        if args.rank == 0:
            create_output_dir(args)
    else:
        model = train_reid(args, parser.prog, checkpoint)
    if args.rank == 0:
        evaluate(model, test, args)
    if args.distributed:
        dist.destroy_process_group()


if __name__ == '__main__':
    run_script(main, create_parser())
