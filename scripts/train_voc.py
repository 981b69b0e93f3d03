#!/usr/bin/env python3
"""Train SSDLite with a timm model as backbone on data in the layout of PASCAL VOC, evaluate, and detect.

DIR is one folder with Annotations, JPEGImages and ImageSets/Main, with classes of its own, or VOCdevkit as published.
Runs on a GPU if there is one, and in several processes with torchrun. See docs/voc.md.
"""
import argparse
import io
import warnings
from collections import Counter, defaultdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from PIL import Image
from script_utils import BadInput, create_model, number, progress, raise_errors, read_image, run_script, write_file
from timm.data import resolve_model_data_config
from timm.utils import random_seed
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead, _extra_block, _normal_init
from torchvision.transforms import v2
from training import add_options, autocast, check_overlap, load_model, start_run, train, write_grid, write_table
from voc import CLASSES, DataFrame, Sample, Samples, Target, draw, load_batch, read_lines, read_samples, voc_score

TILE = 400  # width and height in pixels, of the picture of detections
to_tensor = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


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
        self.extra = nn.ModuleList(
            _extra_block(in_chs, out_chs, norm_layer) for in_chs, out_chs in zip(chs[1:], chs[2:], strict=False))
        _normal_init(self.extra)
        self.out_channels = chs

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        maps = self.features(x)
        for block in self.extra:
            maps.append(block(maps[-1]))
        # torchvision computes the default boxes in the maps' dtype, which autocast changes
        return {str(i): v.float() for i, v in enumerate(maps)}


def create_detector(args: argparse.Namespace, pretrained: bool = False) -> SSD:
    """SSDLite with torchvision's default boxes and thresholds on the timm model and with the classes of the options."""
    norm_layer = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)
    backbone = SSDLiteBackbone(args.model, pretrained, norm_layer)
    anchors = DefaultBoxGenerator([[2, 3] for _ in backbone.out_channels], min_ratio=args.min_ratio, max_ratio=0.95)
    num_classes = len(args.classes) + 1  # with the background
    head = SSDLiteHead(backbone.out_channels, anchors.num_anchors_per_location(), num_classes, norm_layer)
    # boxes are decoded in the outputs' dtype, and bfloat16 has 8 bits for each coordinate
    head.register_forward_hook(lambda module, inputs, outputs: {k: v.float() for k, v in outputs.items()})
    data_config = resolve_model_data_config(backbone.features)
    return SSD(
        backbone, anchors, (args.image_size, args.image_size), num_classes, head=head, image_mean=data_config['mean'],
        image_std=data_config['std']).to(args.device)


@torch.inference_mode()
def evaluate(model: SSD, samples: Sequence[Sample], args: argparse.Namespace) -> DataFrame:
    """Score the model on all images."""
    model.eval()
    found, targets, collate = [], [], partial(load_batch, to_tensor, args.classes)
    loader = DataLoader(samples, args.batch_size, collate_fn=collate, num_workers=args.workers)
    for images, batch in progress(loader, 'Test'):
        with autocast(args):
            found += [{k: v.cpu() for k, v in d.items()} for d in model([i.to(args.device) for i in images])]
        targets += batch
    return voc_score(found, targets, args.classes)


@torch.inference_mode()
def detect(model: SSD, image: Image.Image, args: argparse.Namespace) -> Tuple[List[Tuple], Image.Image]:
    """Class, score and corners in pixels of what is found with --min-score or more, and the image with it."""
    with autocast(args):
        found = model.eval()([to_tensor(image).to(args.device)])[0]
    high = found['scores'] >= args.min_score
    labels, scores, boxes = (found[k][high].tolist() for k in ('labels', 'scores', 'boxes'))
    rows = [(args.classes[i - 1], score, *box) for i, score, box in zip(labels, scores, boxes, strict=True)]
    captions = [f'{name} {score:.2f}' for name, score, *_ in rows]
    return rows, draw(image, boxes, captions, 'yellow', f'nothing above {args.min_score:g}')


def draw_samples(model: SSD, samples: Sequence[Sample], args: argparse.Namespace) -> None:
    """Write a picture of eight images from all of a list, each with its true boxes and beside it with those found."""
    tiles, path = [], args.output_dir / 'detections.png'
    for sample in (samples[i] for i in torch.linspace(0, len(samples) - 1, min(8, len(samples))).long()):
        image = read_image(sample.image, upright=False)
        tiles += [draw(image, sample.boxes, sample.names, 'lime', 'no objects'), detect(model, image, args)[1]]
    for tile in tiles:
        tile.thumbnail((TILE - 4, TILE - 4))
    write_grid(path, [tiles[i:i + 4] for i in range(0, len(tiles), 4)], (TILE, TILE))
    print(f'Picture of detections, true ones on the left: {path}')


