"""The network is the authors' network: outputs, stages, parameters, MACs, and their checkpoints through every door."""
import copy
import functools
import os
import pickle

import pytest
import timm
import torch
from networks import images, released
from reference import ARCHITECTURES, assert_close, case_input, release_state_dict
from safetensors.torch import save_file
from timm.models import load_checkpoint
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_hbonet.hbonet import checkpoint_filter_fn

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


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_parameters(name):
    model = timm.create_model(name, device='meta')
    assert sum(p.numel() for p in model.parameters()) == ARCHITECTURES[name]['params']


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_release_is_renamed_in_order(name):
    model = timm.create_model(name, device='meta')
    shapes = ARCHITECTURES[name]['state_dict']
    release = {key: torch.empty(shape, device='meta') for key, shape in shapes}
    renamed = checkpoint_filter_fn(release, model)
    assert [(k, v.shape) for k, v in renamed.items()] == [(k, v.shape) for k, v in model.state_dict().items()]
    assert all(a is b for a, b in zip(renamed.values(), release.values(), strict=True))
    assert list(release) == [key for key, _ in shapes]


def _legacy(state_dict, path):
    torch.save(state_dict, path, _use_new_zipfile_serialization=False)


def _load_checkpoint(name, path, **kwargs):
    model = timm.create_model(name, **kwargs)
    load_checkpoint(model, path)
    return model


def _load_state_dict(name, path, **kwargs):
    model = timm.create_model(name, **kwargs)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


DOORS = {
    'pretrained_cfg_overlay': lambda name, path, **kwargs: timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=dict(file=path), **kwargs),
    'checkpoint_path': lambda name, path, **kwargs: timm.create_model(name, checkpoint_path=path, **kwargs),
    'load_checkpoint': _load_checkpoint,
    'load_state_dict': _load_state_dict,
}
FORMATS = {
    'zip': torch.save,
    'legacy': _legacy,
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
    ('load_checkpoint', 'parallel'),
])
def test_checkpoint_loads(door, file_format, layout, tmp_path):
    name, expected = 'hbonet_025_4x_d8', released('hbonet_025_4x_d8', torch.float32)
    path = str(tmp_path / ('weights.safetensors' if file_format == 'safetensors' else 'weights.pth'))
    weights = release_state_dict(name, torch.float32) if layout == 'release' else expected.state_dict()
    FORMATS[file_format](weights, path)
    found = DOORS[door](name, path).state_dict()
    for key, tensor in expected.state_dict().items():
        assert torch.equal(found[key], tensor), key


