""" HBONet

A mobile network of harmonious bottlenecks: each block contracts the feature map, works on it with more channels, and
expands it back, while half of the output channels are taken from the block's input as they are.

Paper: `HBONet: Harmonious Bottleneck on Two Orthogonal Dimensions` - https://arxiv.org/abs/1908.03888

Weights and protocols: https://github.com/d-li14/HBONet
"""
import copy
import math
import re
from functools import partial
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    LayerType,
    calculate_drop_path_rates,
    create_act_layer,
    create_classifier,
    get_norm_layer,
    make_divisible,
)
from timm.models._efficientnet_builder import resolve_bn_args
from timm.models._features import feature_take_indices
from timm.models._helpers import clean_state_dict
from timm.models._manipulate import checkpoint_seq
from timm.models._registry import generate_default_cfgs, register_model
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .pretrained import build_model_with_cfg

__all__ = ['HBONet']


def _create_norm(norm_layer: LayerType, chs: int, **dd: Any) -> nn.Module:
    norm = get_norm_layer(norm_layer)(chs, **dd)
    if hasattr(norm, 'act'):
        norm.act = nn.Identity()  # activations are layers of their own here
    return norm


def _conv_norm_act(
        in_chs: int,
        out_chs: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        apply_act: bool = True,
        act_layer: LayerType = nn.ReLU6,
        norm_layer: LayerType = nn.BatchNorm2d,
        device=None,
        dtype=None,
) -> List[nn.Module]:
    dd = {'device': device, 'dtype': dtype}
    padding = dilation * (kernel_size // 2)
    layers = [
        nn.Conv2d(in_chs, out_chs, kernel_size, stride, padding, dilation, groups, bias=False, **dd),
        _create_norm(norm_layer, out_chs, **dd),
    ]
    if apply_act:
        layers += [create_act_layer(act_layer, inplace=True) or nn.Identity()]
    return layers


class RepSequential(nn.ModuleList):
    """Layers in sequence, of which `timm.utils.reparameterize_model` folds norms into the convolutions before them.

    Not an `nn.Sequential`, which `features_only=True` would take apart. Layers are not grouped further, in modules that
    would hold on to their input until they are done.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self:
            x = layer(x)
        return x

    def reparameterize(self) -> None:
        """Fold the norms, with their running statistics. A model without its norms is for inference."""
        for i in reversed(range(1, len(self))):
            conv, norm = self[i - 1], self[i]
            if getattr(norm, 'running_mean', None) is not None:
                # a depthwise transposed convolution has its output channels first too
                conv.weight, conv.bias = fuse_conv_bn_weights(
                    conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
                del self[i]


class InvertedResidual(nn.Module):
    """Inverted residual block of MobileNet-V2. That of timm rounds the hidden width to a multiple of 8.

    Paper: `MobileNetV2: Inverted Residuals and Linear Bottlenecks` - https://arxiv.org/abs/1801.04381
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            stride: int = 1,
            dilation: int = 1,
            exp_ratio: float = 1.0,
            act_layer: LayerType = nn.ReLU6,
            norm_layer: LayerType = nn.BatchNorm2d,
            drop_path: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        kwargs = dict(act_layer=act_layer, norm_layer=norm_layer, device=device, dtype=dtype)
        mid_chs = round(in_chs * exp_ratio)
        self.has_skip = stride == 1 and in_chs == out_chs

        self.conv = RepSequential(
            (_conv_norm_act(in_chs, mid_chs, 1, **kwargs) if exp_ratio != 1 else [])
            + _conv_norm_act(mid_chs, mid_chs, 3, stride, dilation=dilation, groups=mid_chs, **kwargs)
            + _conv_norm_act(mid_chs, out_chs, 1, apply_act=False, **kwargs))
        self.drop_path = DropPath(drop_path) if drop_path > 0. and self.has_skip else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x
        x = self.conv(x)
        if self.has_skip:
            x = self.drop_path(x) + shortcut
        return x


class AvgPool2dCeil(nn.Module):
    """2x2 average pooling that rounds sizes up, as the strided convolutions do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ceil_mode = True
        if not torch.jit.is_scripting():
            size = x.shape[-2], x.shape[-1]
            if any(isinstance(n, torch.SymInt) for n in size):
                # the same without a branch on the size, which would limit an export of dynamic size
                return F.avg_pool2d(F.pad(x, (0, 1, 0, 1), mode='replicate'), 2)
            # only where it matters: ONNX Runtime pools several times slower with it
            ceil_mode = not all(isinstance(n, int) and n % 2 == 0 for n in size)
        return F.avg_pool2d(x, 2, ceil_mode=ceil_mode)


class SpatialExpansion(nn.Module):
    """Expansion of a feature map to the size of the one that it is added to."""

    def __init__(
            self,
            chs: int,
            stride: int,
            mode: str = 'nearest',
            norm_layer: LayerType = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.mode = mode
        self.conv = None
        if mode == 'deconv':
            self.conv = RepSequential([
                nn.ConvTranspose2d(chs, chs, 2 * stride, stride, stride // 2, groups=chs, bias=False, **dd),
                _create_norm(norm_layer, chs, **dd),
            ])

    def forward(self, x: torch.Tensor, size: List[int]) -> torch.Tensor:
        if self.conv is None:
            return F.interpolate(x, size=size, mode=self.mode)
        # the strided convolutions round sizes up, so that the transposed one can exceed the size
        return self.conv(x)[:, :, :size[0], :size[1]]


def _keep_gradient_dense(x: torch.Tensor) -> torch.Tensor:
    # behind a slice or a concatenation, the gradient is a view or in another memory format, with which batch norm's
    # backward is several times slower on CPU
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or not isinstance(x, torch.Tensor)
    if not traced and x.grad_fn is not None:
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        x = x.view_as(x)  # a hook on the caller's own tensor would stay there
        x.register_hook(lambda grad: grad.contiguous(memory_format=memory_format))
    return x


class HarmoniousBottleneck(nn.Module):
    """Harmonious bottleneck (HBO) block.

    Strided depthwise and pointwise convolutions contract the feature map by `rate` and expand its channels, then the
    channels are contracted to half of the output and the feature map is expanded back. The other half of the output
    are the last channels of the input. A block of stride 2 ends at half the size of its input, so that one of stride 2
    and rate 2 has no spatial expansion.

    Paper: figure 2 of HBONet.
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            stride: int = 1,
            rate: int = 2,
            exp_ratio: int = 2,
            spatial_expansion: str = 'nearest',
            act_layer: LayerType = nn.ReLU6,
            norm_layer: LayerType = nn.BatchNorm2d,
            drop_path: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        kwargs = dict(act_layer=act_layer, norm_layer=norm_layer, **dd)
        mid_chs = in_chs * exp_ratio
        self.main_chs = out_chs // 2
        self.pass_chs = out_chs - self.main_chs
        self.same_chs = in_chs == out_chs
        if self.pass_chs > in_chs:
            raise ValueError(
                f'A harmonious bottleneck of {out_chs} channels passes {self.pass_chs} channels of its input through, '
                f'but its input has {in_chs}. Use a larger `width` or a smaller `divisor`.')

        conv = []
        for i in range(int(math.log2(rate))):
            chs = mid_chs if i else in_chs
            conv += _conv_norm_act(chs, chs, 5, 2, groups=chs, apply_act=False, **kwargs)
            conv += _conv_norm_act(chs, mid_chs, 1, **kwargs)
        # the release activates here at rate 2 only
        conv += _conv_norm_act(mid_chs, mid_chs, 3, groups=mid_chs, apply_act=rate == 2, **kwargs)
        conv += _conv_norm_act(mid_chs, self.main_chs, 1, apply_act=False, **kwargs)
        self.conv = RepSequential(conv)
        self.conv_added = self.conv_passed = None
        self.pool = AvgPool2dCeil() if stride == 2 else nn.Identity()
        if rate > stride:
            self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()
            self.expand = SpatialExpansion(
                self.main_chs, rate // stride, spatial_expansion, norm_layer=norm_layer, **dd)
            self.upconv = RepSequential(
                _conv_norm_act(self.main_chs, self.main_chs, 5, groups=self.main_chs, apply_act=False, **kwargs))
        else:
            self.expand = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.forward_halves([x]), dim=1)

    def forward_halves(self, halves: List[torch.Tensor]) -> List[torch.Tensor]:
        """Forward from the input, whole or after `split_conv()` in halves, to the halves of the output."""
        if self.conv_added is None:
            x = halves[0]
            if not torch.jit.is_scripting():
                x = _keep_gradient_dense(x)
            shortcut = self.pool(x)
            if self.same_chs:
                # the gradient of a split is one concatenation, those of two slices are added up at full size
                added, passed = shortcut.split([self.main_chs, self.pass_chs], dim=1)
            else:
                added, passed = shortcut[:, :self.main_chs], shortcut[:, -self.pass_chs:]
        else:
            if len(halves) == 1:
                halves = list(halves[0].split([self.main_chs, self.pass_chs], dim=1))
            added, passed = halves
            x = torch.cat([self.conv_added(added), self.conv_passed(passed)], dim=1)
        x = self.conv(x)
        if self.expand is not None:
            x = self.expand(self.drop_path(x), added.shape[-2:])
            x += added
            x = self.upconv(x)
        if not torch.jit.is_scripting():
            x = _keep_gradient_dense(x)
        return [passed, x]

    def split_conv(self) -> None:
        """Split the first convolution into those of the two halves of the input. Only for inference, and stride 1."""
        if self.conv_added is not None:
            return
        self.conv.reparameterize()
        conv = self.conv[0]
        if conv.bias is None or self.main_chs != self.pass_chs:
            return  # its norm is no batch norm, or the halves of input and output differ
        convs = copy.deepcopy(conv), conv
        for half, weight, bias in zip(convs, conv.weight.chunk(2), conv.bias.chunk(2), strict=True):
            half.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
            half.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
            half.in_channels = half.out_channels = half.groups = len(bias)
        self.conv_added, self.conv_passed = convs
        del self.conv[0]


class HarmoniousStage(nn.Sequential):
    """Stage of harmonious bottlenecks.

    `timm.utils.reparameterize_model` keeps the halves of its feature maps apart from the first block to the last, so
    that the blocks between need no slices, and no concatenations at full size.
    """

    def __init__(self, *blocks: Any):
        super().__init__(*blocks)
        self.keeps_halves = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.keeps_halves:
            for block in self:
                x = block(x)
            return x
        halves = [x]
        for block in self:
            halves = block.forward_halves(halves)
        return torch.cat(halves, dim=1)

    def reparameterize(self) -> None:
        if all(isinstance(block, HarmoniousBottleneck) for block in self):
            for block in self[1:]:
                block.split_conv()
            self.keeps_halves = all(block.conv_added is not None for block in self[1:])


# block type, expansion ratio, channels at width 1, stride of the first block
_STAGE_CFG = (
    ('ir', 1, 20, 1),
    ('hbo', 2, 36, 1),
    ('hbo', 2, 72, 2),
    ('hbo', 2, 96, 2),
    ('hbo', 2, 192, 2),
    ('hbo', 2, 288, 1),
    ('cn', 1, 144, 1),
    ('ir', 6, 200, 2),
    ('ir', 6, 400, 1),
)


class HBONet(nn.Module):
    """HBONet

    Paper: `HBONet: Harmonious Bottleneck on Two Orthogonal Dimensions` - https://arxiv.org/abs/1908.03888
    """

    def __init__(
            self,
            width: float = 1.0,
            divisor: int = 8,
            depths: Sequence[int] = (1, 1, 3, 4, 4, 1, 1, 2, 1),
            rates: Sequence[int] = (2, 2, 2, 2, 2),
            spatial_expansion: str = 'nearest',
            num_classes: int = 1000,
            in_chans: int = 3,
            global_pool: str = 'avg',
            output_stride: int = 32,
            act_layer: LayerType = nn.ReLU6,
            norm_layer: LayerType = nn.BatchNorm2d,
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        """
        Args:
            width: Multiplier of all widths but the head's, which only grows above 1.
            divisor: Number that all widths are multiples of.
            depths: Number of blocks of each of the 9 stages.
            rates: Rate of the spatial contraction, 2, 4 or 8, in each of the 5 stages of harmonious bottlenecks.
            spatial_expansion: Spatial expansion of the harmonious bottlenecks: 'nearest', as the released weights need
                it, 'bilinear', or 'deconv' for a depthwise transposed convolution of the same stride.
            num_classes: Number of classes, 0 for no classifier.
            in_chans: Number of input image channels.
            global_pool: Type of global pooling, '' for none (without a classifier).
            output_stride: Ratio of input to output size, 32 or 16. 16 dilates the last stages.
            act_layer: Type of activation layer.
            norm_layer: Type of normalization layer.
            drop_rate: Dropout rate of the classifier.
            drop_path_rate: Stochastic depth rate of the last block, it rises linearly from 0 at the first. Only blocks
                with a shortcut have it.

        Raises:
            ValueError: If one of `width`, `depths`, `rates`, `spatial_expansion`, `in_chans` and `output_stride` is not
                as above.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if width <= 0:
            raise ValueError(f'`width` must be positive, got {width}.')
        if in_chans < 1:
            raise ValueError(f'`in_chans` must be at least 1, got {in_chans}.')
        if len(depths) != len(_STAGE_CFG) or min(depths) < 1:
            raise ValueError(f'`depths` must be {len(_STAGE_CFG)} numbers of at least 1, got {depths}.')
        num_rates = sum(block_type == 'hbo' for block_type, *_ in _STAGE_CFG)
        if len(rates) != num_rates or not set(rates) <= {2, 4, 8}:
            raise ValueError(f'`rates` must be {num_rates} numbers out of 2, 4 and 8, got {rates}.')
        if spatial_expansion not in ('nearest', 'bilinear', 'deconv'):
            raise ValueError(
                f"`spatial_expansion` must be 'nearest', 'bilinear' or 'deconv', got {spatial_expansion!r}.")
        if output_stride not in (16, 32):
            raise ValueError(f'`output_stride` must be 16 or 32, got {output_stride}.')
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.spatial_expansion = spatial_expansion
        self.grad_checkpointing = False

        round_chs = partial(make_divisible, divisor=divisor)
        kwargs = dict(act_layer=act_layer, norm_layer=norm_layer, **dd)
        prev_chs = round_chs(32 * width)
        self.conv_stem = RepSequential(_conv_norm_act(in_chans, prev_chs, 3, 2, **kwargs))

        stages = []
        self.feature_info = []
        rates = iter(rates)
        drop_path_rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        net_stride, dilation = 2, 1
        for stage_idx, (block_type, exp_ratio, chs, stride) in enumerate(_STAGE_CFG):
            if stride > 1:  # the last stage of each reduction is a feature
                self.feature_info += [dict(num_chs=prev_chs, reduction=net_stride, module=f'blocks.{stage_idx - 1}')]
            rate = next(rates) if block_type == 'hbo' else 0
            out_chs = round_chs(chs * width)
            blocks = []
            for i in range(depths[stage_idx]):
                block_stride, next_dilation = stride if i == 0 else 1, dilation
                if net_stride * block_stride > output_stride:
                    block_stride, next_dilation = 1, dilation * block_stride
                net_stride *= block_stride
                drop_path = next(drop_path_rates)
                if block_type == 'ir':
                    blocks += [InvertedResidual(
                        prev_chs, out_chs, block_stride, dilation, exp_ratio, drop_path=drop_path, **kwargs)]
                elif block_type == 'hbo':
                    blocks += [HarmoniousBottleneck(
                        prev_chs, out_chs, block_stride, rate, exp_ratio, spatial_expansion, drop_path=drop_path,
                        **kwargs)]
                else:
                    blocks += [RepSequential(_conv_norm_act(prev_chs, out_chs, 1, apply_act=False, **kwargs))]
                prev_chs = out_chs
                dilation = next_dilation
            stages += [HarmoniousStage(*blocks) if block_type == 'hbo' else nn.Sequential(*blocks)]
        self.feature_info += [dict(num_chs=prev_chs, reduction=net_stride, module=f'blocks.{len(stages) - 1}')]
        self.stage_ends = [int(f['module'].split('.')[-1]) for f in self.feature_info]
        self.blocks = nn.Sequential(*stages)

        # Head + Pooling
        self.num_features = round_chs(1600 * max(width, 1.0))
        self.conv_head = RepSequential(_conv_norm_act(prev_chs, self.num_features, 1, **kwargs))
        self.global_pool, self.classifier = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

        self.apply(self._init_weights)

    def _init_weights(self, m: nn.Module) -> None:
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
            # fan out without regard to groups, as in the release
            nn.init.normal_(m.weight, std=math.sqrt(2. / (m.kernel_size[0] * m.kernel_size[1] * m.out_channels)))
        elif isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, std=0.01)
            nn.init.zeros_(m.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        return dict(
            stem=r'^conv_stem',
            blocks=[
                (r'^blocks\.(\d+)' if coarse else r'^blocks\.(\d+)\.(\d+)', None),
                (r'^conv_head', (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Reset the classifier head.

        Args:
            num_classes: Number of classes for new classifier, 0 for none.
            global_pool: Global pooling type, current pooling is kept if None.
        """
        param = next(self.parameters())
        self.num_classes = num_classes
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        self.global_pool, self.classifier = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, device=param.device, dtype=param.dtype)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.classifier.train(self.training)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Forward features that returns intermediates.

        Args:
            x: Input image tensor, [B, in_chans, H, W] of any H and W.
            indices: Take last n features if int, all if None, select matching indices if sequence.
            norm: Apply norm layer to compatible intermediates (there are none).
            stop_early: Stop iterating over blocks when last desired intermediate hit.
            output_fmt: Shape of intermediate feature outputs, 'NCHW'.
            intermediates_only: Only return intermediate features.

        Returns:
            List of intermediate features, or tuple of final features and that list.
        """
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.stage_ends), indices)
        take_indices = [self.stage_ends[i] for i in take_indices]
        max_index = self.stage_ends[max_index]
        last_idx = self.stage_ends[-1]

        # forward pass
        x = self.conv_stem(x)
        if torch.jit.is_scripting() or not stop_early:  # can't slice blocks in torchscript
            blocks = self.blocks
        else:
            blocks = self.blocks[:max_index + 1]
        for feat_idx, stage in enumerate(blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_seq(stage, x)
            else:
                x = stage(x)
            if feat_idx in take_indices:
                intermediates.append(x)

        if intermediates_only:
            return intermediates

        if feat_idx == last_idx:
            x = self.conv_head(x)

        return x, intermediates

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Prune layers not required for specified intermediates.

        Args:
            indices: Take last n features if int, select matching indices if sequence.
            prune_norm: Whether to prune the normalization layer, here the convolution after the last stage.
            prune_head: Whether to prune the classifier head.

        Returns:
            Indices of the features that are kept.
        """
        take_indices, max_index = feature_take_indices(len(self.stage_ends), indices)
        num_chs = self.feature_info[max_index]['num_chs']
        max_index = self.stage_ends[max_index]
        # conv_head follows the last stage and is not a feature, it goes with the head, the norm or the last stage
        prune_end = prune_norm or prune_head or max_index < len(self.blocks) - 1
        self.blocks = self.blocks[:max_index + 1]
        if prune_end:
            # features now end at the last kept tap, the head is sized for the final features so it goes too
            self.conv_head = nn.Identity()
            self.num_features = num_chs
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x, flatten=True)
        else:
            x = self.blocks(x)
        x = self.conv_head(x)
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.global_pool(x)
        if self.drop_rate > 0.:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.classifier(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.forward_features(x)
        x = self.forward_head(x)
        return x

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """See `torch.nn.Module`. Takes the release's layout too, as timm's `load_checkpoint` calls no filter."""
        return super().load_state_dict(_convert_release(state_dict, self), strict=strict, assign=assign)


def _convert_release(state_dict: Mapping[str, Any], model: HBONet) -> Mapping[str, Any]:
    """Rename the tensors of the release's layout, which numbers the blocks through."""
    if 'features.0.0.weight' not in state_dict:
        return state_dict
    if model.spatial_expansion != 'nearest':
        raise RuntimeError(
            f"The released weights are for `spatial_expansion='nearest'`, got {model.spatial_expansion!r}. "
            f'Use that, or train this model from scratch.')

    blocks = [f'blocks.{i}.{j}' for i, stage in enumerate(model.blocks) for j in range(len(stage))]
    names = {f'features.{i}': name for i, name in enumerate(['conv_stem', *blocks])}
    names['conv'] = 'conv_head'
    prefix = re.compile(r'^(features\.\d+|conv)(?=\.)')
    return {prefix.sub(lambda match: names.get(match[0], match[0]), k): v for k, v in state_dict.items()}


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Convert a checkpoint of the release's layout, and check that a checkpoint of either layout fits the model.

    Args:
        state_dict: Tensors by name, possibly under a key 'state_dict' and with a prefix 'module.'.
        model: Model to load into. Stem and classifier are not checked, timm adapts them.

    Returns:
        Tensors by name, in this layout.

    Raises:
        RuntimeError: If a tensor is missing, unknown, or of another shape than the architecture's.
    """
    state_dict = clean_state_dict(state_dict.get('state_dict', state_dict))
    state_dict = dict(_convert_release(state_dict, model))
    # not left to load_state_dict(): timm makes it lenient where it replaces the classifier
    expected = {k: v for k, v in model.state_dict().items() if not k.endswith('.num_batches_tracked')}
    adapted = ('conv_stem.0.weight', 'classifier.weight', 'classifier.bias')
    problems = [f'{k!r} is missing' for k in expected if k not in state_dict and k not in adapted]
    for k, v in state_dict.items():
        if k in adapted or k.endswith('.num_batches_tracked'):
            continue
        if k not in expected:
            problems.append(f'{k!r} is unknown')
        elif not torch.is_tensor(v) or v.shape != expected[k].shape:
            found = list(v.shape) if torch.is_tensor(v) else type(v).__name__
            problems.append(f'{k!r} is {found}, not {list(expected[k].shape)}')
    if problems:
        architecture = getattr(model, 'pretrained_cfg', {}).get('architecture', 'this HBONet')
        more = f' (and {len(problems) - 3} more)' if len(problems) > 3 else ''
        raise RuntimeError(
            f'The weights do not fit {architecture}: {"; ".join(problems[:3])}{more}. '
            f'Use a checkpoint of this architecture.')
    return state_dict


def _cfg(url: str = '', **kwargs: Any) -> Dict[str, Any]:
    return {
        'url': url, 'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv_stem.0', 'classifier': 'classifier',
        'paper_ids': 'arXiv:1908.03888',
        'paper_name': 'HBONet: Harmonious Bottleneck on Two Orthogonal Dimensions',
        'origin_url': 'https://github.com/d-li14/HBONet', 'license': 'apache-2.0',
        **kwargs
    }


_RELEASE = 'https://github.com/d-li14/HBONet/raw/e9a76c15e3847b0f032a7000fe0c8138d6f2eb10/pretrained/'

default_cfgs = generate_default_cfgs({
    'hbonet_100.in1k': _cfg(hf_hub_id='timm/', url=_RELEASE + 'hbonet_1_0.pth'),
    'hbonet_080.in1k': _cfg(hf_hub_id='timm/', url=_RELEASE + 'hbonet_0_8.pth'),
    'hbonet_050.in1k': _cfg(hf_hub_id='timm/', url=_RELEASE + 'hbonet_0_5.pth'),
    'hbonet_035.in1k': _cfg(hf_hub_id='timm/', url=_RELEASE + 'hbonet_0_35.pth'),
    'hbonet_025.in1k': _cfg(hf_hub_id='timm/', url=_RELEASE + 'hbonet_0_25.pth'),
    'hbonet_010.in1k': _cfg(hf_hub_id='timm/', url=_RELEASE + 'hbonet_0_1.pth'),
    'hbonet_080.r192_in1k': _cfg(
        hf_hub_id='timm/', url=_RELEASE + 'hbonet_0_8_192x192.pth', input_size=(3, 192, 192), pool_size=(6, 6)),
    'hbonet_080.r160_in1k': _cfg(
        hf_hub_id='timm/', url=_RELEASE + 'hbonet_0_8_160x160.pth', input_size=(3, 160, 160), pool_size=(5, 5)),
    'hbonet_080.r128_in1k': _cfg(
        hf_hub_id='timm/', url=_RELEASE + 'hbonet_0_8_128x128.pth', input_size=(3, 128, 128), pool_size=(4, 4)),
    'hbonet_080.r96_in1k': _cfg(
        hf_hub_id='timm/', url=_RELEASE + 'hbonet_0_8_96x96.pth', input_size=(3, 96, 96), pool_size=(3, 3)),
    'hbonet_035.r192_in1k': _cfg(
        hf_hub_id='timm/', url=_RELEASE + 'hbonet_0_35_192x192.pth', input_size=(3, 192, 192), pool_size=(6, 6)),
    'hbonet_035.r160_in1k': _cfg(
        hf_hub_id='timm/', url=_RELEASE + 'hbonet_0_35_160x160.pth', input_size=(3, 160, 160), pool_size=(5, 5)),
    'hbonet_035.r128_in1k': _cfg(
        hf_hub_id='timm/', url=_RELEASE + 'hbonet_0_35_128x128.pth', input_size=(3, 128, 128), pool_size=(4, 4)),
    'hbonet_035.r96_in1k': _cfg(
        hf_hub_id='timm/', url=_RELEASE + 'hbonet_0_35_96x96.pth', input_size=(3, 96, 96), pool_size=(3, 3)),
    'hbonet_050_d8.in1k': _cfg(hf_hub_id='timm/', url=_RELEASE + 'variant/hbonet_0_5_8_divisible.pth'),
    'hbonet_060.r192_in1k': _cfg(
        hf_hub_id='timm/', url=_RELEASE + 'variant/hbonet_0_6_192x192.pth', input_size=(3, 192, 192), pool_size=(6, 6)),
    'hbonet_025_d8.in1k': _cfg(hf_hub_id='timm/', url=_RELEASE + 'variant/hbonet_0_25_8_divisible.pth'),
    'hbonet_025_4x_d8.in1k': _cfg(hf_hub_id='timm/', url=_RELEASE + 'variant/hbonet_0_25_4x_8_divisible.pth'),
    'hbonet_025_8x_d8.in1k': _cfg(hf_hub_id='timm/', url=_RELEASE + 'variant/hbonet_0_25_8x_8_divisible.pth'),
})


def _create_hbonet(variant: str, pretrained: bool = False, **kwargs: Any) -> HBONet:
    bn_args = resolve_bn_args(kwargs)
    if bn_args:
        kwargs['norm_layer'] = partial(get_norm_layer(kwargs.get('norm_layer', nn.BatchNorm2d)), **bn_args)
    model = build_model_with_cfg(
        HBONet, variant, pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3, 4), flatten_sequential=True),
        **kwargs,
    )
    return model


@register_model
def hbonet_100(pretrained: bool = False, **kwargs: Any) -> HBONet:
    model_args = dict(width=1.0)
    return _create_hbonet('hbonet_100', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def hbonet_080(pretrained: bool = False, **kwargs: Any) -> HBONet:
    model_args = dict(width=0.8)
    return _create_hbonet('hbonet_080', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def hbonet_060(pretrained: bool = False, **kwargs: Any) -> HBONet:
    model_args = dict(width=0.6)
    return _create_hbonet('hbonet_060', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def hbonet_050(pretrained: bool = False, **kwargs: Any) -> HBONet:
    model_args = dict(width=0.5, divisor=2)
    return _create_hbonet('hbonet_050', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def hbonet_035(pretrained: bool = False, **kwargs: Any) -> HBONet:
    model_args = dict(width=0.35)
    return _create_hbonet('hbonet_035', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def hbonet_025(pretrained: bool = False, **kwargs: Any) -> HBONet:
    model_args = dict(width=0.25, divisor=2)
    return _create_hbonet('hbonet_025', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def hbonet_010(pretrained: bool = False, **kwargs: Any) -> HBONet:
    model_args = dict(width=0.1, divisor=4)
    return _create_hbonet('hbonet_010', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def hbonet_050_d8(pretrained: bool = False, **kwargs: Any) -> HBONet:
    model_args = dict(width=0.5)
    return _create_hbonet('hbonet_050_d8', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def hbonet_025_d8(pretrained: bool = False, **kwargs: Any) -> HBONet:
    model_args = dict(width=0.25)
    return _create_hbonet('hbonet_025_d8', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def hbonet_025_4x_d8(pretrained: bool = False, **kwargs: Any) -> HBONet:
    model_args = dict(width=0.25, rates=(4, 4, 4, 2, 2))
    return _create_hbonet('hbonet_025_4x_d8', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def hbonet_025_8x_d8(pretrained: bool = False, **kwargs: Any) -> HBONet:
    model_args = dict(width=0.25, rates=(8, 8, 4, 2, 2))
    return _create_hbonet('hbonet_025_8x_d8', pretrained=pretrained, **dict(model_args, **kwargs))
