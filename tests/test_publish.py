"""A maintainer converts the release's files, and publishes them with model cards on the Hub."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Iterator

import pytest
import reference
import timm
import torch
from conftest import release_file
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

SCRIPTS = Path(__file__).parents[1] / 'scripts'
sys.path.insert(0, str(SCRIPTS))

import convert_checkpoint  # noqa: E402

FILES = {'README.md', 'config.json', 'model.safetensors', 'test/rand_tensors.safetensors'}
NAMES = [entry['name'] for entry in reference.CHECKPOINTS]
ENTRIES = {entry['name']: entry for entry in reference.CHECKPOINTS}
# counted by fvcore's ActivationCountAnalysis
ACTIVATIONS = {
    'hbonet_100.in1k': 5124440, 'hbonet_080.in1k': 3968432, 'hbonet_050.in1k': 2498432, 'hbonet_035.in1k': 1965900,
    'hbonet_025.in1k': 1340660, 'hbonet_010.in1k': 680532, 'hbonet_080.r192_in1k': 2915848,
    'hbonet_080.r160_in1k': 2025200, 'hbonet_080.r128_in1k': 1296488, 'hbonet_080.r96_in1k': 729712,
    'hbonet_035.r192_in1k': 1444600, 'hbonet_035.r160_in1k': 1003500, 'hbonet_035.r128_in1k': 642600,
    'hbonet_035.r96_in1k': 361900, 'hbonet_050_d8.in1k': 2882984, 'hbonet_060.r192_in1k': 2355688,
    'hbonet_025_d8.in1k': 1646028, 'hbonet_025_4x_d8.in1k': 1546656, 'hbonet_025_8x_d8.in1k': 1517256,
}
LOAD = """
import reference, timm, torch

torch.set_num_threads(1)
for entry in reference.CHECKPOINTS:
    name, size = entry['name'], entry['input_size']
    case = reference.find_case(name, size, size)
    images = reference.case_input(case, torch.float32)
    for source in (name, f'hf-hub:org/{name}'):
        model = timm.create_model(source, pretrained=True).eval()
        assert tuple(model.pretrained_cfg['input_size']) == (3, size, size)
        with torch.inference_mode():
            reference.assert_close(model(images), case['logits'], 1e-4)
        print('loaded', source)
"""


def run_script(name: str, *args: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPTS / name), *map(str, args)]
    env = {**os.environ, **environment}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert 'Traceback' not in result.stderr
    assert TOKEN not in result.stdout + result.stderr
    return result


def publish(*args: str, **environment: str) -> subprocess.CompletedProcess:
    return run_script('publish_to_hub.py', '--namespace', 'org', *args, **{'HF_TOKEN': TOKEN, **environment})


def files_of(folder: Path) -> set:
    return {path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file()}


@pytest.fixture(scope='module')
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of a dry run of all 19, without a token, from a full cache, with no Hub to talk to."""
    root = tmp_path_factory.mktemp('publish')
    cache = root / 'torch/hub/checkpoints'
    cache.mkdir(parents=True)
    for name in NAMES:
        (cache / Path(ENTRIES[name]['path']).name).write_bytes(release_file(name))
    environment = {'TORCH_HOME': str(root / 'torch'), 'HF_ENDPOINT': 'http://127.0.0.1:9'}
    result = run_script('publish_to_hub.py', '--dry-run', root / 'out', **environment)
    assert result.returncode == 0, result.stderr
    assert '19/19' in result.stderr  # progress
    yield root / 'out'
    shutil.rmtree(root)


def test_dry_run_writes_complete_folders_and_nothing_else(dry_run):
    assert files_of(dry_run) == {f'{name}/{file}' for name in NAMES for file in FILES}
    config = json.loads((dry_run / 'hbonet_080.r96_in1k/config.json').read_text())
    assert config['architecture'] == 'hbonet_080'
    assert config['pretrained_cfg']['input_size'] == [3, 96, 96]
    assert config['pretrained_cfg']['tag'] == 'r96_in1k'