class Detector(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.neck = nn.Conv2d(3, 3, 1)
        self.backbone = backbone


def test_release_loads_within_other_modules():
    name, weights = 'hbonet_010', release_state_dict('hbonet_010')
    expected, image = released(name), images(1, 3, 64, 64)
    getter = timm.create_model(name, features_only=True, feature_cls='getter', dtype=torch.float64).eval()
    result = getter.load_state_dict({f'model.{k}': v for k, v in weights.items()}, strict=False)
    assert not result.missing_keys
    assert {k.split('.')[1] for k in result.unexpected_keys} == {'conv', 'classifier'}
    for feature, tap in zip(getter(image), expected.forward_intermediates(image, intermediates_only=True), strict=True):
        assert torch.equal(feature, tap)

    def create():
        return timm.create_model(name, dtype=torch.float64).eval()

    for prefix, outer, inner in (
            ('module.', nn.DataParallel(create()), lambda m: m.module),
            ('backbone.', Detector(create()), lambda m: m.backbone),
            ('0.backbone.', nn.Sequential(Detector(create())), lambda m: m[0].backbone),
    ):
        others = {k: v for k, v in outer.state_dict().items() if 'neck' in k}
        state_dict = {**others, **{prefix + k: v for k, v in weights.items()}}
        keys = list(state_dict)
        outer.load_state_dict(state_dict)
        assert list(state_dict) == keys
        assert torch.equal(inner(outer)(image), expected(image))


def test_release_loads_into_copies_and_by_assignment():
    weights, expected, image = release_state_dict('hbonet_010'), released('hbonet_010'), images(1, 3, 64, 64)
    model = timm.create_model('hbonet_010', dtype=torch.float64).eval()
    for m in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        m.load_state_dict(weights)
        assert torch.equal(m(image), expected(image))
    # the hook of a copy is for the copy
    deconv = copy.deepcopy(timm.create_model('hbonet_010', spatial_expansion='deconv'))
    with pytest.raises(RuntimeError, match=r'blocks\.1\.0\.expand\.conv\.conv should be'):
        deconv.load_state_dict(weights)
    assigned = timm.create_model('hbonet_010', device='meta').eval()
    assigned.load_state_dict(weights, assign=True)
    assert torch.equal(assigned(image), expected(image))
    assert assigned.conv_stem.conv.weight.data_ptr() == weights['features.0.0.weight'].data_ptr()


def test_release_loads_into_its_first_stages():
    pruned = timm.create_model('hbonet_010', dtype=torch.float64).eval()
    pruned.prune_intermediate_layers([2])
    assert not pruned.load_state_dict(release_state_dict('hbonet_010'), strict=False).missing_keys
    image = images(1, 3, 64, 64)
    expected = released('hbonet_010').forward_intermediates(image, [2], intermediates_only=True)[0]
    assert torch.equal(pruned(image), expected)


def test_pretrained_stem_and_classifier_are_adapted(tmp_path):
    path = str(tmp_path / 'weights.pth')
    weights = release_state_dict('hbonet_010', torch.float32)
    torch.save(weights, path)
    create = functools.partial(
        timm.create_model, 'hbonet_010', pretrained=True, pretrained_cfg_overlay=dict(file=path))
    grey = create(in_chans=1, num_classes=7)
    torch.testing.assert_close(grey.conv_stem.conv.weight, weights['features.0.0.weight'].sum(1, keepdim=True))
    assert grey.classifier.weight.shape == (7, 1600)
    assert torch.equal(grey.conv_head.conv.weight, weights['conv.0.weight'])
    assert create(in_chans=4).conv_stem.conv.weight.shape == (4, 4, 3, 3)
    features = create(features_only=True)
    assert torch.equal(features.conv_stem.conv.weight, weights['features.0.0.weight'])


@pytest.mark.parametrize('door', DOORS)
def test_checkpoint_that_does_not_fit(door, tmp_path):
    path = str(tmp_path / 'weights.pth')
    torch.save(release_state_dict('hbonet_010', torch.float32), path)
    with pytest.raises(RuntimeError, match=r'(?s)blocks\.8\.0\.conv_pwl\.conv\.weight.*\[40, 120, 1, 1\].*\[104, '):
        DOORS[door]('hbonet_025_d8', path)
    with pytest.raises(RuntimeError, match=r'blocks\.1\.0\.expand\.conv\.conv should be'):
        DOORS[door]('hbonet_010', path, spatial_expansion='deconv')


@pytest.mark.parametrize('change, fact', [
    (lambda s: s.pop('features.3.conv.0.weight'), r'features\.3\.conv\.1 .*blocks\.2\.0\.contract\.conv_dw1\.conv '),
    (lambda s: [s.pop(k) for k in list(s) if k.startswith('conv.')], r'nothing .*conv_head\.conv '),
    (lambda s: s.pop('features.3.conv.1.bias'), r'[Mm]issing.*blocks\.2\.0\.contract\.conv_dw1\.bn\.bias"'),
    (lambda s: s.update({'features.3.extra.weight': torch.zeros(1)}), r'features\.3\.extra .*blocks\.2\.1\.'),
    (lambda s: s.update({'features.99.weight': torch.zeros(1)}), r'features\.99 .*conv_head\.conv '),
    (lambda s: s.update(extra=torch.zeros(1)), r'[Uu]nexpected.*extra"'),
])
@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_wrong_tensor_is_named(change, fact, prefix):
    weights = release_state_dict('hbonet_010', torch.float32)
    change(weights)
    model = timm.create_model('hbonet_010')
    model = nn.ModuleDict({'backbone': model}) if prefix else model
    with pytest.raises(RuntimeError, match=f'(?s){fact}'):
        model.load_state_dict({prefix + k: v for k, v in weights.items()})


def test_checkpoint_of_another_rate(tmp_path):
    path = tmp_path / 'weights.pth'
    torch.save(release_state_dict('hbonet_025_d8', torch.float32), path)
    for num_classes in (1000, 10):  # with 10, timm does not load strictly
        with pytest.raises(RuntimeError, match=r'features\.2\.conv\.5 .*blocks\.1\.0\.contract\.conv_dw2\.conv '):
            timm.create_model(
                'hbonet_025_4x_d8', pretrained=True, pretrained_cfg_overlay=dict(file=path), num_classes=num_classes)


class MakesFolder:
    """Unpickled in full, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize('door', ['pretrained_cfg_overlay', 'checkpoint_path', 'load_checkpoint'])
@pytest.mark.parametrize('save', [torch.save, _legacy], ids=['zip', 'legacy'])
def test_pickle_that_wants_to_run_code_is_refused(door, save, tmp_path):
    path, folder = str(tmp_path / 'weights.pth'), tmp_path / 'made'
    save({'features.0.0.weight': MakesFolder(str(folder))}, path)
    with pytest.raises((RuntimeError, pickle.UnpicklingError)):
        DOORS[door]('hbonet_010', path)
    assert not folder.exists()
