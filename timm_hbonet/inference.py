"""The stages of HBONet, and the graph for inference that `timm.utils.reparameterize_model` makes of them.

It computes what they compute in eval mode, with norms folded. The halves of a feature map, channels passed through and
channels computed, are two tensors from the first harmonious bottleneck to the last: no slices, and concatenations only
where it is contracted. A layout, fixed when the graph is made, tells which channel is in each place of a tensor. At the
ends of the graph, and of a stage that is called by itself, channels are in the network's own order and number.
"""
from itertools import cycle, islice
from typing import List, Optional, Sequence

import torch
import torch.nn as nn
from timm.layers import DropPath
from torch.jit import Final

from .blocks import HarmoniousBottleneck, InvertedResidual, RepConvNormAct, SpatialExpansion, avg_pool2d, is_open

# The channel in each place of a tensor. Of its places the first is read, others make up the multiple. -1 is not read.
Layout = List[int]

# Faster than 1, 4 and 16 with AVX2. With AVX-512, ONNX Runtime's blocks have 16, and 8 is as fast.
CHANNEL_MULTIPLE = 8


def exports_program(x: torch.Tensor) -> bool:
    """Whether `torch.export` records this call with known sizes, not for ONNX. PyTorch before 2.7 does not tell.

    Then operators are taken that XNNPACK has, the kernels of ExecuTorch and LiteRT, and keep ranges when quantized.
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


def add_expanded(x: torch.Tensor, shortcut: torch.Tensor, rate: int) -> torch.Tensor:
    """Add a map, expanded by nearest upsampling, to one of up to `rate` times its size, without upsampling.

    Each pixel is added to the `rate` x `rate` ones that it is nearest to. Channels last, as XNNPACK stores maps, all
    but the sum are views. Batch and height share a dimension: Core ML has five at most.
    """
    (height, width), (chs, h, w) = shortcut.shape[-2:], x.shape[1:]
    shortcut = pad_to_multiple(shortcut, rate).permute(0, 2, 3, 1).reshape(-1, rate, w, rate, chs)
    x = shortcut + x.permute(0, 2, 3, 1).reshape(-1, 1, w, 1, chs)
    x = x.reshape(-1, h * rate, w * rate, chs).permute(0, 3, 1, 2)
    return x if (h * rate, w * rate) == (height, width) else x[:, :, :height, :width]


def _pad(channels: Sequence[int], multiple: int = CHANNEL_MULTIPLE) -> Layout:
    return [*channels, *islice(cycle(channels), -len(channels) % multiple)]


def _join(parts: List[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _lay_out(layers: Sequence[RepConvNormAct], in_layout: Layout, out_layout: Optional[Layout] = None) -> nn.Sequential:
    """Fold norms of layers in sequence and lay out their weights. The last is pointwise if there is an `out_layout`."""
    modules = []
    for layer in layers:
        conv, act = layer.fuse()
        is_pointwise, layout = conv.kernel_size == (1, 1), in_layout
        if is_pointwise:
            layout = out_layout if layer is layers[-1] else _pad(range(conv.out_channels))
        # what nobody reads has weights of a channel too: to quantizers, weights that are all 0 have no scale
        rows = [c % conv.out_channels for c in layout]
        weight = conv.weight.detach()[rows]
        if is_pointwise:
            is_read = [c >= 0 and c not in in_layout[:i] for i, c in enumerate(in_layout)]
            weight = weight[:, [c % conv.in_channels for c in in_layout]] * weight.new_tensor(is_read)[:, None, None]
        conv.weight = nn.Parameter(weight, conv.weight.requires_grad)
        conv.bias = nn.Parameter(conv.bias.detach()[rows], conv.bias.requires_grad)
        conv.in_channels, conv.out_channels, conv.groups = len(in_layout), len(rows), 1 if is_pointwise else len(rows)
        modules += [conv, act]
        in_layout = layout
    return nn.Sequential(*(m for m in modules if not isinstance(m, nn.Identity)))


def _select(in_layout: Layout, out_layout: Layout) -> nn.Module:
    """Selection of channels as a pointwise convolution, which blocked kernels are better at than at slices."""
    if in_layout == out_layout:
        return nn.Identity()
    conv = nn.Conv2d(len(in_layout), len(out_layout), 1, bias=False, device='meta')
    weight = torch.eye(len(in_layout))[[in_layout.index(c) for c in out_layout], :, None, None]
    conv.weight = nn.Parameter(weight, requires_grad=False)
    return conv


class InferencePool(nn.Module):
    """2x2 average pooling. As a depthwise convolution where no size is odd, which runtimes take with any channels."""

    def __init__(self, chs: int):
        super().__init__()
        self.conv = nn.Conv2d(chs, chs, 2, 2, groups=chs, bias=False, device='meta')
        self.conv.weight = nn.Parameter(torch.full((chs, 1, 2, 2), 0.25), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, w = x.shape[-2], x.shape[-1]
        # sizes that a trace or an export leaves open are no int, and must not decide what is recorded
        if isinstance(h, int) and isinstance(w, int) and h % 2 == 0 and w % 2 == 0:
            return self.conv(x)
        if not torch.jit.is_scripting():
            if exports_program(x):
                return self.conv(pad_to_multiple(x, 2))
        return avg_pool2d(x)


class InferenceConvs(nn.Module):
    """Inverted residual block or single layer, from a feature map in parts to one in one part."""

    def __init__(self, block: nn.Module, in_layouts: List[Layout], out_multiple: int):
        super().__init__()
        in_layout = sum(in_layouts, [])
        layers = [m for m in block.modules() if isinstance(m, RepConvNormAct)]
        self.has_skip = isinstance(block, InvertedResidual) and block.has_skip
        self.out_layouts = [in_layout if self.has_skip else _pad(range(layers[-1].out_channels), out_multiple)]
        self.convs = _lay_out(layers, in_layout, self.out_layouts[0])

    def run(self, parts: List[torch.Tensor]) -> List[torch.Tensor]:
        shortcut = _join(parts)
        x = self.convs(shortcut)
        return [x + shortcut if self.has_skip else x]


class InferenceBottleneck(nn.Module):
    """Harmonious bottleneck, from a feature map in parts to one in two parts, channels passed and channels computed."""
    has_skip: Final[bool]
    keeps_parts: Final[bool]

    def __init__(self, block: HarmoniousBottleneck, in_layouts: List[Layout], selects: bool):
        super().__init__()
        conv_dw1, *layers = [*block.contract, block.conv_dw, block.conv_pwl]
        in_chs, half_chs, pass_chs = conv_dw1.in_channels, block.half_chs, block.pass_chs
        added, passed, whole = range(half_chs), range(in_chs - pass_chs, in_chs), sum(in_layouts, [])
        self.has_skip = block.has_skip
        self.keeps_parts = len(in_layouts) == 2 and half_chs == pass_chs == in_chs - half_chs
        # halves that overlap are the whole map twice, with places that are not read
        halves = added_layout, passed_layout = in_layouts if self.keeps_parts else [whole, whole]
        if selects and not self.keeps_parts and pass_chs < in_chs:
            added_layout, passed_layout = _pad(added), _pad(passed)
        self.select_added = _select(halves[0], added_layout if self.has_skip else halves[0])
        self.select_passed = _select(halves[1], passed_layout)

        self.conv_dws = nn.ModuleList([_lay_out([conv_dw1], layout) for layout in in_layouts])
        computed_layout = added_layout if self.has_skip else _pad(added)
        self.convs = _lay_out(layers, whole, computed_layout)
        self.pools = nn.ModuleList([
            InferencePool(len(layout)) if block.stride == 2 else nn.Identity() for layout in in_layouts])
        if self.has_skip:
            deconv = None if block.expand.conv is None else _lay_out([block.expand.conv], computed_layout)
            self.expand = SpatialExpansion(block.expand.rate, deconv)
            self.conv_dw_end = _lay_out([block.conv_dw_end], computed_layout)
        self.out_layouts = [
            [passed.index(c) if c in passed else -1 for c in passed_layout],
            [pass_chs + c if c in added else -1 for c in computed_layout],
        ]

    def run(self, parts: List[torch.Tensor]) -> List[torch.Tensor]:
        contracted: List[torch.Tensor] = []
        pooled: List[torch.Tensor] = []
        for i, conv_dw in enumerate(self.conv_dws):
            contracted.append(conv_dw(parts[i]))
        for i, pool in enumerate(self.pools):
            pooled.append(pool(parts[i]))
        x = self.convs(_join(contracted))
        halves = pooled if self.keeps_parts else [_join(pooled)] * 2
        added, passed = self.select_added(halves[0]), self.select_passed(halves[1])
        if self.has_skip:
            x = self.conv_dw_end(self.add_expanded(x, added))
        return [passed, x]

    def add_expanded(self, x: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if exports_program(x) and self.expand.conv is None:
                return add_expanded(x, shortcut, self.expand.rate)
        return self.expand(x, shortcut.shape[-2:]) + shortcut


class InferenceStage(nn.Module):
    """Stage of which blocks hand feature maps on in parts. Called by itself, it takes and returns whole ones."""

    def __init__(self, blocks: List[nn.Module], in_layouts: List[Layout]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        in_chs, out_chs = (1 + max(map(max, layouts)) for layouts in (in_layouts, blocks[-1].out_layouts))
        self.select_parts = nn.ModuleList([_select([*range(in_chs)], [c % in_chs for c in p]) for p in in_layouts])
        self.select_whole = _select(sum(blocks[-1].out_layouts, []), [*range(out_chs)])

    def run(self, parts: List[torch.Tensor]) -> List[torch.Tensor]:
        for block in self.blocks:
            parts = block.run(parts)
        return parts

    def split(self, x: torch.Tensor) -> List[torch.Tensor]:
        parts: List[torch.Tensor] = []
        for select in self.select_parts:
            parts.append(select(x))
        return parts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.select_whole(_join(self.run(self.split(x))))


class InferenceStages(nn.Sequential):
    """Stages of the inference graph, for eval mode and any input size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self[0].split(x)
        for stage in self:
            parts = stage.run(parts)
        return self[-1].select_whole(_join(parts))


