"""Runs a script of ours in this process, which has the libraries loaded."""
import contextlib
import csv
import importlib
import io
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, Tuple

import pytest

SCRIPTS = Path(__file__).parents[1] / 'scripts'
sys.path.insert(0, str(SCRIPTS))


def run_script(name: str, *args: object) -> Tuple[int, str, str]:
    """Returns the exit status, and what is written to stdout and stderr. Bars are cleared as on a screen."""
    import script_utils
    script = importlib.import_module(Path(name).stem)
    status = 0
    with (
            pytest.MonkeyPatch.context() as monkeypatch,
            contextlib.redirect_stdout(io.StringIO()) as stdout,
            contextlib.redirect_stderr(io.StringIO()) as stderr,
    ):
        monkeypatch.setattr(sys, 'argv', [name, *map(str, args)])
        monkeypatch.setattr(script_utils.signal, 'signal', lambda *args: None)  # the tests' own stays
        try:
            script_utils.run_script(script.main, script.create_parser())
        except SystemExit as e:
            status = e.code
    return status, stdout.getvalue(), stderr.getvalue().replace('\r', '\n')


def error_line(stderr: str) -> str:
    """The last line, and the only one but for progress and usage."""
    assert 'Traceback' not in stderr
    return stderr.splitlines()[-1].strip()


def fail_script(name: str, *args: object) -> str:
    """The error of a call that must end with one."""
    status, _, err = run_script(name, *args)
    line = error_line(err)
    assert status == 1 and line.startswith(f'{name}: error: '), err
    return line


def run_two_processes(name: str, *args: object) -> Tuple[str, str]:
    """What a script by torchrun writes to stdout and stderr."""
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', SCRIPTS / name]
    result = subprocess.run([*map(str, [*launch, *args])], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


def read_csv(path: Path) -> List[Dict[str, str]]:
    with open(path, newline='') as file:
        return list(csv.DictReader(file))
