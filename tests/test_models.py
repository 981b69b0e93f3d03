"""What timm's own models do, and what timm's test suite does not ask of every model."""
import copy
import functools

import onnx
import onnxruntime
import pytest
import timm
import torch
from reference import ARCHITECTURES, release_state_dict
from timm.layers import BatchNormAct2d, DropPath, convert_sync_batchnorm
from timm.models._features import FeatureGetterNet
from timm.optim import create_optimizer_v2
from timm.utils import reparameterize_model
from timm.utils.model import freeze_batch_norm_2d
from torch import nn
from torch.nn import functional as F

from timm_hbonet import HBONet
from timm_hbonet.hbonet import HarmoniousBottleneck, RepSequential

REDUCTIONS = [2, 4, 8, 16, 32]
# of stages 2, 3, 4, 7 and 9
CHANNELS = {
    'hbonet_100': [40, 72, 96, 144, 400],
    'hbonet_050': [18, 36, 48, 72, 200],
    'hbonet_025_8x_d8': [16, 24, 24, 40, 104],
    'hbonet_010': [4, 8, 12, 16, 40],
}
SIZES = [(1, 1), (1, 2), (2, 1), (3, 5), (7, 7), (16, 31), (32, 32), (33, 32), (33, 63), (64, 1), (65, 97), (100, 40)]
RATES = ['hbonet_010', 'hbonet_025_4x_d8', 'hbonet_025_8x_d8']


@functools.lru_cache(maxsize=None)
def _released(name, dtype):
    model = timm.create_model(name, dtype=dtype).eval()
    model.load_state_dict(release_state_dict(name, dtype))
    return model


def released(name, dtype=torch.float32):
    """A copy of an architecture with recreated weights, whose outputs differ from image to image."""
    return copy.deepcopy(_released(name, dtype))


@pytest.mark.parametrize('name', CHANNELS)
@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'hook', 'getter', 'fx'])
def test_features(name, feature_cls):
    weights = release_state_dict(name, torch.float32)
    model = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=dict(state_dict=weights), features_only=True,
        feature_cls=feature_cls).eval()
    assert model.feature_info.reduction() == REDUCTIONS
    assert model.feature_info.channels() == CHANNELS[name]
    image = torch.randn(2, 3, 64, 96)
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
    assert [f.shape[-1] for f in model(torch.randn(2, 3, 64, 64))] == [16, 2]


def test_head():
    model = released('hbonet_010')
    image = torch.randn(2, 3, 64, 64)
    features = model.forward_features(image)
    assert features.shape == (2, 1600, 2, 2) and model.num_features == model.head_hidden_size == 1600
    embedding = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(embedding, features.mean((2, 3)))
    torch.testing.assert_close(model(image), model.classifier(embedding))
    model.reset_classifier(7, 'catavgmax')
    assert model(image).shape == (2, 7) and model.head_hidden_size == 3200
    model.reset_classifier(0)
    assert model(image).shape == (2, 3200)
    model.reset_classifier(0, '')
    assert torch.equal(model(image), features)


def test_intermediates_stop_early_and_prune():
    model = released('hbonet_010')
    image = torch.randn(2, 3, 64, 64)
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
        torch.testing.assert_close(feature, tap)


@pytest.mark.parametrize('name', ['hbonet_010', 'hbonet_025_8x_d8'])
def test_output_stride_16(name):
    model = timm.create_model(name, features_only=True, output_stride=16)
    assert model.feature_info.reduction() == [2, 4, 8, 16, 16]
    assert [f.shape[-1] for f in model(torch.randn(2, 3, 96, 96))] == [48, 24, 12, 6, 6]
    # the first block whose stride is gone is followed by dilated ones that see as far as before
    dense, strided = timm.create_model(name, output_stride=16), timm.create_model(name)
    dilations = [m.dilation[0] for m in dense.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert dilations[-3:] == [1, 2, 2] and set(dilations[:-3]) == {1}
    # and agrees with the strided network at every other position
    for m in (dense, strided):
        m.load_state_dict(release_state_dict(name, torch.float32))
        m.eval()
    image = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(dense.forward_features(image)[..., ::2, ::2], strided.forward_features(image))


def test_grad_checkpointing_gives_the_same_gradients():
    gradients, calls = [], []
    for enable in (False, True):
        model = released('hbonet_010', torch.float64).train()
        model.set_grad_checkpointing(enable)
        model.blocks[3][0].register_forward_pre_hook(lambda *args, enable=enable: calls.append(enable))
        torch.manual_seed(0)
        model(torch.randn(2, 3, 64, 64, dtype=torch.float64)).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
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
    model = released('hbonet_010')
    features = model.forward_features(torch.randn(2, 3, 64, 64))
    embedding = model.forward_head(features, pre_logits=True)
    model.drop_rate = timm.create_model('hbonet_010', drop_rate=0.3).drop_rate
    assert torch.equal(model.forward_head(features, pre_logits=True), embedding)
    dropped = model.train().forward_head(features, pre_logits=True)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], embedding[kept] / 0.7)
    assert kept.sum().item() == pytest.approx(0.7 * (embedding != 0).sum().item(), rel=0.05)


