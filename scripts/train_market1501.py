#!/usr/bin/env python3
"""Train a timm model for re-identification on data in the layout of Market-1501, evaluate it, or find an image again.

Runs on a GPU if there is one, and in several processes with torchrun. See docs/market1501.md.
"""
import argparse
import re
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from script_utils import BadInput, create_model, number, progress, raise_errors, read_image, requirements, run_script
from timm.data import resolve_model_data_config
from timm.utils import random_seed
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from training import add_options, autocast, check_overlap, load_model, start_run, train, write_grid, write_table

with requirements():
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.miners import BatchHardMiner
    from pytorch_metric_learning.samplers import MPerClassSampler

TRAIN, QUERY, GALLERY = 'bounding_box_train', 'query', 'bounding_box_test'
DISTRACTOR = 0  # junk is -1
FILE_NAME = re.compile(r'(-1|[0-9]{1,18})_c([0-9]{1,18})([^0-9].*)?\.(jpe?g|png)', re.IGNORECASE)
EXTENSIONS = ('.jpg', '.jpeg', '.png', '.webp')
RANKS = (1, 5, 10)
Data = Dict[str, List['Sample']]  # by folder
Features = Tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # embeddings (N, D) of unit length, identities, cameras
TILE = (100, 200)  # width and height in pixels, of the picture of matches


class Sample(NamedTuple):
    path: Path
    identity: int
    camera: int


