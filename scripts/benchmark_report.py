#!/usr/bin/env python3
"""Write tables and pictures of what benchmark.py measured: benchmark.md, accuracy_latency.png and growth.png, beside
benchmark.json. benchmark.py does so at its end; run this after a change of the report."""
import argparse
import io
import json
import os
import sys
from pathlib import Path
from typing import Any, Dict, Tuple

try:
    import pandas as pd
    import tabulate  # noqa: F401, pandas needs it for Markdown
    from matplotlib.figure import Figure
except ModuleNotFoundError as e:
    sys.exit(f"benchmark_report.py needs {e.name}, which is not installed. Run: pip install 'timm-hbonet[scripts]'")

PEERS = ('mobilenetv2_100', 'mobilenetv3_large_100')


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that nobody finds half of it."""
    beside = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


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
    for over in ('authors', *PEERS):
        for name in times.index[times.index.str.startswith('hbonet_')]:
            base = name.replace('hbonet', 'authors') if over == 'authors' else over
            if base in times.index:
                ratios[name, base] = times.loc[name] / times.loc[base]
    return pd.DataFrame(ratios, index=times.columns).T.rename_axis(['model', 'over'])


def format_report(report: Dict[str, Any]) -> str:
    """Format a report as Markdown."""
    machine, settings = report['machine'], report['settings']
    rows = pd.DataFrame(**report['results'])
    failed, rows = rows[rows['error'].notna()], rows[rows['error'].isna()]
    text = [
        '# Benchmark of HBONet and its peers',
        f"{machine['gpu'] or machine['cpu']} ({machine['instructions']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB), threads: {machine['threads']}, {machine['os']}.",
        f"Instruction sets: {' '.join(machine['flags'])}.",
        ', '.join([
            *(f'{name} {version}' for name, version in machine['versions'].items()),
            *(f'{name}={value}' for name, value in machine['environment'].items())]) + '.',
        f"Random weights, images of 224 x 224, medians and quartiles of {settings['rounds']} interleaved rounds. `reparam`, "
        "`compiled` and the runtimes take what timm's `reparameterize_model` returns, which is the same network where "
        'there is nothing to fold.',
    ]
    for part, found in rows[rows['part'] != 'growth'].groupby('part', sort=False):
        products, found = found[found['model'] == 'matmul'], found[found['model'] != 'matmul']
        cells = [
            f'{median:.2f} ({lower:.2f} to {upper:.2f})' for median, lower, upper in
            zip(found['median_ms'], found['lower_quartile_ms'], found['upper_quartile_ms'], strict=True)]
        text += [
            f'## {part.capitalize()}',
            '### Median time in ms (quartiles)', to_markdown(pivot(found.assign(cell=cells), 'cell'))]
        ratios = compute_ratios(found)
        if len(ratios):
            text += ['### Ratios of median times, below 1 where HBONet is faster', to_markdown(ratios, '.3f')]
        speeds = ', '.join(f'{row.gflops_per_second:.1f} in {row.mode}' for row in products.itertuples())
        text += [
            '### Speed as a share of the dense matrix product',
            f'Of its GFLOP/s in the same rounds, {speeds}. A multiply-add is 2 FLOPs, a training step 3 forward passes.',
            to_markdown(pivot(found, 'share_of_matmul'), '.1%')]
        memory = found[found['peak_memory_bytes'].notna()]
        if len(memory):
            text += [
                '### Peak memory in MiB', "Most bytes of tensors at once, besides weights and images, as torch's "
                'allocator tells.', to_markdown(pivot(memory, 'peak_memory_bytes') / 2 ** 20, '.1f')]
    if report['profiles']:
        nodes = pd.DataFrame([
            dict(model=model, type=name, **counts)
            for model, types in report['profiles'].items() for name, counts in types.items()])
        nodes['cell'] = [f'{row.optimized}: {row.ms:.2f}' if row.optimized else None for row in nodes.itertuples()]
        outside = nodes[~nodes['type'].str.contains('Conv')].groupby('model')['ms'].sum()
        table = pivot(nodes[nodes['optimized'] > 0], 'cell', 'type')
        table.insert(0, 'all', [f'{value:.2f}' for value in nodes.groupby('model')['ms'].sum()[table.index]])
        table.insert(1, 'outside convolutions', [f'{outside.get(model, 0):.2f}' for model in table.index])
        text += [
            '## ONNX nodes', 'Nodes of the exported model, by type.',
            to_markdown(pivot(nodes[nodes['exported'] > 0], 'exported', 'type'), '.0f'),
            "## ONNX Runtime's profile", f"Milliseconds of a call at batch size {settings['batch_sizes'][-1]}; then "
            'for each type of the optimized graph the number of nodes, and their milliseconds.', to_markdown(table)]
    if len(failed):
        text += ['## Failures', '\n'.join(
            f'* {row.model}, {row.mode}, {row.part}, image size {row.image_size}: {row.error}'
            for row in failed.itertuples())]
    return '\n\n'.join(text) + '\n'


def draw_accuracy(rows: pd.DataFrame, top1: Dict[str, float]) -> Figure:
    """Draw top-1 against latency, by batch size."""
    top1 = {name.split('.')[0]: value for name, value in top1.items()}
    parts = list(rows.groupby('batch_size'))
    figure = Figure(figsize=(8 * len(parts), 7), dpi=110, layout='constrained')
    figure.suptitle('Top-1 on ImageNet-1k as published: HBONet by its authors, the others by timm')
    for axes, (batch_size, found) in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        times = {row.model: row.median_ms for row in found.sort_values('median_ms').itertuples() if row.model in top1}
        ours = [name for name in times if name.startswith('hbonet_')]
        main = [name for name in ours if name.count('_') == 1]
        axes.plot([times[name] for name in main], [top1[name] for name in main], 'k-', label='HBONet')
        for name in ours:
            axes.plot(times[name], top1[name], 'ko' if name in main else 'kx')
            axes.annotate(
                name.removeprefix('hbonet_'), (times[name], top1[name]), xytext=(6, -12), textcoords='offset points')
        for marker, name in zip('osD^vP*X<>' * len(times), [name for name in times if name not in ours], strict=False):
            axes.plot(times[name], top1[name], marker, markersize=8, label=name)
        axes.set(title=f"{found['mode'].iloc[0]}, batch size {batch_size}", xlabel='median latency in ms', ylabel='top-1 in %')
        axes.grid(alpha=0.3)
        axes.legend(loc='lower right')
    return figure


def draw_growth(rows: pd.DataFrame) -> Figure:
    """Draw time against batch size and against image size."""
    figure = Figure(figsize=(14, 6), dpi=110, layout='constrained')
    for axes, quantity, other in zip(
            figure.subplots(1, 2), ('batch_size', 'image_size'), ('image_size', 'batch_size'), strict=True):
        fixed = 224 if other == 'image_size' else 1
        table = rows[rows[other] == fixed].pivot(index=quantity, columns='model', values='median_ms')
        table.plot(ax=axes, style='o-', logx=True, logy=True, grid=True)
        axes.set_xticks(table.index, table.index)
        axes.set_xticks([], minor=True)
        axes.set(
            xlabel=quantity.replace('_', ' '), ylabel='median time in ms',
            title=f"reparam, {other.replace('_', ' ')} {fixed}")
    return figure


def write_report(folder: Path) -> str:
    """Write tables and pictures into a folder that has benchmark.json, and return the tables."""
    report = json.loads((folder / 'benchmark.json').read_text(encoding='utf-8'))
    text = format_report(report)
    replace_file(folder / 'benchmark.md', text.encode())
    rows = pd.DataFrame(**report['results'])
    rows = rows[rows['error'].isna() & (rows['model'] != 'matmul')]
    growth, rows = rows[rows['part'] == 'growth'], rows[rows['part'].str.startswith('batch size')]
    preferred = [mode for mode in ('onnxruntime', 'reparam', *rows['mode']) if mode in set(rows['mode'])]
    pictures = {
        'accuracy_latency.png': draw_accuracy(rows[rows['mode'] == preferred[0]], report['top1']) if preferred else None,
        'growth.png': draw_growth(growth) if len(growth) else None,
    }
    for name, figure in pictures.items():
        if figure:
            content = io.BytesIO()
            figure.savefig(content)
            replace_file(folder / name, content.getvalue())
        else:  # of an earlier run
            (folder / name).unlink(missing_ok=True)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('folder', type=Path, help='output folder of benchmark.py')
    args = parser.parse_args()
    try:
        print(write_report(args.folder))
    except (OSError, ValueError, KeyError) as e:
        parser.error(f'{args.folder / "benchmark.json"} is not what benchmark.py writes. {type(e).__name__}: {e}')


if __name__ == '__main__':
    main()