def test_stochastic_depth():
    model = timm.create_model('hbonet_100', drop_path_rate=0.18)
    rates = {n: m.drop_prob for n, m in model.named_modules() if isinstance(m, DropPath)}
    # of 19 blocks, from 0 to 0.18: the bottlenecks of stride 1 but for the first block, and one inverted residual
    blocks = ['1.0', '2.1', '2.2', '3.1', '3.2', '3.3', '4.1', '4.2', '4.3', '5.0', '7.1']
    index = [1, 3, 4, 6, 7, 8, 10, 11, 12, 13, 16]
    assert list(rates) == [f'blocks.{b}.drop_path' for b in blocks]
    assert list(rates.values()) == pytest.approx([0.18 * i / 17 for i in index])
    block = HarmoniousBottleneck(8, 8, drop_path=1 - 1e-9).train()
    x = torch.randn(4, 8, 16, 16)
    torch.testing.assert_close(block(x)[:, 4:], block.upconv(x[:, :4]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('kwargs', [{}, dict(norm_layer='batchnorm2d'), dict(norm_layer=nn.BatchNorm2d)])
def test_bn_arguments_of_the_scripts(kwargs):
    model = timm.create_model('hbonet_010', bn_momentum=0.03, bn_eps=2e-5, **kwargs).eval()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 76 and {(m.momentum, m.eps) for m in norms} == {(0.03, 2e-5)}
    default = released('hbonet_010')
    model.load_state_dict(default.state_dict())
    for m in default.modules():
        if isinstance(m, nn.BatchNorm2d):
            assert (m.momentum, m.eps) == (0.1, 1e-5)
            m.eps = 2e-5
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(image), default(image))


def test_norm_and_act_layers():
    model = timm.create_model('hbonet_010', norm_layer='groupnorm1', act_layer='silu')
    assert not any(isinstance(m, (nn.BatchNorm2d, nn.ReLU6)) for m in model.modules())
    assert sum(isinstance(m, nn.SiLU) for m in model.modules()) == 35
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 1000)


@pytest.mark.parametrize('device, dtype', [('meta', torch.float32), ('cpu', torch.float64), ('cpu', torch.bfloat16)])
def test_device_and_dtype(device, dtype):
    model = timm.create_model('hbonet_025_4x_d8', device=device, dtype=dtype, spatial_expansion='deconv')
    tensors = {k: v for k, v in model.state_dict().items() if not k.endswith('num_batches_tracked')}
    assert {(t.device.type, t.dtype) for t in tensors.values()} == {(device, dtype)}
    model.reset_classifier(3)
    assert model.eval()(torch.zeros(1, 3, 64, 64, device=device, dtype=dtype)).dtype == dtype


def test_initialisation_is_the_releases():
    torch.manual_seed(0)
    model = timm.create_model('hbonet_100')
    assert model.blocks[8][0].conv[3].weight.std().item() == pytest.approx((2 / (9 * 1200)) ** 0.5, rel=0.05)
    assert model.conv_head[0].weight.std().item() == pytest.approx((2 / 1600) ** 0.5, rel=0.02)
    assert model.classifier.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert model.classifier.bias.abs().max() == 0


