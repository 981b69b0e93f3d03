"""Published weights arrive and are the right ones, or an error says why not and what to do."""
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import reference
import safetensors.torch
import timm
import torch
from conftest import COMMIT, release_file, write_release_table
from hub_server import TOKEN, git_blob_id
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_data_config
from timm.models import get_pretrained_cfg, save_for_hf

from timm_hbonet.hbonet import checkpoint_filter_fn
from timm_hbonet.pretrained import download_release
from timm_hbonet.releases import RELEASES

NAMES = [entry['name'] for entry in reference.CHECKPOINTS]
NAME = 'hbonet_010.in1k'  # the smallest
LARGEST = 'hbonet_100.in1k'
HUB_ID = f'timm/{NAME}'
RELEASE_FILE = '/d-li14/HBONet/raw/*/hbonet_0_1.pth'
RELEASE = next(release for release in RELEASES if release.name == NAME)


def create(name=NAME, **kwargs):
    return timm.create_model(name, pretrained=True, **kwargs).eval()


def assert_reference(model, name=NAME):
    """Compare logits at the release's resolution with those of the authors' network."""
    size = next(entry['input_size'] for entry in reference.CHECKPOINTS if entry['name'] == name)
    case = reference.find_case(name, size, size)
    with torch.inference_mode():
        logits = model(reference.case_input(case, torch.float32))
    reference.assert_close(logits, case['logits'], 1e-4)


def converted(name=NAME):
    """Recreated weights of a release in our layout."""
    model = timm.create_model(name)
    model.load_state_dict(checkpoint_filter_fn(reference.release_state_dict(name, torch.float32), model))
    return model


def publish(server, folder, name=NAME, repo_id=HUB_ID, revision='main'):
    save_for_hf(converted(name), folder, safe_serialization=True)
    config = json.loads((folder / 'config.json').read_text())
    config.pop('model_args', None)  # defaults only, and transformers fails when it finds the number of classes twice
    (folder / 'config.json').write_text(json.dumps(config))
    files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    server.add_repository(repo_id, files, revision)
    return files


def malicious_pickle(folder):
    """A checkpoint that makes a folder when it is unpickled without care. Returns it and the folder."""
    trace = folder / 'trace'

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(trace),)

    file = io.BytesIO()
    torch.save({'conv_stem.0.weight': Malicious()}, file)
    return file.getvalue(), trace


def assert_resumed(server):
    """Whether a file was asked for from the start, again, and then from what the client had written."""
    files = [r for r in server.requests if r.method == 'GET' and r.path.endswith(('.safetensors', '.pth'))]
    first, again, rest = [r.headers.get('range', '') for r in files]
    assert (first, again) == ('', '') and re.fullmatch(r'bytes=[1-9]\d+-', rest)


def cached(folder):
    return Path(folder, Path(RELEASE.path).name)


# configs


@pytest.mark.parametrize('entry', reference.CHECKPOINTS, ids=NAMES)
def test_each_tag_has_a_complete_config(entry):
    size = entry['input_size']
    cfg = get_pretrained_cfg(entry['name'])
    assert f'{cfg.architecture}.{cfg.tag}' == entry['name']
    assert cfg.hf_hub_id == f'timm/{entry["name"]}'
    assert cfg.url.endswith(f'/d-li14/HBONet/raw/{COMMIT}/{entry["path"]}')
    assert cfg.input_size == (3, size, size) and cfg.pool_size == (size // 32, size // 32)
    assert (cfg.crop_pct, cfg.interpolation, cfg.num_classes) == (0.875, 'bilinear', 1000)
    assert cfg.mean == (0.485, 0.456, 0.406) and cfg.std == (0.229, 0.224, 0.225)
    assert (cfg.first_conv, cfg.classifier) == ('conv_stem.0', 'classifier')
    assert (cfg.license, cfg.paper_ids) == ('apache-2.0', 'arXiv:1908.03888')
    assert cfg.paper_name and cfg.origin_url == 'https://github.com/d-li14/HBONet'


def test_timm_lists_the_19():
    assert sorted(timm.list_pretrained('hbonet*')) == sorted(NAMES)


def test_table_in_the_package_is_that_of_the_release(run_python):
    code = '''if True:
        import json
        from timm_hbonet.releases import RELEASES
        print(json.dumps([{'url': r.url, **r._asdict()} for r in RELEASES]))'''
    found = json.loads(run_python(code, TIMM_HBONET_RELEASES='').stdout)
    assert len(found) == 19
    for release, entry in zip(found, reference.CHECKPOINTS, strict=True):
        assert release.pop('url') == f'https://github.com/d-li14/HBONet/raw/{COMMIT}/{entry["path"]}'
        assert release == {k: entry.get('computed_macs' if k == 'macs' else k) for k in release}


@pytest.mark.parametrize('name', [
    'hbonet_100.in1k', 'hbonet_080.r192_in1k', 'hbonet_080.r160_in1k', 'hbonet_035.r128_in1k', 'hbonet_035.r96_in1k'])
@pytest.mark.parametrize('image_size', [(500, 375), (300, 401)], ids=str)
def test_transform_is_the_authors_evaluation(name, image_size):
    width, height = image_size
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (height, width, 3), dtype=np.uint8))
    cfg = get_pretrained_cfg(name).to_dict()
    found = create_transform(**resolve_data_config(pretrained_cfg=cfg))(image)

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


