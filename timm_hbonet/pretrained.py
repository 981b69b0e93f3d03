"""Where pretrained weights come from: the Hugging Face Hub, or the authors' release, verified."""
import logging
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, Optional, Tuple, Type, Union

import timm.models
import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import EntryNotFoundError
from timm.models._hub import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME, hf_split
from torch import nn

from .releases import RELEASES, Release

__all__ = ['build_model_with_cfg', 'download_release']

_logger = logging.getLogger(__name__)


def build_model_with_cfg(model_cls: Type[nn.Module], variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """Build a model as `timm.models.build_model_with_cfg` does, with published weights that fall back to the release.

    Keyword arguments are those of timm's function. Weights from anywhere else than the registered pretrained cfgs load
    as timm loads them.

    Raises:
        ValueError: If published weights are asked for a `spatial_expansion` that they were not trained with.
        FileNotFoundError: If there is no file of the name that the config gives.
        RuntimeError: If weights cannot be found, read, or fitted to the model.
    """
    if not pretrained:
        return timm.models.build_model_with_cfg(model_cls, variant, pretrained, **kwargs)

    cfg = timm.models.resolve_pretrained_cfg(
        variant, kwargs.pop('pretrained_cfg', None), kwargs.pop('pretrained_cfg_overlay', None))
    source = 'the given state dict' if cfg.state_dict else cfg.file or cfg.hf_hub_id or cfg.url or 'an empty config'
    release = next((r for r in RELEASES if (r.hf_hub_id, r.url) == (cfg.hf_hub_id, cfg.url)), None)
    # weights that a config has in another way are timm's to load
    ours = not (cfg.source or cfg.state_dict or cfg.custom_load)
    if ours and cfg.file:
        cfg.state_dict = _load_weights(cfg.file)
    elif ours and release and not cfg.hf_hub_filename:
        if kwargs.get('spatial_expansion', 'nearest') != 'nearest':
            raise ValueError(
                f"The published weights are for `spatial_expansion='nearest'`, got {kwargs['spatial_expansion']!r}. "
                f'Use that, or `pretrained=False`.')
        source, cfg.state_dict = _load_published(release, kwargs.get('cache_dir'))
    try:
        model = timm.models.build_model_with_cfg(model_cls, variant, pretrained, cfg, **kwargs)
    except RuntimeError as e:
        raise RuntimeError(f'Could not make {variant} with the weights from {source}. {e}') from e
    if ours:
        for module in model.modules():  # a wrapper for feature maps has a config of its own
            getattr(module, 'pretrained_cfg', {}).pop('state_dict', None)
    return model


def _load_published(release: Release, cache_dir: Optional[Union[str, Path]]) -> Tuple[str, Dict[str, torch.Tensor]]:
    """Load published weights from the first source that has them. Returns its name, and the state dict."""
    path, cached = _find_cached_release(release, cache_dir)
    if cached and release.hf_hub_id == f'timm/{release.name}':  # a namespace of the user's may have other weights
        return str(path), _load_weights(path)
    failures = [] if cached else [f'{path}: not there']

    hub = f'{release.hf_hub_id} on {constants.ENDPOINT}'
    try:
        return hub, _load_from_hub(release.hf_hub_id, cache_dir)
    except Exception as e:  # whatever HTTP library huggingface_hub uses
        cached_from_hub = _find_cached_from_hub(release.hf_hub_id, cache_dir)
        if cached_from_hub:
            raise RuntimeError(
                f'The weights of {hub} cannot be read. {type(e).__name__}: {e} They must be a state dict, as '
                f'{HF_SAFE_WEIGHTS_NAME} or, without other Python objects, as {HF_WEIGHTS_NAME}. If {cached_from_hub} '
                f'was damaged on this machine, delete it.') from e
        failures.append(_describe(hub, e))
        _logger.warning(f'Taking the weights of {release.name} from {release.url}, not from the Hub. {failures[-1]}')

    try:
        return str(path), _load_weights(download_release(release, cache_dir))
    except Exception as e:
        failures.append(_describe(f'{release.url} to {path}', e))
        tried = '\n'.join(f'{i}. {failure}' for i, failure in enumerate(failures, 1))
        raise RuntimeError(
            f'Found no weights for {release.name}. Tried, in this order:\n{tried}\n'
            f'Set TIMM_HBONET_HUB_NAMESPACE or HF_ENDPOINT to a Hub that has them, or give a file with '
            f"`pretrained_cfg_overlay=dict(file='...')`. If a folder is read-only or full, set `cache_dir`, or "
            f'TORCH_HOME and HF_HOME, to another.') from e


def _describe(source: str, error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line][:2]  # those after are general advice
    return f'{source}: {type(error).__name__}: {" ".join(lines)}'


def _load_from_hub(hub_id: str, cache_dir: Optional[Union[str, Path]]) -> Dict[str, torch.Tensor]:
    if not _find_cached_from_hub(hub_id, cache_dir):
        # a download would try for minutes before it gives up on a Hub that cannot be reached
        repo_id, revision = hf_split(hub_id)
        with suppress(EntryNotFoundError):  # it may have the other file
            get_hf_file_metadata(hf_hub_url(repo_id, HF_SAFE_WEIGHTS_NAME, revision=revision))
    return timm.models.load_state_dict_from_hf(hub_id, weights_only=True, cache_dir=cache_dir)


def _find_cached_from_hub(hub_id: str, cache_dir: Optional[Union[str, Path]]) -> Optional[str]:
    repo_id, revision = hf_split(hub_id)
    names = (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME)
    paths = [try_to_load_from_cache(repo_id, name, cache_dir=cache_dir, revision=revision) for name in names]
    return next((path for path in paths if isinstance(path, str)), None)


def _find_cached_release(release: Release, cache_dir: Optional[Union[str, Path]]) -> Tuple[Path, bool]:
    """Path of a release in the cache, and whether it is there. A damaged file is deleted."""
    path = Path(cache_dir or os.path.join(torch.hub.get_dir(), 'checkpoints'), os.path.basename(release.path))
    try:
        release.verify(path)
        return path, True
    except ValueError as e:
        _logger.warning(f'Deleting {path}, {e}.')
        path.unlink(missing_ok=True)  # another process may have done so
    except OSError:
        pass
    return path, False


def download_release(release: Release, cache_dir: Optional[Union[str, Path]] = None) -> Path:
    """Get a checkpoint of the authors' release, from the cache or from its address, with its digests verified.

    Args:
        release: The checkpoint.
        cache_dir: Folder of the file, by default torch.hub's folder for checkpoints.

    Raises:
        ValueError: If the downloaded file does not have the released digests. It is deleted.
    """
    path, cached = _find_cached_release(release, cache_dir)
    if not cached:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f'{path.name}.', dir=path.parent) as scratch:
            partial = Path(scratch, path.name)
            with partial.open('wb') as f:
                # compressed, a connection that was cut could not be resumed
                http_get(release.url, f, headers={'Accept-Encoding': 'identity'}, displayed_filename=path.name)
            release.verify(partial)
            os.replace(partial, path)
    return path


def _load_weights(path: Union[str, Path]) -> Dict[str, torch.Tensor]:
    """Load a state dict from a file, without running code that is in it."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f'There is no file {path} to load weights from.')
    try:
        return timm.models.load_state_dict(path, weights_only=True)
    except Exception as e:
        with open(path, 'rb') as f:
            start = f.read(64)
        found = f'{type(e).__name__}: {e}'.rstrip('.')
        if start[:8].isascii() and b'\0' not in start:  # such as a web page, an error in JSON, a pointer of Git LFS
            found = f'it is text that starts with {start!r}' if start else 'it is empty'
        raise RuntimeError(
            f'Cannot load weights from {path}: {found}. It must be a safetensors file, or a state dict of tensors that '
            f'was saved with `torch.save`.') from e
