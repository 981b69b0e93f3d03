"""The checkpoints that the authors released: their digests, and how they are downloaded and verified."""
import hashlib
import logging
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, Optional, Union
from urllib.request import urlopen

import timm.models
import torch
from huggingface_hub import constants
from huggingface_hub.utils import OfflineModeIsEnabled, tqdm
from timm.layers import ConvNormAct
from torch import nn

__all__ = ['GIT_BLOBS', 'SHA384', 'check_release', 'download_release', 'get_release_name', 'get_release_path']

_logger = logging.getLogger(__name__)

# SHA-1 of the size and content as git has it, from the tree of the authors' repository at the commit of the cfgs
GIT_BLOBS: Dict[str, str] = {
    'hbonet_100.in1k': '7414b8c39d9e82b8d4922086c4f99e9ac9e384f6',
    'hbonet_080.in1k': 'c46ebaf81af544b59c31497ec22f6b71210e07d4',
    'hbonet_050.in1k': '314ef51c531bad4fb76ea8eb0ace01b364a68ac1',
    'hbonet_035.in1k': 'c9f111a1e9a2b144282472a4ff9cb6f6f3f1e664',
    'hbonet_025.in1k': '594ab57232e911dbf8143e31d14a02bcfaee2171',
    'hbonet_010.in1k': 'b3d6c5d058e4a42e23bbfe354dfe4e28f945a6a5',
    'hbonet_080.r192_in1k': '8bbabc116ddfcd4a5084f43d5b37bd5376f4edde',
    'hbonet_080.r160_in1k': '41c5f1023a3338a87efcb4620ee07135802c9cf2',
    'hbonet_080.r128_in1k': '40c3724180e00e9f4500a6a5fedb368ea82b55c3',
    'hbonet_080.r96_in1k': 'b145d76e9281b93720a9c18305d04003900844be',
    'hbonet_035.r192_in1k': '383337af685b2e100bf7928c609f84fc69da1843',
    'hbonet_035.r160_in1k': '7a640d3859b50f1e2bd30c7169b3de1065485f6d',
    'hbonet_035.r128_in1k': '3e630e41efe98877465ebbe302ce1fda8b7f5a94',
    'hbonet_035.r96_in1k': '7573489c50d0e7dcc698d209acab606e07f2cc76',
    'hbonet_050_d8.in1k': '0b6d5fa2f7534b952d3b6e8857401be9f8a648e9',
    'hbonet_060.r192_in1k': '8980e46f7e2a3479b98d2ee81f5a7a863397d014',
    'hbonet_025_d8.in1k': '21d65af0058a11e626adaeb4d4f5c842ddfe466c',
    'hbonet_025_4x_d8.in1k': '3162e5b2d91c07858786619a0d90d5d28f6ecce0',
    'hbonet_025_8x_d8.in1k': 'ef78dbd1671524bc1751dc2d3d763ccc197e1f21',
}
# of the content, from the Open Model Zoo, which has three of them
SHA384 = {
    'hbonet_100': '27ea1715505128c6dd1cf22cc57e629b0f8c2acf7f9246894c5c003091b415e3f494cee156c7dbd330f5d6affce700ab',
    'hbonet_050': '3aeecf2621a52826a166bb9c7b0fb300964da0af407b63e3cf979e775510144fc38931fd9a08cf724fe3139fc878d4db',
    'hbonet_025': '836c1fe7b0e1ba55db92e7e1deb15641afac1f3ac7975d8a7bfa7bd08e407d4a7664b2eb7149553f1e241cd424adb5fc',
}


def get_release_name(cfg: timm.models.PretrainedCfg) -> str:
    """Architecture and tag of the released checkpoint that a cfg asks for, '' if it has its weights from elsewhere."""
    name = f'{cfg.architecture}.{cfg.tag}'
    if name not in GIT_BLOBS:
        return ''
    registered = timm.models.get_pretrained_cfg(name)
    sources = ('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source', 'custom_load')
    return name if all(getattr(cfg, k) == getattr(registered, k) for k in sources) else ''


def check_release(path: Path, name: str) -> str:
    """Compare a file with the digests of the checkpoint `name`, unopened. Returns what is wrong, '' if nothing."""
    try:
        content = path.read_bytes()
    except OSError as e:
        return f'{type(e).__name__}: {e.strerror}'
    for digest, found, expected in (
            ('git blob id', hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest(), GIT_BLOBS[name]),
            ('SHA-384', hashlib.sha384(content).hexdigest(), SHA384.get(name.removesuffix('.in1k'))),
    ):
        if expected and found != expected:
            return f'the {digest} is {found}, not {expected}, of {len(content)} bytes that start with {content[:20]!r}'
    return ''


