""" HBONet

A mobile network of harmonious bottlenecks: each block contracts the feature map, works on it with more channels, and
expands it back, while half of the output channels are taken from the block's input as they are.

Paper: `HBONet: Harmonious Bottleneck on Two Orthogonal Dimensions` - https://arxiv.org/abs/1908.03888

Original implementation, weights and protocols, by the authors Duo Li, Aojun Zhou and Anbang Yao:
https://github.com/d-li14/HBONet
"""
import copy
import math
from functools import partial
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    ConvNormAct,
    DropPath,
    FrozenBatchNormAct2d,
    LayerType,
    calculate_drop_path_rates,
    create_classifier,
    make_divisible,
)
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models._efficientnet_builder import resolve_bn_args
from timm.models._features import feature_take_indices
from timm.models._helpers import clean_state_dict
from torch.jit import Final
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .pretrained import build_model_with_cfg
from .releases import RELEASES

__all__ = ['HBONet']


class RepConvNormAct(ConvNormAct):
    """Convolution, norm and activation, of which `timm.utils.reparameterize_model` folds the norm."""

    def fuse(self) -> nn.Module:
        """Fold the norm with its running statistics into the convolution, for inference.

        Returns:
            The convolution with its activation, or this module as it is if its norm is no batch norm with statistics.
        """
        norm = self.bn
        if not isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNormAct2d)) or norm.running_mean is None:
            return self
        conv = copy.deepcopy(self.conv)
        # a depthwise transposed convolution has its output channels first too
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        return nn.Sequential(conv, getattr(norm, 'act', nn.Identity()))


