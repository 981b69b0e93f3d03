"""An installed timm-hbonet registers its models wherever timm is imported, and changes nothing else.

The package is built and installed into virtual environments of its own, and child interpreters say what they see.
All but one use stand-ins that are imported within milliseconds: timm's real registry without models, and in place of
the network, which needs torch, a class.
"""
import importlib.util
import os
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
        self.site = Path(self.run('-c', 'import sysconfig; print(sysconfig.get_path("purelib"))').stdout.strip())
        if inherit:
            packages = {sysconfig.get_path('purelib'), sysconfig.get_path('platlib')}
            packages |= {str(Path(importlib.util.find_spec(name).origin).parents[1]) for name in ('timm', 'torch')}
            # a path in a .pth file is searched for modules, the .pth files in it are not read
            (self.site / 'inherited.pth').write_text('\n'.join(packages))

    def run(self, *args, **env):
        """Run the interpreter and return the completed process."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(('PYTHON', 'TIMM_HBONET_'))}
        env = {**clean, **{k: str(v) for k, v in env.items()}}
        result = subprocess.run([self.python, *args], env=env, cwd=self.path, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return result

    def run_code(self, code, *options, **env):
        """Run code that must print nothing to stderr, and return what it prints."""
        result = self.run(*options, '-c', textwrap.dedent(code), **env)
        assert result.stderr == ''
        return result.stdout

    def pip(self, *args):
        run_module('pip', '--python', self.python, '--disable-pip-version-check', *args)

    def install(self, *args):
        self.pip('install', *OFFLINE, '--ignore-installed', *args)

    def files(self):
        return {path.relative_to(self.site) for path in self.site.rglob('*') if path.is_file()}


def write_network(package):
    """Write the module that registers the models: one, that needs no torch, and counts the imports of the module."""
    (package / 'hbonet.py').write_text(
        'import timm\n'
        'from timm.models import register_model\n'
        'timm.imports_of_plugin = getattr(timm, "imports_of_plugin", 0) + 1\n'
        'class HBONet: pass\n'
        '@register_model\n'
        'def hbonet_100(): return HBONet()\n'
    )


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
    write_network(environment.site / 'timm_hbonet')
    return environment


@pytest.fixture
def fake_timm(tmp_path):
    """Folder of a `timm` that has timm's real registry and no models, and fails to import where BREAK_TIMM is set."""
    source = Path(importlib.util.find_spec('timm').origin).parent / 'models'
    package = tmp_path / 'fake_timm/timm'
    (package / 'models').mkdir(parents=True)
    for name in ('_registry.py', '_pretrained.py'):
        (package / 'models' / name).write_text((source / name).read_text())
    (package / 'models/__init__.py').write_text('from ._registry import *\n')
    (package / '__init__.py').write_text(
        'import os\n'
        'if "BREAK_TIMM" in os.environ: raise ImportError("timm is broken")\n'
        'from .models import is_model, list_models, model_entrypoint\n'
    )
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
    added = set(bare.run('-c', code).stdout.split()) - set(without.run('-c', code).stdout.split())
    assert added == {'_timm_hbonet_autoload'}


# Every program knows the models


def test_after_pip_install(wheel, tmp_path):
    environment = Environment(tmp_path, inherit=True)
    environment.install(wheel)
    code = "from timm.models import create_model; print(type(create_model('hbonet_010')).__name__); " + LIST_MODELS
    assert environment.run('-c', code).stdout == f'HBONet\n{sorted(reference.ARCHITECTURES)}\n'


def test_explicit_import_where_startup_files_are_not_read(wheel, fake_timm, tmp_path):
    environment = Environment(tmp_path / 'environment')
    target = tmp_path / 'target'
    environment.install('--target', target, wheel)
    write_network(target / 'timm_hbonet')
    code = LIST_MODELS + '; import timm_hbonet; print(timm_hbonet.HBONet); ' + LIST_MODELS
    stdout = environment.run_code(code, PYTHONPATH=os.pathsep.join(map(str, [target, fake_timm])))
    assert stdout == "[]\n<class 'timm_hbonet.hbonet.HBONet'>\n['hbonet_100']\n"


