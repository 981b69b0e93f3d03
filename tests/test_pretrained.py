"""Published weights arrive and are the right ones, or an error says why not and what to do."""
import io
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import reference
import safetensors.torch
import timm
import torch
from hub_server import TOKEN, git_blob_id
from huggingface_hub import constants
from networks import released
from stand_ins import release_file
from timm.models import get_pretrained_cfg
from timm.models._registry import _model_pretrained_cfgs

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


def publish(server, changes=(), repo_id=HUB_ID, revision='main'):
    """Put weights on the Hub, with other tensors or without some (None)."""
    config = {'architecture': 'hbonet_010', 'num_classes': 1000, 'pretrained_cfg': {
        'first_conv': get_pretrained_cfg(NAME).first_conv, 'classifier': 'classifier'}}
    tensors = {**released('hbonet_010', torch.float32).state_dict(), **dict(changes)}
    tensors = {k: v for k, v in tensors.items() if v is not None}
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
    files, file = server.files(HUB_ID), io.BytesIO()
    if filename == 'pytorch_model.bin':
        torch.save(safetensors.torch.load(files.pop('model.safetensors')), file)
    files['pytorch_model.bin'] = file.getvalue()  # empty where it is not taken
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
    ('blocks.0.0.conv_dw.bn.running_mean', None), ('classifier.weight', torch.zeros(10, 1600))])
def test_tensors_on_the_hub_that_do_not_fit(key, change, server, tmp_path):
    publish(server, {key: change})
    with pytest.raises(RuntimeError, match=key):
        create(cache_dir=tmp_path)
    assert server.count('/d-li14/*') == 0


