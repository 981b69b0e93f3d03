#!/usr/bin/env python3
"""Measure speed and memory of HBONets and of their peers in timm: one table, one picture, JSON and CSV.

All candidates of a batch size are built, warmed up, and timed once a round in random order; medians and quartiles are
reported. An inference call follows an untimed one, as if it were one of many. The same rounds time a dense matrix
product on the same threads, and each speed is given as a share of its. Weights are random, nothing is downloaded.

Modes, inference in float32 if not said otherwise:
  eager                as timm creates it, NCHW
  channels_last        the same in channels_last
  reparam              timm.utils.reparameterize_model, in channels_last
  compiled             torch.compile of that, for a fixed shape
  onnxruntime          ONNX file of the reparameterised model, fixed shape, opset 18 (CPU)
  openvino             the same ONNX file (CPU)
  eager_amp, channels_last_amp, reparam_amp
                       under float16 autocast (CUDA)
  train, train_channels_last
                       forward, cross entropy, backward, SGD with momentum

The exit status is 1 if a candidate failed; the others are reported all the same. Run it on a machine that does nothing
else: the default takes one to two hours on 2 cores. Figures on a CPU depend on the memory allocator: glibc returns
freed memory to the system, and the page faults to get it back cost up to 20 %. These settings keep it:
MALLOC_TOP_PAD_=1000000000 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_MMAP_THRESHOLD_=4000000000
"""
import argparse
import collections
import contextlib
import copy
import csv
import functools
import gc
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import random
import re
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, NoReturn, Optional, Sequence, Tuple

import numpy as np

os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # read as torch is imported: its profiler is to write no log

import timm
import timm.utils
import torch
from scores import SCORES
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.flop_counter import FlopCounterMode

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox
    from tqdm import tqdm
except ModuleNotFoundError as e:
    sys.exit(f"benchmark.py needs {e.name}, which is not installed. Run: pip install 'timm-hbonet[scripts]'")

# weights and their top-1 in percent at 224 x 224, from timm's results/results-imagenet.csv
PEERS = {
    'mobilenetv2_100': ('ra_in1k', 72.910),
    'mobilenetv2_050': ('lamb_in1k', 65.928),
    'mobilenetv3_large_100': ('ra_in1k', 75.784),
    'mobilenetv3_small_100': ('lamb_in1k', 67.636),
    'ghostnet_100': ('in1k', 73.958),
    'repghostnet_100': ('in1k', 74.208),
    'mnasnet_100': ('rmsp_in1k', 74.672),
    'lcnet_100': ('ra2_in1k', 72.130),
    'mobilenetv4_conv_small': ('e2400_r224_in1k', 73.756),
    'starnet_s1': ('in1k', 73.532),
}
PUBLISHED = {f'{name}.{tag}': top1 for name, (tag, top1) in PEERS.items()}
PUBLISHED.update((name, score.top1) for name, score in SCORES.items() if name.endswith('.in1k'))
TOP1 = {name.split('.')[0]: top1 for name, top1 in PUBLISHED.items()}
RUNTIMES = {'onnxruntime': ('onnx', 'onnxscript', 'onnxruntime'), 'openvino': ('onnx', 'onnxscript', 'openvino')}
TRAINING = ('train', 'train_channels_last')
AMP = ('eager_amp', 'channels_last_amp', 'reparam_amp')
MODES = {
    'cpu': ('eager', 'channels_last', 'reparam', 'compiled', *RUNTIMES, *TRAINING),
    'cuda': ('eager', 'channels_last', 'reparam', 'compiled', *AMP, *TRAINING),
}
DEFAULTS = dict(
    models=['hbonet_100', 'hbonet_080', 'hbonet_050', 'hbonet_025', *PEERS], modes=None, batch_sizes=[1, 16], rounds=20,
    growth=True)
QUICK = dict(
    models=['hbonet_100', 'mobilenetv2_100'], modes=['eager', 'channels_last', 'reparam', 'onnxruntime'],
    batch_sizes=[1, 4], rounds=5, growth=False)
IMAGE_SIZE = 224
GROWTH_MODELS = ('hbonet_100', 'mobilenetv2_100', 'mobilenetv3_large_100')
GROWTH_SIZES = {'batch_size': (1, 2, 4, 8, 16, 32, 64, 128), 'image_size': (96, 128, 160, 224, 320, 448, 640)}
MATMUL_SIZE = {'cpu': 2048, 'cuda': 8192}
OUTPUT_NAMES = ('benchmark.json', 'benchmark.csv', 'benchmark.md', 'accuracy_latency.png', 'growth.png')


