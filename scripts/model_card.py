"""Model cards for the released checkpoints, from the published scores and the architectures."""
import re
from functools import lru_cache
from typing import Tuple

import timm
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from scores import SCORES

from timm_hbonet.releases import GIT_BLOBS

PAPER = 'https://arxiv.org/abs/1908.03888'

_TEMPLATE = """
# Model card for {name}

An HBONet image classification model for mobile devices, trained on ImageNet-1k. Its blocks, harmonious bottlenecks,
contract the feature map while they expand the channels, and pass half of the output channels on from the input.

{origin}

## Model details

- **Model type:** image classification, feature backbone
- **Architecture:** `{architecture}`
- **Parameters:** {params:.2f} M
- **MACs:** {macs:.1f} M ({gmacs:.3f} G)
- **Activations:** {activations:.2f} M
- **Image size:** {size} x {size}, centre crop of {crop_pct:.1%}, {interpolation} interpolation
{accuracy}- **Dataset:** ImageNet-1k
- **Paper:** [{paper_name}]({paper})
- **Original:** <{origin_url}>
- **License:** Apache-2.0

MACs and activations are computed from the architecture for one image: the multiply-adds, and the elements of the
output, of all convolutions and the classifier, as fvcore counts them.

## What was checked

timm-hbonet, which has the architecture and wrote the files here, was developed without the authors' files: until this
conversion none had ever been opened. In their place stood weights that are recreated from a rule under the names and
shapes of the release's tensors, the outputs of the authors' network with them in float64, which this architecture
gives too, and the published digests of the files. The accuracy has not been measured in timm.

## Usage

timm knows the model after this, in a clone of timm-hbonet (which is on no package index yet):

```bash
pip install .
```

### Image classification

```python
import timm
import torch
from PIL import Image

model = timm.create_model('hf-hub:{repo_id}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
image = Image.open('image.jpg').convert('RGB')

with torch.inference_mode():
    logits = model(transform(image).unsqueeze(0))  # 1 x 1000

probabilities, classes = logits.softmax(dim=1)[0].topk(5)
labels = timm.data.ImageNetInfo()
for probability, index in zip(probabilities.tolist(), classes.tolist()):
    print(f'{{probability:.1%}} {{labels.index_to_description(index)}}')
```

### Feature maps

```python
import timm
import torch
from PIL import Image

model = timm.create_model('hf-hub:{repo_id}', pretrained=True, features_only=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
image = Image.open('image.jpg').convert('RGB')

with torch.inference_mode():
    features = model(transform(image).unsqueeze(0))

for feature in features:
    print(tuple(feature.shape))
{feature_shapes}
```

### Embeddings

```python
import timm
import torch
from PIL import Image

model = timm.create_model('hf-hub:{repo_id}', pretrained=True, num_classes=0).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
image = Image.open('image.jpg').convert('RGB')

with torch.inference_mode():
    embedding = model(transform(image).unsqueeze(0))  # 1 x {num_features}
```

## Comparison

All released models, by top-1 accuracy. Accuracies (%) are those that the authors published, for a single centre crop of
the ImageNet-1k validation images. MACs are computed from the architecture.

{comparison}

\\* The authors' table most likely has these two figures interchanged, the architectures compute to the MACs shown.

## Citation

```bibtex
@inproceedings{{li2019hbonet,
  title = {{HBONet: Harmonious Bottleneck on Two Orthogonal Dimensions}},
  author = {{Li, Duo and Zhou, Aojun and Yao, Anbang}},
  booktitle = {{IEEE/CVF International Conference on Computer Vision (ICCV)}},
  year = {{2019}}
}}
```
"""


@lru_cache(maxsize=None)
def _create_model(architecture: str) -> torch.nn.Module:
    return timm.create_model(architecture, device='meta').eval()


def _count_params(architecture: str) -> int:
    return sum(p.numel() for p in _create_model(architecture).parameters())


def _count_activations(model: torch.nn.Module, image: torch.Tensor) -> int:
    """Output elements of convolutions and classifier, as fvcore counts them."""
    count = 0

    def add(module: torch.nn.Module, inputs: Tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal count
        count += output.numel()

    hooks = [
        module.register_forward_hook(add) for module in model.modules()
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))]
    model(image)
    for hook in hooks:
        hook.remove()
    return count


