"""The data set of PASCAL VOC in its published format, and its score."""
import codecs
import math
import re
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Sequence, Tuple
from xml.etree.ElementTree import Element, ParseError
from xml.etree.ElementTree import parse as parse_xml

import torch
from PIL import Image
from script_utils import BadInput, image_error, read_image
from torch.utils.data import Dataset
from torchvision.ops import box_iou
from torchvision.tv_tensors import BoundingBoxes
from tqdm import tqdm

CLASSES = (
    'aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow', 'diningtable', 'dog',
    'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train', 'tvmonitor')

Target = Dict[str, torch.Tensor]


class VOC(Dataset):
    """A split of VOC, with all that can be wrong with it found at the start.

    An item is the transformed image and its target: `boxes` [N, 4] as corners in pixels, `labels` [N] from 1 to 20 (0
    is the background), `difficult` [N].

    Raises:
        BadInput: For a file that is missing, unreadable or wrong.
    """

    def __init__(self, data: Path, year: str, image_set: str, transforms: Callable, quiet: bool) -> None:
        data = data / 'VOCdevkit' if (data / 'VOCdevkit').is_dir() else data
        self.folder = data / f'VOC{year}'
        self.transforms = transforms
        split = self.folder / 'ImageSets' / 'Main' / f'{image_set}.txt'
        lines = read_split(split)
        self.names = list(lines)
        self.targets = []
        for name, line in tqdm(lines.items(), f'VOC{year} {image_set}', disable=quiet, leave=False):
            try:
                self.targets.append(read_annotation(self.folder / 'Annotations' / f'{name}.xml', self.image_path(name)))
            except FileNotFoundError as e:
                raise BadInput(
                    f'{split}, line {line}: {e.filename} is missing. Unpack the published archive again, or remove '
                    f'the line.') from None
        if not any(len(t['boxes']) for t in self.targets):
            raise BadInput(f'{split}: its {len(lines)} images have no objects. Check that it is the right list.')

    def image_path(self, name: str) -> Path:
        return self.folder / 'JPEGImages' / f'{name}.jpg'

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tuple[torch.Tensor, Target]:
        image = read_image(self.image_path(self.names[index]), upright=False)  # boxes count the stored pixels
        target = self.targets[index]
        boxes = BoundingBoxes(target['boxes'], format='XYXY', canvas_size=image.size[::-1])
        return self.transforms(image, {**target, 'boxes': boxes})


def read_split(path: Path) -> Dict[str, int]:
    """Names of images with their lines. The lists of one class, which have a second column, are read too."""
    try:
        content = path.read_bytes()
    except OSError as e:
        raise BadInput(
            f'{path} cannot be read: {e.strerror}. Give the folder VOCdevkit that the published archives make, with '
            f'VOC2007 (trainval and test) and VOC2012 (trainval).') from None
    utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        lines = content.decode('utf-16' if utf_16 else 'utf-8-sig').splitlines()
    except UnicodeDecodeError as e:
        line = content.count(b'\n', 0, e.start) + 1
        raise BadInput(f'{path}, line {line}: it is not UTF-8. Save the file in this encoding.') from None
    names = {}
    for line, text in enumerate(lines, 1):
        match = re.fullmatch(r'([^\s\0]+?)(?:\.jpe?g)?(?:\s+(?:-1|0|1))?', text.strip(), re.IGNORECASE)
        if text.strip() and not match:
            raise BadInput(
                f'{path}, line {line}: found {text.strip()!r}. Write the name of one image, and at most a -1, 0 or 1 '
                f'after it, in UTF-8.')
        if match and match[1] in names:
            raise BadInput(f'{path}, line {line}: {match[1]} is in line {names[match[1]]} too. Remove one of them.')
        if match:
            names[match[1]] = line
    if not names:
        raise BadInput(f'{path} lists no images. Unpack the published archive again.')
    return names


def read_annotation(path: Path, image_path: Path) -> Target:
    """Boxes, labels and difficult flags of the objects in an image."""
    try:
        with Image.open(image_path) as image:  # its header only
            size = image.size
    except FileNotFoundError:
        raise
    except Exception as e:  # each of Pillow's decoders has errors of its own
        raise image_error(image_path, e) from None
    objects = []
    try:
        root = parse_xml(path).getroot()
        stated = tuple(read_number(root, f'size/{k}') for k in ('width', 'height'))
        if stated != size:
            raise ValueError(
                f'its size is {stated[0]:g} x {stated[1]:g}, and {image_path} is stored with {size[0]} x {size[1]} '
                f'pixels')
        for number, item in enumerate(root.findall('object'), 1):
            try:
                objects.append(read_object(item, size))
            except ValueError as e:
                raise ValueError(f'object {number}: {e}') from None
    except (ParseError, LookupError, ValueError) as e:
        raise BadInput(f'{path} is not as VOC annotates: {e}. Correct the file.') from None
    boxes, labels, difficult = zip(*objects, strict=True) if objects else ((), (), ())
    return dict(
        boxes=torch.tensor(boxes).reshape(-1, 4), labels=torch.tensor(labels, dtype=torch.long),
        difficult=torch.tensor(difficult, dtype=torch.bool))


