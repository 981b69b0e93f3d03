"""A maintainer converts the release's files, and publishes them with model cards on the Hub."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import reference
import timm
import torch
from hub_server import TOKEN, git_blob_id
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from stand_ins import release_file
from timm.data import ImageNetInfo, create_transform, resolve_data_config

from timm_hbonet.pretrained import find_weights
from timm_hbonet.releases import GIT_BLOBS, get_release_path

SCRIPTS = Path(__file__).parents[1] / 'scripts'
sys.path.insert(0, str(SCRIPTS))

import convert_checkpoint  # noqa: E402
import publish_to_hub  # noqa: E402
from model_card import make_card  # noqa: E402
from scores import SCORES  # noqa: E402

FILES = {'README.md', 'config.json', 'model.safetensors', 'test/rand_tensors.safetensors'}
NAMES = [entry['name'] for entry in reference.CHECKPOINTS]
ENTRIES = {entry['name']: entry for entry in reference.CHECKPOINTS}
CONVERTED = ['hbonet_010.in1k', 'hbonet_035.r96_in1k']  # small ones
# counted by fvcore's ActivationCountAnalysis
ACTIVATIONS = {
    'hbonet_100.in1k': 5124440, 'hbonet_080.in1k': 3968432, 'hbonet_050.in1k': 2498432, 'hbonet_035.in1k': 1965900,
    'hbonet_025.in1k': 1340660, 'hbonet_010.in1k': 680532, 'hbonet_080.r192_in1k': 2915848,
    'hbonet_080.r160_in1k': 2025200, 'hbonet_080.r128_in1k': 1296488, 'hbonet_080.r96_in1k': 729712,
    'hbonet_035.r192_in1k': 1444600, 'hbonet_035.r160_in1k': 1003500, 'hbonet_035.r128_in1k': 642600,
    'hbonet_035.r96_in1k': 361900, 'hbonet_050_d8.in1k': 2882984, 'hbonet_060.r192_in1k': 2355688,
    'hbonet_025_d8.in1k': 1646028, 'hbonet_025_4x_d8.in1k': 1546656, 'hbonet_025_8x_d8.in1k': 1517256,
}


@pytest.fixture
def server(release_site):
    """The release, and a Hub without repositories."""
    return release_site


@pytest.fixture
def run(monkeypatch, capsys):
    """Function that runs a script's main() here. Returns its exit status, and what it wrote."""

    def run(module, *args, **environment):
        with monkeypatch.context() as context:
            context.setattr(sys, 'argv', [module.__name__, *map(str, args)])
            for k, v in environment.items():
                context.setenv(k, v)
            error = ''
            try:
                module.main()
            except SystemExit as e:
                error = str(e)
        out, err = capsys.readouterr()
        assert TOKEN not in out + err + error
        return SimpleNamespace(error=error, out=out, err=err)

    return run


@pytest.fixture
def publish(run):
    """Function that runs publish_to_hub.py for the namespace org."""

    def publish(*args, **environment):
        return run(publish_to_hub, '--namespace', 'org', *args, **{'HF_TOKEN': TOKEN, **environment})

    return publish


@pytest.fixture
def convert(run, tmp_path):
    """Function that converts a file of this content to the folder `out`."""

    def convert(content, *args):
        path = tmp_path / 'checkpoint.pth'
        path.write_bytes(content)
        return run(convert_checkpoint, path, '--output', tmp_path / 'out', *args)

    return convert


@pytest.fixture(scope='module')
def first_dry_run(tmp_path_factory):
    """Folder of the first dry run, what it wrote, and the paths that it asked for."""
    return SimpleNamespace(folder=tmp_path_factory.mktemp('dry_run'), result=None, requests=None)


@pytest.fixture
def dry_run(first_dry_run, run, server):
    """Folder of folders as `publish_to_hub.py --dry-run` writes them for two of the models."""
    if not first_dry_run.result:
        first_dry_run.result = run(publish_to_hub, '--dry-run', first_dry_run.folder, '--only', *CONVERTED)
        first_dry_run.requests = list(server.requests)
        server.requests.clear()
    return first_dry_run.folder


def files_of(folder: Path) -> set:
    return {path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file()}