@pytest.mark.parametrize('name', NAMES)
def test_rand_tensors_are_what_the_model_gives(dry_run, name):
    tensors = load_file(dry_run / name / 'test/rand_tensors.safetensors')
    assert set(tensors) == {'input', 'features', 'pre_logits', 'output'}
    size = ENTRIES[name]['input_size']
    assert tensors['input'].shape == (1, 3, size, size)
    model = timm.create_model(f'local-dir:{dry_run / name}', pretrained=True).eval()
    with torch.inference_mode():
        features = model.forward_features(tensors['input'])
        pre_logits = model.forward_head(features, pre_logits=True)
        found = {'features': features, 'pre_logits': pre_logits, 'output': model(tensors['input'])}
    for key, tensor in found.items():
        expected = tensors[key]
        assert tensor.shape == expected.shape
        assert (tensor - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_transformers_loads_a_converted_folder(dry_run):
    transformers = pytest.importorskip('transformers', reason='needs pip install timm-hbonet[clients]')
    folder = dry_run / NAMES[0]
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    tensors = load_file(folder / 'test/rand_tensors.safetensors')
    with torch.inference_mode():
        logits = model(tensors['input']).logits
    assert (logits - tensors['output']).abs().max() <= 1e-3 * tensors['output'].abs().max()


@pytest.mark.parametrize('name', NAMES)
def test_card_has_the_published_and_computed_figures(dry_run, name):
    entry = ENTRIES[name]
    architecture = reference.ARCHITECTURES[name.split('.')[0]]
    card = ModelCard.load(dry_run / name / 'README.md')
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


def test_card_compares_all_models(dry_run):
    text = ModelCard.load(dry_run / 'hbonet_050.in1k/README.md').text
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


def test_cards_are_valid_for_the_hub(dry_run, server):
    for name in NAMES:
        path = dry_run / name / 'README.md'
        card = ModelCard.load(path)
        card.validate()
        assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
        assert str(card) == path.read_text(encoding='utf-8')
    assert server.count('/api/validate-yaml', 'POST') == len(NAMES)


@pytest.mark.parametrize('name', ['hbonet_025_8x_d8.in1k', 'hbonet_035.r96_in1k'])
def test_usage_in_the_card_runs_as_written(dry_run, name, tmp_path, monkeypatch, capsys):
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


def test_all_models_are_published_and_load_from_there(dry_run, server: HubServer, run_python, tmp_path):
    cache = {'TORCH_HOME': str(tmp_path / 'cache')}  # other tests fill the common one
    result = publish(**cache)
    assert result.returncode == 0, result.stderr
    for name in NAMES:
        published = server.files(f'org/{name}')
        assert set(published) - {'.gitattributes'} == FILES
        # conversion gives the same files every time, a card names its own repository
        for file in FILES - {'README.md'}:
            assert published[file] == (dry_run / name / file).read_bytes()
        assert published['README.md'].count(f'hf-hub:org/{name}'.encode()) == 3

    downloads = server.count('/d-li14/*')
    assert downloads == len(NAMES)
    homes = {'HF_HOME': str(tmp_path / 'huggingface'), 'TORCH_HOME': str(tmp_path / 'torch')}
    result = run_python(LOAD, TIMM_HBONET_HUB_NAMESPACE='org', PYTHONPATH=str(Path(__file__).parent), **homes)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f'loaded {prefix}{name}' for name in NAMES for prefix in ('', 'hf-hub:org/')]
    assert server.count('/d-li14/*') == downloads

    # again, there is nothing to do
    before = len(server.requests)
    names = NAMES[-3:]
    result = publish('--only', *names, **cache)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ''.join(f'org/{name}: is up to date\n' for name in names)
    requests = [(r.method, r.path) for r in server.requests[before:]]
    assert requests == [
        ('GET', '/api/whoami-v2'), *(('POST', f'/api/models/org/{name}/paths-info/main') for name in names)]


