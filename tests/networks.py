"""Networks whose outputs tell one image from another: at random weights in eval mode, logits are near 0 for all."""
import copy
import functools
from typing import Any

import pytest
import timm
import torch
from packaging.version import Version
from reference import release_state_dict
from timm.layers import BatchNormAct2d
from torch import nn


def needs_torch(version: str, feature: str) -> pytest.MarkDecorator:
    """Skips a test where PyTorch is older than the oldest that it was seen to pass with."""
    old = Version(torch.__version__) < Version(version)
    return pytest.mark.skipif(old, reason=f'{feature}: needs PyTorch {version}, found {torch.__version__}')


needs_program_export = needs_torch('2.7', 'torch.export that a model can tell from other calls')
needs_onnx_exporter = needs_torch('2.14', 'torch.onnx.export(dynamo=True)')


@functools.lru_cache(maxsize=None)
def _released(name: str, dtype: torch.dtype) -> nn.Module:
    model = timm.create_model(name, dtype=dtype).eval()
    model.load_state_dict(release_state_dict(name, dtype))
    return model


def released(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A network of the test's own with the recreated weights of the release, in eval mode."""
    return copy.deepcopy(_released(name, dtype))


def estimate_statistics(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw scales and shifts of all batch norms, estimate their statistics on random images, and set eval mode."""
    generator = torch.Generator().manual_seed(seed)
    conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    norms = [m for m in model.modules() if isinstance(m, BatchNormAct2d)]
    momentum = [m.momentum for m in norms]
    for m in norms:
        m.momentum = None  # statistics of the images alone
        with torch.no_grad():
            m.weight.uniform_(0.5, 1.5, generator=generator)
            m.bias.normal_(0., 0.1, generator=generator)
    with torch.no_grad():
        model.train()(images(4, conv.in_channels, 64, 64, dtype=conv.weight.dtype, seed=seed + 1))
    for m, value in zip(norms, momentum, strict=True):
        m.momentum = value
    return model.eval()


def create_network(name: str = 'hbonet_010', dtype: torch.dtype = torch.float64, **kwargs: Any) -> nn.Module:
    """A network in eval mode whose logits are of the order of 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name, **kwargs)
    return estimate_statistics(model.to(dtype))  # some of timm's activations have weights and take no dtype


def count_convs(graph: nn.Module) -> int:
    """Convolutions that a re-parameterized network calls. The others are for stages that are called by themselves."""
    names = [name for name, m in graph.named_modules() if isinstance(m, nn.Conv2d)]
    return len([name for name in names if 'select_parts' not in name and 'select_whole' not in name])


def images(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    """Random images of a shape, the same in every run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_equal(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-10) -> None:
    """Compare tensors relative to the range of the expected one, which must have one."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    span = expected.max() - expected.min()
    assert span > 0
    error = ((found - expected).abs().max() / span).item()
    assert error <= tolerance, f'differs by {error:.1e} of the range, at most {tolerance:.0e} is allowed'
