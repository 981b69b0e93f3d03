#!/usr/bin/env python3
"""Measure speed and memory of HBONets, of their peers in timm and of the authors' code, side by side.

Writes benchmark.json and benchmark.csv, then what benchmark_report.py makes of them: tables and pictures.

The networks of a batch size are built, warmed up, and timed once a round, each round in another order. The results are
medians and quartiles. An inference call follows an untimed one, as if it were one of many. The same rounds time a dense
matrix product on the same threads, and each speed is given as a share of its. Weights are random, nothing is
downloaded. All widths: --models 'hbonet_*'.

Modes, inference in float32 if not said otherwise:
  eager                as timm creates it, NCHW
  channels_last        the same in channels_last
  reparam              timm.utils.reparameterize_model, in channels_last
  compiled             torch.compile of that, for a fixed shape
  compiled_freezing    the same with inductor's freezing of weights
  onnxruntime          ONNX of the re-parameterized model, fixed shape, opset 18 (CPU), with a profile by operator
  openvino             the same ONNX (CPU)
  eager_amp, channels_last_amp, reparam_amp
                       under float16 autocast (CUDA)
  train, train_channels_last
                       forward, cross entropy, backward, SGD with momentum

The exit status is 1 if a network failed in a mode; the others are reported all the same. Run it on a machine that does
nothing else: the default takes one to two hours on 2 cores. Figures on a CPU depend on the memory allocator: glibc
returns freed memory to the system, and the page faults to get it back cost up to 20 %. These settings keep it:
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
import io
import itertools
import json
import os
import platform
import random
import re
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import numpy as np

os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # read as torch is imported: its profiler is to write no log

import timm
import timm.utils
import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.benchmark import timer
from torch.utils.flop_counter import FlopCounterMode

from timm_hbonet.hbonet import checkpoint_filter_fn
from timm_hbonet.releases import RELEASES

try:
    from benchmark_report import replace_file, write_report
    from tqdm import tqdm
except ModuleNotFoundError as e:
    sys.exit(f"benchmark.py needs {e.name}, which is not installed. Run: pip install 'timm-hbonet[scripts]'")

# top-1 in percent at 224 x 224, from timm's results/results-imagenet.csv
PEERS = {
    'mobilenetv2_100.ra_in1k': 72.910,
    'mobilenetv2_050.lamb_in1k': 65.928,
    'mobilenetv3_large_100.ra_in1k': 75.784,
    'mobilenetv3_small_100.lamb_in1k': 67.636,
    'ghostnet_100.in1k': 73.958,
    'repghostnet_100.in1k': 74.208,
    'mnasnet_100.rmsp_in1k': 74.672,
    'lcnet_100.ra2_in1k': 72.130,
    'mobilenetv4_conv_small.e2400_r224_in1k': 73.756,
    'starnet_s1.in1k': 73.532,
}
TOP1 = {**PEERS, **{release.name: release.top1 for release in RELEASES if release.name.endswith('.in1k')}}
IMAGE_SIZE = 224
MATMUL_SIZE = {'cpu': 2048, 'cuda': 8192}
GROWTH_MODELS = ('hbonet_100', 'mobilenetv2_100', 'mobilenetv3_large_100')
GROWTH_SHAPES = (  # batch size, image size
    *((n, IMAGE_SIZE) for n in (1, 2, 4, 8, 16, 32, 64, 128)), *((1, n) for n in (96, 128, 160, 320, 448, 640)))
DEFAULTS = dict(
    models=['hbonet_*', *(name.split('.')[0] for name in PEERS)], modes=None, batch_sizes=[1, 16], rounds=15,
    growth=True)
QUICK = dict(
    models=['hbonet_100', 'mobilenetv2_100'], modes=None, batch_sizes=[1, 4], rounds=5, growth=False)
QUICK_MODES = ('eager', 'channels_last', 'reparam', 'onnxruntime')
PROFILED_CALLS = 5


def infer(
        network: nn.Module,
        images: torch.Tensor,
        threads: int,
        channels_last: bool = True,
        reparameterize: bool = False,
        compiler_options: Optional[Dict[str, Any]] = None,
        autocast: bool = False,
) -> Callable[[], Any]:
    network = (timm.utils.reparameterize_model if reparameterize else copy.deepcopy)(network).to(images.device)
    if channels_last:
        network, images = (x.to(memory_format=torch.channels_last) for x in (network, images))
    if compiler_options is not None:
        torch._dynamo.config.recompile_limit = 1000  # models of one class share the limit
        network = torch.compile(network, fullgraph=True, dynamic=False, options=compiler_options)

    def call() -> torch.Tensor:
        with torch.no_grad(), torch.autocast(images.device.type, torch.float16, enabled=autocast):
            return network(images)

    return call


def train(
        network: nn.Module, images: torch.Tensor, threads: int, channels_last: bool = False) -> Callable[[], Any]:
    network = copy.deepcopy(network).to(images.device)
    if channels_last:
        network, images = (x.to(memory_format=torch.channels_last) for x in (network, images))
    labels = torch.randint(network(images[:1]).shape[1], (len(images),), device=images.device)
    optimizer = torch.optim.SGD(network.train().parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def multiply(network: None, images: torch.Tensor, threads: int, dtype: torch.dtype) -> Callable[[], Any]:
    size = MATMUL_SIZE[images.device.type]
    a, b = torch.randn(2, size, size, device=images.device, dtype=dtype)
    return lambda: torch.mm(a, b)


@functools.lru_cache(maxsize=None)
def export_onnx(network: nn.Module, shape: torch.Size) -> Any:
    """Protobuf of the ONNX model of a re-parameterized network."""
    return torch.onnx.export(
        timm.utils.reparameterize_model(network), (torch.randn(shape),), dynamo=True, opset_version=18,
        verbose=False).model_proto


def create_session(network: nn.Module, shape: torch.Size, threads: int, profile: Optional[Path] = None) -> Any:
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')  # spinning disturbs who comes next
    options.log_severity_level = 3
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(
        export_onnx(network, shape).SerializeToString(), options, providers=['CPUExecutionProvider'])


def run_onnxruntime(network: nn.Module, images: torch.Tensor, threads: int) -> Callable[[], Any]:
    session = create_session(network, images.shape, threads)
    feed = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, feed)


def run_openvino(network: nn.Module, images: torch.Tensor, threads: int) -> Callable[[], Any]:
    import openvino
    core, model = openvino.Core(), io.BytesIO(export_onnx(network, images.shape).SerializeToString())
    request = core.compile_model(core.read_model(model), 'CPU', {
        'INFERENCE_NUM_THREADS': threads,
        'NUM_STREAMS': 1,
        'PERFORMANCE_HINT': 'LATENCY',
        'INFERENCE_PRECISION_HINT': 'f32',
        'ENABLE_CPU_PINNING': False,  # its threads are to leave no mark on those of the others
    }).create_infer_request()
    array = images.numpy()
    return lambda: request.infer([array])


# A mode is a function of network, images and thread count that returns the call that is timed.
TORCH_MODES = {
    'eager': functools.partial(infer, channels_last=False),
    'channels_last': infer,
    'reparam': functools.partial(infer, reparameterize=True),
    'compiled': functools.partial(infer, reparameterize=True, compiler_options={}),
    'compiled_freezing': functools.partial(infer, reparameterize=True, compiler_options={'freezing': True}),
    'train': train,
    'train_channels_last': functools.partial(train, channels_last=True),
}
AMP_MODES = {
    'eager_amp': functools.partial(infer, channels_last=False, autocast=True),
    'channels_last_amp': functools.partial(infer, autocast=True),
    'reparam_amp': functools.partial(infer, reparameterize=True, autocast=True),
}
RUNTIMES = {'onnxruntime': run_onnxruntime, 'openvino': run_openvino}
PACKAGES = {'onnxruntime': ('onnx', 'onnxscript', 'onnxruntime'), 'openvino': ('onnx', 'onnxscript', 'openvino')}
MODES = {'cpu': {**TORCH_MODES, **RUNTIMES}, 'cuda': {**TORCH_MODES, **AMP_MODES}}
PRODUCTS = {
    'float32': functools.partial(multiply, dtype=torch.float32),
    'float16': functools.partial(multiply, dtype=torch.float16),
}


def is_training(mode: str) -> bool:
    return mode.startswith('train')


def describe_error(error: Exception) -> str:
    return ' '.join(f'{type(error).__name__}: {error}'.split())[:300]


@dataclass
class Candidate:
    """A network in a mode, or the matrix product ('matmul') in a precision."""
    model: str
    network: Optional[nn.Module]
    mode: str
    batch_size: int
    image_size: int = IMAGE_SIZE
    call: Optional[Callable[[], Any]] = None
    peak_memory: Optional[int] = None
    seconds: List[float] = field(default_factory=list)
    error: Optional[str] = None

    @contextlib.contextmanager
    def catch(self):
        try:
            yield
        except Exception as e:  # of whatever is measured, the rest goes on
            self.error, self.call = describe_error(e), None

    def build(self, device: str, threads: int) -> None:
        images = torch.randn(self.batch_size, 3, self.image_size, self.image_size, device=device)
        self.call = {**MODES[device], **PRODUCTS}[self.mode](self.network, images, threads)
        self.call()
        if self.network and self.mode not in RUNTIMES:
            self.peak_memory = measure_peak_memory(self.call, device)

    def time(self) -> None:
        if not is_training(self.mode):
            self.call()
        start = timer()  # which waits for CUDA
        self.call()
        self.seconds.append(timer() - start)

    def summarize(self, device: str) -> Dict[str, Any]:
        row = dict(
            model=self.model, mode=self.mode, batch_size=self.batch_size, image_size=self.image_size, median_ms=None,
            lower_quartile_ms=None, upper_quartile_ms=None, gflops_per_second=None, share_of_matmul=None,
            peak_memory_bytes=self.peak_memory, error=self.error)
        if not self.error:
            lower, median, upper = np.quantile(self.seconds, (0.25, 0.5, 0.75)).tolist()
            # a backward pass has the gradients of inputs and of weights, each at the cost of the forward pass
            passes = self.batch_size * (3 if is_training(self.mode) else 1)
            flops = (
                passes * count_flops(self.network, self.image_size) if self.network else 2 * MATMUL_SIZE[device] ** 3)
            row.update(
                median_ms=1e3 * median, lower_quartile_ms=1e3 * lower, upper_quartile_ms=1e3 * upper,
                gflops_per_second=flops / median / 1e9)
        return row


@functools.lru_cache(maxsize=None)
def count_flops(network: nn.Module, image_size: int) -> int:
    """FLOPs of a forward pass of one image, a multiply-add is 2."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, image_size, image_size))
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


