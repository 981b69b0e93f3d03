"""Published weights arrive and are the right ones, or an error says why not and what to do."""
import contextlib
import io
import json
import math
import os
import re
import tempfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import huggingface_hub
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

import timm_hbonet.pretrained
from timm_hbonet.pretrained import find_weights
from timm_hbonet.releases import GIT_BLOBS, SHA384, check_release, download_release, get_release_path

NAMES = [entry['name'] for entry in reference.CHECKPOINTS]
NAME = 'hbonet_010.in1k'  # the smallest
HUB_ID = f'timm/{NAME}'
COMMIT = reference.RELEASE['commit']
# before, the client itself asks a Hub that is down again, and waits in between
CLIENT_ASKS_ONCE = int(huggingface_hub.__version__.split('.')[0]) >= 1
RELEASE_FILE = '/d-li14/HBONet/raw/*/hbonet_0_1.pth'
CHILD = f'''if True:
    import json, sys, timm, torch
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    import stand_ins
    from timm_hbonet.pretrained import find_weights
    stand_ins.use()
'''


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
def converted(name=NAME):
    """Recreated weights of a release in our layout, as a safetensors file."""
    with tempfile.NamedTemporaryFile(suffix='.pth') as file:
        Path(file.name).write_bytes(release_file(name))
        model = create(name, pretrained_cfg_overlay={'file': file.name})
    return safetensors.torch.save(model.state_dict())


def changed(**changes):
    """The same with other tensors, or without."""
    tensors = {**safetensors.torch.load(converted()), **changes}
    return safetensors.torch.save({k: v for k, v in tensors.items() if v is not None})


def publish(server, weights=None, repo_id=HUB_ID, revision='main'):
    config = {'architecture': 'hbonet_010', 'num_classes': 1000, 'pretrained_cfg': {
        'first_conv': get_pretrained_cfg(NAME).first_conv, 'classifier': 'classifier'}}
    files = {'config.json': json.dumps(config).encode(), 'model.safetensors': weights or converted()}
    server.add_repository(repo_id, files, revision)


def malicious_pickle(folder):
    """A checkpoint that makes a folder when it is unpickled without care. Returns it and the folder."""
    trace = folder / 'trace'

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(trace),)

    file = io.BytesIO()
    torch.save({'classifier.weight': Malicious()}, file)
    return file.getvalue(), trace


def is_intact(folder):
    return check_release(get_release_path(NAME, folder), NAME) == ''


# configs


@pytest.mark.parametrize('entry', reference.CHECKPOINTS, ids=NAMES)
def test_each_tag_has_a_complete_config(entry):
    size = entry['input_size']
    cfg = get_pretrained_cfg(entry['name'])
    assert f'{cfg.architecture}.{cfg.tag}' == entry['name']
    assert cfg.hf_hub_id == f'timm/{entry["name"]}'
    assert cfg.url == f'https://github.com/d-li14/HBONet/raw/{COMMIT}/{entry["path"]}'
    assert cfg.input_size == (3, size, size) and cfg.pool_size == (size // 32, size // 32)
    assert (cfg.crop_pct, cfg.interpolation, cfg.num_classes) == (0.875, 'bilinear', 1000)
    assert cfg.mean == (0.485, 0.456, 0.406) and cfg.std == (0.229, 0.224, 0.225)
    assert (cfg.license, cfg.paper_ids) == ('apache-2.0', 'arXiv:1908.03888')
    assert cfg.paper_name and cfg.origin_url == 'https://github.com/d-li14/HBONet'


@pytest.mark.parametrize('name', [
    'hbonet_100.in1k', 'hbonet_080.r192_in1k', 'hbonet_080.r160_in1k', 'hbonet_035.r128_in1k', 'hbonet_035.r96_in1k'])
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


@pytest.mark.parametrize('name', [NAME, 'hbonet_025_d8.in1k'])
def test_weights_on_the_hub(name, server, tmp_path, monkeypatch):
    publish(server, converted(name), f'timm/{name}')
    model = create(name, cache_dir=tmp_path)
    assert_reference(model, name)
    file = model.pretrained_cfg['file']
    assert Path(file).read_bytes() == converted(name)
    assert model.pretrained_cfg == {**get_pretrained_cfg(name).to_dict(), 'file': file}
    assert server.count('/timm/*', 'GET') == 1
    assert_reference(create(name, cache_dir=tmp_path), name)
    assert server.count('/timm/*', 'GET') == 1, 'the second call asks for the version only'

    server.fail('*', status=500)
    before = server.count()
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)  # of the client, between retries
    assert_reference(create(name, cache_dir=tmp_path), name)
    assert server.count('/d-li14/*') == 0
    assert server.count() <= before + 1 or not CLIENT_ASKS_ONCE


