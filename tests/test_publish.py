"""A maintainer converts the authors' checkpoints, and publishes them with model cards on the Hub."""
import functools
import json
import re
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import reference
import timm
import torch
from hub_server import TOKEN
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from stand_ins import release_file
from timm.data import ImageNetInfo, create_transform, resolve_data_config

from script_runner import error_line, run_script  # isort: skip

import publish_to_hub  # isort: skip
from publish_to_hub import PUBLISHED, make_card  # isort: skip

FILES = {'README.md', 'config.json', 'model.safetensors', 'test/rand_tensors.safetensors'}
NAME, SMALL = 'hbonet_010.in1k', 'hbonet_035.r96_in1k'


run = functools.partial(run_script, 'publish_to_hub.py')


@pytest.fixture
def publish(monkeypatch, release_site):
    """Function that publishes for the namespace org, on a Hub without repositories."""

    def publish(*args):
        status, out, err = run('--namespace', 'org', *args)
        assert TOKEN not in out + err
        return status, err

    monkeypatch.setenv('HF_TOKEN', TOKEN)
    return publish


@pytest.fixture(scope='module')
def empty(tmp_path_factory):
    return tmp_path_factory.mktemp('dry_run')


@pytest.fixture
def dry_run(empty, release_site):
    """Folder of the folders that a dry run writes for two models."""
    if not list(empty.iterdir()):
        status, _, err = run('--dry-run', empty, '--only', NAME, SMALL)
        assert status == 0 and '2/2' in err  # progress
        release_site.requests.clear()
    return empty


def files_of(folder: Path) -> dict:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_dry_run_writes_whole_folders_and_leaves_those_that_are_there(dry_run, release_site, tmp_path):
    files = files_of(dry_run)
    assert set(files) == {f'{name}/{file}' for name in (NAME, SMALL) for file in FILES}
    config = json.loads(files[f'{SMALL}/config.json'])
    assert f'{config["architecture"]}.{config["pretrained_cfg"]["tag"]}' == SMALL
    assert config['pretrained_cfg']['input_size'] == [3, 96, 96]

    (tmp_path / NAME).mkdir()
    status, out, _ = run('--dry-run', tmp_path, '--only', NAME)
    assert status == 0 and 'is there already' in out and not release_site.requests
    assert not files_of(tmp_path / NAME)


@pytest.mark.parametrize('name', [NAME, SMALL])
def test_converted_model(name, dry_run):
    model = timm.create_model(f'local-dir:{dry_run / name}', pretrained=True).eval()
    size = PUBLISHED.loc[name, 'img_size']
    case = reference.find_case(name, size, size)
    tensors = load_file(dry_run / name / 'test/rand_tensors.safetensors')
    with torch.inference_mode():
        reference.assert_close(model(reference.case_input(case, torch.float32)), case['logits'], 1e-4)
        images = tensors.pop('input').double()
        features = model.double().forward_features(images)
        pre_logits = model.forward_head(features, pre_logits=True)
        expected = dict(features=features, pre_logits=pre_logits, output=model(images))
    assert images.shape == (1, 3, size, size)
    torch.testing.assert_close(tensors, {key: tensor.float() for key, tensor in expected.items()})


def test_transformers_loads_a_converted_folder(dry_run):
    transformers = pytest.importorskip('transformers', reason='needs pip install -e .[clients]')
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (300, 400, 3), dtype=np.uint8))
    model = timm.create_model(f'local-dir:{dry_run / SMALL}', pretrained=True).eval()
    transform = create_transform(**resolve_data_config(model=model))
    with torch.inference_mode():
        probs, indices = model(transform(image)[None])[0].softmax(0).topk(3)
    found = transformers.pipeline('image-classification', model=str(dry_run / SMALL))(image, top_k=3)
    assert [x['label'] for x in found] == [ImageNetInfo().index_to_description(i) for i in indices.tolist()]
    assert [x['score'] for x in found] == pytest.approx(probs.tolist(), rel=1e-3)


def test_table_has_the_figures_of_the_architectures():
    """The package's own facts are compared with the table in test_pretrained.py."""
    assert len(PUBLISHED) == 19 and PUBLISHED['top1'].is_monotonic_decreasing
    sizes = []
    for name, row in PUBLISHED.iterrows():
        model, known = timm.create_model(name, device='meta').eval(), reference.ARCHITECTURES[name.split('.')[0]]
        for module in model.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                module.register_forward_hook(lambda _, inputs, output: sizes.append(output.numel()))
        model(torch.zeros(1, 3, row.img_size, row.img_size, device='meta'))
        assert (row.params, row.macs) == (known['params'], known['macs'][f'{row.img_size}x{row.img_size}'])
        assert row.activations == sum(sizes)
        sizes.clear()


