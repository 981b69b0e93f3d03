"""An installed timm-hbonet registers its models wherever timm is imported, and changes nothing else.

The package is built and installed into virtual environments of its own, and child interpreters say what they see.
Corner cases run with a stand-in for timm, its real registry without models, that is imported within milliseconds.
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

ROOT = Path(__file__).parents[1]
ARCHITECTURES = [
    'hbonet_010', 'hbonet_025', 'hbonet_025_4x_d8', 'hbonet_025_8x_d8', 'hbonet_025_d8', 'hbonet_035', 'hbonet_050',
    'hbonet_050_d8', 'hbonet_060', 'hbonet_080', 'hbonet_100',
]
STARTUP_FILES = ['_timm_hbonet_autoload.py', 'timm_hbonet.pth', 'timm_hbonet.start']
LIST_MODELS = "import timm; print(timm.list_models('hbonet*'))"


class Environment:
    """A virtual environment, with the packages of the running one if `inherit` is set, but not their start-up files."""

    def __init__(self, path, inherit):
        venv.create(path, with_pip=False)
        self.path = path
        self.python = path / ('Scripts/python.exe' if os.name == 'nt' else 'bin/python')
        self.site = Path(self.run('-c', 'import sysconfig; print(sysconfig.get_path("purelib"))').stdout.strip())
        if inherit:
            packages = {sysconfig.get_path('purelib'), sysconfig.get_path('platlib')}
            packages |= {str(Path(importlib.util.find_spec(name).origin).parents[1]) for name in ('timm', 'torch')}
            # a path in a .pth file is searched for modules, the .pth files in it are not read
            (self.site / 'inherited.pth').write_text('\n'.join(packages))

    def run(self, *args, check=True, **env):
        """Run the interpreter and return the completed process."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(('PYTHON', 'TIMM_HBONET_'))}
        result = subprocess.run(
            [self.python, *args],
            env={**clean, 'OMP_NUM_THREADS': '1', **{k: str(v) for k, v in env.items()}},
            cwd=self.path,
            capture_output=True,
            text=True,
        )
        assert not check or result.returncode == 0, result.stdout + result.stderr
        return result

    def pip(self, *args):
        command = [sys.executable, '-m', 'pip', '--python', self.python, '--disable-pip-version-check', *args]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr

    def install(self, *args):
        self.pip('install', '--no-index', '--no-deps', '--no-build-isolation', '--ignore-installed', *args)

    def files(self):
        return {path.relative_to(self.site) for path in self.site.rglob('*') if path.is_file()}


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """A wheel that is built from the source distribution, as for a release."""
    for name in ('editables', 'hatchling', 'pip'):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f'{name} is not installed: pip install -e ".[test]"')
    path = tmp_path_factory.mktemp('dist')
    for command in (
            ['hatchling', 'build', '-d', path, '-t', 'sdist'],
            ['pip', 'wheel', '--no-index', '--no-deps', '--no-build-isolation', '-w', path, 'SDIST'],
    ):
        command = [str(next(path.glob('*.tar.gz'))) if arg == 'SDIST' else str(arg) for arg in command]
        result = subprocess.run([sys.executable, '-m', *command], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    return next(path.glob('*.whl'))


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    """The wheel installed beside the real timm."""
    environment = Environment(tmp_path_factory.mktemp('installed'), inherit=True)
    environment.install(wheel)
    return environment


@pytest.fixture(scope='module')
def bare(wheel, tmp_path_factory):
    """The wheel installed where there are neither timm nor torch."""
    environment = Environment(tmp_path_factory.mktemp('bare'), inherit=False)
    environment.install(wheel)
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
        'if "BREAK_TIMM" in os.environ:\n'
        '    raise ImportError("timm is broken")\n'
        'from .models import is_model, list_models, model_entrypoint\n'
    )
    return package.parent


@pytest.fixture
def fake_plugin(fake_timm):
    """Folder of the same `timm`, and of a `timm_hbonet` with one model that needs no torch, and counts its imports."""
    package = fake_timm / 'timm_hbonet'
    package.mkdir()
    (package / '__init__.py').write_text((ROOT / 'timm_hbonet/__init__.py').read_text())
    (package / 'hbonet.py').write_text(
        'import timm\n'
        'from timm.models import register_model\n'
        'timm.imports_of_plugin = getattr(timm, "imports_of_plugin", 0) + 1\n'
        'class HBONet: pass\n'
        '@register_model\n'
        'def hbonet_100(): return HBONet()\n'
    )
    return fake_timm


def run_code(environment, code, *options, **env):
    """Run code that asserts, and must print nothing to stderr."""
    result = environment.run(*options, '-c', textwrap.dedent(code), **env)
    assert result.stderr == ''
    return result.stdout


