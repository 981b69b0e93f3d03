"""An installed timm-hbonet registers its models wherever timm is imported, and changes nothing else.

The package is built and installed into virtual environments of its own, and child interpreters say what they see.
All but one use stand-ins that are imported within milliseconds: timm's real registry without models, and in place of
the network, which needs torch, a class.
"""
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest
import reference

ROOT = Path(__file__).parents[1]
STARTUP_FILES = {'_timm_hbonet_autoload.py', 'timm_hbonet.pth', 'timm_hbonet.start'}
OFFLINE = ['--no-index', '--no-deps', '--no-build-isolation']
LIST_MODELS = "import timm; print(timm.list_models('hbonet*'))"
# registers one model, without torch, and counts how often it is imported
NETWORK = """
import timm
from timm.models import register_model
timm.imports_of_plugin = getattr(timm, 'imports_of_plugin', 0) + 1
class HBONet: pass
@register_model
def hbonet_100(): return HBONet()
"""
FAMILY_IN_TIMM = """
from ._registry import register_model
__all__ = ['HBONet']
class HBONet: pass
@register_model
def hbonet_100(): pass
"""
FAKE_TIMM = """
import os
if 'BREAK_TIMM' in os.environ: raise ImportError('timm is broken')
from .models import is_model, list_models, model_entrypoint
"""


