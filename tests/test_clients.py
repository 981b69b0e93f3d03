"""The code of docs/clients.md runs with the real libraries, and agrees with timm.

Weights are the stand-ins of the released ones, from the Hub and release on loopback.
"""
import functools

import numpy as np
import pages
import pytest
import reference
import timm
import torch
import torch.nn.functional as F
from pages import assert_equal_to
from PIL import Image
from sklearn.datasets import load_sample_images
from timm_scripts import save_digits
from torchvision.transforms.v2.functional import resize

run_page = functools.partial(pages.run_page, 'clients.md')
NAME = 'hbonet_100'


@pytest.fixture(autouse=True)
def folder(server, tmp_path, monkeypatch):
    """Working directory of the code, where the published weights can be had."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope='module')
def photos() -> torch.Tensor:
    return pages.load_photos()


@pytest.fixture
def model(folder):
    return timm.create_model(NAME, pretrained=True).eval()


@pytest.fixture
def feature_maps(folder):
    """Function that returns timm's five feature maps."""
    return timm.create_model(NAME, pretrained=True, features_only=True).eval()


def assert_equal_maps(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert_equal_to(a, b)


def test_segmentation_models(photos, feature_maps):
    images = resize(photos, [97, 131])
    page = run_page('segmentation_models_pytorch', images=images)
    assert page['masks'].shape == (2, 21, 97, 131)
    assert page['unet'](images).shape == (2, 21, 97, 131)
    assert_equal_maps(page['unet'].encoder(images)[1:], feature_maps(images))
    with pytest.raises(RuntimeError, match=r'shape \(128, 160\)'):
        page['fpn'](images)

    images = resize(photos, [96, 128])
    assert page['deeplab'](images).shape == (2, 21, 96, 128)
    dilated = timm.create_model(NAME, pretrained=True, features_only=True, output_stride=16).eval()(images)
    assert dilated[-1].shape[-2:] == (6, 8)
    assert_equal_maps(page['deeplab'].encoder(images)[1:], dilated)
    with pytest.raises(ValueError, match='must be 16 or 32, got 8'):
        page['smp'].DeepLabV3Plus(f'tu-{NAME}', encoder_weights=None, encoder_output_stride=8)


def test_transformers(photos, model, feature_maps):
    images = resize(photos, [97, 131])
    photo = Image.fromarray(load_sample_images().images[0])
    page = run_page('transformers', images=images, photo=photo)

    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    assert_equal_to(page['logits'], model(transform(photo)[None]))
    assert page['backbone'].channels == [72, 96, 144, 400]
    assert_equal_maps(page['feature_maps'], feature_maps(images)[1:])
    assert_equal_maps(page['detr'].model.backbone.model(images), feature_maps(images)[2:])


def test_fastai(tmp_path):
    save_digits(tmp_path / 'digits', classes=2, train=160, validation=40)
    timm.utils.random_seed(0)
    learner = run_page('fastai', folder=tmp_path / 'digits')['learner']
    assert isinstance(learner.model[0].model, timm.model_entrypoint(NAME).__globals__['HBONet'])
    assert np.mean(learner.recorder.losses[-5:]) < 0.5  # 0.69 is chance
    predictions, labels = learner.get_preds()
    assert learner.recorder.values[-1][-1] == (predictions.argmax(1) == labels).float().mean().item()


def test_timmx_and_onnx_runtime(photos, model):
    pytest.importorskip('timmx', reason='timmx needs Python 3.11')
    images = resize(torch.cat([photos, photos.flip(-1)]), [64, 64])
    assert_equal_to(run_page('timmx and ONNX Runtime', images=images)['logits'], model(images))


def test_openvino(photos, model):
    images = resize(photos, [64, 96])
    page = run_page('OpenVINO', images=images)
    assert_equal_to(page['logits'], model(images))
    odd = resize(photos, [97, 65])[:1]
    assert_equal_to(page['compiled'](odd.numpy())[0], model(odd))


def test_torchvision(photos, model, feature_maps):
    images = resize(photos, [97, 131])
    page = run_page('torchvision', images=images)
    maps = feature_maps(images)
    assert_equal_to(page['features']['stride_16'], maps[3])
    assert_equal_to(page['features']['embedding'], model.forward_head(model.forward_features(images), pre_logits=True))
    assert {k: list(v.shape) for k, v in page['maps'].items()} == {
        'p3': [2, 64, 13, 17], 'p4': [2, 64, 7, 9], 'p5': [2, 64, 4, 5]}
    # the deepest map of the pyramid is two convolutions of timm's
    inner, layer = page['pyramid'].inner_blocks[-1], page['pyramid'].layer_blocks[-1]
    assert_equal_to(page['maps']['p5'], layer(inner(maps[4])))


def test_grad_cam(photos, model):
    images = resize(photos, [224, 224])
    heatmaps = run_page('pytorch-grad-cam', images=images)['heatmaps']
    # between the last feature map and the class there is only a mean and a weighted sum, so that this is the formula
    activation = model.forward_features(images)
    expected = torch.einsum('c,bchw->bhw', model.classifier.weight[283], activation).relu()
    expected = F.interpolate(expected[:, None], size=(224, 224), mode='bilinear')[:, 0]
    low, high = expected.amin((1, 2), keepdim=True), expected.amax((1, 2), keepdim=True)
    assert_equal_to(heatmaps, (expected - low) / (high - low), 1e-3)


def test_torch_pruning(photos, model):
    images = resize(photos, [96, 96])
    page = run_page('Torch-Pruning', images=images)
    pruned, tp = page['model'], page['tp']
    macs = [tp.utils.count_ops_and_params(m, images[:1])[0] for m in (model, pruned)]
    assert macs == [pytest.approx(58.0e6, abs=1e5), pytest.approx(42.5e6, abs=1e5)]

    assert_equal_to(timm.utils.reparameterize_model(pruned)(images), pruned(images))


def test_optimum_quanto(photos, model):
    images = resize(photos, [64, 64])
    logits, expected = run_page('optimum-quanto', images=images)['logits'], model(images)
    # rows of zeros, which have no scale, make NaN
    assert (logits - expected).norm() < 0.5 * expected.norm()


def test_torchmetrics(photos, model):
    images = torch.cat([resize(photos, [64, 64]), resize(photos.flip(-1), [64, 64])])
    # the label is among the five best for three of the four images
    ranks = model(images).argsort(descending=True)
    labels = ranks[range(4), [0, 4, 3, 5]]
    assert run_page('torchmetrics', images=images, labels=labels)['score'].item() == 0.75


def test_macs_of_fvcore_and_ptflops():
    page = run_page('fvcore and ptflops')
    expected = reference.ARCHITECTURES[NAME]
    assert page['macs'] == page['ptflops_macs'] == expected['macs']['224x224']
    assert page['parameters'] == expected['params']
