"""Stand-ins for the authors' files, which no test can have: weights that anyone can recreate, under other digests.

A process that is to find them in place of the release calls `use()`. What it asks https://github.com for goes to the
address that TEST_RELEASE_URL has in the environment, and TEST_RELEASE_DIGESTS has the path of a JSON file with the
digests.
"""
import io
import json
import os
import urllib.request
from functools import lru_cache
from http.client import HTTPResponse
from pathlib import Path
from typing import Optional

import reference
import torch
from hub_server import git_blob_id

GITHUB = 'https://github.com/'


class _Redirect(urllib.request.BaseHandler):
    handler_order = 0  # before all others

    def default_open(self, request: urllib.request.Request) -> Optional[HTTPResponse]:
        if request.full_url.startswith(GITHUB):
            url = f'{os.environ["TEST_RELEASE_URL"]}/{request.full_url.removeprefix(GITHUB)}'
            return self.parent.open(urllib.request.Request(url, headers=dict(request.headers)), timeout=request.timeout)
        return None


@lru_cache(maxsize=None)
def _release_file(architecture: str) -> bytes:
    file = io.BytesIO()
    weights = reference.release_state_dict(architecture, torch.float32)
    torch.save(weights, file, _use_new_zipfile_serialization=False)  # the authors' format
    return file.getvalue()


def release_file(name: str) -> bytes:
    """Stand-in for a released checkpoint: recreated weights in the release's layout."""
    return _release_file(name.split('.')[0])


def write_digests() -> None:
    """Write the file of digests."""
    digests = {entry['model']: git_blob_id(release_file(entry['model'])) for entry in reference.CHECKPOINTS}
    Path(os.environ['TEST_RELEASE_DIGESTS']).write_text(json.dumps(digests))


def use() -> None:
    """Have this process find the stand-ins where the release is."""
    from timm.models._registry import _model_pretrained_cfgs

    import timm_hbonet  # noqa: F401  registers

    for name, digest in json.loads(Path(os.environ['TEST_RELEASE_DIGESTS']).read_text()).items():
        cfg = _model_pretrained_cfgs[name]
        cfg.url = f'{cfg.url.partition("#")[0]}#{digest}'
    urllib.request.install_opener(urllib.request.build_opener(_Redirect()))