class MakesFolder:
    """Unpickled in full, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ('made',)


def test_pickle_that_wants_to_run_code_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = io.BytesIO()
    torch.save({'classifier.weight': MakesFolder()}, file)
    server.add_repository(HUB_ID, {'pytorch_model.bin': file.getvalue()})
    with pytest.raises(RuntimeError):
        create(cache_dir='a')
    server.repositories.clear()
    server.fail(RELEASE_FILE, content=file.getvalue())
    with pytest.raises(RuntimeError, match=f'3. .*git blob id is {git_blob_id(file.getvalue())}'):
        create(cache_dir='b')
    assert not Path('made').exists()


# what timm does with weights


@pytest.mark.parametrize('kwargs', [
    dict(act_layer='rleu'), dict(spatial_expansion='linear'), dict(unknown=1),
    dict(features_only=True, out_indices=(7,)),
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


def test_other_numbers_of_input_channels_and_classes(server, tmp_path):
    stem = reference.release_state_dict(NAME, torch.float32)['features.0.0.weight']
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


def test_weights_are_refused_for_another_spatial_expansion(server):
    with pytest.raises(ValueError, match=f"{NAME} need spatial_expansion='nearest', got 'deconv'"):
        create(spatial_expansion='deconv')
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
    publish(server, repo_id='org/mine')
    for filename, content in server.files('org/mine').items():
        (tmp_path / filename).write_bytes(content)
    server.pages['/mine.pth'] = release_file(NAME)

    overlay = {'file': str(tmp_path / 'model.safetensors')}
    model = create(pretrained_cfg_overlay=overlay)
    assert_reference(model)
    assert model.pretrained_cfg == {**get_pretrained_cfg(NAME).to_dict(), **overlay}
    assert_reference(create(pretrained_cfg_overlay={'state_dict': model.state_dict()}))
    assert_reference(create(f'local-dir:{tmp_path}'))
    assert server.count() == 0
    for name, overlay in (
            ('hf-hub:org/mine', None),
            (NAME, {'hf_hub_id': 'org/mine'}),
            (NAME, {'url': f'{server.url}/mine.pth', 'hf_hub_id': None}),
    ):
        assert_reference(create(name, pretrained_cfg_overlay=overlay, cache_dir=tmp_path))
    assert server.count('/org/mine/resolve/main/model.safetensors', 'GET') == server.count('/mine.pth', 'GET') == 1
    with pytest.raises(FileNotFoundError):
        create(pretrained_cfg_overlay={'file': tmp_path / 'nowhere.pth'})
    with pytest.raises(Exception):  # noqa: B017  of the client, another one in each major version
        create(pretrained_cfg_overlay={'hf_hub_id': 'org/none'}, cache_dir=tmp_path)
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


def test_digest_is_compared_in_full(server, tmp_path, monkeypatch):
    cfg = _model_pretrained_cfgs[NAME]
    monkeypatch.setattr(cfg, 'url', cfg.url[:-1] + ('1' if cfg.url.endswith('0') else '0'))
    with pytest.raises(ValueError, match='the git blob id is'):
        download_release(NAME, tmp_path)


def test_error_tells_what_was_tried_and_what_to_do(server, tmp_path):
    server.pages.clear()
    path = get_release_path(NAME, tmp_path)
    path.write_bytes(b'damaged')
    with pytest.raises(RuntimeError) as e:
        create(cache_dir=tmp_path)
    first, *tried, last = str(e.value).splitlines()
    assert NAME in first
    assert tried[0].startswith(f'1. {path}: ValueError: the git blob id is {git_blob_id(b"damaged")}')
    assert tried[1].startswith(f'2. {HUB_ID} on {server.url}: ') and '401' in tried[1]
    assert tried[2].startswith(f"3. the authors' release, to {path}: ") and '404' in tried[2]
    url = next(entry['url'] for entry in reference.CHECKPOINTS if entry['model'] == NAME)
    assert f"Download {url}, and pass `pretrained_cfg_overlay=dict(file='...')`" in last
    for name in ('TIMM_HBONET_HUB_NAMESPACE', 'HF_ENDPOINT', 'cache_dir'):
        assert name in last
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


def test_cache_that_cannot_be_written(server, tmp_path):
    publish(server)
    (tmp_path / 'file').touch()
    folder = tmp_path / 'file/cache'  # not even root can make a folder in a file
    with pytest.raises(RuntimeError, match=rf'3\. .*{re.escape(str(folder))}.* \w+Error: .*\n.*`cache_dir`'):
        find_weights(NAME, folder)


def test_what_cannot_be_read_in_the_cache_is_left_as_it_is(server, tmp_path):
    get_release_path(NAME, tmp_path).mkdir()  # not even root can read a folder
    error = r'\. .* (IsADirectory|Permission)Error: '
    with pytest.raises(RuntimeError, match=rf'1{error}(.|\n)*3{error}'):
        find_weights(NAME, tmp_path)
    assert server.count(RELEASE_FILE) == 0


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
    server.fail('*/v1/*', status=500)
    assert 'models--org' in find_weights(NAME, tmp_path)
    monkeypatch.setenv('TIMM_HBONET_HUB_NAMESPACE', 'org@v2')
    assert find_weights(NAME, tmp_path) == str(get_release_path(NAME, tmp_path))
    monkeypatch.setenv('TIMM_HBONET_HUB_NAMESPACE', 'other')
    assert find_weights(NAME, tmp_path) == str(get_release_path(NAME, tmp_path))
    assert re.search(f'WARNING .*org/{NAME} .*Revision(.|\n)*WARNING .*other/{NAME} .*401', caplog.text)


@pytest.mark.parametrize('namespace', ['a/b', ' ', 'a@b@c', 'org@', 'a..b', '-a'])
def test_namespace_that_is_none(namespace, server, tmp_path, monkeypatch):
    monkeypatch.setenv('TIMM_HBONET_HUB_NAMESPACE', namespace)
    assert timm.create_model(NAME).num_classes == 1000
    with pytest.raises(ValueError, match=f"TIMM_HBONET_HUB_NAMESPACE .*'ORG@REVISION', got {namespace!r}"):
        create(cache_dir=tmp_path)
    assert server.count() == 0


def test_machine_without_network(server, tmp_path):
    publish(server)
    on_hub = find_weights(NAME, tmp_path / 'hf/hub')
    release = find_weights('hbonet_025.in1k', tmp_path / 'torch/hub/checkpoints')
    requests = server.count()
    code = f'''if True:
        import stand_ins
        from timm_hbonet.weights import find_weights
        stand_ins.use()
        assert find_weights({NAME!r}) == {on_hub!r}
        assert find_weights('hbonet_025.in1k') == {release!r}
        find_weights('hbonet_035.in1k')
    '''
    folders = {'HF_HOME': str(tmp_path / 'hf'), 'TORCH_HOME': str(tmp_path / 'torch')}
    environment = {**os.environ, **folders, 'HF_HUB_OFFLINE': '1'}
    result = subprocess.run(
        [sys.executable, '-c', code], cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert re.search(r'RuntimeError: (.|\n)*\n2. .*OfflineMode.*\n3. .*OfflineMode', result.stderr), result.stderr
    assert server.count() == requests
