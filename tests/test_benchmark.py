"""The benchmark measures what it says: order, arithmetic, counts and files, and plain words for bad input.

No test depends on how fast anything is.
"""
import importlib.util
import itertools
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import reference
import timm
import torch
from PIL import Image
from torch import nn

SCRIPTS = Path(__file__).parents[1] / 'scripts'
SMALL = ['--models', 'hbonet_010', '--modes', 'eager', '--batch-sizes', '1', '--rounds', '1', '--no-growth']
# plays the authors' file, with weights that are not those of seed 0
REFERENCE = '''
import timm_hbonet
import torch

class HBONet(timm_hbonet.HBONet):
    def __init__(self, width_mult):
        torch.manual_seed(1)
        super().__init__(width=width_mult, divisor=4)
'''


@pytest.fixture(scope='module')
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        spec = importlib.util.spec_from_file_location('benchmark_script', SCRIPTS / 'benchmark.py')
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        patch.setitem(module.MATMUL_SIZE, 'cpu', 64)
        yield module


@pytest.fixture(scope='module')
def run(benchmark):
    """Function that runs the script in this process, for its exit status."""

    def run(*args: object) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, 'argv', [str(SCRIPTS / 'benchmark.py'), *map(str, args)])
            try:
                return benchmark.main()
            except SystemExit as e:
                return e.code

    return run


@pytest.fixture(scope='module')
def output(run, tmp_path_factory):
    """Folder of a run with a reference, that held other files before."""
    folder = tmp_path_factory.mktemp('benchmark')
    (folder / 'reference.py').write_text(REFERENCE)
    output = folder / 'output'
    output.mkdir()
    (output / 'growth.png').write_text('of an earlier run')
    (output / 'thesis.tex').write_text('years of work')
    assert run(
        output, '--models', 'hbonet_010', 'mobilenetv3_small_050', '--modes', 'eager', 'reparam', 'train',
        '--batch-sizes', 2, '--train-batch-size', 3, '--rounds', 2, '--no-growth',
        '--reference', folder / 'reference.py') == 0
    return output


def read_rows(folder: Path) -> pd.DataFrame:
    return pd.DataFrame(**json.loads((folder / 'benchmark.json').read_text())['results'])


def read_tables(text: str) -> list[list[str]]:
    """Lines of the tables of a report, each as its cells."""
    return [[cell.strip() for cell in line.split('|')[1:-1]] for line in text.splitlines() if line.startswith('|')]


def test_every_network_is_timed_in_every_mode(output):
    rows = read_rows(output)
    assert rows['error'].isna().all() and (rows['image_size'] == 224).all()
    modes = {mode: 3 if mode == 'train' else 2 for mode in ('eager', 'reparam', 'train')}
    models = ('hbonet_010', 'mobilenetv3_small_050', 'authors_010')
    assert {(row.model, row.mode, row.batch_size) for row in rows.itertuples()} == {
        *((model, mode, n) for model in models for mode, n in modes.items()),
        ('matmul', 'float32', 2), ('matmul', 'float32', 3)}


def test_machine_and_settings_are_kept_without_paths(output):
    report = json.loads((output / 'benchmark.json').read_text())
    assert str(output.parent) not in (output / 'benchmark.json').read_text()
    settings, machine = report['settings'], report['machine']
    assert (settings['rounds'], settings['reference'], settings['train_batch_size']) == (2, 'reference.py', 3)
    assert machine['versions']['torch'] == importlib.metadata.version('torch')
    capabilities = getattr(torch.cpu, 'get_capabilities', dict)()  # not in older versions of torch
    assert machine['cpu'] == capabilities.get('cpu_name', machine['cpu'])
    for flag in ('avx2', 'avx512_f', 'amx_tile'):
        assert (flag in machine['flags']) == capabilities.get(flag, False)
    assert report['top1'] == {'hbonet_010.in1k': 41.5}


def test_flops_are_twice_the_multiply_adds_of_the_release(output):
    macs = next(entry['macs'] for entry in reference.CHECKPOINTS if entry['model'] == 'hbonet_010.in1k')
    for row in read_rows(output).itertuples():
        gflops = row.gflops_per_second * row.median_ms / 1e3
        if row.model == 'matmul':
            assert gflops == pytest.approx(2 * 64 ** 3 / 1e9)
        elif row.model != 'mobilenetv3_small_050':
            assert gflops == pytest.approx(2 * macs * row.batch_size * (3 if row.mode == 'train' else 1) / 1e9)


