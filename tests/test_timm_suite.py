"""timm's own model tests, of the installed version and unedited, run for the HBONet models.

They come from timm's source distribution, which pip downloads once into pytest's cache folder.
"""
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
import timm

# all that timm asks of every model, and how many of ours it asks: 11 architectures, 19 pretrained tags
EXPECTED = {
    'test_model_forward': 11,
    'test_model_backward': 11,
    'test_model_default_cfgs': 19,
    'test_model_load_pretrained': 19,
    'test_model_features_pretrained': 19,
    'test_model_forward_torchscript': 11,
    'test_model_forward_features': 11,
    'test_model_forward_intermediates_features': 11,
    'test_model_forward_intermediates': 11,
    'test_prune_intermediate_layers_contract': 11,
    'test_model_forward_fx': 11,
    'test_model_backward_fx': 11,
    'test_model_forward_fx_torchscript': 11,
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
        sys.executable, '-m', 'pytest', '-p', 'timm_suite_plugin', 'tests/test_models.py', '-k', 'hbonet', '-q',
        '-p', 'no:cacheprovider', '--tb=short', f'--junitxml={report}']
    environment = {**os.environ, 'PYTHONPATH': str(Path(__file__).parent)}
    environment.pop('GITHUB_ACTIONS', None)  # timm leaves out the pretrained tests where it is set
    environment.pop('PYTEST_ADDOPTS', None)
    done = subprocess.run(command, cwd=timm_source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    cases = list(ElementTree.parse(report).iter('testcase'))
    passed = Counter(case.get('name').split('[')[0] for case in cases if not len(case))
    assert passed == EXPECTED
