"""Where pretrained weights come from: the Hugging Face Hub, or the authors' release, verified."""
import logging
import os
import uuid
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Tuple, Type, Union

import timm.models
import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import EntryNotFoundError
from timm.models._builder import resolve_pretrained_cfg
from timm.models._hub import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME, hf_split, load_state_dict_from_hf
from timm.models._pretrained import PretrainedCfg
from timm.models._registry import get_pretrained_cfg
from torch import nn

from .releases import RELEASES, Release

__all__ = ['build_model_with_cfg', 'download_release', 'load_weights']

_logger = logging.getLogger(__name__)


def build_model_with_cfg(
        model_cls: Union[Type[nn.Module], Callable[..., nn.Module]],
        variant: str,
        pretrained: bool,
        pretrained_cfg: Optional[Union[str, Dict[str, Any], PretrainedCfg]] = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
) -> nn.Module:
    """Build a model as `timm.models.build_model_with_cfg` does, with published weights that fall back to the release.

    Arguments are those of timm's function. Weights from anywhere else than the registered pretrained cfgs load as timm
    loads them.

    Raises:
        ValueError: If published weights are asked for a `spatial_expansion` that they were not trained with.
        RuntimeError: If weights cannot be found, read, or fitted to the model.
    """
    if not pretrained:
        return timm.models.build_model_with_cfg(
            model_cls, variant, pretrained, pretrained_cfg, pretrained_cfg_overlay, **kwargs)

    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    source = 'the given state dict' if cfg.state_dict else cfg.file or cfg.hf_hub_id or cfg.url or 'an empty config'
    release = _find_release(cfg)
    loaded = {}
    if release is not None:
        if kwargs.get('spatial_expansion', 'nearest') != 'nearest':
            raise ValueError(
                f"The published weights are for `spatial_expansion='nearest'`, got {kwargs['spatial_expansion']!r}. "
                f'Use that, or `pretrained=False`.')
        source, loaded['state_dict'] = _load_published(release, cfg.hf_hub_id, kwargs.get('cache_dir'))
    elif cfg.file and not (cfg.source or cfg.state_dict or cfg.custom_load):
        loaded['state_dict'] = load_weights(cfg.file)
    try:
        model = timm.models.build_model_with_cfg(
            model_cls, variant, pretrained, pretrained_cfg, dict(pretrained_cfg_overlay or {}, **loaded), **kwargs)
    except RuntimeError as e:
        raise RuntimeError(f'Could not make {variant} with the weights from {source}. {e}') from e
    if loaded:
        for module in model.modules():  # a wrapper for feature maps has a config of its own
            getattr(module, 'pretrained_cfg', {}).pop('state_dict', None)
    return model


def _find_release(cfg: PretrainedCfg) -> Optional[Release]:
    """The release whose weights a config asks for, if nothing in it names another source."""
    name = f'{cfg.architecture}.{cfg.tag}'
    release = next((r for r in RELEASES if r.name == name), None)
    if release is not None:
        registered = get_pretrained_cfg(name)
        for k in ('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source'):
            if getattr(cfg, k) != getattr(registered, k):
                return None
    return release


def _load_published(
        release: Release,
        hub_id: str,
        cache_dir: Optional[Union[str, Path]],
) -> Tuple[Union[str, Path], Dict[str, torch.Tensor]]:
    """Load published weights from the first place that has them. Returns its name, and the state dict."""
    path = _release_path(release, cache_dir)
    failures = []
    if hub_id == f'timm/{release.name}':  # in a namespace of the user's, the Hub's weights may be others
        if _is_cached(release, path):
            return path, load_weights(path)
        failures.append(f'{path}: not there')

    hub = f'{hub_id} on {constants.ENDPOINT}'
    try:
        return hub, _load_from_hub(hub_id, cache_dir)
    except Exception as e:  # whatever HTTP library huggingface_hub uses
        cached = _find_cached_from_hub(hub_id, cache_dir)
        if cached:
            raise RuntimeError(
                f'The weights of {hub} cannot be read. {type(e).__name__}: {e} They must be a state dict, as '
                f'{HF_SAFE_WEIGHTS_NAME} or, without other Python objects, as {HF_WEIGHTS_NAME}. If {cached} was '
                f'damaged on this machine, delete it.') from e
        failures.append(_describe(hub, e))
        _logger.warning(f'Taking the weights of {release.name} from {release.url}, not from the Hub. {failures[-1]}')

    try:
        return path, load_weights(download_release(release, cache_dir))
    except Exception as e:
        failures.append(_describe(f'{release.url} to {path}', e))
        tried = '\n'.join(f'{i}. {failure}' for i, failure in enumerate(failures, 1))
        raise RuntimeError(
            f'Found no weights for {release.name}. Tried, in this order:\n{tried}\n'
            f'Set TIMM_HBONET_HUB_NAMESPACE or HF_ENDPOINT to a Hub that has them, or give a file with '
            f"`pretrained_cfg_overlay=dict(file='...')`. If a folder is read-only or full, set `cache_dir`, or "
            f'TORCH_HOME and HF_HOME, to another.') from e


