#!/usr/bin/env python3
"""Train an HBONet on handwritten digits, or classify photographs, through timm alone.

Without a photograph: trains on the 8x8 digits that scikit-learn ships (no download, no GPU), saves the model in the
Hugging Face Hub's layout, loads it back, checks that it scores the same, and draws its predictions. The held-out fifth
of the digits is stratified and the same for each seed.

With photographs: prints the top 5 classes of each, by default with the published ImageNet weights.
"""
import argparse
import tempfile
from pathlib import Path
from typing import Any, Sequence, Tuple

import numpy as np
import timm.data
import timm.models
import timm.optim
import timm.scheduler
import timm.utils
import torch
from PIL import Image
from script_utils import add_run_options, create_model, create_output_dir, read_image, requirements, run_script
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

with requirements():
    from matplotlib.figure import Figure
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

INPUT_SIZE = (1, 48, 48)
BATCH_SIZE = 64


class Digits(Dataset):
    """Handwritten digits as PIL images with their labels, `create_loader` sets the transform."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images = images
        self.labels = labels
        self.transform = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def load_splits() -> Tuple[Digits, Digits]:
    """Get the digits to train on, 1437, and those held out, 360."""
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)  # the shades are 0 to 16
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
    return Digits(train_images, train_labels), Digits(test_images, test_labels)


def create_loader(model: torch.nn.Module, dataset: Dataset, device: torch.device, **kwargs: Any) -> DataLoader:
    return timm.data.create_loader(
        dataset, batch_size=BATCH_SIZE, num_workers=0, persistent_workers=False, device=device,
        **timm.data.resolve_model_data_config(model), **kwargs)


@torch.inference_mode()
def predict(model: torch.nn.Module, loader: DataLoader) -> Tuple[torch.Tensor, float]:
    """Compute logits (images, classes) and top-1 accuracy in percent of a data set."""
    model.eval()
    logits, labels = zip(*((model(images), labels) for images, labels in loader), strict=True)
    logits = torch.cat(logits)
    return logits, timm.utils.accuracy(logits, torch.cat(labels))[0].item()


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Train, save, load back and draw. The whole result comes into a new folder at the end."""
    create_output_dir(args)
    timm.utils.random_seed(args.seed)
    model = create_model(
        'hbonet_035', num_classes=10, in_chans=INPUT_SIZE[0],
        pretrained_cfg_overlay=dict(
            tag='digits', input_size=INPUT_SIZE, pool_size=None, crop_pct=1.0, mean=(0.5,), std=(0.5,)),
    ).to(device)
    train_set, test_set = load_splits()
    print(f'hbonet_035 on {device.type}: {len(train_set)} digits to train on, {len(test_set)} held out')
    # the last epoch, as to choose the best by the held-out digits would flatter the score
    logits, top1 = fit(model, train_set, test_set, args.epochs, device)
    print(f'Top-1 on the {len(test_set)} held-out digits: {top1:.2f} %')

    with tempfile.TemporaryDirectory(prefix='.', dir=args.output_dir) as folder:
        result = Path(folder)
        timm.models.save_for_hf(
            model, result, model_config=dict(label_names=list('0123456789')), safe_serialization=True)
        reloaded = create_model(f'local-dir:{result}', pretrained=True).to(device)
        reloaded_logits, reloaded_top1 = predict(reloaded, create_loader(reloaded, test_set, device))
        torch.testing.assert_close(reloaded_logits, logits, rtol=1e-4, atol=1e-4)
        draw(test_set, reloaded_logits).savefig(result / 'predictions.png')
        for path in list(result.iterdir()):
            path.rename(args.output_dir / path.name)
    print(f"Loaded back by timm.create_model('local-dir:{args.output_dir}', pretrained=True): {reloaded_top1:.2f} %")
    print(f'Picture of predictions: {args.output_dir / "predictions.png"}')


