#!/usr/bin/env python3
"""Measure speed and memory of HBONets, of their peers in timm and of the authors' code on a CPU, side by side.

Writes benchmark.json and benchmark.csv, then tables and pictures of them: benchmark.md, accuracy_latency.png and
growth.png. Weights are random, nothing is downloaded. All networks of a batch size take turns, each round in another
order; an inference call follows an untimed one, as if it were one of many.

Modes, inference in float32 if not said otherwise:
  eager                as timm creates it, NCHW
  channels_last        the same in channels_last
  reparam              timm.utils.reparameterize_model, in channels_last
  compiled             torch.compile of that, for a fixed shape
  onnxruntime          ONNX of the re-parameterized model, fixed shape, opset 18
  openvino, mnn        the same ONNX
  executorch, litert   torch.export of the re-parameterized model, both with XNNPACK
  ncnn                 its trace by pnnx; no batches, images come one after another
  onnxruntime_int8, openvino_int8, executorch_int8, litert_int8: in int8, calibrated with the images that are timed
  mnn_int8_weights     weights in int8, arithmetic in float32
  train, train_channels_last: forward, cross entropy, backward, SGD with momentum

A runtime that is not installed is skipped by name. The exit status is 1 if a network failed in a mode, or has other
logits than in PyTorch (in int8: by half of the largest); the others are reported all the same. Run it on a machine that
does nothing else: the default takes one to two hours on 2 cores. What only runs if it is named takes up to a minute
more for each network. timm's own script measures GPUs: python benchmark.py --model hbonet_100 --amp --channels-last

Set the MALLOC_ variables of results/README.md: glibc gives freed memory back, which can cost 20 % of the time.
"""
import argparse
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import random
import re
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import numpy as np

os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # read as torch is imported: its profiler is to write no log

import timm
import torch
from runtimes import MODES, Predict, check_logits, choose_installed, describe_error
from script_utils import BadInput, check_interrupt, number, requirements, run_script, write_figure, write_file
from torch import nn
from torch.optim.swa_utils import update_bn

from timm_hbonet.hbonet import checkpoint_filter_fn

with requirements():
    import pandas as pd
    import tabulate  # noqa: F401, pandas needs it for Markdown
    from matplotlib.figure import Figure
    from tqdm import tqdm

# top-1 in percent at 224 x 224, from timm's results/results-imagenet.csv
PEERS = {
    'mobilenetv2_100.ra_in1k': 72.910, 'mobilenetv2_050.lamb_in1k': 65.928, 'mobilenetv3_large_100.ra_in1k': 75.784,
    'mobilenetv3_small_100.lamb_in1k': 67.636, 'ghostnet_100.in1k': 73.958, 'repghostnet_100.in1k': 74.208,
    'mnasnet_100.rmsp_in1k': 74.672, 'lcnet_100.ra2_in1k': 72.130, 'mobilenetv4_conv_small.e2400_r224_in1k': 73.756,
    'starnet_s1.in1k': 73.532,
}
_PUBLISHED = pd.read_csv(Path(__file__).parents[1] / 'results/published.csv', index_col='model')
TOP1 = {**PEERS, **_PUBLISHED['top1'].filter(like='.in1k').to_dict()}
MODELS = ['hbonet_*', *(name.split('.')[0] for name in PEERS)]
DEFAULT_MODES = [
    'eager', 'channels_last', 'reparam', 'compiled', 'onnxruntime', 'openvino', 'train', 'train_channels_last']
IMAGE_SIZE = 224
GROWTH_MODELS = ('hbonet_100', 'hbonet_050', 'mobilenetv2_100')
GROWTH_SHAPES = (  # batch size, image size
    *((n, IMAGE_SIZE) for n in (1, 2, 4, 8, 16, 32, 64, 128)), *((1, n) for n in (96, 128, 160, 320, 448, 640)))
BASELINES = ('mobilenetv2_100', 'mobilenetv3_large_100')  # that ratios are to, beside the authors' code
TIMES = ['median_ms', 'lower_quartile_ms', 'upper_quartile_ms']


