"""The graph for inference that `timm.utils.reparameterize_model` makes computes what the network computes."""
import copy
import pickle

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
    needs_onnx_exporter,
    needs_program_export,
)
from reference import ARCHITECTURES, release_state_dict
from timm.layers import (
    BatchNormAct2d,
    FrozenBatchNormAct2d,
    GroupNorm1,
    SqueezeExcite,
    StdConv2d,
    convert_sync_batchnorm,
)
from timm.utils import reparameterize_model
from timm.utils.model import freeze_batch_norm_2d
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import prune

from timm_hbonet.blocks import InvertedResidual
from timm_hbonet.inference import HarmoniousStages, InferenceStages

NORMS = (nn.modules.batchnorm._BatchNorm, FrozenBatchNormAct2d)


def has_norms(model):
    return any(isinstance(m, NORMS) for m in model.modules())


def check_graph(model, *sizes):
    """Re-parameterize a model, compare logits and intermediates, and return the result."""
    graph = reparameterize_model(model)
    assert isinstance(graph.blocks, InferenceStages) and not has_norms(graph) and has_norms(model)
    with torch.no_grad():
        for size in sizes:
            image = images(2, model.in_chans, *size)
            assert_equal(graph(image), model(image))
            taps = [m.forward_intermediates(image, intermediates_only=True) for m in (graph, model)]
            for tap, expected in zip(*taps, strict=True):
                assert_equal(tap, expected)
    return graph


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_architectures(name):
    graph = check_graph(create_network(name), (32, 64), (33, 47))
    # quantizers divide by the largest weight of an output channel
    convs = [m for m in graph.modules() if isinstance(m, nn.Conv2d)]
    assert all((m.weight.flatten(1).abs().amax(1) > 0).all() for m in convs)
    convs = [m for m in graph.blocks[4].blocks.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.in_channels % 8 == m.out_channels % 8 == 0 for m in convs)


@pytest.mark.parametrize('kwargs', [
    dict(spatial_expansion='deconv', rates=(8, 2, 4, 4, 2)),
    dict(width=0.31, divisor=3, depths=(2, 3, 1, 2, 3, 2, 2, 1, 2), rates=(2, 8, 4, 4, 2)),  # halves of other widths
    dict(output_stride=16, num_classes=0, in_chans=1, drop_path_rate=0.2, drop_rate=0.2),
    dict(norm_layer=BatchNormAct2d, act_layer='hard_sigmoid'),  # which is not 0 at 0, in padded channels
    dict(act_layer='prelu', bn_eps=0.1),
], ids=lambda kwargs: '-'.join(kwargs))
def test_configurations_and_sizes(kwargs):
    name = 'hbonet_100' if 'width' in kwargs else 'hbonet_010'
    check_graph(create_network(name, **kwargs), (2, 3), (64, 65), (65, 64))


@pytest.mark.parametrize('convert', [
    convert_sync_batchnorm, freeze_batch_norm_2d, nn.SyncBatchNorm.convert_sync_batchnorm])
def test_other_batch_norms(convert):
    # torch's conversion makes children that are not called of timm's activations, and before 2.2 leaves eval mode
    check_graph(convert(create_network()).eval(), (64, 64))


class Halved(BatchNormAct2d):
    def forward(self, x):
        return 0.5 * super().forward(x)


class Doubled(InvertedResidual):
    def forward(self, x):
        return 2 * super().forward(x)


def put_other_norms(blocks):
    for layer in (blocks[3][1].conv_dw, blocks[8][0].conv_pwl):
        layer.bn.__class__ = Halved
    blocks[3][2].conv_pwl.bn = GroupNorm1(blocks[3][2].conv_pwl.out_channels, dtype=torch.float64)
    chs = blocks[7][1].conv_pwl.out_channels
    blocks[7][1].conv_pwl.bn = BatchNormAct2d(chs, apply_act=False, track_running_stats=False, dtype=torch.float64)


def put_attention(block):
    attention = SqueezeExcite(block.conv_dw.out_channels, dtype=torch.float64)
    block.conv_dw = nn.Sequential(block.conv_dw, attention)