def test_dry_run(dry_run, first_dry_run, run):
    assert not first_dry_run.result.error and '2/2' in first_dry_run.result.err  # progress
    assert files_of(dry_run) == {f'{name}/{file}' for name in CONVERTED for file in FILES}
    assert len(first_dry_run.requests) == 2 and all(r.path.startswith('/d-li14/') for r in first_dry_run.requests)
    for name in CONVERTED:
        size = ENTRIES[name]['input_size']
        config = json.loads((dry_run / name / 'config.json').read_text())
        assert f'{config["architecture"]}.{config["pretrained_cfg"]["tag"]}' == name
        assert config['pretrained_cfg']['input_size'] == [3, size, size]
        assert not {'file', 'url', 'hf_hub_id'} & set(config['pretrained_cfg'])

    # again, nothing is written
    times = {path: path.stat().st_mtime_ns for path in dry_run.rglob('*')}
    result = run(publish_to_hub, '--dry-run', dry_run, '--only', *CONVERTED[:1])
    assert not result.error and 'was there already' in result.out
    assert {path: path.stat().st_mtime_ns for path in dry_run.rglob('*')} == times


@pytest.mark.parametrize('name', CONVERTED)
def test_converted_model(name, dry_run):
    tensors = load_file(dry_run / name / 'test/rand_tensors.safetensors')
    size = ENTRIES[name]['input_size']
    assert tensors['input'].shape == (1, 3, size, size)
    model = timm.create_model(f'local-dir:{dry_run / name}', pretrained=True).eval()
    case = reference.find_case(name, size, size)
    with torch.inference_mode():
        reference.assert_close(model(reference.case_input(case, torch.float32)), case['logits'], 1e-4)
        model.double()
        features = model.forward_features(tensors['input'].double())
        pre_logits = model.forward_head(features, pre_logits=True)
        found = {'features': features, 'pre_logits': pre_logits, 'output': model(tensors['input'].double())}
    assert {'input', *found} == set(tensors)
    for key, tensor in found.items():
        torch.testing.assert_close(tensor.float(), tensors[key])


def test_transformers_loads_a_converted_folder(dry_run):
    transformers = pytest.importorskip('transformers', reason='needs pip install -e .[clients]')
    folder = dry_run / 'hbonet_035.r96_in1k'
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (300, 400, 3), dtype=np.uint8))
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    inputs = processor(image, return_tensors='pt')
    expected = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    transform = create_transform(**resolve_data_config(model=expected))
    torch.testing.assert_close(inputs['pixel_values'][0], transform(image))
    with torch.inference_mode():
        expected = expected(transform(image)[None])[0]
        torch.testing.assert_close(model(**inputs).logits[0], expected)
    classify = transformers.pipeline('image-classification', model=model, image_processor=processor)
    found = classify(image, top_k=1)[0]
    assert found['label'] == ImageNetInfo().index_to_description(int(expected.argmax()))
    assert found['score'] == pytest.approx(expected.softmax(0).max().item(), rel=1e-4)


# cards


def test_scores_are_those_of_the_release():
    keys = ('top1', 'top5', 'published_mflops', 'computed_macs', 'table')
    assert SCORES == {name: tuple(entry[k] for k in keys) for name, entry in ENTRIES.items()}


@pytest.mark.parametrize('name', NAMES)
def test_card_has_the_published_and_computed_figures(name, server, tmp_path):
    entry = ENTRIES[name]
    architecture = reference.ARCHITECTURES[name.split('.')[0]]
    path = tmp_path / 'README.md'
    make_card(name, f'org/{name}', GIT_BLOBS[name]).save(path)
    card = ModelCard.load(path)
    if int(huggingface_hub.__version__.split('.')[0]) >= 2:  # older clients ask huggingface.co, whatever the endpoint
        card.validate()
        assert server.count('/api/validate-yaml', 'POST') == 1
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == ('apache-2.0', 'timm', 'image-classification')
    assert data.tags == ['image-classification', 'timm', 'transformers', 'hbonet']
    assert (data.datasets, data.architecture, data.model_name) == (['imagenet-1k'], name.split('.')[0], name)
    top1, top5 = data.eval_results
    assert (top1.metric_value, top5.metric_value) == (entry['top1'], entry['top5'])
    for result in (top1, top5):
        assert result.metric_name.endswith('published by the authors')
        assert result.source_url == 'https://github.com/d-li14/HBONet' and '1908.03888' in result.source_name
    for line in (
            f'**Parameters:** {architecture["params"] / 1e6:.2f} M\n',
            f'**MACs:** {entry["computed_macs"] / 1e6:.1f} M ({entry["computed_macs"] / 1e9:.3f} G)\n',
            f'**Activations:** {ACTIVATIONS[name] / 1e6:.2f} M\n',
            f'**Image size:** {entry["input_size"]} x {entry["input_size"]}, centre crop of 87.5%, bilinear ',
            f'**Accuracy:** {entry["top1"]:.1f}% top-1, {entry["top5"]:.1f}% top-5, as the authors published it ',
    ):
        assert line in card.text
    assert entry['path'] in card.text and GIT_BLOBS[name] in card.text
    for fact in ('none had ever been opened', 'recreated', 'float64', 'digests', 'accuracy has not been measured'):
        assert fact in card.text


