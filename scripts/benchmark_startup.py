#!/usr/bin/env python3
"""Measure what an installed timm-hbonet adds to the start of the interpreter, and to `import timm`; then what it takes
to create a model, and to load its weights.

It compares two virtual environments that differ in the start-up files only (the .pth file or, from Python 3.15 on, the
.start file, and the module that they run). timm and timm_hbonet are those of the running environment. The two are run
in turn, and medians are compared.

Goals: at most 1 ms more for the interpreter's start, at most 3 % more for the import. The exit status is 1 if one is
missed. Run it on a machine that does nothing else.

Models are created in turn with timm's mobilenetv2_100, and the weights loaded as safetensors and as a file of
`torch.save`, all in this process.
"""
import argparse
import functools
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any, Callable

from tqdm import tqdm

AUTOLOAD = Path(__file__).parents[1] / 'autoload'
# without PYTHONDONTWRITEBYTECODE above all: modules are compiled once, by the installer or the first run
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(('PYTHON', 'TIMM_HBONET_'))}


def make_environment(path: Path, startup_files: bool) -> Path:
    """Make an environment where the running one's timm and timm_hbonet can be imported, and return its interpreter."""
    venv.create(path, with_pip=False)
    python = path / ('Scripts/python.exe' if os.name == 'nt' else 'bin/python')
    code = 'import sysconfig; print(sysconfig.get_path("purelib"))'
    site = Path(subprocess.check_output([python, '-c', code], env=ENVIRONMENT, text=True).strip())
    packages = {Path(importlib.util.find_spec(name).origin).parents[1] for name in ('timm', 'timm_hbonet', 'torch')}
    # a path in a .pth file is searched for modules, the .pth files in it are not read
    (site / 'packages.pth').write_text('\n'.join(map(str, packages)))
    if startup_files:
        for file in AUTOLOAD.glob('*timm_hbonet*.*'):
            (site / file.name).write_bytes(file.read_bytes())
    return python


def run_code(python: Path, code: str) -> None:
    subprocess.run([python, '-c', code], env=ENVIRONMENT, check=True)


def median_seconds(label: str, functions: dict[str, Callable[[], Any]], runs: int) -> list[float]:
    """Median seconds of functions that are called in turn."""
    seconds = {name: [] for name in functions}
    for run in tqdm(range(runs + 1), desc=label):
        for name in sorted(functions, reverse=run % 2):
            start = time.perf_counter()
            functions[name]()
            seconds[name].append(time.perf_counter() - start)
    # the first run fills the caches
    return [statistics.median(values[1:]) for values in seconds.values()]


def measure_models(folder: Path, runs: int) -> None:
    """Print what it takes to create and to load hbonet_100."""
    import safetensors.torch
    import timm
    import torch

    names = ('hbonet_100', 'mobilenetv2_100')
    creations = {name: functools.partial(timm.create_model, name) for name in names}
    for name, seconds in zip(names, median_seconds('create_model', creations, runs), strict=True):
        model = timm.create_model(name)
        count = sum(p.numel() for p in model.parameters())
        print(f'create_model: {name} {seconds * 1e3:.1f} ms, {seconds / count * 1e9:.1f} ns a parameter')

    model = timm.create_model('hbonet_100')
    files = {'safetensors': folder / 'model.safetensors', 'torch.save': folder / 'model.pth'}
    safetensors.torch.save_file(model.state_dict(), files['safetensors'])
    torch.save(model.state_dict(), files['torch.save'])
    loads = {
        name: functools.partial(timm.models.load_checkpoint, model, path, weights_only=True)
        for name, path in files.items()}
    for name, seconds in zip(files, median_seconds('load weights', loads, runs), strict=True):
        print(f'load hbonet_100: {name} {seconds * 1e3:.1f} ms')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--starts', type=int, default=300, metavar='N', help='interpreter starts each (default: 300)')
    parser.add_argument('--imports', type=int, default=15, metavar='N', help='imports of timm each (default: 15)')
    parser.add_argument('--models', type=int, default=40, metavar='N', help='models created and loaded (default: 40)')
    args = parser.parse_args()
    for name in ('starts', 'imports', 'models'):
        if getattr(args, name) < 1:
            parser.error(f'--{name} {getattr(args, name)}: at least 1 is needed')
    for name in ('timm', 'timm_hbonet'):
        if importlib.util.find_spec(name) is None:
            parser.error(f'{name} is not installed for {sys.executable}: run pip install -e ".[scripts]"')

    with tempfile.TemporaryDirectory() as folder:
        pythons = {name: make_environment(Path(folder, name), name == 'with') for name in ('without', 'with')}
        without, with_ = median_seconds(
            'interpreter start', {k: functools.partial(run_code, v, 'pass') for k, v in pythons.items()}, args.starts)
        start = with_ - without
        print(f'interpreter start: {without * 1e3:.2f} ms without, {with_ * 1e3:.2f} ms with, '
              f'difference {start * 1e3:+.2f} ms (goal: at most 1 ms)')
        without, with_ = median_seconds(
            'import timm', {k: functools.partial(run_code, v, 'import timm') for k, v in pythons.items()}, args.imports)
        share = (with_ - without) / without
        print(f'import timm: {without:.3f} s without, {with_:.3f} s with, '
              f'difference {share:+.1%} (goal: at most 3 %)')
        measure_models(Path(folder), args.models)
    return int(start > 1e-3 or share > 0.03)


if __name__ == '__main__':
    sys.exit(main())
