#!/usr/bin/env python3
"""Draw top-1 and training loss by epoch of runs of timm's train.py, and print a table of their last epochs."""
import argparse
import re
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
    for path in sorted([*folder.glob('*.csv'), *folder.glob('*/summary.csv')]):
        name = path.parent.name if path.name == 'summary.csv' else path.stem
        found = re.fullmatch(r'(.+)-seed(\d+)', name)
        if not found:
            continue
        try:
            rows = pd.read_csv(path)[COLUMNS].astype(float)
        except (ValueError, KeyError) as e:
            raise BadInput(f'{path} is not a summary.csv of train.py with {", ".join(COLUMNS)}: {e}') from None
        if list(rows['epoch']) != list(range(len(rows))) or rows.empty:
            raise BadInput(f'{path} must have the epochs from 0 in order, and has {list(rows["epoch"].astype(int))}.')
        runs[found[1], int(found[2])] = rows
    if not runs:
        raise BadInput(f'{folder} has no MODEL-seedN.csv and no MODEL-seedN/summary.csv.')
    epochs = {f'{model}-seed{seed}': len(rows) for (model, seed), rows in runs.items()}
    if len(set(epochs.values())) > 1:
        raise BadInput(
            f'{folder}: runs must have the same number of epochs, and have '
            f'{", ".join(f"{name} {count}" for name, count in epochs.items())}. Finish or remove the short ones.')
    return pd.concat(runs, names=['model', 'seed', None]).reset_index(['model', 'seed'])


def make_table(rows: pd.DataFrame) -> str:
    """Format the last epoch of each model's runs as Markdown. The standard deviation is that of a sample."""
    last, table = rows[rows['epoch'] == rows['epoch'].max()], {}
    for model, runs in last.groupby('model'):
        top1 = runs['eval_top1']
        table[model] = {
            'seeds': ', '.join(map(str, runs['seed'])),
            'top-1 of each': ', '.join(map('{:.2f}'.format, top1)),
            'mean': f'{top1.mean():.2f}',
            'deviation': f'{top1.std():.2f}' if len(top1) > 1 else '',
            'least to most': f'{top1.min():.2f} to {top1.max():.2f}',
            'training loss': f'{runs["train_loss"].mean():.3f}',
            'test loss': f'{runs["eval_loss"].mean():.3f}',
        }
    lines = [['model', *next(iter(table.values()))], ['---'] + ['---:'] * 7]
    lines += [[f'`{model}`', *cells.values()] for model, cells in table.items()]
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in lines)


def draw(rows: pd.DataFrame) -> Figure:
    """Draw the mean over the seeds as a line, and the range of the seeds as a band."""
    figure = Figure(figsize=(10, 4.2), dpi=130, layout='constrained')
    models = sorted(rows['model'].unique())
    families = sorted({model.rpartition('_')[0] for model in models})
    titles = {'eval_top1': 'Top-1 on the test images, %', 'train_loss': 'Training loss'}
    for axes, (column, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for model in models:
            family = model.rpartition('_')[0]
            nth = [other for other in models if other.rpartition('_')[0] == family].index(model)
            color = COLORS[families.index(family) % len(COLORS)]
            by_epoch = rows[rows['model'] == model].groupby('epoch')[column].agg(['mean', 'min', 'max'])
            x = by_epoch.index + 1
            axes.plot(x, by_epoch['mean'], color=color, linestyle=STYLES[nth % len(STYLES)], label=model)
            axes.fill_between(x, by_epoch['min'], by_epoch['max'], color=color, alpha=0.18, linewidth=0)
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
        *axes.get_legend_handles_labels(), loc='outside lower center', ncols=len(models), frameon=False,
        title='Line: mean of the seeds. Band: least to most. The first epochs are cut off.')
    return figure


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'folder', type=Path, metavar='FOLDER',
        help='has MODEL-seedN.csv, or the folders MODEL-seedN that train.py writes, with summary.csv')
    parser.add_argument(
        '--output', type=Path, metavar='FILE', help='PNG file to write (default: FOLDER/curves.png)')
    return parser


def main(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    rows = read_runs(args.folder)
    write_figure(args.output or args.folder / 'curves.png', draw(rows), colors=64)
    print(make_table(rows))


if __name__ == '__main__':
    run_script(main, create_parser())