def _describe(source: str, error: Exception) -> str:
    # the lines after these are general advice
    lines = [line for line in str(error).splitlines() if line][:2]
    return f'{source}: {type(error).__name__}: {" ".join(lines)}'


def _load_from_hub(hub_id: str, cache_dir: Optional[Union[str, Path]]) -> Dict[str, torch.Tensor]:
    if not _find_cached_from_hub(hub_id, cache_dir):
        # a download would try for minutes before it gives up on a Hub that cannot be reached
        repo_id, revision = hf_split(hub_id)
        try:
            get_hf_file_metadata(hf_hub_url(repo_id, HF_SAFE_WEIGHTS_NAME, revision=revision))
        except EntryNotFoundError:
            pass
    return load_state_dict_from_hf(hub_id, weights_only=True, cache_dir=cache_dir)


def _find_cached_from_hub(hub_id: str, cache_dir: Optional[Union[str, Path]]) -> Optional[str]:
    repo_id, revision = hf_split(hub_id)
    for filename in (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME):
        path = try_to_load_from_cache(repo_id, filename, cache_dir=cache_dir, revision=revision)
        if isinstance(path, str):
            return path
    return None


def _release_path(release: Release, cache_dir: Optional[Union[str, Path]]) -> Path:
    return Path(cache_dir or os.path.join(torch.hub.get_dir(), 'checkpoints')) / Path(release.path).name


def _is_cached(release: Release, path: Path) -> bool:
    try:
        release.verify(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except ValueError as e:
        _logger.warning(f'Deleting {path}, {e}.')
        path.unlink(missing_ok=True)  # another process may have done so
        return False
    return True


def download_release(release: Release, cache_dir: Optional[Union[str, Path]] = None) -> Path:
    """Get a checkpoint of the authors' release, from the cache or from its address, with its digests verified.

    Args:
        release: The checkpoint.
        cache_dir: Folder of the file, by default torch.hub's folder for checkpoints.

    Returns:
        Path of the file.

    Raises:
        ValueError: If the downloaded file does not have the released digests. It is deleted.
        OSError: If the file cannot be downloaded or written.
    """
    path = _release_path(release, cache_dir)
    if _is_cached(release, path):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'{path.name}.{uuid.uuid4().hex}.partial')
    try:
        with partial.open('wb') as f:
            # compressed, a connection that was cut could not be resumed
            http_get(release.url, f, headers={'Accept-Encoding': 'identity'}, displayed_filename=path.name)
        release.verify(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def load_weights(path: Union[str, Path]) -> Dict[str, torch.Tensor]:
    """Load a state dict from a file, without running code that is in it.

    Args:
        path: A safetensors file, or a file of `torch.save` with tensors and plain Python values only: a state dict, or
            a checkpoint of timm's `train.py`.

    Raises:
        FileNotFoundError: If there is no such file.
        RuntimeError: If the file is none of these.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f'There is no file {path} to load weights from.')
    try:
        return timm.models.load_state_dict(path, weights_only=True)
    except Exception as e:
        with open(path, 'rb') as f:
            start = f.read(64)
        if not start:
            found = 'it is empty'
        elif start.lstrip()[:1] in (b'{', b'[', b'<') or start.startswith(b'version https://git-lfs'):
            found = f'it is text that starts with {start!r}'
        else:
            found = f'{type(e).__name__}: {e}'.rstrip('.')
        raise RuntimeError(
            f'Cannot load weights from {path}: {found}. It must be a safetensors file, or a state dict of tensors that '
            f'was saved with `torch.save`.') from e
