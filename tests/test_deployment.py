"""The code of docs/deployment.md runs, and computes what the model does."""
import functools

import numpy as np
import onnx
import onnxruntime
import openvino
import pages
import pytest
import torch
import torch.nn.functional as F
from networks import create_network, released
from pages import assert_equal_to
from timm.utils import reparameterize_model
from torch._dynamo.testing import CompileCounterWithBackend

run_page = functools.partial(pages.run_page, 'deployment.md')


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope='module')
def model():
    return create_network('hbonet_010', torch.float32).requires_grad_(False)


@pytest.fixture(scope='module')
def fused(model):
    return reparameterize_model(model)


@pytest.fixture(scope='module')
def photos():
    return pages.load_photos()


@pytest.fixture(scope='module')
def crops(photos):
    """Parts of the photographs, [32, 3, 64, 64]."""
    return torch.cat([photos[..., i:i + 64, j:j + 64] for i in (0, 90, 180, 270) for j in (0, 160, 320, 480)])


def test_reparameterization(server, folder, crops):
    page = run_page('Re-parameterization', images=crops[:2])
    assert page['logits'].shape == (2, 1000)
    assert_equal_to(page['logits'], page['model'](crops[:2]))
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in page['fused'].modules())


def test_compile_once_for_batch_sizes_2_to_15(model, fused, crops, monkeypatch):
    # what inductor makes of the graph is PyTorch's business, and takes a minute
    backend = CompileCounterWithBackend('aot_eager')
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend=backend, fullgraph=True))
    page = run_page('torch.compile', torch=torch, fused=fused, images=crops[:4].clone())
    assert_equal_to(page['logits'], model(crops[:4]))
    with torch.no_grad():
        for batch_size in (2, 3, 15):  # from 16 on, PyTorch convolves in another way, and compiles for it
            assert_equal_to(page['compiled'](crops[:batch_size].clone()), model(crops[:batch_size]))
    assert backend.frame_count == 1


def test_export(folder, model, fused, crops):
    page = run_page('torch.export', torch=torch, fused=fused, images=crops[:2])
    assert_equal_to(page['logits'], model(crops[:2]))
    assert_equal_to(page['reloaded'](crops[:5]), model(crops[:5]))


def test_onnx_and_int8(folder, model, fused, crops):
    page = run_page('ONNX', torch=torch, fused=fused, images=crops[:2])
    onnx.checker.check_model('hbonet_100.onnx', full_check=True)
    operators = {node.op_type for node in onnx.load('hbonet_100.onnx').graph.node}
    assert not operators & {'Slice', 'Split', 'Shape', 'Gather', 'BatchNormalization'}
    assert_equal_to(page['logits'], model(crops[:2]))
    compiled = openvino.compile_model('hbonet_100.onnx', 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    assert_equal_to(compiled(crops[:3].numpy())[0], model(crops[:3]))

    page = run_page('int8', onnxruntime=onnxruntime, images=crops[:8], calibration_images=crops)
    weights = [
        onnx.numpy_helper.to_array(i) for i in onnx.load('hbonet_100_int8.onnx').graph.initializer if len(i.dims) == 4]
    # seven bits, so that two products with activations of up to 255 are below 2 ** 15 on each processor
    assert all(array.dtype == np.int8 and abs(array.astype(int)).max() <= 64 for array in weights)
    # untrained networks amplify errors: 0.88 was seen, and logits that have nothing to do with these are near 0
    assert F.cosine_similarity(torch.from_numpy(page['logits']), model(crops[:8])).min() > 0.5


@pytest.mark.parametrize('is_fused, dynamo', [(False, False), (True, True)])
def test_onnx_of_odd_size(folder, photos, is_fused, dynamo):
    # the architecture that contracts feature maps most: 57 x 49, 29 x 25, 15 x 13 are pooled, and grown back to
    model, image = released('hbonet_025_8x_d8', torch.float32), photos[:, :, :113, :97]
    network = reparameterize_model(model) if is_fused else model
    torch.onnx.export(network, (image,), 'model.onnx', dynamo=dynamo, opset_version=18, verbose=False)
    onnx.checker.check_model('model.onnx', full_check=True)
    session = onnxruntime.InferenceSession('model.onnx')
    logits = session.run(None, {session.get_inputs()[0].name: image.numpy()})[0]
    assert_equal_to(logits, model(image))
