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
    needs_dynamic_export,
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

from timm_hbonet.blocks import InvertedResidual
from timm_hbonet.inference import InferenceStages, add_expanded

NORMS = (nn.modules.batchnorm._BatchNorm, FrozenBatchNormAct2d)
# one block a stage, which has all kinds of blocks
SHORT = dict(depths=(1,) * 9, num_classes=5)


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
    graph = check_graph(create_network(name), (64, 64), (97, 111))
    # quantizers divide by the largest weight of an output channel
    convs = [m for m in graph.modules() if isinstance(m, nn.Conv2d)]
    assert all((m.weight.flatten(1).abs().amax(1) > 0).all() for m in convs)
    convs = [m for m in graph.blocks[4].blocks.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.in_channels % 8 == m.out_channels % 8 == 0 for m in convs)


@pytest.mark.parametrize('kwargs', [
    dict(spatial_expansion='deconv'),
    dict(rates=(4, 8, 2, 4, 8)),
    dict(spatial_expansion='deconv', rates=(8, 2, 4, 4, 2)),
    dict(width=0.77, divisor=1),  # halves of different widths
    dict(width=0.31, divisor=3, depths=(2, 3, 1, 2, 3, 2, 2, 1, 2), rates=(2, 8, 4, 4, 2)),
    dict(**SHORT),
    dict(output_stride=16, num_classes=0, in_chans=1),
    dict(norm_layer=BatchNormAct2d, act_layer='hard_sigmoid'),  # which is not 0 at 0, in padded channels
    dict(act_layer='prelu', bn_eps=0.1),
    dict(act_layer=''),
    dict(drop_path_rate=0.2, drop_rate=0.2),
], ids=lambda kwargs: '-'.join(kwargs))
def test_configurations(kwargs):
    name = 'hbonet_100' if 'width' in kwargs else 'hbonet_010'
    check_graph(create_network(name, **kwargs), (64, 64), (97, 111))


@pytest.mark.parametrize('size', [(1, 1), (2, 3), (64, 65), (65, 64)])
def test_sizes(size):
    check_graph(create_network('hbonet_025_8x_d8', spatial_expansion='deconv'), size)


@pytest.mark.parametrize('convert', [
    convert_sync_batchnorm, freeze_batch_norm_2d, nn.SyncBatchNorm.convert_sync_batchnorm])
def test_other_batch_norms(convert):
    # of torch's conversion, timm's activations are children that are not called
    check_graph(convert(create_network()), (64, 64))


class Halved(BatchNormAct2d):
    def forward(self, x):
        return 0.5 * super().forward(x)


def test_norms_of_unknown_types_stay():
    model, image = create_network(), images(2, 3, 64, 64)
    for layer in (model.conv_stem, model.blocks[3][1].conv_dw, model.blocks[8][0].conv_pwl):
        layer.bn.__class__ = Halved
    graph = reparameterize_model(model)
    assert_equal(graph(image), model(image))
    assert [type(m) for m in graph.modules() if isinstance(m, NORMS)] == [Halved] * 3


def test_other_norms_stay():
    model = timm.create_model('hbonet_010', norm_layer='groupnorm1', dtype=torch.float64).eval()
    graph, image = reparameterize_model(model), images(2, 3, 64, 64)
    assert sum(isinstance(m, nn.GroupNorm) for m in graph.modules()) == 76
    assert torch.equal(graph(image), model(image))
    # what can be folded is, beside a norm that cannot
    model = create_network()
    model.blocks[3][1].conv_pwl.bn = GroupNorm1(model.blocks[3][1].conv_pwl.out_channels, dtype=torch.float64)
    graph = reparameterize_model(model)
    assert not has_norms(graph) and any(isinstance(m, nn.GroupNorm) for m in graph.modules())
    assert_equal(graph(image), model(image))