def test_csv_has_the_rows_of_the_json(output):
    found = pd.read_csv(output / 'benchmark.csv')
    pd.testing.assert_frame_equal(found, read_rows(output).astype(found.dtypes))


def test_the_folder_has_the_new_results_and_what_others_put_there(output):
    assert {path.name for path in output.iterdir()} == {
        'benchmark.json', 'benchmark.csv', 'benchmark.md', 'accuracy_latency.png', 'thesis.tex'}


def test_networks_take_turns_and_quartiles_are_of_the_timed_calls(benchmark, monkeypatch):
    """With a clock that each call moves: 100 s if untimed, else by what is listed here."""
    seconds = {'matmul': [8, 8, 8, 8, 8], 'hbonet': [3, 1, 10, 2, 4], 'peer': [5, 5, 6, 7, 5]}
    names, clock, calls, waiting = {None: 'matmul'}, [0.], [], {}

    def build(network, images, threads):
        name = names[network]
        warm_up = [100, 100] if network else [100]  # the second to measure memory
        waiting[name] = itertools.chain(warm_up, *([100, value] for value in seconds[name]))

        def call():
            calls.append(name)
            clock[0] += next(waiting[name])

        return call

    monkeypatch.setattr(benchmark, 'timer', lambda: clock[0])
    monkeypatch.setitem(benchmark.MODES['cpu'], 'eager', build)
    monkeypatch.setitem(benchmark.MATMUL, 'float32', build)
    candidates = []
    for name in ('hbonet', 'peer'):
        network = nn.Conv2d(3, 2, 1)
        names[network] = name
        candidates.append(benchmark.Candidate(name, network, 'eager', 1, 4))
    args = benchmark.argparse.Namespace(device='cpu', threads=1, rounds=5)
    rows = {row['model']: row for row in benchmark.run('batch size 1', candidates, args)}

    rounds = [calls[i:i + 6] for i in range(len(calls) - 30, len(calls), 6)]
    for order in rounds:
        assert order[::2] == order[1::2] and sorted(order[::2]) == ['hbonet', 'matmul', 'peer']
    assert len(set(map(tuple, rounds))) > 1
    for name, (lower, median, upper) in {'matmul': (8, 8, 8), 'hbonet': (2, 3, 4), 'peer': (5, 5, 6)}.items():
        row = rows[name]
        found = (row['lower_quartile_ms'], row['median_ms'], row['upper_quartile_ms'])
        assert found == pytest.approx((1e3 * lower, 1e3 * median, 1e3 * upper))
    assert rows['hbonet']['gflops_per_second'] == pytest.approx(2 * 3 * 2 * 4 * 4 / 3 / 1e9)


def chain(x):
    return torch.relu(torch.relu(torch.relu(x)))


def square(x):
    x = x.clone().requires_grad_()
    (x * x).sum().backward()


@pytest.mark.parametrize('function, floats', [
    (chain, 1000 + 1000),  # input and output of the second layer, the input of the first was there before
    (square, 1000 + 1 + 1 + 1000 + 1000),  # x, sum, its gradient, and that of x by each factor; nothing keeps x * x
])
def test_peak_memory_of_toys(benchmark, function, floats):
    x = torch.ones(1000)
    assert benchmark.measure_peak_memory(lambda: function(x), 'cpu') == 4 * floats


@pytest.fixture(scope='module')
def runtimes(benchmark):
    return sys.modules['runtimes']


@pytest.fixture(scope='module')
def network(benchmark):
    return benchmark.create_network(lambda: timm.create_model('hbonet_010'))


