"""README's code runs, its figures are those of the models, and all pages and paths that pages name are there."""
import re
from pathlib import Path

import pytest
import timm
import torch
from pages import assert_equal_to
from PIL import Image
from reference import release_state_dict
from script_runner import run_script
from sklearn.datasets import load_sample_image

ROOT = Path(__file__).parents[1]
PAGES = {
    path: path.read_text(encoding='utf-8')
    for folder in (ROOT, ROOT / 'docs', ROOT / 'results') for path in sorted(folder.glob('*.md'))
}
README = PAGES[ROOT / 'README.md']


def test_table_of_models():
    status, table, _ = run_script('publish_to_hub.py', '--table')
    assert status == 0 and f'\n\n{table}\n' in README


def test_code(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(load_sample_image('china.jpg')).save('photo.jpg')
    code = '\n'.join(re.findall(r'^```python\n(.*?)^```', README, re.MULTILINE | re.DOTALL))
    page = {'images': torch.randn(2, 3, 97, 65)}
    with torch.inference_mode():
        exec(compile(code, 'README.md', 'exec'), page)

        model = timm.create_model('hbonet_100').eval()
        model.load_state_dict(release_state_dict('hbonet_100', torch.float32))
        photo = page['transform'](Image.open('photo.jpg'))
        assert photo.shape == (3, 224, 224)
        assert_equal_to(page['logits'], model(photo[None]))
        assert_equal_to(page['embeddings'], model.global_pool(model.forward_features(page['images'])))
    assert page['embeddings'].shape == (2, 1600)
    channels = [x.shape[1] for x in page['features']]
    assert [x.shape[2:] for x in page['features']] == [(49, 33), (25, 17), (13, 9), (7, 5), (4, 3)]
    assert f'backbone.feature_info.channels()  # {channels}' in README


@pytest.mark.parametrize('path', PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_paths(path):
    for target in re.findall(r'\]\(([^)\s]+)\)', PAGES[path]):
        if target.startswith('https://'):
            continue
        file, _, anchor = target.partition('#')
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), target
        headings = re.findall(r'^#+ (.*)$', linked.read_text(encoding='utf-8'), re.MULTILINE) if anchor else []
        # as GitHub makes them
        anchors = [re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings]
        assert not anchor or anchor in anchors, target
    for named in re.findall(r'(?<![\w/.-])(?:scripts|tests|docs|timm_hbonet|autoload)/[\w./-]*\w', PAGES[path]):
        assert (ROOT / named).exists(), named