class ReidModel(nn.Module):
    """Embeddings (B, D) and identity logits (B, num_classes) of a timm model."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        features = self.backbone.forward_features(x)
        # not by get_classifier(), which takes a map in some models, and is more than one layer in others
        return self.backbone.forward_head(features, pre_logits=True), self.backbone.forward_head(features)


def read_split(folder: Path, errors: List[str]) -> List[Sample]:
    """List a folder of the data set, sorted by name. Names that are wrong go to `errors`."""
    samples = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = FILE_NAME.fullmatch(path.name)
        if match and path.name.isprintable():
            samples.append(Sample(path, int(match[1]), int(match[2])))
        elif not path.name.startswith('.') and path.name.lower() not in ('thumbs.db', 'desktop.ini'):
            errors.append(
                f'{path} is not named IDENTITY_cCAMERA*, as 0002_c1_7.jpg, with .jpg, .jpeg or .png. Rename or remove '
                f'it.')
    return samples


def read_data(args: argparse.Namespace) -> Data:
    """Read and check the folders that are needed: persons, in the gallery also distractors, never junk."""
    errors, data, cameras = [], {}, defaultdict(set)
    for split in (QUERY, GALLERY) if args.evaluate else (TRAIN, QUERY, GALLERY):
        folder = args.data / split
        found = read_split(folder, errors)
        samples = data[split] = [s for s in found if s.identity > 0 or (split, s.identity) == (GALLERY, DISTRACTOR)]
        identities = {s.identity for s in samples} - {DISTRACTOR}
        if not identities and not errors:
            raise BadInput(
                f'{folder} {"has no images of identities from 1" if folder.is_dir() else "is missing"}. Give a folder '
                f'with {TRAIN}, {QUERY} and {GALLERY}, as the archive of Market-1501 makes it.')
        print(f'{split}: {len(samples)} images, {len(identities)} identities, {len(found) - len(samples)} left out')
    raise_errors(errors)
    check_overlap(args, {k: [f'identity {s.identity:04}' for s in v] for k, v in data.items() if k != QUERY})
    for _, identity, camera in data[GALLERY]:
        cameras[identity].add(camera)
    errors += [
        f'{path} has no match: {folder} has no image of identity {identity:04} from another camera than {camera}. Add '
        f'one, or remove the query.' for path, identity, camera in data[QUERY] if not cameras[identity] - {camera}]
    check_images([s.path for samples in data.values() for s in samples], errors)
    return data


def check_images(paths: Sequence[Path], errors: List[str]) -> None:
    """Read all images now, as one that is damaged would end a long run, and the next one the run after it."""
    for path in progress(paths, 'Check'):
        try:
            read_image(path)
        except BadInput as e:
            errors.append(str(e))
    raise_errors(errors)


def rank_gallery(query: Features, gallery: Features) -> Iterator[torch.Tensor]:
    """Give for each query indices (M,) of gallery images, best first, but not those of its identity by its camera."""
    embeddings, identities, cameras = gallery
    for embedding, identity, camera in zip(*query, strict=True):
        order = (embeddings @ embedding).argsort(descending=True, stable=True)
        yield order[(identities[order] != identity) | (cameras[order] != camera)]


def compute_metrics(query: Features, gallery: Features) -> Dict[str, float]:
    """Compute mAP and CMC in percent. Each query must have a match in the gallery from another camera."""
    values, rankings = [], progress(rank_gallery(query, gallery), 'Ranking', total=len(query[1]))
    for identity, ranking in zip(query[1], rankings, strict=True):
        ranks = (gallery[1][ranking] == identity).nonzero().flatten() + 1  # of the matches
        precisions = torch.arange(1, len(ranks) + 1) / ranks.double()
        values.append([precisions.mean(), *(ranks[0] <= rank for rank in RANKS)])
    means = 100 * torch.tensor(values, dtype=torch.double).mean(0)
    return dict(zip(('mAP', *(f'rank-{r}' for r in RANKS)), means.tolist(), strict=True))


def load_batch(transform: Callable, items: Sequence[Tuple[Path, int]]) -> Tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([transform(read_image(path)) for path, _ in items]), torch.tensor([label for _, label in items])


def create_transform(args: argparse.Namespace, model: ReidModel, is_training: bool) -> Callable:
    config, size = resolve_model_data_config(model.backbone), args.image_size
    transforms = [v2.Resize(size, interpolation=v2.InterpolationMode(config['interpolation']))]
    if is_training:  # the padding is 10 pixels at the usual 256 x 128
        transforms += [v2.RandomHorizontalFlip(), v2.Pad(size[0] // 25), v2.RandomCrop(size)]
    transforms += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(config['mean'], config['std'])]
    return v2.Compose([*transforms, v2.RandomErasing()] if is_training else transforms)


@torch.inference_mode()
def extract(model: ReidModel, paths: Sequence[Path], args: argparse.Namespace, desc: str) -> torch.Tensor:
    """Embeddings (N, D) of unit length on the CPU."""
    collate = partial(load_batch, create_transform(args, model, is_training=False))
    loader = DataLoader([(p, 0) for p in paths], args.batch_size, num_workers=args.workers, collate_fn=collate)
    model.eval()
    embeddings = []
    for images, _ in progress(loader, desc):
        with autocast(args):
            embeddings.append(model(images.to(args.device))[0].float())
    return F.normalize(torch.cat(embeddings)).cpu()


def evaluate(model: ReidModel, data: Data, args: argparse.Namespace) -> Dict[str, float]:
    """Compute the metrics, and draw some queries, evenly chosen, each with its 10 best matches."""
    features, rows = [], []
    for split in (QUERY, GALLERY):
        paths, *numbers = zip(*data[split], strict=True)
        features.append((extract(model, paths, args, split), *map(torch.tensor, numbers)))
    query, gallery = features
    chosen = torch.linspace(0, len(data[QUERY]) - 1, min(8, len(data[QUERY]))).long()
    for i, ranking in zip(chosen, rank_gallery([v[chosen] for v in query], gallery), strict=True):
        wanted = data[QUERY][i]
        rows.append([draw(wanted.path, f'query\ncamera {wanted.camera}', 'black')])
        for path, identity, camera in (data[GALLERY][j] for j in ranking[:10]):
            color = 'lime' if identity == wanted.identity else 'red'
            rows[-1].append(draw(path, f'{identity or "distractor"}\ncamera {camera}', color))
    write_grid(args.output_dir / 'matches.png', rows, TILE)
    return compute_metrics(query, gallery)


def predict(model: ReidModel, paths: Sequence[Path], args: argparse.Namespace) -> None:
    """Rank images by cosine similarity to `args.predict`, in a table and a picture."""
    embeddings = extract(model, [args.predict, *paths], args, 'Images')
    similarities, order = (embeddings[1:] @ embeddings[0]).sort(descending=True, stable=True)
    rows = [(i, f'{s:.4f}', paths[j]) for i, (s, j) in enumerate(zip(similarities, order, strict=True), 1)]
    write_table(args.output_dir / 'matches.csv', ['rank', 'similarity', 'image'], rows)
    matches = [draw(path, f'{i}\n{similarity}', 'gray') for i, similarity, path in rows[:10]]
    write_grid(args.output_dir / 'matches.png', [[draw(args.predict, 'query', 'black'), *matches]], TILE)
    print(f'All matches, and a picture of the first: {args.output_dir / "matches.csv"} and matches.png')


def draw(path: Path, title: str, color: str) -> Image.Image:
    """Draw an image below its title, in a frame."""
    tile, image = Image.new('RGB', TILE, 'white'), read_image(path)
    image.thumbnail((TILE[0] - 10, TILE[1] - 40))
    tile.paste(ImageOps.expand(image, 3, color), (0, 30))
    ImageDraw.Draw(tile).text((0, 3), title, 'black')
    return tile


def create_reid_model(args: argparse.Namespace, pretrained: bool = False) -> ReidModel:
    backbone = create_model(args.model, pretrained=pretrained, num_classes=len(args.classes))
    model = ReidModel(backbone).eval()
    try:
        if hasattr(backbone, 'set_input_size'):
            backbone.set_input_size(img_size=tuple(args.image_size))
        with torch.no_grad():
            torch.cat(model(torch.zeros(2, 3, *args.image_size)), dim=1)  # each has a row for each image
    except Exception as e:  # each of timm's families has errors of its own
        raise BadInput(
            '--model {} does not take --image-size {} {}: {} It is made for {} {}.'.format(
                args.model, *args.image_size, e, *backbone.pretrained_cfg['input_size'][1:])) from None
    return model.to(args.device)


def train_reid(args: argparse.Namespace, checkpoint: Optional[Dict], data: Data) -> Dict[str, float]:
    """Train. Returns the metrics after the last epoch, in the first process."""
    args.classes = sorted({s.identity for s in data[TRAIN]})
    if len(args.classes) * args.images_per_identity < args.batch_size:
        raise BadInput(
            f'{args.data / TRAIN} has {len(args.classes)} identities, too few for --batch-size {args.batch_size} with '
            f'--images-per-identity {args.images_per_identity}. Add some, or give a smaller --batch-size.')
    random_seed(args.seed)
    model = create_reid_model(args, args.pretrained and not checkpoint)
    collate = partial(load_batch, create_transform(args, model, is_training=True))
    dataset = [(s.path, args.classes.index(s.identity)) for s in data[TRAIN]]
    labels, epoch_size = [label for _, label in dataset], max(args.batch_size, len(dataset) // args.world_size)
    miner, triplet_loss = BatchHardMiner(), TripletMarginLoss(margin=0.3)

    def create_sampler(epoch: int) -> MPerClassSampler:
        return MPerClassSampler(labels, args.images_per_identity, args.batch_size, epoch_size)

    def compute_loss(parallel: nn.Module, batch: Tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        images, targets = (values.to(args.device) for values in batch)
        with autocast(args):
            embeddings, logits = parallel(images)
        embeddings = embeddings.float()
        return F.cross_entropy(logits.float(), targets) + triplet_loss(embeddings, targets, miner(embeddings, targets))

    classifiers = model.backbone.pretrained_cfg['classifier']
    return train(
        args, model, model.backbone, 'adam', args.epochs // 12, dataset, create_sampler, collate, compute_loss,
        lambda: evaluate(model, data, args), [path.name for path, _ in dataset], checkpoint,
        last_layers=(classifiers,) if isinstance(classifiers, str) else classifiers)


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('data', type=Path, metavar='DIR',
        help=f'folder that has {TRAIN}, {QUERY} and {GALLERY}, or any images to --predict with')
    add_options(parser, 'market1501', epochs=120, batch_size=64, lr=3.5e-4)
    add('--image-size', type=number(int, 1), nargs=2, default=[256, 128], metavar=('HEIGHT', 'WIDTH'),
        help='(default: 256 128)')
    add('--images-per-identity', type=number(int, 2), default=4, metavar='N', help='in a batch (default: %(default)s)')
    add('--predict', type=Path, metavar='IMAGE',
        help='with --evaluate FILE: rank all images in DIR and its folders by similarity to this one')
    return parser


def main(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if args.predict and not args.evaluate:
        parser.error('--predict takes a checkpoint by --evaluate FILE')
    checkpoint = start_run(args, parser)
    size, each = args.batch_size, args.images_per_identity
    if size % each or size == each:
        parser.error(f'--batch-size must be 2 or more times --images-per-identity {each}, got {size}')
    if args.predict:
        paths = sorted(p for p in args.data.rglob('[!.]*') if p.suffix.lower() in EXTENSIONS)
        if not paths:
            raise BadInput(f'{args.data} has no images ({", ".join(EXTENSIONS)}) to rank. Give another folder.')
        check_images([args.predict, *paths], [])
    else:
        data = read_data(args)
    if args.evaluate:
        model = create_reid_model(args)
        load_model(args, checkpoint, model.backbone)
        metrics = predict(model, paths, args) if args.predict else evaluate(model, data, args)
    else:
        metrics = train_reid(args, checkpoint, data)
    if metrics:
        print(', '.join(f'{name} {value:.2f} %' for name, value in metrics.items()))
        print(f'Picture of the top matches: {args.output_dir / "matches.png"}')


if __name__ == '__main__':
    run_script(main, create_parser())
