"""What timm's own models do, and what timm's test suite does not ask of every model."""
import copy
import functools
import pickle

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from networks import (
    assert_equal,
    create_network,
    estimate_statistics,
    images,
    needs_dynamic_export,
    needs_onnx_exporter,
    needs_torch,
    released,
)
from onnx.reference import ReferenceEvaluator
from reference import ARCHITECTURES, release_state_dict
from timm.layers import BatchNormAct2d, DropPath, convert_sync_batchnorm
from timm.models._features import FeatureGetterNet
from timm.optim import create_optimizer_v2
from timm.utils.model import freeze_batch_norm_2d
from torch import nn
from torch.nn import functional as F

from timm_hbonet import HBONet
from timm_hbonet.blocks import HarmoniousBottleneck, InvertedResidual, avg_pool2d

REDUCTIONS = [2, 4, 8, 16, 32]
# of stages 2, 3, 4, 7 and 9
CHANNELS = {
    'hbonet_100': [40, 72, 96, 144, 400],
    'hbonet_050': [18, 36, 48, 72, 200],
    'hbonet_025_8x_d8': [16, 24, 24, 40, 104],
    'hbonet_010': [4, 8, 12, 16, 40],
}
RATES = ['hbonet_010', 'hbonet_025_4x_d8', 'hbonet_025_8x_d8']


@pytest.mark.parametrize('name', CHANNELS)
def test_feature_info(name):
    info = timm.create_model(name, features_only=True, device='meta').feature_info
    assert info.reduction() == REDUCTIONS and info.channels() == CHANNELS[name]