@pytest.mark.parametrize('edit, num_norms', [
    pytest.param(put_other_norms, 3, id='norms that cannot be folded'),
    pytest.param(lambda blocks: prune.random_unstructured(blocks[3][1].conv_pwl.conv, 'weight', 0.5), 1, id='pruned'),
    pytest.param(lambda blocks: blocks[3].__setitem__(1, nn.Identity()), 0, id='identity block'),
    pytest.param(lambda blocks: blocks.__setitem__(5, nn.Conv2d(20, 28, 1, dtype=torch.float64)), 0, id='other stage'),
    pytest.param(lambda blocks: blocks[3].__setitem__(1, nn.Sequential(blocks[3][1])), 0, id='wrapped block'),
    pytest.param(lambda blocks: put_attention(blocks[7][1]), 0, id='attention'),
    pytest.param(lambda blocks: put_attention(blocks[3][1]), 0, id='attention in a bottleneck'),
    pytest.param(lambda blocks: setattr(blocks[3][1], 'conv_dw_end', nn.Identity()), 0, id='identity layer'),
    pytest.param(lambda blocks: setattr(
        blocks[3][1].conv_pwl, 'conv', StdConv2d(24, 6, 1, bias=False, dtype=torch.float64)), 1, id='other conv'),
    pytest.param(lambda blocks: setattr(
        blocks[3][1].conv_pwl, 'conv', nn.Conv2d(24, 6, 1, groups=2, bias=False, dtype=torch.float64)), 0, id='groups'),
    pytest.param(lambda blocks: setattr(blocks[7][1], '__class__', Doubled), 0, id='subclass'),
    pytest.param(lambda blocks: blocks[8].__delitem__(0), 0, id='empty stage'),
])
@torch.no_grad()
def test_edited_networks(edit, num_norms):
    model, image = create_network(num_classes=0), images(2, 3, 64, 64)
    model.conv_head = nn.Identity()
    edit(model.blocks)
    estimate_statistics(model)
    graph = reparameterize_model(model)
    assert_equal(graph(image), model(image))
    assert sum(isinstance(m, NORMS) for m in graph.modules()) == num_norms  # all others are folded