def find_text(element: Element, path: str) -> str:
    text = (element.findtext(path) or '').strip()
    if not text:
        raise ValueError(f'<{element.tag}> has no {path}')
    return text


def read_number(element: Element, path: str) -> float:
    text = find_text(element, path)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f'{path} is {text!r}, not a finite number')
    return value


def read_object(item: Element, size: Tuple[int, int]) -> Tuple[Tuple[float, ...], int, bool]:
    """Corners in pixels, label from 1, and whether the object is difficult."""
    name, difficult = find_text(item, 'name'), item.findtext('difficult', '0').strip()
    if name not in CLASSES:
        raise ValueError(f'its class is {name!r}, VOC has {", ".join(CLASSES)}')
    if difficult not in ('0', '1'):
        raise ValueError(f'difficult is {difficult!r}, not 0 or 1')
    xmin, ymin, xmax, ymax = (read_number(item, f'bndbox/{k}') for k in ('xmin', 'ymin', 'xmax', 'ymax'))
    # VOC counts pixels from 1 and includes the last, so IoU of corners is that of the development kit. What counts from
    # 0, or is cut off at the edge, leaves the image a little.
    box = max(xmin - 1, 0.), max(ymin - 1, 0.), min(xmax, float(size[0])), min(ymax, float(size[1]))
    if not (xmin <= xmax and ymin <= ymax and box[0] < box[2] and box[1] < box[3]):
        raise ValueError(
            f'the box of {name!r} has xmin {xmin:g}, ymin {ymin:g}, xmax {xmax:g}, ymax {ymax:g}; no maximum may be '
            f'below its minimum, and pixels of the image must be in it, 1 to {size[0]} and 1 to {size[1]}')
    return box, CLASSES.index(name) + 1, difficult == '1'


class VOCScore(NamedTuple):
    """Average precision at IoU 0.5, from 0 to 1. Classes without objects do not count."""
    map_11point: float
    map_area: float
    ap_11point: Dict[str, float]  # by class
    ap_area: Dict[str, float]


def match(detections: Target, target: Target, label: int) -> List[Tuple[float, bool]]:
    """Scores of an image's detections of a class, and which are right.

    A detection is for the object that it overlaps most. Only the first for an object is right, and those for difficult
    objects are left out.
    """
    mine, wanted = detections['labels'] == label, target['labels'] == label
    scores, order = detections['scores'][mine].double().sort(descending=True, stable=True)
    if not wanted.any():
        return [(s, False) for s in scores.tolist()]
    iou = box_iou(detections['boxes'][mine][order].double(), target['boxes'][wanted].double())
    difficult, found, matches = target['difficult'][wanted].tolist(), set(), []
    for score, best_iou, best in zip(
            scores.tolist(), iou.amax(dim=1).tolist(), iou.argmax(dim=1).tolist(), strict=True):
        if best_iou < 0.5:
            matches.append((score, False))
        elif not difficult[best]:
            matches.append((score, best not in found))
            found.add(best)
    return matches


def average_precision(right: torch.Tensor, positives: int) -> Tuple[float, float]:
    """AP by the 11 points of 2007, and by the area of 2010 and later.

    Args:
        right: Whether each detection is right, the one of the highest score first.
        positives: Number of objects, 1 or more.
    """
    found = right.cumsum(0)
    precision = found.double() / torch.arange(1, len(right) + 1)
    highest = precision.flip(0).cummax(0).values.flip(0)  # at this recall or above
    points = [highest[10 * found >= i * positives][:1].sum() for i in range(11)]  # in integers, 3 of 10 is 0.3
    return (sum(points) / 11).item(), (highest[right].sum() / positives).item()


def voc_score(detections: Sequence[Target], targets: Sequence[Target]) -> VOCScore:
    """VOC's mean average precision at IoU 0.5, equal to that of the development kits of 2007 and of 2010 and later.

    Args:
        detections: Of each image, `boxes` [N, 4], `labels` [N] and `scores` [N].
        targets: Of each image, `boxes` [N, 4], `labels` [N] and `difficult` [N].
    """
    scores = {}
    for label, name in enumerate(CLASSES, 1):
        positives = sum(((t['labels'] == label) & ~t['difficult']).sum().item() for t in targets)
        if positives:
            matches = [m for d, t in zip(detections, targets, strict=True) for m in match(d, t, label)]
            matches.sort(key=lambda m: -m[0])
            scores[name] = average_precision(torch.tensor([right for _, right in matches], dtype=torch.bool), positives)
    if not scores:
        raise BadInput('The test split has no object that is not difficult, so no score. Check its test.txt.')
    ap_11point, ap_area = ({n: s[i] for n, s in scores.items()} for i in (0, 1))
    return VOCScore(
        sum(ap_11point.values()) / len(scores), sum(ap_area.values()) / len(scores), ap_11point, ap_area)