def test_cut_upload_keeps_no_other_from_being_published_and_can_be_run_again(server):
    server.fail('/api/models/org/hbonet_025.in1k/commit/main', 'POST', cut=100)
    server.fail('*/org/hbonet_050.in1k/*', status=403, headers={'X-Error-Message': f'{TOKEN} must not write here'})
    names = ('hbonet_050.in1k', 'hbonet_025.in1k', 'hbonet_010.in1k')
    result = publish('--only', *names)
    assert result.returncode == 1
    assert 'error: 2 of 3 failed' in result.stderr
    assert re.search(r'^hbonet_025\.in1k: \w+: .*disconnected', result.stderr, re.M)
    assert re.search(r'^hbonet_050\.in1k: \w+: 403 Forbidden: \*\*\* must not write here', result.stderr, re.M)
    assert set(server.files('org/hbonet_010.in1k')) > FILES
    assert not FILES & set(server.files('org/hbonet_025.in1k'))

    # of a repository where a file differs, that file alone is uploaded
    server.faults.clear()
    files = server.files('org/hbonet_010.in1k')
    server.add_repository('org/hbonet_010.in1k', {**files, 'config.json': b'{}', 'NOTES.md': b'kept'})
    uploads = server.count('/lfs/*', 'PUT')
    batches = server.count('/org/hbonet_010.in1k.git/*')
    result = publish('--only', *names[1:])
    assert result.returncode == 0, result.stderr
    assert 'hbonet_010.in1k: uploaded config.json\n' in result.stdout
    assert server.files('org/hbonet_010.in1k') == {**files, 'NOTES.md': b'kept'}
    assert server.count('/org/hbonet_010.in1k.git/*') == batches
    assert set(server.files('org/hbonet_025.in1k')) > FILES
    assert server.count('/lfs/*', 'PUT') == uploads  # the large files had arrived the first time


@pytest.mark.parametrize('token, message', [(TOKEN, r'does not accept the token \(401\)'), ('', 'there is no token')])
def test_bad_token_is_told_before_anything_is_done(server, token, message):
    server.tokens.clear()  # it has expired
    result = publish(HF_TOKEN=token)
    assert result.returncode == 1
    assert re.fullmatch(rf'error: .*{message}.*`hf auth login`.*HF_TOKEN.*\n', result.stderr)
    assert server.count() == server.count('/api/whoami-v2')


def test_publish_refuses_unknown_names(server, monkeypatch, capsys):
    import publish_to_hub
    for arguments, message in (
            (['--namespace', 'org', '--only', 'hbonet_100'], "no model 'hbonet_100', choose from hbonet_100.in1k, "),
            ([], '--namespace is required'),
    ):
        monkeypatch.setattr(sys, 'argv', ['publish_to_hub.py', *arguments])
        with pytest.raises(SystemExit, match='2'):
            publish_to_hub.main()
        assert message in capsys.readouterr().err
    assert server.count() == 0


@pytest.fixture
def convert(tmp_path, monkeypatch):
    """Function that converts a file of this content in this process, and returns the output folder."""

    def run(content: bytes, *args: str) -> Path:
        path = tmp_path / 'checkpoint.pth'
        path.write_bytes(content)
        argv = ['convert_checkpoint.py', str(path), '--output', str(tmp_path / 'out'), *args]
        monkeypatch.setattr(sys, 'argv', argv)
        convert_checkpoint.main()
        return tmp_path / 'out'

    return run


