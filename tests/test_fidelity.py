"""The network is the authors' network: outputs, stages, parameters, MACs, and their checkpoints through every door."""
import functools
import os

import pytest
import timm
import torch
from reference import ARCHITECTURES, CHECKPOINTS, assert_close, case_input, release_state_dict
from safetensors.torch import save_file
from timm.models import load_checkpoint
from torch.utils.flop_counter import FlopCounterMode

from timm_hbonet.hbonet import checkpoint_filter_fn

CASES = [(name, case) for name, architecture in ARCHITECTURES.items() for case in architecture['cases']]
CASE_IDS = [f"{name}-{case['height']}x{case['width']}" for name, case in CASES]


@functools.lru_cache(maxsize=None)
def released(name, dtype=torch.float64):
    """An architecture with the recreated release weights, not to be changed."""
    model = timm.create_model(name, dtype=dtype).eval()
    model.load_state_dict(release_state_dict(name, dtype))
    return model


@pytest.mark.parametrize('name, case', CASES, ids=CASE_IDS)
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=['float64', 'float32'])
def test_logits(name, case, dtype, tolerance):
    with torch.inference_mode():
        logits = released(name, dtype)(case_input(case, dtype))
    assert_close(logits, case['logits'], tolerance)
    assert logits.topk(5).indices.tolist() == case['top5']


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_stages(name):
    case = ARCHITECTURES[name]['cases'][0]
    x = case_input(case)
    stages = [(m.conv_stem, *m.blocks, m.conv_head) for m in (released(name), released(name, torch.float32))]
    with torch.inference_mode():
        for stage, stage_float32, expected in zip(*stages, case['stages'].values(), strict=True):
            # each from exact input: random weights amplify the rounding of float32, in the authors' network too
            assert_close(stage_float32(x.float()), expected, 1e-4)
            x = stage(x)
            assert_close(x, expected, 1e-9)


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_parameters_and_macs(name):
    model = timm.create_model(name, device='meta').eval()
    assert sum(p.numel() for p in model.parameters()) == ARCHITECTURES[name]['params']
    for size, macs in ARCHITECTURES[name]['macs'].items():
        assert count_macs(model, *map(int, size.split('x'))) == macs


@pytest.mark.parametrize('checkpoint', CHECKPOINTS, ids=lambda c: c['name'])
def test_macs_of_releases(checkpoint):
    model = timm.create_model(checkpoint['name'], device='meta').eval()
    assert count_macs(model, *model.pretrained_cfg['input_size'][1:]) == checkpoint['computed_macs']


def count_macs(model, height, width):
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, height, width, device='meta'))
    return counter.get_total_flops() // 2


def _legacy(state_dict, path):
    torch.save(state_dict, path, _use_new_zipfile_serialization=False)


FORMATS = {
    'legacy': ('weights.pth', _legacy),
    'zip': ('weights.pth', torch.save),
    'training': ('weights.pth', lambda s, path: torch.save({'epoch': 150, 'state_dict': s, 'best_prec1': 73.1}, path)),
    'parallel': ('weights.pth', lambda s, path: torch.save({f'module.{k}': v for k, v in s.items()}, path)),
    'untracked': ('weights.pth', lambda s, path: torch.save(
        {k: v for k, v in s.items() if not k.endswith('num_batches_tracked')}, path)),
    'safetensors': ('weights.safetensors', save_file),  # which sorts the tensors by name
}
DOORS = {
    'pretrained_cfg_overlay': lambda name, path: timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=dict(file=path)),
    'checkpoint_path': lambda name, path: timm.create_model(name, checkpoint_path=path),
    'load_checkpoint': lambda name, path: _load_checkpoint(name, path),
}


def _load_checkpoint(name, path):
    model = timm.create_model(name)
    load_checkpoint(model, path)
    return model


@pytest.mark.parametrize('file_format', FORMATS)
@pytest.mark.parametrize('door', DOORS)
def test_release_loads_through_every_door(door, file_format, tmp_path):
    name = 'hbonet_025_4x_d8'
    file_name, save = FORMATS[file_format]
    path = str(tmp_path / file_name)
    save(release_state_dict(name, torch.float32), path)
    model = DOORS[door](name, path).eval()
    case = ARCHITECTURES[name]['cases'][0]
    with torch.inference_mode():
        assert_close(model(case_input(case, torch.float32)), case['logits'], 1e-4)


@pytest.mark.parametrize('file_format', FORMATS)
@pytest.mark.parametrize('door', DOORS)
def test_own_layout_loads_through_every_door(door, file_format, tmp_path):
    file_name, save = FORMATS[file_format]
    path = str(tmp_path / file_name)
    expected = released('hbonet_010', torch.float32)
    save(expected.state_dict(), path)
    model = DOORS[door]('hbonet_010', path).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(model(image), expected(image))