def test_model_and_random_state_are_left_alone():
    model, image = create_network(spatial_expansion='deconv'), images(2, 3, 64, 64)
    expected, tensors, state = model(image), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    reparameterize_model(model)
    assert torch.equal(torch.get_rng_state(), state)
    graph = model.blocks.fuse()
    assert torch.equal(model(image), expected)
    assert all(map(torch.equal, model.state_dict().values(), tensors.values()))
    with torch.no_grad():
        for p in graph.parameters():
            p.zero_()
    assert torch.equal(model(image), expected)


def test_in_place_and_twice():
    model, image = create_network(), images(2, 3, 64, 64)
    expected = model(image)
    assert reparameterize_model(model, inplace=True) is model and not has_norms(model)
    assert_equal(model(image), expected)
    again = reparameterize_model(model)
    assert isinstance(again.blocks, InferenceStages) and torch.equal(again(image), model(image))


@pytest.mark.parametrize('edit', [
    pytest.param(lambda blocks: blocks[3].__setitem__(1, nn.Identity()), id='identity block'),
    pytest.param(lambda blocks: blocks[3].__delitem__(1), id='deleted block'),
    pytest.param(lambda blocks: blocks.__setitem__(5, nn.Conv2d(20, 28, 1, dtype=torch.float64)), id='other stage'),
    pytest.param(lambda blocks: blocks[3].__setitem__(1, nn.Sequential(blocks[3][1])), id='wrapped block'),
    pytest.param(lambda blocks: blocks[7][1].__setattr__('conv_dw', nn.Sequential(
        blocks[7][1].conv_dw, SqueezeExcite(blocks[7][1].conv_dw.out_channels, dtype=torch.float64))), id='attention'),
    pytest.param(lambda blocks: blocks[3][1].__setattr__('conv_dw', nn.Sequential(
        blocks[3][1].conv_dw, SqueezeExcite(24, dtype=torch.float64))), id='attention in a bottleneck'),
    pytest.param(lambda blocks: blocks[3][1].__setattr__('conv_dw_end', nn.Identity()), id='identity layer'),
    pytest.param(lambda blocks: blocks[3][1].conv_pwl.__setattr__(
        'conv', StdConv2d(24, 6, 1, bias=False, dtype=torch.float64)), id='other convolution'),
    pytest.param(lambda blocks: blocks[7][1].__setattr__('__class__', Doubled), id='subclass'),
])
@torch.no_grad()
def test_edited_networks(edit):
    model, image = create_network(), images(2, 3, 64, 64)
    edit(model.blocks)
    estimate_statistics(model)
    assert_equal(reparameterize_model(model)(image), model(image))


class Doubled(InvertedResidual):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize('stage', [nn.Identity(), nn.Sequential()], ids=['identity', 'empty'])
def test_last_stage_taken_off(stage):
    model, image = create_network(num_classes=0), images(2, 3, 64, 64)
    model.blocks[8] = stage
    model.conv_head = nn.Identity()
    assert_equal(reparameterize_model(model)(image), model(image))


def test_frozen_stays_frozen():
    graph = reparameterize_model(create_network(spatial_expansion='deconv').requires_grad_(False))
    assert not any(p.requires_grad for p in graph.parameters())


def test_gradients_of_images_are_the_networks():
    model = create_network(spatial_expansion='deconv')
    gradients = []
    for m in (model, reparameterize_model(model)):
        image = images(2, 3, 65, 64).requires_grad_()
        m(image).square().sum().backward()
        gradients.append(image.grad)
    assert_equal(gradients[1], gradients[0])


def test_checkpointed_model():
    model, image = create_network(), images(2, 3, 64, 64)
    model.set_grad_checkpointing()
    graph = reparameterize_model(model)
    assert_equal(graph(image.requires_grad_()), model(image))
    assert_equal(graph.train()(image), model.eval()(image))