def test_start_file_does_the_same(bare, fake_timm):
    # from Python 3.15 on, it stands in for the .pth file's import: the line is resolved and called with no arguments
    entry_point = (bare.site / 'timm_hbonet.start').read_text().strip()
    module, function = entry_point.split(':')
    assert (bare.site / 'timm_hbonet.pth').read_text().strip() == f'import {module}; {module}.{function}()'
    bare.run_code(f"""
        import pkgutil, sys
        sys.path.append({str(bare.site)!r})
        pkgutil.resolve_name({entry_point!r})()
        import timm
        assert timm.is_model('hbonet_100')
    """, '-S', PYTHONPATH=fake_timm)


def test_spawned_worker(bare, fake_timm, tmp_path):
    script = tmp_path / 'program.py'
    script.write_text(textwrap.dedent("""
        import multiprocessing, sys

        def is_known(name):
            import timm
            return timm.is_model(name)

        if __name__ == '__main__':
            with multiprocessing.get_context('spawn').Pool(1) as pool:
                print(*pool.map(is_known, ['hbonet_100']), 'timm' in sys.modules)
    """))
    # known in the worker, that has not got it from the parent
    assert bare.run(script, PYTHONPATH=fake_timm).stdout == 'True False\n'


# It stays out of the way


def test_switched_off_until_it_is_imported(bare, fake_timm):
    code = LIST_MODELS + '; import timm_hbonet; ' + LIST_MODELS
    assert bare.run_code(code, TIMM_HBONET_AUTOLOAD=0, PYTHONPATH=fake_timm) == "[]\n['hbonet_100']\n"


@pytest.mark.parametrize('warnings', ['default', 'error'])
def test_broken_plugin_is_one_warning_that_names_the_cause(bare, fake_timm, warnings):
    (fake_timm / 'timm_hbonet.py').write_text('raise OSError("the disk is on fire")')
    result = bare.run('-W', warnings, '-c', LIST_MODELS, PYTHONPATH=fake_timm)
    assert result.stdout == '[]\n'
    assert result.stderr.count('\n') == 1
    assert 'timm-hbonet could not register' in result.stderr and 'OSError: the disk is on fire' in result.stderr


@pytest.mark.parametrize('order', ['import timm, timm_hbonet', 'import timm_hbonet, timm'])
def test_steps_aside_for_a_timm_that_has_the_family(bare, fake_timm, order):
    with open(fake_timm / 'timm/models/__init__.py', 'a') as f:
        f.write('from .hbonet import *\n')
    (fake_timm / 'timm/models/hbonet.py').write_text(
        'from ._registry import register_model\n'
        '__all__ = ["HBONet"]\n'
        'class HBONet: pass\n'
        '@register_model\n'
        'def hbonet_100(): pass\n'
    )
    code = order + '; print(timm.model_entrypoint("hbonet_100").__module__, timm_hbonet.HBONet, timm.list_models())'
    assert bare.run_code(code, '-W', 'error', PYTHONPATH=fake_timm) == (
        "timm.models.hbonet <class 'timm.models.hbonet.HBONet'> ['hbonet_100']\n")


@pytest.mark.parametrize('editable', [False, True])
def test_uninstall_leaves_nothing(wheel, tmp_path, editable):
    environment = Environment(tmp_path, inherit=editable)  # the editable install needs hatchling
    before = environment.files()
    environment.install(*(['-e', ROOT] if editable else [wheel]))
    assert {Path(name) for name in STARTUP_FILES} <= environment.files()
    code = 'import importlib.util, sys; print("_timm_hbonet_autoload" in sys.modules, importlib.util.find_spec("{}"){})'
    package = (ROOT if editable else environment.site) / 'timm_hbonet/__init__.py'
    assert environment.run_code(code.format('timm_hbonet', '.origin')) == f'True {package}\n'
    environment.pip('uninstall', '--yes', 'timm-hbonet')
    assert environment.files() == before
    assert environment.run_code(code.format('timm_hbonet', '')) == 'False None\n'


