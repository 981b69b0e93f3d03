""" HBONet

A mobile network of harmonious bottlenecks: each block contracts the feature map, works on it with more channels, and
expands it back, while half of the output channels are taken from the block's input as they are.

Paper: `HBONet: Harmonious Bottleneck on Two Orthogonal Dimensions` - https://arxiv.org/abs/1908.03888

Original implementation, weights and protocols, by the authors Duo Li, Aojun Zhou and Anbang Yao:
https://github.com/d-li14/HBONet
"""
import math
from functools import partial
from itertools import zip_longest
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerType, calculate_drop_path_rates, create_classifier, get_norm_layer, make_divisible
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models._efficientnet_builder import resolve_bn_args
from timm.models._features import feature_take_indices
from timm.utils import natural_key
from torch.types import Device

from .blocks import HarmoniousBottleneck, InvertedResidual, RepConvNormAct
from .inference import HarmoniousStages
from .weights import build_model_with_cfg

__all__ = ['HBONet']

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
    """HBONet: a stem, nine stages of blocks, and a head."""

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
            device: Device = None,
            dtype: Optional[torch.dtype] = None,
    ):
        """
        Args:
            width: Multiplier of all widths but the head's, which only grows above 1.
            divisor: Number that all widths are multiples of.
            depths: Number of blocks of each of the 9 stages.
            rates: Rate of the spatial contraction, 2, 4 or 8, in each of the 5 stages of harmonious bottlenecks.
            spatial_expansion: 'nearest', which released weights need, or 'deconv', a depthwise transposed convolution.
            num_classes, in_chans: Number of classes, 0 for no classifier, and of image channels.
            global_pool: Type of global pooling, '' for none (without a classifier).
            output_stride: Ratio of input to output size, 32 or 16. 16 dilates the last stages.
            act_layer, norm_layer, drop_rate: Activation, normalization, and dropout of the classifier.
            drop_path_rate: Stochastic depth rate of the last block, blocks with a shortcut have it from 0 upwards.

        Raises:
            ValueError: If `depths`, `rates`, `spatial_expansion` or `output_stride` is not as above, or no half fits.
        """
        super().__init__()
        if len(depths) != 9 or len(rates) != 5 or not set(rates) <= {2, 4, 8}:
            raise ValueError(f'`depths` must be 9 numbers, `rates` 5 out of 2, 4 and 8, got {depths} and {rates}.')
        if spatial_expansion not in ('nearest', 'deconv'):
            raise ValueError(f"`spatial_expansion` must be 'nearest' or 'deconv', got {spatial_expansion!r}.")
        if output_stride not in (16, 32):
            raise ValueError(f'`output_stride` must be 16 or 32, got {output_stride!r}.')
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        round_chs = partial(make_divisible, divisor=divisor)
        kwargs: Dict[str, Any] = dict(act_layer=act_layer, norm_layer=norm_layer, device=device, dtype=dtype)
        prev_chs = round_chs(32 * width)
        self.conv_stem = RepConvNormAct(in_chans, prev_chs, 3, 2, **kwargs)

        stages = []
        self.feature_info = []
        stage_rates = iter(rates)
        drop_path_rates: Iterator[Any] = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        net_stride, dilation = 2, 1
        for stage_idx, (block_type, exp_ratio, chs, stride) in enumerate(_STAGE_CFG):
            if stride > 1:  # the last stage of each reduction is a feature
                self.feature_info += [dict(num_chs=prev_chs, reduction=net_stride, module=f'blocks.{stage_idx - 1}')]
            rate = next(stage_rates) if block_type == 'hbo' else 0
            out_chs = round_chs(chs * width)
            blocks: List[nn.Module] = []
            for i in range(depths[stage_idx]):
                block_stride, next_dilation = stride if i == 0 else 1, dilation
                if net_stride * block_stride > output_stride:
                    block_stride, next_dilation = 1, dilation * block_stride
                net_stride *= block_stride
                block_args = (prev_chs, out_chs, block_stride, exp_ratio, next(drop_path_rates))
                if block_type == 'ir':
                    blocks += [InvertedResidual(*block_args, dilation=dilation, **kwargs)]
                elif block_type == 'hbo':
                    blocks += [HarmoniousBottleneck(*block_args, rate, spatial_expansion, **kwargs)]
                else:
                    blocks += [RepConvNormAct(prev_chs, out_chs, 1, apply_act=False, **kwargs)]
                prev_chs, dilation = out_chs, next_dilation
            stages += [nn.Sequential(*blocks)]
        self.feature_info += [dict(num_chs=prev_chs, reduction=net_stride, module=f'blocks.{len(stages) - 1}')]
        self.stage_ends = [int(f['module'].split('.')[-1]) for f in self.feature_info]
        self.blocks: nn.Sequential = HarmoniousStages(*stages)

        self.num_features = round_chs(1600 * max(width, 1.0))
        self.conv_head: nn.Module = RepConvNormAct(prev_chs, self.num_features, 1, **kwargs)
        self.reset_classifier(num_classes, global_pool)

        self.apply(self._init_weights)
        self._register_load_state_dict_pre_hook(rename_release, with_module=True)

    def _init_weights(self, m: nn.Module) -> None:
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
            # fan out without regard to groups, as in the release
            nn.init.normal_(m.weight, std=math.sqrt(2. / (m.kernel_size[0] * m.kernel_size[1] * m.out_channels)))
        elif isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, std=0.01)
            nn.init.zeros_(m.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        blocks = r'^blocks\.(\d+)' if coarse else r'^blocks\.(\d+)\.(\d+)'
        return dict(stem=r'^conv_stem', blocks=[(blocks, None), (r'^conv_head', (99999,))])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Reset the classifier, to none for 0 classes, and the global pooling unless None."""
        param = next(self.parameters())
        self.num_classes = num_classes
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool  # type: ignore[has-type]
        self.global_pool, self.classifier = (layer.train(self.training) for layer in create_classifier(
            self.num_features, num_classes, pool_type=pool_type, device=param.device, dtype=param.dtype))
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Forward features that returns intermediates, those of `feature_info`. There is no norm to apply to them."""
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.stage_ends), indices)
        take_indices = [self.stage_ends[i] for i in take_indices]

        x = self.conv_stem(x)
        if torch.jit.is_scripting() or not stop_early:  # can't slice blocks in torchscript
            blocks = self.blocks
        else:
            blocks = self.blocks[:self.stage_ends[max_index] + 1]
        for feat_idx, stage in enumerate(blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_seq(stage, x)
            else:
                x = stage(x)
            if feat_idx in take_indices:
                intermediates.append(x)

        if intermediates_only:
            return intermediates
        if feat_idx == self.stage_ends[-1]:
            x = self.conv_head(x)
        return x, intermediates

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Prune layers not required for specified intermediates."""
        take_indices, max_index = feature_take_indices(len(self.stage_ends), indices)
        del self.blocks[self.stage_ends[max_index] + 1:]
        if prune_norm or prune_head or max_index < len(self.stage_ends) - 1:
            # features now end at the last kept tap, the head is sized for the final features so it goes too
            self.num_features = self.feature_info[max_index]['num_chs']
            self.conv_head = nn.Identity()
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.conv_head(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = F.dropout(self.global_pool(x), p=self.drop_rate, training=self.training)
        return x if pre_logits else self.classifier(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def rename_release(model: HBONet, state_dict: Dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename the tensors of the release's layout to those of a network, in place. A hook of `load_state_dict`."""
    if f'{prefix}features.0.0.weight' not in state_dict:
        return
    features, head = f'{prefix}features.', f'{prefix}conv.'
    theirs = sorted(
        {k.rpartition('.')[0] for k in state_dict if k.startswith((features, head))},
        key=lambda k: (k.startswith(head), natural_key(k)))
    layers = [k for k, m in model.named_modules(prefix=prefix[:-1]) if isinstance(m, RepConvNormAct)]
    ours = [f'{k}.{module}' for k in layers for module in ('conv', 'bn')]
    if isinstance(model.conv_head, nn.Identity):  # pruned to its first layers
        del theirs[len(ours):]
    kernels = {k: v.shape[2:] for k, v in {**state_dict, **model.state_dict(prefix=prefix)}.items()}
    for found, expected in zip_longest(theirs, ours, fillvalue='nothing'):
        if kernels.get(f'{found}.weight') != kernels.get(f'{expected}.weight'):
            raise RuntimeError(f'The checkpoint is of another network: it has {found} where {expected} should be.')
    names = dict(zip(theirs, ours, strict=True))
    for key in list(state_dict):
        layer, tensor = key.rpartition('.')[::2]
        state_dict[f'{names[layer]}.{tensor}' if layer in names else key] = state_dict.pop(key)


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: HBONet) -> Dict[str, Any]:
    """Rename the tensors of the release's layout, of which timm adapts stem and classifier by their names in ours."""
    state_dict = dict(state_dict)
    rename_release(model, state_dict, '')
    return state_dict