@pytest.mark.parametrize('name', NAMES)
def test_each_of_the_19_loads_from_the_hub(name, server, tmp_path):
    publish(server, tmp_path / 'model', name, f'timm/{name}')
    model = create(name, cache_dir=tmp_path)
    assert_reference(model, name)
    assert model.pretrained_cfg == get_pretrained_cfg(name).to_dict()
    assert_reference(create(f'hf-hub:timm/{name}', cache_dir=tmp_path), name)
    assert server.count('/d-li14/*') == 0


def test_second_call_only_asks_the_hub_for_the_version(server, tmp_path):
    publish(server, tmp_path / 'model')
    create(cache_dir=tmp_path)
    assert server.count('/timm/*', 'GET') == 1
    assert_reference(create(cache_dir=tmp_path))
    assert server.count('/timm/*', 'GET') == 1


def test_hub_that_is_down_does_not_matter_once_weights_are_cached(server, tmp_path):
    publish(server, tmp_path / 'model')
    create(cache_dir=tmp_path)
    server.fail('*', status=500)
    assert_reference(create(cache_dir=tmp_path))
    assert server.count('/d-li14/*') == 0


def test_connection_to_the_hub_cut_in_the_middle_is_resumed(server, tmp_path):
    publish(server, tmp_path / 'model', LARGEST, f'timm/{LARGEST}')
    server.fail('*/model.safetensors', 'GET', cut=1_000_000, times=1)
    server.fail('*/model.safetensors', 'GET', cut=12_000_000, times=1)
    assert_reference(create(LARGEST, cache_dir=tmp_path), LARGEST)
    assert_resumed(server)
    assert server.count('/d-li14/*') == 0


def test_repository_with_only_a_pickled_state_dict(server, tmp_path):
    files = publish(server, tmp_path / 'model')
    torch.save(converted().state_dict(), tmp_path / 'weights.bin')
    weights = (tmp_path / 'weights.bin').read_bytes()
    server.add_repository(HUB_ID, {'config.json': files['config.json'], 'pytorch_model.bin': weights})
    assert_reference(create(cache_dir=tmp_path))
    assert_reference(create(f'hf-hub:{HUB_ID}', cache_dir=tmp_path))


@pytest.mark.parametrize('key, change', [
    ('blocks.2.0.conv.5.weight', None),
    ('blocks.2.0.conv.5.weight', torch.zeros(7, 1, 3, 3)),
    ('surprise.weight', torch.zeros(1)),
    ('classifier.bias', None),
    ('classifier.weight', torch.zeros(10, 1600)),
    ('conv_stem.0.weight', torch.zeros(4, 1, 3, 3)),
], ids=['missing', 'shape', 'extra', 'no classifier', 'classes', 'channels'])
@pytest.mark.parametrize('source', ['', 'hf-hub:timm/'], ids=['tag', 'hf-hub'])
def test_tensors_on_the_hub_that_do_not_fit(source, key, change, server, tmp_path):
    files = publish(server, tmp_path / 'model')
    tensors = safetensors.torch.load(files['model.safetensors'])
    tensors[key] = change
    tensors = {k: v for k, v in tensors.items() if v is not None}
    server.add_repository(HUB_ID, {**files, 'model.safetensors': safetensors.torch.save(tensors)})
    with pytest.raises(RuntimeError, match=f'{HUB_ID}(.|\n)*{key}'):
        create(source + NAME, cache_dir=tmp_path)
    assert server.count('/d-li14/*') == 0


