"""Data sets in the layout of PASCAL VOC, their pictures and scores."""
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple
from xml.etree.ElementTree import Element, ParseError, fromstring

import torch
import torch.nn.functional as F
from PIL import Image
from script_utils import BadInput, progress, raise_errors, read_image, requirements
from torchvision.ops import box_iou
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.tv_tensors import BoundingBoxes
from torchvision.utils import draw_bounding_boxes

with requirements():
    import pycocotools  # noqa: F401, which the metric needs
    from matplotlib import get_data_path
    from pandas import DataFrame
    from torchmetrics.detection import MeanAveragePrecision

EXTENSION = re.compile(r'\.(jpe?g|png)$', re.IGNORECASE)
FONT = f'{get_data_path()}/fonts/ttf/DejaVuSans.ttf'

Target = Dict[str, torch.Tensor]
Samples = Dict[str, List['Sample']]  # by list


class Sample(NamedTuple):
    """An image, its annotation, and of each object the class, the corners in pixels, and whether it is difficult."""
    image: Path
    annotation: Path
    names: Tuple[str, ...]
    boxes: Tuple[Tuple[float, ...], ...]
    difficult: Tuple[bool, ...]


def load_batch(
        transforms: Callable, classes: Sequence[str], samples: Sequence[Sample]) -> Tuple[Tuple[Any, ...], ...]:
    """Transformed images with their targets: `boxes` [N, 4], `labels` [N] from 1 (0 is background), `difficult` [N]."""
    batch = []
    for sample in samples:
        image = read_image(sample.image, upright=False)  # boxes count the stored pixels
        boxes = torch.tensor(sample.boxes).reshape(-1, 4)
        batch.append(transforms(image, dict(
            boxes=BoundingBoxes(boxes, format='XYXY', canvas_size=image.size[::-1]),
            labels=torch.tensor([classes.index(n) + 1 for n in sample.names], dtype=torch.long),
            difficult=torch.tensor(sample.difficult, dtype=torch.bool))))
    return tuple(zip(*batch, strict=True))


def read_samples(lists: Dict[str, List[Path]]) -> Samples:
    """Read and check all that lists name, in `ImageSets/Main` of folders with `JPEGImages` and `Annotations`.

    Raises:
        BadInput: If files are missing, unreadable or wrong. 20 are named.
    """
    samples, errors = {k: [] for k in lists}, []
    for key, path in ((k, p) for k, paths in lists.items() for p in paths):
        folder, images = path.parents[2] / 'JPEGImages', defaultdict(list)  # by name with and without extension
        for image in sorted(p for p in folder.rglob('*') if EXTENSION.search(p.name)):
            name = image.relative_to(folder).as_posix()
            images[name].append(image)
            images[EXTENSION.sub('', name)].append(image)
        for line, text in progress(read_lines(path).items(), f'{path.parents[2].name} {path.stem}'):
            found = images.get(text) or images[EXTENSION.sub('', text)]
            if len(found) != 1:
                errors.append(
                    f'{path}, line {line}: {folder} has {" and ".join(i.name for i in found) or "nothing"} for '
                    f'{text!r}, not one .jpg, .jpeg or .png. Add it, or write its ending, or remove the line.')
                continue
            try:
                name = found[0].relative_to(folder).with_suffix('.xml')
                samples[key].append(read_annotation(folder.with_name('Annotations') / name, found[0]))
            except BadInput as e:
                errors.append(str(e))
    raise_errors(errors)
    for key, found in samples.items():
        if all(all(s.difficult) for s in found):
            raise BadInput(
                f'{lists[key][0]}: its {len(found)} images have no objects, or only difficult ones. Check that it is '
                f'the right list.')
    return samples


def read_lines(path: Path) -> Dict[int, str]:
    """Lines that are not blank, by number."""
    try:
        text = path.read_text('utf-8-sig')
    except OSError as e:
        raise BadInput(f'{path} cannot be read: {e.strerror}. Add it, or give other lists or data.') from None
    except UnicodeDecodeError:
        raise BadInput(f'{path} is not in UTF-8. Save it in UTF-8.') from None
    lines = {i: line.strip() for i, line in enumerate(text.splitlines(), 1) if line.strip()}
    if not lines:
        raise BadInput(f'{path} names nothing. Write one name in each line.')
    return lines


def read_annotation(path: Path, image_path: Path) -> Sample:
    """Objects in an image. What is marked as deleted is left out."""
    size, objects, where = read_image(image_path, upright=False).size, [], ''  # a damaged image would end a long run
    try:
        root = fromstring(path.read_bytes())
        items = root.findall('object')
        if not items and root.tag != 'annotation':
            raise ValueError(f'its root is <{root.tag}>, not <annotation>')
        stated = size if root.find('size/*') is None else read_numbers(root, 'size', ('width', 'height'))
        if stated not in (size, (0, 0)):
            raise ValueError('its size is {:g} x {:g}, and {} is stored with {} x {} pixels'.format(
                *stated, image_path, *size))
        for number, item in enumerate(items, 1):
            where = f'object {number}: '
            objects += [] if read_flag(item, 'deleted') else [read_object(item, size)]
    except OSError as e:
        raise BadInput(f'{path} cannot be read: {e.strerror}. Add it, or remove its image from the list.') from None
    except ParseError as e:
        raise BadInput(
            f'{path}, line {e.position[0]}, column {e.position[1] + 1}: {str(e).partition(":")[0]}. Begin the file '
            f'with <?xml or <annotation>, close each element, write & as &amp; and < as &lt;, and save it in UTF-8.'
        ) from None
    except (ValueError, LookupError) as e:  # also of encodings that the parser does not have
        raise BadInput(f'{path} is not as VOC annotates: {where}{e}. Correct the file, and save it in UTF-8.') from None
    return Sample(image_path, path, *(zip(*objects, strict=True) if objects else ((), (), ())))


