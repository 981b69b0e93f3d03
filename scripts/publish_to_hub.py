#!/usr/bin/env python3
"""Publish the authors' checkpoints, as timm reads them and with model cards, on the Hugging Face Hub or in a folder.

Each checkpoint is downloaded from the authors' release (or taken from the cache), verified, and converted to a folder
with model.safetensors, config.json, README.md (the model card) and test/rand_tensors.safetensors. It is published when
it has loaded again through timm to identical logits. It is safe to run this again after any failure.
"""
import argparse
import json
import sys
import tempfile
from pathlib import Path

import timm
import torch
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from safetensors.torch import save_file
from script_utils import BadInput, requirements, run_script
from timm.models import save_for_hf

from timm_hbonet.weights import download_release, verify_release

with requirements():
    import pandas as pd
    from tqdm import tqdm

# accuracies from the authors' repository, and tables 2 to 6 of arXiv:1908.03888
PUBLISHED = pd.read_csv(Path(__file__).parents[1] / 'results/published.csv', index_col='model')

CARD = """---
{{ card_data }}
---

# Model card for {{ model_name }}

The accuracies on this page are those that the authors published, and were not re-validated: that this architecture
computes what theirs does was tested with synthetic weights.

An HBONet image classification model for mobile devices. Its blocks, harmonious bottlenecks, contract the feature
map while they expand the channels, and pass half of the output channels on from the input.

## Model Details

- **Model Type:** Image classification / feature backbone
- **Model Stats:**
  - Params (M): {{ '%.2f' % (row.params / 1e6) }}
  - GMACs: {{ '%.3f' % (row.macs / 1e9) }}
  - Activations (M): {{ '%.2f' % (row.activations / 1e6) }}
  - Image size: {{ row.img_size }} x {{ row.img_size }}
- **Accuracy:** {{ row.top1 }}% top-1, {{ row.top5 }}% top-5, of a single centre crop ({{ tables }} of the paper)
- **Weights:** [the authors' file]({{ row.url }}), git blob `{{ row.git_blob }}`
- **Dataset:** ImageNet-1k
- **Paper:** [{{ cfg.paper_name }}](https://arxiv.org/abs/1908.03888)
- **Original:** <{{ cfg.origin_url }}>

## Model Usage

timm knows the model when timm-hbonet is installed: `pip install .` in a clone of it, as no package index has it yet.

### Image Classification

```python
import timm
import torch
from PIL import Image

model = timm.create_model('hf-hub:{{ repo_id }}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
image = transform(Image.open('image.jpg').convert('RGB')).unsqueeze(0)

with torch.inference_mode():
    probabilities, classes = model(image).softmax(dim=1)[0].topk(5)
labels = timm.data.ImageNetInfo()
for probability, index in zip(probabilities.tolist(), classes.tolist()):
    print(f'{probability:.1%} {labels.index_to_description(index)}')
```

### Feature Maps

```python
backbone = timm.create_model('hf-hub:{{ repo_id }}', pretrained=True, features_only=True).eval()
for feature in backbone(image):
    print(tuple(feature.shape))
{%- for shape in features %}
# {{ shape }}
{%- endfor %}
```

### Image Embeddings

```python
model = timm.create_model('hf-hub:{{ repo_id }}', pretrained=True, num_classes=0).eval()
embedding = model(image)  # 1 x {{ num_features }}
```

## Model Comparison

{{ comparison }}

MACs and parameters are computed from the architectures.

## Citation

```bibtex
@inproceedings{li2019hbonet,
  title = {HBONet: Harmonious Bottleneck on Two Orthogonal Dimensions},
  author = {Li, Duo and Zhou, Aojun and Yao, Anbang},
  booktitle = {IEEE/CVF International Conference on Computer Vision (ICCV)},
  year = {2019}
}
```
"""


def make_table(current: str = '') -> str:
    """Make the table of all checkpoints in Markdown, the name of the current one bold."""
    return pd.DataFrame({
        'model': [f'**`{name}`**' if name == current else f'`{name}`' for name in PUBLISHED.index],
        'image': PUBLISHED['img_size'],
        'top-1': PUBLISHED['top1'],
        'top-5': PUBLISHED['top5'],
        'M MACs': PUBLISHED['macs'] / 1e6,
        'M parameters': PUBLISHED['params'] / 1e6,
    }).to_markdown(index=False, floatfmt=('', '', '.1f', '.1f', '.1f', '.2f'))


