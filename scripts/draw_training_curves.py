#!/usr/bin/env python3
"""Draw top-1 and training loss by epoch of runs of timm's train.py, and print a table of their last epochs."""
import argparse
import itertools
from pathlib import Path

from script_utils import BadInput, requirements, run_script, write_figure

with requirements():
    import pandas as pd
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

COLUMNS = ['epoch', 'train_loss', 'eval_loss', 'eval_top1']
COLORS = ('#1f5fa8', '#d9730d', '#3a8f4b', '#8250b4')
STYLES = ('-', (0, (5, 1.5)), ':')


def read_runs(folder: Path) -> pd.DataFrame:
    """Read the epochs of all runs in a folder, with their model and seed.

    Raises:
        BadInput: If there are none, or they have not the same epochs.
    """
    runs = {}
    for path in sorted(folder.glob('*-seed*.csv')):
        try:
            runs[path] = pd.read_csv(path)[COLUMNS].astype(float)
        except (ValueError, KeyError) as e:
            raise BadInput(f'{path} is not a summary.csv of train.py with {", ".join(COLUMNS)}: {e}') from None
    if not runs:
        raise BadInput(f'{folder} has no MODEL-seedN.csv.')
    epochs = max(map(len, runs.values()))
    for path, rows in runs.items():
        if rows.empty or list(rows['epoch']) != list(range(epochs)):
            raise BadInput(
                f'{path} must have the epochs 0 to {epochs - 1}, as other runs have, and has '
                f'{list(rows["epoch"].astype(int))}. Finish or remove it.')
    named = {(model, seed): rows for path, rows in runs.items() for model, _, seed in [path.stem.rpartition('-seed')]}
    return pd.concat(named, names=['model', 'seed', None]).reset_index(['model', 'seed'])


def make_table(rows: pd.DataFrame) -> str:
    """Format the last epoch of each model's runs as Markdown. The standard deviation is that of a sample."""
    lines = [
        '| model | seeds | top-1 of each | mean | deviation | least to most | training loss | test loss |',
        '| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |',
    ]
    for model, runs in rows[rows['epoch'] == rows['epoch'].max()].groupby('model'):
        top1 = runs['eval_top1']
        deviation = f'{top1.std():.2f}' if len(top1) > 1 else ''
        lines.append(
            f'| `{model}` | {", ".join(runs["seed"])} | {", ".join(map("{:.2f}".format, top1))} | {top1.mean():.2f} '
            f'| {deviation} | {top1.min():.2f} to {top1.max():.2f} | {runs["train_loss"].mean():.3f} '
            f'| {runs["eval_loss"].mean():.3f} |')
    return '\n'.join(lines)


def draw(rows: pd.DataFrame) -> Figure:
    """Draw the mean over the seeds as a line, and the range of the seeds as a band."""
    figure = Figure(figsize=(10, 4.2), dpi=130, layout='constrained')
    families = {}  # a color each
    for model in sorted(rows['model'].unique()):
        families.setdefault(model.rpartition('_')[0], []).append(model)
    styles = {
        model: dict(color=color, linestyle=style)
        for color, models in zip(itertools.cycle(COLORS), families.values(), strict=False)
        for style, model in zip(itertools.cycle(STYLES), models, strict=False)}
    titles = {'eval_top1': 'Top-1 on the test images, %', 'train_loss': 'Training loss'}
    for axes, (column, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for model, style in styles.items():
            by_epoch = rows[rows['model'] == model].groupby('epoch')[column].agg(['mean', 'min', 'max'])
            x = by_epoch.index + 1
            axes.plot(x, by_epoch['mean'], label=model, **style)
            axes.fill_between(x, by_epoch['min'], by_epoch['max'], color=style['color'], alpha=0.18, linewidth=0)
        # the first epochs are far off, and would flatten what matters
        late = rows[rows['epoch'] >= rows['epoch'].max() // 3][column]
        margin = (late.max() - late.min()) * 0.05 or 1
        axes.set_ylim(late.min() - margin, late.max() + margin)
        axes.set_title(title, loc='left', fontweight='bold', fontsize=11)
        axes.set_xlabel('epoch')
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color='0.9')
        axes.set_axisbelow(True)
        axes.spines[['top', 'right']].set_visible(False)
    figure.legend(
        *axes.get_legend_handles_labels(), loc='outside lower center', ncols=len(styles), frameon=False,
        title='Line: mean of the seeds. Band: least to most. The first epochs are cut off.')
    return figure


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('folder', type=Path, metavar='FOLDER', help='has MODEL-seedN.csv, the summary.csv of each run')
    parser.add_argument(
        '--output', type=Path, metavar='FILE', help='PNG file to write (default: FOLDER/curves.png)')
    return parser


def main(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    rows = read_runs(args.folder)
    write_figure(args.output or args.folder / 'curves.png', draw(rows), colors=64)
    print(make_table(rows))


if __name__ == '__main__':
    run_script(main, create_parser())
