#!/usr/bin/env python3
"""Tables and pictures of what benchmark.py measured.

    python scripts/benchmark_report.py FOLDER

writes benchmark.md, accuracy_latency.png and growth.png beside benchmark.json. benchmark.py does so at its end; run
this after a change of the report.
"""
import argparse
import itertools
import json
import math
from pathlib import Path
from typing import Any, Dict

from script_utils import BadInput, requirements, run_script, write_figure, write_file

with requirements():
    import pandas as pd
    import tabulate  # noqa: F401, pandas needs it for Markdown
    from matplotlib.figure import Figure

BASELINES = ('mobilenetv2_100', 'mobilenetv3_large_100')  # that ratios are to, beside the authors' code
TIMES = ['median_ms', 'lower_quartile_ms', 'upper_quartile_ms']


def pivot(rows: pd.DataFrame, values: str, columns: str = 'mode') -> pd.DataFrame:
    """Table of models by modes, both in the order of the rows."""
    table = rows.pivot(index='model', columns=columns, values=values)
    return table.reindex(index=rows['model'].unique(), columns=rows[columns].unique())


def to_markdown(table: pd.DataFrame, spec: str = '') -> str:
    """Format a table as Markdown, numbers by `spec`, nothing where there is none."""
    cells = table.map(lambda value: '' if pd.isna(value) else format(value, spec))
    names = len(table.index.names)
    return cells.reset_index().to_markdown(
        index=False, disable_numparse=True, colalign=['left'] * names + ['right'] * len(table.columns))


def compute_ratios(rows: pd.DataFrame) -> pd.DataFrame:
    """Median times of our networks over those of the authors' code at the same width, and over those of peers."""
    times, ratios = pivot(rows, 'median_ms'), {}
    for over in ('authors', *BASELINES):
        for name in times.index[times.index.str.startswith('hbonet_')]:
            base = name.replace('hbonet', over) if over == 'authors' else over
            if base in times.index:
                ratios[name, base] = times.loc[name] / times.loc[base]
    index = pd.MultiIndex.from_tuples(ratios, names=['model', 'over'])
    return pd.DataFrame(ratios.values(), index, times.columns)


def format_profile(profile: Dict[str, Any]) -> str:
    """Format what ONNX Runtime's profiler counted and timed by type of node."""
    rows = pd.DataFrame(
        [(model, name, *values) for model, types in profile.items() for name, values in types.items()],
        columns=['model', 'type', 'exported', 'optimized', 'ms'])
    rows['cell'] = [f'{row.exported} / {row.optimized} / {row.ms:.2f}' for row in rows.itertuples()]
    table = pivot(rows, 'cell', 'type')
    outside = rows.assign(ms=rows['ms'].where(~rows['type'].str.contains('Conv'), 0))
    for title, counted in (('outside convolutions', outside), ('all', rows)):
        table.insert(0, title, counted.groupby('model')['ms'].sum().map('{:.2f}'.format))
    return to_markdown(table)


def format_report(report: Dict[str, Any]) -> str:
    """Format a report as Markdown."""
    machine, settings = report['machine'], report['settings']
    rows = pd.DataFrame(**report['results'])
    failed, rows = rows[rows['error'].notna()], rows[rows['error'].isna()]
    text = [
        '# Benchmark of HBONet and its peers',
        f"{machine['gpu'] or machine['cpu']} ({machine['instructions']}, {machine['cores']} cores), threads: "
        f"{machine['threads']}, {machine['os']}, Python {machine['python']}, "
        + ', '.join(' '.join(item) for item in {**machine['versions'], **machine['environment']}.items()) + '.',
        f"Instruction sets: {' '.join(machine['flags'])}.",
        f"Random weights, images of 224 x 224, medians and quartiles of {settings['rounds']} interleaved rounds. "
        "`reparam`, `compiled` and the runtimes take what timm's `reparameterize_model` returns, which is the same "
        'network where there is nothing to fold.',
    ]
    for part, found in rows[rows['part'] != 'growth'].groupby('part', sort=False):
        product, found = found[found['model'] == 'matmul'], found[found['model'] != 'matmul']
        speed = product.set_index('mode')['gflops_per_second']
        found = found.assign(
            time=[f'{x:.2f} ({low:.2f} to {high:.2f})' for x, low, high in found[TIMES].itertuples(index=False)],
            memory=found['peak_memory_bytes'].astype(float) / 2 ** 20,
            share=found['gflops_per_second'] / [
                speed.get('float16' if mode.endswith('_amp') else 'float32', math.nan) for mode in found['mode']])
        text += [f'## {part.capitalize()}', '### Median time in ms (quartiles)', to_markdown(pivot(found, 'time'))]
        ratios = compute_ratios(found)
        if len(ratios):
            text += ['### Ratios of median times, below 1 where HBONet is faster', to_markdown(ratios, '.3f')]
        text += [
            '### Speed as a share of the dense matrix product',
            f"Of its GFLOP/s in the same rounds, {', '.join(f'{x:.1f} in {name}' for name, x in speed.items())}. "
            'A multiply-add is 2 FLOPs, a training step 3 forward passes.', to_markdown(pivot(found, 'share'), '.1%')]
        if found['memory'].notna().any():
            text += [
                '### Peak memory in MiB', "Most bytes of tensors at once, besides weights and images. Only PyTorch's "
                'allocator can tell.', to_markdown(pivot(found.dropna(subset='memory'), 'memory'), '.1f')]
        if 'file_bytes' in found and found['file_bytes'].notna().any():  # earlier versions did not count them
            sizes = found.assign(size=found['file_bytes'].astype(float) / 1e6).dropna(subset='size')
            text += ['### File size in MB', 'Of what a runtime loads.', to_markdown(pivot(sizes, 'size'), '.2f')]
        if report['profiles'].get(part):
            text += [
                "### ONNX Runtime's profile", 'Milliseconds of a call. By type: nodes in the ONNX model / in the graph '
                'that ONNX Runtime makes of it / milliseconds.', format_profile(report['profiles'][part])]
    failures = [f'{row.model}, {row.mode}, {row.part}: {row.error}' for row in failed.itertuples()]
    for title, lines in (('Failures', failures), ('Skipped', settings['skipped'])):
        if lines:
            text += [f'## {title}', '\n'.join(f'* {line}' for line in lines)]
    return '\n\n'.join(text) + '\n'


