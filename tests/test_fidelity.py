"""The network is the authors' network: outputs, stages, parameters, MACs, and their checkpoints through every door."""
import copy
import pickle

import pytest
import timm
import torch
from networks import images, released
from reference import ARCHITECTURES, assert_close, case_input, release_state_dict
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_hbonet import HBONet

OTHER_CASES = [(name, case) for name in ARCHITECTURES for case in ARCHITECTURES[name]['cases'] if 'stages' not in case]


def check_logits_and_macs(name, case):
    macs = ARCHITECTURES[name]['macs'][f"{case['height']}x{case['width']}"]
    model = released(name, torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        assert_close(model(case_input(case, torch.float32)), case['logits'], 1e-4)
    assert counter.get_total_flops() == 2 * case['batch'] * macs


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_stages_and_logits(name):
    case = ARCHITECTURES[name]['cases'][0]
    check_logits_and_macs(name, case)
    x = case_input(case)
    model, model_float32 = released(name), released(name, torch.float32)
    stages = [(m.conv_stem, *m.blocks, m.conv_head) for m in (model, model_float32)]
    with torch.inference_mode():
        for stage, stage_float32, expected in zip(*stages, case['stages'].values(), strict=True):
            # each from exact input: random weights amplify the rounding of float32, in the authors' network too
            assert_close(stage_float32(x.float()), expected, 1e-4)
            x = stage(x)
            assert_close(x, expected, 1e-9)
        logits = model.forward_head(x)
    assert_close(logits, case['logits'], 1e-9)
    assert logits.topk(5).indices.tolist() == case['top5']


@pytest.mark.parametrize(
    'name, case', OTHER_CASES, ids=[f"{name}-{case['height']}x{case['width']}" for name, case in OTHER_CASES])
def test_logits_of_other_sizes(name, case):
    check_logits_and_macs(name, case)
    model = released(name)
    with torch.inference_mode():
        logits = model(case_input(case))
    assert_close(logits, case['logits'], 1e-9)
    assert logits.topk(5).indices.tolist() == case['top5']


def _load_state_dict(name, path, **kwargs):
    model = timm.create_model(name, **kwargs)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


DOORS = {
    'pretrained_cfg_overlay': lambda name, path, **kwargs: timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=dict(file=path), **kwargs),
    'checkpoint_path': lambda name, path, **kwargs: timm.create_model(name, checkpoint_path=path, **kwargs),
    'load_state_dict': _load_state_dict,
}
FORMATS = {
    'zip': torch.save,
    'legacy': lambda s, path: torch.save(s, path, _use_new_zipfile_serialization=False),
    'training': lambda s, path: torch.save({'epoch': 150, 'state_dict': s, 'best_prec1': 73.1}, path),
    'parallel': lambda s, path: torch.save({f'module.{k}': v for k, v in s.items()}, path),
    'untracked': lambda s, path: torch.save(
        {k: v for k, v in s.items() if not k.endswith('num_batches_tracked')}, path),
    'safetensors': save_file,  # which sorts the tensors by name
}


