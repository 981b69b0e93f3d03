"""Where published weights come from: the Hugging Face Hub, else the authors' release, verified."""
import hashlib
import logging
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Callable, Optional, Union
from urllib.request import urlopen

import torch
from huggingface_hub import constants, file_exists, hf_hub_download, try_to_load_from_cache
from huggingface_hub.utils import OfflineModeIsEnabled, tqdm
from timm import models

_logger = logging.getLogger(__name__)


def build_model_with_cfg(model_cls: Callable[..., Any], variant: str, pretrained: bool, **kwargs: Any) -> Any:
    """Build a model as timm's function does, the weights of a cfg as registered from where `find_weights` has them."""
    cfg = models.resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    name, sources = f'{cfg.architecture}.{cfg.tag}', ('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename')
    if not pretrained or not models.is_model_pretrained(name) or any(
            getattr(cfg, k) != getattr(models.get_pretrained_cfg(name), k) for k in sources):
        return models.build_model_with_cfg(model_cls, variant, pretrained, **kwargs)
    if kwargs.get('spatial_expansion') == 'deconv':
        raise ValueError(f"The weights of {name} need spatial_expansion='nearest', got 'deconv'.")
    cfg.file = find_weights(name, kwargs.get('cache_dir'))
    kwargs.update(pretrained_cfg=cfg, pretrained_cfg_overlay=None)
    model = models.build_model_with_cfg(model_cls, variant, pretrained, **kwargs)
    for module in model.modules():  # features can be a model around a model
        getattr(module, 'pretrained_cfg', {}).pop('file', None)  # other machines do not have it
    return model


def find_weights(name: str, cache_dir: Optional[Union[str, Path]] = None) -> str:
    """Get a file with the weights of a tag ('hbonet_100.in1k'). RuntimeError, with all that was tried, if none has."""
    namespace = os.environ.get('TIMM_HBONET_HUB_NAMESPACE') or 'timm'
    if not (match := re.fullmatch(r'([A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*)(?:@([^@\s]+))?', namespace)):
        raise ValueError(f"TIMM_HBONET_HUB_NAMESPACE must be 'ORG' or 'ORG@REVISION', got {namespace!r}.")
    repo, revision, path = f'{match[1]}/{name}', match[2], get_release_path(name, cache_dir)
    sources = (
        (path, lambda: verify_release(path, name)),
        (f'{repo} on {constants.ENDPOINT}', lambda: _download_from_hub(repo, revision, cache_dir)),
        (f"the authors' release, to {path}", lambda: download_release(name, cache_dir)),
    )
    lines = [f'Found no weights for {name}. Tried, in this order:']
    for source, get in sources[namespace != 'timm':]:  # another namespace can have other weights than the release
        try:
            return str(get())
        except Exception as e:  # the Hub's client raises what its HTTP library does, which differs between versions
            lines.append(f'{len(lines)}. {source}: {type(e).__name__}: {" ".join(str(e).split())[:500]}')
            # none published there yet is no fault, to strangers the Hub calls that an invalid username
            is_usual = namespace == 'timm' and re.search('FileNotFound|RepositoryNotFound|Invalid username', lines[-1])
            _logger.log(logging.INFO if is_usual else logging.WARNING, f'No weights of {name} from {lines[-1][3:]}')
    url = models.get_pretrained_cfg(name).url.partition('#')[0]
    raise RuntimeError('\n'.join([*lines, f"Download {url}, and pass `pretrained_cfg_overlay=dict(file='...')`. Or set "
        'TIMM_HBONET_HUB_NAMESPACE or HF_ENDPOINT to a Hub that has them, or `cache_dir` to a writable folder.']))


def _download_from_hub(repo: str, revision: Optional[str], cache_dir: Optional[Union[str, Path]]) -> str:
    files = ('model.safetensors', 'pytorch_model.bin')
    cached = next((f for f in files if isinstance(try_to_load_from_cache(repo, f, cache_dir, revision), str)), None)
    file = cached or files[not file_exists(repo, files[0], revision=revision)]  # without this, retries take minutes
    return hf_hub_download(repo, file, revision=revision, cache_dir=cache_dir)


def get_release_path(name: str, cache_dir: Optional[Union[str, Path]] = None) -> Path:
    """Where the checkpoint `name` is kept, by default in torch.hub's folder, under a name of our own."""
    url, _, blob = models.get_pretrained_cfg(name).url.partition('#')
    return Path(cache_dir or os.path.join(torch.hub.get_dir(), 'checkpoints'), f'{Path(url).stem}-{blob[:8]}.pth')


def verify_release(path: Path, name: str) -> Path:
    """Returns the path of a file, unopened, if it is the checkpoint `name`. ValueError or OSError if not."""
    content, expected = path.read_bytes(), models.get_pretrained_cfg(name).url.partition('#')[2]
    if (blob := hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()) != expected:
        raise ValueError(f'the git blob id is {blob}, not {expected}, of {len(content)} bytes: {content[:20]!r}')
    return path


def download_release(name: str, cache_dir: Optional[Union[str, Path]] = None) -> Path:
    """Get the checkpoint `name`, verified, from the cache or the authors' repository. Nothing is left if that fails."""
    path, url = get_release_path(name, cache_dir), models.get_pretrained_cfg(name).url
    with suppress(FileNotFoundError, ValueError):  # what is damaged is replaced, what may not be read is not
        return verify_release(path, name)
    if constants.HF_HUB_OFFLINE:
        raise OfflineModeIsEnabled(f'HF_HUB_OFFLINE is set, {url} is not asked')
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f'{path.name}.', dir=path.parent) as scratch:
        file = Path(scratch, path.name)
        with urlopen(url, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response, file.open('wb') as f:
            with tqdm.wrapattr(f, 'write', total=response.length, desc=path.name) as progress:
                shutil.copyfileobj(response, progress)
        return verify_release(file, name).replace(path)
