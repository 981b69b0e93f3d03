"""The stages of HBONet, and the graph for inference that `timm.utils.reparameterize_model` makes of them.

The graph computes what the stages compute in eval mode, with norms folded. The halves of a feature map, channels passed
through and channels computed, are two tensors from the first harmonious bottleneck to the last: no slices, and
concatenations only where it is contracted. Channels are padded to a multiple that blocked kernels like: a tensor's
layout, fixed when the graph is made, tells which channel is in each place. At its ends, they are in the network's own
order and number.
"""
from itertools import cycle, islice
from typing import List, Optional, Sequence

import torch
import torch.nn as nn
from timm.layers import DropPath
from torch.jit import Final

from .blocks import AvgPool2dCeil, HarmoniousBottleneck, InvertedResidual, RepConvNormAct, SpatialExpansion, is_open

__all__ = ['HarmoniousStages', 'InferenceStages']

# The channel in each place of a tensor. Of several places of a channel, which make up the multiple, the first is read.
# A place with a number that is none of a channel is not read.
Layout = List[int]

# Faster than 1, 4 and 16 with AVX2. With AVX-512, ONNX Runtime's blocks have 16, and 8 is as fast.
CHANNEL_MULTIPLE = 8


def exports_program(x: torch.Tensor) -> bool:
    """Whether `torch.export` records this call, not for ONNX, with known sizes. PyTorch before 2.7 does not tell.

    Then operators are taken that XNNPACK has, the kernels of ExecuTorch and LiteRT on phones, so that the network stays
    in one delegate there. No `F.pad`: to quantizers of PT2E it is no operator that keeps its input's range.
    """
    is_exporting = getattr(torch.compiler, 'is_exporting', lambda: False)
    return is_exporting() and not torch.onnx.is_in_onnx_export() and not is_open(x)