@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'hook', 'getter'])
def test_features(feature_cls):
    image = images(2, 3, 65, 64)
    model = estimate_statistics(timm.create_model(
        'hbonet_025_8x_d8', features_only=True, feature_cls=feature_cls, dtype=torch.float64))
    graph = reparameterize_model(model)
    assert not has_norms(graph)
    features = [list(m(image).values()) if feature_cls == 'dict' else m(image) for m in (graph, model)]
    for feature, expected in zip(*features, strict=True):
        assert_equal(feature, expected)


@pytest.mark.parametrize('prune_first', [True, False])
def test_pruned(prune_first):
    image = images(2, 3, 64, 64)
    for i in range(5):
        model, expected = create_network(), create_network().forward_intermediates(image, [i])[1][0]
        if prune_first:
            model.prune_intermediate_layers([i])
        graph = reparameterize_model(model)
        if not prune_first:
            graph.prune_intermediate_layers([i])
        assert_equal(graph(image), expected)


@pytest.mark.parametrize('memory_format', [torch.channels_last, torch.contiguous_format])
def test_intermediates_keep_the_memory_format(memory_format):
    graph = reparameterize_model(create_network('hbonet_050')).to(memory_format=memory_format)
    image = images(2, 3, 64, 64).to(memory_format=memory_format)
    for tap in graph.forward_intermediates(image, intermediates_only=True):
        assert tap.is_contiguous(memory_format=memory_format)


def test_slice_of_stages():
    model = create_network()
    graph, x = reparameterize_model(model), model.blocks[:2](model.conv_stem(images(2, 3, 64, 64)))
    assert_equal(graph.blocks[2:4](x), model.blocks[2:4](x))