def find_runtime(benchmark, name):
    runtime = benchmark.ALL_RUNTIMES[name]
    missing = [package for package in runtime.packages if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed. Run: pip install -e '.[mobile]'")
    return runtime


@pytest.mark.parametrize('name', ['onnxruntime', 'openvino', 'executorch', 'litert', 'ncnn', 'mnn'])
def test_a_runtime_computes_what_pytorch_does_and_prints_nothing(benchmark, network, capfd, name):
    runtime = find_runtime(benchmark, name)
    images = torch.randn(2, 3, 64, 96)
    call, file_bytes = runtime.build(network, images, 1)
    printed = capfd.readouterr()
    assert not printed.out and not printed.err
    with torch.no_grad():
        expected = network(images)
    for _ in range(2):
        logits = torch.as_tensor(call())
        assert logits.shape == expected.shape
        assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    weights = sum(4 * p.numel() for p in timm.utils.reparameterize_model(network).parameters())
    assert weights <= file_bytes <= 1.05 * weights
    if name == 'executorch':
        from executorch.extension.pybindings import portable_lib
        assert portable_lib._threadpool_get_thread_count() == 1


@pytest.mark.parametrize('name', [
    'onnxruntime_int8', 'openvino_int8', 'executorch_int8', 'litert_int8', 'mnn_int8', 'mnn_int8_weights'])
def test_a_runtime_in_int8_is_near_pytorch_for_each_image_of_a_batch(benchmark, network, name):
    runtime = find_runtime(benchmark, name)
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 96)
    call, file_bytes = runtime.build(network, images, 1)
    with torch.no_grad():
        expected = network(images)
    similarity = nn.functional.cosine_similarity(torch.as_tensor(call()), expected)
    assert (similarity > 0.9).all() and (similarity < 1 - 1e-6).all()
    assert file_bytes < 0.5 * sum(4 * p.numel() for p in network.parameters())


@pytest.mark.parametrize('name', ['onnxruntime_int8', 'openvino_int8', 'executorch_int8', 'litert_int8', 'mnn_int8'])
def test_int8_is_calibrated_with_the_images_that_are_for_it(benchmark, network, name):
    runtime = find_runtime(benchmark, name)
    torch.manual_seed(0)
    image = torch.randn(1, 3, 64, 96)
    wide, narrow = (
        torch.as_tensor(runtime.load(runtime.export(network, image, calibration), 1)(image)).clone()
        for calibration in (torch.randn(2, 3, 64, 96), torch.randn(2, 3, 64, 96) / 1000))
    with torch.no_grad():
        expected = network(image)
    assert (narrow - expected).norm() > 1.5 * (wide - expected).norm()


def test_too_few_images_to_calibrate_with_are_named(benchmark, network):
    runtime = find_runtime(benchmark, 'onnxruntime_int8')
    with pytest.raises(ValueError, match='1 images to calibrate with are no batch of 2'):
        runtime.export(network, torch.randn(2, 3, 64, 96), torch.randn(1, 3, 64, 96))


def test_mnn_quantizes_for_1_or_3_channels(benchmark):
    runtime, network = find_runtime(benchmark, 'mnn_int8'), timm.create_model('hbonet_010', in_chans=2)
    with pytest.raises(ValueError, match='images of 1 or 3 channels, got 2'):
        runtime.build(network.eval(), torch.randn(1, 2, 64, 96), 1)


def test_the_profile_of_onnx_runtime_counts_the_nodes(benchmark, run, network, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, 'create_network', lambda create: network)
    assert run(tmp_path, '--models', 'hbonet_010', '--modes', 'onnxruntime', *SMALL[4:]) == 0
    profile = json.loads((tmp_path / 'benchmark.json').read_text())['profiles']['batch size 1']['hbonet_010']
    convs = sum(isinstance(m, nn.Conv2d) for m in timm.utils.reparameterize_model(network).modules())
    assert profile['Conv'][0] == convs and profile['Gemm'][:2] == [1, 1]
    assert sum(optimized for name, (_, optimized, _) in profile.items() if 'Conv' in name) == convs
    assert profile['Clip'][0] > 0 and all(ms > 0 for _, optimized, ms in profile.values() if optimized)


def test_onnx_runtime_has_its_threads_and_does_not_spin(runtimes, network):
    files = runtimes.export_onnx(network, torch.randn(1, 3, 224, 224))
    options = runtimes.open_onnxruntime(files, 1).get_session_options()
    assert options.get_session_config_entry('session.intra_op.allow_spinning') == '0'
    assert options.intra_op_num_threads == 1


