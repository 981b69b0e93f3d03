#!/usr/bin/env python3
"""Train SSDLite on PASCAL VOC with a timm model as backbone, and evaluate it.

Trains on 2007 + 2012 trainval, evaluates on 2007 test. On several GPUs: torchrun --nproc-per-node 4 train_voc.py ...
"""
import argparse
import math
import os
import pickle
import sys
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple
from xml.etree.ElementTree import ParseError
from xml.etree.ElementTree import parse as parse_xml

import timm
import torch
import torch.distributed as dist
import torch.nn as nn
from PIL import Image
from timm.data import resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import distribute_bn, init_distributed_device, random_seed, update_summary
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import ConcatDataset, DataLoader, Dataset, DistributedSampler, Subset
from torchmetrics.detection import MeanAveragePrecision
from torchvision.datasets import VOCDetection
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead, _extra_block, _normal_init
from torchvision.ops import box_iou
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes
from torchvision.utils import draw_bounding_boxes, make_grid
from tqdm import tqdm

CLASSES = (
    'aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow', 'diningtable', 'dog',
    'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train', 'tvmonitor')
PICTURE_SCORE = 0.3  # lowest score that is drawn
RECALL_STEPS = 10000  # of the grid that stands in for the area, a multiple of 10 so that it has the 11 points too

Target = Dict[str, torch.Tensor]


class BadInput(Exception):
    """What is wrong with the user's files or options, and the remedy."""


class VOC(VOCDetection):
    """A split of VOC as tensors, with all its annotations read and checked at the start.

    An item is the transformed image and its target: `boxes` [N, 4] as corners in pixels, `labels` [N] from 1 to 20 (0
    is the background), `difficult` [N]. Raises BadInput for a missing split, a bad annotation or an unreadable image.
    """

    def __init__(self, root: Path, year: str, image_set: str, transforms: Callable, quiet: bool) -> None:
        split = root / 'VOCdevkit' / f'VOC{year}' / 'ImageSets' / 'Main' / f'{image_set}.txt'
        if not split.is_file():
            raise BadInput(
                f'{split} is missing. Unpack the published VOC{year} {image_set} archive, and pass the folder '
                f'VOCdevkit that it makes.')
        super().__init__(str(root), year, image_set, transforms=transforms)
        if not self.images:
            raise BadInput(f'{split} lists no images. Unpack the published archive again.')
        self.objects = [
            read_objects(Path(p)) for p in tqdm(self.annotations, f'VOC{year} {image_set}', disable=quiet, leave=False)]

    def __getitem__(self, index: int) -> Tuple[torch.Tensor, Target]:
        try:
            with Image.open(self.images[index]) as file:
                image = file.convert('RGB')
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
            raise BadInput(
                f'{self.images[index]} cannot be read as an image ({e}). Unpack the published archive again, or take '
                f'its name off the list in ImageSets/Main.') from None
        boxes, labels, difficult = self.objects[index]
        boxes = BoundingBoxes(boxes, format='XYXY', canvas_size=image.size[::-1])
        return self.transforms(image, dict(boxes=boxes, labels=labels, difficult=difficult))


