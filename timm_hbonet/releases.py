"""The 19 checkpoints that the authors released with the paper: where they are, how to check them, what they score.

Sources: https://github.com/d-li14/HBONet at the pinned commit and its README, tables 2 to 6 of arXiv:1908.03888.

Two environment variables are read when this is imported. `TIMM_HBONET_HUB_NAMESPACE` ('ORG' or 'ORG@REVISION') is the
namespace of the Hugging Face Hub that has the weights, 'timm' if not set. `TIMM_HBONET_RELEASES` is the path of a JSON
file to use in place of releases.json, for a mirror of the release.
"""
import hashlib
import json
import os
import re
from pathlib import Path
from typing import NamedTuple, Optional, Union

__all__ = ['COMMIT', 'RELEASES', 'REPOSITORY', 'Release']

_NAMESPACE = os.environ.get('TIMM_HBONET_HUB_NAMESPACE') or 'timm'
if not re.fullmatch(r'[\w.-]+(@[^@\s]+)?', _NAMESPACE):
    raise ValueError(f"TIMM_HBONET_HUB_NAMESPACE must be 'ORG' or 'ORG@REVISION', got {_NAMESPACE!r}.")


class Release(NamedTuple):
    """A released checkpoint."""
    name: str  # in timm, architecture and tag
    path: str  # in the authors' repository
    git_blob: str  # git blob id of the file, SHA-1 of its size and content in hex
    input_size: int  # height and width of the images that it was trained and scored on
    top1: float  # published top-1 accuracy on ImageNet-1k validation in percent, of a single centre crop
    top5: float  # published top-5 accuracy in percent
    published_mflops: int  # published multiply-adds in millions
    macs: int  # multiply-adds of convolutions and classifier, computed from the architecture
    table: str  # of the paper
    sha384: Optional[str] = None  # SHA-384 of the file in hex, where a second party has published it

    @property
    def url(self) -> str:
        return f'{REPOSITORY}/raw/{COMMIT}/{self.path}'

    @property
    def hf_hub_id(self) -> str:
        namespace, at, revision = _NAMESPACE.partition('@')
        return f'{namespace}/{self.name}{at}{revision}'

    def verify(self, path: Union[str, Path]) -> None:
        """Compare a file's digests with the released ones, without opening it as a checkpoint.

        Raises:
            ValueError: If a digest differs.
        """
        content = Path(path).read_bytes()
        for digest, found, expected in (
                ('git blob id', hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest(), self.git_blob),
                ('SHA-384', hashlib.sha384(content).hexdigest(), self.sha384),
        ):
            if expected and found != expected:
                raise ValueError(f'the {digest} is {found}, but that of {self.name} is {expected}')


_path = Path(os.environ.get('TIMM_HBONET_RELEASES') or Path(__file__).with_name('releases.json'))
try:
    _table = json.loads(_path.read_text(encoding='utf-8'))
    REPOSITORY, COMMIT = _table['repository'], _table['commit']
    RELEASES = tuple(
        Release(macs=entry['computed_macs'], **{k: v for k, v in entry.items() if k in Release._fields})
        for entry in _table['checkpoints'])
except (OSError, ValueError, KeyError, TypeError) as e:
    raise ValueError(
        f'{_path} cannot be used as a table of releases. {type(e).__name__}: {e}. TIMM_HBONET_RELEASES must be the '
        f"path of a JSON file with 'repository', 'commit' and 'checkpoints'.") from e
