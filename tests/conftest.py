"""One small Hub on loopback for all tests, which also plays the site of the authors' release, with recreated weights.

The environment is set before anything that reads it is imported: no test reaches another Hub, or the user's caches and
tokens. Child processes inherit it. The release itself is out of reach where `stand_ins.use()` was called.
"""
import os
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Dict

import pytest
import reference
import stand_ins
import torch
from hub_server import HubServer
from stand_ins import release_file

_SERVER = HubServer()
_HOME = Path(tempfile.mkdtemp(prefix='timm_hbonet_'))


def pytest_configure() -> None:
    _SERVER.__enter__()
    for k in list(os.environ):
        if k.startswith(('HF_', 'HUGGING_FACE_', 'TIMM_HBONET_')):
            del os.environ[k]
    os.environ.update(
        HF_ENDPOINT=_SERVER.url,
        HF_HUB_DISABLE_TELEMETRY='1',
        HF_HUB_DISABLE_XET='1',
        HF_HUB_DOWNLOAD_TIMEOUT='3',
        HF_HUB_ETAG_TIMEOUT='3',
        NO_PROXY=','.join(filter(None, [os.environ.get('NO_PROXY'), '127.0.0.1'])),
        OMP_NUM_THREADS='1',
        TEST_RELEASE_DIGESTS=str(_HOME / 'digests.json'),
        TEST_RELEASE_URL=_SERVER.url,
        **_caches(_HOME),
    )
    torch.set_num_threads(1)


def pytest_unconfigure() -> None:
    _SERVER.__exit__()
    shutil.rmtree(_HOME, ignore_errors=True)


def _caches(folder: Path) -> Dict[str, str]:
    return {'HF_HOME': str(folder / 'huggingface'), 'TORCH_HOME': str(folder / 'torch')}


@lru_cache(maxsize=None)
def _use_stand_ins() -> None:
    stand_ins.write_digests()
    stand_ins.use()


@pytest.fixture
def release_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The server with all files of the release, a Hub without repositories, and empty caches."""
    _use_stand_ins()
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'huggingface/hub'))
    for name, folder in _caches(tmp_path).items():
        monkeypatch.setenv(name, folder)
    _SERVER.reset()
    for entry in reference.CHECKPOINTS:
        _SERVER.pages['/' + entry['url'].removeprefix(stand_ins.GITHUB)] = release_file(entry['model'])
    return _SERVER


@pytest.fixture
def server(release_site: HubServer) -> HubServer:
    """The server, with weights of all 19 on the Hub for `pretrained=True` in this process and in others."""
    for entry in reference.CHECKPOINTS:
        release_site.add_repository(f'timm/{entry["model"]}', {'pytorch_model.bin': release_file(entry['model'])})
    return release_site
