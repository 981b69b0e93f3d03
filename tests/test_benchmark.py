"""The benchmark measures what it says: right counts, right arithmetic, right files, and plain words for bad input.

No test depends on how fast anything is.
"""
import csv
import functools
import importlib.util
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import reference
import timm
import torch
from PIL import Image

SCRIPT = Path(__file__).parents[1] / 'scripts' / 'benchmark.py'
SMALL = ['--models', 'hbonet_010', '--modes', 'eager', '--batch-sizes', '1', '--rounds', '1', '--no-growth']
# plays the authors' file, with weights that are not those of seed 0
REFERENCE = '''
import timm_hbonet
import torch

class HBONet(timm_hbonet.HBONet):
    def __init__(self, width_mult):
        torch.manual_seed(1)
        super().__init__(width=width_mult)
'''


@pytest.fixture(scope='module')
def benchmark():
    spec = importlib.util.spec_from_file_location('benchmark_script', SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(benchmark, monkeypatch):
    """Function that runs the script in this process, for its exit status or message."""

    def run(*args: object):
        monkeypatch.setattr(sys, 'argv', [str(SCRIPT), *map(str, args)])
        try:
            return benchmark.main()
        except SystemExit as e:
            return e.code

    return run


@pytest.fixture(scope='module')
def result(tmp_path_factory):
    """Output folder, report, and what was printed, of a run with a reference in a folder that holds other files."""
    folder = tmp_path_factory.mktemp('benchmark')
    (folder / 'reference.py').write_text(REFERENCE)
    output = folder / 'output'
    output.mkdir()
    (output / 'growth.png').write_text('of an earlier run')
    (output / 'thesis.tex').write_text('years of work')
    modes = ['eager', 'channels_last', 'reparam', 'onnxruntime', 'openvino', 'train']
    process = subprocess.run(
        [sys.executable, SCRIPT, output, '--models', 'hbonet_100', 'mobilenetv3_small_100', '--modes', *modes,
         '--batch-sizes', '2', '--train-batch-size', '3', '--rounds', '3', '--no-growth',
         '--reference', folder / 'reference.py'],
        capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stderr
    return output, json.loads((output / 'benchmark.json').read_text()), process


@pytest.fixture
def rows(result):
    """Results by model and mode (the batch size of inference is 2, of training 3, of the matrix product each)."""
    return {
        (row['model'], row['mode']): row for row in result[1]['results'] if row['model'] != 'matmul'}


def test_every_model_is_timed_in_every_mode(result, rows):
    modes = ['eager', 'channels_last', 'reparam', 'onnxruntime', 'openvino', 'train']
    models = ['hbonet_100', 'mobilenetv3_small_100', 'reference']
    expected = {(model, mode) for model in models for mode in modes} - {('reference', 'reparam')}
    assert rows.keys() == expected
    for (_, mode), row in rows.items():
        assert row['batch_size'] == (3 if mode == 'train' else 2)
        assert row['image_size'] == 224 and row['error'] is None
    assert result[1]['errors'] == []


def test_settings_are_kept_without_paths_of_this_machine(result):
    output, report, _ = result
    settings = report['settings']
    assert (settings['rounds'], settings['threads'], settings['reference']) == (3, 1, 'reference.py')
    assert str(output.parent) not in (output / 'benchmark.json').read_text()
    assert report['top1'] == {'hbonet_100.in1k': 73.1, 'mobilenetv3_small_100.lamb_in1k': 67.636}


def test_medians_lie_inside_their_quartiles(rows):
    for row in rows.values():
        assert 0 < row['lower_quartile_ms'] < row['median_ms'] < row['upper_quartile_ms']
        assert row['images_per_second'] == pytest.approx(row['batch_size'] / row['median_ms'] * 1e3)


def test_flops_are_twice_the_multiply_adds_of_the_release(rows):
    macs = next(entry['computed_macs'] for entry in reference.CHECKPOINTS if entry['name'] == 'hbonet_100.in1k')
    for (model, mode), row in rows.items():
        if model != 'mobilenetv3_small_100':
            gflops = 2 * macs * row['batch_size'] * (3 if mode == 'train' else 1) / 1e9
            assert row['gflops_per_second'] * row['median_ms'] / 1e3 == pytest.approx(gflops, rel=1e-9)


def test_speeds_are_shares_of_the_matrix_product_of_the_same_rounds(result):
    matmuls = {row['batch_size']: row for row in result[1]['results'] if row['model'] == 'matmul'}
    assert matmuls.keys() == {2, 3}
    for row in matmuls.values():
        assert row['images_per_second'] is row['peak_memory_bytes'] is None
        assert row['gflops_per_second'] * row['median_ms'] / 1e3 == pytest.approx(2 * 2048 ** 3 / 1e9)
    for row in result[1]['results']:
        speed = matmuls[row['batch_size']]['gflops_per_second']
        assert row['share_of_matmul'] == pytest.approx(row['gflops_per_second'] / speed)


def test_peak_memory_is_known_where_torch_allocates(rows):
    for (_, mode), row in rows.items():
        assert (row['peak_memory_bytes'] is None) == (mode in ('onnxruntime', 'openvino'))
    # two images, the 32 channels of the stem at 112 x 112
    assert rows['hbonet_100', 'eager']['peak_memory_bytes'] >= 2 * 32 * 112 * 112 * 4
    # a training step keeps activations, and has the gradients at the end
    weights = sum(p.numel() * 4 for p in timm.create_model('hbonet_100').parameters())
    assert rows['hbonet_100', 'train']['peak_memory_bytes'] > rows['hbonet_100', 'eager']['peak_memory_bytes'] + weights


def test_ratios_are_the_reference_by_ours(result, rows):
    ratios = {ratio['mode']: ratio for ratio in result[1]['ratios']}
    assert ratios.keys() == {'eager', 'channels_last', 'onnxruntime', 'openvino', 'train'}
    for mode, ratio in ratios.items():
        theirs, ours = rows['reference', mode], rows['hbonet_100', mode]
        assert ratio['batch_size'] == theirs['batch_size']
        assert ratio['time'] == pytest.approx(theirs['median_ms'] / ours['median_ms'])
    assert ratios['eager']['peak_memory'] == 1  # the stand-in is the same network
    assert ratios['openvino']['peak_memory'] is None


def test_onnx_nodes_are_counted_before_and_after_optimisation(result):
    nodes = result[1]['onnx_nodes']
    titles = ('hbonet_100', 'hbonet_100 reparam', 'reference')
    assert nodes.keys() == {*titles, *(f'{title}, optimised' for title in titles)}
    for counts in nodes.values():
        assert counts['total'] == sum(counts.values()) - counts['total'] > 0
    model = timm.create_model('hbonet_100').eval()
    for title, network in (('hbonet_100', model), ('hbonet_100 reparam', timm.utils.reparameterize_model(model))):
        convs = sum(isinstance(m, torch.nn.Conv2d) for m in network.modules())
        assert nodes[title]['Conv'] == convs
        optimised = nodes[f'{title}, optimised']
        assert sum(n for name, n in optimised.items() if name.endswith('Conv')) == convs
        # its own fused convolutions
        assert any(name.startswith('com.microsoft') for name in optimised)


def test_csv_has_the_rows_of_the_json(result):
    output, report, _ = result
    with open(output / 'benchmark.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert rows == [{k: '' if v is None else str(v) for k, v in row.items()} for row in report['results']]


def test_the_report_has_all_results_and_is_printed(result):
    output, report, process = result
    text = (output / 'benchmark.md').read_text()
    assert process.stdout == text + '\n'
    lines = [[cell.strip() for cell in line.split('|')[1:-1]] for line in text.splitlines()]
    for row in report['results']:
        line = next(line for line in lines if line[:3] == [row['model'], row['mode'], str(row['batch_size'])])
        assert line[3] == f'{row["median_ms"]:.2f}'
        assert line[4] == f'{row["lower_quartile_ms"]:.2f} to {row["upper_quartile_ms"]:.2f}'
        assert line[6:8] == [f'{row["gflops_per_second"]:.1f}', f'{row["share_of_matmul"]:.1%}']
        memory = row['peak_memory_bytes']
        assert line[8] == (f'{memory / 2 ** 20:.1f}' if memory else '')
    for ratio in report['ratios']:
        assert [ratio['mode'], str(ratio['batch_size']), f'{ratio["time"]:.3f}'] in [line[:3] for line in lines]
    nodes = report['onnx_nodes']
    assert ['total', *(str(counts['total']) for counts in nodes.values())] in lines
    # timm folds nothing in MobileNet-V3, ours has norms to fold
    assert 'finds nothing to fold in mobilenetv3_small_100: ' in text
    for package in ('torch', 'timm', 'onnxruntime', 'openvino'):
        assert f'{package} {report["machine"]["versions"][package]}' in text


def test_the_folder_has_the_new_results_and_what_others_put_there(result):
    output, _, process = result
    assert {path.name for path in output.iterdir()} == {
        'benchmark.json', 'benchmark.csv', 'benchmark.md', 'accuracy_latency.png', 'thesis.tex'}
    with Image.open(output / 'accuracy_latency.png') as image:
        assert image.format == 'PNG' and image.width > 500
    assert 'Batch size 2, timing: 100%' in process.stderr and 'Traceback' not in process.stderr


def chain(x):
    return torch.relu(torch.relu(torch.relu(x)))


def fork(x):
    y = torch.cat([x, x])
    z = torch.cat([y, y])
    del y
    return z[0] + torch.zeros(1)


def square(x):
    x = x.clone().requires_grad_()
    (x * x).sum().backward()


@pytest.mark.parametrize('function, floats', [
    (chain, 1000 + 1000),  # input and output of the second layer, the input of the first was there before
    (fork, 2000 + 4000),
    (square, 1000 + 1 + 1 + 1000 + 1000),  # x, sum, its gradient, and that of x by each factor; nothing keeps x * x
])
def test_peak_memory_of_toys(benchmark, function, floats):
    x = torch.ones(1000)
    assert benchmark.measure_peak_memory(lambda: function(x), 'cpu') == 4 * floats


def test_the_pictures_show_the_figures_with_readable_names(benchmark, monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(benchmark.Figure, 'savefig', lambda figure, path: figures.append(figure))
    latency = dict(
        hbonet_100=4.4, hbonet_080=3.1, hbonet_050=1.9, hbonet_025=1.2, mobilenetv2_100=3.1, mobilenetv2_050=1.6,
        mobilenetv3_large_100=3.5, mobilenetv3_small_100=1.3, ghostnet_100=4.1, repghostnet_100=4.0, mnasnet_100=3.6,
        lcnet_100=1.9, mobilenetv4_conv_small=2.2, starnet_s1=4.6)
    rows = [
        dict(model=model, mode=mode, batch_size=batch_size, median_ms=ms * batch_size * slow, error=None)
        for mode, slow in (('eager', 3), ('onnxruntime', 1), ('train', 9))
        for batch_size in (1, 16) for model, ms in latency.items()]
    benchmark.draw_accuracy(rows, tmp_path)
    for axes, batch_size in zip(figures[0].axes, (1, 16), strict=True):
        assert axes.get_title() == f'onnxruntime, batch size {batch_size}'
        ours, others = axes.get_lines()
        assert ours.get_xydata().tolist() == [
            [latency['hbonet_025'] * batch_size, 57.3], [latency['hbonet_050'] * batch_size, 67.0],
            [latency['hbonet_080'] * batch_size, 71.3], [latency['hbonet_100'] * batch_size, 73.1]]
        assert [latency['lcnet_100'] * batch_size, 72.13] in others.get_xydata().tolist()
        assert len(others.get_xydata()) == 10 and others.get_linestyle() == 'None'
        names = [text for text in axes.texts if text.get_visible()]
        assert sorted(text.get_text() for text in names) == sorted(latency)
        figures[0].draw_without_rendering()
        boxes = [text.get_window_extent() for text in names]
        assert not any(box.count_overlaps(boxes) > 1 for box in boxes)


def test_growth_is_timed_by_batch_and_image_size(benchmark, run, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, 'GROWTH_MODELS', ('hbonet_010', 'hbonet_025'))
    monkeypatch.setattr(benchmark, 'GROWTH_SIZES', {'batch_size': (1, 3), 'image_size': (32, 96)})
    assert run(tmp_path, *SMALL[:-1]) == 0
    growth = json.loads((tmp_path / 'benchmark.json').read_text())['growth']
    for quantity, sizes in (('batch_size', [(1, 224), (3, 224)]), ('image_size', [(1, 32), (1, 96)])):
        for model in ('hbonet_010', 'hbonet_025'):
            rows = [row for row in growth[quantity] if row['model'] == model]
            assert [(row['batch_size'], row['image_size']) for row in rows] == sizes
            assert {row['mode'] for row in rows} == {'reparam'}
            # of the convolutions, the classifier has 1600 x 1000 weights
            flops = [
                row['gflops_per_second'] * row['median_ms'] * 1e6 - 2 * 1600 * 1000 * row['batch_size'] for row in rows]
            assert flops[1] / flops[0] == pytest.approx(3 if quantity == 'batch_size' else 9)
    with Image.open(tmp_path / 'growth.png') as image:
        assert image.format == 'PNG' and image.width > 500


def test_compiled_models_of_one_class_do_not_evict_each_other(run, monkeypatch, tmp_path):
    # a backend that needs no compiler; where the limit is hit, a whole graph is refused
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend='eager'))
    with torch._dynamo.config.patch(recompile_limit=1):
        assert run(
            tmp_path, '--models', 'hbonet_010', 'hbonet_025', '--modes', 'compiled', '--batch-sizes', 1, '--rounds', 1,
            '--no-growth') == 0


def test_a_failure_does_not_cost_the_other_results(benchmark, run, monkeypatch, tmp_path):
    def reparameterize_model(model):
        raise RuntimeError('no folding\ntoday')

    monkeypatch.setattr(timm.utils, 'reparameterize_model', reparameterize_model)
    assert run(tmp_path, *SMALL[:2], '--modes', 'reparam', 'eager', *SMALL[4:]) == 1
    report = json.loads((tmp_path / 'benchmark.json').read_text())
    rows = {row['mode']: row for row in report['results']}
    assert rows['reparam']['error'] == 'RuntimeError: no folding today'
    assert rows['reparam']['median_ms'] is None
    assert rows['eager']['error'] is None and rows['eager']['median_ms'] > 0
    assert report['errors'] == [
        'hbonet_010, reparam, batch size 1, image size 224: RuntimeError: no folding today']
    assert f'* {report["errors"][0]}' in (tmp_path / 'benchmark.md').read_text()


def test_an_interrupted_run_leaves_nothing_half_written(tmp_path):
    command = [sys.executable, SCRIPT, tmp_path, *SMALL, '--rounds', '100000']
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        err = b''
        while b'timing' not in err:
            err += process.stderr.read(1)
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.splitlines()[-1].endswith(b'benchmark.py: interrupted.') and b'Traceback' not in err
    assert not out and not list(tmp_path.iterdir())


@pytest.mark.parametrize('args, message', [
    (['--models', 'hbonet_42'], '--models hbonet_42 is not an architecture that timm knows, see timm.list_models()'),
    (['--modes', 'warp'], '--modes warp is not a mode on cpu, which has eager, channels_last, reparam, compiled, '),
    (['--modes', 'eager_amp'], '--modes eager_amp is not a mode on cpu, which has '),
    (['--batch-sizes', '1', '0'], '--batch-sizes must be at least 1, got 0'),
    (['--train-batch-size', '-3'], '--train-batch-size must be at least 1, got -3'),
    (['--threads', '0'], '--threads must be at least 1, got 0'),
    (['--rounds', '0'], '--rounds must be at least 1, got 0'),
    (['--reference', 'nowhere.py'], '--reference is compared with hbonet_100, add that to --models'),
    (['--reference', 'nowhere.py', '--models', 'hbonet_100'],
     "there is no Python file --reference nowhere.py. Give the path of the authors' hbonet.py."),
])
def test_arguments_that_make_no_sense(run, tmp_path, args, message):
    error = run(tmp_path / 'output', *SMALL, *args)
    assert error.startswith(f'benchmark.py: {message}') and '\n' not in error
    assert not (tmp_path / 'output').exists()


def test_a_model_for_other_images(run, tmp_path):
    error = run(tmp_path / 'output', *SMALL, '--models', 'deit3_small_patch16_384')
    assert error.startswith('benchmark.py: --models deit3_small_patch16_384 cannot be used with images of 224 x 224. ')
    assert '\n' not in error and not (tmp_path / 'output').exists()


@pytest.mark.parametrize('code, message', [
    (REFERENCE + '    def forward(self, x):\n        return 1.001 * super().forward(x)\n',
     r'and hbonet_100 with its weights differ by 1\.0e-03 relative, at most 1e-04 is allowed\. '),
    (REFERENCE.replace('width=width_mult', 'width=0.5'), 'is not the code of hbonet_100, .*RuntimeError: .*mismatch'),
    (REFERENCE.replace('HBONet(t', 'Other(t'), "is not the code of hbonet_100, .*AttributeError: .*'HBONet'"),
    ('import nowhere', "is not the code of hbonet_100, .*ModuleNotFoundError: No module named 'nowhere'"),
])
def test_a_reference_that_is_another_network(run, tmp_path, code, message):
    path = tmp_path / 'other.py'
    path.write_text(code)
    error = run(tmp_path / 'output', *SMALL, '--models', 'hbonet_100', '--reference', path)
    assert re.match(f'benchmark.py: --reference {re.escape(str(path))} {message}', error) and '\n' not in error
    assert not (tmp_path / 'output').exists()


def test_a_package_that_is_not_installed(benchmark, run, monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'openvino' else find_spec(name))
    assert run(tmp_path / 'output', *SMALL, '--modes', 'openvino') == (
        'benchmark.py: --modes openvino needs openvino, which is not installed. '
        "Run: pip install 'timm-hbonet[clients]'")
    assert not (tmp_path / 'output').exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason='this machine has a CUDA device')
def test_cuda_where_there_is_none(run, tmp_path):
    assert run(tmp_path / 'output', '--device', 'cuda') == (
        'benchmark.py: --device cuda needs a CUDA device and a torch that is built for it, torch finds none')
    assert not (tmp_path / 'output').exists()


@pytest.mark.parametrize('name', ['file', 'file/below'])
def test_output_that_cannot_be_a_folder(run, tmp_path, name):
    (tmp_path / 'file').touch()
    error = run(tmp_path / name, *SMALL)
    assert error.startswith(f'benchmark.py: cannot write to {tmp_path / name}: ') and '\n' not in error
    assert [path.name for path in tmp_path.iterdir()] == ['file']