@pytest.mark.parametrize('name, tables', [
    ('hbonet_080.in1k', 'tables 2, 3'), (SMALL, 'table 4'), ('hbonet_025_4x_d8.in1k', 'table 6')])
def test_card_has_the_published_and_computed_figures(name, tables, release_site, tmp_path):
    make_card(name, f'org/{name}').save(tmp_path / 'README.md')
    card, row = ModelCard.load(tmp_path / 'README.md'), PUBLISHED.loc[name]
    if int(huggingface_hub.__version__.split('.')[0]) >= 2:  # older clients ask huggingface.co, always
        card.validate()
    expected = dict(
        license='apache-2.0', library_name='timm', pipeline_tag='image-classification', datasets=['imagenet-1k'],
        tags=['image-classification', 'timm', 'transformers', 'hbonet'], architecture=name.split('.')[0])
    assert {k: card.data.get(k) for k in expected} == expected
    for k, result in zip((1, 5), card.data.eval_results, strict=True):
        assert result.metric_name == f'Top-{k} accuracy (%), published by the authors'
        assert result.metric_value == row[f'top{k}']
        assert result.source_name.endswith(f'{tables} of arXiv:1908.03888')
    first = card.text.split('\n\n')[1]
    assert 'the authors published, and were not re-validated' in first and first.count('.') == 1
    for line in (
            f'Params (M): {row.params / 1e6:.2f}\n', f'GMACs: {row.macs / 1e9:.3f}\n',
            f'Activations (M): {row.activations / 1e6:.2f}\n', f'Image size: {row.img_size} x {row.img_size}\n',
            f'**Accuracy:** {row.top1:.1f}% top-1, {row.top5:.1f}% top-5, of a single centre crop ({tables} ',
            f'[the authors\' file]({row.url}), git blob `{row.git_blob}`\n', f'| **`{name}`**',
    ):
        assert line in card.text


def test_usage_in_the_card_runs_as_written(dry_run, tmp_path, monkeypatch, capsys):
    text = ModelCard.load(dry_run / SMALL / 'README.md').text
    snippets = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    assert text.count(f"'hf-hub:timm/{SMALL}'") == len(snippets) == 3
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient('L').resize((300, 260)).save('image.jpg')
    variables, printed = {}, []
    for snippet in snippets:
        exec(snippet.replace(f'hf-hub:timm/{SMALL}', f'local-dir:{dry_run / SMALL}'), variables)
        printed.append(capsys.readouterr().out.splitlines())
    assert variables['image'].shape == (1, 3, 96, 96)
    assert len(printed[0]) == 5 and all(re.match(r'\d+\.\d% \w', line) for line in printed[0])
    assert printed[1] == re.findall(r'^# (.*)', snippets[1], re.M) and len(printed[1]) == 5
    assert variables['embedding'].shape == (1, 1600) and '# 1 x 1600' in snippets[2]


def test_model_is_published_and_loads_from_there(dry_run, release_site, publish, tmp_path, monkeypatch):
    server = release_site
    status, err = publish('--only', NAME)
    assert status == 0, err
    published = server.files(f'org/{NAME}')
    assert set(published) - {'.gitattributes'} == FILES
    # conversion gives the same files every time, a card names its own repository
    for file in FILES - {'README.md'}:
        assert published[file] == (dry_run / NAME / file).read_bytes()
    assert published['README.md'].count(f'hf-hub:org/{NAME}'.encode()) == 3

    monkeypatch.setenv('TIMM_HBONET_HUB_NAMESPACE', 'org')
    tensors = load_file(dry_run / NAME / 'test/rand_tensors.safetensors')
    for model in (NAME, f'hf-hub:org/{NAME}'):
        model = timm.create_model(model, pretrained=True, cache_dir=tmp_path / 'cache').eval()
        with torch.inference_mode():
            torch.testing.assert_close(model(tensors['input']), tensors['output'], rtol=1e-3, atol=1e-3)

    # what a repository has is not uploaded again, and other files of it stay
    server.add_repository(f'org/{NAME}', {**published, 'config.json': b'{}', 'NOTES.md': b'kept'})
    for commits in (2, 2):
        assert publish('--only', NAME)[0] == 0
        assert server.files(f'org/{NAME}') == {**published, 'NOTES.md': b'kept'}
        assert server.count(f'/api/models/org/{NAME}/commit/main') == commits