@pytest.mark.parametrize('change, message', [
    (lambda logits: logits, None),
    (lambda logits: 1.01 * logits, 'Logits differ by 1.0e-02 relative, at most 1e-03 is allowed'),
    (lambda logits: logits * torch.nan, 'Logits differ by nan relative, at most 1e-03 is allowed'),
    (lambda logits: logits[:, 1:], 'Logits of shape (1, 999), expected (1, 1000)'),
])
def test_files_of_a_runtime_are_weighed_and_its_logits_checked(
        benchmark, runtimes, run, network, monkeypatch, tmp_path, change, message):
    def load(files, threads):
        assert files == [b'12', b'345'] and threads == 1
        return torch.no_grad()(lambda images: change(network(images)))

    runtime = runtimes.Runtime(('torch',), lambda network, images: [b'12', b'345'], load)
    monkeypatch.setattr(benchmark, 'create_network', lambda create: network)
    monkeypatch.setitem(benchmark.ALL_RUNTIMES, 'ncnn', runtime)
    options = ['--models', 'hbonet_010', '--modes', 'ncnn', '--threads', 1]
    assert run(tmp_path, *options, *SMALL[4:]) == (1 if message else 0)
    row = read_rows(tmp_path).set_index('mode').loc['ncnn']
    if message:
        assert row['error'] == f'ValueError: {message}' and pd.isna(row['median_ms'])
    else:
        assert row['file_bytes'] == 5 and row['median_ms'] > 0


def test_what_a_library_prints_is_shown_only_if_it_fails(runtimes, capfd):
    def chatter():
        subprocess.run([sys.executable, '-c', 'import os; os.write(1, b"note "); os.write(2, b"warning ")'], check=True)
        print('line')

    with runtimes.silence():
        chatter()
    print('after')
    assert capfd.readouterr() == ('after\n', '')
    with pytest.raises(ValueError, match='no luck'), runtimes.silence():
        chatter()
        raise ValueError('no luck')
    print('after')
    assert capfd.readouterr() == ('after\n', 'note warning line\n')


def test_slow_modes_are_only_timed_if_asked_for(benchmark, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: object())
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', 'output'])
    assert benchmark.parse_args(benchmark.argparse.ArgumentParser()).modes == [
        'eager', 'channels_last', 'reparam', 'compiled', 'onnxruntime', 'openvino', 'train', 'train_channels_last']
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', 'output', '--modes', *benchmark.ALL_RUNTIMES])
    assert benchmark.parse_args(benchmark.argparse.ArgumentParser()).modes == [
        'executorch', 'executorch_int8', 'litert', 'litert_int8', 'mnn', 'mnn_int8', 'mnn_int8_weights', 'ncnn',
        'onnxruntime', 'onnxruntime_int8', 'openvino', 'openvino_int8']


def test_growth_is_timed_by_batch_and_image_size(benchmark, run, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, 'GROWTH_MODELS', ('hbonet_010',))
    monkeypatch.setattr(benchmark, 'GROWTH_SHAPES', ((2, 64), (1, 32)))
    assert run(tmp_path, *SMALL[:-1]) == 0
    rows = read_rows(tmp_path)
    growth = rows[(rows['part'] == 'growth') & (rows['model'] == 'hbonet_010')]
    assert growth[['mode', 'batch_size', 'image_size']].values.tolist() == [
        ['reparam', 2, 64], ['reparam', 1, 32]]


def test_a_failure_does_not_cost_the_other_results(run, monkeypatch, tmp_path):
    def reparameterize_model(model):
        raise RuntimeError('no folding\ntoday')

    monkeypatch.setattr(timm.utils, 'reparameterize_model', reparameterize_model)
    assert run(tmp_path, *SMALL[:2], '--modes', 'reparam', 'eager', *SMALL[4:]) == 1
    rows = read_rows(tmp_path).set_index('mode')
    assert rows['error'].dropna().to_dict() == {'reparam': 'RuntimeError: no folding today'}
    assert pd.isna(rows['median_ms']['reparam']) and rows['median_ms']['eager'] > 0
    assert 'hbonet_010, reparam, batch size 1: RuntimeError: no folding today' in (
        tmp_path / 'benchmark.md').read_text()