def read_objects(path: Path) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Boxes, labels and difficult flags of an annotation file."""
    boxes, labels, difficult = [], [], []
    try:
        objects = VOCDetection.parse_voc_xml(parse_xml(path).getroot())['annotation']['object']
        for item in objects:
            if item['name'] not in CLASSES:
                raise BadInput(
                    f'{path} has an object of the unknown class {item["name"]!r}. Rename it to one of the 20 classes '
                    f'of VOC ({", ".join(CLASSES)}), or remove it.')
            xmin, ymin, xmax, ymax = (float(item['bndbox'][k]) for k in ('xmin', 'ymin', 'xmax', 'ymax'))
            if not (xmin < xmax and ymin < ymax):
                raise BadInput(
                    f'{path} has an empty or inverted box of {item["name"]!r}: xmin {xmin:g}, ymin {ymin:g}, '
                    f'xmax {xmax:g}, ymax {ymax:g}. Correct the box so that maxima are above minima, or remove it.')
            # VOC counts pixels from 1 and includes the last; IoU of corners then equals the development kit's
            boxes.append((xmin - 1, ymin - 1, xmax, ymax))
            labels.append(CLASSES.index(item['name']) + 1)
            difficult.append(item.get('difficult', '0') == '1')
    except (OSError, ParseError, KeyError, TypeError, ValueError) as e:
        raise BadInput(
            f'{path} cannot be read as a VOC annotation ({type(e).__name__}: {e}). Unpack the published archive again, '
            f'or correct the file.') from None
    return torch.tensor(boxes).reshape(-1, 4), torch.tensor(labels, dtype=torch.long), torch.tensor(difficult).bool()


class SSDLiteBackbone(nn.Module):
    """Features of a timm model at strides 16 and 32, and four further maps, each of half the size of the one before."""

    def __init__(self, name: str, pretrained: bool, norm_layer: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.features = timm.create_model(name, pretrained=pretrained, features_only=True, out_indices=(-2, -1))
        if self.features.feature_info.reduction() != [16, 32]:
            raise BadInput(
                f'--model {name} has features at strides {self.features.feature_info.reduction()}, SSDLite needs '
                f'[16, 32]. Choose a convolutional model that ends at stride 32, as hbonet_100 does.')
        chs = [*self.features.feature_info.channels(), 512, 256, 256, 128]
        self.extra = nn.ModuleList(_extra_block(i, o, norm_layer) for i, o in zip(chs[1:], chs[2:], strict=False))
        _normal_init(self.extra)
        self.out_channels = chs

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        maps = self.features(x)
        for block in self.extra:
            maps.append(block(maps[-1]))
        return OrderedDict((str(i), v) for i, v in enumerate(maps))


class Float32Head(SSDLiteHead):
    """Head with outputs in float32, since boxes are decoded in the outputs' dtype and bfloat16 has 8 bits for each."""

    def forward(self, x: List[torch.Tensor]) -> Dict[str, torch.Tensor]:
        return {k: v.float() for k, v in super().forward(x).items()}


def create_detector(name: str, image_size: int, pretrained: bool = False) -> SSD:
    """SSDLite with torchvision's default boxes and thresholds, on a timm model.

    Args:
        name: timm model name.
        image_size: Height and width that images are resized to.
        pretrained: Load the backbone's pretrained weights.

    Raises:
        BadInput: If there is no such model or weights, or its features do not suit SSDLite.
    """
    norm_layer = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)
    try:
        backbone = SSDLiteBackbone(name, pretrained, norm_layer)
    except (RuntimeError, OSError, TypeError) as e:
        raise BadInput(f'--model {name} cannot be created as a backbone. {e}') from None
    anchors = DefaultBoxGenerator([[2, 3] for _ in backbone.out_channels], min_ratio=0.2, max_ratio=0.95)
    head = Float32Head(
        backbone.out_channels, anchors.num_anchors_per_location(), len(CLASSES) + 1, norm_layer)
    data_config = resolve_model_data_config(backbone.features)
    return SSD(
        backbone, anchors, (image_size, image_size), len(CLASSES) + 1, head=head,
        image_mean=data_config['mean'], image_std=data_config['std'])


class VOCScore(NamedTuple):
    """Average precision at IoU 0.5, from 0 to 1. Classes without objects do not count."""
    map_11point: float
    map_area: float
    ap_area: Dict[str, float]  # by class


def drop_ignored(detections: Target, target: Target) -> Tuple[Target, Target]:
    """Remove difficult objects, and the detections that VOC counts neither right nor wrong because of them.

    torchmetrics has only COCO's crowd rule for this, which measures a crowd's overlap by the detection's area alone and
    so forgives small boxes inside. VOC ignores a detection if the object of its class with the highest IoU, 0.5 or
    more, is difficult; what is left needs no special rule.
    """
    same_class = detections['labels'][:, None] == target['labels']
    iou = box_iou(detections['boxes'], target['boxes'].as_subclass(torch.Tensor)) * same_class
    if iou.shape[1]:
        best_iou, best = iou.max(dim=1)
        keep = ~((best_iou >= 0.5) & target['difficult'][best])
        detections = {k: v[keep] for k, v in detections.items()}
    return detections, {k: target[k][~target['difficult']] for k in ('boxes', 'labels')}


