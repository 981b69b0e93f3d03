"""timm's own model tests, of the installed version and unedited, run for the HBONet models.

They come from timm's source distribution, which pip downloads once into pytest's cache folder.
"""
import os
import re
import subprocess
import sys
import tarfile
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest
import timm
from reference import ARCHITECTURES
from timm_suite_plugin import KINDS, TRACED

# some of what timm asks of models, by names that it has kept for years
FEATURES = ('forward_features', 'forward_intermediates', 'forward_intermediates_features')
REQUIRED = {
    **dict.fromkeys(('forward', 'backward', *FEATURES), set(ARCHITECTURES)),
    **dict.fromkeys(('default_cfgs', 'load_pretrained', 'features_pretrained'), KINDS),
    **dict.fromkeys(('forward_torchscript', 'forward_fx', 'backward_fx'), TRACED),
}


@pytest.fixture(scope='session')
def timm_source(pytestconfig):
    folder = Path(pytestconfig.cache.mkdir('timm'))
    source = folder / f'timm-{timm.__version__}'
    if not source.is_dir():
        command = [
            sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', 'timm',
            f'timm=={timm.__version__}', '--dest', str(folder)]
        subprocess.run(command, check=True, timeout=240)
        with tarfile.open(folder / f'{source.name}.tar.gz') as archive:
            archive.extractall(folder, filter='data')
    return source


@pytest.mark.timeout(900)
def test_timm_suite(timm_source, server, tmp_path):
    report = tmp_path / 'report.xml'
    command = [
        sys.executable, '-m', 'pytest', '-p', 'timm_suite_plugin', 'tests/test_models.py', '-q',
        '-p', 'no:cacheprovider', '--tb=short', f'--junitxml={report}']
    environment = {**os.environ, 'PYTHONPATH': str(Path(__file__).parent)}
    environment.pop('GITHUB_ACTIONS', None)  # timm leaves out the pretrained tests where it is set
    environment.pop('PYTEST_ADDOPTS', None)
    done = subprocess.run(command, cwd=timm_source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = defaultdict(set)
    for case in ElementTree.parse(report).iter('testcase'):
        if not len(case):
            test, _, parameters = case.get('name').partition('[')
            passed[test.removeprefix('test_model_')].add(re.search(r'hbonet_\w+', parameters)[0])
    assert {test: passed[test] for test in REQUIRED} == REQUIRED