def test_network_is_left_alone():
    model, image = create_network(spatial_expansion='deconv').requires_grad_(False), images(2, 3, 64, 64)
    expected, state = model(image), torch.get_rng_state()
    graph = reparameterize_model(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(p.requires_grad for p in graph.parameters()), 'frozen stays frozen'
    for m in (graph, model.blocks.fuse()):
        for p in m.parameters():
            p.zero_()
    assert torch.equal(model(image), expected)


def test_in_place_and_twice():
    model, image = create_network(), images(2, 3, 64, 64)
    expected = model(image)
    assert reparameterize_model(model, inplace=True) is model and not has_norms(model)
    assert_equal(model(image), expected)
    assert torch.equal(reparameterize_model(model)(image), model(image))


def test_gradients_of_images_are_the_networks():
    gradients, model = [], create_network(spatial_expansion='deconv')
    model.set_grad_checkpointing()
    for m in (model, reparameterize_model(model)):
        image = images(2, 3, 65, 64).requires_grad_()
        m(image).square().sum().backward()
        gradients.append(image.grad)
    assert_equal(gradients[1], gradients[0])


@pytest.mark.parametrize('feature_cls', ['list', 'hook', 'getter'])
def test_features(feature_cls):
    model = estimate_statistics(timm.create_model(
        'hbonet_025_8x_d8', features_only=True, feature_cls=feature_cls, dtype=torch.float64))
    graph, image = reparameterize_model(model), images(2, 3, 65, 64)
    assert not has_norms(graph)
    for feature, expected in zip(graph(image), model(image), strict=True):
        assert_equal(feature, expected)


@pytest.mark.parametrize('i', [0, 3])
def test_pruned(i):
    model, image = create_network(), images(2, 3, 64, 64)
    graph, expected = reparameterize_model(model), model.forward_intermediates(image, [i])[1][0]
    assert_equal(graph.forward_intermediates(image, [i], stop_early=True)[1][0], expected)
    graph.prune_intermediate_layers([i])
    model.prune_intermediate_layers([i])
    for m in (graph, reparameterize_model(model)):
        assert_equal(m(image), expected)


@pytest.mark.parametrize('memory_format', [torch.channels_last, torch.contiguous_format])
def test_intermediates_keep_the_memory_format(memory_format):
    model = create_network('hbonet_050').to(memory_format=memory_format)
    image = images(2, 3, 64, 64).to(memory_format=memory_format)
    for m in (model, reparameterize_model(model)):
        for tap in m.forward_intermediates(image, intermediates_only=True):
            assert tap.is_contiguous(memory_format=memory_format)


def test_state_dict_and_copies():
    graph, image = reparameterize_model(create_network()), images(2, 3, 64, 64)
    other = reparameterize_model(timm.create_model('hbonet_010', dtype=torch.float64).eval())
    other.load_state_dict(graph.state_dict())
    for m in (other, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        assert torch.equal(m(image), graph(image))
    with pytest.raises(RuntimeError):
        graph.load_state_dict(release_state_dict('hbonet_010'))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_device_and_dtype(dtype):
    model, image = create_network(dtype=dtype), images(2, 3, 64, 64, dtype=dtype)
    logits = reparameterize_model(model)(image)
    # over 40 layers, of 8 bits of precision in bfloat16
    assert logits.dtype == dtype and nn.functional.cosine_similarity(logits.float(), model(image).float()).min() > 0.9
    graph = reparameterize_model(model.to('meta'))
    assert {(p.device.type, p.dtype) for p in graph.parameters()} == {('meta', dtype)}


# three stages have all kinds of blocks, and a block that is handed a map in two parts


def create_stages(**kwargs):
    return create_network(depths=(1, 1, 2) + (1,) * 6, **kwargs).blocks[:3]


ALL_RATES = dict(rates=(8, 4, 2, 2, 2))
network_and_graph = pytest.mark.parametrize(
    'form', [lambda stages: stages, HarmoniousStages.fuse], ids=['network', 'graph'])


@network_and_graph
@pytest.mark.parametrize('kwargs', [dict(spatial_expansion='deconv'), ALL_RATES], ids=str)
def test_script_and_trace(form, kwargs):
    stages, x = create_stages(**kwargs), images(2, 4, 32, 48)
    module = form(stages)
    for program in (torch.jit.script(module), torch.fx.symbolic_trace(module), torch.jit.trace(module, (x,))):
        assert_equal(program(x), stages(x))
        assert_equal(program(images(1, 4, 33, 23)), stages(images(1, 4, 33, 23)))


def test_compiled_network_trains():
    stages, x, results = create_stages(**ALL_RATES).train(), images(2, 4, 32, 48), []
    for forward in (stages, torch.compile(stages, fullgraph=True, backend='aot_eager')):
        y = forward(x)
        results.append((y, *torch.autograd.grad(y.square().mean(), stages.parameters())))
    torch.testing.assert_close(*results)


def test_network_is_compiled_once_for_all_sizes():
    block, compiler = create_stages(**ALL_RATES)[2][0], CompileCounter()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=compiler)
    with torch.no_grad():
        for i in range(8):
            x = images(2, 4, 32 + 7 * i, 32 + 5 * i)
            assert_equal(compiled(x), block(x))
    assert compiler.frame_count <= 5  # of 8, as even and odd sizes are apart in PyTorch 2.1


@network_and_graph
@needs_onnx_exporter
def test_export_and_onnx_of_dynamic_batch_and_size(form, tmp_path):
    stages, path = create_stages(**ALL_RATES, dtype=torch.float32), str(tmp_path / 'model.onnx')
    dims = {i: torch.export.Dim(n, min=m) for i, n, m in ((0, 'batch', 1), (2, 'height', 17), (3, 'width', 17))}
    program = torch.export.export(form(stages), (images(2, 4, 32, 48, dtype=torch.float32),), dynamic_shapes=(dims,))
    torch.onnx.export(program, (), path, input_names=['x'], dynamo=True, verbose=False)
    onnx.checker.check_model(path, full_check=True)
    x = images(3, 4, 23, 51, dtype=torch.float32)
    found = torch.from_numpy(onnxruntime.InferenceSession(path).run(None, {'x': x.numpy()})[0])
    for y in (found, program.module()(x)):
        assert_equal(y, stages(x), 20 * 10 * torch.finfo(torch.float32).eps)  # rounding over 20 layers


@needs_program_export
@pytest.mark.parametrize('size', [(32, 48), (33, 23), (3, 50)], ids=str)
def test_graph_for_xnnpack(size):
    stages, x = create_stages(**ALL_RATES), images(2, 4, *size)
    assert_equal(torch.export.export(stages.fuse(), (x,)).module()(x), stages(x))