def _compare(current: str) -> str:
    rows = [
        '| model | top-1 | top-5 | params (M) | MACs (M) | published MFLOPs | image size |',
        '| --- | ---: | ---: | ---: | ---: | ---: | ---: |',
    ]
    for name, score in sorted(SCORES.items(), key=lambda item: item[1].top1, reverse=True):
        params = _count_params(name.split('.')[0]) / 1e6
        macs = score.macs / 1e6
        slip = ' \\*' if abs(score.published_mflops / macs - 1) > 0.05 else ''
        size = timm.get_pretrained_cfg(name).input_size[-1]
        rows += [
            f'| {f"**{name}**" if name == current else name} | {score.top1:.1f} | {score.top5:.1f} | {params:.2f} '
            f'| {macs:.1f} | {score.published_mflops}{slip} | {size} |']
    return '\n'.join(rows)


def make_card(name: str, repo_id: str, git_blob: str) -> ModelCard:
    """Make the model card of a released checkpoint.

    Args:
        name: Architecture and tag.
        repo_id: Repository of the Hub that the usage loads from, 'ORG/NAME'.
        git_blob: Git blob id of the file that the weights were converted from. The published accuracies are left out
            if it is not the release's.
    """
    architecture = name.split('.')[0]
    score, cfg = SCORES[name], timm.get_pretrained_cfg(name)
    model, image = _create_model(architecture), torch.zeros(1, *cfg.input_size, device='meta')
    features = model.forward_intermediates(image, intermediates_only=True)
    tables = f'table {score.tables}' if score.tables.isdigit() else f'tables {score.tables}'

    if git_blob == GIT_BLOBS[name]:
        commit, path = re.search(r'/raw/(\w+)/(.*)', cfg.url).groups()
        origin = (
            f"The weights are those of the authors' release, [`{path}`]({cfg.url}) at commit `{commit[:7]}` "
            f'(git blob `{git_blob}`), its tensors unchanged and named as in timm.')
        accuracy = (
            f'- **Accuracy:** {score.top1:.1f}% top-1, {score.top5:.1f}% top-5, as the authors published it '
            f'([paper]({PAPER}), {tables}; [repository]({cfg.origin_url}))\n')
        results = [
            EvalResult(
                task_type='image-classification',
                task_name='Image Classification',
                dataset_type='imagenet-1k',
                dataset_name='ImageNet-1k',
                dataset_split='validation',
                metric_type='accuracy',
                metric_name=f'{metric} accuracy (%), published by the authors',
                metric_value=value,
                source_name=f"The authors' published figures: repository, and {tables} of arXiv:1908.03888",
                source_url=cfg.origin_url,
            ) for metric, value in (('Top-1', score.top1), ('Top-5', score.top5))
        ]
    else:
        origin = (
            f"The weights are of unknown origin: the file that they were converted from (git blob `{git_blob}`) is not "
            f"the one that the authors released. The accuracies below may not be theirs.")
        accuracy, results = '', None

    data = ModelCardData(
        license=cfg.license,
        library_name='timm',
        tags=['image-classification', 'timm', 'transformers', 'hbonet'],
        datasets=['imagenet-1k'],
        pipeline_tag='image-classification',
        model_name=name if results else None,
        eval_results=results,
        architecture=architecture,
    )
    text = _TEMPLATE.format(
        name=name,
        repo_id=repo_id,
        origin=origin,
        accuracy=accuracy,
        architecture=architecture,
        params=_count_params(architecture) / 1e6,
        macs=score.macs / 1e6,
        gmacs=score.macs / 1e9,
        activations=_count_activations(model, image) / 1e6,
        size=cfg.input_size[-1],
        crop_pct=cfg.crop_pct,
        interpolation=cfg.interpolation,
        paper=PAPER,
        paper_name=cfg.paper_name,
        origin_url=cfg.origin_url,
        feature_shapes='\n'.join(f'# {tuple(feature.shape)}' for feature in features),
        num_features=model.num_features,
        comparison=_compare(name),
    )
    return ModelCard(f'---\n{data.to_yaml()}\n---\n{text}')