def test_card_compares_all_models():
    text = make_card('hbonet_050.in1k', 'org/x', GIT_BLOBS['hbonet_050.in1k']).text
    rows = [[cell.strip(' *\\') for cell in row] for row in re.findall(r'^\|' + r'([^|]+)\|' * 7 + '$', text, re.M)[2:]]
    expected = []
    for entry in sorted(reference.CHECKPOINTS, key=lambda entry: -entry['top1']):
        params = reference.ARCHITECTURES[entry['name'].split('.')[0]]['params']
        expected += [[
            entry['name'], f'{entry["top1"]:.1f}', f'{entry["top5"]:.1f}', f'{params / 1e6:.2f}',
            f'{entry["computed_macs"] / 1e6:.1f}', str(entry['published_mflops']), str(entry['input_size'])]]
    assert rows == expected
    # the likely slip in the release's table
    assert re.findall(r'^\| (\S+) .*\\\*', text, re.M) == ['hbonet_050_d8.in1k', 'hbonet_060.r192_in1k']
    assert '\n\\* The authors' in text


def test_usage_in_the_card_runs_as_written(dry_run, tmp_path, monkeypatch, capsys):
    name = 'hbonet_035.r96_in1k'
    text = ModelCard.load(dry_run / name / 'README.md').text
    snippets = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    assert len(snippets) == 3
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient('L').resize((300, 260)).save('image.jpg')
    variables, printed = [], []
    for snippet in snippets:
        assert f"'hf-hub:timm/{name}'" in snippet
        variables.append({})
        exec(snippet.replace(f'hf-hub:timm/{name}', f'local-dir:{dry_run / name}'), variables[-1])
        printed.append(capsys.readouterr().out.splitlines())
    assert variables[0]['logits'].shape == (1, 1000)
    assert len(printed[0]) == 5 and all(re.match(r'\d+\.\d% \w', line) for line in printed[0])
    assert printed[1] == re.findall(r'^# (.*)', snippets[1], re.M) and len(printed[1]) == 5
    assert variables[2]['embedding'].shape == (1, 1600)
    assert '# 1 x 1600' in snippets[2]


# publishing


def test_model_is_published_and_loads_from_there(dry_run, server, publish, tmp_path, monkeypatch):
    name = 'hbonet_010.in1k'
    result = publish('--only', name)
    assert not result.error, result.error
    published = server.files(f'org/{name}')
    assert set(published) - {'.gitattributes'} == FILES
    # conversion gives the same files every time, a card names its own repository
    for file in FILES - {'README.md'}:
        assert published[file] == (dry_run / name / file).read_bytes()
    assert published['README.md'].count(f'hf-hub:org/{name}'.encode()) == 3

    monkeypatch.setenv('TIMM_HBONET_HUB_NAMESPACE', 'org')
    assert Path(find_weights(name, tmp_path / 'a')).read_bytes() == published['model.safetensors']
    model = timm.create_model(f'hf-hub:org/{name}', pretrained=True, cache_dir=tmp_path / 'b')
    assert model.pretrained_cfg['input_size'] == [3, 224, 224]

    # of a repository where a file differs, that file alone is uploaded
    files = server.files('org/hbonet_010.in1k')
    server.add_repository('org/hbonet_010.in1k', {**files, 'config.json': b'{}', 'NOTES.md': b'kept'})
    batches = server.count('/org/hbonet_010.in1k.git/*')
    result = publish('--only', 'hbonet_010.in1k')
    assert 'hbonet_010.in1k: uploaded config.json\n' in result.out
    assert server.files('org/hbonet_010.in1k') == {**files, 'NOTES.md': b'kept'}
    assert server.count('/org/hbonet_010.in1k.git/*') == batches


