"""Runs a script of ours in this process, which has the libraries loaded."""
import contextlib
import importlib
import io
import sys
from pathlib import Path
from typing import Tuple

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