@pytest.mark.parametrize('mode, package', [('openvino', 'openvino'), ('litert', 'ai_edge_litert'), ('mnn', 'MNN')])
def test_a_runtime_that_is_not_installed_is_skipped_by_name(run, monkeypatch, tmp_path, capsys, mode, package):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == package else object())
    assert run(tmp_path / 'output', *SMALL, '--modes', mode) == 2
    assert not (tmp_path / 'output').exists()
    capsys.readouterr()
    assert run(tmp_path / 'output', *SMALL, '--modes', mode, 'eager') == 0
    message = f'{mode}: needs {package}. Run: pip install {package}'
    assert message in capsys.readouterr().err
    assert set(read_rows(tmp_path / 'output')['mode']) == {'float32', 'eager'}
    assert message in (tmp_path / 'output' / 'benchmark.md').read_text()


def test_an_interrupted_run_leaves_nothing(monkeypatch, tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', str(tmp_path), *SMALL])
    monkeypatch.setattr(torch.utils.benchmark, 'timer', interrupt)  # as the first call is timed
    with pytest.raises(SystemExit, match='interrupted'):
        runpy.run_path(str(SCRIPTS / 'benchmark.py'), run_name='__main__')
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_as_a_whole_or_not(benchmark, monkeypatch, tmp_path):
    path = tmp_path / 'benchmark.csv'
    path.write_text('old')
    write = Path.write_bytes

    def fill_disk(path, content):
        write(path, content[:2])
        raise OSError('No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(Path, 'write_bytes', fill_disk)
        with pytest.raises(OSError, match='No space'):
            benchmark.replace_file(path, b'new')
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]
    benchmark.replace_file(path, b'new')
    assert path.read_text() == 'new' and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('args, message', [
    (['--models', 'hbonet_42'], '--models hbonet_42 cannot run on images of 224 x 224. RuntimeError: Unknown model'),
    (['--models', 'deit3_small_patch16_384'], '--models deit3_small_patch16_384 cannot run on images of 224 x 224'),
    (['--modes', 'warp'], '--modes warp is not a mode on cpu, which has eager, channels_last, '),
    (['--modes', 'eager_amp'], '--modes eager_amp is not a mode on cpu'),
    (['--batch-sizes', '1', '0'], '--batch-sizes must be at least 1, got 0'),
    (['--train-batch-size', '-3'], '--train-batch-size must be at least 1, got -3'),
    (['--threads', '0'], '--threads must be at least 1, got 0'),
    (['--rounds', '0'], '--rounds must be at least 1, got 0'),
    (['--reference', 'nowhere.py'], '--reference nowhere.py is not the code of hbonet_010, '),
    (['--reference', __file__, '--models', 'lcnet_050'], '--reference is compared with hbonet_100 and its other '),
])
def test_arguments_that_make_no_sense(run, tmp_path, capsys, args, message):
    assert run(tmp_path / 'output', *SMALL, *args) == 2
    assert f'benchmark.py: error: {message}' in capsys.readouterr().err
    assert not (tmp_path / 'output').exists()


@pytest.mark.parametrize('code, message', [
    (REFERENCE + '    def forward(self, x):\n        return 1.001 * super().forward(x)\n',
     'ValueError: Logits differ by 1.0e-03 relative, at most 1e-04 is allowed'),
    (REFERENCE.replace('width=width_mult', 'width=0.5'), 'RuntimeError: '),
    (REFERENCE.replace('HBONet(t', 'Other(t'), 'AttributeError: '),
    ('import nowhere', "ModuleNotFoundError: No module named 'nowhere'"),
])
def test_a_reference_that_is_another_network(run, tmp_path, capsys, code, message):
    path = tmp_path / 'other.py'
    path.write_text(code)
    assert run(tmp_path / 'output', *SMALL, '--reference', path) == 2
    error = capsys.readouterr().err
    assert f'--reference {path} is not the code of hbonet_010, ' in error and message in error
    assert not (tmp_path / 'output').exists()


def test_a_folder_that_cannot_be_written(run, tmp_path, capsys):
    (tmp_path / 'file').touch()
    assert run(tmp_path / 'file', *SMALL) == 2
    assert f'benchmark.py: error: cannot write to {tmp_path / "file"}: ' in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ['file']


@pytest.mark.skipif(torch.cuda.is_available(), reason='this machine has a CUDA device')
def test_cuda_where_there_is_none(run, tmp_path, capsys):
    assert run(tmp_path / 'output', '--device', 'cuda') == 2
    assert '--device cuda needs a CUDA device' in capsys.readouterr().err


def test_the_report_of_given_numbers(tmp_path):
    shutil.copy(reference.DATA / 'benchmark.json', tmp_path)
    command = [sys.executable, SCRIPTS / 'benchmark_report.py', tmp_path]
    process = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert process.returncode == 0, process.stderr
    text = (tmp_path / 'benchmark.md').read_text()
    assert process.stdout == text + '\n'
    lines = read_tables(text)
    for line in (
            ['hbonet_100', '20.00 (19.50 to 21.00)', '5.00 (4.50 to 6.00)'],
            ['hbonet_050_d8', '14.00 (13.50 to 15.00)', ''],  # failed in ONNX Runtime
            ['hbonet_100', 'authors_100', '0.800', '0.500'],
            ['hbonet_050', 'authors_050', '0.750', '0.800'],
            ['hbonet_100', 'mobilenetv2_100', '1.250', '1.250'],
            ['hbonet_050', 'mobilenetv3_large_100', '1.200', '2.000'],
            ['hbonet_050_d8', 'mobilenetv3_large_100', '1.120', ''],
            ['hbonet_100', 'authors_100', '0.909'],  # of training
            ['mobilenetv2_100', '7.5%', '25.0%'],  # of the matrix product's 400 GFLOP/s
            ['hbonet_100', '10.0%'],  # and 500 beside training
            ['hbonet_100', '3.0'],
            ['hbonet_100', '200.0'],
            ['hbonet_100', '20.15'],
            ['mobilenetv2_100', '14.02'],
            # all, outside convolutions, by type
            ['hbonet_100', '4.75', '0.75', '76 / 70 / 3.50', '4 / 4 / 0.25', '0 / 6 / 0.50', '0 / 9 / 0.50'],
            ['mobilenetv2_100', '3.00', '0.00', '52 / 52 / 3.00', '', '', ''],
    ):
        assert line in lines
    assert 'hbonet_050_d8, onnxruntime, batch size 1: RuntimeError: no luck' in text
    for name in ('Processor X', 'AVX2', 'fma3', 'timm 1.0.31', 'openvino: needs openvino'):
        assert name in text
    for name in ('accuracy_latency.png', 'growth.png'):
        with Image.open(tmp_path / name) as image:
            assert image.format == 'PNG'


def test_the_report_of_an_earlier_version(benchmark, tmp_path):
    """Without the sizes of files, which it did not have."""
    format_report = benchmark.write_report.__globals__['format_report']
    report = json.loads((reference.DATA / 'benchmark.json').read_text())
    text = format_report(report)
    place = report['results']['columns'].index('file_bytes')
    for values in (report['results']['columns'], *report['results']['data']):
        del values[place]
    before, after = text.split('### File size in MB')
    assert format_report(report) == before + after[after.index('###'):]


def test_the_pictures_show_the_figures(benchmark, monkeypatch):
    draw_accuracy, draw_growth = (benchmark.write_report.__globals__[name] for name in ('draw_accuracy', 'draw_growth'))
    report = json.loads((reference.DATA / 'benchmark.json').read_text())
    rows = pd.DataFrame(**report['results'])
    axes, = draw_accuracy(rows[rows['mode'] == 'onnxruntime'], report['top1']).axes
    points = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert points['hbonet'] == [[4., 67.], [5., 73.1]]
    assert points['mobilenetv2_100'] == [[4., 72.91]] and points['mobilenetv3_large_100'] == [[2., 75.784]]
    assert [text.get_text() for text in axes.texts] == ['050', '100']
    by_batch, by_size = draw_growth(rows[rows['part'] == 'growth']).axes
    for axes, points in ((by_batch, [[1., 10.], [2., 20.]]), (by_size, [[96., 10 * 96 / 224], [224., 10.]])):
        assert axes.get_lines()[0].get_label() == 'hbonet_100'
        assert axes.get_lines()[0].get_xydata() == pytest.approx(torch.tensor(points).numpy())


def test_a_report_of_no_benchmark(tmp_path):
    command = [sys.executable, SCRIPTS / 'benchmark_report.py', tmp_path]
    process = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert process.returncode == 2 and str(tmp_path / 'benchmark.json') in process.stderr
    assert not list(tmp_path.iterdir())