@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'hook', 'getter', 'fx'])
def test_features(feature_cls):
    name, image = 'hbonet_025_8x_d8', images(2, 3, 64, 96)
    model = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=dict(state_dict=release_state_dict(name)), features_only=True,
        feature_cls=feature_cls, dtype=torch.float64).eval()
    with torch.no_grad():
        features = model(image)
        features = list(features.values()) if isinstance(features, dict) else features
        expected = released(name).forward_intermediates(image, intermediates_only=True)
    assert [f.shape for f in features] == [
        (2, channels, 64 // r, 96 // r) for channels, r in zip(CHANNELS[name], REDUCTIONS, strict=True)]
    for feature, intermediate in zip(features, expected, strict=True):
        assert torch.equal(feature, intermediate)


def test_features_at_indices():
    model = timm.create_model('hbonet_010', features_only=True, out_indices=(1, -1))
    assert model.feature_info.reduction() == [4, 32]
    assert [f.shape[-1] for f in model(images(2, 3, 64, 64, dtype=torch.float32))] == [16, 2]


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


@pytest.mark.parametrize('global_pool, pool', [
    ('max', lambda x: x.amax((2, 3))), ('avgmax', lambda x: (x.mean((2, 3)) + x.amax((2, 3))) / 2), ('', lambda x: x)])
def test_global_pool_and_input_channels(global_pool, pool):
    model = create_network(num_classes=0, global_pool=global_pool, in_chans=1)
    image = images(2, 1, 64, 64)
    assert_equal(model(image), pool(model.forward_features(image)))


def test_intermediates_stop_early_and_prune():
    model, image = released('hbonet_010'), images(2, 3, 64, 64)
    final, taps = model.forward_intermediates(image)
    assert torch.equal(final, model.forward_features(image))
    for i, tap in enumerate(taps):
        assert torch.equal(model.forward_intermediates(image, [i], stop_early=True, intermediates_only=True)[0], tap)
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


@pytest.mark.parametrize('name', ['hbonet_010', 'hbonet_025_8x_d8'])
def test_output_stride_16(name):
    dense, strided, image = create_network(name, output_stride=16), create_network(name), images(1, 3, 96, 96)
    dense.load_state_dict(strided.state_dict())
    assert [f['reduction'] for f in dense.feature_info] == [2, 4, 8, 16, 16]
    assert [f.shape[-1] for f in dense.forward_intermediates(image, intermediates_only=True)] == [48, 24, 12, 6, 6]
    # the first block whose stride is gone is followed by dilated ones that see as far as before
    dilations = [m.dilation[0] for m in dense.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert dilations[-3:] == [1, 2, 2] and set(dilations[:-3]) == {1}
    # and agrees with the strided network at every other position
    assert_equal(dense.forward_features(image)[..., ::2, ::2], strided.forward_features(image))


def test_grad_checkpointing_gives_the_same_gradients():
    gradients, calls = [], []
    for enable in (False, True):
        model = released('hbonet_010').train()
        model.set_grad_checkpointing(enable)
        model.blocks[3][0].register_forward_pre_hook(lambda *args, enable=enable: calls.append(enable))
        model(images(2, 3, 64, 64)).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
        assert torch.equal(model.eval()(images(1, 3, 64, 64)), model.eval()(images(1, 3, 64, 64)))
    assert calls == [False] * 3 + [True] * 4  # again in the backward pass
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
    model = released('hbonet_010')
    features = model.forward_features(images(2, 3, 64, 64))
    embedding = model.forward_head(features, pre_logits=True)
    model.drop_rate = timm.create_model('hbonet_010', drop_rate=0.3, device='meta').drop_rate
    assert torch.equal(model.forward_head(features, pre_logits=True), embedding)
    torch.manual_seed(0)
    dropped = model.train().forward_head(features, pre_logits=True)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], embedding[kept] / 0.7)
    assert kept.sum().item() == pytest.approx(0.7 * (embedding != 0).sum().item(), rel=0.05)


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


@pytest.mark.parametrize('kwargs', [{}, dict(norm_layer='batchnorm2d'), dict(norm_layer=nn.BatchNorm2d)])
def test_bn_arguments_of_the_scripts(kwargs):
    model = timm.create_model('hbonet_010', bn_momentum=0.03, bn_eps=0.1, dtype=torch.float64, **kwargs).eval()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 76 and {(m.momentum, m.eps) for m in norms} == {(0.03, 0.1)}
    default, image = released('hbonet_010'), images(1, 3, 64, 64)
    model.load_state_dict(default.state_dict())
    assert (model(image) - default(image)).abs().max() > 0.01
    for m in default.modules():
        if isinstance(m, nn.BatchNorm2d):
            assert (m.momentum, m.eps) == (0.1, 1e-5)
            m.eps = 0.1
    assert torch.equal(model(image), default(image))


@pytest.mark.parametrize('act_layer, act, count', [
    ('relu6', nn.ReLU6, 35), ('silu', nn.SiLU, 35), ('prelu', nn.PReLU, 35), ('hard_swish', nn.Hardswish, 35),
    ('', nn.ReLU6, 0)])
@pytest.mark.parametrize('norm_layer', ['groupnorm1', BatchNormAct2d])
def test_norm_and_act_layers(norm_layer, act_layer, act, count):
    model = timm.create_model('hbonet_010', norm_layer=norm_layer, act_layer=act_layer)
    assert isinstance(model.conv_stem.bn, nn.GroupNorm if norm_layer == 'groupnorm1' else BatchNormAct2d)
    assert sum(isinstance(m, act) for m in model.modules()) == count
    if act_layer != 'relu6':
        assert not any(isinstance(m, nn.ReLU6) for m in model.modules())
    logits = model(images(2, 3, 32, 32, dtype=torch.float32))
    logits.sum().backward()
    assert logits.shape == (2, 1000) and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('convert', [convert_sync_batchnorm, freeze_batch_norm_2d])
def test_release_in_other_batch_norms(convert):
    model = convert(timm.create_model('hbonet_010', dtype=torch.float64)).eval()
    assert not any(type(m) is BatchNormAct2d for m in model.modules())
    model.load_state_dict(release_state_dict('hbonet_010'), strict=convert is convert_sync_batchnorm)
    image = images(1, 3, 64, 64)
    assert_equal(model(image), released('hbonet_010')(image))


@pytest.mark.parametrize('device, dtype', [
    ('meta', torch.float32), ('cpu', torch.float64), ('cpu', torch.bfloat16),
    pytest.param('cpu', torch.float16, marks=needs_torch('2.3', 'float16 convolutions on a CPU'))])
def test_device_and_dtype(device, dtype):
    model = timm.create_model('hbonet_025_4x_d8', device=device, dtype=dtype, spatial_expansion='deconv')
    tensors = {k: v for k, v in model.state_dict().items() if not k.endswith('num_batches_tracked')}
    assert {(t.device.type, t.dtype) for t in tensors.values()} == {(device, dtype)}
    model.reset_classifier(3)
    assert model.eval()(torch.zeros(1, 3, 64, 64, device=device, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize('dtype', [
    torch.bfloat16, pytest.param(torch.float16, marks=needs_torch('2.3', 'float16 convolutions on a CPU'))])
def test_low_precision(dtype):
    model, image = create_network(), images(4, 3, 64, 64)
    expected = model(image)
    found = copy.deepcopy(model).to(dtype)(image.to(dtype))
    with torch.autocast('cpu', dtype=dtype):
        autocast = copy.deepcopy(model).float()(image.float())
    for logits in (found, autocast):
        assert logits.dtype == dtype
        # each of 40 layers adds its rounding
        assert (logits.double() - expected).norm() <= 40 * torch.finfo(dtype).eps * expected.norm()


def test_channels_last():
    model, image = create_network(), images(2, 3, 64, 64)
    expected = model(image)
    model.to(memory_format=torch.channels_last)
    image = image.to(memory_format=torch.channels_last)
    assert_equal(model(image), expected)
    assert model.forward_features(image).is_contiguous(memory_format=torch.channels_last)


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
        assert [f.shape[-2:] for f in features] == [(-(-height // r), -(-width // r)) for r in REDUCTIONS]
        assert all(f.isfinite().all() for f in features)


@pytest.mark.parametrize('rate', [2, 4, 8])
@pytest.mark.parametrize('stride', [1, 2])
def test_multiples_of_32_are_as_released_to_the_bit(rate, stride):
    block = estimate_statistics(HarmoniousBottleneck(24, 36, stride=stride, rate=rate))
    x = images(2, 24, 32, 64, dtype=torch.float32)
    with torch.no_grad():
        y = block.conv_pwl(block.conv_dw(block.contract(x)))
        rest = x[:, -18:]
        if stride == 2:
            rest = F.avg_pool2d(rest, 2)
        if rate > stride:
            shortcut = F.avg_pool2d(x[:, :18], 2) if stride == 2 else x[:, :18]
            y = block.conv_dw_end(shortcut + F.interpolate(y, scale_factor=rate // stride))
        expected = torch.cat([rest, y], 1)
        assert torch.equal(block(x), expected)
        # one forward for all
        assert torch.equal(torch.jit.script(block)(x), expected)
        assert torch.equal(torch.fx.symbolic_trace(block)(x), expected)
        for m in block.modules():
            m.training = not isinstance(m, BatchNormAct2d)
        assert torch.equal(block(x), expected)


def test_only_rate_2_activates_before_the_channels_are_contracted():
    for rate in (2, 4, 8):
        block = HarmoniousBottleneck(8, 8, rate=rate)
        assert isinstance(block.conv_dw.bn.act, nn.ReLU6) == (rate == 2)
        assert not isinstance(block.conv_pwl.bn.act, nn.ReLU6)


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
    assert isinstance(conv, nn.ConvTranspose2d) and conv.stride == (scale, scale) and conv.groups == 18
    assert torch.equal(expand.eval()(y, size), expand.conv(y)[:, :, :29, :33])


def test_pooling_averages_the_pixels_that_there_are():
    x = torch.tensor([[[[1., 3., 5.], [5., 7., 9.], [2., 4., 8.]]]])
    expected = [[[[4., 7.], [3., 8.]]]]
    for pool in (avg_pool2d, torch.jit.script(avg_pool2d), torch.fx.symbolic_trace(avg_pool2d)):
        assert pool(x).tolist() == expected


@pytest.mark.parametrize('name', ['hbonet_010', 'hbonet_025_8x_d8'])
def test_backward_hooks_on_every_module(name):
    gradients, calls = [], set()
    for hooked in (False, True):
        model = released(name).train()
        for key, m in model.named_modules():
            if hasattr(m, 'inplace'):
                m.inplace = False
            if hooked:
                m.register_full_backward_hook(lambda *args, key=key: calls.add(key))
        image = images(2, 3, 64, 64).requires_grad_()
        model(image).square().mean().backward()
        gradients.append([image.grad, *(p.grad for p in model.parameters())])
        assert image._backward_hooks is None
        layers = (nn.Conv2d, nn.Linear, BatchNormAct2d, HarmoniousBottleneck, InvertedResidual)
        assert not hooked or calls >= {key for key, m in model.named_modules() if isinstance(m, layers)}
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)  # hooks change the order of sums


# one block a stage has all that there is to compile, in a third of the time
SHORT = dict(depths=(1,) * 9, num_classes=5)


@pytest.mark.parametrize('spatial_expansion', ['nearest', 'deconv'])
def test_compile_has_no_graph_break(spatial_expansion):
    model = create_network(rates=(8, 4, 2, 2, 2), spatial_expansion=spatial_expansion, **SHORT)
    image, gradients = images(2, 3, 64, 64), []
    model.train(spatial_expansion == 'nearest')
    for forward in (model, torch.compile(model, fullgraph=True, backend='aot_eager')):
        model.zero_grad()
        logits = forward(image)
        logits.square().mean().backward()
        gradients.append([logits, *(p.grad for p in model.parameters())])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_once_for_all_sizes():
    import torch._dynamo.testing
    compiler = torch._dynamo.testing.CompileCounter()
    blocks = nn.Sequential(HarmoniousBottleneck(4, 4, rate=4), HarmoniousBottleneck(4, 8, stride=2)).eval()
    compiled = torch.compile(blocks, fullgraph=True, dynamic=True, backend=compiler)
    with torch.no_grad():
        for i in range(8):
            compiled(images(2, 4, 32 + 7 * i, 32 + 5 * i, dtype=torch.float32))
    assert compiler.frame_count <= 3, 'compiles again for each size'


def dynamic_sizes(**multiples):
    names = ('batch', 'height', 'width')
    dims = [multiples.get(name, 1) * torch.export.Dim(name, min=1 if name == 'batch' else 33) for name in names]
    return dict(zip((0, 2, 3), dims, strict=True))


@needs_dynamic_export
@pytest.mark.parametrize('name', ['hbonet_010', 'hbonet_025_8x_d8'])
def test_export_of_dynamic_batch_and_size(name):
    model = create_network(name, **SHORT)
    program = torch.export.export(model, (images(2, 3, 64, 96),), dynamic_shapes=(dynamic_sizes(),)).module()
    for shape in [(1, 3, 33, 33), (3, 3, 47, 100)]:
        assert_equal(program(images(*shape)), model(images(*shape)))


@needs_dynamic_export
def test_export_of_dynamic_size_with_deconv():
    model = create_network(spatial_expansion='deconv', **SHORT)
    height, width = 32 * torch.export.Dim('height', min=2), 32 * torch.export.Dim('width', min=2)
    program = torch.export.export(model, (images(2, 3, 64, 96),), dynamic_shapes=({2: height, 3: width},)).module()
    assert_equal(program(images(2, 3, 128, 64)), model(images(2, 3, 128, 64)))


@needs_onnx_exporter
@pytest.mark.parametrize('exporter', ['torchscript', 'dynamo'])
def test_onnx_of_dynamic_batch_and_size(exporter, tmp_path):
    model, path = create_network('hbonet_025_4x_d8', torch.float32, **SHORT), str(tmp_path / 'model.onnx')
    if exporter == 'dynamo':
        options = dict(dynamo=True, dynamic_shapes=(dynamic_sizes(),), verbose=False)
    else:
        options = dict(dynamo=False, dynamic_axes={'image': {0: 'batch', 2: 'height', 3: 'width'}}, opset_version=17)
    torch.onnx.export(model, (images(2, 3, 64, 96, dtype=torch.float32),), path, input_names=['image'], **options)
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path)
    for shape in [(1, 3, 33, 33), (3, 3, 47, 100)]:
        image = images(*shape, dtype=torch.float32)
        logits = torch.from_numpy(session.run(None, {'image': image.numpy()})[0])
        # rounding of float32 over 40 layers
        assert_equal(logits, model(image).detach(), 40 * 10 * torch.finfo(torch.float32).eps)


class Pool(nn.Module):
    def forward(self, x):
        return avg_pool2d(x)


@needs_onnx_exporter
@pytest.mark.parametrize('exporter', ['torchscript', 'dynamo'])
def test_onnx_pools_leave_no_room_for_doubt(exporter, tmp_path):
    """Runtimes differ in what they count at the edge of a pool with ceil_mode, but not in the pixels that there are."""
    image, path = images(1, 2, 5, 7, dtype=torch.float32), str(tmp_path / 'model.onnx')
    torch.onnx.export(Pool(), (image,), path, input_names=['image'], dynamo=exporter == 'dynamo', verbose=False)
    exported = onnx.load(path)
    pools = [{a.name: onnx.helper.get_attribute_value(a) for a in n.attribute} for n in exported.graph.node
             if n.op_type == 'AveragePool']
    assert pools and all(p.get('count_include_pad', 0) == 0 for p in pools)
    for run in (ReferenceEvaluator(exported).run, onnxruntime.InferenceSession(path).run):
        np.testing.assert_allclose(run(None, {'image': image.numpy()})[0], avg_pool2d(image).numpy(), rtol=1e-6)


def test_pickle_and_script():
    model, image = create_network(), images(1, 3, 40, 40)
    assert torch.equal(pickle.loads(pickle.dumps(model))(image), model(image))
    assert_equal(torch.jit.script(model)(image), model(image), 1e-12)
    assert_equal(torch.fx.symbolic_trace(model)(image), model(image), 1e-12)
    assert isinstance(model, HBONet) and type(model).__module__ == 'timm_hbonet.hbonet'


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


@pytest.mark.parametrize('kwargs', [dict(width=0.01, divisor=1), dict(width=0.05, divisor=64)])
def test_width_that_has_no_halves(kwargs):
    try:
        model = timm.create_model('hbonet_100', device='meta', **kwargs)
    except ValueError as e:
        assert '`width`' in str(e)
    else:
        assert model(torch.zeros(1, 3, 64, 64, device='meta')).shape == (1, 1000)


@pytest.mark.parametrize('image, fact', [
    (torch.zeros(3, 64, 64), '4D.*3D'),
    (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), 'Byte'),
    (torch.zeros(1, 4, 64, 64), '3 channels.* 4 channels'),
])
def test_bad_images(image, fact):
    with pytest.raises((AssertionError, ValueError, RuntimeError), match=fact):
        timm.create_model('hbonet_010')(image)


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_configuration_is_data(name):
    architecture = ARCHITECTURES[name]
    rates = {2: (2, 2, 2, 2, 2), 4: (4, 4, 4, 2, 2), 8: (8, 8, 4, 2, 2)}[architecture['spatial_rate']]
    model = HBONet(
        width=architecture['width_mult'], divisor=architecture['channel_divisor'], rates=rates, device='meta')
    shapes = [v.shape for v in timm.create_model(name, device='meta').state_dict().values()]
    assert [v.shape for v in model.state_dict().values()] == shapes


@pytest.mark.parametrize('kwargs', [
    dict(width=0.77, divisor=1), dict(width=0.2, depths=(2, 3, 1, 2, 1, 1, 2, 1, 2), rates=(2, 8, 4, 4, 8))])
def test_own_configuration_learns(kwargs):
    model = timm.create_model('hbonet_100', num_classes=2, dtype=torch.float64, **kwargs)
    model(images(2, 3, 64, 64)).sum().backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None]
    assert not unused
    assert functools.reduce(lambda n, stage: n + len(stage), model.blocks, 0) == len(
        [m for m in model.modules() if isinstance(m, (HarmoniousBottleneck, InvertedResidual))]) + len(model.blocks[6])