def profile_onnxruntime(network: nn.Module, batch_size: int, threads: int) -> Dict[str, Dict[str, float]]:
    """Nodes by type in the ONNX model and in the graph that ONNX Runtime makes of it, and milliseconds in a call."""
    images = torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE)
    with tempfile.TemporaryDirectory() as folder:
        session = create_session(network, images.shape, threads, Path(folder, 'profile'))
        for _ in range(PROFILED_CALLS + 1):
            session.run(None, {session.get_inputs()[0].name: images.numpy()})
        events = json.loads(Path(session.end_profiling()).read_text(encoding='utf-8'))
    nodes = [event for event in events if event['cat'] == 'Node' and event['name'].endswith('_kernel_time')]
    nodes = nodes[len(nodes) // (PROFILED_CALLS + 1):]  # without the first call
    types = collections.defaultdict(lambda: dict(exported=0, optimized=0, ms=0.))
    for node in export_onnx(network, images.shape).graph.node:
        types[node.op_type]['exported'] += 1
    for event in nodes:
        types[event['args']['op_name']]['optimized'] += 1 / PROFILED_CALLS
        types[event['args']['op_name']]['ms'] += event['dur'] / 1e3 / PROFILED_CALLS
    return {name: dict(counts, optimized=round(counts['optimized'])) for name, counts in types.items()}


def run(title: str, candidates: Sequence[Candidate], device: str, threads: int, rounds: int) -> List[Dict[str, Any]]:
    """Time candidates and the matrix product in turn, and return a row of results each."""
    precisions = list(PRODUCTS) if any(c.mode in AMP_MODES for c in candidates) else ['float32']
    candidates = [*(Candidate('matmul', None, p, candidates[0].batch_size) for p in precisions), *candidates]
    for candidate in tqdm(candidates, desc=f'{title}, building', unit='candidate'):
        with candidate.catch():
            candidate.build(device, threads)
    order = random.Random(0)
    for _ in tqdm(range(rounds), desc=f'{title}, timing', unit='round'):
        for candidate in order.sample(candidates, len(candidates)):
            if not candidate.error:
                with candidate.catch():
                    candidate.time()
    rows = [dict(part=title, **candidate.summarize(device)) for candidate in candidates]
    speeds = {row['mode']: row['gflops_per_second'] for row in rows if row['model'] == 'matmul'}
    for row in rows:
        speed = speeds['float16' if row['mode'] in (*AMP_MODES, 'float16') else 'float32']
        if speed and not row['error']:
            row['share_of_matmul'] = row['gflops_per_second'] / speed
    for candidate in candidates:
        candidate.call = None
    torch.compiler.reset()
    gc.collect()
    return rows


def create_network(create: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    network = create()
    # norms with the statistics of noise: else activations can shrink to subnormal numbers, which are slow
    update_bn([torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE)], network)
    return network.eval()


def create_reference(path: Path, name: str, network: nn.Module) -> nn.Module:
    """Make the authors' network of a width, copy its weights into ours, and see that the two compute the same.

    Raises:
        ValueError: If the file has no such network, or one that computes something else.
    """
    try:
        spec = importlib.util.spec_from_file_location('reference_hbonet', path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # torch.compile looks there
        spec.loader.exec_module(module)
        reference = create_network(lambda: module.HBONet(width_mult=int(name[-3:]) / 100))
        network.load_state_dict(checkpoint_filter_fn(reference.state_dict(), network))
        images = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
        with torch.no_grad():
            expected, logits = reference(images), network(images)
        error = ((logits - expected).abs().max() / expected.abs().max()).item()
    except Exception as e:
        raise ValueError(
            f'{path} is not the code of {name}, with a class HBONet(width_mult). {describe_error(e)}') from e
    if not error <= 1e-4:
        raise ValueError(
            f'{path} and {name} with its weights differ by {error:.1e} relative, at most 1e-04 is allowed. Speeds of '
            f'different networks are not compared.')
    return reference


def describe_machine(device: str, threads: int) -> Dict[str, Any]:
    # the function is younger than some versions of torch
    capabilities = dict(getattr(torch.cpu, 'get_capabilities', dict)())
    memory, versions = None, {'python': platform.python_version()}
    with contextlib.suppress(ValueError, AttributeError):
        memory = round(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2 ** 30, 1)
    for package in ('torch', 'timm', 'timm-hbonet', *dict.fromkeys(itertools.chain.from_iterable(PACKAGES.values()))):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return dict(
        gpu=torch.cuda.get_device_name() if device == 'cuda' else None,
        cpu=capabilities.get('cpu_name') or platform.processor(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        flags=sorted(name for name, value in capabilities.items() if value is True),
        cores=os.cpu_count(), threads=threads, memory_gib=memory, os=platform.platform(), versions=versions,
        environment={k: v for k, v in os.environ.items() if k.startswith(('MALLOC_', 'GLIBC_', 'LD_PRELOAD', 'OMP_'))})


def measure(networks: Dict[str, nn.Module], args: argparse.Namespace) -> Dict[str, Any]:
    """Time all that was asked for, and return the report."""
    parts = {
        f'batch size {n}': [
            Candidate(name, networks[name], mode, n)
            for mode in args.modes if not is_training(mode) for name in args.models]
        for n in args.batch_sizes}
    parts[f'training, batch size {args.train_batch_size}'] = [
        Candidate(name, networks[name], mode, args.train_batch_size)
        for mode in args.modes if is_training(mode) for name in args.models]
    parts['growth'] = [
        Candidate(name, networks[name], 'reparam', *shape)
        for name in GROWTH_MODELS for shape in GROWTH_SHAPES] if args.growth else []
    rows, profiles = [], {}
    for title, candidates in parts.items():
        if candidates:
            rows += run(title, candidates, args.device, args.threads, args.rounds)
    profiled = args.models if 'onnxruntime' in args.modes else []
    failed = {row['model'] for row in rows if row['mode'] == 'onnxruntime' and row['error']}
    for name in tqdm(profiled, desc='Profiling ONNX Runtime', unit='network', disable=not profiled):
        if name not in failed:
            profiles[name] = profile_onnxruntime(networks[name], args.batch_sizes[-1], args.threads)
    return dict(
        machine=describe_machine(args.device, args.threads),
        settings={k: v.name if isinstance(v, Path) else v for k, v in vars(args).items() if k != 'output'},
        top1={name: value for name, value in TOP1.items() if name.split('.')[0] in args.models},
        results=dict(columns=list(rows[0]), data=[list(row.values()) for row in rows]),
        profiles=profiles)


def parse_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    parser.add_argument('output', type=Path, metavar='OUTPUT_FOLDER', help='folder for the results')
    parser.add_argument(
        '--models', nargs='+', metavar='NAME', help=f'names or wildcards (default: {" ".join(DEFAULTS["models"])})')
    parser.add_argument(
        '--modes', nargs='+', metavar='MODE',
        help='(default: all that the device has, without compiled_freezing, and without runtimes that are missing)')
    parser.add_argument('--batch-sizes', nargs='+', type=int, metavar='N', help='for inference (default: 1 16)')
    parser.add_argument('--train-batch-size', type=int, default=32, metavar='N', help='(default: %(default)s)')
    parser.add_argument(
        '--threads', type=int, default=torch.get_num_threads(), metavar='N', help='CPU threads (default: %(default)s)')
    parser.add_argument('--rounds', type=int, metavar='N', help='timed calls of each candidate (default: 15)')
    parser.add_argument('--device', choices=list(MODES), default='cpu', help='(default: %(default)s)')
    parser.add_argument(
        '--reference', type=Path, metavar='PATH',
        help="hbonet.py of a checkout of the authors' repository, to be compared at each width that --models has")
    parser.add_argument(
        '--growth', action=argparse.BooleanOptionalAction,
        help=f'also time {", ".join(GROWTH_MODELS)} at batch sizes 1 to 128 and image sizes 96 to 640 (default: yes)')
    parser.add_argument(
        '--quick', action='store_true', help='defaults that take a minute: 2 models, 4 modes, batch sizes 1 and 4')
    args = parser.parse_args()
    for name, value in (QUICK if args.quick else DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)

    for name in ('batch_sizes', 'train_batch_size', 'threads', 'rounds'):
        if np.min(getattr(args, name)) < 1:
            parser.error(f'--{name.replace("_", "-")} must be at least 1, got {np.min(getattr(args, name))}')
    args.batch_sizes = sorted(set(args.batch_sizes))
    models = {pattern: timm.list_models(pattern) for pattern in args.models}
    for pattern, names in models.items():
        if not names:
            parser.error(f'--models {pattern} is not an architecture that timm knows, see timm.list_models()')
    args.models = list(dict.fromkeys(itertools.chain.from_iterable(models.values())))
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda needs a CUDA device and a torch that is built for it, torch finds none')
    missing = {
        mode: package for mode, packages in PACKAGES.items() for package in packages
        if importlib.util.find_spec(package) is None}
    for mode in args.modes or ():
        if mode not in MODES[args.device]:
            parser.error(f'--modes {mode} is not a mode on {args.device}, which has {", ".join(MODES[args.device])}')
        if mode in missing:
            parser.error(
                f"--modes {mode} needs {missing[mode]}, which is not installed. Run: pip install 'timm-hbonet[clients]'")
    if args.modes is None:
        args.modes = [
            mode for mode in (QUICK_MODES if args.quick else MODES[args.device])
            if mode in MODES[args.device] and mode not in ('compiled_freezing', *missing)]
        for mode, package in missing.items() if args.device == 'cpu' else ():
            print(f'benchmark.py: {mode} is skipped, {package} is not installed.', file=sys.stderr)
    args.modes = list(dict.fromkeys(args.modes))
    if args.reference and not any(re.fullmatch(r'hbonet_\d{3}', name) for name in args.models):
        parser.error('--reference is compared with hbonet_100 and its other widths, add one of those to --models')
    if args.reference and not (args.reference.is_file() and args.reference.suffix == '.py'):
        parser.error(f"there is no Python file --reference {args.reference}. Give the path of the authors' hbonet.py.")
    return args


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args = parse_args(parser)
    torch.set_num_threads(args.threads)
    if args.device == 'cuda':
        torch.set_float32_matmul_precision('high')  # TF32, as convolutions use it by default
    networks = {}
    for name in tqdm(dict.fromkeys([*args.models, *(GROWTH_MODELS if args.growth else ())]), desc='Creating networks'):
        try:
            networks[name] = create_network(functools.partial(timm.create_model, name))
            count_flops(networks[name], IMAGE_SIZE)
        except Exception as e:
            parser.error(
                f'--models {name} cannot be used with images of {IMAGE_SIZE} x {IMAGE_SIZE}. {describe_error(e)}')
        if args.reference and name in args.models and re.fullmatch(r'hbonet_\d{3}', name):
            try:
                networks[name.replace('hbonet', 'authors')] = create_reference(args.reference, name, networks[name])
            except ValueError as e:
                parser.error(f'--reference {e}')
    args.models += [name for name in networks if name.startswith('authors')]
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.output).close()
    except OSError as e:
        parser.error(f'cannot write to {args.output}: {e}. Give another folder.')

    report = measure(networks, args)
    table = io.StringIO(newline='')
    csv.writer(table).writerows([report['results']['columns'], *report['results']['data']])
    replace_file(args.output / 'benchmark.csv', table.getvalue().encode())
    replace_file(args.output / 'benchmark.json', json.dumps(report).encode())
    print(write_report(args.output))
    return int(any(row[-1] for row in report['results']['data']))


if __name__ == '__main__':
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit('benchmark.py: interrupted.')
