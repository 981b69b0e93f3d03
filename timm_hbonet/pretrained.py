"""Where published weights come from: the Hugging Face Hub, else the authors' release, verified."""
import logging
import os
import re
from functools import partial
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Callable, Dict, Optional, Union
from urllib.error import URLError

import timm.models
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled
from safetensors import SafetensorError
from torch import Tensor, nn

from .releases import check_release, download_release, get_release_name, get_release_path

_logger = logging.getLogger(__name__)
_ERRORS = (OSError, HTTPException, *HfHubHTTPError.__bases__)  # the client's HTTP library differs between versions
_ANSWERS = (URLError, HfHubHTTPError, EntryNotFoundError, OfflineModeIsEnabled)


def build_model_with_cfg(model_cls: Callable, variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """Build a model as timm's function does, published weights by `find_weights`. RuntimeError if those do not fit."""
    build = partial(timm.models.build_model_with_cfg, model_cls, variant, pretrained)
    overlay = kwargs.get('pretrained_cfg_overlay') or {}
    name = pretrained and get_release_name(
        timm.models.resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), overlay))
    if not name:
        return build(**kwargs)
    if kwargs.get('spatial_expansion', 'nearest') != 'nearest':
        raise ValueError(f"The weights of {name} are for spatial_expansion='nearest'. Use that, or pretrained=False.")
    filter_fn = kwargs.pop('pretrained_filter_fn')

    def filter_strictly(state_dict: Dict[str, Tensor], model: nn.Module) -> Dict[str, Tensor]:
        state_dict = filter_fn(state_dict, model)
        names = state_dict.keys() ^ model.state_dict().keys()
        differing = [k for k in names if not re.match(r'classifier\.|.*\.num_batches_tracked', k)]
        if differing and kwargs.get('pretrained_strict', True):  # timm is not, where it replaces the classifier
            raise RuntimeError(f'{len(differing)} tensors are missing or unknown, such as {min(differing)}.')
        return state_dict

    file = find_weights(name, kwargs.get('cache_dir'))
    kwargs.update(pretrained_filter_fn=filter_strictly, pretrained_cfg_overlay={**overlay, 'file': file})
    try:
        return build(**kwargs)
    except (AttributeError, EOFError, LookupError, RuntimeError, SafetensorError, UnpicklingError) as e:
        raise RuntimeError(f'Cannot use {file} as the weights of {name}. {type(e).__name__}: {e}') from e


def find_weights(name: str, cache_dir: Optional[Union[str, Path]] = None) -> str:
    """Get a file with the weights of a tag ('hbonet_100.in1k'): the release in the cache, the Hub's, the release.

    Raises:
        ValueError: If TIMM_HBONET_HUB_NAMESPACE in the environment is not 'ORG' or 'ORG@REVISION'.
        RuntimeError: If there is none.
    """
    namespace = os.environ.get('TIMM_HBONET_HUB_NAMESPACE') or 'timm'
    if not re.fullmatch(r'(?![^@]{64})[A-Za-z0-9]+([._-][A-Za-z0-9]+)*(@[^@\s]+)?', namespace):
        raise ValueError(f"TIMM_HBONET_HUB_NAMESPACE must be 'ORG' or 'ORG@REVISION', got {namespace!r}.")
    path = get_release_path(name, cache_dir)
    problem = check_release(path, name)
    if not problem and namespace == 'timm':  # another may have other weights
        return str(path)
    failures = [f'{path}: {problem}'] if problem else []
    namespace, at, revision = namespace.partition('@')
    for source, download in {
            f'{namespace}/{name}{at}{revision} on {constants.ENDPOINT}':
                partial(_download_from_hub, f'{namespace}/{name}', revision or None, cache_dir),
            f"the authors' release, to {path}": partial(download_release, name, cache_dir),
    }.items():
        for _ in range(2):  # a connection that was cut may hold now
            try:
                return str(download())
            except _ERRORS as e:
                error = e
                if isinstance(e, _ANSWERS) or 'Timeout' in type(e).__name__:
                    break
        failures.append(f'{source}: {type(error).__name__}: {" ".join(str(error).split())[:500]}')
        _logger.warning(f'No weights of {name} from {failures[-1]}')
    tried = '\n'.join(f'{i}. {failure}' for i, failure in enumerate(failures, 1))
    raise RuntimeError(
        f'Found no weights for {name}. Tried, in this order:\n{tried}\nSet TIMM_HBONET_HUB_NAMESPACE or HF_ENDPOINT to '
        f"a Hub that has them, `pretrained_cfg_overlay=dict(file='...')` to a file, or `cache_dir`, or TORCH_HOME and "
        f'HF_HOME, to a folder that is not read-only or full.') from error


def _download_from_hub(repo: str, revision: Optional[str], cache_dir: Optional[Union[str, Path]]) -> str:
    files = ('model.safetensors', 'pytorch_model.bin')
    cached = [file for file in files if isinstance(try_to_load_from_cache(repo, file, cache_dir, revision), str)]
    for file in (*cached, *files):
        try:
            if file not in cached:  # a download tries for minutes before it gives up on a Hub that does not answer
                get_hf_file_metadata(hf_hub_url(repo, file, revision=revision), timeout=constants.HF_HUB_ETAG_TIMEOUT)
            return hf_hub_download(repo, file, revision=revision, cache_dir=cache_dir)
        except EntryNotFoundError as e:
            error = e
    raise error