def get_release_path(name: str, cache_dir: Optional[Union[str, Path]] = None) -> Path:
    """Where the checkpoint `name` is kept, by default in torch.hub's folder, under a name of our own."""
    folder = cache_dir or os.path.join(torch.hub.get_dir(), 'checkpoints')
    stem, extension = os.path.splitext(os.path.basename(timm.models.get_pretrained_cfg(name).url))
    return Path(folder, f'{stem}-{GIT_BLOBS[name][:8]}{extension}')


def download_release(name: str, cache_dir: Optional[Union[str, Path]] = None) -> Path:
    """Get the checkpoint `name` from the cache or the authors' repository, verified.

    Raises:
        OSError: If it cannot be downloaded, verified, or written. No file is left behind then.
    """
    path = get_release_path(name, cache_dir)
    problem = check_release(path, name)
    if problem:
        url = timm.models.get_pretrained_cfg(name).url
        if constants.HF_HUB_OFFLINE:
            raise OfflineModeIsEnabled(f'HF_HUB_OFFLINE is set, {url} is not asked')
        if path.exists():
            if not problem.startswith('the '):
                raise OSError(f'{path} cannot be read: {problem}. Correct its permissions, or move it away.')
            _logger.warning(f'Replacing {path}: {problem}')
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f'{path.name}.', dir=path.parent) as scratch:
            partial = Path(scratch, path.name)
            with urlopen(url, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response, partial.open('wb') as f:
                with tqdm.wrapattr(f, 'write', total=response.length, desc=path.name) as progress:
                    shutil.copyfileobj(response, progress)
            problem = check_release(partial, name)
            if problem:
                raise OSError(f'{url}: {problem}')
            os.replace(partial, path)
    return path


# Convolutions of a block by their numbers in the release, where a norm follows each. An inverted residual has 2 or 3 of
# them, a harmonious bottleneck 4, 6 or 8 at rates of 2, 4 and 8.
BLOCK_CONVS = {
    2: {0: 'conv_dw', 3: 'conv_pwl'},
    3: {0: 'conv_pw', 3: 'conv_dw', 6: 'conv_pwl'},
    4: {0: 'contract.conv_dw1', 2: 'contract.conv_pw1', 5: 'conv_dw', 8: 'conv_pwl'},
    6: {0: 'contract.conv_dw1', 2: 'contract.conv_pw1', 5: 'contract.conv_dw2', 7: 'contract.conv_pw2',
        10: 'conv_dw', 12: 'conv_pwl'},
    8: {0: 'contract.conv_dw1', 2: 'contract.conv_pw1', 5: 'contract.conv_dw2', 7: 'contract.conv_pw2',
        10: 'contract.conv_dw3', 12: 'contract.conv_pw3', 15: 'conv_dw', 17: 'conv_pwl'},
}


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, Any]:
    """Rename the tensors of a checkpoint in the release's layout, before timm adapts stem and classifier by name."""
    state_dict = dict(state_dict)
    rename_release(model, state_dict, '')
    return state_dict


def rename_release(model: nn.Module, state_dict: Dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename the tensors of the release's layout to those of an `HBONet`, in place. A hook of `load_state_dict`."""
    if f'{prefix}features.0.0.weight' not in state_dict:
        return
    if model.spatial_expansion != 'nearest':
        raise RuntimeError(
            f"The released weights are for spatial_expansion='nearest', got {model.spatial_expansion!r}. "
            f'Use that, or train this model from scratch.')
    convs = {('features.0', 0): 'conv_stem', ('conv', 0): 'conv_head'}
    stages = enumerate(model.blocks)
    blocks = [(f'blocks.{i}.{j}', block) for i, stage in stages for j, block in enumerate(stage.children())]
    for i, (name, block) in enumerate(blocks, 1):
        layers = [k for k, m in block.named_modules() if isinstance(m, ConvNormAct)]
        if layers == ['']:
            convs[f'features.{i}', 0] = name
        if 'conv_dw_end' in layers:
            layers.remove('conv_dw_end')
            convs[f'features.{i}.upconv', 0] = f'{name}.conv_dw_end'
        for number, layer in BLOCK_CONVS.get(len(layers), {}).items():
            convs[f'features.{i}.conv', number] = f'{name}.{layer}'
    names = {f'{k}.{number}': f'{name}.conv' for (k, number), name in convs.items()}
    names.update({f'{k}.{number + 1}': f'{name}.bn' for (k, number), name in convs.items()})
    for key in [k for k in state_dict if k.startswith(prefix)]:
        layer, _, tensor = key[len(prefix):].rpartition('.')
        name = f'{prefix}{names[layer]}.{tensor}' if layer in names else key
        state_dict[name] = state_dict.pop(key)  # moved where the name stays too: so does the order