def _cfg(file: str = '', size: int = 224, **kwargs: Any) -> Dict[str, Any]:
    return {
        'url': file and _RELEASE + file, 'hf_hub_id': 'timm/', 'num_classes': 1000,
        'input_size': (3, size, size), 'pool_size': (size // 32, size // 32),
        'crop_pct': 0.875, 'interpolation': 'bilinear', 'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv_stem.conv', 'classifier': 'classifier', 'paper_ids': 'arXiv:1908.03888',
        'paper_name': 'HBONet: Harmonious Bottleneck on Two Orthogonal Dimensions',
        'origin_url': 'https://github.com/d-li14/HBONet', 'license': 'apache-2.0',
        **kwargs
    }


_RELEASE = 'https://github.com/d-li14/HBONet/raw/e9a76c15e3847b0f032a7000fe0c8138d6f2eb10/pretrained/'

# behind the name of each file, the git blob id that the tree of that commit has for it
default_cfgs = generate_default_cfgs({
    'hbonet_100.in1k': _cfg('hbonet_1_0.pth#7414b8c39d9e82b8d4922086c4f99e9ac9e384f6'),
    'hbonet_080.in1k': _cfg('hbonet_0_8.pth#c46ebaf81af544b59c31497ec22f6b71210e07d4'),
    'hbonet_050.in1k': _cfg('hbonet_0_5.pth#314ef51c531bad4fb76ea8eb0ace01b364a68ac1'),
    'hbonet_035.in1k': _cfg('hbonet_0_35.pth#c9f111a1e9a2b144282472a4ff9cb6f6f3f1e664'),
    'hbonet_025.in1k': _cfg('hbonet_0_25.pth#594ab57232e911dbf8143e31d14a02bcfaee2171'),
    'hbonet_010.in1k': _cfg('hbonet_0_1.pth#b3d6c5d058e4a42e23bbfe354dfe4e28f945a6a5'),
    'hbonet_080.r192_in1k': _cfg('hbonet_0_8_192x192.pth#8bbabc116ddfcd4a5084f43d5b37bd5376f4edde', 192),
    'hbonet_080.r160_in1k': _cfg('hbonet_0_8_160x160.pth#41c5f1023a3338a87efcb4620ee07135802c9cf2', 160),
    'hbonet_080.r128_in1k': _cfg('hbonet_0_8_128x128.pth#40c3724180e00e9f4500a6a5fedb368ea82b55c3', 128),
    'hbonet_080.r96_in1k': _cfg('hbonet_0_8_96x96.pth#b145d76e9281b93720a9c18305d04003900844be', 96),
    'hbonet_035.r192_in1k': _cfg('hbonet_0_35_192x192.pth#383337af685b2e100bf7928c609f84fc69da1843', 192),
    'hbonet_035.r160_in1k': _cfg('hbonet_0_35_160x160.pth#7a640d3859b50f1e2bd30c7169b3de1065485f6d', 160),
    'hbonet_035.r128_in1k': _cfg('hbonet_0_35_128x128.pth#3e630e41efe98877465ebbe302ce1fda8b7f5a94', 128),
    'hbonet_035.r96_in1k': _cfg('hbonet_0_35_96x96.pth#7573489c50d0e7dcc698d209acab606e07f2cc76', 96),
    'hbonet_050_d8.in1k': _cfg('variant/hbonet_0_5_8_divisible.pth#0b6d5fa2f7534b952d3b6e8857401be9f8a648e9'),
    'hbonet_060.r192_in1k': _cfg('variant/hbonet_0_6_192x192.pth#8980e46f7e2a3479b98d2ee81f5a7a863397d014', 192),
    'hbonet_025_d8.in1k': _cfg('variant/hbonet_0_25_8_divisible.pth#21d65af0058a11e626adaeb4d4f5c842ddfe466c'),
    'hbonet_025_4x_d8.in1k': _cfg('variant/hbonet_0_25_4x_8_divisible.pth#3162e5b2d91c07858786619a0d90d5d28f6ecce0'),
    'hbonet_025_8x_d8.in1k': _cfg('variant/hbonet_0_25_8x_8_divisible.pth#ef78dbd1671524bc1751dc2d3d763ccc197e1f21'),
})


def _create_hbonet(variant: str, pretrained: bool = False, **kwargs: Any) -> HBONet:
    if bn_args := resolve_bn_args(kwargs):
        kwargs['norm_layer'] = partial(get_norm_layer(kwargs.get('norm_layer', nn.BatchNorm2d)), **bn_args)
    return build_model_with_cfg(
        HBONet, variant, pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3, 4), flatten_sequential=True),
        **kwargs,
    )


