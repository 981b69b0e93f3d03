"""The 19 checkpoints that the authors released with the paper: where they are, how to check them, what they score.

Sources: https://github.com/d-li14/HBONet at the pinned commit and its README, tables 2 to 6 of arXiv:1908.03888.

Two environment variables are read when this is imported. `TIMM_HBONET_HUB_NAMESPACE` ('ORG' or 'ORG@REVISION') is the
namespace of the Hugging Face Hub that has the weights, 'timm' if not set. `TIMM_HBONET_RELEASES` is the path of a JSON
file that replaces the table, for a mirror of the release: 'repository', 'commit', and 'checkpoints', a list of objects
with the attributes of `Release`, where `macs` is 'computed_macs'.
"""
import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple, Optional, Tuple, Union

__all__ = ['COMMIT', 'RELEASES', 'REPOSITORY', 'Release']

REPOSITORY = 'https://github.com/d-li14/HBONet'
COMMIT = 'e9a76c15e3847b0f032a7000fe0c8138d6f2eb10'

_NAMESPACE = os.environ.get('TIMM_HBONET_HUB_NAMESPACE') or 'timm'


class Release(NamedTuple):
    """A released checkpoint.

    Attributes:
        name: Name in timm, architecture and tag.
        path: Path in the authors' repository.
        git_blob: Git blob id of the file, SHA-1 of its size and content in hex.
        input_size: Height and width of the images that it was trained and scored on.
        top1: Published top-1 accuracy on ImageNet-1k validation in percent, of a single centre crop.
        top5: Published top-5 accuracy in percent.
        published_mflops: Published multiply-adds in millions.
        macs: Multiply-adds of convolutions and classifier, computed from the architecture.
        table: Table of the paper.
        sha384: SHA-384 of the file in hex, where a second party has published it.
    """
    name: str
    path: str
    git_blob: str
    input_size: int
    top1: float
    top5: float
    published_mflops: int
    macs: int
    table: str
    sha384: Optional[str] = None

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
        git_blob = hashlib.sha1(b'blob %d\0' % os.path.getsize(path))
        sha384 = hashlib.sha384()
        with open(path, 'rb') as f:
            while chunk := f.read(1 << 20):
                git_blob.update(chunk)
                sha384.update(chunk)
        for digest, found, expected in (
                ('git blob id', git_blob.hexdigest(), self.git_blob),
                ('SHA-384', sha384.hexdigest(), self.sha384),
        ):
            if expected and found != expected:
                raise ValueError(f'the {digest} is {found}, but that of {self.name} is {expected}')