def measure_peak_memory(call: Callable[[], Any]) -> int:
    """Most bytes of tensors that a call holds at once, besides those that are there before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f'{folder}/trace.json')
        events = json.loads(Path(folder, 'trace.json').read_text(encoding='utf-8'))['traceEvents']
    allocations = sorted((event for event in events if event['name'] == '[memory]'), key=lambda event: event['ts'])
    return max(itertools.accumulate((event['args']['Bytes'] for event in allocations), initial=0))


@dataclass
class Candidate:
    """A network in a mode, for images of a shape, and what was measured of it."""
    part: str  # of the report
    model: str
    network: nn.Module
    mode: str
    batch_size: int
    image_size: int = IMAGE_SIZE
    images: Optional[torch.Tensor] = None
    predict: Optional[Predict] = None
    seconds: List[float] = field(default_factory=list)
    peak_memory: float = math.nan
    file_bytes: float = math.nan
    error: Optional[str] = None

    def attempt(self, action: Callable[..., None], *args: Any) -> None:
        """Do something unless an earlier action failed. Whatever fails, the other candidates go on."""
        try:
            if not self.error:
                action(*args)
        except Exception as e:  # each runtime has errors of its own
            self.error = describe_error(e)

    def prepare(self, threads: int) -> None:
        mode = MODES[self.mode]
        self.images = torch.randn(self.batch_size, 3, self.image_size, self.image_size)
        self.predict, self.file_bytes = mode.build(self.network, [self.images], threads)
        if mode.channels_last:
            self.images = self.images.to(memory_format=torch.channels_last)
        logits = torch.as_tensor(self.predict(self.images))
        if mode.packages:
            # untrained networks amplify errors of int8: enough to tell of a broken one
            tolerance = 0.5 if 'int8' in self.mode else 1e-3
            with torch.no_grad():
                check_logits(logits, self.network(self.images), tolerance)
        else:
            self.peak_memory = measure_peak_memory(functools.partial(self.predict, self.images))

    def measure(self) -> None:
        if not MODES[self.mode].train:
            self.predict(self.images)
        start = time.perf_counter()
        self.predict(self.images)
        self.seconds.append(time.perf_counter() - start)

    def summarize(self) -> Dict[str, Any]:
        times = 1e3 * np.quantile([math.nan] if self.error else self.seconds, (0.5, 0.25, 0.75))
        return dict(
            part=self.part, model=self.model, mode=self.mode, batch_size=self.batch_size, image_size=self.image_size,
            **dict(zip(TIMES, times.tolist(), strict=True)), peak_memory_bytes=self.peak_memory,
            file_bytes=self.file_bytes, error=self.error)


def run(part: str, candidates: List[Candidate], args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Time candidates in turn, and return a row of results each."""
    for candidate in tqdm(candidates, desc=f'{part}, building', unit='candidate'):
        check_interrupt()
        candidate.attempt(candidate.prepare, args.threads)
    order = random.Random(0)
    for _ in tqdm(range(args.rounds), desc=f'{part}, timing', unit='round'):
        check_interrupt()
        for candidate in order.sample(candidates, len(candidates)):
            candidate.attempt(candidate.measure)
    for candidate in candidates:
        candidate.predict = candidate.images = None
    torch.compiler.reset()
    return [candidate.summarize() for candidate in candidates]


def create_network(create: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    network = create()
    images = torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE)
    # norms with the statistics of noise: else activations can shrink to subnormal numbers, which are slow
    update_bn([images], network)
    with torch.no_grad():
        network.eval()(images)  # fails here if it is for other images
    return network


