"""The graph for inference that `timm.utils.reparameterize_model` makes of HBONet's stages.

It computes what they compute in eval mode, with norms folded. The halves of a feature map, channels passed through and
channels computed, are two tensors from the first harmonious bottleneck to the last: no slices, and concatenations only
where it is contracted. Channels are padded to a multiple that blocked kernels like: a tensor's layout, fixed when the
graph is made, tells which channel is in each place. At its ends, they are in the network's own order and number.
"""
import copy
from typing import List, Optional, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath
from torch.jit import Final

from .export import exports_program, pad_to_even
from .hbonet import AvgPool2dCeil, HarmoniousBottleneck, InvertedResidual, RepConvNormAct, SpatialExpansion

__all__ = ['InferenceStages', 'create_inference_stages']

# The channel in each place of a tensor, or -1 where all weights that read the place are 0.
Layout = List[int]


def _pad(channels: Sequence[int], multiple: int) -> Layout:
    return [*channels, *[-1] * (-len(channels) % multiple)]


def _join(parts: List[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _lay_out(layer: RepConvNormAct, in_layout: Layout, out_layout: Optional[Layout] = None) -> nn.Module:
    """Fold a layer's norm and lay out its weights, as depthwise ones without `out_layout`."""
    conv, act = layer.fuse()
    depthwise = out_layout is None
    out_layout = in_layout if depthwise else out_layout
    # -1 takes the zeros that are added at the end
    weight = F.pad(conv.weight.detach(), (0, 0, 0, 0, 0, 0 if depthwise else 1, 0, 1))[out_layout]
    bias = F.pad(conv.bias.detach(), (0, 1))[out_layout]
    conv.weight = nn.Parameter(weight if depthwise else weight[:, in_layout], conv.weight.requires_grad)
    conv.bias = nn.Parameter(bias, conv.bias.requires_grad)
    conv.in_channels, conv.out_channels = len(in_layout), len(out_layout)
    conv.groups = len(in_layout) if depthwise else 1
    return conv if isinstance(act, nn.Identity) else nn.Sequential(conv, act)


def _lay_out_all(layers: List[RepConvNormAct], in_layout: Layout, out_layout: Layout, multiple: int) -> nn.Sequential:
    """Fold and lay out layers in sequence, of which the last is pointwise."""
    modules = []
    for layer in layers[:-1]:
        if layer.conv.groups > 1:
            modules.append(_lay_out(layer, in_layout))
        else:
            hidden_layout = _pad(range(layer.out_channels), multiple)
            modules.append(_lay_out(layer, in_layout, hidden_layout))
            in_layout = hidden_layout
    return nn.Sequential(*modules, _lay_out(layers[-1], in_layout, out_layout))


def _select(in_layout: Layout, out_layout: Layout, like: torch.Tensor) -> nn.Module:
    """Selection of channels as a pointwise convolution, which blocked kernels are better at than at slices."""
    conv = nn.Conv2d(len(in_layout), len(out_layout), 1, bias=False, device='meta')
    weight = like.new_tensor([[float(0 <= c == d) for d in in_layout] for c in out_layout])
    conv.weight = nn.Parameter(weight[:, :, None, None], requires_grad=False)
    return conv


class InferenceConvs(nn.Module):
    """Inverted residual block or single layer, from a feature map in parts to one in one part."""

    def __init__(self, block: nn.Module, in_layouts: List[Layout], multiple: int, out_multiple: int):
        super().__init__()
        in_layout = sum(in_layouts, [])
        layers = [m for m in block.modules() if isinstance(m, RepConvNormAct)]
        self.has_skip = isinstance(block, InvertedResidual) and block.has_skip
        out_layout = in_layout if self.has_skip else _pad(range(layers[-1].out_channels), out_multiple)
        self.convs = _lay_out_all(layers, in_layout, out_layout, multiple)
        self.layouts = [out_layout]

    def run(self, parts: List[torch.Tensor]) -> List[torch.Tensor]:
        shortcut = _join(parts)
        x = self.convs(shortcut)
        if self.has_skip:
            x = x + shortcut
        return [x]


class AveragePool(nn.Module):
    """2x2 average pooling. As a depthwise convolution where no size is odd, which runtimes take with any channels."""

    def __init__(self, pool: nn.Module, chs: int, like: torch.Tensor):
        super().__init__()
        self.pool = pool
        self.conv = nn.Conv2d(chs, chs, 2, 2, groups=chs, bias=False, device='meta')
        self.conv.weight = nn.Parameter(like.new_full((chs, 1, 2, 2), 0.25), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, w = x.shape[-2], x.shape[-1]
        # sizes that a trace or an export leaves open are no int, and must not decide what is recorded
        if isinstance(h, int) and isinstance(w, int):
            if h % 2 == 0 and w % 2 == 0:
                return self.conv(x)
            if not torch.jit.is_scripting():
                if exports_program():
                    return self.conv(pad_to_even(x))
        return self.pool(x)


class InferenceBottleneck(nn.Module):
    """Harmonious bottleneck, from a feature map in parts to one in two parts, channels passed and channels computed."""
    has_skip: Final[bool]
    keeps_parts: Final[bool]

    def __init__(self, block: HarmoniousBottleneck, in_layouts: List[Layout], multiple: int, selects: bool):
        super().__init__()
        conv_dw1, *layers = [*block.contract, block.conv_dw, block.conv_pwl]
        in_chs, half_chs, pass_chs = conv_dw1.in_channels, block.half_chs, block.pass_chs
        whole = sum(in_layouts, [])
        added, passed = range(half_chs), range(in_chs - pass_chs, in_chs)
        like = conv_dw1.conv.weight
        self.has_skip = block.has_skip
        self.keeps_parts = len(in_layouts) == 2 and half_chs == pass_chs == in_chs - half_chs
        self.select_added = self.select_passed = nn.Identity()
        if self.keeps_parts:
            added_layout, passed_layout = in_layouts
        elif selects and pass_chs < in_chs:
            added_layout, passed_layout = _pad(added, multiple), _pad(passed, multiple)
            self.select_passed = _select(whole, passed_layout, like)
            if self.has_skip:
                self.select_added = _select(whole, added_layout, like)
        else:
            # two half maps that overlap are the whole map twice, with places that are not read
            added_layout = [c if c in added else -1 for c in whole]
            passed_layout = [c if c in passed else -1 for c in whole]

        self.conv_dws = nn.ModuleList([_lay_out(conv_dw1, layout) for layout in in_layouts])
        computed_layout = added_layout if self.has_skip else _pad(added, multiple)
        self.convs = _lay_out_all(layers, whole, computed_layout, multiple)
        self.pools = nn.ModuleList([
            block.pool if isinstance(block.pool, nn.Identity) else AveragePool(block.pool, len(layout), like)
            for layout in in_layouts])
        if self.has_skip:
            self.expand = copy.deepcopy(block.expand)
            if self.expand.conv is not None:
                self.expand.conv = _lay_out(self.expand.conv, computed_layout)
            self.conv_dw_end = _lay_out(block.conv_dw_end, computed_layout)
        self.layouts = [
            [c - passed[0] if c >= 0 else -1 for c in passed_layout],
            [c + pass_chs if c >= 0 else -1 for c in computed_layout],
        ]

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


class InferenceStage(nn.Module):
    """Stage of which blocks hand feature maps on in parts. Called by itself, it takes and returns whole ones."""

    def __init__(self, blocks: List[nn.Module], in_layouts: List[Layout]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.in_layouts = in_layouts
        out_layout = sum(blocks[-1].layouts, [])
        self.out_places = [out_layout.index(i) for i in range(max(out_layout) + 1)]
        self.is_whole = self.out_places == list(range(len(out_layout)))

    def run(self, parts: List[torch.Tensor]) -> List[torch.Tensor]:
        for block in self.blocks:
            parts = block.run(parts)
        return parts

    def join(self, parts: List[torch.Tensor]) -> torch.Tensor:
        x = _join(parts)
        return x if self.is_whole else x[:, torch.tensor(self.out_places, device=x.device)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts: List[torch.Tensor] = []
        for layout in self.in_layouts:
            parts.append(x[:, torch.tensor(layout, device=x.device).clamp(min=0)])
        return self.join(self.run(parts))


class InferenceStages(nn.Sequential):
    """Stages of the inference graph, for eval mode and any input size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [x]
        for stage in self:
            parts = stage.run(parts)
        return self[-1].join(parts)


def _is_known(block: nn.Module) -> bool:
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


def create_inference_stages(stages: nn.Sequential, multiple: int) -> Optional[InferenceStages]:
    """Create the graph of stages. None where a block is not as HBONet makes it, or a norm is none to fold."""
    if not isinstance(multiple, int) or multiple < 1:
        raise ValueError(f'`channel_multiple` must be a whole number of at least 1, got {multiple!r}.')
    if not all(type(stage) is nn.Sequential and len(stage) and all(map(_is_known, stage)) for stage in stages):
        return None
    blocks = [block for stage in stages for block in stage]
    layouts = [list(range(next(m.in_channels for m in stages.modules() if isinstance(m, RepConvNormAct))))]
    inference_stages = []
    for stage in stages:
        in_layouts, inference_blocks = layouts, []
        for block in stage:
            if isinstance(block, HarmoniousBottleneck):
                # selected once, halves are narrow in all blocks of the stage after the first
                inference_block = InferenceBottleneck(block, layouts, multiple, selects=len(stage) > 1)
            else:
                inference_block = InferenceConvs(block, layouts, multiple, 1 if block is blocks[-1] else multiple)
            inference_blocks.append(inference_block)
            layouts = inference_block.layouts
        inference_stages.append(InferenceStage(inference_blocks, in_layouts))
    return InferenceStages(*inference_stages).eval()
