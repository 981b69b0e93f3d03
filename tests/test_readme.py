"""The figures of the README are those of the models and of the table of releases."""
import re
from pathlib import Path

import timm
from reference import ARCHITECTURES, CHECKPOINTS

README = (Path(__file__).parents[1] / 'README.md').read_text()


def test_table_of_models():
    rows = re.findall(r'^\| `(hbonet_\w+\.\w+)` \| (.+) \|$', README, re.MULTILINE)
    expected = {
        c['name']: [
            str(c['input_size']), str(c['top1']), str(c['top5']), f'{c["computed_macs"] / 1e6:.1f}',
            f'{ARCHITECTURES[c["name"].split(".")[0]]["params"] / 1e6:.2f}']
        for c in CHECKPOINTS
    }
    assert {name: cells.split(' | ') for name, cells in rows} == expected and len(rows) == 19


def test_channels_of_features():
    channels = timm.create_model('hbonet_100', features_only=True).feature_info.channels()
    assert f'backbone.feature_info.channels()   # {channels}' in README
