"""Published weights arrive and are the right ones, or an error says why not and what to do."""
import contextlib
import io
import json
import logging
import math
import os
import pickle
import re
import tempfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import reference
import safetensors.torch
import timm
import torch
from hub_server import TOKEN, git_blob_id
from huggingface_hub import constants
from packaging.version import Version
from PIL import Image
from stand_ins import release_file
from timm.data import create_transform, resolve_data_config
from timm.models import get_pretrained_cfg

import timm_hbonet
from timm_hbonet.hbonet import default_cfgs
from timm_hbonet.weights import download_release, find_weights, get_release_path, verify_release

NAMES = [entry['model'] for entry in reference.CHECKPOINTS]
NAME = 'hbonet_010.in1k'  # the smallest
HUB_ID = f'timm/{NAME}'
RELEASE_FILE = '/d-li14/HBONet/raw/*/hbonet_0_1.pth'


@pytest.fixture
def server(release_site):
    """The release, and a Hub without repositories."""
    return release_site


def create(name=NAME, **kwargs):
    return timm.create_model(name, pretrained=True, **kwargs).eval()


def assert_reference(model, name=NAME):
    """Compare logits with those of the authors' network."""
    case = reference.find_case(name, 224, 224)
    with torch.inference_mode():
        logits = model(reference.case_input(case, torch.float32))
    reference.assert_close(logits, case['logits'], 1e-4)


@lru_cache(maxsize=None)
def converted():
    """Recreated weights of the release in our layout."""
    model = timm.create_model(NAME)
    model.load_state_dict(reference.release_state_dict(NAME, torch.float32))
    return model.state_dict()


def publish(server, changes=(), repo_id=HUB_ID, revision='main'):
    """Put weights on the Hub, with other tensors or without some (None)."""
    config = {'architecture': 'hbonet_010', 'num_classes': 1000, 'pretrained_cfg': {
        'first_conv': get_pretrained_cfg(NAME).first_conv, 'classifier': 'classifier'}}
    tensors = {k: v for k, v in {**converted(), **dict(changes)}.items() if v is not None}
    files = {'config.json': json.dumps(config).encode(), 'model.safetensors': safetensors.torch.save(tensors)}
    server.add_repository(repo_id, files, revision)


# configs


def test_each_tag_has_a_complete_config():
    for entry in reference.CHECKPOINTS:
        cfg, size = get_pretrained_cfg(entry['model']), entry['img_size']
        assert f'{cfg.architecture}.{cfg.tag}' == entry['model']
        assert cfg.hf_hub_id == f'timm/{entry["model"]}'
        # in the registry, stand-ins have digests of their own
        assert default_cfgs[cfg.architecture].cfgs[cfg.tag].url == f'{entry["url"]}#{entry["git_blob"]}'
        assert cfg.input_size == (3, size, size) and cfg.pool_size == (size // 32, size // 32)
        assert (cfg.crop_pct, cfg.interpolation, cfg.num_classes) == (0.875, 'bilinear', 1000)
        assert cfg.mean == (0.485, 0.456, 0.406) and cfg.std == (0.229, 0.224, 0.225)
        assert (cfg.license, cfg.paper_ids) == ('apache-2.0', 'arXiv:1908.03888')
        assert cfg.paper_name and cfg.origin_url == 'https://github.com/d-li14/HBONet'


@pytest.mark.parametrize('name', ['hbonet_100.in1k', 'hbonet_080.r192_in1k', 'hbonet_035.r96_in1k'])
def test_transform_is_the_authors_evaluation(name):
    cfg = get_pretrained_cfg(name).to_dict()
    transform = create_transform(**resolve_data_config(pretrained_cfg=cfg))
    for width, height in ((500, 375), (300, 401)):
        image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (height, width, 3), dtype=np.uint8))
        found = transform(image)

        size = cfg['input_size'][1]
        short = math.floor(size / 0.875)
        if width < height:
            width, height = short, int(short * height / width)
        else:
            width, height = int(short * width / height), short
        left, top = round((width - size) / 2), round((height - size) / 2)
        image = image.resize((width, height), Image.BILINEAR).crop((left, top, left + size, top + size))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        torch.testing.assert_close(found, (pixels - mean[:, None, None]) / std[:, None, None])


