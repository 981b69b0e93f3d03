"""Spatial operators as exports record them.

A program of `torch.export` gets operators that XNNPACK has, the kernels of ExecuTorch and LiteRT on phones, so that the
network stays in one delegate there: a padded pool in place of one that rounds up, and sums in place of upsampling. ONNX
keeps its own. All of it is for sizes that are known: one that an export or a trace leaves open is no int.
"""
from ctypes import c_float
from typing import List

import torch
import torch.nn.functional as F

__all__ = ['add_expanded', 'expand', 'exports_program', 'is_known', 'pad_to_even']


def exports_program() -> bool:
    """Whether `torch.export` records this call, and not for ONNX. PyTorch before 2.7 does not tell."""
    is_exporting = getattr(torch.compiler, 'is_exporting', None)
    return is_exporting is not None and is_exporting() and not torch.onnx.is_in_onnx_export()


def is_known(*maps: torch.Tensor) -> bool:
    """Whether heights and widths are numbers."""
    return all(isinstance(size, int) for x in maps for size in x.shape[-2:])


def pad_to_even(x: torch.Tensor) -> torch.Tensor:
    """Repeat the last row and the last column where there is an odd number of them."""
    if not is_known(x):
        return F.pad(x, (0, 1, 0, 1), mode='replicate')  # pooling drops what is too much
    if x.shape[-2] % 2:
        x = torch.cat([x, x[:, :, -1:]], dim=2)
    if x.shape[-1] % 2:
        x = torch.cat([x, x[:, :, :, -1:]], dim=3)
    return x


def _crop(x: torch.Tensor, size: List[int]) -> torch.Tensor:
    # Core ML refuses a slice of all
    return x if x.shape[-2:] == size else x[:, :, :size[0], :size[1]]


def _is_scaled(x: torch.Tensor, size: List[int], scale: int) -> bool:
    # twice as large and cropped is nearest to any size, four or eight times as large is not
    return scale == 2 or tuple(size) == (x.shape[-2] * scale, x.shape[-1] * scale)


def _expand_width(x: torch.Tensor, out_width: int) -> torch.Tensor:
    """Expand the last dimension by nearest upsampling, to a width that is no whole multiple, by a product with 0 and 1.

    Runtimes differ in what is nearest there. Places are counted in float32, as PyTorch does for float32.
    """
    width = x.shape[-1]
    step = c_float(width / out_width).value
    places = [min(int(c_float(i * step).value), width - 1) for i in range(out_width)]
    weight = x.new_tensor([[float(i == place) for i in range(width)] for place in places])
    return F.linear(x.reshape(-1, width), weight).reshape(*x.shape[:-1], out_width)


def expand(x: torch.Tensor, size: List[int], scale: int) -> torch.Tensor:
    """Expand a feature map by nearest upsampling, by its factor, which runtimes take more readily than the size."""
    if not _is_scaled(x, size, scale):
        return F.interpolate(x, size=size)
    return _crop(F.interpolate(x, scale_factor=float(scale)), size)


def add_expanded(x: torch.Tensor, shortcut: torch.Tensor, scale: int) -> torch.Tensor:
    """Add a feature map, expanded by nearest upsampling, to one of `scale` times its size or less.

    Args:
        x: Feature map, [B, C, h, w].
        shortcut: Feature map, [B, C, H, W], of which h is H / scale and w is W / scale, rounded up.
        scale: Ratio of the sizes.

    Returns:
        Feature map, [B, C, H, W].
    """
    chs, h, w = x.shape[1:]
    size = shortcut.shape[-2:]
    if not _is_scaled(x, size, scale):
        return _expand_width(_expand_width(x, size[1]).mT, size[0]).mT + shortcut
    # Each pixel is added to the `scale` x `scale` ones that it is nearest to. Channels last, as XNNPACK stores maps,
    # all but the sum are views. Batch and height share a dimension: Core ML has five at most. No `F.pad`: to
    # quantizers of PT2E it is no operator that keeps its input's range, as XNNPACK and LiteRT want it.
    shortcut = pad_to_even(shortcut).permute(0, 2, 3, 1)
    y = shortcut.reshape(-1, scale, w, scale, chs) + x.permute(0, 2, 3, 1).reshape(-1, 1, w, 1, chs)
    return _crop(y.reshape(-1, h * scale, w * scale, chs).permute(0, 3, 1, 2), size)