def predict(model: SSD, args: argparse.Namespace) -> None:
    """Draw what is found on each photograph, upright and in its own shape, and write a table of it."""
    rows, errors, columns = [], [], ['photo', 'class', 'score', 'xmin', 'ymin', 'xmax', 'ymax']
    for i, photo in enumerate(progress(args.predict, 'Photographs'), 1):
        try:
            found, drawn = detect(model, read_image(photo), args)
            rows += [(photo, name, *(f'{v:.4f}' for v in numbers)) for name, *numbers in found]
            write_grid(args.output_dir / f'{i}_{photo.stem}.png', [[drawn]], drawn.size)
        except BadInput as e:
            errors.append(str(e))
    if len(errors) < len(args.predict):
        write_table(args.output_dir / 'detections.csv', columns, rows)
        print(
            f'{len(rows)} objects in {len(args.predict) - len(errors)} photographs: {args.output_dir}. A --min-score '
            f'below {args.min_score:g} gives more.')
    raise_errors(errors)


def export(model: SSD, args: argparse.Namespace) -> None:
    """Write ONNX of the whole detector: an image [3, H, W] of 0 to 1 in, and boxes, scores and labels out."""
    path, content, names = args.output_dir / 'detector.onnx', io.BytesIO(), ['boxes', 'scores', 'labels']
    image = torch.rand(3, args.image_size, args.image_size, device=args.device)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of torchvision's code in the older exporter, the one that takes it
        torch.onnx.export(
            model.eval(), ([image],), content, dynamo=False, input_names=['image'], output_names=names,
            dynamic_axes={'image': {1: 'height', 2: 'width'}, **{n: {0: 'found'} for n in names}})
    write_file(path, content.getvalue())
    print(f'Detector with labels {", ".join(f"{i} {n}" for i, n in enumerate(args.classes, 1))}: {path}')


def find_lists(args: argparse.Namespace) -> Dict[str, List[Path]]:
    """Paths of the lists to train on, to choose the best checkpoint by, and to test on: of those that are needed."""
    data = args.data / 'VOCdevkit' if (args.data / 'VOCdevkit').is_dir() else args.data
    main, years = data / 'ImageSets/Main', [y for y in ('VOC2007', 'VOC2012') if (data / y).is_dir()]
    if not main.is_dir() and not years:
        raise BadInput(
            f'{data} has no ImageSets/Main, as a data set has, and no VOC2007 or VOC2012, as VOCdevkit has. Give a '
            f'folder that has.')
    if main.is_dir():
        train_lists = ['trainval' if (main / 'trainval.txt').exists() else 'train']
        test_list = 'test' if (main / 'test.txt').exists() else 'val'
    else:
        train_lists, test_list = [f'{y}/trainval' for y in years], 'VOC2007/test'
        if len(years) == 1 and not args.train_lists and not args.evaluate:
            print(f'{data} has {years[0]} only. The other of VOC2007 and VOC2012 is left out.')
    names = dict(train=args.train_lists or train_lists, val=[args.val_list], test=[args.test_list or test_list])
    needed = ['test'] if args.evaluate else ['train', 'val', 'test'] if args.val_list else ['train', 'test']
    paths = {k: [data / n.removesuffix('.txt') for n in names[k]] for k in needed}
    return {k: [p.parent / 'ImageSets/Main' / f'{p.name}.txt' for p in v] for k, v in paths.items()}


def read_data(args: argparse.Namespace) -> Samples:
    """Read and check the lists, set `args.classes`, and print how many objects each list has."""
    samples = read_samples(find_lists(args))
    check_overlap(args, {f'the {k} list': [str(i.image.resolve()) for i in s] for k, s in samples.items()})
    counts = {k: Counter(n for i in s for n in i.names) for k, s in samples.items()}
    if not args.classes:
        args.classes = sorted(counts['train']) if set(counts['train']) - set(CLASSES) else list(CLASSES)
    unknown = defaultdict(list)
    for sample in chain(*samples.values()):
        for name in set(sample.names) - set(args.classes):
            unknown[name].append(sample.annotation)
    raise_errors([
        f'{paths[0]}{f" and {len(paths) - 1} others" * (len(paths) > 1)} with class {name!r}, not one of '
        f'{", ".join(args.classes)}. Correct the class, or give all classes of all lists to --classes, or leave that '
        f'out and have all in the training lists.' for name, paths in sorted(unknown.items())])
    for key, count in counts.items():
        objects = ', '.join(f'{n} {count[n]}' for n in args.classes)
        print(f'{key}: {len(samples[key])} images with {objects}', flush=True)
    return samples