@pytest.mark.parametrize('name', RATES)
@pytest.mark.parametrize('spatial_expansion', ['nearest', 'bilinear', 'deconv'])
def test_any_size(name, spatial_expansion):
    model = timm.create_model(name, spatial_expansion=spatial_expansion, num_classes=5)
    features = timm.create_model(name, spatial_expansion=spatial_expansion, features_only=True).eval()
    for height, width in SIZES:
        image = torch.randn(2, 3, height, width)
        assert model.eval()(image).isfinite().all()
        logits = model.train()(image)
        assert logits.shape == (2, 5) and logits.isfinite().all()
        logits.sum().backward()
        assert [f.shape[-2:] for f in features(image)] == [(-(-height // r), -(-width // r)) for r in REDUCTIONS]


@pytest.mark.parametrize('rate', [2, 4, 8])
@pytest.mark.parametrize('stride', [1, 2])
def test_multiples_of_32_are_as_released_to_the_bit(rate, stride):
    block = HarmoniousBottleneck(24, 36, stride=stride, rate=rate).eval()
    x = torch.randn(2, 24, 32, 64)
    with torch.no_grad():
        y = block.conv(x)
        rest = x[:, -18:]
        if stride == 2:
            rest = F.avg_pool2d(rest, 2)
        if rate > stride:
            shortcut = F.avg_pool2d(x[:, :18], 2) if stride == 2 else x[:, :18]
            y = block.upconv(shortcut + F.interpolate(y, scale_factor=rate // stride))
        assert torch.equal(block(x), torch.cat([rest, y], 1))


def test_spatial_expansion():
    x, y = torch.randn(2, 24, 30, 32), torch.randn(2, 18, 8, 8)
    for mode in ('nearest', 'bilinear'):
        expand = HarmoniousBottleneck(24, 36, rate=4, spatial_expansion=mode).expand
        assert torch.equal(expand(y, x.shape[-2:]), F.interpolate(y, (30, 32), mode=mode))
    for rate, stride in ((2, 1), (4, 1), (8, 2)):
        expand = HarmoniousBottleneck(24, 36, rate=rate, stride=stride, spatial_expansion='deconv').eval().expand
        assert isinstance(expand.conv[0], nn.ConvTranspose2d)
        assert expand.conv[0].stride == (rate // stride,) * 2 and expand.conv[0].groups == 18
        size = (8 * rate // stride - 1, 8 * rate // stride)
        assert torch.equal(expand(y, size), expand.conv(y)[:, :, :-1])


def test_pooling_averages_the_pixels_that_there_are():
    pool = HarmoniousBottleneck(4, 4, stride=2).pool
    x = torch.tensor([[[[1., 3., 5.], [5., 7., 9.], [2., 4., 8.]]]])
    assert pool(x).tolist() == [[[[4., 7.], [3., 8.]]]]


def test_channels_last_and_autocast():
    model = released('hbonet_010')
    image = torch.randn(2, 3, 64, 64)
    expected = model(image)
    model.to(memory_format=torch.channels_last)
    image_channels_last = image.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(image_channels_last), expected, rtol=1e-4, atol=1e-4)
    assert model.forward_features(image_channels_last).is_contiguous(memory_format=torch.channels_last)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        logits = model(image)
    assert logits.dtype == torch.bfloat16
    # bf16 has 8 bits of precision, and random weights amplify its rounding
    assert F.cosine_similarity(logits.float(), expected).min() > 0.9


@pytest.mark.parametrize('name', RATES)
def test_compile_has_no_graph_break(name):
    model = released(name)
    image = torch.randn(2, 3, 64, 96)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    with torch.no_grad():
        torch.testing.assert_close(compiled(image), model(image))


def test_compiled_training_has_no_graph_break():
    image, gradients = torch.randn(2, 3, 64, 64, dtype=torch.float64), []
    for compile_model in (lambda model: model, functools.partial(torch.compile, fullgraph=True, backend='aot_eager')):
        model = released('hbonet_010', torch.float64).train()
        compile_model(model)(image).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_gradients_that_reach_batch_norm_are_dense(memory_format):
    model = timm.create_model('hbonet_025_4x_d8').to(memory_format=memory_format)
    dense = []
    for module in model.modules():
        # others are followed by an activation: its gradient is dense, and a hook cannot be before what is done in place
        if isinstance(module, RepSequential) and isinstance(module[-1], nn.BatchNorm2d):
            module[-1].register_full_backward_pre_hook(
                lambda _, gradient: dense.append(gradient[0].is_contiguous(memory_format=memory_format)))
    model(torch.randn(2, 3, 96, 64).to(memory_format=memory_format)).sum().backward()
    assert len(dense) == 30 and all(dense)


@pytest.mark.parametrize('name', RATES)
def test_export_of_dynamic_batch_and_size(name):
    model = released(name)
    batch, height, width = (torch.export.Dim(n, min=m) for n, m in (('batch', 1), ('height', 33), ('width', 33)))
    program = torch.export.export(
        model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=({0: batch, 2: height, 3: width},)).module()
    for shape in [(1, 3, 33, 33), (3, 3, 47, 100), (2, 3, 64, 64)]:
        image = torch.randn(shape)
        torch.testing.assert_close(program(image), model(image), rtol=1e-4, atol=1e-4)


def test_export_of_dynamic_size_with_deconv():
    model = timm.create_model('hbonet_010', spatial_expansion='deconv').eval()
    height, width = 32 * torch.export.Dim('height', min=2), 32 * torch.export.Dim('width', min=2)
    program = torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=({2: height, 3: width},)).module()
    image = torch.randn(2, 3, 128, 64)
    torch.testing.assert_close(program(image), model(image))


@pytest.mark.parametrize(
    'name, exporter', [*((name, 'torchscript') for name in RATES), ('hbonet_025_8x_d8', 'dynamo')])
def test_onnx_of_dynamic_batch_and_size(name, exporter, tmp_path):
    model, path = released(name), str(tmp_path / 'model.onnx')
    if exporter == 'dynamo':
        sizes = {i: torch.export.Dim(n, min=m) for i, n, m in ((0, 'batch', 1), (2, 'height', 33), (3, 'width', 33))}
        options = dict(dynamo=True, dynamic_shapes=(sizes,), verbose=False)
    else:
        options = dict(dynamo=False, dynamic_axes={'image': {0: 'batch', 2: 'height', 3: 'width'}}, opset_version=17)
    torch.onnx.export(model, (torch.randn(2, 3, 64, 96),), path, input_names=['image'], **options)
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path)
    for shape in [(1, 3, 33, 33), (3, 3, 47, 100), (2, 3, 64, 64)]:
        image = torch.randn(shape)
        logits = torch.from_numpy(session.run(None, {'image': image.numpy()})[0])
        torch.testing.assert_close(logits, model(image).detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('name', ARCHITECTURES)
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_reparameterised_model_is_the_same(name, dtype, tolerance):
    model = released(name, dtype)
    fused = reparameterize_model(model)
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    for size in [(64, 64), (33, 47)]:
        image = torch.randn(2, 3, *size, dtype=dtype)
        for module, fused_module in zip(
                [model.conv_stem, *model.blocks, model.conv_head], [fused.conv_stem, *fused.blocks, fused.conv_head],
                strict=True):
            # each from the same input: random weights amplify the rounding of float32
            expected = module(image)
            assert (fused_module(image) - expected).abs().max() <= tolerance * expected.abs().max()
            image = expected


@pytest.mark.parametrize('spatial_expansion', ['nearest', 'deconv'])
def test_reparameterised_features_and_state_dict(spatial_expansion):
    create_model = functools.partial(timm.create_model, 'hbonet_025_8x_d8', spatial_expansion=spatial_expansion)
    image = torch.randn(2, 3, 65, 97)
    model = create_model(features_only=True)
    for _ in range(3):
        model(image)  # statistics other than 0 and 1
    fused = reparameterize_model(model.eval())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    for feature, expected in zip(fused(image), model(image), strict=True):
        torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    other = reparameterize_model(create_model(features_only=True), inplace=True).eval()
    other.load_state_dict(fused.state_dict())
    assert all(map(torch.equal, other(image), fused(image)))


def test_reparameterised_stage_in_parts():
    model = released('hbonet_050', torch.float64)
    fused = reparameterize_model(model)
    image = torch.randn(1, 3, 65, 64, dtype=torch.float64)
    torch.testing.assert_close(reparameterize_model(fused)(image), model(image))
    torch.testing.assert_close(torch.jit.script(fused)(image), model(image))
    for stage, fused_stage in zip(model.blocks[:6], fused.blocks[:6], strict=True):
        image = torch.randn(1, next(stage.parameters()).shape[0], 33, 32, dtype=torch.float64)
        torch.testing.assert_close(fused_stage[:2](image), stage[:2](image))
        for block, fused_block in zip(stage, fused_stage, strict=True):
            expected = block(image)
            torch.testing.assert_close(fused_block(image), expected)
            image = expected


@pytest.mark.parametrize('kwargs', [
    dict(width=0.77, divisor=1), dict(norm_layer='groupnorm1'), dict(norm_layer=BatchNormAct2d), dict(act_layer='')])
def test_reparameterised_odd_widths_and_other_layers(kwargs):
    model = timm.create_model('hbonet_100', **kwargs, dtype=torch.float64)
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    model(image).sum().backward()
    assert sum(isinstance(m, nn.ReLU6) for m in model.modules()) == (0 if 'act_layer' in kwargs else 35)
    assert not any(isinstance(m, nn.ReLU) for m in model.modules())
    model.eval()
    torch.testing.assert_close(reparameterize_model(model)(image), model(image))


def test_reparameterised_model_stays_frozen_and_can_be_cut():
    model = released('hbonet_010').requires_grad_(False)
    fused = reparameterize_model(model)
    assert not any(p.requires_grad for p in fused.parameters())
    del fused.blocks[2][0], model.blocks[2][0]
    features = torch.randn(1, 8, 16, 16)
    torch.testing.assert_close(fused.blocks[2](features), model.blocks[2](features))
    model.blocks[3][1] = nn.Identity()
    torch.testing.assert_close(reparameterize_model(model).blocks[3](features), model.blocks[3](features))


def test_blocks_leave_no_hook_on_their_input():
    features = torch.randn(1, 4, 16, 16, requires_grad=True) * 1
    timm.create_model('hbonet_010').blocks[2](features).sum().backward()
    assert not features._backward_hooks


@pytest.mark.parametrize('convert', [convert_sync_batchnorm, freeze_batch_norm_2d, lambda model: model])
def test_reparameterised_and_released_with_other_batch_norms(convert):
    expected = released('hbonet_010', torch.float64)
    model = convert(timm.create_model('hbonet_010', dtype=torch.float64)).eval()
    model.load_state_dict(release_state_dict('hbonet_010'))
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(reparameterize_model(model)(image), expected(image))


def test_deep_copy_and_pickle():
    model = released('hbonet_010')
    image = torch.randn(1, 3, 40, 40)
    assert torch.equal(copy.deepcopy(model)(image), model(image))
    assert isinstance(model, HBONet) and type(model).__module__ == 'timm_hbonet.hbonet'


@pytest.mark.parametrize('kwargs, message', [
    (dict(spatial_expansion='cubic'), "`spatial_expansion` must be 'nearest', 'bilinear' or 'deconv', got 'cubic'"),
    (dict(output_stride=8), '`output_stride` must be 16 or 32, got 8'),
    (dict(width=0), '`width` must be positive, got 0'),
    (dict(width=-1.), '`width` must be positive, got -1.0'),
    (dict(in_chans=0), '`in_chans` must be at least 1, got 0'),
    (dict(rates=(2, 2)), r'`rates` must be 5 numbers out of 2, 4 and 8, got \(2, 2\)'),
    (dict(rates=(2, 2, 3, 2, 2)), r'`rates` must be 5 numbers out of 2, 4 and 8, got \(2, 2, 3, 2, 2\)'),
    (dict(depths=(1,)), r'`depths` must be 9 numbers of at least 1, got \(1,\)'),
    (dict(depths=(0, 1, 3, 4, 4, 1, 1, 2, 1)), r'`depths` must be 9 numbers of at least 1'),
])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('hbonet_100', **kwargs)


@pytest.mark.parametrize('image, message', [
    (torch.zeros(3, 64, 64), 'expected 4D input'),
    (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), 'scalar type Byte|Input type .* should be the same'),
    (torch.zeros(1, 4, 64, 64), 'to have 3 channels, but got 4 channels'),
])
def test_bad_images(image, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        timm.create_model('hbonet_010')(image)


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_configuration_is_data(name):
    architecture = ARCHITECTURES[name]
    rates = {2: (2, 2, 2, 2, 2), 4: (4, 4, 4, 2, 2), 8: (8, 8, 4, 2, 2)}[architecture['spatial_rate']]
    model = HBONet(
        width=architecture['width_mult'], divisor=architecture['channel_divisor'], rates=rates, device='meta')
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in timm.create_model(name, device='meta').state_dict().items()}