RELEASES = (
    Release(
        'hbonet_100.in1k', 'pretrained/hbonet_1_0.pth', '7414b8c39d9e82b8d4922086c4f99e9ac9e384f6',
        224, 73.1, 91.0, 305, 305572480, '2',
        '27ea1715505128c6dd1cf22cc57e629b0f8c2acf7f9246894c5c003091b415e3f494cee156c7dbd330f5d6affce700ab',
    ),
    Release(
        'hbonet_080.in1k', 'pretrained/hbonet_0_8.pth', 'c46ebaf81af544b59c31497ec22f6b71210e07d4',
        224, 71.3, 89.7, 205, 204588576, '2, 3',
    ),
    Release(
        'hbonet_050.in1k', 'pretrained/hbonet_0_5.pth', '314ef51c531bad4fb76ea8eb0ace01b364a68ac1',
        224, 67.0, 86.9, 96, 96390304, '2',
        '3aeecf2621a52826a166bb9c7b0fb300964da0af407b63e3cf979e775510144fc38931fd9a08cf724fe3139fc878d4db',
    ),
    Release(
        'hbonet_035.in1k', 'pretrained/hbonet_0_35.pth', 'c9f111a1e9a2b144282472a4ff9cb6f6f3f1e664',
        224, 62.4, 83.7, 61, 60861776, '2, 4',
    ),
    Release(
        'hbonet_025.in1k', 'pretrained/hbonet_0_25.pth', '594ab57232e911dbf8143e31d14a02bcfaee2171',
        224, 57.3, 79.8, 37, 36511912, '2',
        '836c1fe7b0e1ba55db92e7e1deb15641afac1f3ac7975d8a7bfa7bd08e407d4a7664b2eb7149553f1e241cd424adb5fc',
    ),
    Release(
        'hbonet_010.in1k', 'pretrained/hbonet_0_1.pth', 'b3d6c5d058e4a42e23bbfe354dfe4e28f945a6a5',
        224, 41.5, 65.7, 14, 13674384, '2',
    ),
    Release(
        'hbonet_080.r192_in1k', 'pretrained/hbonet_0_8_192x192.pth', '8bbabc116ddfcd4a5084f43d5b37bd5376f4edde',
        192, 70.0, 89.2, 150, 150734464, '3',
    ),
    Release(
        'hbonet_080.r160_in1k', 'pretrained/hbonet_0_8_160x160.pth', '41c5f1023a3338a87efcb4620ee07135802c9cf2',
        160, 68.3, 87.8, 105, 105165600, '3',
    ),
    Release(
        'hbonet_080.r128_in1k', 'pretrained/hbonet_0_8_128x128.pth', '40c3724180e00e9f4500a6a5fedb368ea82b55c3',
        128, 65.5, 85.9, 68, 67881984, '3',
    ),
    Release(
        'hbonet_080.r96_in1k', 'pretrained/hbonet_0_8_96x96.pth', 'b145d76e9281b93720a9c18305d04003900844be',
        96, 61.4, 83.0, 39, 38883616, '3',
    ),
    Release(
        'hbonet_035.r192_in1k', 'pretrained/hbonet_0_35_192x192.pth', '383337af685b2e100bf7928c609f84fc69da1843',
        192, 60.9, 82.6, 45, 45139264, '4',
    ),
    Release(
        'hbonet_035.r160_in1k', 'pretrained/hbonet_0_35_160x160.pth', '7a640d3859b50f1e2bd30c7169b3de1065485f6d',
        160, 58.6, 80.7, 31, 31835600, '4',
    ),
    Release(
        'hbonet_035.r128_in1k', 'pretrained/hbonet_0_35_128x128.pth', '3e630e41efe98877465ebbe302ce1fda8b7f5a94',
        128, 55.2, 78.0, 21, 20950784, '4',
    ),
    Release(
        'hbonet_035.r96_in1k', 'pretrained/hbonet_0_35_96x96.pth', '7573489c50d0e7dcc698d209acab606e07f2cc76',
        96, 50.3, 73.8, 12, 12484816, '4',
    ),
    Release(
        'hbonet_050_d8.in1k', 'pretrained/variant/hbonet_0_5_8_divisible.pth',
        '0b6d5fa2f7534b952d3b6e8857401be9f8a648e9',
        224, 67.7, 87.4, 98, 108166768, '5',
    ),
    Release(
        'hbonet_060.r192_in1k', 'pretrained/variant/hbonet_0_6_192x192.pth', '8980e46f7e2a3479b98d2ee81f5a7a863397d014',
        192, 67.3, 87.3, 108, 97673920, '5',
    ),
    Release(
        'hbonet_025_d8.in1k', 'pretrained/variant/hbonet_0_25_8_divisible.pth',
        '21d65af0058a11e626adaeb4d4f5c842ddfe466c',
        224, 58.3, 80.6, 44, 44097504, '6',
    ),
    Release(
        'hbonet_025_4x_d8.in1k', 'pretrained/variant/hbonet_0_25_4x_8_divisible.pth',
        '3162e5b2d91c07858786619a0d90d5d28f6ecce0',
        224, 59.3, 81.4, 45, 45350336, '6',
    ),
    Release(
        'hbonet_025_8x_d8.in1k', 'pretrained/variant/hbonet_0_25_8x_8_divisible.pth',
        'ef78dbd1671524bc1751dc2d3d763ccc197e1f21',
        224, 58.2, 80.4, 45, 45328384, '6',
    ),
)


def _read_table(path: str) -> Tuple[str, str, Tuple[Release, ...]]:
    try:
        table = json.loads(Path(path).read_text(encoding='utf-8'))
        releases = tuple(
            Release(**{k: v for k, v in dict(entry, macs=entry['computed_macs']).items() if k in Release._fields})
            for entry in table['checkpoints'])
        return table['repository'], table['commit'], releases
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ValueError(
            f'TIMM_HBONET_RELEASES is {path!r}, which cannot be used as a table of releases. {type(e).__name__}: {e}. '
            f"It must be a JSON file with 'repository', 'commit' and 'checkpoints'.") from e


if os.environ.get('TIMM_HBONET_RELEASES'):
    REPOSITORY, COMMIT, RELEASES = _read_table(os.environ['TIMM_HBONET_RELEASES'])
