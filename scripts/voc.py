"""Data sets in the layout of PASCAL VOC, their pictures and scores."""
import codecs
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple
from xml.etree.ElementTree import Element, ParseError, fromstring

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
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

CLASSES = (
    'aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow', 'diningtable', 'dog',
    'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train', 'tvmonitor')
NAME = re.compile(r'(.*?)(\.jpe?g|\.png)?', re.IGNORECASE | re.DOTALL)
NUMBER = re.compile(r'[-+]?(\d{1,9}\.?\d*|\.\d+)(e[-+]?\d\d?)?', re.ASCII | re.IGNORECASE)  # float() takes 1_0 as 10
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
    samples, known, errors = {k: [] for k in lists}, {}, []
    for key, path in ((k, p) for k, paths in lists.items() for p in paths):
        folder, images, lines = path.parents[2], defaultdict(list), read_lines(path)
        for image in sorted((folder / 'JPEGImages').rglob('*')):
            name, extension = NAME.fullmatch(image.relative_to(folder / 'JPEGImages').as_posix()).groups('')
            images[name] += [image] if extension else []
        for line, text in progress(lines.items(), f'{folder.name} {path.stem}'):
            try:
                name, image = find_image(folder, images, text)
                if (key, image) in known:
                    raise ValueError(f'{name} is in {known[key, image]} too. Remove one of them.')
                known[key, image] = f'{path}, line {line}'
                samples[key].append(read_annotation(folder / 'Annotations' / f'{name}.xml', image))
            except (BadInput, ValueError) as e:
                errors.append(str(e) if isinstance(e, BadInput) else f'{path}, line {line}: {e}')
    raise_errors(errors)
    for key, found in samples.items():
        if all(all(s.difficult) for s in found):
            raise BadInput(
                f'{lists[key][0]}: its {len(found)} images have no objects, or only difficult ones. Check that it is '
                f'the right list.')
    return samples


def read_text(path: Path) -> str:
    """Text in the encoding of its mark or XML declaration, or else UTF-8. Python has more than the parser, as GBK."""
    try:
        content = path.read_bytes()
    except OSError as e:
        raise BadInput(f'{path} cannot be read: {e.strerror}. Add it, or give other lists or data.') from None
    declared = re.match(rb'\s*<\?xml[^>]*?encoding\s*=\s*["\']([\w.:-]+)', content)
    utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = 'utf-16' if utf_16 else declared[1].decode() if declared else 'utf-8-sig'
    try:
        return content.decode(encoding)
    except LookupError:
        raise BadInput(f'{path}: its encoding {encoding!r} is not known. Save it in UTF-8.') from None
    except UnicodeDecodeError as e:
        line, column = content.count(b'\n', 0, e.start) + 1, e.start - content.rfind(b'\n', 0, e.start)
        raise BadInput(
            f'{path}, line {line}, column {column}: it is not {e.encoding}. Save it in UTF-8, or state its encoding in '
            f'the first line of an annotation, <?xml version="1.0" encoding="..."?>.') from None


def read_lines(path: Path) -> Dict[int, str]:
    """Lines that are not blank, by number."""
    lines = {i: line.strip() for i, line in enumerate(read_text(path).splitlines(), 1) if line.strip()}
    if not lines or '\0' in lines[min(lines)]:  # UTF-16 without its mark
        raise BadInput(f'{path} names nothing. Write one name in each line, in UTF-8.')
    return lines


def find_image(folder: Path, images: Dict[str, List[Path]], text: str) -> Tuple[str, Path]:
    """Name without extension, and image, of a line. Lists of one class have a second column, -1, 0 or 1."""
    for line in (text, re.sub(r'\s+(-1|0|1)$', '', text)):
        name, extension = NAME.fullmatch(line).groups('')
        found = [i for i in images.get(name, []) if i.suffix == extension] or images.get(name, [])
        if len(found) > 1:
            raise ValueError(f'{" and ".join(i.name for i in found)} are there. Write which, or remove one.')
        if found:
            return name, found[0]
    raise ValueError(f'{folder / "JPEGImages" / text} is missing, as .jpg, .jpeg or .png. Add it, or remove the line.')