def fit(
        model: torch.nn.Module, train_set: Dataset, test_set: Dataset, epochs: int, device: torch.device,
) -> Tuple[torch.Tensor, float]:
    """Train, and predict the test set after each epoch. Returns what `predict` does after the last."""
    loader = create_loader(
        model, train_set, device, is_training=True, scale=(0.7, 1.0), color_jitter=0.,
        hflip=0.)  # a mirrored digit is another sign
    test_loader = create_loader(model, test_set, device)
    optimizer = timm.optim.create_optimizer_v2(model, opt='sgd', lr=0.05, momentum=0.9, weight_decay=5e-4)
    scheduler, _ = timm.scheduler.create_scheduler_v2(
        optimizer, num_epochs=epochs, warmup_epochs=1, warmup_lr=0.005, step_on_epochs=False,
        updates_per_epoch=len(loader))

    with tqdm(total=epochs * len(loader), desc='Training', unit='batch') as progress:
        for epoch in range(epochs):
            losses = timm.utils.AverageMeter()
            model.train()
            for images, labels in loader:
                loss = torch.nn.functional.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.update(loss.item(), len(labels))
                progress.update()
                scheduler.step_update(progress.n)
            logits, top1 = predict(model, test_loader)
            progress.write(f'Epoch {epoch + 1:2} of {epochs}: loss {losses.avg:.3f}, top-1 held out {top1:.2f} %')
    return logits, top1


def draw(dataset: Digits, logits: torch.Tensor) -> Figure:
    """Draw the 30 digits with the highest loss: mistakes, and what was least certain."""
    logits = logits.cpu()
    labels = torch.from_numpy(dataset.labels)
    confidences, preds = logits.softmax(-1).max(-1)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction='none')

    figure = Figure(figsize=(12, 6), dpi=120, layout='constrained')
    right = (preds == labels).sum()
    figure.suptitle(f'{right} of {len(labels)} held-out digits are right. These have the highest loss:', fontsize=16)
    for axes, i in zip(figure.subplots(3, 10).flat, losses.argsort(descending=True).tolist(), strict=False):
        axes.imshow(dataset.images[i], cmap='gray_r')
        axes.set_title(
            f'{labels[i]} read as {preds[i]}\n{confidences[i]:.0%} sure', fontsize=11,
            color='darkgreen' if labels[i] == preds[i] else 'darkred')
        axes.axis('off')
    return figure


def classify(photos: Sequence[Path], model_name: str, device: torch.device) -> None:
    """Print the top 5 classes of each photograph."""
    for path in photos:  # before the weights are downloaded
        read_image(path)
    model = create_model(model_name, pretrained=True).to(device).eval()
    data_config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**data_config, is_training=False)
    names, subset = model.pretrained_cfg.get('label_names'), timm.data.infer_imagenet_subset(model)
    if subset and not names:
        labels = timm.data.ImageNetInfo(subset)
    else:
        names = names or [f'class {i}' for i in range(model.num_classes)]
        labels = timm.data.CustomDatasetInfo(names, model.pretrained_cfg.get('label_descriptions'))

    for path in tqdm(photos, desc='Classifying', unit='photo'):
        image = read_image(path, 'L' if data_config['input_size'][0] == 1 else 'RGB')
        with torch.inference_mode():
            probs = model(transform(image).unsqueeze(0).to(device)).softmax(-1)[0]
        tqdm.write(f'{path}')
        for prob, index in zip(*(values.tolist() for values in probs.topk(min(5, len(probs)))), strict=True):
            tqdm.write(f'{prob:8.2%}  {labels.index_to_description(index)}')


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('photos', nargs='*', type=Path, metavar='PHOTO', help='image files to classify')
    add('--model', metavar='NAME',
        help="timm model for the photographs, with ImageNet or other weights, also 'local-dir:FOLDER' or "
             "'hf-hub:OWNER/NAME' (default: hbonet_100)")
    add_run_options(parser, 'quickstart', epochs=16)
    return parser


def main(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if args.model and not args.photos:
        parser.error('--model is for photographs, give at least one PHOTO')
    if args.photos:
        classify(args.photos, args.model or 'hbonet_100', torch.device(args.device))
    else:
        train(args, torch.device(args.device))


if __name__ == '__main__':
    run_script(main, create_parser())