def read_one(element: Element, path: str) -> str:
    """Text of the element's only descendant of a path."""
    texts = [(e.text or '').strip() for e in element.findall(path)]
    if len(texts) != 1:
        raise ValueError(f'it has {len(texts)} <{path}>, not one')
    return texts[0]


def read_numbers(element: Element, path: str, tags: Sequence[str]) -> Tuple[float, ...]:
    return tuple(float(read_one(element, f'{path}/{tag}')) for tag in tags)


def read_flag(element: Element, path: str) -> bool:
    text = element.findtext(path, '').strip()
    if text not in ('', '0', '1'):
        raise ValueError(f'{path} is {text!r}. Write 0 or 1, or leave <{path}> out, which is 0')
    return text == '1'


def read_object(item: Element, size: Tuple[int, int]) -> Tuple[str, Tuple[float, ...], bool]:
    """Class, corners in pixels, and whether the object is difficult."""
    name = read_one(item, 'name')
    if not name:
        raise ValueError('its <name> is empty')
    xmin, ymin, xmax, ymax = stated = read_numbers(item, 'bndbox', ('xmin', 'ymin', 'xmax', 'ymax'))
    # VOC counts pixels from 1 and includes the last, so IoU of corners is that of the development kit. What counts from
    # 0, or is cut off at the edge, leaves the image a little.
    box = max(xmin - 1, 0.), max(ymin - 1, 0.), min(xmax, float(size[0])), min(ymax, float(size[1]))
    normalized = max(stated) < 2 and min(stated) < 1
    has_pixels = xmin <= xmax and ymin <= ymax and box[0] < box[2] and box[1] < box[3]
    if normalized or not has_pixels or not all(map(math.isfinite, stated)):
        raise ValueError(
            f'the box of {name!r} is {stated}, xmin, ymin, xmax and ymax{", normalized" if normalized else ""}. It '
            f'must be in pixels, 1 to {size[0]} and 1 to {size[1]}, at least in part')
    return name, box, read_flag(item, 'difficult')


def draw(image: Image.Image, boxes: Sequence, captions: Sequence[str], color: str) -> Image.Image:
    """Give the image with boxes."""
    size = max(10, min(image.size) // 30)
    if not boxes:  # torchvision warns of that
        return image
    return to_pil_image(draw_bounding_boxes(
        pil_to_tensor(image), torch.tensor(boxes), list(captions), color, width=max(1, size // 6), font=FONT,
        font_size=size))


def match(detections: Target, target: Target, label: int) -> List[Tuple[float, bool]]:
    """Scores of an image's detections of a class, and which are right: the first for each object.

    A detection is for the object that it overlaps most. Those for difficult objects are left out.
    """
    mine, wanted = detections['labels'] == label, target['labels'] == label
    scores, order = detections['scores'][mine].double().sort(descending=True, stable=True)
    iou = box_iou(detections['boxes'][mine][order].double(), target['boxes'][wanted].double())
    overlaps, objects = F.pad(iou, (0, 1)).max(dim=1)  # there may be no object
    difficult, found, matches = target['difficult'][wanted].tolist(), set(), []
    for score, overlap, i in zip(scores.tolist(), overlaps.tolist(), objects.tolist(), strict=True):
        if overlap < 0.5 or not difficult[i]:
            matches.append((score, overlap >= 0.5 and i not in found))
        if overlap >= 0.5:
            found.add(i)
    return matches


def average_precision(right: torch.Tensor, positives: int) -> Tuple[float, float]:
    """AP by the 11 points of 2007, and by the area of 2010 and later, of detections in the order of their scores."""
    found = right.cumsum(0)
    precision = found.double() / torch.arange(1, len(right) + 1)
    highest = precision.flip(0).cummax(0).values.flip(0)  # at this recall or above
    points = [highest[10 * found >= i * positives][:1].sum() for i in range(11)]  # in integers, 3 of 10 is 0.3
    return (sum(points) / 11).item(), (highest[right].sum() / positives).item()


def voc_score(detections: Sequence[Target], targets: Sequence[Target], classes: Sequence[str]) -> DataFrame:
    """Average precision, from 0 to 1, of each class that has objects.

    `11point` and `area` are VOC's at IoU 0.5, equal to those of the development kits of 2007, and of 2010 and later.
    `50_95` is COCO's at IoU 0.50 to 0.95, with difficult objects as its crowds. Detections are as SSD gives them, and
    targets as `load_batch` does.
    """
    metric = MeanAveragePrecision(class_metrics=True, sync_on_compute=False)  # one process has all detections
    metric.warn_on_many_detections = False
    metric.update(detections, [{**t, 'iscrowd': t['difficult'].long()} for t in targets])
    coco = metric.compute()
    by_label = dict(zip(coco['classes'].flatten().tolist(), coco['map_per_class'].flatten().tolist(), strict=True))
    scores = {}
    for label, name in enumerate(classes, 1):
        positives = sum(((t['labels'] == label) & ~t['difficult']).sum().item() for t in targets)
        if positives:
            matches = [m for d, t in zip(detections, targets, strict=True) for m in match(d, t, label)]
            right = torch.tensor([right for _, right in sorted(matches, key=lambda m: -m[0])], dtype=torch.bool)
            scores[name] = *average_precision(right, positives), by_label[label]
    return DataFrame.from_dict(scores, 'index', columns=['11point', 'area', '50_95'])