# What is shipped


def test_wheel_has_the_startup_files_at_its_root_and_lists_them(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        record = file.read(next(name for name in names if name.endswith('.dist-info/RECORD'))).decode()
        for name in STARTUP_FILES:
            assert file.read(name) == (ROOT / 'autoload' / name).read_bytes()
    assert {line.split(',')[0] for line in record.splitlines()} == set(names)
    package = {f'timm_hbonet/{path.name}' for path in (ROOT / 'timm_hbonet').iterdir() if path.is_file()}
    assert 'timm_hbonet/py.typed' in package
    assert {name for name in names if '.dist-info/' not in name} == package | set(STARTUP_FILES)


def test_the_two_startup_files_do_the_same():
    # from Python 3.15 on, a .start file stands in for the import lines of the .pth file of the same stem
    module, function = (ROOT / 'autoload/timm_hbonet.start').read_text().strip().split(':')
    assert (ROOT / 'autoload/timm_hbonet.pth').read_text().strip() == f'import {module}; {module}.{function}()'


def test_startup_loads_one_small_module(bare):
    without = Environment(bare.path / 'without', inherit=False)
    (without.site / 'other.pth').write_text('import os; os.getpid()')
    (without.site / 'other.start').write_text('os:getpid')
    code = 'import sys; print(*sys.modules)'
    added = set(bare.run('-c', code).stdout.split()) - set(without.run('-c', code).stdout.split())
    assert added == {'_timm_hbonet_autoload'}


# Every program knows the models


def test_after_pip_install(installed):
    code = "from timm.models import create_model; print(type(create_model('hbonet_010')).__name__); " + LIST_MODELS
    assert installed.run('-c', code).stdout == f'HBONet\n{ARCHITECTURES}\n'


@pytest.mark.usefixtures('wheel')  # which says what is missing
def test_after_editable_install(tmp_path):
    environment = Environment(tmp_path, inherit=True)
    environment.install('-e', ROOT)
    stdout = environment.run('-c', LIST_MODELS + '; import timm_hbonet; print(timm_hbonet.__file__)').stdout
    assert stdout == f'{ARCHITECTURES}\n{ROOT / "timm_hbonet/__init__.py"}\n'


def test_torchrun_workers(installed, fake_plugin, tmp_path):
    script = tmp_path / 'worker.py'
    # one write each, which those of the other process cannot break up
    script.write_text(
        "import os, timm; os.write(1, f'{os.environ[\"RANK\"]} {timm.is_model(\"hbonet_100\")}\\n'.encode())")
    command = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', script]
    stdout = installed.run(*command, PYTHONPATH=fake_plugin).stdout
    assert sorted(stdout.split()) == ['0', '1', 'True', 'True']


def test_spawned_data_loader_worker(installed, fake_plugin, tmp_path):
    script = tmp_path / 'loader.py'
    script.write_text(textwrap.dedent("""
        import sys
        from torch.utils.data import DataLoader, Dataset

        class Known(Dataset):
            def __len__(self):
                return 1

            def __getitem__(self, index):
                import timm
                return timm.is_model('hbonet_100')

        if __name__ == '__main__':
            print(*DataLoader(Known(), num_workers=1, multiprocessing_context='spawn'), 'timm' in sys.modules)
    """))
    # known in the worker, that has not got it from the parent
    assert installed.run(script, PYTHONPATH=fake_plugin).stdout == 'tensor([True]) False\n'


def test_unedited_script_of_timm(installed):
    folder = os.environ.get('TIMM_REPO')
    if not folder:
        pytest.skip('git clone https://github.com/huggingface/pytorch-image-models, and set TIMM_REPO to that folder')
    args = '--model hbonet_010 --bench inference --device cpu --img-size 32 -b 1 --num-bench-iter 5 --num-warm-iter 1'
    result = installed.run(Path(folder) / 'benchmark.py', *args.split())
    assert '"model": "hbonet_010"' in result.stdout and '"infer_samples_per_sec"' in result.stdout


def test_explicit_import_where_startup_files_are_not_read(wheel, tmp_path):
    environment = Environment(tmp_path / 'environment', inherit=True)
    target = tmp_path / 'target'
    environment.install('--target', target, wheel)
    code = 'import timm_hbonet, sys; print(timm_hbonet.__file__, "_timm_hbonet_autoload" in sys.modules); '
    stdout = environment.run('-c', code + LIST_MODELS, PYTHONPATH=target).stdout
    assert stdout == f'{target / "timm_hbonet/__init__.py"} False\n{ARCHITECTURES}\n'


def test_start_file_alone_registers(bare, fake_plugin):
    # what Python 3.15 does with it: resolve the line, call that with no arguments
    run_code(bare, f"""
        import pkgutil, sys
        sys.path.append({str(bare.site)!r})
        pkgutil.resolve_name({(bare.site / 'timm_hbonet.start').read_text().strip()!r})()
        import timm
        assert timm.is_model('hbonet_100')
    """, '-S', PYTHONPATH=fake_plugin)


# It stays out of the way


def test_switched_off_until_it_is_imported(bare, fake_plugin):
    code = LIST_MODELS + '; import timm_hbonet; ' + LIST_MODELS
    assert run_code(bare, code, TIMM_HBONET_AUTOLOAD=0, PYTHONPATH=fake_plugin) == "[]\n['hbonet_100']\n"


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
    assert run_code(bare, code, '-W', 'error', PYTHONPATH=fake_timm) == (
        "timm.models.hbonet <class 'timm.models.hbonet.HBONet'> ['hbonet_100']\n")


def test_without_timm(bare):
    assert run_code(bare, 'import importlib.util; print(importlib.util.find_spec("timm"))') == 'None\n'
    result = bare.run('-c', 'import timm_hbonet', check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'timm'"


@pytest.mark.parametrize('editable', [False, True])
def test_uninstall_leaves_nothing(wheel, tmp_path, editable):
    environment = Environment(tmp_path, inherit=editable)  # the editable install needs hatchling
    before = environment.files()
    environment.install(*(['-e', ROOT] if editable else [wheel]))
    assert {Path(name) for name in STARTUP_FILES} <= environment.files()
    environment.pip('uninstall', '--yes', 'timm-hbonet')
    assert environment.files() == before
    assert run_code(environment, 'import sys; print("_timm_hbonet_autoload" in sys.modules)') == 'False\n'


# Whatever a program does with its imports


def test_looking_for_timm_does_not_import_it(bare, fake_plugin):
    run_code(bare, """
        import importlib.util, sys
        for _ in range(2):
            spec = importlib.util.find_spec('timm')
            assert spec.origin == spec.loader.get_filename('timm')
        assert not {'timm', 'timm_hbonet'} & set(sys.modules)
        import timm
        assert timm.is_model('hbonet_100')
    """, PYTHONPATH=fake_plugin)


def test_imported_timm_is_as_without_the_plugin(bare, fake_plugin):
    run_code(bare, """
        import importlib, sys, timm
        from importlib.machinery import SourceFileLoader
        for finder in sys.meta_path:
            finder.find_spec('timm')
        assert type(timm.__loader__) is type(timm.__spec__.loader) is SourceFileLoader
        importlib.reload(timm)
        assert type(timm.__loader__) is type(timm.__spec__.loader) is SourceFileLoader
        assert timm.is_model('hbonet_100')
    """, PYTHONPATH=fake_plugin)


def test_import_of_timm_that_fails_and_is_tried_again(bare, fake_plugin):
    run_code(bare, """
        import os, sys
        try:
            import timm
        except ImportError as e:
            assert str(e) == 'timm is broken'
        assert not {'timm', 'timm_hbonet'} & set(sys.modules)
        del os.environ['BREAK_TIMM']
        import timm
        assert timm.is_model('hbonet_100')
    """, PYTHONPATH=fake_plugin, BREAK_TIMM=1)


def test_timm_deleted_and_imported_anew(bare, fake_plugin):
    code = """
        import copy, importlib, sys
        {imports}
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
    """
    for imports in ('import timm', 'import timm_hbonet, timm'):
        run_code(bare, code.format(imports=imports), PYTHONPATH=fake_plugin)
    late = f'import site, timm; site.addsitedir({str(bare.site)!r})'
    run_code(bare, code.format(imports=late), '-S', PYTHONPATH=fake_plugin)


def test_spec_and_loader_copied_before_the_import(bare, fake_plugin):
    run_code(bare, """
        import copy, importlib.util, pickle, pkgutil, sys
        spec = importlib.util.find_spec('timm')
        assert 'is_model' in spec.loader.get_source('timm') and not hasattr(spec.loader, 'unheard_of')
        specs = [copy.copy(spec), copy.deepcopy(spec), pickle.loads(pickle.dumps(spec))]
        assert not {'timm', 'timm_hbonet'} & set(sys.modules)
        for spec in specs:
            spec.loader = copy.copy(spec.loader)
            timm = sys.modules['timm'] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(timm)
            assert timm.is_model('hbonet_100')
            assert type(timm.__loader__).__name__ == type(timm.__spec__.loader).__name__ == 'SourceFileLoader'
            for name in list(sys.modules):
                if name.startswith('timm'):
                    del sys.modules[name]
        assert b'is_model' in pkgutil.get_data('timm', '__init__.py')
    """, PYTHONPATH=fake_plugin)


@pytest.mark.parametrize('timm', ['folder', 'module', 'blocked'])
def test_another_thing_named_timm(bare, tmp_path, timm):
    if timm == 'folder':
        (tmp_path / 'timm').mkdir()
    elif timm == 'module':
        (tmp_path / 'timm.py').write_text('x = 1')
    result = bare.run('-c', f"""if True:
        import sys
        sys.path.append({str(tmp_path)!r})
        if {timm == 'blocked'}:
            sys.modules['timm'] = None
            import _timm_hbonet_autoload
            _timm_hbonet_autoload.install()
        try:
            import timm
            print(timm.__name__)
        except ModuleNotFoundError as e:
            print(e.name)
    """)
    assert result.stdout == 'timm\n'
    # a module of that name is a timm that the plugin cannot work with
    assert result.stderr.count('\n') == (timm == 'module')


def test_timm_in_a_zip_file_whose_loader_others_share(bare, fake_plugin, tmp_path):
    with zipfile.ZipFile(tmp_path / 'all.zip', 'w') as file:
        for path in fake_plugin.rglob('*.py'):
            file.write(path, path.relative_to(fake_plugin))
        file.writestr('other.py', '')
    run_code(bare, """
        import importlib.util, sys
        importlib.util.find_spec('timm')
        import other
        assert 'timm_hbonet' not in sys.modules
        import timm
        assert timm.is_model('hbonet_100') and timm.__loader__.archive.endswith('.zip')
    """, PYTHONPATH=tmp_path / 'all.zip')


def test_lazy_loader(bare, fake_plugin):
    run_code(bare, """
        import importlib.util, sys
        spec = importlib.util.find_spec('timm')
        spec.loader = importlib.util.LazyLoader(spec.loader)
        timm = sys.modules['timm'] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(timm)
        assert 'timm_hbonet' not in sys.modules
        assert timm.is_model('hbonet_100')
    """, PYTHONPATH=fake_plugin)


def test_other_finders_before_and_after(bare, fake_plugin):
    run_code(bare, """
        import importlib.util, sys

        class Hook:  # finds with the help of all finders, as import hooks do
            busy = False
            def find_spec(self, name, path=None, target=None):
                if self.busy:
                    return None
                self.busy = True
                try:
                    return importlib.util.find_spec(name)
                finally:
                    self.busy = False

        class Legacy:
            def find_module(self, name, path=None):
                return None

        class Proxy:  # stands in for another finder
            def __init__(self, finder):
                self.find_spec = getattr(finder, 'find_spec', lambda *args: None)

        sys.meta_path[:] = [Hook(), Legacy(), *map(Proxy, sys.meta_path), Hook(), Legacy()]
        import timm
        assert timm.is_model('hbonet_100') and timm.imports_of_plugin == 1
    """, PYTHONPATH=fake_plugin)


def test_no_timm_and_a_finder_without_find_spec(bare):
    run_code(bare, """
        import sys

        class Legacy:
            def find_module(self, name, path=None):
                return None

        sys.meta_path.append(Legacy())
        try:
            import timm
        except ModuleNotFoundError as e:
            assert e.name == 'timm'
    """)


def test_startup_files_read_twice_or_late(bare, fake_plugin):
    run_code(bare, f"""
        import site, sys
        site.addsitedir({str(bare.site)!r})
        assert [type(finder).__name__ for finder in sys.meta_path].count('_TimmFinder') == 1
        import timm
        assert timm.is_model('hbonet_100') and timm.imports_of_plugin == 1
    """, PYTHONPATH=fake_plugin)
    run_code(bare, f"""
        import site, timm
        assert not timm.is_model('hbonet_100')
        site.addsitedir({str(bare.site)!r})
        assert timm.is_model('hbonet_100')
    """, '-S', PYTHONPATH=fake_plugin)


@pytest.mark.parametrize('second', ['timm', 'timm_hbonet'])
def test_threads_that_import_at_the_same_time(bare, fake_plugin, second):
    with open(fake_plugin / 'timm/__init__.py', 'a') as f:
        f.write('import __main__; __main__.wait_for_the_other()\n')
    run_code(bare, f"""
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
            import {second}
            import timm
            known.append(timm.is_model('hbonet_100'))

        threads = [threading.Thread(target=import_second) for _ in range(4)]
        for thread in threads:
            thread.start()
        import timm
        known.append(timm.is_model('hbonet_100'))
        for thread in threads:
            thread.join()
        assert known == [True] * 5 and timm.imports_of_plugin == 1
    """, PYTHONPATH=fake_plugin)