class InvertedResidual(nn.Module):
    """Inverted residual block of MobileNet-V2.

    Not timm's, which rounds the hidden width to a multiple of 8: `hbonet_025` has 300 hidden channels, not 304.

    Paper: `MobileNetV2: Inverted Residuals and Linear Bottlenecks` - https://arxiv.org/abs/1801.04381
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            stride: int = 1,
            dilation: int = 1,
            exp_ratio: int = 1,
            act_layer: LayerType = nn.ReLU6,
            norm_layer: LayerType = nn.BatchNorm2d,
            drop_path: float = 0.,
            device=None,
            dtype=None,
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
        x = self.conv_pw(x)
        x = self.conv_dw(x)
        x = self.conv_pwl(x)
        if self.has_skip:
            x = self.drop_path(x) + shortcut
        return x


class AvgPool2dCeil(nn.Module):
    """2x2 average pooling that rounds sizes up, as the strided convolutions do, of the pixels that there are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        is_scripting = torch.jit.is_scripting()
        if not is_scripting and (isinstance(x.shape[-2], torch.SymInt) or isinstance(x.shape[-1], torch.SymInt)):
            # ceil_mode would branch on a size that an export leaves open
            return F.avg_pool2d(F.pad(x, (0, 1, 0, 1), mode='replicate'), 2)
        return F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)


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
        self.stride = stride
        self.mode = mode
        self.conv = None
        if mode == 'deconv':
            self.conv = RepConvNormAct(chs, chs, apply_act=False, norm_layer=norm_layer, **dd)
            self.conv.conv = nn.ConvTranspose2d(chs, chs, 2 * stride, stride, stride // 2, groups=chs, bias=False, **dd)

    def forward(self, x: torch.Tensor, size: List[int]) -> torch.Tensor:
        if self.conv is None:
            return F.interpolate(x, size=size, mode=self.mode)
        # the strided convolutions round sizes up, so that the transposed one can exceed the size
        return self.conv(x)[:, :, :size[0], :size[1]]


class HarmoniousBottleneck(nn.Module):
    """Harmonious bottleneck (HBO) block.

    Strided depthwise and pointwise convolutions contract the feature map by `rate` and expand its channels, then the
    channels are contracted to half of the output and the feature map is expanded back. The other half of the output
    are the last channels of the input. A block of stride 2 ends at half the size of its input, so that one of stride 2
    and rate 2 has no spatial expansion.

    Paper: figure 2 of HBONet.
    """
    has_skip: Final[bool]

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
        conv = partial(RepConvNormAct, act_layer=act_layer, norm_layer=norm_layer, **dd)
        mid_chs = in_chs * exp_ratio
        half_chs = out_chs // 2
        self.rate = rate
        self.half_chs = half_chs
        self.pass_chs = out_chs - half_chs
        self.has_skip = rate > stride
        if self.pass_chs > in_chs:
            raise ValueError(
                f'A harmonious bottleneck of {out_chs} channels passes {self.pass_chs} channels of its input through, '
                f'but its input has {in_chs}. Use a larger `width` or a smaller `divisor`.')

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
        self.pool = AvgPool2dCeil() if stride == 2 else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0. and self.has_skip else nn.Identity()
        if self.has_skip:
            self.expand = SpatialExpansion(half_chs, rate // stride, spatial_expansion, norm_layer=norm_layer, **dd)
            self.conv_dw_end = conv(half_chs, half_chs, 5, groups=half_chs, apply_act=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = self.pool(x)
        x = self.contract(x)
        x = self.conv_dw(x)
        x = self.conv_pwl(x)
        if self.has_skip:
            x = self.expand(self.drop_path(x), shortcut.shape[-2:]) + shortcut[:, :self.half_chs]
            x = self.conv_dw_end(x)
        return torch.cat([shortcut[:, -self.pass_chs:], x], dim=1)


class HarmoniousStages(nn.Sequential):
    """Stages of the network, of which `timm.utils.reparameterize_model` makes a graph for inference.

    Attributes:
        channel_multiple: Number that the graph pads channels to multiples of.
    """
    channel_multiple = 8

    def fuse(self) -> nn.Module:
        """Make the graph, or return the stages as they are if they hold other blocks or norms."""
        from .inference import create_inference_stages
        return create_inference_stages(self, self.channel_multiple) or self


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
        self.conv_stem = RepConvNormAct(in_chans, prev_chs, 3, 2, **kwargs)

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
                    blocks += [RepConvNormAct(prev_chs, out_chs, 1, apply_act=False, **kwargs)]
                prev_chs = out_chs
                dilation = next_dilation
            stages += [nn.Sequential(*blocks)]
        self.feature_info += [dict(num_chs=prev_chs, reduction=net_stride, module=f'blocks.{len(stages) - 1}')]
        self.stage_ends = [int(f['module'].split('.')[-1]) for f in self.feature_info]
        self.blocks = HarmoniousStages(*stages)

        # Head + Pooling
        self.num_features = round_chs(1600 * max(width, 1.0))
        self.conv_head = RepConvNormAct(prev_chs, self.num_features, 1, **kwargs)
        self.global_pool, self.classifier = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

        self.apply(self._init_weights)
        self._register_load_state_dict_pre_hook(_rename_release, with_module=True)

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


# The convolutions of the release's blocks, by the numbers that they have in it, each is followed by its norm
_RELEASE_CONVS = {
    'ir_e1': {0: 'conv_dw', 3: 'conv_pwl'},
    'ir_e6': {0: 'conv_pw', 3: 'conv_dw', 6: 'conv_pwl'},
    'hbo_r2': {0: 'contract.conv_dw1', 2: 'contract.conv_pw1', 5: 'conv_dw', 8: 'conv_pwl'},
    'hbo_r4': {
        0: 'contract.conv_dw1', 2: 'contract.conv_pw1', 5: 'contract.conv_dw2', 7: 'contract.conv_pw2',
        10: 'conv_dw', 12: 'conv_pwl'},
    'hbo_r8': {
        0: 'contract.conv_dw1', 2: 'contract.conv_pw1', 5: 'contract.conv_dw2', 7: 'contract.conv_pw2',
        10: 'contract.conv_dw3', 12: 'contract.conv_pw3', 15: 'conv_dw', 17: 'conv_pwl'},
}


def _release_names(model: HBONet) -> Dict[str, str]:
    """Names of the convolutions and norms, by those that they have in the release."""
    convs = {('features.0', 0): 'conv_stem', ('conv', 0): 'conv_head'}
    blocks = [(f'blocks.{i}.{j}', block) for i, stage in enumerate(model.blocks) for j, block in enumerate(stage)]
    for i, (name, block) in enumerate(blocks, 1):
        if isinstance(block, RepConvNormAct):
            convs[f'features.{i}', 0] = name
            continue
        if isinstance(block, InvertedResidual):
            block_type = 'ir_e1' if isinstance(block.conv_pw, nn.Identity) else 'ir_e6'
        else:
            block_type = f'hbo_r{block.rate}'
            convs[f'features.{i}.upconv', 0] = f'{name}.conv_dw_end'
        convs.update({
            (f'features.{i}.conv', number): f'{name}.{conv}' for number, conv in _RELEASE_CONVS[block_type].items()})
    names = {f'{prefix}.{number}': f'{name}.conv' for (prefix, number), name in convs.items()}
    names.update({f'{prefix}.{number + 1}': f'{name}.bn' for (prefix, number), name in convs.items()})
    return names


def _rename_release(
        model: HBONet,
        state_dict: Dict[str, Any],
        prefix: str,
        local_metadata: Dict[str, Any],
        strict: bool,
        missing_keys: List[str],
        unexpected_keys: List[str],
        error_msgs: List[str],
) -> None:
    """Rename the tensors of the release's layout when they are loaded, in place. A hook of `load_state_dict`."""
    if f'{prefix}features.0.0.weight' not in state_dict:
        return
    if model.spatial_expansion != 'nearest':
        error_msgs.append(
            f"The released weights are for `spatial_expansion='nearest'`, got {model.spatial_expansion!r}. "
            f'Use that, or train this model from scratch.')
    names = _release_names(model)
    for key in [k for k in state_dict if k.startswith(prefix)]:
        layer, _, tensor = key[len(prefix):].rpartition('.')
        state_dict[f'{prefix}{names.get(layer, layer)}.{tensor}'] = state_dict.pop(key)


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
    state_dict = dict(state_dict)
    _rename_release(model, state_dict, '', {}, True, [], [], [])
    # not left to load_state_dict(): timm makes it lenient where it replaces the classifier
    expected = {k: v for k, v in model.state_dict().items() if not k.endswith('.num_batches_tracked')}
    adapted = ('conv_stem.conv.weight', 'classifier.weight', 'classifier.bias')
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
        'first_conv': 'conv_stem.conv', 'classifier': 'classifier',
        'paper_ids': 'arXiv:1908.03888',
        'paper_name': 'HBONet: Harmonious Bottleneck on Two Orthogonal Dimensions',
        'origin_url': 'https://github.com/d-li14/HBONet', 'license': 'apache-2.0',
        **kwargs
    }


default_cfgs = generate_default_cfgs({
    release.name: _cfg(
        hf_hub_id=release.hf_hub_id,
        url=release.url,
        input_size=(3, release.input_size, release.input_size),
        pool_size=(release.input_size // 32, release.input_size // 32),
    ) for release in RELEASES
})


def _create_hbonet(variant: str, pretrained: bool = False, **kwargs: Any) -> HBONet:
    bn_args = resolve_bn_args(kwargs)
    if bn_args:
        kwargs['norm_layer'] = partial(kwargs.get('norm_layer', nn.BatchNorm2d), **bn_args)
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
