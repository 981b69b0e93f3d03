"""One small Hub on loopback for all tests, which also plays the site of the authors' release, with recreated weights.

The environment is set before anything that reads it is imported: no test reaches another Hub, the release, or the
user's caches and tokens. Child processes inherit it.
"""
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Callable, Dict

import pytest
import reference
import torch
from hub_server import HubServer, git_blob_id

COMMIT = reference.RELEASE['commit']
_SERVER = HubServer()
_HOME = Path(tempfile.mkdtemp(prefix='timm_hbonet_'))


@lru_cache(maxsize=None)
def _release_file(architecture: str) -> bytes:
    file = io.BytesIO()
    weights = reference.release_state_dict(architecture, torch.float32)
    torch.save(weights, file, _use_new_zipfile_serialization=False)  # the authors' format
    return file.getvalue()


def release_file(name: str) -> bytes:
    """Stand-in for a released checkpoint: recreated weights in the release's layout."""
    return _release_file(name.split('.')[0])


def write_release_table(path: Path, repository: str) -> Path:
    """Table of releases for TIMM_HBONET_RELEASES, with the digests of the stand-ins."""
    checkpoints = []
    for entry in reference.CHECKPOINTS:
        digests = {'git_blob': git_blob_id(release_file(entry['name'])), 'sha384': None}
        checkpoints.append({**entry, **digests})
    path.write_text(json.dumps({**reference.RELEASE, 'repository': repository, 'checkpoints': checkpoints}))
    return path


def pytest_configure() -> None:
    _SERVER.__enter__()
    for k in list(os.environ):
        if k.startswith(('HF_', 'HUGGING_FACE_', 'TIMM_HBONET_')):
            del os.environ[k]
    os.environ.update(
        HF_ENDPOINT=_SERVER.url,
        HF_HOME=str(_HOME / 'huggingface'),
        HF_HUB_DISABLE_TELEMETRY='1',
        HF_HUB_DISABLE_XET='1',
        HF_HUB_ETAG_TIMEOUT='3',
        NO_PROXY=','.join(filter(None, [os.environ.get('NO_PROXY'), '127.0.0.1'])),
        OMP_NUM_THREADS='1',
        TIMM_HBONET_RELEASES=str(write_release_table(_HOME / 'releases.json', f'{_SERVER.url}/d-li14/HBONet')),
        TORCH_HOME=str(_HOME / 'torch'),
    )
    torch.set_num_threads(1)


def pytest_unconfigure() -> None:
    _SERVER.__exit__()
    shutil.rmtree(_HOME, ignore_errors=True)


@pytest.fixture
def server() -> HubServer:
    """The Hub, without repositories, and the site of the release, with all its files."""
    _SERVER.reset()
    for entry in reference.CHECKPOINTS:
        _SERVER.pages[f'/d-li14/HBONet/raw/{COMMIT}/{entry["path"]}'] = release_file(entry['name'])
    return _SERVER


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Function that runs Python code in a process of its own, where its keyword arguments are in the environment."""

    def run(code: str, **environment: str) -> subprocess.CompletedProcess:
        env: Dict[str, str] = {**os.environ, **environment}
        command = [sys.executable, '-c', code]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)

    return run