def create_reference(path: Path, name: str, network: nn.Module) -> nn.Module:
    """Make the authors' network of a width, copy its weights into ours, and see that the two compute the same.

    Raises:
        ValueError: If the two compute something else.
    """
    spec = importlib.util.spec_from_file_location('reference_hbonet', path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # torch.compile looks there
    spec.loader.exec_module(module)
    reference = create_network(lambda: module.HBONet(width_mult=int(name[-3:]) / 100))
    network.load_state_dict(checkpoint_filter_fn(reference.state_dict(), network))
    images = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.no_grad():
        check_logits(network(images), reference(images), 1e-4)
    return reference


def create_networks(args: argparse.Namespace) -> Dict[str, nn.Module]:
    networks = {}
    for name in tqdm(dict.fromkeys([*args.models, *(GROWTH_MODELS if args.growth else ())]), desc='Creating networks'):
        check_interrupt()
        try:
            networks[name] = create_network(functools.partial(timm.create_model, name))
        except Exception as e:  # timm's, and those of networks for other images
            raise BadInput(
                f'--models {name} cannot run on images of {IMAGE_SIZE} x {IMAGE_SIZE}. {describe_error(e)}') from None
        if args.reference and re.fullmatch(r'hbonet_\d{3}', name):
            try:
                networks[f'authors_{name[-3:]}'] = create_reference(args.reference, name, networks[name])
            except Exception as e:  # whatever a foreign file does
                raise BadInput(
                    f'--reference {args.reference} is not the code of {name}, with a class HBONet(width_mult). '
                    f'{describe_error(e)}') from None
    return networks


def describe_machine(args: argparse.Namespace) -> Dict[str, Any]:
    capabilities = dict(getattr(torch.cpu, 'get_capabilities', dict)())  # not in older versions of torch
    packages = ['torch', 'timm', 'timm_hbonet', *(package for mode in args.modes for package in MODES[mode].packages)]
    return dict(
        cpu=capabilities.get('cpu_name') or platform.processor(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        flags=sorted(name for name, value in capabilities.items() if value is True),
        cores=os.cpu_count(), threads=args.threads, os=platform.platform(), python=platform.python_version(),
        versions={package: importlib.metadata.version(package) for package in packages},
        environment={k: v for k, v in os.environ.items() if k.startswith(('MALLOC_', 'GLIBC_', 'LD_PRELOAD', 'OMP_'))})


def measure(networks: Dict[str, nn.Module], args: argparse.Namespace) -> Dict[str, Any]:
    """Time all that was asked for, and return the report."""
    names = [*args.models, *(name for name in networks if name.startswith('authors_'))]
    training = [mode for mode in args.modes if MODES[mode].train]
    inference = [mode for mode in args.modes if mode not in training]
    candidates = [
        *(Candidate(f'batch size {n}', name, networks[name], mode, n)
          for n in dict.fromkeys(args.batch_sizes) for mode in inference for name in names),
        *(Candidate(f'training, batch size {args.train_batch_size}', name, networks[name], mode, args.train_batch_size)
          for mode in training for name in names),
        *(Candidate('growth', name, networks[name], 'reparam', *shape)
          for name in GROWTH_MODELS if args.growth for shape in GROWTH_SHAPES)]
    rows = []
    for part, found in itertools.groupby(candidates, key=lambda candidate: candidate.part):
        rows += run(part, list(found), args)
    return dict(
        machine=describe_machine(args),
        settings={k: v.name if isinstance(v, Path) else v for k, v in vars(args).items() if k != 'output'},
        top1={name: value for name, value in TOP1.items() if name.split('.')[0] in names},
        results=json.loads(pd.DataFrame(rows).to_json(orient='split', index=False)))


def pivot(rows: pd.DataFrame, values: str) -> pd.DataFrame:
    """Table of models by modes, both in the order of the rows."""
    return rows.pivot(index='model', columns='mode', values=values).reindex(
        index=rows['model'].unique(), columns=rows['mode'].unique())


def to_markdown(table: pd.DataFrame, spec: str = '') -> str:
    """Format a table as Markdown, numbers by `spec`, nothing where there is none."""
    cells = table.map(lambda value: '' if pd.isna(value) else format(value, spec))
    names = len(table.index.names)
    return cells.reset_index().to_markdown(
        index=False, disable_numparse=True, colalign=['left'] * names + ['right'] * len(table.columns))


def compute_ratios(times: pd.DataFrame) -> pd.DataFrame:
    """Median times of our networks over those of the authors' code at the same width, and over those of peers."""
    ratios = {}
    for over in ('authors', *BASELINES):
        for name in times.index[times.index.str.startswith('hbonet_')]:
            base = name.replace('hbonet', over) if over == 'authors' else over
            if base in times.index:
                ratios[name, base] = times.loc[name] / times.loc[base]
    index = pd.MultiIndex.from_tuples(ratios, names=['model', 'over'])
    return pd.DataFrame(ratios.values(), index, times.columns)


def format_report(report: Dict[str, Any], rows: pd.DataFrame) -> str:
    """Format a report as Markdown."""
    machine, settings = report['machine'], report['settings']
    failed, rows = rows[rows['error'].notna()], rows[rows['error'].isna()]
    text = [
        '# Benchmark of HBONet and its peers',
        f"{machine['cpu']} ({machine['instructions']}, {machine['cores']} cores), threads: {machine['threads']}, "
        f"{machine['os']}, Python {machine['python']}, "
        + ', '.join(' '.join(item) for item in {**machine['versions'], **machine['environment']}.items()) + '.',
        f"Instruction sets: {' '.join(machine['flags'])}.",
        f"Random weights, images of 224 x 224, medians and quartiles of {settings['rounds']} interleaved rounds. "
        "`reparam`, `compiled` and the runtimes take what timm's `reparameterize_model` returns, which is the same "
        'network where there is nothing to fold.',
    ]
    for part, found in rows[rows['part'] != 'growth'].groupby('part', sort=False):
        times = found[TIMES].apply(lambda row: '{:.2f} ({:.2f} to {:.2f})'.format(*row), axis=1)
        ratios = compute_ratios(pivot(found, 'median_ms'))
        text += [
            f'## {part.capitalize()}', '### Median time in ms (quartiles)',
            to_markdown(pivot(found.assign(time=times), 'time'))]
        if len(ratios):
            text += ['### Ratios of median times, below 1 where HBONet is faster', to_markdown(ratios, '.3f')]
        for column, unit, spec, title, note in (
                ('peak_memory_bytes', 2 ** 20, '.1f', 'Peak memory in MiB',
                 "Most bytes of tensors at once, besides weights and images. Only PyTorch's allocator can tell."),
                ('file_bytes', 1e6, '.2f', 'File size in MB', 'Of what a runtime loads.'),
        ):
            known = found.dropna(subset=column)
            if len(known):
                text += [f'### {title}', note, to_markdown(pivot(known, column) / unit, spec)]
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
    rows = rows.assign(peak_memory_mib=rows['peak_memory_bytes'] / 2 ** 20)
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


def write_report(folder: Path) -> None:
    """Write tables and pictures into a folder that has benchmark.json, and print the tables.

    Raises:
        BadInput: If that file is not what this script writes.
    """
    try:
        report = json.loads((folder / 'benchmark.json').read_text(encoding='utf-8'))
        # earlier versions timed a matrix product too, and did not count the bytes of files
        rows = pd.DataFrame(**report['results']).query("model != 'matmul'")
        rows = rows.reindex(columns=dict.fromkeys([*rows, 'file_bytes'])).astype(
            {'peak_memory_bytes': float, 'file_bytes': float})
        text = format_report(report, rows)
    except (OSError, ValueError, KeyError, TypeError) as e:
        name = folder / 'benchmark.json'
        raise BadInput(f'{name} is not what benchmark.py writes. {type(e).__name__}: {e}') from None
    rows = rows[rows['error'].isna()]
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
    print(text)


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('output', type=Path, metavar='OUTPUT_FOLDER', help='folder for the results')
    add('--models', nargs='+', metavar='NAME', default=MODELS, help='names or wildcards (default: %(default)s)')
    add('--modes', nargs='+', choices=MODES, default=DEFAULT_MODES, metavar='MODE', help='(default: %(default)s)')
    add('--batch-sizes', nargs='+', type=number(int, 1), metavar='N', default=[1, 16],
        help='for inference (default: 1 16)')
    add('--train-batch-size', type=number(int, 1), default=32, metavar='N', help='(default: %(default)s)')
    add('--threads', type=number(int, 1), default=torch.get_num_threads(), metavar='N', help='(default: %(default)s)')
    add('--rounds', type=number(int, 1), default=15, metavar='N',
        help='timed calls of each network (default: %(default)s)')
    add('--reference', type=Path, metavar='PATH',
        help="hbonet.py of a checkout of the authors' repository, to be compared at each width that --models has")
    add('--growth', action=argparse.BooleanOptionalAction, default=True,
        help=f'also time {", ".join(GROWTH_MODELS)} at batch sizes 1 to 128 and image sizes 96 to 640')
    add('--report', action='store_true',
        help='measure nothing: make tables and pictures anew of the benchmark.json that OUTPUT_FOLDER has')
    return parser


def main(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if args.report:
        write_report(args.output)
        return
    args.modes, args.skipped = choose_installed(args.modes)
    if not args.modes:
        raise BadInput('none of --modes is installed.')
    args.models = list(dict.fromkeys(model for name in args.models for model in timm.list_models(name) or [name]))
    if args.reference and not any(re.fullmatch(r'hbonet_\d{3}', name) for name in args.models):
        raise BadInput('--reference is compared with hbonet_100 and its other widths, add one of them to --models.')
    torch.set_num_threads(args.threads)
    networks = create_networks(args)
    args.output.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=args.output).close()  # fails now if it cannot be written

    report = measure(networks, args)
    results = pd.DataFrame(**report['results'])
    write_file(args.output / 'benchmark.csv', results.to_csv(index=False).encode())
    write_file(args.output / 'benchmark.json', json.dumps(report).encode())
    write_report(args.output)
    if failed := results['error'].notna().sum():
        raise BadInput(f'{failed} of {len(results)} failed, see the end of {args.output / "benchmark.md"}.')


if __name__ == '__main__':
    run_script(main, create_parser())