def make_card(name: str, repo_id: str) -> ModelCard:
    """Make the model card of a checkpoint ('hbonet_100.in1k') whose usage loads it from a repository of the Hub."""
    row, cfg = PUBLISHED.loc[name], timm.get_pretrained_cfg(name)
    model = timm.create_model(name, device='meta').eval()
    features = model.forward_intermediates(torch.zeros(1, *cfg.input_size, device='meta'), intermediates_only=True)
    tables = f'table{"s" * (not row.paper_tables.isdigit())} {row.paper_tables}'
    results = [
        EvalResult(
            task_type='image-classification', dataset_type='imagenet-1k', dataset_name='ImageNet-1k',
            dataset_split='validation', metric_type='accuracy',
            metric_name=f'{metric} accuracy (%), published by the authors', metric_value=float(value),
            source_name=f"The authors' published figures: repository, and {tables} of arXiv:1908.03888",
            source_url=cfg.origin_url,
        ) for metric, value in (('Top-1', row.top1), ('Top-5', row.top5))
    ]
    data = ModelCardData(
        license=cfg.license, library_name='timm', tags=['image-classification', 'timm', 'transformers', 'hbonet'],
        datasets=['imagenet-1k'], pipeline_tag='image-classification', model_name=name, eval_results=results,
        architecture=cfg.architecture)
    return ModelCard.from_template(
        data, template_str=CARD, model_name=name, repo_id=repo_id, row=row, cfg=cfg, tables=tables,
        features=[tuple(x.shape) for x in features], num_features=model.num_features, comparison=make_table(name))


def convert(path: Path, name: str, repo_id: str, folder: Path) -> None:
    """Write the authors' file of a checkpoint as a folder for the Hub's ORG/NAME, and check that it loads again."""
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path))).eval()
    # uniform numbers of a few bits, and outputs rounded from float64, are the same on every machine
    images = torch.rand(1, *model.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0)) * 4 - 2
    with torch.inference_mode():
        logits = model(images)
        features = model.double().forward_features(images.double())
        pre_logits = model.forward_head(features, pre_logits=True)
        tensors = dict(input=images, features=features, pre_logits=pre_logits, output=model.classifier(pre_logits))
        model.float()

    # the files of timm's own repositories
    (folder / 'test').mkdir(parents=True)
    save_for_hf(model, str(folder), safe_serialization=True)
    config = json.loads((folder / 'config.json').read_text())
    config.pop('model_args', None)  # only defaults, with which transformers finds the number of classes twice
    (folder / 'config.json').write_text(json.dumps(config, indent=2))
    make_card(name, repo_id).save(folder / 'README.md')
    save_file({k: v.float() for k, v in tensors.items()}, folder / 'test/rand_tensors.safetensors')

    reloaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    with torch.inference_mode():
        if not torch.equal(reloaded(images), logits):
            raise RuntimeError(f'the converted model does not give the logits of {path}. Nothing is kept.')


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument(
        '--namespace', metavar='ORG',
        help='upload to ORG/NAME, of an organization or user of the Hub. The token is that of `hf auth login`, or '
             'HF_TOKEN')
    place.add_argument(
        '--dry-run', type=Path, metavar='DIR',
        help="write the folders DIR/NAME, for timm.create_model('local-dir:DIR/NAME', pretrained=True), and upload "
             'nothing. A folder that is there is left as it is')
    place.add_argument('--table', action='store_true', help="print README's table of the checkpoints")
    add('--only', nargs='+', choices=list(PUBLISHED.index), default=list(PUBLISHED.index), metavar='NAME',
        help='these checkpoints, such as hbonet_100.in1k (default: all)')
    add('--file', type=Path, metavar='FILE', help="the authors' file of the one NAME that is given by --only")
    return parser


def publish(name: str, api: HfApi, args: argparse.Namespace) -> str:
    """Convert a checkpoint, and put it in its folder or on the Hub. Returns where it is."""
    folder = args.dry_run and args.dry_run / name
    if folder and folder.exists():
        return f'{folder} is there already, and is left as it is'
    repo_id = f'{args.namespace or "timm"}/{name}'
    with tempfile.TemporaryDirectory(prefix='.', dir=args.dry_run) as scratch:
        converted = Path(scratch, name)
        convert(args.file or download_release(name), name, repo_id, converted)
        if folder:
            return str(converted.rename(folder))
        api.create_repo(repo_id, exist_ok=True)
        # what has not changed is not uploaded
        return api.upload_folder(repo_id=repo_id, folder_path=converted, commit_message=f'Add {name}').commit_url


def main(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if args.table:
        print(make_table())
        return
    if args.file and len(args.only) != 1:
        parser.error('--file needs --only with the one NAME that it is')
    if args.file:
        try:
            verify_release(args.file, args.only[0])
        except (OSError, ValueError) as e:
            raise BadInput(
                f"--file {args.file} is not the authors' file of {args.only[0]}, which is at "
                f"{PUBLISHED.loc[args.only[0], 'url']}. {type(e).__name__}: {e}") from None

    api = HfApi()
    if args.dry_run:
        args.dry_run.mkdir(parents=True, exist_ok=True)
    else:
        try:
            api.whoami()
        except Exception as e:  # the client's HTTP library differs between versions
            raise BadInput(f'{api.endpoint} was asked whose token this is. {type(e).__name__}: {e}') from None

    failed = []
    for name in tqdm(args.only, unit='model'):
        try:
            tqdm.write(publish(name, api, args))
        except Exception as e:  # of files, connections and the Hub: must not keep the others from being published
            failed.append(name)
            tqdm.write(' '.join(f'{name}: {type(e).__name__}: {e}'.split()), file=sys.stderr)
    if failed:
        raise BadInput(
            f'{len(failed)} of {len(args.only)} failed, for the reasons above. Run this again with --only '
            f'{" ".join(failed)}')


if __name__ == '__main__':
    run_script(main, create_parser())