def train_detector(
        args: argparse.Namespace, checkpoint: Optional[Dict], samples: Samples) -> Tuple[SSD, Optional[DataFrame]]:
    """Train. Returns the model, the best if there is a list to choose it by, and its score."""
    random_seed(args.seed, args.rank)
    model = create_detector(args, args.pretrained and not checkpoint)
    augmentation = [v2.RandomHorizontalFlip()]
    if args.augmentation == 'ssd':
        fill = [round(255 * m) for m in model.transform.image_mean]
        augmentation += [
            v2.RandomPhotometricDistort(), v2.RandomZoomOut(fill=fill), v2.RandomIoUCrop(), v2.SanitizeBoundingBoxes()]
    transforms = v2.Compose([v2.ToImage(), *augmentation, v2.ToDtype(torch.float32, scale=True)])
    collate, score = partial(load_batch, transforms, args.classes), None

    def create_sampler(epoch: int) -> DistributedSampler:
        return DistributedSampler(samples['train'], args.world_size, args.rank, seed=args.seed + epoch)

    def compute_loss(parallel: nn.Module, batch: Tuple[Sequence[torch.Tensor], Sequence[Target]]) -> torch.Tensor:
        images = [i.to(args.device) for i in batch[0]]
        targets = [{k: t[k].to(args.device) for k in ('boxes', 'labels')} for t in batch[1]]
        with autocast(args):
            return sum(parallel(images, targets).values())

    def evaluate_epoch() -> Dict[str, float]:
        nonlocal score
        score = evaluate(model, samples['val' if args.val_list else 'test'], args)
        return {**score.mean().add_prefix('map_').to_dict(), **score['area'].add_suffix(' AP area').to_dict()}

    train(
        args, model, model, 'momentum', 1, samples['train'], create_sampler, collate, compute_loss, evaluate_epoch,
        [str(s.image.relative_to(args.data)) for s in samples['train']], checkpoint,
        best_by='map_area' if args.val_list else '',
        last_layers=tuple(f'head.classification_head.module_list.{i}.1.' for i in range(6)))
    return model, evaluate(model, samples['test'], args) if args.val_list and args.rank == 0 else score


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('data', type=Path, nargs='?', metavar='DIR',
        help='folder with Annotations, JPEGImages and ImageSets/Main, or VOCdevkit; not for --predict and --export')
    add_options(parser, 'voc', epochs=200, batch_size=32, lr=0.01)
    add('--train-lists', nargs='+', metavar='LIST',
        help='lists of ImageSets/Main, as trainval or VOC2007/trainval (default: trainval, or else train)')
    add('--test-list', metavar='LIST', help='list to test on (default: test, or else val; VOC2007/test)')
    add('--val-list', metavar='LIST',
        help='list to score epochs on, in place of the test list; the best is kept in best.pth, and tested')
    add('--classes', nargs='+', metavar='NAME',
        help='all that the lists have, or one file with one a line, in the order of labels '
             "(default: VOC's 20, or if there are others, those in the training lists, sorted)")
    add('--image-size', type=number(int, 32), default=320, metavar='N', help='height and width (default: %(default)s)')
    add('--min-ratio', type=number(float, 0.01, 0.9), default=0.2, metavar='X',
        help='smallest default boxes, as a part of the image; for smaller objects, lower it (default: %(default)s)')
    add('--augmentation', choices=['ssd', 'hflip'], default='ssd',
        help="'ssd' distorts colours, zooms out, crops and flips, 'hflip' flips only (default: %(default)s)")
    add('--predict', type=Path, nargs='+', metavar='PHOTO',
        help='with --evaluate FILE: draw what is found in photographs, and write a table of it')
    add('--export', action='store_true', help='with --evaluate FILE: write ONNX of the whole detector')
    add('--min-score', type=number(float, 0, 1), default=0.3, metavar='X',
        help='lowest score that is drawn or listed (default: %(default)s)')
    return parser


def main(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if not (args.evaluate if args.predict or args.export else args.data):
        parser.error('DIR is missing; or with --predict and --export a checkpoint, --evaluate FILE')
    checkpoint, score = start_run(args, parser), None
    if args.classes and len(args.classes) == 1 and Path(args.classes[0]).is_file():
        args.classes = list(read_lines(Path(args.classes[0])).values())
    if len(set(args.classes or [])) < len(args.classes or []):
        raise BadInput(f'--classes has a name twice: {", ".join(args.classes)}. Give each once.')
    samples = None if args.predict or args.export else read_data(args)
    if args.evaluate:
        model = create_detector(args)
        load_model(args, checkpoint, model)
        if samples:
            score = evaluate(model, samples['test'], args)
    else:
        model, score = train_detector(args, checkpoint, samples)
    if args.export:
        export(model, args)
    if args.predict:
        predict(model, args)
    if score is not None:
        print(score.to_string(float_format='%.4f'))
        print('mAP at IoU 0.5: 11-point {:.4f}, area {:.4f}; at 0.50:0.95 {:.4f}'.format(*score.mean()))
        draw_samples(model, samples['test'], args)


if __name__ == '__main__':
    run_script(main, create_parser())
