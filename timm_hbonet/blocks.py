"""Layers and blocks of HBONet."""
import copy
import math
from functools import partial
from typing import Any, Dict, List, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, ConvNormAct, DropPath, FrozenBatchNormAct2d, LayerType, SyncBatchNormAct
from torch.jit import Final
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.types import Device


def is_open(x: torch.Tensor) -> bool:
    """Whether `torch.export` or `torch.compile` leaves the height or width of a feature map open."""
    return isinstance(x.shape[-2], torch.SymInt) or isinstance(x.shape[-1], torch.SymInt)


def avg_pool2d(x: torch.Tensor) -> torch.Tensor:
    """2x2 average pooling that rounds sizes up, as the strided convolutions do, of the pixels that there are."""
    if not torch.jit.is_scripting():
        if is_open(x):
            # ceil_mode would have an export prove that 2 * ((h - 1) // 2) < h. The pool drops what is too much.
            return F.avg_pool2d(F.pad(x, (0, 1, 0, 1), mode='replicate'), 2)
    return F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)


class RepConvNormAct(ConvNormAct):
    """Convolution, norm and activation, of which `timm.utils.reparameterize_model` folds the norm."""

    def fuse(self) -> nn.Module:
        """Returns the convolution with the norm folded in, and the activation, or this if either is of another type."""
        norm = self.bn
        # a subclass may compute anything, and torch's norms in place of timm's keep an activation that is not called
        has_act = type(norm) in (BatchNormAct2d, SyncBatchNormAct, FrozenBatchNormAct2d)
        is_norm = has_act or type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm)
        # pruning and weight normalization set the weight anew in each forward
        is_conv = type(self.conv) in (nn.Conv2d, nn.ConvTranspose2d) and 'weight' in self.conv._parameters
        if not is_conv or not is_norm or norm.running_mean is None:
            return self
        conv = copy.deepcopy(self.conv)
        # a depthwise transposed convolution has its output channels first too
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        return nn.Sequential(conv, copy.deepcopy(norm.act) if has_act else nn.Identity())