def test_damaged_file_on_the_hub(server, tmp_path):
    files = publish(server, tmp_path / 'model')
    server.add_repository(HUB_ID, {'model.safetensors': files['model.safetensors'][:-1000]})
    with pytest.raises(RuntimeError, match=f'{HUB_ID} on {server.url} cannot be read. SafetensorError'):
        create(cache_dir=tmp_path)
    assert server.count('/d-li14/*') == 0


def test_malicious_pickle_on_the_hub_does_not_run(server, tmp_path):
    content, trace = malicious_pickle(tmp_path)
    server.add_repository(HUB_ID, {'pytorch_model.bin': content})
    with pytest.raises(RuntimeError, match=f'{HUB_ID} on {server.url} cannot be read. (.|\n)*mkdir'):
        create(cache_dir=tmp_path)
    assert not trace.exists()


# what timm does with weights


def test_other_numbers_of_input_channels_and_classes(server, tmp_path):
    publish(server, tmp_path / 'model')
    stem = create(cache_dir=tmp_path).conv_stem[0].weight
    model = create(cache_dir=tmp_path, in_chans=1, num_classes=10)
    torch.testing.assert_close(model.conv_stem[0].weight, stem.sum(1, keepdim=True))
    assert model(torch.zeros(1, 1, 64, 64)).shape == (1, 10)
    model = create(cache_dir=tmp_path, in_chans=4, num_classes=0)
    torch.testing.assert_close(model.conv_stem[0].weight, torch.cat([stem, stem[:, :1]], 1) * 3 / 4)
    assert model(torch.zeros(1, 4, 64, 64)).shape == (1, 1600)


@pytest.mark.parametrize('feature_cls', ['list', 'hook', 'getter'])
def test_feature_maps(feature_cls, server, tmp_path):
    publish(server, tmp_path / 'model')
    images = torch.randn(1, 3, 64, 64)
    model = create(cache_dir=tmp_path)
    features = create(cache_dir=tmp_path, features_only=True, feature_cls=feature_cls)
    assert not [m for m in features.modules() if 'state_dict' in getattr(m, 'pretrained_cfg', {})]
    with torch.inference_mode():
        torch.testing.assert_close(features(images)[-1], model.blocks(model.conv_stem(images)))


def test_data_type(server, tmp_path):
    publish(server, tmp_path / 'model')
    model = create(cache_dir=tmp_path, dtype=torch.bfloat16)
    expected = create(cache_dir=tmp_path).classifier.weight
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(model.classifier.weight, expected.bfloat16())


def test_weights_are_refused_for_another_spatial_expansion(server, tmp_path):
    with pytest.raises(ValueError, match="'nearest'.*got 'bilinear'"):
        create(cache_dir=tmp_path, spatial_expansion='bilinear')
    assert server.count() == 0


# weights that the user names


def test_other_sources_are_those_of_timm(server, tmp_path):
    folder = tmp_path / 'model'
    publish(server, folder, repo_id='org/mine')
    server.pages['/mine.pth'] = release_file(NAME)
    tensors = converted().state_dict()

    file = str(folder / 'model.safetensors')
    model = create(pretrained_cfg_overlay={'file': file})
    assert_reference(model)
    assert model.pretrained_cfg == {**get_pretrained_cfg(NAME).to_dict(), 'file': file}
    assert_reference(create(pretrained_cfg_overlay={'state_dict': tensors}))
    assert_reference(create(f'local-dir:{folder}'))
    assert server.count() == 0
    assert_reference(create(pretrained_cfg_overlay={'hf_hub_id': 'org/mine'}, cache_dir=tmp_path))
    assert server.count('/org/mine/resolve/main/model.safetensors', 'GET') == 1
    overlay = {'url': f'{server.url}/mine.pth', 'hf_hub_id': None}
    assert_reference(create(pretrained_cfg_overlay=overlay, cache_dir=tmp_path))
    assert server.count('/mine.pth', 'GET') == 1
    assert server.count('/d-li14/*') == 0