def pad_to_multiple(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """Repeat the last rows and columns until height and width are multiples of a number."""
    for dim in (2, 3):
        while x.shape[dim] % multiple:
            num_added = min(-x.shape[dim] % multiple, x.shape[dim])
            x = torch.cat([x, x.narrow(dim, x.shape[dim] - num_added, num_added)], dim=dim)
    return x


def _pad(channels: Sequence[int], multiple: int = CHANNEL_MULTIPLE) -> Layout:
    return [*channels, *islice(cycle(channels), -len(channels) % multiple)]


def _join(parts: List[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _lay_out(layers: Sequence[RepConvNormAct], in_layout: Layout, out_layout: Optional[Layout] = None) -> nn.Sequential:
    """Fold norms of layers in sequence and lay out their weights. The last is pointwise if there is an `out_layout`."""
    modules = []
    for layer in layers:
        conv, act = layer.fuse()
        is_pointwise = conv.kernel_size == (1, 1)
        layout = in_layout
        if is_pointwise:
            layout = out_layout if layer is layers[-1] else _pad(range(conv.out_channels))
        # what nobody reads has weights of a channel too: to quantizers, weights that are all 0 have no scale
        rows = [c % conv.out_channels for c in layout]
        weight = conv.weight.detach()[rows]
        if is_pointwise:
            is_read = [c in range(conv.in_channels) and c not in in_layout[:i] for i, c in enumerate(in_layout)]
            weight = weight[:, [c % conv.in_channels for c in in_layout]] * weight.new_tensor(is_read)[:, None, None]
        conv.weight = nn.Parameter(weight, conv.weight.requires_grad)
        conv.bias = nn.Parameter(conv.bias.detach()[rows], conv.bias.requires_grad)
        conv.in_channels, conv.out_channels, conv.groups = len(in_layout), len(rows), 1 if is_pointwise else len(rows)
        modules += [conv] if isinstance(act, nn.Identity) else [conv, act]
        in_layout = layout
    return nn.Sequential(*modules)


def _create_conv(weight: torch.Tensor, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(weight.shape[1] * groups, weight.shape[0], weight.shape[2:], stride, groups=groups, bias=False,
                     device='meta')
    conv.weight = nn.Parameter(weight, requires_grad=False)
    return conv


def _select(in_layout: Layout, out_layout: Layout, like: torch.Tensor) -> nn.Conv2d:
    """Selection of channels as a pointwise convolution, which blocked kernels are better at than at slices."""
    weight = like.new_zeros(len(out_layout), len(in_layout), 1, 1)
    weight[range(len(out_layout)), [in_layout.index(c) for c in out_layout]] = 1
    return _create_conv(weight)


class InferenceConvs(nn.Module):
    """Inverted residual block or single layer, from a feature map in parts to one in one part."""

    def __init__(self, block: nn.Module, in_layouts: List[Layout], out_multiple: int):
        super().__init__()
        in_layout = sum(in_layouts, [])
        layers = [m for m in block.modules() if isinstance(m, RepConvNormAct)]
        self.has_skip = isinstance(block, InvertedResidual) and block.has_skip
        self.out_chs = layers[-1].out_channels
        self.layouts = [in_layout if self.has_skip else _pad(range(self.out_chs), out_multiple)]
        self.convs = _lay_out(layers, in_layout, self.layouts[0])

    def run(self, parts: List[torch.Tensor]) -> List[torch.Tensor]:
        shortcut = _join(parts)
        x = self.convs(shortcut)
        return [x + shortcut if self.has_skip else x]


class InferencePool(nn.Module):
    """2x2 average pooling. As a depthwise convolution where no size is odd, which runtimes take with any channels."""

    def __init__(self, chs: int, like: torch.Tensor):
        super().__init__()
        self.pool = AvgPool2dCeil()
        self.conv = _create_conv(like.new_full((chs, 1, 2, 2), 0.25), stride=2, groups=chs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, w = x.shape[-2], x.shape[-1]
        # sizes that a trace or an export leaves open are no int, and must not decide what is recorded
        if isinstance(h, int) and isinstance(w, int) and h % 2 == 0 and w % 2 == 0:
            return self.conv(x)
        if not torch.jit.is_scripting():
            if exports_program(x):
                return self.conv(pad_to_multiple(x, 2))
        return self.pool(x)


class InferenceExpansion(nn.Module):
    """Spatial expansion of a feature map that is added to another, of up to `rate` times its size."""

    def __init__(self, expand: SpatialExpansion, layout: Layout):
        super().__init__()
        self.expand = SpatialExpansion(len(layout), expand.rate, 'nearest', nn.Identity)
        if expand.conv is not None:
            self.expand.conv = _lay_out([expand.conv], layout)

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if exports_program(x) and self.expand.conv is None:
                # Each pixel is added to the `rate` x `rate` ones that it is nearest to. Channels last, as XNNPACK
                # stores maps, all but the sum are views. Batch and height share a dimension: Core ML has five at most.
                rate, (height, width), (chs, h, w) = self.expand.rate, shortcut.shape[-2:], x.shape[1:]
                shortcut = pad_to_multiple(shortcut, rate).permute(0, 2, 3, 1).reshape(-1, rate, w, rate, chs)
                x = shortcut + x.permute(0, 2, 3, 1).reshape(-1, 1, w, 1, chs)
                x = x.reshape(-1, h * rate, w * rate, chs).permute(0, 3, 1, 2)
                return x if (h * rate, w * rate) == (height, width) else x[:, :, :height, :width]
        return self.expand(x, shortcut.shape[-2:]) + shortcut


class InferenceBottleneck(nn.Module):
    """Harmonious bottleneck, from a feature map in parts to one in two parts, channels passed and channels computed."""
    has_skip: Final[bool]
    keeps_parts: Final[bool]

    def __init__(self, block: HarmoniousBottleneck, in_layouts: List[Layout], selects: bool):
        super().__init__()
        conv_dw1, *layers = [*block.contract, block.conv_dw, block.conv_pwl]
        in_chs, half_chs, pass_chs = conv_dw1.in_channels, block.half_chs, block.pass_chs
        self.out_chs = half_chs + pass_chs
        like = conv_dw1.conv.weight
        # two half maps that overlap are the whole map twice, with places that are not read
        whole = added_layout = passed_layout = sum(in_layouts, [])
        self.has_skip = block.has_skip
        self.keeps_parts = len(in_layouts) == 2 and half_chs == pass_chs == in_chs - half_chs
        self.select_added = self.select_passed = nn.Identity()
        if self.keeps_parts:
            added_layout, passed_layout = in_layouts
        elif selects and pass_chs < in_chs:
            added_layout, passed_layout = _pad(range(half_chs)), _pad(range(in_chs - pass_chs, in_chs))
            self.select_passed = _select(whole, passed_layout, like)
            if self.has_skip:
                self.select_added = _select(whole, added_layout, like)

        self.conv_dws = nn.ModuleList([_lay_out([conv_dw1], layout) for layout in in_layouts])
        computed_layout = added_layout if self.has_skip else _pad(range(half_chs))
        self.convs = _lay_out(layers, whole, computed_layout)
        self.pools = nn.ModuleList([
            InferencePool(len(layout), like) if isinstance(block.pool, AvgPool2dCeil) else nn.Identity()
            for layout in in_layouts])
        if self.has_skip:
            self.expand = InferenceExpansion(block.expand, computed_layout)
            self.conv_dw_end = _lay_out([block.conv_dw_end], computed_layout)
        self.layouts = [[c - in_chs + pass_chs for c in passed_layout], [c + pass_chs for c in computed_layout]]

    def run(self, parts: List[torch.Tensor]) -> List[torch.Tensor]:
        contracted: List[torch.Tensor] = []
        for i, conv_dw in enumerate(self.conv_dws):
            contracted.append(conv_dw(parts[i]))
        pooled: List[torch.Tensor] = []
        for i, pool in enumerate(self.pools):
            pooled.append(pool(parts[i]))
        x = self.convs(_join(contracted))
        if self.keeps_parts:
            added, passed = pooled[0], pooled[1]
        else:
            whole = _join(pooled)
            added, passed = self.select_added(whole), self.select_passed(whole)
        if self.has_skip:
            x = self.conv_dw_end(self.expand(x, added))
        return [passed, x]


class TakeChannels(nn.Module):
    """Channels at places of a feature map, in its memory format."""

    def __init__(self, places: List[int]):
        super().__init__()
        starts = [i for i in range(len(places)) if i == 0 or places[i] != places[i - 1] + 1]
        self.slices = [(places[i], places[j - 1] + 1) for i, j in zip(starts, [*starts[1:], len(places)], strict=True)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts: List[torch.Tensor] = []
        for start, end in self.slices:
            parts.append(x[:, start:end])
        return torch.cat(parts, dim=1)


class InferenceStage(nn.Module):
    """Stage of which blocks hand feature maps on in parts. Called by itself, it takes and returns whole ones."""

    def __init__(self, blocks: List[nn.Module], in_layouts: List[Layout], in_chs: int):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.take_parts = nn.ModuleList([
            nn.Identity() if layout == list(range(in_chs)) else TakeChannels([c % in_chs for c in layout])
            for layout in in_layouts])
        out_layout, out_chs = sum(blocks[-1].layouts, []), blocks[-1].out_chs
        self.take_whole = nn.Identity() if out_layout == list(range(out_chs)) else TakeChannels(
            [out_layout.index(c) for c in range(out_chs)])

    def split(self, x: torch.Tensor) -> List[torch.Tensor]:
        parts: List[torch.Tensor] = []
        for take in self.take_parts:
            parts.append(take(x))
        return parts

    def run(self, parts: List[torch.Tensor]) -> List[torch.Tensor]:
        for block in self.blocks:
            parts = block.run(parts)
        return parts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.take_whole(_join(self.run(self.split(x))))


class InferenceStages(nn.Sequential):
    """Stages of the inference graph, for eval mode and any input size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self[0].split(x)
        for stage in self:
            parts = stage.run(parts)
        return self[-1].take_whole(_join(parts))


def _can_lay_out(block: nn.Module) -> bool:
    """Whether a block is one of HBONet's that nobody has edited, with norms that can be folded."""
    if type(block) is HarmoniousBottleneck:
        own = [*block.contract, block.conv_dw, block.conv_pwl, *([block.conv_dw_end] if block.has_skip else [])]
    else:
        own = [block.conv_dw, block.conv_pwl] if type(block) is InvertedResidual else [block]
    layers = [
        m for name, m in block.named_modules() if type(m) is RepConvNormAct and m.fuse() is not m
        and m.conv.groups == (m.in_channels if 'dw' in name or 'expand' in name else 1)]
    others = set(block.modules()) - {block, *(m for layer in layers for m in layer.modules())}
    types = (nn.Sequential, nn.Identity, AvgPool2dCeil, DropPath, SpatialExpansion)
    return all(m in layers for m in own) and all(type(m) in types for m in others)


class HarmoniousStages(nn.Sequential):
    """Stages of the network, of which `timm.utils.reparameterize_model` makes a graph for inference."""

    def fuse(self) -> nn.Module:
        """Returns the graph, or these stages if a block is not as HBONet makes it, or a norm is none to fold."""
        if not all(type(stage) is nn.Sequential and len(stage) and all(map(_can_lay_out, stage)) for stage in self):
            return self
        in_chs = next(m.in_channels for m in self.modules() if isinstance(m, RepConvNormAct))
        layouts, inference_stages = [list(range(in_chs))], []
        for stage in self:
            in_layouts, inference_blocks = layouts, []
            for block in stage:
                if isinstance(block, HarmoniousBottleneck):
                    # selected once, halves are narrow in all blocks of the stage after the first
                    inference_block = InferenceBottleneck(block, layouts, selects=len(stage) > 1)
                else:
                    inference_block = InferenceConvs(block, layouts, 1 if block is self[-1][-1] else CHANNEL_MULTIPLE)
                inference_blocks.append(inference_block)
                layouts = inference_block.layouts
            inference_stages.append(InferenceStage(inference_blocks, in_layouts, in_chs))
            in_chs = inference_block.out_chs
        return InferenceStages(*inference_stages).eval()
