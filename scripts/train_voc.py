#!/usr/bin/env python3
"""Train SSDLite on PASCAL VOC with a timm model as backbone, and evaluate it.

Trains on 2007 + 2012 trainval, and evaluates on 2007 test. Runs on a GPU if there is one, and in several processes with
torchrun. See docs/voc.md.
"""
import argparse
import io
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
import torch.nn as nn
from script_utils import BadInput, create_model, create_output_dir, number, run_script, write_file
from timm.data import resolve_model_data_config
from timm.utils import random_seed
from torch.utils.data import ConcatDataset, DataLoader, Dataset, DistributedSampler, Subset
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes, make_grid
from tqdm import tqdm
from training import add_training_options, autocast, restore, start_run, train
from voc import CLASSES, VOC, Target, VOCScore, voc_score

PICTURE_SCORE = 0.3  # lowest score that is drawn


class SSDLiteBackbone(nn.Module):
    """Features of a timm model at strides 16 and 32, and four further maps, each of half the size of the one before."""

    def __init__(self, name: str, pretrained: bool, norm_layer: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.features = create_model(name, pretrained=pretrained, features_only=True, out_indices=(-2, -1))
        if self.features.feature_info.reduction() != [16, 32]:
            raise BadInput(
                f'--model {name} has features at strides {self.features.feature_info.reduction()}, SSDLite needs '
                f'[16, 32]. Choose a convolutional model that ends at stride 32, as hbonet_100 does.')
        chs = [*self.features.feature_info.channels(), 512, 256, 256, 128]
        conv = partial(Conv2dNormActivation, norm_layer=norm_layer, activation_layer=nn.ReLU6)
        self.extra = nn.ModuleList(
            nn.Sequential(
                conv(in_chs, out_chs // 2, 1),
                conv(out_chs // 2, out_chs // 2, 3, stride=2, groups=out_chs // 2),
                conv(out_chs // 2, out_chs, 1),
            )
            for in_chs, out_chs in zip(chs[1:], chs[2:], strict=False))
        for module in self.extra.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.03)
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
    backbone = SSDLiteBackbone(name, pretrained, norm_layer)
    anchors = DefaultBoxGenerator([[2, 3] for _ in backbone.out_channels], min_ratio=0.2, max_ratio=0.95)
    head = Float32Head(
        backbone.out_channels, anchors.num_anchors_per_location(), len(CLASSES) + 1, norm_layer)
    data_config = resolve_model_data_config(backbone.features)
    return SSD(
        backbone, anchors, (image_size, image_size), len(CLASSES) + 1, head=head,
        image_mean=data_config['mean'], image_std=data_config['std'])


def collate(batch: Sequence[Tuple[torch.Tensor, Target]]) -> Tuple[Tuple[torch.Tensor, ...], Tuple[Target, ...]]:
    return tuple(zip(*batch, strict=True))


def create_loader(dataset: Dataset, args: argparse.Namespace, **kwargs: Any) -> DataLoader:
    return DataLoader(
        dataset, args.batch_size, collate_fn=collate, num_workers=args.workers,
        pin_memory=args.device.startswith('cuda'), **kwargs)


@torch.inference_mode()
def evaluate(model: SSD, dataset: VOC, args: argparse.Namespace) -> Optional[VOCScore]:
    """Score the model on all images, shared among the processes. Returns None in processes after the first."""
    model.eval()
    share = Subset(dataset, range(args.rank, len(dataset), args.world_size))
    results = []
    for images, targets in tqdm(create_loader(share, args), 'Test', disable=args.rank > 0, leave=False):
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
    content = io.BytesIO()
    v2.functional.to_pil_image(make_grid(pictures, nrow=4)).save(content, format='PNG')
    write_file(path, content.getvalue())


def train_detector(
        args: argparse.Namespace,
        script: str,
        checkpoint: Optional[Dict[str, Any]],
        test_set: VOC,
) -> Tuple[SSD, Optional[VOCScore]]:
    """Train. Returns the model and its last score."""
    random_seed(args.seed, args.rank)
    model = create_detector(args.model, args.image_size, args.pretrained and not args.resume).to(args.device)
    augmentation = [v2.RandomHorizontalFlip()]
    if args.augmentation == 'ssd':
        fill = [round(255 * m) for m in model.transform.image_mean]
        augmentation += [
            v2.RandomPhotometricDistort(), v2.RandomZoomOut(fill=fill), v2.RandomIoUCrop(), v2.SanitizeBoundingBoxes()]
    transforms = v2.Compose([v2.ToImage(), *augmentation, v2.ToDtype(torch.float32, scale=True)])
    parts = [VOC(args.data, y, 'trainval', transforms, quiet=args.rank > 0) for y in ('2007', '2012')]
    train_set = ConcatDataset(parts)
    sampler = DistributedSampler(train_set, args.world_size, args.rank, seed=args.seed)
    if len(sampler) < args.batch_size:
        raise BadInput(
            f'{args.data} has {len(train_set)} images for training, fewer than --batch-size {args.batch_size} in each '
            f'of {args.world_size} processes. Lower --batch-size.')
    score = None

    def create_epoch_loader(epoch: int) -> DataLoader:
        sampler.set_epoch(epoch)
        # the last, smaller batch is dropped: a batch of one image has no statistics on the smallest map
        return create_loader(train_set, args, sampler=sampler, drop_last=True)

    def compute_loss(parallel: nn.Module, batch: Tuple[Sequence[torch.Tensor], Sequence[Target]]) -> torch.Tensor:
        images = [i.to(args.device, non_blocking=True) for i in batch[0]]
        targets = [{k: t[k].to(args.device, non_blocking=True) for k in ('boxes', 'labels')} for t in batch[1]]
        with autocast(args):
            return sum(parallel(images, targets).values())

    def evaluate_epoch(epoch: int) -> Dict[str, float]:
        nonlocal score
        if (epoch + 1) % args.eval_every and epoch + 1 < args.epochs:
            return dict(map_11point='', map_area='')
        score = evaluate(model, test_set, args)
        return dict(map_11point=score.map_11point, map_area=score.map_area) if score else {}

    train(
        args, script, model, model, opt='momentum', warmup_epochs=1, create_loader=create_epoch_loader,
        compute_loss=compute_loss, images=[f'{p.folder.name}/{n}' for p in parts for n in p.names],
        checkpoint=checkpoint, evaluate=evaluate_epoch)
    return model, score


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('data', type=Path, metavar='DIR', help='folder VOCdevkit as published, with VOC2007 and VOC2012')
    add_training_options(parser, 'voc', epochs=200, batch_size=32, lr=0.01)
    add('--image-size', type=number(int, 32), default=320, metavar='N',
        help='height and width that images are resized to (default: %(default)s)')
    add('--augmentation', choices=['ssd', 'hflip'], default='ssd',
        help="'ssd' distorts colours, zooms out, crops and flips, 'hflip' flips only (default: %(default)s)")
    add('--eval-every', type=number(int, 1), default=10, metavar='N',
        help='evaluate after so many epochs, and at the end (default: %(default)s)')
    return parser


def main(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    checkpoint = start_run(args, parser)
    test_transforms = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    test_set = VOC(args.data, '2007', 'test', test_transforms, quiet=args.rank > 0)
    if all(target['difficult'].all() for target in test_set.targets):
        raise BadInput(f'{args.data} has only difficult objects to test on, which do not count. Check the test list.')
    if args.evaluate:
        model = create_detector(args.model, args.image_size)
        restore(args.evaluate, model)
        score = evaluate(model.to(args.device), test_set, args)
        if args.rank == 0:
            create_output_dir(args)
    else:
        model, score = train_detector(args, parser.prog, checkpoint, test_set)
    if args.rank == 0:
        for name, ap in score.ap_area.items():
            print(f'{name:12} AP {ap:.4f}')
        print(f'mAP at IoU 0.5: 11-point {score.map_11point:.4f}, area {score.map_area:.4f}')
        draw_detections(model, test_set, args.output_dir / 'detections.png', args)
        print(f'Picture of detections: {args.output_dir / "detections.png"}')
    if args.distributed:
        dist.destroy_process_group()


if __name__ == '__main__':
    run_script(main, create_parser())