def test_missing_repository_that_the_user_names_is_an_error(server, tmp_path):
    with pytest.raises(Exception, match='org/mine'):
        create(pretrained_cfg_overlay={'hf_hub_id': 'org/mine'}, cache_dir=tmp_path)
    assert server.count('/d-li14/*') == 0


@pytest.mark.parametrize('name, content, found', [
    ('w.pth', b'', 'it is empty'),
    ('w.safetensors', b'', 'it is empty'),
    ('w.pth', b'<!DOCTYPE html><html></html>', "it is text that starts with b'<!DOCTYPE"),
    ('w.safetensors', b'{"error": "not found"}', "it is text that starts with b'{\"error"),
    ('w.pth', b'version https://git-lfs.github.com/spec/v1\n', "it is text that starts with b'version"),
    ('w.pth', 'truncated', 'Error'),
    ('w.safetensors', bytes(1000), 'SafetensorError'),
])
def test_file_that_is_no_checkpoint(name, content, found, tmp_path):
    path = tmp_path / name
    path.write_bytes(release_file(NAME)[:100_000] if content == 'truncated' else content)
    message = f'Cannot load weights from {re.escape(str(path))}: (.|\n)*{found}(.|\n)* must be a safetensors file, or'
    with pytest.raises(RuntimeError, match=message):
        create(pretrained_cfg_overlay={'file': path})


def test_malicious_file_does_not_run(tmp_path):
    content, trace = malicious_pickle(tmp_path)
    path = tmp_path / 'w.pth'
    path.write_bytes(content)
    with pytest.raises(RuntimeError, match=f'{re.escape(str(path))}(.|\n)*mkdir'):
        create(pretrained_cfg_overlay={'file': path})
    assert not trace.exists()


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f'no file {re.escape(str(tmp_path / "w.pth"))}'):
        create(pretrained_cfg_overlay={'file': tmp_path / 'w.pth'})


def test_file_of_another_architecture_is_named(tmp_path):
    path = tmp_path / 'w.pth'
    path.write_bytes(release_file('hbonet_025.in1k'))
    with pytest.raises(RuntimeError, match=f'hbonet_010 with the weights from {re.escape(str(path))}'):
        create(pretrained_cfg_overlay={'file': path})


# from the authors' release


def assert_falls_back(server, folder, caplog, reason):
    model = create(cache_dir=folder)
    assert_reference(model)
    assert model.pretrained_cfg == get_pretrained_cfg(NAME).to_dict()
    assert server.count(RELEASE_FILE, 'GET') == 1
    assert re.search(f'{HUB_ID} on {server.url}: .*{reason}', caplog.text)
    RELEASE.verify(cached(folder))
    requests = server.count()
    assert_reference(create(cache_dir=folder))
    assert server.count() == requests, 'the second call asks nobody'


def test_repository_missing_on_the_hub(server, tmp_path, caplog, monkeypatch, capfd):
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    monkeypatch.setenv('TQDM_POSITION', '-1')  # shows progress without a terminal
    assert_falls_back(server, tmp_path, caplog, '404 Client Error. Repository Not Found')
    assert 'hbonet_0_1.pth: 100%' in capfd.readouterr().err
    tokens = {r.path.split('/')[1]: r.headers.get('authorization') for r in server.requests}
    assert tokens['timm'] == f'Bearer {TOKEN}'
    assert tokens['d-li14'] is None, 'the token goes to the Hub only'


def test_repository_missing_on_the_hub_for_a_stranger(server, tmp_path, caplog):
    assert_falls_back(server, tmp_path, caplog, '401 Unauthorized')


def test_token_that_has_expired(server, tmp_path, caplog, monkeypatch):
    publish(server, tmp_path / 'model')
    monkeypatch.setenv('HF_TOKEN', 'hf_expired')
    assert_falls_back(server, tmp_path, caplog, '401')


