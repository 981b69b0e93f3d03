#!/usr/bin/env python3
"""Measure speed and memory of HBONets, of their peers in timm and of the authors' code, side by side.

Writes benchmark.json and benchmark.csv, then what benchmark_report.py makes of them. Weights are random, nothing is
downloaded. All networks of a batch size take turns, each round in another order; an inference call follows an untimed
one, as if it were one of many. The same rounds time a dense matrix product on the same threads.

Modes, inference in float32 if not said otherwise:
  eager                as timm creates it, NCHW
  channels_last        the same in channels_last
  reparam              timm.utils.reparameterize_model, in channels_last
  compiled             torch.compile of that, for a fixed shape; compiled_freezing: with inductor's freezing of weights
  onnxruntime          ONNX of the re-parameterized model, fixed shape, opset 18 (CPU), with a profile by operator
  openvino, mnn        the same ONNX (CPU)
  executorch, litert   torch.export of the re-parameterized model, both with XNNPACK (CPU)
  ncnn                 its trace by pnnx (CPU); no batches, images come one after another
  onnxruntime_int8, openvino_int8, executorch_int8, litert_int8, mnn_int8: in int8, calibrated with the images that are
                       timed (CPU)
  mnn_int8_weights     weights in int8, arithmetic in float32 (CPU)
  eager_amp, channels_last_amp, reparam_amp: under float16 autocast (CUDA)
  train, train_channels_last: forward, cross entropy, backward, SGD with momentum

A runtime that is not installed is skipped by name. The exit status is 1 if a network failed in a mode, or has other
logits than in PyTorch (in int8: by half of the largest); the others are reported all the same. Run it on a machine that
does nothing else: the default takes one to two hours on 2 cores. What only runs if it is named takes up to a minute
more for each network.

Figures on a CPU depend on the memory allocator: glibc returns freed memory to the system, and the page faults to get it
back cost up to 20 %. These settings keep it:
MALLOC_TOP_PAD_=1000000000 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_MMAP_THRESHOLD_=4000000000
"""
import argparse
import copy
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import numpy as np

os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # read as torch is imported: its profiler is to write no log

import timm
import torch
from runtimes import MODES, Candidate, check_logits, describe_error, profile_onnxruntime
from script_utils import BadInput, check_interrupt, device, number, requirements, run_script, write_file
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.flop_counter import FlopCounterMode

from timm_hbonet.hbonet import checkpoint_filter_fn

with requirements():
    import pandas as pd
    from benchmark_report import TIMES, write_report
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
IMAGE_SIZE = 224
MATMUL_SIZE = {'cpu': 2048, 'cuda': 8192}
GROWTH_MODELS = ('hbonet_100', 'hbonet_050', 'mobilenetv2_100')
GROWTH_SHAPES = (  # batch size, image size
    *((n, IMAGE_SIZE) for n in (1, 2, 4, 8, 16, 32, 64, 128)), *((1, n) for n in (96, 128, 160, 320, 448, 640)))
QUICK = dict(
    models=['hbonet_100', 'mobilenetv2_100'], modes=['eager', 'channels_last', 'reparam', 'onnxruntime'],
    batch_sizes=[1, 4], rounds=5, growth=False)
TRAINING = {'train': torch.contiguous_format, 'train_channels_last': torch.channels_last}
MATMUL = {'float32': torch.float32, 'float16': torch.float16}