@pytest.mark.parametrize('wrap', [lambda s: s, lambda s: {'state_dict': {f'module.{k}': v for k, v in s.items()}}])
def test_filter_maps_every_released_tensor(wrap):
    model = timm.create_model('hbonet_025_8x_d8', dtype=torch.float64)
    weights = release_state_dict('hbonet_025_8x_d8')
    converted = checkpoint_filter_fn(wrap(weights), model)
    assert set(converted) == set(model.state_dict())
    assert sorted(map(id, converted.values())) == sorted(map(id, weights.values()))


def test_pretrained_stem_and_classifier_are_adapted(tmp_path):
    path = str(tmp_path / 'weights.pth')
    weights = release_state_dict('hbonet_010', torch.float32)
    torch.save(weights, path)
    create = functools.partial(
        timm.create_model, 'hbonet_010', pretrained=True, pretrained_cfg_overlay=dict(file=path))
    grey = create(in_chans=1, num_classes=7)
    torch.testing.assert_close(grey.conv_stem[0].weight, weights['features.0.0.weight'].sum(1, keepdim=True))
    assert grey.classifier.weight.shape == (7, 1600)
    assert torch.equal(grey.conv_head[0].weight, weights['conv.0.weight'])
    assert create(in_chans=4).conv_stem[0].weight.shape == (4, 4, 3, 3)
    features = create(features_only=True)
    assert torch.equal(features.conv_stem[0].weight, weights['features.0.0.weight'])


def test_checkpoint_of_another_width(tmp_path):
    path = str(tmp_path / 'hbonet_050.pth')
    torch.save(release_state_dict('hbonet_050', torch.float32), path)
    message = r"do not fit hbonet_035: 'blocks.0.0.conv.3.weight' is \[10, 16, 1, 1\], not \[8, 16, 1, 1\]"
    with pytest.raises(RuntimeError, match=message):
        timm.create_model('hbonet_035', pretrained=True, pretrained_cfg_overlay=dict(file=path))
    with pytest.raises(RuntimeError, match='size mismatch for blocks'):
        timm.create_model('hbonet_035', checkpoint_path=path)


def test_checkpoint_of_another_rate():
    model = timm.create_model('hbonet_025_d8')
    with pytest.raises(RuntimeError, match=r"do not fit hbonet_025_d8: 'blocks.1.0.conv.9.weight' is missing"):
        checkpoint_filter_fn(release_state_dict('hbonet_025_4x_d8'), model)


@pytest.mark.parametrize('change, message', [
    (lambda s: s.pop('features.3.conv.0.weight'), "'blocks.2.0.conv.0.weight' is missing"),
    (lambda s: s.update({'features.3.conv.extra.weight': torch.zeros(1)}), "'blocks.2.0.conv.extra.weight' is unknown"),
])
def test_filter_names_the_wrong_tensor_of_the_release(change, message):
    weights = release_state_dict('hbonet_010')
    change(weights)
    with pytest.raises(RuntimeError, match=f'do not fit hbonet_010: {message}. Use a checkpoint of this architecture'):
        checkpoint_filter_fn(weights, timm.create_model('hbonet_010'))


@pytest.mark.parametrize('change, message', [
    (lambda s: s.pop('blocks.1.0.conv.6.bias'), "'blocks.1.0.conv.6.bias' is missing"),
    (lambda s: s.update(extra=torch.zeros(1)), "'extra' is unknown"),
    (lambda s: s.update({'conv_head.1.bias': torch.zeros(3)}), r"'conv_head.1.bias' is \[3\], not \[1600\]"),
    (lambda s: s.update({'conv_head.1.bias': 'text'}), r"'conv_head.1.bias' is str, not \[1600\]"),
    (lambda s: s.clear(), r'\(and \d+ more\)'),
])
def test_filter_names_the_wrong_tensor_and_the_architecture(change, message):
    model = timm.create_model('hbonet_010')
    state_dict = dict(model.state_dict())
    change(state_dict)
    with pytest.raises(RuntimeError, match=f'do not fit hbonet_010: .*{message}'):
        checkpoint_filter_fn(state_dict, model)


@pytest.mark.parametrize('spatial_expansion', ['bilinear', 'deconv'])
@pytest.mark.parametrize('door', DOORS)
def test_release_needs_nearest(door, spatial_expansion, tmp_path, monkeypatch):
    path = str(tmp_path / 'weights.pth')
    torch.save(release_state_dict('hbonet_010', torch.float32), path)
    create_model = functools.partial(timm.create_model, spatial_expansion=spatial_expansion)
    monkeypatch.setattr(timm, 'create_model', create_model)
    with pytest.raises(RuntimeError, match=f"spatial_expansion='nearest'`, got '{spatial_expansion}'"):
        DOORS[door]('hbonet_010', path)


class MakesFolder:
    """Unpickled in full, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize('door', DOORS)
@pytest.mark.parametrize('save', [torch.save, _legacy], ids=['zip', 'legacy'])
def test_pickle_that_wants_to_run_code_is_refused(door, save, tmp_path):
    path, folder = str(tmp_path / 'weights.pth'), tmp_path / 'made'
    save({'features.0.0.weight': MakesFolder(str(folder))}, path)
    with pytest.raises(RuntimeError, match='weights_only=True blocked'):
        DOORS[door]('hbonet_010', path)
    assert not folder.exists()