def _can_lay_out(block: nn.Module) -> bool:
    """Whether a block is one of HBONet's that nobody has edited, with norms that can be folded."""
    layers = [
        m for m in block.modules() if type(m) is RepConvNormAct and m.fuse() is not m
        and m.conv.groups == (1 if m.conv.kernel_size == (1, 1) else m.in_channels)]
    known = {m for layer in layers for m in layer.modules()}
    return type(block) in (HarmoniousBottleneck, InvertedResidual, RepConvNormAct) and all(
        m in known or m is block or type(m) in (nn.Sequential, DropPath, SpatialExpansion)
        or (type(m) is nn.Identity and name in ('conv_pw', 'drop_path')) for name, m in block.named_modules())


class HarmoniousStages(nn.Sequential):
    """Stages of the network, of which `timm.utils.reparameterize_model` makes a graph for inference."""

    def fuse(self) -> nn.Module:
        """Returns the graph, or these stages if a block is not as HBONet makes it, or a norm is none to fold."""
        if not all(type(stage) is nn.Sequential and len(stage) and all(map(_can_lay_out, stage)) for stage in self):
            return self
        conv = next(m for m in self.modules() if isinstance(m, nn.Conv2d))
        layouts, stages = [list(range(conv.in_channels))], []
        for stage in self:
            in_layouts, blocks = layouts, []
            for block in stage:
                if isinstance(block, HarmoniousBottleneck):
                    # selected once, halves are narrow in all blocks of the stage after the first
                    blocks.append(InferenceBottleneck(block, layouts, selects=len(stage) > 1))
                else:
                    blocks.append(InferenceConvs(block, layouts, 1 if block is self[-1][-1] else CHANNEL_MULTIPLE))
                layouts = blocks[-1].out_layouts
            stages.append(InferenceStage(blocks, in_layouts))
        return InferenceStages(*stages).to(conv.weight).eval()