@pytest.fixture
def quick(monkeypatch):
    """Conversion that takes no time, for what does not depend on the content of the files."""

    def convert(path, name, repo_id, folder):
        assert path.read_bytes() == release_file(name)
        (folder / 'test').mkdir(parents=True)
        for file in FILES:
            (folder / file).write_text(f'---\nlicense: apache-2.0\n---\n{file} of {repo_id}')
        return True

    monkeypatch.setattr(publish_to_hub, 'convert', convert)


def test_all_19_are_published_once(quick, server, publish):
    assert not publish().error
    assert set(server.repositories) == {f'org/{name}' for name in NAMES}
    for repo_id in server.repositories:
        assert all(server.files(repo_id)[file].endswith(f'{file} of {repo_id}'.encode()) for file in FILES)
    before = len(server.requests)
    result = publish()
    assert result.out == ''.join(f'org/{name}: is up to date\n' for name in GIT_BLOBS)
    requests = [(r.method, r.path) for r in server.requests[before:]]
    assert requests == [
        ('GET', '/api/whoami-v2'), *(('POST', f'/api/models/org/{name}/paths-info/main') for name in GIT_BLOBS)]


def test_failure_keeps_no_other_from_being_published_and_can_be_run_again(quick, server, publish):
    server.fail('/api/models/org/hbonet_025.in1k/commit/main', 'POST', cut=100)
    server.fail('*/org/hbonet_050.in1k/*', status=403, headers={'X-Error-Message': f'{TOKEN} must not write here'})
    names = ('hbonet_050.in1k', 'hbonet_025.in1k', 'hbonet_010.in1k')
    result = publish('--only', *names)
    assert 'error: 2 of 3 failed' in result.error
    assert re.search(r'^hbonet_025\.in1k: \w+: ', result.error, re.M)
    assert re.search(r'^hbonet_050\.in1k: \w+: .*\*\*\* must not write here', result.error, re.M)
    assert set(server.files('org/hbonet_010.in1k')) > FILES
    assert not FILES & set(server.files('org/hbonet_025.in1k'))

    server.faults.clear()
    uploads = server.count('/lfs/*', 'PUT')
    assert not publish('--only', *names[1:]).error
    assert set(server.files('org/hbonet_025.in1k')) > FILES
    assert server.count('/lfs/*', 'PUT') == uploads  # the large files had arrived the first time


def test_programming_error_comes_out(server, publish, monkeypatch):
    monkeypatch.setattr(publish_to_hub, 'convert', lambda: None)
    with pytest.raises(TypeError):
        publish('--only', 'hbonet_010.in1k')


def test_expired_token_is_told_before_anything_is_done(server):
    server.tokens.clear()
    command = [sys.executable, str(SCRIPTS / 'publish_to_hub.py'), '--namespace', 'org']
    result = subprocess.run(command, env={**os.environ, 'HF_TOKEN': TOKEN}, capture_output=True, text=True, timeout=200)
    assert result.returncode == 1
    assert re.fullmatch(r'error: .*does not accept the token \(401\).*`hf auth login`.*HF_TOKEN.*\n', result.stderr)
    assert TOKEN not in result.stdout + result.stderr
    assert server.count() == server.count('/api/whoami-v2')


@pytest.mark.parametrize('args, message', [
    (['--namespace', 'org', '--only', 'hbonet_100'], "no model 'hbonet_100', choose from hbonet_100.in1k, "),
    ([], '--namespace is required'),
    (['--namespace', 'org'], 'there is no token of the Hub'),
])
def test_what_publish_refuses(args, message, server, run):
    result = run(publish_to_hub, *args, HF_TOKEN='')
    assert message in result.err + result.error and result.error
    assert server.count() == 0


# conversion