def run_module(*args):
    """Run a module of this environment, in the repository."""
    command = [sys.executable, '-m', *map(str, args)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


class Environment:
    """A virtual environment, with the packages of the running one if `inherit` is set, but not their start-up files."""

    def __init__(self, path, inherit=False):
        venv.create(path, with_pip=False)
        self.path = path
        self.python = path / ('Scripts/python.exe' if os.name == 'nt' else 'bin/python')
        self.site = Path(self.run_code('import sysconfig; print(sysconfig.get_path("purelib"))').strip())
        if inherit:
            packages = {sysconfig.get_path('purelib'), sysconfig.get_path('platlib')}
            packages |= {str(Path(importlib.util.find_spec(name).origin).parents[1]) for name in ('timm', 'torch')}
            # a path in a .pth file is searched for modules, the .pth files in it are not read
            (self.site / 'inherited.pth').write_text('\n'.join(packages))

    def run(self, code, *options, **env):
        """Run code and return the completed process."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(('PYTHON', 'TIMM_HBONET_'))} | {
            k: str(v) for k, v in env.items()}
        command = [self.python, *options, '-c', textwrap.dedent(code)]
        result = subprocess.run(command, env=env, cwd=self.path, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return result

    def run_code(self, code, *options, **env):
        """Run code that must print nothing to stderr, and return what it prints."""
        result = self.run(code, *options, **env)
        assert result.stderr == ''
        return result.stdout

    def pip(self, *args):
        run_module('pip', '--python', self.python, '--disable-pip-version-check', *args)

    def install(self, *args):
        self.pip('install', *OFFLINE, '--ignore-installed', *args)

    def files(self):
        return {path.relative_to(self.site) for path in self.site.rglob('*') if path.is_file()}


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """A wheel that is built from the source distribution, as for a release."""
    path = tmp_path_factory.mktemp('dist')
    run_module('hatchling', 'build', '-d', path, '-t', 'sdist')
    sdist = next(path.glob('*.tar.gz'))
    run_module('pip', 'wheel', *OFFLINE, '-w', path, sdist)
    return next(path.glob('*.whl'))


@pytest.fixture(scope='module')
def bare(wheel, tmp_path_factory):
    """The wheel, with a stand-in for the network, installed where there are neither timm nor torch."""
    environment = Environment(tmp_path_factory.mktemp('bare'))
    environment.install(wheel)
    (environment.site / 'timm_hbonet/hbonet.py').write_text(NETWORK)
    return environment


@pytest.fixture
def fake_timm(tmp_path):
    """Folder of a `timm` that has timm's real registry and no models, and fails to import where BREAK_TIMM is set."""
    source = Path(importlib.util.find_spec('timm').origin).parent / 'models'
    package = tmp_path / 'fake_timm/timm'
    (package / 'models').mkdir(parents=True)
    for name in ('_registry.py', '_pretrained.py'):
        shutil.copy(source / name, package / 'models')
    (package / 'models/__init__.py').write_text('from ._registry import *\n')
    (package / '__init__.py').write_text(FAKE_TIMM)
    return package.parent


# What is shipped


def test_wheel_has_the_package_and_the_startup_files(wheel):
    package = {f'timm_hbonet/{path.name}' for path in (ROOT / 'timm_hbonet').iterdir() if path.is_file()}
    assert 'timm_hbonet/py.typed' in package
    with zipfile.ZipFile(wheel) as file:
        assert {name for name in file.namelist() if '.dist-info/' not in name} == package | STARTUP_FILES


def test_startup_loads_one_small_module(bare):
    without = Environment(bare.path / 'without')
    code = 'import sys; print(*sys.modules)'
    (without.site / 'other.pth').write_text('import os')  # that a start-up file is run loads modules of its own
    added = set(bare.run_code(code).split()) - set(without.run_code(code).split())
    assert added == {'_timm_hbonet_autoload'}


@pytest.mark.parametrize('editable', [False, True])
def test_install_registers_all_models_and_uninstall_leaves_nothing(wheel, tmp_path, editable):
    environment = Environment(tmp_path, inherit=True)
    before = environment.files()
    environment.install(*(['-e', ROOT] if editable else [wheel]))
    assert {Path(name) for name in STARTUP_FILES} <= environment.files()
    package = (ROOT if editable else environment.site) / 'timm_hbonet/__init__.py'
    find = 'import importlib.util; print(importlib.util.find_spec("timm_hbonet").origin)'
    assert environment.run_code(find) == f'{package}\n'
    if not editable:  # with all of timm
        create = "from timm.models import create_model; print(type(create_model('hbonet_010')).__name__); "
        assert environment.run(create + LIST_MODELS).stdout == f'HBONet\n{sorted(reference.ARCHITECTURES)}\n'
    environment.pip('uninstall', '--yes', 'timm-hbonet')
    assert environment.files() == before


# Every program knows the models


@pytest.mark.parametrize('options, env', [(['-S'], {}), ([], {'TIMM_HBONET_AUTOLOAD': 0})])
def test_explicit_import_where_startup_files_are_not_read_or_switched_off(bare, fake_timm, options, env):
    code = LIST_MODELS + '; import timm_hbonet; print(timm_hbonet.HBONet); ' + LIST_MODELS
    stdout = bare.run_code(code, *options, PYTHONPATH=os.pathsep.join(map(str, [bare.site, fake_timm])), **env)
    assert stdout == "[]\n<class 'timm_hbonet.hbonet.HBONet'>\n['hbonet_100']\n"


def test_start_file_does_the_same(bare, fake_timm):
    # what Python does with it from 3.15 on
    entry_point = (bare.site / 'timm_hbonet.start').read_text().strip()
    start = f'import pkgutil, sys; sys.path.append({str(bare.site)!r}); pkgutil.resolve_name({entry_point!r})(); '
    start += 'assert "timm" not in sys.modules; '
    assert bare.run_code(start + LIST_MODELS, '-S', PYTHONPATH=fake_timm) == "['hbonet_100']\n"


# It stays out of the way


def test_broken_plugin_is_one_line_that_names_the_cause(bare, fake_timm):
    (fake_timm / 'timm_hbonet.py').write_text('raise OSError("the disk is on fire")')
    result = bare.run(LIST_MODELS, '-W', 'error', PYTHONPATH=fake_timm)
    assert result.stdout == '[]\n'
    assert result.stderr.count('\n') == 1
    assert 'timm-hbonet could not register' in result.stderr and 'OSError: the disk is on fire' in result.stderr


@pytest.mark.parametrize('order', ['import timm, timm_hbonet', 'import timm_hbonet, timm'])
def test_steps_aside_for_a_timm_that_has_the_family(bare, fake_timm, order):
    with open(fake_timm / 'timm/models/__init__.py', 'a') as f:
        f.write('from .hbonet import *\n')
    (fake_timm / 'timm/models/hbonet.py').write_text(FAMILY_IN_TIMM)
    code = order + '; print(timm.model_entrypoint("hbonet_100").__module__, timm_hbonet.HBONet, timm.list_models())'
    assert bare.run_code(code, '-W', 'error', PYTHONPATH=fake_timm) == (
        "timm.models.hbonet <class 'timm.models.hbonet.HBONet'> ['hbonet_100']\n")


# Whatever a program does with its imports


@pytest.mark.parametrize('file, found, warnings', [
    ('other.py', False, 0),
    ('timm/data.py', True, 0),
    ('timm.py', True, 1),  # a timm that the plugin cannot work with
])
def test_no_timm_and_other_things_of_that_name(bare, tmp_path, file, found, warnings):
    path = tmp_path / 'path' / file
    path.parent.mkdir(parents=True)
    path.touch()
    code = "import importlib.util; print(importlib.util.find_spec('timm') is not None)"
    result = bare.run(code + '\n' + 'import timm' * found, PYTHONPATH=tmp_path / 'path')
    assert result.stdout == f'{found}\n' and result.stderr.count('\n') == warnings


def test_timm_in_a_zip_file(bare, fake_timm, tmp_path):
    archive = shutil.make_archive(tmp_path / 'all', 'zip', fake_timm)
    assert bare.run_code(LIST_MODELS, PYTHONPATH=archive) == "['hbonet_100']\n"


@pytest.mark.parametrize('code', [
    pytest.param("""
        import importlib.util, sys
        for _ in range(2):
            assert importlib.util.find_spec('timm').origin.endswith('__init__.py')
        assert not {'timm', 'timm_hbonet'} & set(sys.modules)
        import timm
        assert timm.is_model('hbonet_100')
        for finder in sys.meta_path:
            finder.find_spec('timm')
        assert type(timm.__loader__) is type(timm.__spec__.loader) is type(timm.models.__loader__)
        importlib.reload(timm)
        assert timm.is_model('hbonet_100') and timm.imports_of_plugin == 1
    """, id='looked for, then imported and reloaded'),
    pytest.param("""
        import os, sys
        os.environ['BREAK_TIMM'] = '1'
        try:
            import timm
        except ImportError as e:
            assert str(e) == 'timm is broken'
        assert not {'timm', 'timm_hbonet'} & set(sys.modules)
        del os.environ['BREAK_TIMM']
        import timm
        assert timm.is_model('hbonet_100')
    """, id='failed, then tried again'),
    pytest.param("""
        import importlib, sys, timm
        for kept in ([], ['timm_hbonet'], ['timm.models'], ['timm_hbonet', 'timm.models']):
            old = timm
            for name in list(sys.modules):
                if name.startswith('timm') and not any((name + '.').startswith(k + '.') for k in kept):
                    del sys.modules[name]
            import timm
            assert timm is not old and timm.is_model('hbonet_100')
            import timm_hbonet
            assert type(timm.model_entrypoint('hbonet_100')()) is timm_hbonet.HBONet
            importlib.reload(timm_hbonet)
            assert type(timm.model_entrypoint('hbonet_100')()) is timm_hbonet.HBONet
    """, id='deleted, then imported anew'),
])
def test_timm_that_is(bare, fake_timm, code):
    bare.run_code(code, PYTHONPATH=fake_timm)


@pytest.mark.parametrize('options', [[], ['-S']])
def test_startup_files_read_twice_or_late(bare, fake_timm, options):
    bare.run_code(f"""
        import site, sys, timm
        assert timm.is_model('hbonet_100') == (not sys.flags.no_site)
        site.addsitedir({str(bare.site)!r})
        assert timm.is_model('hbonet_100') and timm.imports_of_plugin == 1
        assert [type(finder).__name__ for finder in sys.meta_path].count('_TimmFinder') == 1
    """, *options, PYTHONPATH=fake_timm)


@pytest.mark.parametrize('second', ['timm', 'timm_hbonet'])
def test_threads_that_import_at_the_same_time(bare, fake_timm, second):
    with open(fake_timm / 'timm/__init__.py', 'a') as f:
        f.write('import __main__; __main__.wait_for_the_other()\n')
    bare.run_code(f"""
        import sys, threading, time
        in_timm, known = threading.Event(), []

        def wait_for_the_other():  # within its import, of which no one can say that it has begun to wait
            in_timm.set()
            deadline = time.monotonic() + 60
            while {second!r} not in sys.modules and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.05)

        def import_second():
            in_timm.wait(60)
            import {second}, timm
            known.append(timm.is_model('hbonet_100'))

        threads = [threading.Thread(target=import_second) for _ in range(4)]
        for thread in threads:
            thread.start()
        import timm
        for thread in threads:
            thread.join()
        assert known == [True] * 4 and timm.is_model('hbonet_100') and timm.imports_of_plugin == 1
    """, PYTHONPATH=fake_timm)