@register_model
def hbonet_100(pretrained: bool = False, **kwargs: Any) -> HBONet:
    return _create_hbonet('hbonet_100', pretrained, **kwargs)


@register_model
def hbonet_080(pretrained: bool = False, **kwargs: Any) -> HBONet:
    return _create_hbonet('hbonet_080', pretrained, **{'width': 0.8, **kwargs})


@register_model
def hbonet_060(pretrained: bool = False, **kwargs: Any) -> HBONet:
    return _create_hbonet('hbonet_060', pretrained, **{'width': 0.6, **kwargs})


@register_model
def hbonet_050(pretrained: bool = False, **kwargs: Any) -> HBONet:
    return _create_hbonet('hbonet_050', pretrained, **{'width': 0.5, 'divisor': 2, **kwargs})


@register_model
def hbonet_035(pretrained: bool = False, **kwargs: Any) -> HBONet:
    return _create_hbonet('hbonet_035', pretrained, **{'width': 0.35, **kwargs})


@register_model
def hbonet_025(pretrained: bool = False, **kwargs: Any) -> HBONet:
    return _create_hbonet('hbonet_025', pretrained, **{'width': 0.25, 'divisor': 2, **kwargs})


@register_model
def hbonet_010(pretrained: bool = False, **kwargs: Any) -> HBONet:
    return _create_hbonet('hbonet_010', pretrained, **{'width': 0.1, 'divisor': 4, **kwargs})


@register_model
def hbonet_050_d8(pretrained: bool = False, **kwargs: Any) -> HBONet:
    return _create_hbonet('hbonet_050_d8', pretrained, **{'width': 0.5, **kwargs})


@register_model
def hbonet_025_d8(pretrained: bool = False, **kwargs: Any) -> HBONet:
    return _create_hbonet('hbonet_025_d8', pretrained, **{'width': 0.25, **kwargs})


@register_model
def hbonet_025_4x_d8(pretrained: bool = False, **kwargs: Any) -> HBONet:
    return _create_hbonet('hbonet_025_4x_d8', pretrained, **{'width': 0.25, 'rates': (4, 4, 4, 2, 2), **kwargs})


@register_model
def hbonet_025_8x_d8(pretrained: bool = False, **kwargs: Any) -> HBONet:
    return _create_hbonet('hbonet_025_8x_d8', pretrained, **{'width': 0.25, 'rates': (8, 8, 4, 2, 2), **kwargs})