def test_convert_knows_the_model_by_the_digest_and_changes_no_folder(convert, dry_run, server, tmp_path):
    folder = tmp_path / 'out/hbonet_010.in1k'
    folder.mkdir(parents=True)  # empty, it loses nothing
    assert convert(release_file('hbonet_010')).out == f'{folder}\n'
    assert files_of(tmp_path / 'out') == {f'hbonet_010.in1k/{file}' for file in FILES}
    for file in FILES:
        assert (folder / file).read_bytes() == (dry_run / 'hbonet_010.in1k' / file).read_bytes()

    (folder / 'notes.txt').write_text('mine')
    assert 'was there already' in convert(release_file('hbonet_010')).out
    (folder / 'config.json').write_text('{}')
    assert re.search('hbonet_010.in1k exists, with another config.json', convert(release_file('hbonet_010')).error)
    assert (folder / 'config.json').read_text() == '{}'
    assert files_of(tmp_path / 'out') == {f'hbonet_010.in1k/{file}' for file in (*FILES, 'notes.txt')}


def test_convert_replaces_no_file(convert, server, tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/hbonet_010.in1k').write_text('mine')
    assert convert(release_file('hbonet_010')).error.startswith('error: ')
    assert (tmp_path / 'out/hbonet_010.in1k').read_text() == 'mine'


def test_convert_asks_for_the_model_where_files_are_the_same(convert, server, tmp_path):
    result = convert(release_file('hbonet_035'))
    assert re.search(r'is the file of hbonet_035.in1k, hbonet_035.r192_in1k, .*--model', result.error)
    assert not (tmp_path / 'out').exists()


TRUSTED = ('--model', 'hbonet_010.in1k', '--allow-unknown-digest')


@pytest.mark.parametrize('content, args, message', [
    (lambda: release_file('hbonet_010')[:-1000], (), r'has git blob id [0-9a-f]{40}, which is not that of any release'),
    (lambda: release_file('hbonet_025'), TRUSTED[:2], 'which is not that of hbonet_010.in1k'),
    (lambda: release_file('hbonet_010')[:-1000], TRUSTED, 'Cannot load .* as the weights of hbonet_010'),
    (lambda: release_file('hbonet_025'), TRUSTED, 'Cannot load .* as the weights of hbonet_010'),
    (lambda: b'<html>', TRUSTED, 'Cannot load .* as the weights of hbonet_010'),
    (lambda: b'', TRUSTED, 'Cannot load .* as the weights of hbonet_010'),
], ids=['unknown digest', 'digest of another', 'truncated', 'another model', 'web page', 'empty'])
def test_convert_refuses_what_is_not_the_checkpoint(convert, server, tmp_path, content, args, message):
    result = convert(content(), *args)
    assert re.match(f'error: .*{message}', result.error) and '\n' not in result.error
    assert not (tmp_path / 'out').exists()


def test_convert_runs_no_code_of_a_file(convert, server, tmp_path):
    class Malicious:
        def __reduce__(self):
            return open, (str(tmp_path / 'executed'), 'w')

    torch.save({'features.0.0.weight': Malicious()}, tmp_path / 'malicious.pth')
    assert re.match('error: Cannot load .*', convert((tmp_path / 'malicious.pth').read_bytes(), *TRUSTED).error)
    assert not (tmp_path / 'executed').exists() and not (tmp_path / 'out').exists()


def test_card_of_an_unknown_file_claims_no_accuracy(convert, server, tmp_path):
    weights = reference.release_state_dict('hbonet_010', torch.float32)
    torch.save({'state_dict': weights}, tmp_path / 'own.pth')
    assert not convert((tmp_path / 'own.pth').read_bytes(), *TRUSTED).error
    card = ModelCard.load(tmp_path / 'out/hbonet_010.in1k/README.md')
    assert card.data.eval_results is None
    assert 'of unknown origin' in card.text and '**Accuracy:**' not in card.text
    assert git_blob_id((tmp_path / 'own.pth').read_bytes()) in card.text


def test_convert_keeps_nothing_that_does_not_load_to_identical_logits(convert, server, tmp_path, monkeypatch):
    def save_damaged(model, folder, **kwargs):
        timm.models.save_for_hf(model, folder, **kwargs)
        weights = load_file(Path(folder, 'model.safetensors'))
        weights['classifier.bias'][7] += 1e-3
        save_file(weights, Path(folder, 'model.safetensors'))

    monkeypatch.setattr(convert_checkpoint, 'save_for_hf', save_damaged)
    assert 'does not give the logits' in convert(release_file('hbonet_010')).error
    assert not list((tmp_path / 'out').iterdir())
    assert get_release_path('hbonet_010.in1k').name.startswith('hbonet_0_1-')
