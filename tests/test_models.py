"""What timm's own models do, and what timm's test suite does not ask of every model."""
import copy

import onnx
import pytest
import timm
import torch
from networks import assert_equal, create_network, images, needs_torch, released
from timm.layers import BatchNormAct2d, DropPath
from timm.models._features import FeatureGetterNet
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn import functional as F

from timm_hbonet import HBONet
from timm_hbonet.blocks import HarmoniousBottleneck, InvertedResidual, avg_pool2d


def test_head():
    model, image = released('hbonet_010'), images(2, 3, 64, 64)
    features = model.forward_features(image)
    assert features.shape == (2, 1600, 2, 2) and model.num_features == model.head_hidden_size == 1600
    embedding = model.forward_head(features, pre_logits=True)
    assert_equal(embedding, features.mean((2, 3)))
    assert_equal(model(image), F.linear(embedding, model.classifier.weight, model.classifier.bias))
    assert model.get_classifier() is model.classifier
    model.reset_classifier(7, 'catavgmax')
    assert model(image).shape == (2, 7) and model.head_hidden_size == 3200
    model.reset_classifier(0)
    assert_equal(model(image), torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1))
    model.reset_classifier(0, '')
    assert torch.equal(model(image), features)


def test_intermediates_stop_early_and_prune():
    model, image = released('hbonet_010'), images(2, 3, 64, 64)
    features, taps = model.forward_intermediates(image)
    assert torch.equal(features, model.forward_features(image))
    for i, tap in enumerate(taps):
        final, (found,) = model.forward_intermediates(image, [i], stop_early=True)
        assert torch.equal(found, tap) and torch.equal(final, features if i == 4 else tap)
        pruned = copy.deepcopy(model)
        assert pruned.prune_intermediate_layers([i]) == [i]
        assert torch.equal(pruned(image), tap) and pruned.num_features == tap.shape[1]
        assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())
    kept = copy.deepcopy(model)
    kept.prune_intermediate_layers([4], prune_head=False)
    assert torch.equal(kept(image), model(image))
    scripted = torch.jit.script(FeatureGetterNet(copy.deepcopy(model), out_indices=[0, 2]))
    for feature, tap in zip(scripted(image), [taps[0], taps[2]], strict=True):
        assert_equal(feature, tap)


def test_output_stride_16():
    dense, strided, image = create_network(output_stride=16), create_network(), images(1, 3, 96, 96)
    dense.load_state_dict(strided.state_dict())
    assert [f['reduction'] for f in dense.feature_info] == [2, 4, 8, 16, 16]
    assert [f.shape[-1] for f in dense.forward_intermediates(image, intermediates_only=True)] == [48, 24, 12, 6, 6]
    # dilated, it agrees with the strided network at every other position
    assert_equal(dense.forward_features(image)[..., ::2, ::2], strided.forward_features(image))