def voc_score(detections: Sequence[Target], targets: Sequence[Target]) -> VOCScore:
    """VOC's mean average precision at IoU 0.5, by the 11 points of 2007 and by the area of 2010 and later.

    Args:
        detections: Of each image, `boxes` [N, 4], `labels` [N] and `scores` [N].
        targets: Of each image, `boxes` [N, 4], `labels` [N] and `difficult` [N].
    """
    pairs = [drop_ignored(d, t) for d, t in zip(detections, targets, strict=True)]
    limit = max([1, *(len(d['labels']) for d, _ in pairs)])
    metric = MeanAveragePrecision(
        iou_thresholds=[0.5],
        # correctly rounded quotients, so that a recall of 3 in 10 reaches the threshold 0.3
        rec_thresholds=[i / RECALL_STEPS for i in range(RECALL_STEPS + 1)],
        max_detection_thresholds=[limit] * 3,  # VOC has no limit
        extended_summary=True,
        backend='faster_coco_eval',
        sync_on_compute=False,  # already gathered
    )
    metric.warn_on_many_detections = False
    metric.update([d for d, _ in pairs], [t for _, t in pairs])
    result = metric.compute()
    precision = result['precision'][0, :, :, 0, -1].double()  # highest at or above each recall, by class
    scored = (precision >= 0).all(dim=0)  # -1 for a class that no target has
    if not scored.any():
        raise BadInput('The test split has no object that is not difficult, so no score. Check its test.txt.')
    precision = precision[:, scored]
    names = [CLASSES[i - 1] for i in result['classes'].reshape(-1)[scored].tolist()]
    # the grid's first point, recall 0, has no width
    area = precision[1:].mean(dim=0)
    return VOCScore(
        map_11point=precision[::RECALL_STEPS // 10].mean().item(),
        map_area=area.mean().item(),
        ap_area=dict(zip(names, area.tolist(), strict=True)),
    )


def collate(batch: Sequence[Tuple[torch.Tensor, Target]]) -> Tuple[Tuple[torch.Tensor, ...], Tuple[Target, ...]]:
    return tuple(zip(*batch, strict=True))


def autocast(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(args.device.split(':')[0], getattr(torch, args.amp or 'bfloat16'), enabled=bool(args.amp))


def create_loader(dataset: Dataset, args: argparse.Namespace, **kwargs: Any) -> DataLoader:
    return DataLoader(
        dataset, args.batch_size, collate_fn=collate, num_workers=args.workers,
        pin_memory=args.device.startswith('cuda'), **kwargs)


def train_epoch(
        model: nn.Module,
        loader: DataLoader,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        scheduler: Any,
        epoch: int,
        args: argparse.Namespace,
) -> float:
    """Train for one epoch. Returns the mean loss of all processes."""
    model.train()
    loader.sampler.set_epoch(epoch)
    # all random numbers of an epoch follow from its number, so a resumed run draws those of an uninterrupted one
    random_seed(args.seed + epoch * args.world_size, args.rank)
    total = torch.zeros((), device=args.device)
    for step, (images, targets) in enumerate(tqdm(loader, f'epoch {epoch}', disable=args.rank > 0, leave=False)):
        images = [i.to(args.device, non_blocking=True) for i in images]
        targets = [{k: t[k].to(args.device, non_blocking=True) for k in ('boxes', 'labels')} for t in targets]
        with autocast(args):
            loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step_update(epoch * len(loader) + step + 1)
        total += loss.detach()
    mean = total / len(loader)
    if args.distributed:
        dist.all_reduce(mean, dist.ReduceOp.SUM)
        mean /= args.world_size
        distribute_bn(model, args.world_size, reduce=True)
    if not math.isfinite(mean.item()):
        raise BadInput(f'The loss of epoch {epoch} is {mean.item()}. Resume from last.pth with a lower --lr.')
    return mean.item()


@torch.inference_mode()
def evaluate(model: SSD, dataset: VOC, args: argparse.Namespace) -> Optional[VOCScore]:
    """Score the model on all images, shared among the processes. Returns None in processes after the first."""
    model.eval()
    share = Subset(dataset, range(args.rank, len(dataset), args.world_size))
    results = []
    for images, targets in tqdm(create_loader(share, args), 'test', disable=args.rank > 0, leave=False):
        with autocast(args):
            detections = model([i.to(args.device) for i in images])
        results += zip([{k: v.cpu() for k, v in d.items()} for d in detections], targets, strict=True)
    if args.distributed:
        gathered = [None] * args.world_size if args.rank == 0 else None
        dist.gather_object(results, gathered)
        results = sum(gathered, []) if args.rank == 0 else None
    return voc_score(*zip(*results, strict=True)) if args.rank == 0 else None


@torch.inference_mode()
def draw_detections(model: SSD, dataset: VOC, path: Path, args: argparse.Namespace) -> None:
    """Write a picture of the detections in the first eight images."""
    model.eval()
    pictures = []
    size = 320
    for image, _ in (dataset[i] for i in range(min(8, len(dataset)))):
        found = model([image.to(args.device)])[0]
        found = {k: v[found['scores'] >= PICTURE_SCORE].cpu() for k, v in found.items()}
        picture = v2.functional.to_dtype(v2.functional.resize(image, [size, size]), torch.uint8, scale=True)
        if len(found['boxes']):
            scale = torch.tensor([size / image.shape[2], size / image.shape[1]]).repeat(2)
            captions = [f'{CLASSES[i - 1]} {s:.2f}' for i, s in zip(found['labels'], found['scores'], strict=True)]
            picture = draw_bounding_boxes(picture, found['boxes'] * scale, captions, colors='yellow', width=2)
        pictures.append(picture)
    replace_file(path, partial(v2.functional.to_pil_image(make_grid(pictures, nrow=4)).save, format='PNG'))


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file beside its place, so that none is ever half-written."""
    temporary = path.with_name(f'.{path.name}')
    write(temporary)
    os.replace(temporary, path)


def load_checkpoint(path: Path) -> Dict[str, Any]:
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
        if {'model', 'image_size', 'state_dict', 'optimizer'} <= state.keys():
            return state
        reason = 'it has other contents'
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, AttributeError, pickle.UnpicklingError) as e:
        reason = str(e).strip().partition('\n')[0]
    raise BadInput(f'{path} cannot be read as a checkpoint of this script: {reason}. Pass last.pth of a run.')


def train(args: argparse.Namespace, root: Path, test_set: VOC) -> Tuple[SSD, Optional[VOCScore]]:
    """Train, with a checkpoint after each epoch. Returns the model and its last score."""
    random_seed(args.seed, args.rank)
    model = create_detector(args.model, args.image_size, args.pretrained and not args.resume).to(args.device)
    optimizer = create_optimizer_v2(model, args.opt, lr=args.lr, weight_decay=args.weight_decay, momentum=0.9)
    scaler = torch.amp.GradScaler(args.device.split(':')[0], enabled=args.amp == 'float16')

    augmentation = [v2.RandomHorizontalFlip()]
    if args.augmentation == 'ssd':
        fill = [round(255 * m) for m in model.transform.image_mean]
        augmentation += [v2.RandomPhotometricDistort(), v2.RandomZoomOut(fill=fill), v2.RandomIoUCrop()]
    transforms = v2.Compose([
        v2.ToImage(), *augmentation, v2.SanitizeBoundingBoxes(), v2.ToDtype(torch.float32, scale=True)])
    train_set = ConcatDataset([VOC(root, y, 'trainval', transforms, quiet=args.rank > 0) for y in ('2007', '2012')])
    # the last, smaller batch is dropped: a batch of one image has no statistics on the smallest map
    sampler = DistributedSampler(train_set, args.world_size, args.rank, seed=args.seed)
    loader = create_loader(train_set, args, sampler=sampler, drop_last=True)
    if not len(loader):
        raise BadInput(
            f'{root / "VOCdevkit"} has {len(train_set)} images for training, fewer than --batch-size {args.batch_size} '
            f'in each of {args.world_size} processes. Lower --batch-size.')
    scheduler, _ = create_scheduler_v2(
        optimizer, 'cosine', args.epochs, warmup_epochs=args.warmup_epochs, warmup_lr=args.lr / 100,
        step_on_epochs=False, updates_per_epoch=len(loader))

    start_epoch, best = 0, -1.
    if args.resume:
        state = load_checkpoint(args.resume)
        if (state['model'], state['image_size']) != (args.model, args.image_size):
            raise BadInput(
                f'{args.resume} is of --model {state["model"]} --image-size {state["image_size"]}, not {args.model} '
                f'at {args.image_size}. Resume with the options of that run, or name a checkpoint of this one.')
        if state['epoch'] + 1 >= args.epochs:
            raise BadInput(f'{args.resume} has all of the {args.epochs} epochs. Raise --epochs, or use --evaluate.')
        model.load_state_dict(state['state_dict'])
        optimizer.load_state_dict(state['optimizer'])
        if state['scaler']:
            scaler.load_state_dict(state['scaler'])
        start_epoch, best = state['epoch'] + 1, state['best']
        scheduler.step_update(start_epoch * len(loader))

    # the module itself is kept for evaluation, DistributedDataParallel waits for all processes in each forward
    summary = args.output / 'summary.csv'
    parallel = DistributedDataParallel(model) if args.distributed else model
    for epoch in range(start_epoch, args.epochs):
        loss = train_epoch(parallel, loader, optimizer, scaler, scheduler, epoch, args)
        scores, is_best = dict(map_11point='', map_area=''), False
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            score = evaluate(model, test_set, args)
            if args.rank == 0:
                scores = dict(map_11point=score.map_11point, map_area=score.map_area)
                best, is_best = max(best, score.map_area), score.map_area > best
        if args.rank == 0:
            tqdm.write(f'epoch {epoch}: loss {loss:.6f}')
            state = dict(
                model=args.model, image_size=args.image_size, epoch=epoch, best=best, state_dict=model.state_dict(),
                optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
            for name in ('last.pth', 'best.pth')[:1 + is_best]:
                replace_file(args.output / name, partial(torch.save, state))
            update_summary(epoch, dict(loss=loss), scores, summary, write_header=not summary.exists())
    return model, score


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('data', type=Path, help='folder VOCdevkit as published, with VOC2007 and VOC2012')
    parser.add_argument('--output', type=Path, default='voc', help='folder for checkpoints, table and picture')
    parser.add_argument('--evaluate', type=Path, metavar='CHECKPOINT', help='only score this checkpoint on 2007 test')
    parser.add_argument('--resume', type=Path, metavar='CHECKPOINT', help='continue the run of this last.pth')
    group = parser.add_argument_group('model')
    group.add_argument('--model', default='hbonet_100', help='timm model for the backbone')
    group.add_argument('--pretrained', action='store_true', help="start from the backbone's pretrained weights")
    group.add_argument('--image-size', type=int, default=320, help='height and width that images are resized to')
    group = parser.add_argument_group('training')
    group.add_argument('--epochs', type=int, default=200)
    group.add_argument('--warmup-epochs', type=int, default=1)
    group.add_argument('--batch-size', type=int, default=32, help='images in a batch of each process, at least 2')
    group.add_argument('--opt', default='momentum', help="timm optimizer; 'momentum' is SGD without Nesterov")
    group.add_argument('--lr', type=float, default=0.01, help='learning rate after warm-up, then a cosine to 0')
    group.add_argument('--weight-decay', type=float, default=5e-4)
    group.add_argument(
        '--augmentation', choices=['ssd', 'hflip'], default='ssd',
        help="'ssd' distorts colours, zooms out, crops and flips; 'hflip' flips only")
    group.add_argument(
        '--eval-every', type=int, default=10, metavar='EPOCHS', help='evaluate after so many epochs, and at the end')
    group.add_argument('--seed', type=int, default=0)
    group = parser.add_argument_group('machine')
    group.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    group.add_argument('--amp', choices=['bfloat16', 'float16'], help='mixed precision')
    group.add_argument('--workers', type=int, default=4, help='processes that load images, each')
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        raise BadInput(f'--device {args.device}: this machine has no CUDA device. Use --device cpu.')
    init_distributed_device(args)
    root = args.data.parent if args.data.name == 'VOCdevkit' else args.data
    test_transforms = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    test_set = VOC(root, '2007', 'test', test_transforms, quiet=args.rank > 0)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.evaluate:
        state = load_checkpoint(args.evaluate)
        model = create_detector(state['model'], state['image_size']).to(args.device)
        model.load_state_dict(state['state_dict'])
        score = evaluate(model, test_set, args)
    else:
        model, score = train(args, root, test_set)
    if args.rank == 0:
        for name, ap in score.ap_area.items():
            print(f'{name:12} AP {ap:.4f}')
        print(f'mAP at IoU 0.5: 11-point {score.map_11point:.4f}, area {score.map_area:.4f}')
        draw_detections(model, test_set, args.output / 'detections.png', args)
    if args.distributed:
        dist.destroy_process_group()


def main() -> None:
    try:
        run(parse_args())
    except BadInput as e:
        # a loader's process puts its traceback before the message
        sys.exit(f'error: {str(e).rpartition("BadInput: ")[2].strip()}')


if __name__ == '__main__':
    main()