# from the Hub


def test_each_of_the_19_comes_from_its_repository_and_else_from_its_release(server, tmp_path):
    for name in NAMES:
        server.add_repository(f'timm/{name}', {'model.safetensors': name.encode()})
        assert Path(find_weights(name, tmp_path / 'a')).read_bytes() == name.encode()
    assert server.count('/d-li14/*') == 0
    server.repositories.clear()
    for name in NAMES:
        assert Path(find_weights(name, tmp_path / 'b')).read_bytes() == release_file(name)
    assert len(list((tmp_path / 'b').glob('*.pth'))) == 19


@pytest.mark.parametrize('filename', ['model.safetensors', 'pytorch_model.bin'])
def test_weights_on_the_hub(filename, server, tmp_path, monkeypatch):
    publish(server)
    if filename == 'pytorch_model.bin':
        file = io.BytesIO()
        torch.save(converted(), file)
        server.add_repository(HUB_ID, {filename: file.getvalue()})
    assert_reference(create(cache_dir=tmp_path))
    assert server.count(f'/{HUB_ID}/resolve/main/{filename}', 'GET') == 1
    assert_reference(create(cache_dir=tmp_path))
    assert server.count('/timm/*', 'GET') == 1, 'the second call asks for the version only'

    server.fail('*', status=500)
    before = server.count()
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)  # of the client, between retries
    assert_reference(create(cache_dir=tmp_path))
    assert server.count('/d-li14/*') == 0 and server.count() <= before + 2


@pytest.mark.parametrize('key, change', [
    ('blocks.0.0.conv_dw.bn.running_mean', None),
    ('blocks.0.0.conv_dw.bn.running_mean', torch.zeros(7)),
    ('surprise.weight', torch.zeros(1)),
    ('classifier.weight', torch.zeros(10, 1600)),
    ('conv_stem.conv.weight', torch.zeros(4, 1, 3, 3)),
])
def test_tensors_on_the_hub_that_do_not_fit(key, change, server, tmp_path):
    publish(server, {key: change})
    with pytest.raises(RuntimeError, match=key.removesuffix('.weight')):
        create(cache_dir=tmp_path)
    assert server.count('/d-li14/*') == 0


def test_without_pretrained_strict_weights_load_in_part(server, tmp_path):
    publish(server, {'blocks.0.0.conv_dw.bn.running_mean': None, 'surprise.weight': torch.zeros(1)})
    loaded = create(cache_dir=tmp_path, pretrained_strict=False).state_dict()
    differing = [k for k, v in converted().items() if not torch.equal(loaded[k], v)]
    assert differing == ['blocks.0.0.conv_dw.bn.running_mean']