def fail(message: str) -> NoReturn:
    sys.exit(f'benchmark.py: {message}')


def describe_error(error: Exception) -> str:
    return ' '.join(f'{type(error).__name__}: {error}'.split())[:300]


@dataclass
class Candidate:
    """A model in a mode, or the matrix product ('matmul') in a precision."""
    model: str
    mode: str
    batch_size: int
    image_size: int = IMAGE_SIZE
    call: Optional[Callable[[], Any]] = None
    peak_memory: Optional[int] = None
    seconds: List[float] = field(default_factory=list)
    error: Optional[str] = None


def create_model(create: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = create()
    # norms with the statistics of noise: else activations can shrink to subnormal numbers, which are slow
    update_bn([torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE)], model)
    return model.eval()


def load_reference(path: Path, model: nn.Module) -> nn.Module:
    """Make the authors' HBONet of width 1, copy its weights into ours, and see that the two compute the same."""
    try:
        spec = importlib.util.spec_from_file_location('reference_hbonet', path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # torch.compile looks there
        spec.loader.exec_module(module)
        reference = create_model(lambda: module.HBONet(width_mult=1.0))
        model.load_state_dict(reference.state_dict())
        images = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
        with torch.no_grad():
            expected, logits = reference(images), model(images)
        error = ((logits - expected).abs().max() / expected.abs().max()).item()
    except Exception as e:
        fail(f'--reference {path} is not the code of hbonet_100, with a class HBONet(width_mult). {describe_error(e)}')
    if not error <= 1e-4:
        fail(
            f'--reference {path} and hbonet_100 with its weights differ by {error:.1e} relative, at most 1e-04 is '
            f'allowed. Speeds of different networks are not compared.')
    return reference


@functools.lru_cache(maxsize=None)
def count_flops(model: nn.Module, image_size: int) -> int:
    """FLOPs of a forward pass of one image, a multiply-add is 2."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, image_size, image_size))
    return counter.get_total_flops()


def measure_peak_memory(call: Callable[[], Any], device: str) -> int:
    """Most bytes of tensors that a call holds at once, besides those that are there before it."""
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f'{folder}/trace.json')
        events = json.loads(Path(folder, 'trace.json').read_text(encoding='utf-8'))['traceEvents']
    allocations = sorted((event for event in events if event['name'] == '[memory]'), key=lambda event: event['ts'])
    return max(itertools.accumulate((event['args']['Bytes'] for event in allocations), initial=0))


class Benchmark:
    """Builds and times candidates. ONNX files are kept in `folder`."""

    def __init__(self, models: Dict[str, nn.Module], device: str, threads: int, rounds: int, folder: Path):
        self.models = models
        self.device = device
        self.threads = threads
        self.rounds = rounds
        self.folder = folder
        self.random = random.Random(0)

    def run(self, title: str, candidates: List[Candidate]) -> List[Dict[str, Any]]:
        """Time the candidates and the matrix product, and return a row of results each."""
        precisions = ['float32', 'float16'] if any(c.mode in AMP for c in candidates) else ['float32']
        candidates = [*(Candidate('matmul', p, candidates[0].batch_size) for p in precisions), *candidates]
        for candidate in tqdm(candidates, desc=f'{title}, building', unit='candidate'):
            with self._catch(candidate):
                candidate.call = self._build(candidate)
                candidate.call()
                if candidate.model != 'matmul' and candidate.mode not in RUNTIMES:
                    candidate.peak_memory = measure_peak_memory(candidate.call, self.device)
        for _ in tqdm(range(self.rounds), desc=f'{title}, timing', unit='round'):
            for candidate in self.random.sample(candidates, len(candidates)):
                if not candidate.error:
                    with self._catch(candidate):
                        candidate.seconds.append(self._time(candidate))
        rows = [self._summarize(candidate) for candidate in candidates]
        speeds = {row['mode']: row['gflops_per_second'] for row in rows if row['model'] == 'matmul'}
        for row in rows:
            speed = speeds['float16' if row['mode'] in (*AMP, 'float16') else 'float32']
            if speed and not row['error']:
                row['share_of_matmul'] = row['gflops_per_second'] / speed
        for candidate in candidates:
            candidate.call = None
        torch.compiler.reset()
        gc.collect()
        return rows

    @contextlib.contextmanager
    def _catch(self, candidate: Candidate):
        try:
            yield
        except Exception as e:  # of whatever is measured, the rest goes on
            candidate.error, candidate.call = describe_error(e), None

    def _build(self, candidate: Candidate) -> Callable[[], Any]:
        """Make the function that is timed."""
        if candidate.model == 'matmul':
            size = MATMUL_SIZE[self.device]
            a, b = torch.randn(2, size, size, device=self.device, dtype=getattr(torch, candidate.mode))
            return lambda: torch.mm(a, b)
        images = torch.randn(candidate.batch_size, 3, candidate.image_size, candidate.image_size, device=self.device)
        if candidate.mode in RUNTIMES:
            return self._build_runtime(candidate, images)
        mode = candidate.mode.removesuffix('_amp')
        model = self._copy(candidate.model, mode in ('reparam', 'compiled')).to(self.device)
        if mode not in ('eager', 'train'):
            model, images = (x.to(memory_format=torch.channels_last) for x in (model, images))

        if mode in TRAINING:
            labels = torch.randint(model(images[:1]).shape[1], (candidate.batch_size,), device=self.device)
            optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-3, momentum=0.9)

            def step() -> None:
                nn.functional.cross_entropy(model(images), labels).backward()
                optimizer.step()
                optimizer.zero_grad()

            return step

        if mode == 'compiled':
            torch._dynamo.config.recompile_limit = len(self.models)  # models of one class share the limit
            model = torch.compile(model, fullgraph=True, dynamic=False)
        autocast = torch.autocast('cuda', torch.float16) if candidate.mode in AMP else contextlib.nullcontext()

        def infer() -> torch.Tensor:
            with torch.no_grad(), autocast:
                return model(images)

        return infer

    def _build_runtime(self, candidate: Candidate, images: torch.Tensor) -> Callable[[], Any]:
        path, images = self.export(candidate.model, candidate.batch_size), images.numpy()
        if candidate.mode == 'onnxruntime':
            session = self.create_session(path)
            feed = {session.get_inputs()[0].name: images}
            return lambda: session.run(None, feed)
        import openvino
        request = openvino.Core().compile_model(path, 'CPU', {
            'INFERENCE_NUM_THREADS': self.threads,
            'NUM_STREAMS': 1,
            'PERFORMANCE_HINT': 'LATENCY',
            'INFERENCE_PRECISION_HINT': 'f32',
        }).create_infer_request()
        return lambda: request.infer([images])

    def _copy(self, name: str, reparameterize: bool) -> nn.Module:
        return (timm.utils.reparameterize_model if reparameterize else copy.deepcopy)(self.models[name])

    def export(self, name: str, batch_size: int, reparameterize: bool = True) -> Path:
        """Write the ONNX file of a model, if there is none yet, and return its path."""
        path = self.folder / f'{name}-{batch_size}{"-reparam" * reparameterize}.onnx'
        if not path.exists():
            torch.onnx.export(
                self._copy(name, reparameterize), (torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE),), path,
                dynamo=True, opset_version=18, external_data=False, verbose=False)
        return path

    def create_session(self, path: Path, optimized_path: Optional[Path] = None) -> Any:
        """Open an ONNX file in ONNX Runtime, which writes the graph that it makes of it if asked to."""
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.add_session_config_entry('session.force_spinning_stop', '1')  # spinning disturbs the next candidate
        options.log_severity_level = 3  # without the warning that an optimised graph is for this machine only
        if optimized_path:
            options.optimized_model_filepath = str(optimized_path)
        return onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])

    def _time(self, candidate: Candidate) -> float:
        if candidate.mode not in TRAINING:
            candidate.call()
        if self.device == 'cpu':
            start = time.perf_counter()
            candidate.call()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        candidate.call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def _summarize(self, candidate: Candidate) -> Dict[str, Any]:
        row = dict(
            model=candidate.model, mode=candidate.mode, batch_size=candidate.batch_size,
            image_size=candidate.image_size, median_ms=None, lower_quartile_ms=None, upper_quartile_ms=None,
            images_per_second=None, gflops_per_second=None, share_of_matmul=None, peak_memory_bytes=None,
            error=candidate.error)
        if candidate.error:
            return row
        lower, median, upper = np.quantile(candidate.seconds, (0.25, 0.5, 0.75)).tolist()
        if candidate.model == 'matmul':
            flops = 2 * MATMUL_SIZE[self.device] ** 3
        else:
            # the backward pass has the gradients of inputs and of weights, each at the cost of the forward pass
            passes = 3 if candidate.mode in TRAINING else 1
            flops = passes * candidate.batch_size * count_flops(self.models[candidate.model], candidate.image_size)
            row['images_per_second'] = candidate.batch_size / median
        row.update(
            median_ms=1e3 * median, lower_quartile_ms=1e3 * lower, upper_quartile_ms=1e3 * upper,
            gflops_per_second=flops / median / 1e9, peak_memory_bytes=candidate.peak_memory)
        return row


def count_nodes(benchmark: Benchmark, batch_size: int) -> Dict[str, Dict[str, int]]:
    """Nodes by type of our ONNX files and the reference's, as exported and as ONNX Runtime optimises them."""
    import onnx
    networks = {'hbonet_100': ('hbonet_100', False), 'hbonet_100 reparam': ('hbonet_100', True)}
    if 'reference' in benchmark.models:
        networks['reference'] = ('reference', True)
    counts, optimized_path = {}, benchmark.folder / 'optimized.onnx'
    for title, (name, reparameterize) in tqdm(networks.items(), desc='Counting ONNX nodes', unit='network'):
        path = benchmark.export(name, batch_size, reparameterize)
        benchmark.create_session(path, optimized_path)
        for column, file in ((title, path), (f'{title}, optimised', optimized_path)):
            types = [f'{node.domain} {node.op_type}'.strip() for node in onnx.load(file).graph.node]
            counts[column] = dict(total=len(types), **dict(collections.Counter(types).most_common()))
    return counts


def compute_ratios(rows: Sequence[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Ratios of the reference to hbonet_100, above 1 where ours is better."""
    rows = {(row['model'], row['mode'], row['batch_size']): row for row in rows if not row['error']}
    ratios = []
    for (model, mode, batch_size), row in rows.items():
        ours = rows.get(('hbonet_100', mode, batch_size))
        if model == 'reference' and ours:
            memory = row['peak_memory_bytes'] / ours['peak_memory_bytes'] if ours['peak_memory_bytes'] else None
            ratios.append(dict(
                mode=mode, batch_size=batch_size, time=row['median_ms'] / ours['median_ms'], peak_memory=memory))
    return ratios


def describe_machine(device: str, threads: int) -> Dict[str, Any]:
    cpu, memory, versions = platform.processor(), None, {'python': platform.python_version()}
    with contextlib.suppress(OSError, AttributeError):
        cpu = re.search(r'model name\s*: (.+)', Path('/proc/cpuinfo').read_text()).group(1)
    with contextlib.suppress(ValueError, AttributeError):
        memory = round(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2 ** 30, 1)
    for package in ('torch', 'timm', 'timm-hbonet', 'onnx', 'onnxscript', 'onnxruntime', 'openvino'):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return dict(
        gpu=torch.cuda.get_device_name() if device == 'cuda' else None,
        cpu=cpu, instructions=torch.backends.cpu.get_cpu_capability(), cores=os.cpu_count(), threads=threads,
        memory_gib=memory, os=platform.platform(), versions=versions,
        environment={k: v for k, v in os.environ.items() if k.startswith(('MALLOC_', 'GLIBC_', 'LD_PRELOAD', 'OMP_'))})


def measure(benchmark: Benchmark, args: argparse.Namespace) -> Dict[str, Any]:
    """Time all that was asked for, and return the report."""
    names = [*args.models, *(['reference'] if args.reference else [])]
    parts = [(f'Batch size {n}', n, [mode for mode in args.modes if mode not in TRAINING]) for n in args.batch_sizes]
    parts.append(('Training', args.train_batch_size, [mode for mode in args.modes if mode in TRAINING]))
    results, growth, nodes = [], {}, {}
    for title, batch_size, modes in parts:
        candidates = [
            Candidate(name, mode, batch_size) for mode in modes for name in names
            if not (name == 'reference' and mode in ('reparam', 'reparam_amp'))]  # it has nothing to fold
        results += benchmark.run(title, candidates) if candidates else []
    for quantity, sizes in GROWTH_SIZES.items() if args.growth else ():
        growth[quantity] = benchmark.run(f'Growth with {quantity}', [
            Candidate(name, 'reparam', **{'batch_size': 1, quantity: n}) for name in GROWTH_MODELS for n in sizes])
    errors = [
        f"{row['model']}, {row['mode']}, batch size {row['batch_size']}, image size {row['image_size']}: {row['error']}"
        for row in itertools.chain(results, *growth.values()) if row['error']]
    if 'onnxruntime' in args.modes and 'hbonet_100' in names:
        try:
            nodes = count_nodes(benchmark, args.batch_sizes[0])
        except Exception as e:
            errors.append(f'ONNX nodes: {describe_error(e)}')
    folded = dict.fromkeys(row['model'] for row in results if row['mode'] == 'reparam' and not row['error'])
    return dict(
        machine=describe_machine(args.device, args.threads),
        settings={k: v.name if isinstance(v, Path) else v for k, v in vars(args).items() if k != 'output'},
        top1={name: value for name, value in PUBLISHED.items() if name.split('.')[0] in names},
        nothing_to_fold=[
            name for name in folded
            if timm.utils.reparameterize_model(model := benchmark.models[name]).state_dict().keys()
            == model.state_dict().keys()],
        results=results, ratios=compute_ratios(results), growth=growth, onnx_nodes=nodes, errors=errors)


def format_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Format a Markdown table that is aligned as text too, numbers to the right."""
    lines = [['' if cell is None else str(cell) for cell in line] for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [str.ljust if name in ('model', 'mode', 'type') else str.rjust for name in header]
    lines = [[align(*cell) for align, *cell in zip(aligned, line, widths, strict=True)] for line in lines]
    lines.insert(1, ['-' * (n - 1) + '-:'[align is str.rjust] for align, n in zip(aligned, widths, strict=True)])
    return '\n'.join(f"| {' | '.join(line)} |" for line in lines)


def format_report(report: Dict[str, Any]) -> str:
    """Format the report as Markdown."""
    machine, nodes = report['machine'], report['onnx_nodes']
    details = [f'{name} {version}' for name, version in machine['versions'].items()]
    details += [f'{name}={value}' for name, value in machine['environment'].items()]
    text = [
        '# Benchmark of HBONet and its peers',
        f"{machine['gpu'] or machine['cpu']} ({machine['instructions']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB), threads: {machine['threads']}, {machine['os']}, {', '.join(details)}.",
        f"Random weights, images of {IMAGE_SIZE} x {IMAGE_SIZE}, medians and quartiles of "
        f"{report['settings']['rounds']} interleaved rounds. GFLOP/s: a multiply-add is 2 FLOPs, a training step 3 "
        'forward passes. Share: of the GFLOP/s of a dense matrix product (`matmul`) in the same rounds. Peak memory: '
        "most bytes of tensors at once, besides weights and images; only torch's allocator can tell.",
        format_table(
            ('model', 'mode', 'batch', 'median ms', 'quartiles', 'images/s', 'GFLOP/s', 'share', 'peak MiB'),
            [(
                row['model'], row['mode'], row['batch_size'], f"{row['median_ms']:.2f}",
                f"{row['lower_quartile_ms']:.2f} to {row['upper_quartile_ms']:.2f}",
                row['images_per_second'] and f"{row['images_per_second']:.1f}", f"{row['gflops_per_second']:.1f}",
                row['share_of_matmul'] and f"{row['share_of_matmul']:.1%}",
                row['peak_memory_bytes'] and f"{row['peak_memory_bytes'] / 2 ** 20:.1f}",
            ) for row in report['results'] if not row['error']]),
    ]
    if report['nothing_to_fold']:
        text.append(
            f"timm's `reparameterize_model` finds nothing to fold in {', '.join(report['nothing_to_fold'])}: there "
            '`reparam` is the same as `channels_last`.')
    if report['ratios']:
        text += [
            "## The authors' code against hbonet_100",
            "Theirs divided by ours, above 1 where ours is better. Ours is reparameterised in `compiled`, "
            '`onnxruntime` and `openvino`.',
            format_table(('mode', 'batch', 'time', 'peak memory'), [
                (row['mode'], row['batch_size'], f"{row['time']:.3f}",
                 row['peak_memory'] and f"{row['peak_memory']:.3f}") for row in report['ratios']])]
    if nodes:
        types = dict.fromkeys(itertools.chain.from_iterable(nodes.values()))
        text += ['## ONNX nodes', 'As exported, and as optimised by ONNX Runtime.', format_table(
            ('type', *nodes), [(name, *(counts.get(name, 0) for counts in nodes.values())) for name in types])]
    if report['errors']:
        text += ['## Failures', '\n'.join(f'* {error}' for error in report['errors'])]
    return '\n\n'.join(text) + '\n'


def draw_accuracy(rows: Sequence[Dict[str, Any]], path: Path) -> None:
    """Draw top-1 against latency, by batch size, in onnxruntime, else in reparam, else in what was measured first."""
    rows = [row for row in rows if row['model'] in TOP1 and row['mode'] not in TRAINING and not row['error']]
    modes = [row['mode'] for row in rows]
    mode = next((mode for mode in ('onnxruntime', 'reparam', *modes) if mode in modes), None)
    batch_sizes = sorted({row['batch_size'] for row in rows if row['mode'] == mode})
    if not batch_sizes:
        return
    figure = Figure(figsize=(8 * len(batch_sizes), 7), dpi=110, layout='constrained')
    figure.suptitle('Top-1 on ImageNet-1k as published: HBONet by its authors, the others by timm')
    for axes, batch_size in zip(figure.subplots(1, len(batch_sizes), squeeze=False)[0], batch_sizes, strict=True):
        points = {
            row['model']: (row['median_ms'], TOP1[row['model']])
            for row in rows if (row['mode'], row['batch_size']) == (mode, batch_size)}
        ours = sorted(point for name, point in points.items() if name not in PEERS)
        others = [point for name, point in points.items() if name in PEERS]
        for chosen, style, label in ((ours, 'o-', 'HBONet'), (others, 's', 'others')):
            axes.plot([x for x, _ in chosen], [y for _, y in chosen], style, label=label)
        axes.set(title=f'{mode}, batch size {batch_size}', xlabel='median latency in ms', ylabel='top-1 in %')
        axes.margins(0.2)
        axes.grid(alpha=0.3)
        axes.legend(loc='lower right')
        label_points(axes, points, ours)
    figure.savefig(path)


def label_points(axes: Axes, points: Dict[str, Tuple[float, float]], line: Sequence[Tuple[float, float]]) -> None:
    """Write each name beside its point, inside of the axes, where it covers the least of points, line and names."""
    axes.figure.draw_without_rendering()  # positions are known from then on
    steps = [np.linspace(*ends, 20) for ends in itertools.pairwise(line)]
    taken = [
        Bbox.from_bounds(x - 5, y - 5, 10, 10)
        for x, y in axes.transData.transform(np.concatenate([list(points.values()), *steps]))]
    places = [
        dict(xytext=(x * space, y * space), ha=('center', 'left', 'right')[x], va=('center', 'bottom', 'top')[y])
        for space in (7, 14, 24)
        for x, y in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))]
    for name, point in points.items():
        texts = [axes.annotate(name, point, textcoords='offset points', fontsize=8, **place) for place in places]
        boxes = [text.get_window_extent().padded(1) for text in texts]
        costs = [(-axes.bbox.count_contains(box.corners()), box.count_overlaps(taken)) for box in boxes]
        best = costs.index(min(costs))
        taken.append(boxes[best])
        for i, text in enumerate(texts):
            text.set_visible(i == best)


def draw_growth(growth: Dict[str, List[Dict[str, Any]]], path: Path) -> None:
    """Draw time against batch size and against image size."""
    figure = Figure(figsize=(14, 6), dpi=120, layout='constrained')
    for axes, (quantity, rows) in zip(figure.subplots(1, 2), growth.items(), strict=True):
        for name in GROWTH_MODELS:
            chosen = [row for row in rows if row['model'] == name and not row['error']]
            axes.loglog([row[quantity] for row in chosen], [row['median_ms'] for row in chosen], 'o-', label=name)
        axes.set_xticks(GROWTH_SIZES[quantity], GROWTH_SIZES[quantity])
        axes.set_xticks([], minor=True)
        axes.set(xlabel=quantity.replace('_', ' '), ylabel='median time in ms', title='reparam')
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('output', type=Path, metavar='OUTPUT_FOLDER', help=f'folder for {", ".join(OUTPUT_NAMES)}')
    parser.add_argument('--models', nargs='+', metavar='NAME', help=f'(default: {" ".join(DEFAULTS["models"])})')
    parser.add_argument('--modes', nargs='+', metavar='MODE', help='(default: all that the device has)')
    parser.add_argument('--batch-sizes', nargs='+', type=int, metavar='N', help='for inference (default: 1 16)')
    parser.add_argument('--train-batch-size', type=int, default=32, metavar='N', help='(default: %(default)s)')
    parser.add_argument(
        '--threads', type=int, default=torch.get_num_threads(), metavar='N', help='CPU threads (default: %(default)s)')
    parser.add_argument('--rounds', type=int, metavar='N', help='timed calls of each candidate (default: 20)')
    parser.add_argument('--device', choices=list(MODES), default='cpu', help='(default: %(default)s)')
    parser.add_argument(
        '--reference', type=Path, metavar='PATH',
        help="hbonet.py of a checkout of the authors' repository, to be compared with hbonet_100")
    parser.add_argument(
        '--growth', action=argparse.BooleanOptionalAction,
        help=f'also time {", ".join(GROWTH_MODELS)} at batch sizes 1 to 128 and image sizes 96 to 640 (default: yes)')
    parser.add_argument(
        '--quick', action='store_true', help='defaults that take a minute: 2 models, 4 modes, batch sizes 1 and 4')
    args = parser.parse_args()
    for name, value in (QUICK if args.quick else DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.modes = args.modes or MODES[args.device]

    for name in ('batch_sizes', 'train_batch_size', 'threads', 'rounds'):
        if np.min(getattr(args, name)) < 1:
            fail(f'--{name.replace("_", "-")} must be at least 1, got {np.min(getattr(args, name))}')
    for name in args.models:
        if not timm.is_model(name):
            fail(f'--models {name} is not an architecture that timm knows, see timm.list_models()')
    if args.device == 'cuda' and not torch.cuda.is_available():
        fail('--device cuda needs a CUDA device and a torch that is built for it, torch finds none')
    for mode in args.modes:
        if mode not in MODES[args.device]:
            fail(f'--modes {mode} is not a mode on {args.device}, which has {", ".join(MODES[args.device])}')
        for package in RUNTIMES.get(mode, ()):
            if importlib.util.find_spec(package) is None:
                fail(f"--modes {mode} needs {package}, which is not installed. Run: pip install 'timm-hbonet[clients]'")
    if args.reference and 'hbonet_100' not in args.models:
        fail('--reference is compared with hbonet_100, add that to --models')
    if args.reference and not (args.reference.is_file() and args.reference.suffix == '.py'):
        fail(f"there is no Python file --reference {args.reference}. Give the path of the authors' hbonet.py.")
    return args


def main() -> int:
    args = parse_args()
    torch.set_num_threads(args.threads)
    if args.device == 'cuda':
        torch.set_float32_matmul_precision('high')  # TF32, as convolutions use it by default
    names = dict.fromkeys([*args.models, *(GROWTH_MODELS if args.growth else ())])
    models = {}
    for name in tqdm(names, desc='Creating models', unit='model'):
        try:
            models[name] = create_model(functools.partial(timm.create_model, name))
            count_flops(models[name], IMAGE_SIZE)
        except Exception as e:
            fail(f'--models {name} cannot be used with images of {IMAGE_SIZE} x {IMAGE_SIZE}. {describe_error(e)}')
    if args.reference:
        models['reference'] = load_reference(args.reference, models['hbonet_100'])
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        work = tempfile.TemporaryDirectory(prefix='.benchmark-', dir=args.output)
    except OSError as e:
        fail(f'cannot write to {args.output}: {e}. Give another folder.')

    with work:
        folder = Path(work.name)
        report = measure(Benchmark(models, args.device, args.threads, args.rounds, folder), args)
        text = format_report(report)
        (folder / 'benchmark.json').write_text(json.dumps(report, indent=1) + '\n', encoding='utf-8')
        (folder / 'benchmark.md').write_text(text, encoding='utf-8')
        with open(folder / 'benchmark.csv', 'w', encoding='utf-8', newline='') as file:
            writer = csv.DictWriter(file, report['results'][0])
            writer.writeheader()
            writer.writerows(report['results'])
        draw_accuracy(report['results'], folder / 'accuracy_latency.png')
        if args.growth:
            draw_growth(report['growth'], folder / 'growth.png')
        for name in OUTPUT_NAMES:
            if (folder / name).exists():
                os.replace(folder / name, args.output / name)
            else:  # of an earlier run
                (args.output / name).unlink(missing_ok=True)
    print(text)
    return int(bool(report['errors']))


if __name__ == '__main__':
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit('benchmark.py: interrupted.')