def test_hub_name(server, tmp_path):
    publish(server)
    assert_reference(create(f'hf-hub:{HUB_ID}', cache_dir=tmp_path))


def test_connection_to_the_hub_cut_in_the_middle(server, tmp_path):
    publish(server)
    server.fail('*/model.safetensors', 'GET', cut=1_000_000, times=1)
    assert Path(find_weights(NAME, tmp_path)).read_bytes() == converted()
    assert server.count('/d-li14/*') == 0


def test_repository_with_only_a_pickled_state_dict(server, tmp_path, monkeypatch):
    file = io.BytesIO()
    torch.save(safetensors.torch.load(converted()), file)
    server.add_repository(HUB_ID, {'pytorch_model.bin': file.getvalue()})
    assert_reference(create(cache_dir=tmp_path))
    server.fail('*', status=500)
    before = server.count()
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    assert Path(find_weights(NAME, tmp_path)).read_bytes() == file.getvalue()
    assert server.count() == before + 1 or not CLIENT_ASKS_ONCE, 'the user does not wait for retries'


UNFIT = {
    'missing': ('{norm}', None),
    'shape': ('{norm}', torch.zeros(7)),
    'unknown': ('surprise.weight', torch.zeros(1)),
}


@pytest.mark.parametrize('kwargs', [{}, {'num_classes': 10}, {'features_only': True}], ids=str)
@pytest.mark.parametrize('key, change', UNFIT.values(), ids=UNFIT)
def test_tensors_on_the_hub_that_do_not_fit(key, change, kwargs, server, tmp_path):
    norm = next(k for k in safetensors.torch.load(converted()) if k.endswith('running_mean'))
    key = key.format(norm=norm)
    publish(server, changed(**{key: change}))
    with pytest.raises(RuntimeError, match=f'models--timm--{NAME}(.|\n)*{key}'):
        create(cache_dir=tmp_path, **kwargs)
    assert server.count('/d-li14/*') == 0


@pytest.mark.parametrize('key, change', [
    ('classifier.bias', None), ('classifier.weight', torch.zeros(10, 1600)), ('{stem}', torch.zeros(4, 1, 3, 3)),
], ids=['no bias', 'classes', 'channels'])
def test_classifier_and_stem_on_the_hub_that_do_not_fit(key, change, server, tmp_path):
    key = key.format(stem=f'{get_pretrained_cfg(NAME).first_conv}.weight')
    publish(server, changed(**{key: change}))
    with pytest.raises(RuntimeError, match=f'models--timm--{NAME}(.|\n)*{key.rpartition(".")[0]}'):
        create(cache_dir=tmp_path)


def test_without_pretrained_strict_weights_load_in_part(server, tmp_path):
    tensors = safetensors.torch.load(converted())
    norm = next(k for k in tensors if k.endswith('running_mean'))
    publish(server, changed(**{norm: None, 'surprise.weight': torch.zeros(1)}))
    loaded = create(cache_dir=tmp_path, pretrained_strict=False).state_dict()
    assert torch.equal(loaded[norm], torch.zeros_like(loaded[norm]))
    assert all(torch.equal(loaded[k], v) for k, v in tensors.items() if k != norm)


@pytest.mark.parametrize('content', [b'', converted, b'<html>', bytes(1000)], ids=['empty', 'cut', 'text', 'zeros'])
@pytest.mark.parametrize('filename', ['model.safetensors', 'pytorch_model.bin'])
def test_damaged_file_on_the_hub(filename, content, server, tmp_path):
    server.add_repository(HUB_ID, {filename: content()[:-1000] if callable(content) else content})
    with pytest.raises(RuntimeError, match=f'models--timm--{NAME}'):
        create(cache_dir=tmp_path)
    assert server.count('/d-li14/*') == 0


def test_malicious_pickle_on_the_hub_does_not_run(server, tmp_path):
    content, trace = malicious_pickle(tmp_path)
    server.add_repository(HUB_ID, {'pytorch_model.bin': content})
    with pytest.raises(RuntimeError, match=f'models--timm--{NAME}'):
        create(cache_dir=tmp_path)
    assert not trace.exists()