@pytest.mark.parametrize('forward', [HBONet.forward, lambda model, x: model.forward_intermediates(x)[0]])
def test_grad_checkpointing_gives_the_same_gradients(forward):
    gradients, calls = [], []
    for enable in (False, True):
        model = released('hbonet_010').train()
        model.set_grad_checkpointing(enable)
        model.blocks[3][0].register_forward_pre_hook(lambda *args, enable=enable: calls.append(enable))
        forward(model, images(2, 3, 64, 64)).square().mean().backward()
        gradients.append([p.grad for p in model.blocks.parameters()])
    assert calls == [False, True, True]  # again in the backward pass
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_layer_decay_has_one_group_a_block():
    model = timm.create_model('hbonet_010')
    optimizer = create_optimizer_v2(model, 'sgd', lr=1., layer_decay=0.5)
    scales = sorted({group['lr_scale'] for group in optimizer.param_groups})
    # stem, 18 blocks, head convolution and classifier
    assert scales[-1] == 1. and len(scales) >= 20
    assert sum(len(group['params']) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_dropout():
    model, features = timm.create_model('hbonet_010', drop_rate=0.3), torch.ones(2, 1600, 2, 2)
    dropped = model.train().forward_head(features, pre_logits=True)
    torch.testing.assert_close(dropped[dropped != 0], torch.full(((dropped != 0).sum(),), 1 / 0.7))
    assert 0.6 < (dropped != 0).double().mean() < 0.8
    assert torch.equal(model.eval().forward_head(features, pre_logits=True), torch.ones(2, 1600))


def test_stochastic_depth():
    model = timm.create_model('hbonet_100', drop_path_rate=0.18, device='meta')
    rates = {n: m.drop_prob for n, m in model.named_modules() if isinstance(m, DropPath)}
    # of 19 blocks, from 0 to 0.18: the bottlenecks of stride 1 but for the first block, and one inverted residual
    blocks = ['1.0', '2.1', '2.2', '3.1', '3.2', '3.3', '4.1', '4.2', '4.3', '5.0', '7.1']
    index = [1, 3, 4, 6, 7, 8, 10, 11, 12, 13, 16]
    assert list(rates) == [f'blocks.{b}.drop_path' for b in blocks]
    assert list(rates.values()) == pytest.approx([0.18 * i / 17 for i in index])
    # with its path dropped, a block is its shortcut
    x = images(4, 8, 16, 16)
    block = HarmoniousBottleneck(8, 8, drop_path=1 - 1e-9, dtype=torch.float64).train()
    assert_equal(block(x), torch.cat([x[:, 4:], block.conv_dw_end(x[:, :4])], 1))
    block = InvertedResidual(8, 8, exp_ratio=6, drop_path=1 - 1e-9, dtype=torch.float64).train()
    assert torch.equal(block(x), x)


@pytest.mark.parametrize('norm_layer', ['batchnorm2d', nn.BatchNorm2d])
def test_bn_arguments_of_the_scripts(norm_layer):
    model = timm.create_model('hbonet_010', bn_momentum=0.03, bn_eps=0.1, norm_layer=norm_layer)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 76 and {(m.momentum, m.eps) for m in norms} == {(0.03, 0.1)}
    norms = [m for m in timm.create_model('hbonet_010').modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.momentum, m.eps) for m in norms} == {(0.1, 1e-5)}


@pytest.mark.parametrize('norm_layer, norm, act_layer, act, count', [
    ('groupnorm1', nn.GroupNorm, 'prelu', nn.PReLU, 35),
    (BatchNormAct2d, BatchNormAct2d, 'hard_swish', nn.Hardswish, 35),
    ('batchnorm2d', BatchNormAct2d, '', nn.ReLU6, 0),
])
def test_norm_and_act_layers(norm_layer, norm, act_layer, act, count):
    model = timm.create_model('hbonet_010', norm_layer=norm_layer, act_layer=act_layer)
    modules = list(model.modules())
    assert sum(isinstance(m, norm) for m in modules) == 76 and sum(isinstance(m, act) for m in modules) == count
    assert not any(isinstance(m, nn.ReLU6) for m in modules)
    model(images(2, 3, 32, 32, dtype=torch.float32)).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('device, dtype', [
    ('meta', torch.float32), ('cpu', torch.float64), ('cpu', torch.bfloat16),
    pytest.param('cpu', torch.float16, marks=needs_torch('2.3', 'float16 convolutions on a CPU'))])
def test_device_and_dtype(device, dtype):
    model = timm.create_model('hbonet_025_4x_d8', device=device, dtype=dtype, spatial_expansion='deconv')
    tensors = {k: v for k, v in model.state_dict().items() if not k.endswith('num_batches_tracked')}
    assert {(t.device.type, t.dtype) for t in tensors.values()} == {(device, dtype)}
    model.reset_classifier(3)
    assert model.eval()(torch.zeros(1, 3, 64, 64, device=device, dtype=dtype)).dtype == dtype


def test_initialisation_is_the_releases():
    torch.manual_seed(0)
    model = timm.create_model('hbonet_100')
    assert model.blocks[8][0].conv_dw.conv.weight.std().item() == pytest.approx((2 / (9 * 1200)) ** 0.5, rel=0.05)
    assert model.conv_head.conv.weight.std().item() == pytest.approx((2 / 1600) ** 0.5, rel=0.02)
    assert model.classifier.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert model.classifier.bias.abs().max() == 0


@pytest.mark.parametrize('name, spatial_expansion', [
    ('hbonet_025_8x_d8', 'nearest'), ('hbonet_025_4x_d8', 'deconv')])