def test_convert_knows_the_model_by_the_digest(convert, dry_run, capsys):
    output = convert(release_file('hbonet_050_d8.in1k'))
    folder = output / 'hbonet_050_d8.in1k'
    assert capsys.readouterr().out == f'{folder}\n'
    assert files_of(output) == {f'hbonet_050_d8.in1k/{file}' for file in FILES}
    for file in FILES:
        assert (folder / file).read_bytes() == (dry_run / 'hbonet_050_d8.in1k' / file).read_bytes()

    # an older conversion is replaced, a folder of other things is not
    (folder / 'config.json').write_text('{}')
    convert(release_file('hbonet_050_d8.in1k'))
    assert json.loads((folder / 'config.json').read_text())['architecture'] == 'hbonet_050_d8'
    (folder / 'notes.txt').write_text('mine')
    with pytest.raises(SystemExit, match='has other files, such as notes.txt'):
        convert(release_file('hbonet_050_d8.in1k'))
    assert files_of(folder) == {*FILES, 'notes.txt'}


def test_convert_asks_for_the_model_where_files_are_the_same(convert):
    with pytest.raises(SystemExit, match=r'is the file of hbonet_035.in1k, hbonet_035.r192_in1k, .*--model'):
        convert(release_file('hbonet_035'))
    output = convert(release_file('hbonet_035'), '--model', 'hbonet_035.r96_in1k')
    model = timm.create_model(f'local-dir:{output}/hbonet_035.r96_in1k')
    assert tuple(model.pretrained_cfg['input_size']) == (3, 96, 96)


TRUSTED = ('--model', 'hbonet_050.in1k', '--allow-unknown-digest')


@pytest.mark.parametrize('content, args, message', [
    (lambda: release_file('hbonet_050')[:-1000], (), r'has git blob id [0-9a-f]{40}, which is not that of any release'),
    (lambda: release_file('hbonet_010'), TRUSTED[:2], 'which is not that of hbonet_050.in1k'),
    (lambda: release_file('hbonet_050')[:-1000], TRUSTED, 'Cannot load weights from '),
    (lambda: release_file('hbonet_010'), TRUSTED, 'do not fit hbonet_050'),
    (lambda: b'<html>', TRUSTED, 'Cannot load weights from '),
], ids=['unknown digest', 'digest of another', 'truncated', 'another model', 'web page'])
def test_convert_refuses_what_is_not_the_checkpoint(convert, tmp_path, content, args, message):
    with pytest.raises(SystemExit, match=f'^error: .*{message}') as e:
        convert(content(), *args)
    assert '\n' not in e.value.code
    assert not (tmp_path / 'out').exists()


def test_convert_runs_no_code_of_a_file(tmp_path):
    class Malicious:
        def __reduce__(self):
            return open, (str(tmp_path / 'executed'), 'w')

    torch.save({'features.0.0.weight': Malicious()}, tmp_path / 'malicious.pth')
    result = run_script('convert_checkpoint.py', tmp_path / 'malicious.pth', '--output', tmp_path / 'out', *TRUSTED)
    assert result.returncode == 1
    assert re.fullmatch('error: Cannot load weights from .*\n', result.stderr)
    assert not (tmp_path / 'executed').exists() and not (tmp_path / 'out').exists()


def test_card_of_an_unknown_file_claims_no_accuracy(convert, tmp_path):
    weights = reference.release_state_dict('hbonet_050', torch.float32)
    torch.save({'state_dict': weights}, tmp_path / 'own.pth')
    output = convert((tmp_path / 'own.pth').read_bytes(), *TRUSTED)
    card = ModelCard.load(output / 'hbonet_050.in1k/README.md')
    assert card.data.eval_results is None
    assert 'of unknown origin' in card.text and '**Accuracy:**' not in card.text


def test_convert_keeps_nothing_that_does_not_load_to_identical_logits(convert, tmp_path, monkeypatch):
    def save_damaged(model, folder, **kwargs):
        timm.models.save_for_hf(model, folder, **kwargs)
        weights = load_file(Path(folder, 'model.safetensors'))
        weights['classifier.bias'][7] += 1e-3
        save_file(weights, Path(folder, 'model.safetensors'))

    monkeypatch.setattr(convert_checkpoint, 'save_for_hf', save_damaged)
    with pytest.raises(SystemExit, match='does not give the logits'):
        convert(release_file('hbonet_010'))
    assert not list((tmp_path / 'out').iterdir())