def create_training_step(network: nn.Module, images: torch.Tensor, memory_format: torch.memory_format) -> Callable:
    network = copy.deepcopy(network).to(images.device, memory_format=memory_format)
    images = images.to(memory_format=memory_format)
    labels = torch.randint(network(images[:1]).shape[1], (len(images),), device=images.device)
    optimizer = torch.optim.SGD(network.train().parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


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


@dataclass
class Shaped(Candidate):
    """A candidate for images of a shape. It trains too, and without a network it is the matrix product ('matmul')."""
    batch_size: int = 1
    image_size: int = IMAGE_SIZE
    images: Optional[torch.Tensor] = None
    peak_memory: float = math.nan
    profile: Optional[Dict[str, List[float]]] = None

    def prepare(self, device: str, threads: int) -> None:
        self.images = torch.randn(self.batch_size, 3, self.image_size, self.image_size, device=device)
        if not self.network:
            a, b = torch.randn(2, *2 * [MATMUL_SIZE[device]], device=device, dtype=MATMUL[self.mode])
            self.predict = lambda images: torch.mm(a, b)
            self.predict(None)
            return
        if self.mode in TRAINING:
            step = create_training_step(self.network, self.images, TRAINING[self.mode])
            self.predict = lambda images: step()
            self.predict(None)
        else:
            self.build(self.images, threads, self.images)
            mode = MODES[self.mode]
            if mode.channels_last:
                self.images = self.images.to(memory_format=torch.channels_last)
            with torch.no_grad():
                if mode.packages:
                    logits = torch.as_tensor(self.predict(self.images))
                    check_logits(logits, self.network(self.images), mode.tolerance)
                    return
        self.peak_memory = measure_peak_memory(functools.partial(self.predict, self.images), device)

    def measure(self) -> None:
        if self.mode not in TRAINING:
            self.predict(self.images)
        self.time(self.images)

    def profile_runtime(self, threads: int) -> None:
        if self.mode == 'onnxruntime':
            self.profile = profile_onnxruntime(self.network, self.images, threads)

    def summarize(self, part: str, device: str) -> Dict[str, Any]:
        times = 1e3 * np.quantile([math.nan] if self.error else self.seconds, (0.5, 0.25, 0.75))
        # a backward pass has the gradients of inputs and of weights, each at the cost of the forward pass
        passes = self.batch_size * (3 if self.mode in TRAINING else 1)
        flops = passes * count_flops(self.network, self.image_size) if self.network else 2 * MATMUL_SIZE[device] ** 3
        return dict(
            part=part, model=self.model, mode=self.mode, batch_size=self.batch_size, image_size=self.image_size,
            **dict(zip(TIMES, times.tolist(), strict=True)), gflops_per_second=flops / times[0] / 1e6,
            peak_memory_bytes=self.peak_memory, file_bytes=self.file_bytes, error=self.error)


def run(part: str, candidates: List[Shaped], args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Time candidates and the matrix product in turn, and return a row of results each."""
    precisions = list(MATMUL) if any(c.mode.endswith('_amp') for c in candidates) else ['float32']
    size = candidates[0].batch_size
    everyone = [*(Shaped('matmul', None, name, batch_size=size) for name in precisions), *candidates]
    for candidate in tqdm(everyone, desc=f'{part}, building', unit='candidate'):
        check_interrupt()
        candidate.attempt(candidate.prepare, args.device, args.threads)
    order = random.Random(0)
    for _ in tqdm(range(args.rounds), desc=f'{part}, timing', unit='round'):
        check_interrupt()
        for candidate in order.sample(everyone, len(everyone)):
            candidate.attempt(candidate.measure)
    for candidate in everyone:
        candidate.attempt(candidate.profile_runtime, args.threads)
        candidate.predict = candidate.images = None
    torch.compiler.reset()
    return [candidate.summarize(part, args.device) for candidate in everyone]


def create_network(create: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    network = create()
    # norms with the statistics of noise: else activations can shrink to subnormal numbers, which are slow
    update_bn([torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE)], network)
    count_flops(network.eval(), IMAGE_SIZE)
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
    needed = (package.lower() for mode in MODES.values() for package in mode.packages)
    packages = {'torch', 'timm', 'timm_hbonet', *needed}
    return dict(
        gpu=torch.cuda.get_device_name() if args.device == 'cuda' else None,
        cpu=capabilities.get('cpu_name') or platform.processor(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        flags=sorted(name for name, value in capabilities.items() if value is True),
        cores=os.cpu_count(), threads=args.threads, os=platform.platform(), python=platform.python_version(),
        versions={
            d.name: d.version for d in importlib.metadata.distributions()
            if (d.name or '').lower().replace('-', '_') in packages},
        environment={k: v for k, v in os.environ.items() if k.startswith(('MALLOC_', 'GLIBC_', 'LD_PRELOAD', 'OMP_'))})


def measure(networks: Dict[str, nn.Module], args: argparse.Namespace) -> Dict[str, Any]:
    """Time all that was asked for, and return the report."""
    names = [*args.models, *(name for name in networks if name.startswith('authors_'))]
    candidates = {}
    for training, n in (*((False, n) for n in args.batch_sizes), (True, args.train_batch_size)):
        candidates[f'{"training, " * training}batch size {n}'] = [
            Shaped(name, networks[name], mode, batch_size=n)
            for mode in args.modes if (mode in TRAINING) == training for name in names]
    candidates['growth'] = [
        Shaped(name, networks[name], 'reparam', batch_size=n, image_size=size)
        for name in GROWTH_MODELS if args.growth for n, size in GROWTH_SHAPES]
    rows = [row for part, chosen in candidates.items() if chosen for row in run(part, chosen, args)]
    return dict(
        machine=describe_machine(args),
        settings={k: v.name if isinstance(v, Path) else v for k, v in vars(args).items() if k != 'output'},
        top1={name: value for name, value in TOP1.items() if name.split('.')[0] in names},
        results=json.loads(pd.DataFrame(rows).to_json(orient='split', index=False)),
        profiles={part: {c.model: c.profile for c in chosen if c.profile} for part, chosen in candidates.items()})


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    on_request = ', '.join(name for name, mode in MODES.items() if mode.on_request)
    add('output', type=Path, metavar='OUTPUT_FOLDER', help='folder for the results')
    add('--models', nargs='+', metavar='NAME', default=MODELS, help='names or wildcards (default: %(default)s)')
    add('--modes', nargs='+', choices=[*MODES, *TRAINING], metavar='MODE',
        help=f'all that the device has but {on_request}, if none is given')
    add('--batch-sizes', nargs='+', type=number(int, 1), metavar='N', default=[1, 16],
        help='for inference (default: 1 16)')
    add('--train-batch-size', type=number(int, 1), default=32, metavar='N', help='(default: %(default)s)')
    add('--threads', type=number(int, 1), default=torch.get_num_threads(), metavar='N',
        help='of the CPU (default: %(default)s)')
    add('--rounds', type=number(int, 1), default=15, metavar='N',
        help='timed calls of each network (default: %(default)s)')
    add('--device', type=device, choices=['cpu', 'cuda'], default='cpu', help='(default: %(default)s)')
    add('--reference', type=Path, metavar='PATH',
        help="hbonet.py of a checkout of the authors' repository, to be compared at each width that --models has")
    add('--growth', action=argparse.BooleanOptionalAction, default=True,
        help=f'also time {", ".join(GROWTH_MODELS)} at batch sizes 1 to 128 and image sizes 96 to 640')
    add('--quick', action='store_true', help='other defaults, for a minute: 2 models, 4 modes, batch sizes 1 and 4')
    return parser


def choose_modes(args: argparse.Namespace) -> None:
    """Set `args.modes` to those that can run, and `args.skipped` to those that cannot, with the reasons."""
    modes = {name: mode for name, mode in MODES.items() if args.device in mode.devices}
    args.modes = list(dict.fromkeys(args.modes or [
        *(name for name, mode in modes.items() if not mode.on_request), *TRAINING]))
    args.skipped = []
    for name in tuple(args.modes):
        if name in TRAINING:
            continue
        if name not in modes:
            raise BadInput(f'--modes {name} is not for --device {args.device}, which has {", ".join(modes)}.')
        if missing := modes[name].find_missing():
            args.modes.remove(name)
            args.skipped.append(f"{name}: needs {', '.join(missing)}. Run: pip install {' '.join(missing)}")
            print(f'benchmark.py: skipping {args.skipped[-1]}', file=sys.stderr)
    if not args.modes:
        raise BadInput('none of --modes is installed.')


def main(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if args.quick:
        parser.set_defaults(**QUICK)
        args = parser.parse_args()
    choose_modes(args)
    args.models = list(dict.fromkeys(model for name in args.models for model in timm.list_models(name) or [name]))
    if args.reference and not any(re.fullmatch(r'hbonet_\d{3}', name) for name in args.models):
        raise BadInput('--reference is compared with hbonet_100 and its other widths, add one of them to --models.')
    torch.set_num_threads(args.threads)
    if args.device == 'cuda':
        torch.set_float32_matmul_precision('high')  # TF32, as convolutions use it by default
    networks = create_networks(args)
    args.output.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=args.output).close()  # fails now if it cannot be written

    report = measure(networks, args)
    results = pd.DataFrame(**report['results'])
    write_file(args.output / 'benchmark.csv', results.to_csv(index=False).encode())
    write_file(args.output / 'benchmark.json', json.dumps(report).encode())
    print(write_report(args.output))
    if failed := results['error'].notna().sum():
        raise BadInput(f'{failed} of {len(results)} failed, see the end of {args.output / "benchmark.md"}.')


if __name__ == '__main__':
    run_script(main, create_parser())