class MakesFolder:
    """Unpickled in full, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickle_that_wants_to_run_code_is_refused(server, tmp_path):
    file = io.BytesIO()
    torch.save({'classifier.weight': MakesFolder(tmp_path / 'made')}, file)
    server.add_repository(HUB_ID, {'pytorch_model.bin': file.getvalue()})
    with pytest.raises(RuntimeError):
        create(cache_dir=tmp_path / 'a')
    server.repositories.clear()
    server.fail(RELEASE_FILE, content=file.getvalue())
    with pytest.raises(RuntimeError, match=f'3. .*git blob id is {git_blob_id(file.getvalue())}'):
        create(cache_dir=tmp_path / 'b')
    assert not (tmp_path / 'made').exists()


# what timm does with weights


@pytest.mark.parametrize('kwargs', [
    dict(act_layer='rleu'), dict(norm_layer='nonorm'), dict(spatial_expansion='linear'), dict(unknown=1),
    dict(features_only=True, out_indices=(7,)), dict(device='cuda:99'), dict(output_stride=8),
], ids=str)
def test_other_mistakes_are_not_those_of_the_weights(kwargs, server, tmp_path):
    def find_error(pretrained):
        try:
            timm.create_model(NAME, pretrained, cache_dir=tmp_path, **kwargs)
        except Exception as e:
            return type(e), str(e)

    publish(server)
    expected = find_error(False)
    assert expected and find_error(True) == expected


def test_network_that_the_weights_are_not_of(server, tmp_path):
    with pytest.raises(RuntimeError, match='another network: it has features.5.conv.0 where blocks.3.1.'):
        create(cache_dir=tmp_path, depths=(1, 1, 1, 4, 4, 1, 1, 2, 1))


def test_other_numbers_of_input_channels_and_classes(server, tmp_path):
    publish(server)
    stem = converted()['conv_stem.conv.weight']
    for in_chans, num_classes, expected, outputs in (
            (1, 10, stem.sum(1, keepdim=True), 10), (4, 0, torch.cat([stem, stem[:, :1]], 1) * 3 / 4, 1600)):
        model = create(cache_dir=tmp_path, in_chans=in_chans, num_classes=num_classes)
        torch.testing.assert_close(model.conv_stem.conv.weight, expected)
        assert model(torch.zeros(1, in_chans, 64, 64)).shape == (1, outputs)


@pytest.mark.parametrize('feature_cls', ['list', 'hook', 'getter'])
def test_feature_maps(feature_cls, server, tmp_path):
    images = torch.randn(1, 3, 64, 64)
    features = create(cache_dir=tmp_path, features_only=True, feature_cls=feature_cls)
    with torch.inference_mode():
        expected = create(cache_dir=tmp_path).forward_intermediates(images, intermediates_only=True)
        torch.testing.assert_close(features(images), expected)
    assert str(tmp_path).encode() not in pickle.dumps(features)


@pytest.mark.parametrize('num_classes', [1000, 10])
def test_weights_are_refused_for_another_spatial_expansion(num_classes, server, tmp_path):
    with pytest.raises(ValueError, match=f"{NAME} need spatial_expansion='nearest', got 'deconv'"):
        create(cache_dir=tmp_path, spatial_expansion='deconv', num_classes=num_classes)
    assert server.count() == 0


@pytest.mark.parametrize('on_hub', [True, False])
def test_config_is_the_registered_one_and_rebuilds_elsewhere(on_hub, server, tmp_path):
    if on_hub:
        publish(server)
    model = create(cache_dir=tmp_path / 'a')
    assert model.pretrained_cfg == model.default_cfg == get_pretrained_cfg(NAME).to_dict()
    content = pickle.dumps(model)
    assert str(tmp_path).encode() not in content
    cfg = pickle.loads(content).pretrained_cfg
    assert_reference(create('hbonet_010', pretrained_cfg=cfg, cache_dir=tmp_path / 'b'))
    assert_reference(create('hbonet_010', pretrained_cfg='in1k', cache_dir=tmp_path / 'b'))
    overlay = dict(file=None, mean=(0.5, 0.5, 0.5))
    model = create(pretrained_cfg_overlay=overlay, cache_dir=tmp_path / 'b')
    assert_reference(model)
    assert model.pretrained_cfg == {**cfg, 'mean': (0.5, 0.5, 0.5)} and overlay['file'] is None
    assert server.count(f'/{HUB_ID}/*' if on_hub else '/d-li14/*', 'GET') == 2


# weights that the user names


def test_other_sources_are_those_of_timm(server, tmp_path):
    folder = tmp_path / 'model'
    folder.mkdir()
    publish(server, repo_id='org/mine')
    for filename, content in server.files('org/mine').items():
        (folder / filename).write_bytes(content)
    server.pages['/mine.pth'] = release_file(NAME)

    overlay = {'file': str(folder / 'model.safetensors')}
    model = create(pretrained_cfg_overlay=overlay)
    assert_reference(model)
    assert model.pretrained_cfg == {**get_pretrained_cfg(NAME).to_dict(), **overlay}
    assert_reference(create(pretrained_cfg_overlay={'state_dict': model.state_dict()}))
    assert_reference(create(f'local-dir:{folder}'))
    assert_reference(timm.create_model(NAME, checkpoint_path=folder / 'model.safetensors').eval())
    assert server.count() == 0
    assert_reference(create('hf-hub:org/mine', cache_dir=tmp_path))
    assert_reference(create(pretrained_cfg_overlay={'hf_hub_id': 'org/mine'}, cache_dir=tmp_path))
    if Version(torch.__version__) >= Version('2.14'):  # timm 1.0.26 gives the file to torch.load, which must know it
        assert_reference(create(pretrained_cfg_overlay={
            'hf_hub_id': 'org/mine', 'hf_hub_filename': 'model.safetensors', 'source': 'hf-hub'}, cache_dir=tmp_path))
    assert server.count('/org/mine/resolve/main/model.safetensors', 'GET') == 1
    overlay = {'url': f'{server.url}/mine.pth', 'hf_hub_id': None}
    assert_reference(create(pretrained_cfg_overlay=overlay, cache_dir=tmp_path))
    assert server.count('/mine.pth', 'GET') == 1
    with pytest.raises(FileNotFoundError):
        create(pretrained_cfg_overlay={'file': tmp_path / 'nowhere.pth'})
    with pytest.raises(Exception):  # noqa: B017  of the client, another one in each major version
        create(pretrained_cfg_overlay={'hf_hub_id': 'org/none'}, cache_dir=tmp_path)
    assert server.count('/org/none/*')
    assert server.count('/timm/*') == server.count('/d-li14/*') == 0


# from the authors' release


@pytest.mark.parametrize('hub, level, reason', [
    (dict(), 'INFO', '404'),
    (dict(token=''), 'INFO', '401'),
    (dict(token='hf_expired'), 'WARNING', '401'),
    (dict(files={'README.md': b''}), 'WARNING', '404'),
    (dict(fault=dict(status=500)), 'WARNING', '500'),
    (dict(fault=dict(hang=True)), 'WARNING', 'Timeout'),
    (dict(files={'model.safetensors': bytes(1 << 20)}, fault=dict(method='GET', cut=1000)), 'WARNING', 'Error'),
], ids=['no repository', 'for a stranger', 'expired token', 'no file', 'error', 'no answer', 'cut'])
def test_faults_of_the_hub(hub, level, reason, server, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, 'timm_hbonet')
    monkeypatch.setenv('HF_TOKEN', hub.get('token', TOKEN))
    if 'files' in hub:
        server.add_repository(HUB_ID, hub['files'])
    if 'fault' in hub:
        server.fail('/timm/*', **hub['fault'])
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    assert find_weights(NAME, tmp_path) == str(get_release_path(NAME, tmp_path))
    records = [r for r in caplog.records if f'{HUB_ID} on {server.url}' in r.message and reason in r.message]
    assert [r.levelname for r in records] == [level], caplog.text
    assert {r.headers.get('authorization') for r in server.requests if '/d-li14/' in r.path} == {None}, 'not the Hub'
    verify_release(get_release_path(NAME, tmp_path), NAME)
    if reason in ('500', 'Timeout'):
        assert server.count('/timm/*') <= 2, 'the user does not wait for retries'
    requests = server.count()
    assert_reference(create(cache_dir=tmp_path))
    assert server.count() == requests, 'the second call asks nobody'


def test_download_of_the_release_shows_progress(server, tmp_path, capfd):
    download_release(NAME, tmp_path)
    assert f'{get_release_path(NAME).name}: 100%' in capfd.readouterr().err


@pytest.mark.parametrize('fault, reason', [
    (dict(hang=True), 'Timeout'),
    (dict(cut=1_000_000), 'IncompleteRead|git blob id'),
    (dict(content=b'<!DOCTYPE html><html></html>'), f"{git_blob_id(b'<!DOCTYPE html><html></html>')}.*<!DOCTYPE"),
    (dict(content=b''), f'{git_blob_id(b"")}, not '),
], ids=['no answer', 'cut', 'page', 'empty'])
def test_faults_of_the_site_of_the_release(fault, reason, server, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_DOWNLOAD_TIMEOUT', 1)
    server.fail(RELEASE_FILE, **fault)
    with pytest.raises(RuntimeError, match=f'3. .*({reason})'):
        create(cache_dir=tmp_path)
    assert list(tmp_path.glob('*.pth*')) == []


def test_error_tells_what_was_tried_and_what_to_do(server, tmp_path):
    server.pages.clear()
    path = get_release_path(NAME, tmp_path)
    path.write_bytes(b'damaged')
    with pytest.raises(RuntimeError) as e:
        create(cache_dir=tmp_path)
    lines = str(e.value).splitlines()
    assert NAME in lines[0]
    for number, source, reason, line in zip(
            '123', (str(path), HUB_ID, str(path)), (git_blob_id(b'damaged'), '401', '404'), lines[1:4], strict=True):
        assert line.startswith(number) and source in line and reason in line
    for way_out in ('TIMM_HBONET_HUB_NAMESPACE', 'HF_ENDPOINT', "pretrained_cfg_overlay=dict(file='...')", 'cache_dir'):
        assert way_out in lines[4]
    assert [p.read_bytes() for p in tmp_path.glob('*.pth*')] == [b'damaged'], 'until there is a good one'


@pytest.mark.parametrize('where', ['cache_dir', 'TORCH_HOME'])
def test_damaged_file_is_replaced_and_that_of_the_user_is_left_alone(where, server, tmp_path, monkeypatch, caplog):
    folder = tmp_path / 'mine' if where == 'cache_dir' else tmp_path / 'hub/checkpoints'
    folder.mkdir(parents=True)
    (folder / 'hbonet_0_1.pth').write_bytes(b'fine-tuned')
    (folder / get_release_path(NAME).name).write_bytes(b'damaged')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    assert_reference(create(cache_dir=folder if where == 'cache_dir' else None))
    assert git_blob_id(b'damaged') in caplog.text
    assert {path.name for path in folder.glob('*.pth')} == {'hbonet_0_1.pth', get_release_path(NAME).name}
    assert (folder / 'hbonet_0_1.pth').read_bytes() == b'fine-tuned'


@contextlib.contextmanager
def ordinary_user():
    """Root may write anywhere."""
    if os.name == 'nt':
        pytest.skip('the permissions of a file are those of Unix')
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@contextlib.contextmanager
def full_disk():
    resource = pytest.importorskip('resource', reason='limits of file size exist on Unix only')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize('fault, error', [
    ('read-only', 'PermissionError'), ('full', 'OSError'), ('file', 'NotADirectoryError')])
def test_cache_that_cannot_be_written(fault, error, server):
    publish(server)
    with tempfile.TemporaryDirectory() as parent:  # tmp_path is closed to other users
        folder = Path(parent, 'cache')
        os.chmod(parent, 0o755)
        if fault == 'file':
            folder.touch()  # not even root can make a folder in a file
            folder = folder / 'cache'
        else:
            folder.mkdir(mode=0o555)
        limit = {'read-only': ordinary_user, 'full': full_disk, 'file': contextlib.nullcontext}[fault]
        with limit(), pytest.raises(RuntimeError, match=f'3. .*{re.escape(str(folder))}.* {error}: .*\n.*`cache_dir`'):
            find_weights(NAME, folder)
        assert not [*folder.glob('*.pth*'), *folder.glob('*/snapshots/*/*')]


def test_cached_file_that_cannot_be_read_is_left_as_it_is(server):
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o777)
        path = download_release(NAME, parent)
        path.chmod(0o000)
        with ordinary_user(), pytest.raises(RuntimeError, match='1. .*PermissionError(.|\n)*3. .*PermissionError'):
            find_weights(NAME, parent)
        path.chmod(0o600)
        verify_release(path, NAME)


def test_many_that_download_at_once(server, tmp_path):
    get_release_path(NAME, tmp_path).write_bytes(b'left by a killed process')
    server.fail(RELEASE_FILE, barrier=threading.Barrier(4))
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: download_release(NAME, tmp_path), range(4)))
    assert server.count(RELEASE_FILE, 'GET') == 4
    assert set(paths) == set(tmp_path.iterdir()) == {get_release_path(NAME, tmp_path)}
    verify_release(paths[0], NAME)


# environment variables


def test_namespace_and_revision(server, tmp_path, monkeypatch, caplog):
    find_weights(NAME, tmp_path)  # the release is in the cache
    assert not caplog.text
    publish(server, repo_id=f'org/{NAME}', revision='v1')
    monkeypatch.setenv('TIMM_HBONET_HUB_NAMESPACE', 'org@v1')
    assert_reference(create(cache_dir=tmp_path))
    assert server.count(f'/org/{NAME}/resolve/v1/model.safetensors', 'GET') == 1
    monkeypatch.setenv('TIMM_HBONET_HUB_NAMESPACE', 'org@v2')
    assert find_weights(NAME, tmp_path) == str(get_release_path(NAME, tmp_path))
    monkeypatch.setenv('TIMM_HBONET_HUB_NAMESPACE', 'other')
    assert find_weights(NAME, tmp_path) == str(get_release_path(NAME, tmp_path))
    assert re.search(f'WARNING .*org/{NAME} .*Revision(.|\n)*WARNING .*other/{NAME} .*401', caplog.text)


@pytest.mark.parametrize('namespace', ['a/b', ' ', '@v1', 'a@b@c', 'org@', 'a..b', '-a'])
def test_namespace_that_is_none(namespace, server, tmp_path, monkeypatch):
    monkeypatch.setenv('TIMM_HBONET_HUB_NAMESPACE', namespace)
    assert timm.create_model(NAME).num_classes == 1000
    with pytest.raises(ValueError, match=f"TIMM_HBONET_HUB_NAMESPACE .*'ORG@REVISION', got {namespace!r}"):
        create(cache_dir=tmp_path)
    assert server.count() == 0


CHILD = f'''if True:
    import json, os, sys
    sys.path[:0] = ['app.zip', {str(Path(__file__).parent)!r}]
    import timm, timm_hbonet
    from timm_hbonet.weights import find_weights
    import stand_ins
    stand_ins.use()
'''


def test_package_in_a_zip_on_a_machine_without_network(server, run_python, tmp_path):
    package = Path(timm_hbonet.__file__).parent
    with zipfile.ZipFile(tmp_path / 'app.zip', 'w') as file:
        for path in package.glob('*.py'):
            file.write(path, f'{package.name}/{path.name}')
    publish(server)
    on_hub = find_weights(NAME, tmp_path / 'hf/hub')
    released = find_weights('hbonet_025.in1k', tmp_path / 'torch/hub/checkpoints')
    requests = server.count()
    code = CHILD + f'''
    assert 'app.zip' in timm_hbonet.__file__
    print(json.dumps([timm.list_pretrained('hbonet*'), find_weights({NAME!r}), find_weights('hbonet_025.in1k')]))
    find_weights('hbonet_035.in1k')'''
    result = run_python(
        code, HF_HUB_OFFLINE='1', HF_HOME=str(tmp_path / 'hf'), TORCH_HOME=str(tmp_path / 'torch'),
        TIMM_HBONET_AUTOLOAD='0')
    assert server.count() == requests
    tags, *files = json.loads(result.stdout)
    assert sorted(tags) == sorted(NAMES) and files == [on_hub, released]
    assert re.search(r'RuntimeError: (.|\n)*\n2. .*OfflineMode.*\n3. .*OfflineMode', result.stderr)


def test_proxy_carries_the_hub_and_the_release(server, run_python, tmp_path):
    publish(server)
    code = CHILD + f'''
    import urllib.request
    urllib.request.install_opener(None)
    print(find_weights({NAME!r}))
    find_weights('hbonet_025.in1k')'''
    result = run_python(
        code, HF_ENDPOINT='http://hub.invalid', HF_HOME=str(tmp_path), TORCH_HOME=str(tmp_path), NO_PROXY='',
        no_proxy='', HTTP_PROXY=server.url, http_proxy=server.url, HTTPS_PROXY=server.url, https_proxy=server.url)
    assert f'models--timm--{NAME}' in result.stdout, result.stderr
    assert server.count(f'/timm/{NAME}/resolve/*', 'GET') == 1
    assert server.count('github.com:443', 'CONNECT') == 1
    assert re.search('3. .*502', result.stderr), result.stderr