def test_any_size(name, spatial_expansion):
    model = timm.create_model(name, spatial_expansion=spatial_expansion, num_classes=5)
    for height, width in [(1, 1), (1, 2), (3, 5), (16, 31), (33, 32), (64, 1), (65, 97)]:
        image = images(2, 3, height, width, dtype=torch.float32)
        logits = model.train()(image)
        assert logits.shape == (2, 5) and logits.isfinite().all()
        logits.sum().backward()
        features = model.eval().forward_intermediates(image, intermediates_only=True)
        assert [f.shape[-2:] for f in features] == [(-(-height // r), -(-width // r)) for r in (2, 4, 8, 16, 32)]
        assert all(f.isfinite().all() for f in features)


@pytest.mark.parametrize('rate, stride', [(2, 1), (4, 1), (8, 1), (4, 2), (8, 2)])
def test_spatial_expansion(rate, stride):
    scale, size = rate // stride, (29, 33)
    y = images(2, 18, *(-(-s // scale) for s in size))
    expand = HarmoniousBottleneck(24, 36, stride, rate=rate).expand
    # each pixel where training had it, also where the size is no multiple
    expected = y.repeat_interleave(scale, 2).repeat_interleave(scale, 3)[:, :, :29, :33]
    assert torch.equal(expand(y, size), expected)
    expand = HarmoniousBottleneck(24, 36, stride, rate=rate, spatial_expansion='deconv', dtype=torch.float64).expand
    conv = expand.conv.conv
    assert isinstance(conv, nn.ConvTranspose2d) and conv.kernel_size == (2 * scale,) * 2 and conv.groups == 18
    assert conv(y).shape[-2:] == (scale * y.shape[-2], scale * y.shape[-1])
    assert torch.equal(expand.eval()(y, size), expand.conv(y)[:, :, :29, :33])


def test_pooling_averages_the_pixels_that_there_are(tmp_path):
    x = torch.tensor([[[[1., 3., 5.], [5., 7., 9.], [2., 4., 8.]]]])
    assert avg_pool2d(x).tolist() == [[[[4., 7.], [3., 8.]]]]
    # PyTorch pads nothing, runtimes pad what they round up
    block, path = HarmoniousBottleneck(4, 8, stride=2).eval(), str(tmp_path / 'block.onnx')
    torch.onnx.export(block, (images(1, 4, 5, 7, dtype=torch.float32),), path)
    pool = next(node for node in onnx.load(path).graph.node if node.op_type == 'AveragePool')
    assert {a.name: a.i for a in pool.attribute}['count_include_pad'] == 0


@pytest.mark.parametrize('kwargs', [
    dict(spatial_expansion='bilinear'),
    dict(output_stride=8),
    dict(rates=(2, 2)),
    dict(rates=(2, 2, 3, 2, 2)),
    dict(depths=(1,)),
])
def test_bad_argument_is_named(kwargs):
    (name, value), = kwargs.items()
    with pytest.raises(ValueError) as error:
        timm.create_model('hbonet_100', device='meta', **kwargs)
    assert f'`{name}`' in str(error.value) and repr(value) in str(error.value)


def test_width_that_has_no_halves():
    with pytest.raises(ValueError, match='passes 1 channels of its input through, .* Use another `width` or `divisor`'):
        timm.create_model('hbonet_100', device='meta', width=0.01, divisor=1)


def test_arguments_of_an_architecture_can_be_overridden():
    model = timm.create_model('hbonet_025_4x_d8', device='meta', width=0.5, rates=(2, 2, 2, 2, 2))
    expected = timm.create_model('hbonet_050_d8', device='meta')
    assert [v.shape for v in model.state_dict().values()] == [v.shape for v in expected.state_dict().values()]


@pytest.mark.parametrize('kwargs', [
    dict(width=0.77, divisor=1), dict(width=0.2, depths=(2, 3, 1, 2, 1, 1, 2, 1, 2), rates=(2, 8, 4, 4, 8))])
def test_own_configuration_learns(kwargs):
    model = timm.create_model('hbonet_100', num_classes=2, dtype=torch.float64, **kwargs)
    model(images(2, 3, 64, 64)).sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    assert list(map(len, model.blocks)) == list(kwargs.get('depths', (1, 1, 3, 4, 4, 1, 1, 2, 1)))