# what timm does with weights


def test_other_numbers_of_input_channels_and_classes(server, tmp_path):
    publish(server)
    stem = create(cache_dir=tmp_path).get_submodule(get_pretrained_cfg(NAME).first_conv).weight
    for in_chans, num_classes, expected, outputs in (
            (1, 10, stem.sum(1, keepdim=True), 10), (4, 0, torch.cat([stem, stem[:, :1]], 1) * 3 / 4, 1600)):
        model = create(cache_dir=tmp_path, in_chans=in_chans, num_classes=num_classes)
        torch.testing.assert_close(model.get_submodule(model.pretrained_cfg['first_conv']).weight, expected)
        assert model(torch.zeros(1, in_chans, 64, 64)).shape == (1, outputs)


@pytest.mark.parametrize('feature_cls', ['list', 'hook', 'getter'])
def test_feature_maps(feature_cls, server, tmp_path):
    publish(server)
    images = torch.randn(1, 3, 64, 64)
    features = create(cache_dir=tmp_path, features_only=True, feature_cls=feature_cls)
    with torch.inference_mode():
        expected = create(cache_dir=tmp_path).forward_intermediates(images, intermediates_only=True)
        torch.testing.assert_close(features(images), expected)


def test_data_type(server, tmp_path):
    publish(server)
    model = create(cache_dir=tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    expected = safetensors.torch.load(converted())['classifier.weight']
    torch.testing.assert_close(model.classifier.weight, expected.bfloat16())


@pytest.mark.parametrize('spatial_expansion', ['bilinear', 'deconv'])
def test_weights_are_refused_for_another_spatial_expansion(spatial_expansion, server, tmp_path):
    with pytest.raises(ValueError, match="spatial_expansion='nearest'"):
        create(cache_dir=tmp_path, spatial_expansion=spatial_expansion)
    assert server.count() == 0


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
    assert_reference(create(pretrained_cfg_overlay={'hf_hub_id': 'org/mine'}, cache_dir=tmp_path))
    if Version(torch.__version__) >= Version('2.14'):  # timm 1.0.26 gives the file to torch.load, which must know it
        assert_reference(create(pretrained_cfg_overlay={
            'hf_hub_id': 'org/mine', 'hf_hub_filename': 'model.safetensors', 'source': 'hf-hub'}, cache_dir=tmp_path))
    assert server.count('/org/mine/resolve/main/model.safetensors', 'GET') == 1
    overlay = {'url': f'{server.url}/mine.pth', 'hf_hub_id': None}
    assert_reference(create(pretrained_cfg_overlay=overlay, cache_dir=tmp_path))
    assert server.count('/mine.pth', 'GET') == 1
    assert server.count('/timm/*') == server.count('/d-li14/*') == 0


def test_custom_load_is_that_of_timm(server, tmp_path):
    with pytest.raises(AttributeError, match='load_pretrained'):  # an HBONet has no such method
        create(pretrained_cfg_overlay={'file': 'weights.npz', 'custom_load': True})


def test_missing_repository_that_the_user_names_is_an_error(server, tmp_path):
    with pytest.raises(Exception):  # noqa: B017  of the client, another one in each major version
        create(pretrained_cfg_overlay={'hf_hub_id': 'org/mine'}, cache_dir=tmp_path)
    assert server.count('/org/mine/*') and server.count('/d-li14/*') == 0


def test_config_that_a_script_passes_on(server, tmp_path):
    publish(server)
    assert_reference(create('hbonet_010', pretrained_cfg=get_pretrained_cfg(NAME).to_dict(), cache_dir=tmp_path))
    assert_reference(create('hbonet_010', pretrained_cfg='in1k', cache_dir=tmp_path))


def test_malicious_file_does_not_run(tmp_path):
    content, trace = malicious_pickle(tmp_path)
    path = tmp_path / 'w.pth'
    path.write_bytes(content)
    with pytest.raises(RuntimeError):
        create(pretrained_cfg_overlay={'file': path})
    assert not trace.exists()


def test_file_that_does_not_fit(tmp_path):
    path = tmp_path / 'w.pth'
    path.write_bytes(release_file('hbonet_025.in1k'))
    with pytest.raises(RuntimeError, match='size mismatch|is .*, not '):
        create(pretrained_cfg_overlay={'file': path})
    with pytest.raises(FileNotFoundError):
        create(pretrained_cfg_overlay={'file': tmp_path / 'nowhere.pth'})


# from the authors' release


HUB_FAULTS = {
    'no repository': (dict(), '404'),
    'no repository, for a stranger': (dict(token=''), '401'),
    'expired token': (dict(token='hf_expired'), '401'),
    'no file': (dict(files={'README.md': b''}), '404'),
    'error': (dict(fault=dict(status=500)), '500'),
    'no answer': (dict(fault=dict(hang=True)), 'Timeout'),
    'cut': (dict(files={'model.safetensors': bytes(1 << 20)}, fault=dict(method='GET', cut=1000)), 'Error'),
    }


@pytest.mark.parametrize('hub, reason', HUB_FAULTS.values(), ids=HUB_FAULTS)
def test_faults_of_the_hub(hub, reason, server, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', hub.get('token', TOKEN))
    if 'files' in hub:
        server.add_repository(HUB_ID, hub['files'])
    if 'fault' in hub:
        server.fail('/timm/*', **hub['fault'])
    monkeypatch.setattr(constants, 'HF_HUB_ETAG_TIMEOUT', 1)
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    assert find_weights(NAME, tmp_path) == str(get_release_path(NAME, tmp_path))
    assert re.search(f'{HUB_ID} on {server.url}: .*{reason}', caplog.text)
    assert {r.headers.get('authorization') for r in server.requests if '/d-li14/' in r.path} == {None}, 'not the Hub'
    assert is_intact(tmp_path)
    if CLIENT_ASKS_ONCE and reason in ('500', 'Timeout'):
        assert server.count('/timm/*') == 1, 'the user does not wait for retries'
    requests = server.count()
    assert_reference(create(cache_dir=tmp_path))
    assert server.count() == requests, 'the second call asks nobody'


def test_download_of_the_release_shows_progress(server, tmp_path, capfd):
    download_release(NAME, tmp_path)
    assert f'{get_release_path(NAME).name}: 100%' in capfd.readouterr().err


def test_connection_to_the_release_cut_in_the_middle(server, tmp_path):
    server.fail(RELEASE_FILE, times=1, cut=1_000_000)
    assert find_weights(NAME, tmp_path) == str(get_release_path(NAME, tmp_path))
    assert is_intact(tmp_path)


def test_release_that_never_answers(server, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_DOWNLOAD_TIMEOUT', 1)
    server.fail(RELEASE_FILE, hang=True)
    with pytest.raises(RuntimeError, match='3. .*Timeout'):
        find_weights(NAME, tmp_path)
    assert server.count(RELEASE_FILE) == 1 and not list(tmp_path.glob('*.pth*'))


@pytest.mark.parametrize('content', [
    b'<!DOCTYPE html><html></html>', b'version https://git-lfs.github.com/spec/v1\n', b'', malicious_pickle,
], ids=['page', 'pointer', 'empty', 'pickle'])
def test_file_of_another_digest_is_refused(content, server, tmp_path):
    content, trace = content(tmp_path) if callable(content) else (content, tmp_path / 'trace')
    server.fail(RELEASE_FILE, content=content)
    folder = tmp_path / 'cache'
    with pytest.raises(RuntimeError) as e:
        create(cache_dir=folder)
    for part in (git_blob_id(content), GIT_BLOBS[NAME], repr(content[:5])[2:-1]):
        assert part in str(e.value)
    assert list(folder.iterdir()) == [] and not trace.exists()


def test_second_digest_counts_too(server, tmp_path, monkeypatch):
    monkeypatch.setitem(SHA384, NAME.removesuffix('.in1k'), '00')
    with pytest.raises(OSError, match='SHA-384 is [0-9a-f]{96}, not 00'):
        download_release(NAME, tmp_path)


def test_file_that_a_killed_process_left_is_replaced(server, tmp_path, caplog):
    content = release_file(NAME)[:100_000]
    get_release_path(NAME, tmp_path).write_bytes(content)
    assert_reference(create(cache_dir=tmp_path))
    assert re.search(f'Replacing .*{git_blob_id(content)}.*{GIT_BLOBS[NAME]}', caplog.text)
    assert is_intact(tmp_path)


def test_damaged_file_stays_until_there_is_a_good_one(server, tmp_path):
    path = get_release_path(NAME, tmp_path)
    path.write_bytes(b'damaged')
    server.pages.clear()
    with pytest.raises(RuntimeError, match='1. .*git blob id'):
        create(cache_dir=tmp_path)
    assert path.read_bytes() == b'damaged'


@pytest.mark.parametrize('where', ['cache_dir', 'TORCH_HOME'])
def test_file_of_the_user_is_left_alone(where, server, tmp_path, monkeypatch):
    folder = tmp_path / 'mine' if where == 'cache_dir' else tmp_path / 'hub/checkpoints'
    folder.mkdir(parents=True)
    (folder / 'hbonet_0_1.pth').write_bytes(b'fine-tuned')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    assert_reference(create(cache_dir=folder if where == 'cache_dir' else None))
    assert {path.name for path in folder.glob('*.pth')} == {'hbonet_0_1.pth', get_release_path(NAME).name}
    assert (folder / 'hbonet_0_1.pth').read_bytes() == b'fine-tuned'


def test_other_versions_of_the_digests_have_files_of_their_own(server, tmp_path, monkeypatch):
    path = download_release(NAME, tmp_path)
    monkeypatch.setitem(GIT_BLOBS, NAME, git_blob_id(b'another'))
    server.fail(RELEASE_FILE, content=b'another')
    assert download_release(NAME, tmp_path).read_bytes() == b'another'
    assert path.read_bytes() == release_file(NAME)


def test_error_tells_what_was_tried_and_what_to_do(server, tmp_path):
    server.pages.clear()
    with pytest.raises(RuntimeError) as e:
        create(cache_dir=tmp_path)
    lines = str(e.value).splitlines()
    path = str(get_release_path(NAME, tmp_path))
    assert NAME in lines[0]
    for number, source, reason, line in zip(
            '123', (path, HUB_ID, path), ('FileNotFound', '401', '404'), lines[1:4], strict=True):
        assert line.startswith(number) and source in line and reason in line
    for way_out in ('TIMM_HBONET_HUB_NAMESPACE', 'HF_ENDPOINT', "pretrained_cfg_overlay=dict(file='...')"):
        assert way_out in lines[4]
    assert not list(tmp_path.glob('*.pth*'))


@pytest.mark.parametrize('where', ['timm_hbonet.pretrained.hf_hub_download', 'timm_hbonet.releases.urlopen'])
@pytest.mark.parametrize('error', [TypeError, AttributeError])
def test_programming_error_comes_out(where, error, server, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise error('unexpected argument')

    if 'hf_hub' in where:
        publish(server)
    monkeypatch.setattr(where, fail)
    with pytest.raises(error, match='unexpected argument'):
        create(cache_dir=tmp_path)
    assert server.count('/d-li14/*') == 0


@contextlib.contextmanager
def ordinary_user():
    """Root may write anywhere."""
    is_root = getattr(os, 'geteuid', lambda: 1)() == 0
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


@pytest.mark.parametrize('on_hub', [True, False])
@pytest.mark.parametrize('fault, error', [
    ('read-only', 'PermissionError'), ('full', 'OSError'), ('file', 'NotADirectoryError')])
def test_cache_that_cannot_be_written(fault, error, on_hub, server, monkeypatch):
    if on_hub:
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
        if fault == 'full':
            assert_reference(create(cache_dir=folder))


def test_cached_file_that_cannot_be_read_is_not_called_damaged(server):
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o755)
        path = download_release(NAME, parent)
        path.chmod(0o000)
        os.chmod(parent, 0o555)
        server.pages.clear()
        with ordinary_user(), pytest.raises(RuntimeError, match='1. .*PermissionError'):
            find_weights(NAME, parent)
        os.chmod(parent, 0o755)
        assert is_intact(parent) or os.geteuid()


def test_many_that_download_at_once(server, tmp_path):
    get_release_path(NAME, tmp_path).write_bytes(b'left by a killed process')
    server.fail(RELEASE_FILE, barrier=threading.Barrier(4))
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: download_release(NAME, tmp_path), range(4)))
    assert server.count(RELEASE_FILE, 'GET') == 4
    assert set(paths) == set(tmp_path.iterdir()) == {get_release_path(NAME, tmp_path)}
    assert is_intact(tmp_path)


# environment variables


def test_namespace_and_revision(server, tmp_path, monkeypatch):
    find_weights(NAME, tmp_path)  # the release is in the cache
    publish(server, repo_id=f'org/{NAME}', revision='v1')
    monkeypatch.setenv('TIMM_HBONET_HUB_NAMESPACE', 'org@v1')
    assert_reference(create(cache_dir=tmp_path))
    assert server.count(f'/org/{NAME}/resolve/v1/model.safetensors', 'GET') == 1
    monkeypatch.setenv('TIMM_HBONET_HUB_NAMESPACE', 'org@v2')
    assert find_weights(NAME, tmp_path) == str(get_release_path(NAME, tmp_path))


@pytest.mark.parametrize('namespace', ['a/b', ' ', 'org/', '@v1', 'a b', 'a@b@c', 'org@', 'a--b', 'a..b', '-a', 'ä'])
def test_namespace_that_is_none(namespace, server, tmp_path, monkeypatch):
    monkeypatch.setenv('TIMM_HBONET_HUB_NAMESPACE', namespace)
    assert timm.create_model(NAME).num_classes == 1000
    with pytest.raises(ValueError, match=f"TIMM_HBONET_HUB_NAMESPACE .*'ORG@REVISION', got {namespace!r}"):
        create(cache_dir=tmp_path)
    assert server.count() == 0


def test_package_in_a_zip_on_a_machine_without_network(server, run_python, tmp_path):
    package = Path(timm_hbonet.__file__).parent
    with zipfile.ZipFile(tmp_path / 'app.zip', 'w') as file:
        for path in package.glob('*.py'):
            file.write(path, f'{package.name}/{path.name}')
    publish(server)
    on_hub = find_weights(NAME, tmp_path / 'hf/hub')
    released = find_weights('hbonet_025.in1k', tmp_path / 'torch/hub/checkpoints')
    requests = server.count()
    code = f'''if True:
        import sys
        sys.path[:0] = ['app.zip', {str(Path(__file__).parent)!r}]
        import json, timm, timm_hbonet
        assert 'app.zip' in timm_hbonet.__file__
        assert timm.create_model('hbonet_010').num_classes == 1000
        import stand_ins
        from timm_hbonet.pretrained import find_weights
        from timm_hbonet.releases import GIT_BLOBS, SHA384
        print(json.dumps([timm.list_pretrained('hbonet*'), GIT_BLOBS, SHA384]))
        stand_ins.use()
        print(json.dumps([find_weights({NAME!r}), find_weights('hbonet_025.in1k')]))
        find_weights('hbonet_035.in1k')'''
    result = run_python(
        code, HF_HUB_OFFLINE='1', HF_HOME=str(tmp_path / 'hf'), TORCH_HOME=str(tmp_path / 'torch'),
        TIMM_HBONET_AUTOLOAD='0')
    assert server.count() == requests
    (tags, git_blobs, sha384), files = map(json.loads, result.stdout.splitlines())
    assert sorted(tags) == sorted(NAMES)
    assert git_blobs == {entry['name']: entry['git_blob'] for entry in reference.CHECKPOINTS}
    assert {f'{k}.in1k': v for k, v in sha384.items()} == {
        entry['name']: entry['sha384'] for entry in reference.CHECKPOINTS if 'sha384' in entry}
    assert files == [on_hub, released]
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
    assert f'models--timm--{NAME}' in result.stdout
    assert server.count(f'/timm/{NAME}/resolve/*', 'GET') == 1
    assert server.count('github.com:443', 'CONNECT') == 1
    assert re.search('3. .*502', result.stderr), result.stderr


def test_hosts_that_do_not_resolve(server, run_python, tmp_path):
    environment = {'HF_ENDPOINT': 'http://hub.invalid', 'TORCH_HOME': str(tmp_path), 'no_proxy': '*', 'NO_PROXY': '*'}
    code = CHILD + f'''
    import os
    print(find_weights({NAME!r}))
    os.environ['TEST_RELEASE_URL'] = 'http://release.invalid'
    find_weights('hbonet_025.in1k')'''
    result = run_python(code, **environment)
    assert result.stdout == f'{get_release_path(NAME, tmp_path / "hub/checkpoints")}\n', result.stderr
    assert re.search(r'2. .*http://hub.invalid: Connect(Error|ionError|Timeout)', result.stderr), result.stderr
    assert re.search('3. .*URLError', result.stderr), result.stderr
