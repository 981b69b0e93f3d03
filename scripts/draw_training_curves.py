#!/usr/bin/env python3
"""Draw top-1 and training loss by epoch of runs of timm's train.py, and print a table of their last epochs."""
import argparse
from pathlib import Path

from script_utils import BadInput, requirements, run_script, write_figure

with requirements():
    import pandas as pd
    from matplotlib.figure import Figure

COLUMNS = ['epoch', 'train_loss', 'eval_loss', 'eval_top1']


def read_runs(folder: Path) -> pd.DataFrame:
    """Read the epochs of all runs in a folder, with their model and seed."""
    runs = {}
    for path in sorted(folder.glob('*-seed*.csv')):
        model, _, seed = path.stem.rpartition('-seed')
        try:
            runs[path] = pd.read_csv(path)[COLUMNS].astype(float).assign(model=model, seed=seed)
        except (ValueError, KeyError) as e:
            raise BadInput(f'{path} is not a summary.csv of train.py with {", ".join(COLUMNS)}: {e}') from None
    if not runs:
        raise BadInput(f'{folder} has no MODEL-seedN.csv.')
    epochs = max(map(len, runs.values()))
    for path, rows in runs.items():
        if len(rows) < epochs:
            raise BadInput(f'{path} has {len(rows)} epochs, other runs have {epochs}. Finish or remove it.')
    return pd.concat(runs.values(), ignore_index=True)


def make_table(rows: pd.DataFrame) -> str:
    """Make a table of the last epoch of each model's runs in Markdown. The standard deviation is that of a sample."""
    last = rows[rows['epoch'] == rows['epoch'].max()]
    table = last.groupby('model').agg(**{
        'seeds': ('seed', ', '.join),
        'top-1 of each': ('eval_top1', lambda top1: ', '.join(map('{:.2f}'.format, top1))),
        'mean': ('eval_top1', 'mean'),
        'deviation': ('eval_top1', 'std'),
        'training loss': ('train_loss', 'mean'),
        'test loss': ('eval_loss', 'mean'),
    })
    table = table.rename('`{}`'.format).replace({float('nan'): None})  # the deviation of one run
    return table.to_markdown(floatfmt=('', '', '.2f', '.2f', '.2f', '.3f', '.3f'), missingval='')


def draw(rows: pd.DataFrame) -> Figure:
    """Draw the mean over the seeds as a line, and the range of the seeds as a band."""
    figure = Figure(figsize=(10, 4.2), dpi=100, layout='constrained')
    # the first epochs are far off, and would flatten what matters
    rows = rows[rows['epoch'] >= rows['epoch'].max() // 3]
    titles = {'eval_top1': 'Top-1 on the test images, %', 'train_loss': 'Training loss'}
    for axes, (column, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for model, runs in rows.groupby('model'):
            by_epoch = runs.groupby('epoch')[column].agg(['mean', 'min', 'max'])
            line, = axes.plot(by_epoch.index + 1, by_epoch['mean'], label=model)
            axes.fill_between(by_epoch.index + 1, by_epoch['min'], by_epoch['max'], color=line.get_color(), alpha=0.2)
        axes.set_title(title)
        axes.set_xlabel('epoch')
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color='0.9')
    figure.legend(
        *axes.get_legend_handles_labels(), loc='outside lower center', ncols=rows['model'].nunique(), frameon=False,
        title='Line: mean of the seeds. Band: least to most. The first epochs are left out.')
    return figure


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('folder', type=Path, metavar='FOLDER', help='has MODEL-seedN.csv, the summary.csv of each run')
    parser.add_argument('--output', type=Path, metavar='FILE', help='PNG file to write (default: FOLDER/curves.png)')
    return parser


def main(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    rows = read_runs(args.folder)
    write_figure(args.output or args.folder / 'curves.png', draw(rows))
    print(make_table(rows))


if __name__ == '__main__':
    run_script(main, create_parser())