def test_state_dict_and_copies():
    graph, image = reparameterize_model(create_network()), images(2, 3, 64, 64)
    other = reparameterize_model(timm.create_model('hbonet_010', dtype=torch.float64).eval())
    other.load_state_dict(graph.state_dict())
    for m in (other, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        assert torch.equal(m(image), graph(image))
    with pytest.raises(RuntimeError):
        graph.load_state_dict(release_state_dict('hbonet_010'))


@pytest.mark.parametrize('kwargs', [dict(spatial_expansion='deconv'), dict(rates=(8, 2, 4, 2, 2))], ids=str)
def test_script_and_trace(kwargs):
    model = create_network(**kwargs, **SHORT)
    graph, image = reparameterize_model(model), images(2, 3, 64, 96)
    for program in (torch.jit.script(graph), torch.fx.symbolic_trace(graph), torch.jit.trace(graph, (image,))):
        assert_equal(program(image), model(image))
        assert_equal(program(images(1, 3, 65, 47)), model(images(1, 3, 65, 47)))


@needs_dynamic_export
@pytest.mark.parametrize('kwargs', [dict(spatial_expansion='deconv'), dict(rates=(8, 2, 4, 2, 2))], ids=str)
def test_export_of_dynamic_size(kwargs):
    model = create_network(**kwargs, **SHORT)
    graph, image = reparameterize_model(model), images(2, 3, 64, 96)
    step = 32 if 'spatial_expansion' in kwargs else 1
    height, width = (step * torch.export.Dim(n, min=64 // step) for n in ('height', 'width'))
    dims = {0: torch.export.Dim('batch', min=1), 2: height, 3: width}
    program = torch.export.export(graph, (image,), dynamic_shapes=(dims,)).module()
    for shape in [(1, 3, 64, 128)] + [(3, 3, 65, 101)] * (step == 1):
        assert_equal(program(images(*shape)), model(images(*shape)))


@needs_program_export
@pytest.mark.parametrize('size', [(64, 96), (65, 47), (3, 50)], ids=str)
def test_exported_program_is_for_xnnpack(size):
    model, image = create_network(rates=(8, 4, 2, 2, 2), **SHORT), images(2, 3, *size)
    program = torch.export.export(reparameterize_model(model), (image,))
    assert_equal(program.module()(image), model(image))
    # XNNPACK has no upsampling and no pool that rounds up, PT2E's quantizers give no range to `pad`
    targets = [str(node.target) for node in program.graph.nodes]
    assert not [target for target in targets if any(name in target for name in ('.pad.', 'upsample', '.avg_pool2d'))]


class Expansion(nn.Module):
    def forward(self, x, shortcut, rate):
        return add_expanded(x, shortcut, rate)


@needs_program_export
@pytest.mark.parametrize(
    'size, rate', [((8, 6), 2), ((7, 5), 2), ((1, 9), 2), ((8, 12), 4), ((57, 50), 8), ((3, 2), 8)])
def test_expansion_in_a_program(size, rate):
    x, shortcut = images(2, 3, *(-(-s // rate) for s in size)), images(2, 3, *size)
    program = torch.export.export(Expansion(), (x, shortcut, rate))
    expected = x.repeat_interleave(rate, 2).repeat_interleave(rate, 3)[:, :, :size[0], :size[1]] + shortcut
    assert torch.equal(program.module()(x, shortcut, rate), expected)
    # Core ML has five dimensions at most
    assert max(node.meta['val'].ndim for node in program.graph.nodes if 'val' in node.meta
               and isinstance(node.meta['val'], torch.Tensor)) <= 5


def test_compile_has_no_graph_break():
    graph, image = reparameterize_model(create_network(**SHORT)), images(2, 3, 65, 64)
    with torch.no_grad():
        assert_equal(torch.compile(graph, fullgraph=True, backend='aot_eager')(image), graph(image))


@pytest.mark.parametrize('device, dtype', [('meta', torch.float32), ('cpu', torch.bfloat16)])
def test_device_and_dtype(device, dtype):
    model = create_network().to(dtype).to(device)
    graph = reparameterize_model(model)
    assert {(p.device.type, p.dtype) for p in graph.parameters()} == {(device, dtype)}
    image = images(2, 3, 64, 64, dtype=dtype).to(device)
    assert graph(image).shape == model(image).shape
    if device == 'cpu':
        # 8 bits of precision, over 40 layers
        assert nn.functional.cosine_similarity(graph(image).float(), model(image).float()).min() > 0.9


def export_onnx(graph, path, shape, **options):
    image = images(*shape, dtype=torch.float32)
    torch.onnx.export(graph, (image,), path, input_names=['image'], verbose=False, dynamo=True, **options)
    onnx.checker.check_model(path, full_check=True)
    return onnx.load(path).graph.node, onnxruntime.InferenceSession(path)


@needs_onnx_exporter
def test_static_onnx_has_no_shapes_and_slices(tmp_path):
    model, shape = create_network('hbonet_025_8x_d8', torch.float32), (1, 3, 64, 64)
    nodes, session = export_onnx(reparameterize_model(model), str(tmp_path / 'model.onnx'), shape)
    assert not {n.op_type for n in nodes} & {'Slice', 'Split', 'Shape', 'Gather', 'BatchNormalization'}
    image = images(*shape, dtype=torch.float32)
    logits = torch.from_numpy(session.run(None, {'image': image.numpy()})[0])
    # rounding of float32 over 60 layers
    assert_equal(logits, model(image).detach(), 60 * 10 * torch.finfo(torch.float32).eps)


@needs_onnx_exporter
def test_dynamic_onnx(tmp_path):
    model = create_network('hbonet_010', torch.float32, **SHORT)
    dims = {i: torch.export.Dim(n, min=m) for i, n, m in ((0, 'batch', 1), (2, 'height', 33), (3, 'width', 33))}
    _, session = export_onnx(
        reparameterize_model(model), str(tmp_path / 'model.onnx'), (2, 3, 64, 96), dynamic_shapes=(dims,))
    image = images(3, 3, 47, 101, dtype=torch.float32)
    logits = torch.from_numpy(session.run(None, {'image': image.numpy()})[0])
    # rounding of float32 over 40 layers
    assert_equal(logits, model(image).detach(), 40 * 10 * torch.finfo(torch.float32).eps)