class InvertedResidual(nn.Module):
    """Inverted residual block of MobileNet-V2, https://arxiv.org/abs/1801.04381

    Not timm's, which rounds the hidden width to a multiple of 8: `hbonet_025` has 300 hidden channels, not 304.
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            stride: int = 1,
            exp_ratio: int = 1,
            drop_path: float = 0.,
            dilation: int = 1,
            act_layer: LayerType = nn.ReLU6,
            norm_layer: LayerType = nn.BatchNorm2d,
            device: Device = None,
            dtype: Optional[torch.dtype] = None,
    ):
        super().__init__()
        conv = partial(RepConvNormAct, act_layer=act_layer, norm_layer=norm_layer, device=device, dtype=dtype)
        mid_chs = in_chs * exp_ratio
        self.has_skip = stride == 1 and in_chs == out_chs

        self.conv_pw = conv(in_chs, mid_chs, 1) if exp_ratio != 1 else nn.Identity()
        self.conv_dw = conv(mid_chs, mid_chs, 3, stride, dilation=dilation, groups=mid_chs)
        self.conv_pwl = conv(mid_chs, out_chs, 1, apply_act=False)
        self.drop_path = DropPath(drop_path) if drop_path > 0. and self.has_skip else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x
        x = self.conv_pwl(self.conv_dw(self.conv_pw(x)))
        if self.has_skip:
            x = self.drop_path(x) + shortcut
        return x


class SpatialExpansion(nn.Module):
    """Expansion of a feature map by its rate, cropped to the size of the map that it is added to."""

    def __init__(self, rate: int, conv: Optional[nn.Module]):
        super().__init__()
        self.rate = rate
        self.conv = conv

    def forward(self, x: torch.Tensor, size: List[int]) -> torch.Tensor:
        if self.conv is not None:
            x = self.conv(x)
        else:
            if not torch.jit.is_scripting():
                if is_open(x):
                    # a crop would have an export prove that it is one. Nearest to the size is the same in steps of 2.
                    for i in range(int(math.log2(self.rate)) - 1, -1, -1):
                        x = F.interpolate(x, size=[(s + 2 ** i - 1) // 2 ** i for s in size])
                    return x
            x = F.interpolate(x, scale_factor=float(self.rate))
        return x[:, :, :size[0], :size[1]]


class HarmoniousBottleneck(nn.Module):
    """Harmonious bottleneck (HBO) block, figure 2 of the paper.

    Strided depthwise and pointwise convolutions contract the feature map by `rate` and expand its channels, then the
    channels are contracted to half of the output and the feature map is expanded back, to half the input's size in a
    block of stride 2. The other half of the output are the last channels of the input.
    """
    has_skip: Final[bool]

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            stride: int = 1,
            exp_ratio: int = 2,
            drop_path: float = 0.,
            rate: int = 2,
            spatial_expansion: str = 'nearest',
            act_layer: LayerType = nn.ReLU6,
            norm_layer: LayerType = nn.BatchNorm2d,
            device: Device = None,
            dtype: Optional[torch.dtype] = None,
    ):
        super().__init__()
        dd: Dict[str, Any] = {'device': device, 'dtype': dtype}
        conv = partial(RepConvNormAct, act_layer=act_layer, norm_layer=norm_layer, device=device, dtype=dtype)
        mid_chs = in_chs * exp_ratio
        self.stride = stride
        self.half_chs = half_chs = out_chs // 2
        self.pass_chs = out_chs - half_chs
        self.same_chs = in_chs == out_chs
        self.has_skip = rate > stride
        if self.pass_chs > in_chs or out_chs < 2:
            raise ValueError(
                f'A harmonious bottleneck of {out_chs} channels passes {self.pass_chs} channels of its input through, '
                f'but that has {in_chs}. Use another `width` or `divisor`, such as 2.')

        # Spatial contraction, with channel expansion
        self.contract = nn.Sequential()
        chs = in_chs
        for i in range(1, int(math.log2(rate)) + 1):
            self.contract.add_module(f'conv_dw{i}', conv(chs, chs, 5, 2, groups=chs, apply_act=False))
            self.contract.add_module(f'conv_pw{i}', conv(chs, mid_chs, 1))
            chs = mid_chs

        # Channel contraction, the release activates before it at rate 2 only
        self.conv_dw = conv(mid_chs, mid_chs, 3, groups=mid_chs, apply_act=rate == 2)
        self.conv_pwl = conv(mid_chs, half_chs, 1, apply_act=False)

        # Spatial expansion
        self.drop_path = DropPath(drop_path) if drop_path > 0. and self.has_skip else nn.Identity()
        if self.has_skip:
            scale, deconv = rate // stride, None
            if spatial_expansion == 'deconv':
                deconv = conv(half_chs, half_chs, apply_act=False)
                deconv.conv = nn.ConvTranspose2d(
                    half_chs, half_chs, 2 * scale, scale, scale // 2, groups=half_chs, bias=False, **dd)
            self.expand = SpatialExpansion(scale, deconv)
            self.conv_dw_end = conv(half_chs, half_chs, 5, groups=half_chs, apply_act=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = avg_pool2d(x) if self.stride == 2 else x
        if self.same_chs:
            # one concatenation in the gradient, no sum: channels_last trains 1.05 (AVX2), 1.14 (AVX-512) times as fast
            added, passed = shortcut.split([self.half_chs, self.pass_chs], dim=1)
        else:
            added, passed = shortcut[:, :self.half_chs], shortcut[:, -self.pass_chs:]
        x = self.conv_pwl(self.conv_dw(self.contract(x)))
        if self.has_skip:
            x = self.conv_dw_end(self.expand(self.drop_path(x), added.shape[-2:]) + added)
        return torch.cat([passed, x], dim=1)
