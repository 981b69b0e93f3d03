#!/usr/bin/env python3
"""Measure what an installed timm-hbonet adds to the start of the interpreter, and to `import timm`.

It compares two virtual environments that differ in the start-up files only (the .pth file or, from Python 3.15 on, the
.start file, and the module that they run). timm and timm_hbonet are those of the running environment. The two are run
in turn, and medians are compared.

Goals: at most 1 ms more for the interpreter's start, at most 3 % more for the import. The exit status is 1 if one is
missed. Run it on a machine that does nothing else.
"""
import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

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


def measure(python: Path, code: str) -> float:
    """Run code in a new interpreter and return the seconds that it took from start to end."""
    start = time.perf_counter()
    subprocess.run([python, '-c', code], env=ENVIRONMENT, check=True)
    return time.perf_counter() - start


def compare(label: str, pythons: list[Path], code: str, runs: int) -> tuple[float, float]:
    """Median seconds of `code` in the two environments, measured in turn."""
    seconds = [[], []]
    for run in tqdm(range(runs + 1), desc=label):
        for which in (0, 1) if run % 2 else (1, 0):
            seconds[which].append(measure(pythons[which], code))
    # the first run fills the caches
    return statistics.median(seconds[0][1:]), statistics.median(seconds[1][1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--starts', type=int, default=300, metavar='N', help='interpreter starts each (default: 300)')
    parser.add_argument('--imports', type=int, default=15, metavar='N', help='imports of timm each (default: 15)')
    args = parser.parse_args()
    for name in ('starts', 'imports'):
        if getattr(args, name) < 1:
            parser.error(f'--{name} {getattr(args, name)}: at least 1 is needed')
    for name in ('timm', 'timm_hbonet'):
        if importlib.util.find_spec(name) is None:
            parser.error(f'{name} is not installed for {sys.executable}: run pip install "timm-hbonet[scripts]"')

    with tempfile.TemporaryDirectory() as folder:
        pythons = [make_environment(Path(folder, name), name == 'with') for name in ('without', 'with')]
        without, with_ = compare('interpreter start', pythons, 'pass', args.starts)
        start = with_ - without
        print(f'interpreter start: {without * 1e3:.2f} ms without, {with_ * 1e3:.2f} ms with, '
              f'difference {start * 1e3:+.2f} ms (goal: at most 1 ms)')
        without, with_ = compare('import timm', pythons, 'import timm', args.imports)
        share = (with_ - without) / without
        print(f'import timm: {without:.3f} s without, {with_:.3f} s with, '
              f'difference {share:+.1%} (goal: at most 3 %)')
    return int(start > 1e-3 or share > 0.03)


if __name__ == '__main__':
    sys.exit(main())