def test_file_missing_on_the_hub(server, tmp_path, caplog):
    server.add_repository(HUB_ID, {'README.md': b''})
    assert_falls_back(server, tmp_path, caplog, '404 Client Error. Entry Not Found')


def test_error_of_the_hub(server, tmp_path, caplog):
    publish(server, tmp_path / 'model')
    server.fail('/timm/*', status=500)
    assert_falls_back(server, tmp_path, caplog, '500 Internal Server Error')
    assert server.count('/timm/*') == 1, 'the user does not wait for retries'


def test_hub_that_never_answers(server, tmp_path, caplog):
    publish(server, tmp_path / 'model')
    server.fail('/timm/*', hang=True)
    assert_falls_back(server, tmp_path, caplog, 'Timeout')
    assert server.count('/timm/*') == 1, 'the user does not wait for retries'


def test_config_that_a_script_passes_on(server, tmp_path):
    cfg = get_pretrained_cfg(NAME).to_dict()
    assert_reference(create('hbonet_010', pretrained_cfg=cfg, cache_dir=tmp_path))
    assert server.count(RELEASE_FILE, 'GET') == 1


def test_connection_to_the_release_cut_in_the_middle_is_resumed(server, tmp_path):
    server.fail('*/hbonet_1_0.pth', cut=1_000_000, times=1)
    server.fail('*/hbonet_1_0.pth', cut=12_000_000, times=1)
    assert_reference(create(LARGEST, cache_dir=tmp_path), LARGEST)
    assert_resumed(server)


def test_wrong_digest_is_reported_and_the_file_deleted(server, tmp_path):
    content, trace = malicious_pickle(tmp_path)
    server.fail(RELEASE_FILE, content=content)
    folder = tmp_path / 'cache'
    with pytest.raises(RuntimeError, match=f'git blob id is {git_blob_id(content)}, but .* is {RELEASE.git_blob}'):
        create(cache_dir=folder)
    assert list(folder.iterdir()) == [] and not trace.exists()


def test_second_digest_counts_too(tmp_path):
    path = cached(tmp_path)
    path.write_bytes(release_file(NAME))
    RELEASE.verify(path)
    with pytest.raises(ValueError, match='the SHA-384 is [0-9a-f]{96}, but that of hbonet_010.in1k is 00'):
        RELEASE._replace(sha384='00').verify(path)


def test_file_that_a_killed_process_left_is_replaced(server, tmp_path, caplog):
    content = release_file(NAME)[:100_000]
    cached(tmp_path).write_bytes(content)
    assert_reference(create(cache_dir=tmp_path))
    assert re.search(f'Deleting .*{git_blob_id(content)}.*{RELEASE.git_blob}', caplog.text)
    RELEASE.verify(cached(tmp_path))


def test_error_tells_what_was_tried_and_what_to_do(server, tmp_path):
    server.pages.clear()
    with pytest.raises(RuntimeError) as e:
        create(cache_dir=tmp_path)
    lines = str(e.value).splitlines()
    assert lines[0] == f'Found no weights for {NAME}. Tried, in this order:'
    assert lines[1] == f'1. {cached(tmp_path)}: not there'
    assert lines[2].startswith(f'2. {HUB_ID} on {server.url}: ') and '401' in lines[2]
    assert lines[3].startswith(f'3. {RELEASE.url} to {cached(tmp_path)}: ') and '404' in lines[3]
    for way_out in ('TIMM_HBONET_HUB_NAMESPACE', 'HF_ENDPOINT', "pretrained_cfg_overlay=dict(file='...')"):
        assert way_out in lines[4]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('on_hub', [True, False])
def test_cache_folder_that_cannot_be_made(on_hub, server, tmp_path):
    if on_hub:
        publish(server, tmp_path / 'model')
    (tmp_path / 'file').touch()  # not even root can make a folder in a file
    folder = tmp_path / 'file' / 'cache'
    with pytest.raises(RuntimeError, match=f'{re.escape(str(cached(folder)))}: .*Error(.|\n)*set `cache_dir`'):
        create(cache_dir=folder)