def draw_accuracy(rows: pd.DataFrame, top1: Dict[str, float]) -> Figure:
    """Draw top-1 against latency, by batch size."""
    rows = rows.assign(
        top1=rows['model'].map({name.split('.')[0]: value for name, value in top1.items()}),
        ours=rows['model'].str.startswith('hbonet_')).dropna(subset='top1').sort_values('top1')
    parts = list(rows.groupby('batch_size'))
    figure = Figure(figsize=(7 * len(parts) + 2, 6), dpi=110, layout='constrained')
    figure.suptitle('Top-1 on ImageNet-1k as published: HBONet by its authors, the others by timm')
    for axes, (batch_size, found) in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        ours = found[found['ours']]
        line = ours[ours['model'].str.fullmatch(r'hbonet_\d+')]
        axes.plot(line['median_ms'], line['top1'], 'k-')
        axes.plot(ours['median_ms'], ours['top1'], 'ko', label='hbonet')
        for row in ours.itertuples():
            axes.annotate(row.model[7:], (row.median_ms, row.top1), xytext=(6, -12), textcoords='offset points')
        for row, marker in zip(found[~found['ours']].itertuples(), itertools.cycle('sD^vP*X<>p'), strict=False):
            axes.plot(row.median_ms, row.top1, marker, markersize=8, label=row.model)
        title = f"{found['mode'].iloc[0]}, batch size {batch_size}"
        axes.set(title=title, xlabel='median latency in ms', ylabel='top-1 in %')
        axes.margins(0.1)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc='outside right center')
    return figure


def draw_growth(rows: pd.DataFrame) -> Figure:
    """Draw time and peak memory against batch size and against image size."""
    figure = Figure(figsize=(14, 11), dpi=110, layout='constrained')
    rows = rows.assign(peak_memory_mib=rows['peak_memory_bytes'].astype(float) / 2 ** 20)
    panels = itertools.product(
        (('median_ms', 'median time in ms'), ('peak_memory_mib', 'peak memory in MiB')),
        (('batch_size', 'image_size', 224), ('image_size', 'batch_size', 1)))
    for axes, ((value, label), (quantity, other, fixed)) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        chosen = rows[rows[other] == fixed].sort_values(quantity)
        for name, found in chosen.groupby('model', sort=False):
            axes.loglog(found[quantity], found[value], 'o-', label=name)
        axes.set_xticks(chosen[quantity].unique(), chosen[quantity].unique())
        axes.set_xticks([], minor=True)
        title = f"reparam, {other.replace('_', ' ')} {fixed}"
        axes.set(xlabel=quantity.replace('_', ' '), ylabel=label, title=title)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc='outside right center')
    return figure


def write_report(folder: Path) -> str:
    """Write tables and pictures into a folder that has benchmark.json, and return the tables.

    Raises:
        BadInput: If that file is not what benchmark.py writes.
    """
    try:
        report = json.loads((folder / 'benchmark.json').read_text(encoding='utf-8'))
        text = format_report(report)
        rows = pd.DataFrame(**report['results'])
    except (OSError, ValueError, KeyError, TypeError) as e:
        name = folder / 'benchmark.json'
        raise BadInput(f'{name} is not what benchmark.py writes. {type(e).__name__}: {e}') from None
    rows = rows[rows['error'].isna() & (rows['model'] != 'matmul')]
    growth, rows = rows[rows['part'] == 'growth'], rows[rows['part'].str.startswith('batch size')]
    rows = rows[rows['model'].isin({name.split('.')[0] for name in report['top1']})]
    mode = next((mode for mode in ('onnxruntime', 'reparam', *rows['mode']) if mode in set(rows['mode'])), None)
    write_file(folder / 'benchmark.md', text.encode())
    for name, figure in (
            ('accuracy_latency.png', mode and draw_accuracy(rows[rows['mode'] == mode], report['top1'])),
            ('growth.png', len(growth) and draw_growth(growth)),
    ):
        if figure:
            write_figure(folder / name, figure)
        else:
            (folder / name).unlink(missing_ok=True)  # of an earlier run
    return text


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, metavar='FOLDER', help='output folder of benchmark.py')
    return parser


def main(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    print(write_report(args.folder))


if __name__ == '__main__':
    run_script(main, create_parser())