# each door and each format in both layouts: timm reads a file in one way behind all doors but the last
@pytest.mark.parametrize('layout', ['release', 'own'])
@pytest.mark.parametrize('door, file_format', [
    ('load_state_dict', 'zip'),
    ('pretrained_cfg_overlay', 'legacy'),
    ('pretrained_cfg_overlay', 'untracked'),
    ('checkpoint_path', 'training'),
    ('checkpoint_path', 'safetensors'),
    ('checkpoint_path', 'parallel'),
])
def test_checkpoint_loads(door, file_format, layout, tmp_path):
    name, expected = 'hbonet_025_4x_d8', released('hbonet_025_4x_d8', torch.float32)
    path = str(tmp_path / ('weights.safetensors' if file_format == 'safetensors' else 'weights.pth'))
    weights = release_state_dict(name, torch.float32) if layout == 'release' else expected.state_dict()
    FORMATS[file_format](weights, path)
    found = DOORS[door](name, path).state_dict()
    for key, tensor in expected.state_dict().items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize('wrap, prefix', [
    (nn.DataParallel, 'module.'),
    (lambda model: nn.Sequential(nn.Conv2d(3, 3, 1), nn.ModuleDict({'backbone': model})), '1.backbone.'),
    (copy.deepcopy, ''),
    (lambda model: pickle.loads(pickle.dumps(model)), ''),
    (lambda model: model.to('meta'), ''),
], ids=['parallel', 'part', 'copy', 'pickled', 'meta'])
def test_release_loads_into(wrap, prefix):
    weights, image = release_state_dict('hbonet_010'), images(1, 3, 64, 64)
    outer = wrap(timm.create_model('hbonet_010', dtype=torch.float64).eval())
    others = {k: v for k, v in outer.state_dict().items() if not k.startswith(prefix)}
    is_meta = any(p.is_meta for p in outer.parameters())
    outer.load_state_dict({**others, **{prefix + k: v for k, v in weights.items()}}, assign=is_meta)
    model = next(m for m in outer.modules() if isinstance(m, HBONet))
    assert torch.equal(model(image), released('hbonet_010')(image))


def test_release_loads_into_its_first_stages():
    getter = timm.create_model(
        'hbonet_010', features_only=True, feature_cls='getter', out_indices=(0, 2), dtype=torch.float64).eval()
    weights, image = release_state_dict('hbonet_010'), images(1, 3, 64, 64)
    result = getter.load_state_dict({f'model.{k}': v for k, v in weights.items()}, strict=False)
    assert not result.missing_keys
    expected = released('hbonet_010').forward_intermediates(image, [0, 2], intermediates_only=True)
    assert all(map(torch.equal, getter(image), expected))


@pytest.mark.parametrize('door', DOORS)
@pytest.mark.parametrize('weights, name, kwargs, error', [
    ('hbonet_010', 'hbonet_025_d8', {}, r'blocks\.8\.0\.conv_pwl\.conv\.weight.*\[40, 120, 1, 1\].*\[104, '),
    ('hbonet_010', 'hbonet_010', dict(spatial_expansion='deconv'), r'blocks\.1\.0\.expand\.conv\.conv should be'),
    # with 10 classes, timm does not load strictly
    ('hbonet_025_d8', 'hbonet_025_4x_d8', dict(num_classes=10), r'features\.2\.conv\.5 .*\.conv_dw2\.conv '),
], ids=['width', 'deconv', 'rate'])
def test_checkpoint_that_does_not_fit(door, weights, name, kwargs, error, tmp_path):
    path = str(tmp_path / 'weights.pth')
    torch.save(release_state_dict(weights, torch.float32), path)
    with pytest.raises(RuntimeError, match=f'(?s){error}'):
        DOORS[door](name, path, **kwargs)


@pytest.mark.parametrize('change, error', [
    (lambda s: s.pop('features.3.conv.0.weight'), r'features\.3\.conv\.1 .*blocks\.2\.0\.contract\.conv_dw1\.conv '),
    (lambda s: [s.pop(k) for k in list(s) if k.startswith('conv.')], r'nothing .*conv_head\.conv '),
    (lambda s: s.pop('features.3.conv.1.bias'), r'[Mm]issing.*blocks\.2\.0\.contract\.conv_dw1\.bn\.bias"'),
    (lambda s: s.update({'features.3.extra.weight': torch.zeros(1)}), r'features\.3\.extra .*blocks\.2\.1\.'),
    (lambda s: s.update({'features.99.weight': torch.zeros(1)}), r'features\.99 .*conv_head\.conv '),
    (lambda s: s.update(extra=torch.zeros(1)), r'[Uu]nexpected.*extra"'),
])
def test_wrong_tensor_is_named(change, error):
    weights = release_state_dict('hbonet_010', torch.float32)
    change(weights)
    with pytest.raises(RuntimeError, match=f'(?s){error}'):
        timm.create_model('hbonet_010').load_state_dict(weights)