@pytest.mark.skipif(not shutil.which('setpriv'), reason='needs setpriv, of the package util-linux')
def test_cache_folder_that_is_read_only(server, tmp_path):
    folder = tmp_path / 'cache'
    folder.mkdir(mode=0o555)
    code = f"import timm; timm.create_model({NAME!r}, pretrained=True, cache_dir={str(folder)!r})"
    # root too cannot write there without this capability
    command = ['setpriv', '--bounding-set', '-dac_override', sys.executable, '-c', code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and list(folder.iterdir()) == []
    assert re.search(f'{re.escape(str(cached(folder)))}: PermissionError(.|\n)*set `cache_dir`', result.stderr)


@pytest.mark.parametrize('on_hub', [True, False])
def test_disk_full(on_hub, server, tmp_path):
    resource = pytest.importorskip('resource', reason='limits of file size exist on Unix only')
    if on_hub:
        publish(server, tmp_path / 'model')
    folder = tmp_path / 'cache'
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        with pytest.raises(RuntimeError, match=f'{re.escape(str(cached(folder)))}: OSError(.|\n)*set `cache_dir`'):
            create(cache_dir=folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [path for path in folder.rglob('*') if path.stat().st_size > 1000 and path.is_file()]
    assert_reference(create(cache_dir=folder))


@pytest.mark.parametrize('left', [None, b'the start of a file'])
def test_two_processes_that_download_at_once(left, server, tmp_path):
    if left:
        cached(tmp_path).write_bytes(left)
    server.fail(RELEASE_FILE, barrier=threading.Barrier(2))
    code = f'''if True:
        from timm_hbonet.pretrained import download_release
        from timm_hbonet.releases import RELEASES
        download_release(next(release for release in RELEASES if release.name == {NAME!r}), {str(tmp_path)!r})'''
    processes = [subprocess.Popen([sys.executable, '-c', code]) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert server.count(RELEASE_FILE, 'GET') == 2
    assert list(tmp_path.iterdir()) == [cached(tmp_path)]
    RELEASE.verify(cached(tmp_path))
    assert download_release(RELEASE, tmp_path) == cached(tmp_path) and server.count(RELEASE_FILE, 'GET') == 2


# environment variables


PRINT_LOGITS = '''
import sys, json, timm, torch
sys.path.insert(0, {tests!r})
import reference
torch.set_num_threads(1)
for name in {names!r}:
    model = timm.create_model(name, pretrained=True).eval()
    case = reference.find_case(name, 224, 224)
    with torch.inference_mode():
        reference.assert_close(model(reference.case_input(case, torch.float32)), case['logits'], 1e-4)
    print(model.pretrained_cfg['hf_hub_id'])
'''


def code_that_loads(*names):
    return PRINT_LOGITS.format(tests=str(Path(__file__).parent), names=names)


def test_namespace_revision_caches_and_offline_mode(server, run_python, tmp_path):
    publish(server, tmp_path / 'model', repo_id=f'org/{NAME}', revision='v1')
    environment = {
        'HF_HOME': str(tmp_path / 'a'), 'TORCH_HOME': str(tmp_path / 'b'), 'TIMM_HBONET_HUB_NAMESPACE': 'org@v1'}
    code = code_that_loads(NAME, 'hbonet_025.in1k')
    online = run_python(code, **environment)
    assert online.returncode == 0, online.stderr
    assert online.stdout.split() == [f'org/{NAME}@v1', 'org/hbonet_025.in1k@v1']
    assert server.count(f'/org/{NAME}/resolve/v1/model.safetensors', 'GET') == 1
    assert (tmp_path / 'a' / 'hub' / f'models--org--{NAME}').is_dir()
    assert [path.name for path in (tmp_path / 'b').rglob('*.*')] == ['hbonet_0_25.pth']

    requests = server.count()
    offline = run_python(code, HF_HUB_OFFLINE='1', **environment)
    assert offline.returncode == 0, offline.stderr
    offline = run_python(code_that_loads('hbonet_035.in1k'), HF_HUB_OFFLINE='1', **environment)
    assert offline.returncode == 1
    assert re.search('hbonet_0_35.pth: OfflineModeIsEnabled: .*HF_HUB_OFFLINE', offline.stderr)
    assert server.count() == requests


def test_namespace_of_the_user_comes_before_a_release_in_the_cache(server, run_python, tmp_path):
    environment = {'HF_HOME': str(tmp_path / 'a'), 'TORCH_HOME': str(tmp_path / 'b')}
    assert run_python(code_that_loads(NAME), **environment).returncode == 0
    publish(server, tmp_path / 'model', repo_id=f'org/{NAME}')
    result = run_python(code_that_loads(NAME), TIMM_HBONET_HUB_NAMESPACE='org', **environment)
    assert result.returncode == 0, result.stderr
    assert server.count(f'/org/{NAME}/resolve/main/model.safetensors', 'GET') == 1


@pytest.mark.parametrize('namespace', ['a/b', ' ', 'org/', '@v1', 'a b', 'a@b@c'])
def test_namespace_that_is_none(namespace, run_python):
    result = run_python('import timm_hbonet.releases', TIMM_HBONET_HUB_NAMESPACE=namespace)
    assert f"ValueError: TIMM_HBONET_HUB_NAMESPACE must be 'ORG' or 'ORG@REVISION', got {namespace!r}." in result.stderr


def test_proxy_carries_the_hub_and_the_release(server, run_python, tmp_path):
    publish(server, tmp_path / 'model')
    result = run_python(
        code_that_loads(NAME, 'hbonet_025.in1k'), HF_ENDPOINT='http://hub.invalid', HF_HOME=str(tmp_path / 'a'),
        TORCH_HOME=str(tmp_path / 'b'), NO_PROXY='', no_proxy='', HTTP_PROXY=server.url, http_proxy=server.url,
        TIMM_HBONET_RELEASES=str(write_release_table(tmp_path / 't.json', 'http://release.invalid/d-li14/HBONet')))
    assert result.returncode == 0, result.stderr
    assert server.count(f'/timm/{NAME}/resolve/*', 'GET') == 1 and server.count('/d-li14/*', 'GET') == 1


def test_hosts_that_do_not_resolve(server, run_python, tmp_path):
    table = str(write_release_table(tmp_path / 't.json', 'http://release.invalid/d-li14/HBONet'))
    environment = {'HF_ENDPOINT': 'http://hub.invalid', 'TORCH_HOME': str(tmp_path), 'no_proxy': '*', 'NO_PROXY': '*'}
    result = run_python(code_that_loads(NAME), **environment)
    assert result.returncode == 0, result.stderr
    assert f'{HUB_ID} on http://hub.invalid: ConnectError' in result.stderr
    result = run_python(code_that_loads('hbonet_025.in1k'), TIMM_HBONET_RELEASES=table, **environment)
    assert result.returncode == 1
    assert re.search('2. .*hub.invalid: ConnectError.*\n3. http://release.invalid.*: ConnectError', result.stderr)


def test_table_of_releases_that_cannot_be_read(run_python, tmp_path):
    (tmp_path / 't.json').write_text('{}')
    result = run_python('import timm_hbonet.releases', TIMM_HBONET_RELEASES='t.json')
    assert 'ValueError: t.json cannot be used as a table of releases. KeyError' in result.stderr


# other programs


def test_transformers_loads_a_published_model(server, tmp_path):
    transformers = pytest.importorskip('transformers', reason='install it with `pip install transformers`')
    publish(server, tmp_path / 'model')
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (300, 400, 3), dtype=np.uint8))
    model = transformers.AutoModelForImageClassification.from_pretrained(HUB_ID, cache_dir=tmp_path).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(HUB_ID, cache_dir=tmp_path)
    inputs = processor(image, return_tensors='pt')
    expected = create(cache_dir=tmp_path)
    transform = create_transform(**resolve_data_config(model=expected))
    torch.testing.assert_close(inputs['pixel_values'][0], transform(image))
    with torch.inference_mode():
        expected = expected(transform(image)[None])[0]
        torch.testing.assert_close(model(**inputs).logits[0], expected)
    classify = transformers.pipeline('image-classification', model=model, image_processor=processor)
    found = classify(image, top_k=1)[0]
    assert found['label'] == ImageNetInfo().index_to_description(int(expected.argmax()))
    assert found['score'] == pytest.approx(expected.softmax(0).max().item(), rel=1e-4)