def test_failure_keeps_no_other_of_all_19_from_being_published_and_can_be_run_again(
        release_site, publish, monkeypatch):
    def convert(path, name, repo_id, folder):  # takes no time
        assert path.read_bytes() == release_file(name)
        folder.mkdir()
        (folder / 'model.safetensors').write_text(f'weights of {repo_id}')

    def published():
        return [name for name in PUBLISHED.index if server.repositories.get(f'org/{name}') and server.files(
            f'org/{name}').get('model.safetensors') == f'weights of org/{name}'.encode()]

    monkeypatch.setattr(publish_to_hub, 'convert', convert)
    server, fails = release_site, ['hbonet_050.in1k', 'hbonet_025.in1k']
    server.fail(f'/api/models/org/{fails[1]}/commit/main', 'POST', cut=100)
    server.fail(f'*/org/{fails[0]}/*', status=403, headers={'X-Error-Message': 'You must not write here'})
    status, err = publish()
    assert status == 1 and error_line(err).endswith(
        '2 of 19 failed, for the reasons above. Run this again with --only ' + ' '.join(fails))
    assert re.search(rf'^{fails[1]}: \w+: ', err, re.M)
    assert re.search(rf'^{fails[0]}: \w+: .*You must not write here', err, re.M)
    assert published() == [name for name in PUBLISHED.index if name not in fails]

    server.faults.clear()
    assert publish('--only', *fails)[0] == 0
    assert published() == list(PUBLISHED.index)


def test_token_that_is_missing_or_expired_is_told_before_anything_is_done(release_site, publish, monkeypatch):
    release_site.tokens.clear()
    status, err = publish()
    assert status == 1 and re.search(r'HTTPError: Invalid user token', error_line(err))
    assert release_site.count() == release_site.count('/api/whoami-v2')
    monkeypatch.delenv('HF_TOKEN')
    status, err = publish()
    assert status == 1 and 'LocalTokenNotFoundError' in error_line(err)


@pytest.mark.parametrize('args, message', [
    (['--namespace', 'org', '--only', 'hbonet_100'], "invalid choice: 'hbonet_100'.*hbonet_100.in1k"),
    ([], '--namespace --dry-run --table is required'),
    (['--dry-run', 'out', '--file', 'x.pth'], '--file needs --only'),
])
def test_options_that_do_not_fit(args, message):
    status, _, err = run(*args)
    assert status == 2 and re.search(message, error_line(err))


def test_file_in_place_of_the_download(dry_run, release_site, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'empty'))
    file, out = tmp_path / 'own.pth', tmp_path / 'out'
    for content, reason in (
            (None, 'FileNotFoundError: '), (release_file(NAME)[:-1000], 'the git blob id is [0-9a-f]{40}'),
            (release_file('hbonet_025'), 'the git blob id is ')):
        if content:
            file.write_bytes(content)
        status, _, err = run('--dry-run', out, '--only', NAME, '--file', file)
        assert status == 1 and not out.exists()
        assert re.match(f".*error: --file {file} is not the authors' file of {NAME}, .*{reason}", error_line(err))
    file.write_bytes(release_file(NAME))
    status, printed, _ = run('--dry-run', out, '--only', NAME, '--file', file)
    assert (status, printed) == (0, f'{out / NAME}\n') and not release_site.requests
    assert files_of(out / NAME) == files_of(dry_run / NAME)


def test_nothing_is_kept_that_does_not_load_to_identical_logits(release_site, tmp_path, monkeypatch):
    def save_damaged(model, folder, **kwargs):
        timm.models.save_for_hf(model, folder, **kwargs)
        weights = load_file(Path(folder, 'model.safetensors'))
        weights['classifier.bias'][7] += 1e-3
        save_file(weights, Path(folder, 'model.safetensors'))

    monkeypatch.setattr(publish_to_hub, 'save_for_hf', save_damaged)
    status, _, err = run('--dry-run', tmp_path / 'out', '--only', NAME)
    assert status == 1 and re.search(f'^{NAME}: .*does not give the logits', err, re.M)
    assert not list((tmp_path / 'out').iterdir())