# Whatever a program does with its imports


@pytest.mark.parametrize('timm', ['none', 'folder', 'module', 'blocked'])
def test_no_timm_and_other_things_of_that_name(bare, tmp_path, timm):
    if timm == 'folder':
        (tmp_path / 'timm').mkdir()
    elif timm == 'module':
        (tmp_path / 'timm.py').write_text('x = 1')
    result = bare.run('-c', f"""if True:
        import importlib.util, sys
        assert {timm in ('none', 'blocked')} == (importlib.util.find_spec('timm') is None)
        if {timm == 'blocked'}:
            sys.modules['timm'] = None
            import _timm_hbonet_autoload
            _timm_hbonet_autoload.install()
        try:
            import timm
            print(timm.__name__)
        except ModuleNotFoundError as e:
            print(e.name)
    """, PYTHONPATH=tmp_path)
    assert result.stdout == 'timm\n'
    # a module of that name is a timm that the plugin cannot work with
    assert result.stderr.count('\n') == (timm == 'module')


def test_timm_is_found_as_without_the_plugin(bare, fake_timm):
    bare.run_code("""
        import importlib.util, sys
        from importlib.machinery import SourceFileLoader
        for _ in range(2):
            spec = importlib.util.find_spec('timm')
            assert spec.origin == spec.loader.get_filename('timm')
        assert not {'timm', 'timm_hbonet'} & set(sys.modules)
        import timm
        for _ in range(2):
            for finder in sys.meta_path:
                finder.find_spec('timm')
            assert type(timm.__loader__) is type(timm.__spec__.loader) is SourceFileLoader
            assert timm.is_model('hbonet_100')
            importlib.reload(timm)
    """, PYTHONPATH=fake_timm)


def test_import_of_timm_that_fails_and_is_tried_again(bare, fake_timm):
    bare.run_code("""
        import os, sys
        try:
            import timm
        except ImportError as e:
            assert str(e) == 'timm is broken'
        assert not {'timm', 'timm_hbonet'} & set(sys.modules)
        del os.environ['BREAK_TIMM']
        import timm
        assert timm.is_model('hbonet_100')
    """, PYTHONPATH=fake_timm, BREAK_TIMM=1)


def test_timm_deleted_and_imported_anew(bare, fake_timm):
    bare.run_code("""
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
    """, PYTHONPATH=fake_timm)


def test_timm_in_a_zip_file_whose_loader_others_share(bare, fake_timm, tmp_path):
    with zipfile.ZipFile(tmp_path / 'all.zip', 'w') as file:
        for path in fake_timm.rglob('*.py'):
            file.write(path, path.relative_to(fake_timm))
        file.writestr('other.py', '')
    bare.run_code("""
        import importlib.util, sys
        importlib.util.find_spec('timm')
        import other
        assert 'timm_hbonet' not in sys.modules
        import timm
        assert timm.is_model('hbonet_100') and timm.__loader__.archive.endswith('.zip')
    """, PYTHONPATH=tmp_path / 'all.zip')


def test_startup_files_read_twice_or_late(bare, fake_timm):
    code = f"""
        import site, sys, timm
        assert timm.is_model('hbonet_100') == (not sys.flags.no_site)
        site.addsitedir({str(bare.site)!r})
        assert [type(finder).__name__ for finder in sys.meta_path].count('_TimmFinder') == 1
        assert timm.is_model('hbonet_100') and timm.imports_of_plugin == 1
    """
    bare.run_code(code, PYTHONPATH=fake_timm)
    bare.run_code(code, '-S', PYTHONPATH=fake_timm)


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