def read_annotation(path: Path, image_path: Path) -> Sample:
    """Objects in an image. What is marked as deleted is left out."""
    size, objects, where = read_image(image_path, upright=False).size, [], ''  # a damaged image would end a long run
    try:
        root = fromstring(read_text(path))
        items = root.findall('object')
        stated = size if root.find('size/*') is None else read_numbers(find_one(root, 'size'), 'width', 'height')
        if stated not in (size, (0, 0)):
            raise ValueError('its size is {:g} x {:g}, and {} is stored with {} x {} pixels'.format(
                *stated, image_path, *size))
        if not items and root.tag != 'annotation':
            raise ValueError(f'its root is <{root.tag}>, not <annotation>')
        if len(items) < sum(e.tag.rpartition('}')[2].lower() == 'object' for e in root.iter()):
            raise ValueError(f'it has objects that are not <object> directly below <{root.tag}>')
        for number, item in enumerate(items, 1):
            where = f'object {number}: '
            objects += [] if read_flag(item, 'deleted') else [read_object(item, size)]
    except ParseError as e:
        raise BadInput(
            f'{path}, line {e.position[0]}, column {e.position[1] + 1}: {str(e).partition(":")[0]}. Begin the file '
            f'with <?xml or <annotation>, close each element, and write & as &amp; and < as &lt;.') from None
    except ValueError as e:
        raise BadInput(f'{path} is not as VOC annotates: {where}{e}. Correct the file.') from None
    return Sample(image_path, path, *(zip(*objects, strict=True) if objects else ((), (), ())))


def find_one(element: Element, tag: str) -> Element:
    found = element.findall(tag)
    if len(found) != 1:
        raise ValueError(f'<{element.tag}> has {len(found)} <{tag}>, not one')
    return found[0]


def read_flag(element: Element, tag: str) -> bool:
    texts = [(e.text or '').strip() for e in element.findall(tag)]
    if texts not in ([], [''], ['0'], ['1']):
        raise ValueError(f'{tag} is {", ".join(texts)!r}. Write 0 or 1 once, or leave <{tag}> out, which is 0')
    return texts == ['1']


def read_numbers(element: Element, *tags: str) -> Tuple[float, ...]:
    texts = {tag: (find_one(element, tag).text or '').strip() for tag in tags}
    for tag, text in texts.items():
        if not NUMBER.fullmatch(text):
            raise ValueError(f'{tag} is {text!r}, not a finite number')
    return tuple(map(float, texts.values()))


def read_object(item: Element, size: Tuple[int, int]) -> Tuple[str, Tuple[float, ...], bool]:
    """Class, corners in pixels, and whether the object is difficult."""
    name, corners = (find_one(item, 'name').text or '').strip(), ('xmin', 'ymin', 'xmax', 'ymax')
    if not name:
        raise ValueError('its <name> is empty')
    xmin, ymin, xmax, ymax = stated = read_numbers(find_one(item, 'bndbox'), *corners)
    # VOC counts pixels from 1 and includes the last, so IoU of corners is that of the development kit. What counts from
    # 0, or is cut off at the edge, leaves the image a little.
    box = max(xmin - 1, 0.), max(ymin - 1, 0.), min(xmax, float(size[0])), min(ymax, float(size[1]))
    normalized = -1 < min(stated) <= max(stated) < 2 and (xmin, ymin) != (1, 1)
    if normalized or not (xmin <= xmax and ymin <= ymax and box[0] < box[2] and box[1] < box[3]):
        raise ValueError(
            f'the box of {name!r} has {", ".join(f"{k} {v:g}" for k, v in zip(corners, stated, strict=True))}'
            f'{", which looks normalized" if normalized else ""}; it must be in pixels, 1 to {size[0]} and 1 to '
            f'{size[1]}, some of them in the image, and no maximum below its minimum')
    return name, box, read_flag(item, 'difficult')


def draw(image: Image.Image, boxes: Sequence, captions: Sequence[str], color: str, note: str) -> Image.Image:
    """Give the image with boxes, or with a note if there are none."""
    size, image = max(10, min(image.size) // 30), image.copy()
    if boxes:
        return to_pil_image(draw_bounding_boxes(
            pil_to_tensor(image), torch.tensor(boxes), list(captions), color, width=max(1, size // 6), font=FONT,
            font_size=size))
    font = ImageFont.truetype(FONT, size)
    ImageDraw.Draw(image).text((size, size), note, color, font, stroke_width=1, stroke_fill='black')
    return image


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
    `50_95` is COCO's at IoU 0.50 to 0.95, with difficult objects as its crowds.

    Args:
        detections: Of each image, `boxes` [N, 4], `labels` [N] and `scores` [N].
        targets: Of each image, `boxes` [N, 4], `labels` [N] from 1 and `difficult` [N].
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
