#!/usr/bin/env python3
"""Draw the harmonious bottleneck at rates 2, 4 and 8 and strides 1 and 2, with the sizes that its layers return."""
import argparse
import itertools
from pathlib import Path
from typing import List, Tuple

import torch
from script_utils import requirements, run_script, write_figure

from timm_hbonet.blocks import HarmoniousBottleneck

with requirements():
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

CHANNELS, SIZE = 72, 56
PASSED, ADDED, COMPUTED = '#f0a04b', '#9ecae1', '#3b7cb5'
CHANNEL_WIDTH, PIXEL_HEIGHT, GAP = 0.5 / CHANNELS, 2 / SIZE, 1.45  # in the axes' units


def trace(rate: int, stride: int) -> List[Tuple[str, int, int]]:
    """Run a block, and get what leads to each feature map, its channels and its size, from the input to the output."""
    block = HarmoniousBottleneck(CHANNELS, CHANNELS, stride, rate=rate).eval()
    layers = {m: '5×5 ↓2\n1×1' for name, m in block.contract.named_children() if name.startswith('conv_pw')}
    layers[block.conv_pwl] = '3×3\n1×1'
    if block.has_skip:
        layers[block.expand] = f'nearest\n×{rate // stride}'
    found = [('', CHANNELS, SIZE)]
    for layer in layers:
        layer.register_forward_hook(lambda m, _, x: found.append((layers[m], x.shape[1], x.shape[-1])))
    with torch.inference_mode():
        x = block(torch.zeros(1, CHANNELS, SIZE, SIZE))
    return [*found, ('5×5' if block.has_skip else '', x.shape[1], x.shape[-1])]


def draw_block(axes: Axes, rate: int, stride: int) -> None:
    """Draw the feature maps of a block, as wide as their channels and as high as their size."""
    arrow = dict(arrowstyle='-|>', color='black', shrinkA=0, shrinkB=0)
    quarter = CHANNELS * CHANNEL_WIDTH / 4  # middle of the half that is added, from the left of the input
    pool = '2×2 average pool, ' if stride == 2 else ''
    feature_maps = trace(rate, stride)
    colors = [(COMPUTED,) for _ in feature_maps]
    colors[0], colors[-1] = (ADDED if rate > stride else 'white', PASSED), (PASSED, COMPUTED)
    left, right = 0, 0
    for i, (operation, chs, size) in enumerate(feature_maps):
        width, height = chs * CHANNEL_WIDTH, size * PIXEL_HEIGHT
        is_added = i == len(feature_maps) - 1 and operation != ''
        if i > 0:
            left = right + GAP + 0.3 * is_added
            axes.annotate('', (left, 0), (right, 0), arrowprops=arrow)
            axes.text((left + right + 0.3 * is_added) / 2, 0.1, operation, ha='center', va='bottom', fontsize=9)
        part = width / len(colors[i])
        axes.bar(
            [left + j * part for j in range(len(colors[i]))], height, part, -height / 2, align='edge', color=colors[i],
            edgecolor='black', lw=0.8)
        axes.text(left + width / 2, -height / 2 - 0.1, f'{size}×{size}\n{chs} ch', ha='center', va='top', fontsize=9)
        if is_added:
            plus = right + 0.4
            axes.plot([quarter, quarter, plus, plus], [1, 1.4, 1.4, 0], color='black', lw=1)
            axes.plot(plus, 0, 'o', color='white', markeredgecolor='black', markersize=10)
            axes.text(plus, -0.02, '+', ha='center', va='center', fontsize=11)
            axes.text(1.2, 1.45, f'{pool}added', va='bottom')
        right = left + width
    axes.plot([3 * quarter, 3 * quarter, left + quarter], [1, 2.1, 2.1], color='black', lw=1)
    axes.annotate('', (left + quarter, height / 2), (left + quarter, 2.1), arrowprops=arrow)
    axes.text(1.2, 2.15, f'{pool}passed through', va='bottom')
    axes.set_title(f'Rate {rate}, stride {stride}', loc='left', fontweight='bold', fontsize=11)
    axes.set(xlim=(-0.4, 14.4), ylim=(-2, 2.7), aspect='equal')
    axes.axis('off')


def draw() -> Figure:
    """Draw the blocks of all rates and strides."""
    figure = Figure(figsize=(11, 7), dpi=130, layout='constrained')
    blocks = itertools.product((2, 4, 8), (1, 2))
    for axes, (rate, stride) in zip(figure.subplots(3, 2).flat, blocks, strict=True):
        draw_block(axes, rate, stride)
    legend = {'half that is passed through': PASSED, 'half that is added': ADDED, 'computed': COMPUTED}
    figure.legend(
        handles=[Patch(facecolor=color, edgecolor='black', label=label) for label, color in legend.items()],
        loc='outside lower center', ncols=3, frameon=False,
        title='Height: size of the feature map. Width: channels (ch). 5×5 and 3×3 convolutions are depthwise.')
    return figure


def main(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    write_figure(args.output, draw(), colors=64)
    print(args.output)


if __name__ == '__main__':
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument(
        '--output', type=Path, default=Path(__file__).parents[1] / 'docs' / 'block.png', metavar='FILE',
        help='PNG file to write (default: docs/block.png)')
    run_script(main, options)
