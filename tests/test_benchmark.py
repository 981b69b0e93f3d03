"""The benchmark measures what it says: arithmetic, counts and files, and plain words for bad input.

No test depends on how fast anything is, or on how a runtime rounds.
"""
import importlib
import importlib.metadata
import importlib.util
import json
import shutil

import pandas as pd
import pytest
import reference
import timm
import torch
from PIL import Image
from script_runner import error_line, run_script
from timm.utils import reparameterize_model
from torch import nn

benchmark, runtimes = map(importlib.import_module, ('benchmark', 'runtimes'))
SMALL = ['--models', 'hbonet_010', '--modes', 'eager', '--batch-sizes', 1, '--rounds', 1, '--threads', 1, '--no-growth']
# plays the authors' file, with weights that are not those of seed 0
REFERENCE = '''
import timm_hbonet
import torch

class HBONet(timm_hbonet.HBONet):
    def __init__(self, width_mult):
        torch.manual_seed(1)
        super().__init__(width=width_mult, divisor=4)
'''


def run(*args):
    return run_script('benchmark.py', *args)


@pytest.fixture(scope='module')
def network():
    return benchmark.create_network(lambda: timm.create_model('hbonet_010'))


@pytest.fixture
def small(network, monkeypatch):
    """Options of a run of this network."""
    monkeypatch.setattr(benchmark, 'create_network', lambda create: network)
    return SMALL


@pytest.fixture(scope='module')
def output(tmp_path_factory):
    """Folder of a run with a reference, that held other files before."""
    folder = tmp_path_factory.mktemp('benchmark')
    (folder / 'reference.py').write_text(REFERENCE)
    output = folder / 'output'
    output.mkdir()
    (output / 'growth.png').write_text('of an earlier run')
    (output / 'thesis.tex').write_text('years of work')
    status, stdout, stderr = run(
        output, '--models', 'hbonet_010', 'mobilenetv3_small_050', '--modes', 'eager', 'reparam', 'train',
        '--batch-sizes', 2, '--train-batch-size', 3, '--rounds', 2, '--no-growth',
        '--reference', folder / 'reference.py')
    assert status == 0, stderr
    assert stdout == (output / 'benchmark.md').read_text() + '\n'
    return output


def read_rows(folder):
    return pd.DataFrame(**json.loads((folder / 'benchmark.json').read_text())['results'])


def test_every_network_is_timed_in_every_mode(output):
    rows = read_rows(output)
    assert rows['error'].isna().all() and (rows['image_size'] == 224).all() and (rows['median_ms'] > 0).all()
    modes = {'eager': 2, 'reparam': 2, 'train': 3}
    models = ('hbonet_010', 'mobilenetv3_small_050', 'authors_010')
    assert {(row.model, row.mode, row.batch_size) for row in rows.itertuples()} == {
        (model, mode, n) for model in models for mode, n in modes.items()}
    assert rows['median_ms'].between(rows['lower_quartile_ms'], rows['upper_quartile_ms']).all()


def test_files_of_a_run_have_machine_and_settings_without_paths(output):
    text = (output / 'benchmark.json').read_text()
    assert str(output.parent) not in text
    report = json.loads(text)
    settings, machine = report['settings'], report['machine']
    assert (settings['rounds'], settings['reference'], settings['train_batch_size']) == (2, 'reference.py', 3)
    assert machine['versions']['torch'] == importlib.metadata.version('torch')
    assert report['top1'] == {'hbonet_010.in1k': 41.5}
    assert {path.name for path in output.iterdir()} == {
        'benchmark.json', 'benchmark.csv', 'benchmark.md', 'accuracy_latency.png', 'thesis.tex'}
    found = pd.read_csv(output / 'benchmark.csv')
    pd.testing.assert_frame_equal(found, read_rows(output).astype(found.dtypes))


def chain(x):
    return torch.relu(torch.relu(torch.relu(x)))


def square(x):
    x = x.clone().requires_grad_()
    (x * x).sum().backward()


@pytest.mark.parametrize('function, floats', [
    (chain, 1000 + 1000),  # input and output of the second layer, the input of the first was there before
    (square, 1000 + 1 + 1 + 1000 + 1000),  # x, sum, its gradient, and that of x by each factor; nothing keeps x * x
])
def test_peak_memory_of_toys(function, floats):
    x = torch.ones(1000)
    assert benchmark.measure_peak_memory(lambda: function(x)) == 4 * floats


def find_mode(name):
    if missing := runtimes.find_missing(runtimes.MODES[name]):
        pytest.skip(f"{', '.join(missing)} not installed. Run: pip install -e '.[mobile]'")
    return runtimes.MODES[name]


@pytest.mark.parametrize('name', ['onnxruntime', 'openvino', 'executorch', 'litert', 'ncnn', 'mnn'])
def test_a_runtime_computes_what_pytorch_does(network, name):
    mode = find_mode(name)
    images = torch.randn(2, 3, 32, 64)
    predict, size = mode.build(network, [images], 1)
    for _ in range(2):
        with torch.no_grad():
            runtimes.check_logits(torch.as_tensor(predict(images)), network(images), 1e-4)
    weights = sum(4 * p.numel() for p in reparameterize_model(network).parameters())
    assert 0.99 * weights <= size <= 1.05 * weights  # equal constants are stored once
    if name == 'executorch':
        from executorch.extension.pybindings import portable_lib
        assert portable_lib._threadpool_get_thread_count() == 1


def create_positive_network():
    """No products that cancel out: a tensor in int8 adds at most 1 % of the largest logit to the error."""
    network = nn.Sequential(
        nn.Conv2d(3, 64, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 1000))
    for parameter in network.eval().requires_grad_(False).parameters():
        parameter.abs_()
    return network


@pytest.mark.parametrize(
    'name', ['onnxruntime_int8', 'openvino_int8', 'executorch_int8', 'litert_int8', 'mnn_int8_weights'])
def test_int8_is_calibrated_with_the_images_that_are_for_it(name):
    mode = find_mode(name)
    torch.manual_seed(0)
    network, images = create_positive_network(), 2 * torch.rand(2, 3, 32, 32)
    images[:, :, 0, 0], images[:, :, -1, -1] = 0, 2  # the range
    predict, size = mode.build(network, [images / 2, images], 1)
    for factor in (0.5, 1):
        runtimes.check_logits(torch.as_tensor(predict(factor * images)), network(factor * images), 0.1)
    assert size < 0.5 * sum(4 * p.numel() for p in network.parameters())
    if name != 'mnn_int8_weights':  # what is outside of their range is cut off, so that it makes no difference how far
        far = [torch.as_tensor(predict(factor * (images > 1) + 0.)).clone() for factor in (6, 60)]
        assert torch.equal(*far)


def test_weights_have_seven_bits_where_eight_would_overflow_without_vnni(tmp_path):
    import onnx
    import openvino
    network, images = create_positive_network(), torch.rand(1, 3, 32, 32)
    find_mode('onnxruntime_int8')
    model = onnx.load(runtimes.export_onnxruntime_int8(network, [images], tmp_path)[0])
    arrays = {'onnxruntime': [onnx.numpy_helper.to_array(i) for i in model.graph.initializer]}
    if not runtimes.find_missing(runtimes.MODES['openvino_int8']):
        path, _ = runtimes.export_openvino_int8(network, [images], tmp_path)
        arrays['openvino'] = [
            op.data for op in openvino.Core().read_model(path).get_ops() if op.get_type_name() == 'Constant']
    for name, found in arrays.items():
        weights = [array for array in found if array.dtype == 'int8' and array.ndim == 4]
        # a sum of two products with activations of up to 255 stays below 2 ** 15
        assert weights and max(abs(array.astype(int)).max() for array in weights) <= 64, name


@pytest.mark.parametrize('change, message', [
    (lambda logits: logits, None),
    (lambda logits: 1.01 * logits, 'Logits differ by 1.0e-02 relative, at most 1e-03 is allowed'),
    (lambda logits: logits * torch.nan, 'Logits differ by nan relative, at most 1e-03 is allowed'),
    (lambda logits: logits[:, 1:], 'Logits of shape (1, 999), expected (1, 1000)'),
])
def test_files_of_a_runtime_are_weighed_and_its_logits_checked(
        small, network, monkeypatch, tmp_path, change, message):
    def export(network, batches, folder):
        for name in ('one', 'three', 'another'):
            (folder / name).write_text(name)
        return [folder / 'one', folder / 'three']

    def load(files, threads):
        assert [path.read_text() for path in files] == ['one', 'three'] and threads == 1
        return torch.no_grad()(lambda images: change(network(images)))

    monkeypatch.setitem(runtimes.MODES, 'ncnn', runtimes.Runtime(export, load, ('torch',)))
    status, _, stderr = run(tmp_path, *small, '--modes', 'ncnn', 'eager')
    rows = read_rows(tmp_path).set_index('mode')
    if message:
        assert status == 1 and error_line(stderr).startswith('benchmark.py: error: 1 of 2 failed, see the end of ')
        assert rows['error'].dropna().to_dict() == {'ncnn': f'ValueError: {message}'}
        assert pd.isna(rows['median_ms']['ncnn']) and rows['median_ms']['eager'] > 0  # the others go on
        assert f'hbonet_010, ncnn, batch size 1: ValueError: {message}' in (tmp_path / 'benchmark.md').read_text()
    else:
        assert status == 0 and rows['file_bytes']['ncnn'] == 8 and rows['median_ms']['ncnn'] > 0


def test_growth_is_timed_by_batch_and_image_size(small, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, 'GROWTH_MODELS', ('hbonet_010',))
    monkeypatch.setattr(benchmark, 'GROWTH_SHAPES', ((2, 64), (1, 32)))
    assert run(tmp_path, *small, '--growth')[0] == 0
    rows = read_rows(tmp_path)
    growth = rows[(rows['part'] == 'growth') & (rows['model'] == 'hbonet_010')]
    assert growth[['mode', 'batch_size', 'image_size']].values.tolist() == [
        ['reparam', 2, 64], ['reparam', 1, 32]]
    assert growth['peak_memory_bytes'].iloc[0] > 4 * growth['peak_memory_bytes'].iloc[1] > 0


def test_a_runtime_that_is_not_installed_is_skipped_by_name(small, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'MNN' else object())
    status, _, stderr = run(tmp_path / 'output', *small, '--modes', 'mnn')
    assert status == 1 and error_line(stderr) == 'benchmark.py: error: none of --modes is installed.'
    assert not (tmp_path / 'output').exists()
    status, _, stderr = run(tmp_path / 'output', *small, '--modes', 'mnn', 'eager')
    message = 'mnn: needs MNN. Run: pip install MNN'
    assert status == 0 and message in stderr and message in (tmp_path / 'output' / 'benchmark.md').read_text()
    assert set(read_rows(tmp_path / 'output')['mode']) == {'eager'}


def test_an_interrupted_run_leaves_nothing(small, monkeypatch, tmp_path):
    def interrupt(images):
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark.Candidate, 'measure', interrupt)
    status, _, stderr = run(tmp_path, *small)
    assert status == 130 and error_line(stderr).endswith('benchmark.py: interrupted.')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('args, status, message', [
    (['--models', 'hbonet_42'], 1, '--models hbonet_42 cannot run on images of 224 x 224. RuntimeError: Unknown model'),
    (['--models', 'deit3_small_patch16_384'], 1, '--models deit3_small_patch16_384 cannot run on images of 224 x 224'),
    (['--batch-sizes', '1', '0'], 2, "argument --batch-sizes: must be a whole number of at least 1, got '0'"),
    (['--reference', 'nowhere.py'], 1, '--reference nowhere.py is not the code of hbonet_010, '),
    (['--reference', __file__, '--models', 'lcnet_050'], 1, '--reference is compared with hbonet_100 and its other '),
])
def test_arguments_that_make_no_sense(tmp_path, args, status, message):
    found, _, stderr = run(tmp_path / 'output', *SMALL, *args)
    assert found == status and message in error_line(stderr)
    assert not (tmp_path / 'output').exists()


@pytest.mark.parametrize('code, message', [
    (REFERENCE + '    def forward(self, x):\n        return 1.001 * super().forward(x)\n',
     'ValueError: Logits differ by 1.0e-03 relative, at most 1e-04 is allowed'),
    (REFERENCE.replace('HBONet(t', 'Other(t'), 'AttributeError: '),
    ('import nowhere', "ModuleNotFoundError: No module named 'nowhere'"),
])
def test_a_reference_that_is_another_network(tmp_path, code, message):
    path = tmp_path / 'other.py'
    path.write_text(code)
    status, _, stderr = run(tmp_path / 'output', *SMALL, '--reference', path)
    assert status == 1 and f'--reference {path} is not the code of hbonet_010, ' in error_line(stderr)
    assert message in stderr
    assert not (tmp_path / 'output').exists()


def test_a_folder_that_cannot_be_written(small, tmp_path):
    (tmp_path / 'file').touch()
    status, _, stderr = run(tmp_path / 'file', *small)
    assert status == 1 and error_line(stderr) == f'benchmark.py: error: {tmp_path / "file"}: File exists.'
    assert [path.name for path in tmp_path.iterdir()] == ['file']


def test_the_report_of_given_numbers(tmp_path):
    """Of a version that timed a matrix product too, which the report leaves out."""
    shutil.copy(reference.DATA / 'benchmark.json', tmp_path)
    status, stdout, stderr = run(tmp_path, '--report')
    assert status == 0, stderr
    text = (tmp_path / 'benchmark.md').read_text()
    assert stdout == text + '\n'
    lines = [[cell.strip() for cell in line.split('|')[1:-1]] for line in text.splitlines() if line.startswith('|')]
    for line in (
            ['hbonet_100', '20.00 (19.50 to 21.00)', '5.00 (4.50 to 6.00)'],
            ['hbonet_050_d8', '14.00 (13.50 to 15.00)', ''],  # failed in ONNX Runtime
            ['hbonet_100', 'authors_100', '0.800', '0.500'],
            ['hbonet_050', 'authors_050', '0.750', '0.800'],
            ['hbonet_100', 'mobilenetv2_100', '1.250', '1.250'],
            ['hbonet_050', 'mobilenetv3_large_100', '1.200', '2.000'],
            ['hbonet_050_d8', 'mobilenetv3_large_100', '1.120', ''],
            ['hbonet_100', 'authors_100', '0.909'],  # of training
            ['hbonet_100', '3.0'],
            ['hbonet_100', '200.0'],
            ['hbonet_100', '20.15'],
            ['mobilenetv2_100', '14.02'],
    ):
        assert line in lines
    assert 'hbonet_050_d8, onnxruntime, batch size 1: RuntimeError: no luck' in text and 'matmul' not in text
    for name in ('Processor X', 'AVX2', 'fma3', 'timm 1.0.31', 'openvino: needs openvino'):
        assert name in text
    for name in ('accuracy_latency.png', 'growth.png'):
        Image.open(tmp_path / name, formats=['PNG']).load()


def test_the_pictures_show_the_figures():
    figures = json.loads((reference.DATA / 'benchmark.json').read_text())
    rows = pd.DataFrame(**figures['results'])
    axes, = benchmark.draw_accuracy(rows[rows['mode'] == 'onnxruntime'], figures['top1']).axes
    points = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert points['hbonet'] == [[4., 67.], [5., 73.1]]
    assert points['mobilenetv2_100'] == [[4., 72.91]] and points['mobilenetv3_large_100'] == [[2., 75.784]]
    assert [text.get_text() for text in axes.texts] == ['050', '100']
    by_batch, by_size, memory, _ = benchmark.draw_growth(rows[rows['part'] == 'growth']).axes
    for axes, points in ((by_batch, [[1., 10.], [2., 20.]]), (by_size, [[96., 10 * 96 / 224], [224., 10.]])):
        assert axes.get_lines()[0].get_label() == 'hbonet_100'
        assert axes.get_lines()[0].get_xydata() == pytest.approx(torch.tensor(points).numpy())
    assert memory.get_ylabel() == 'peak memory in MiB' and len(memory.get_lines()[0].get_xydata()) == 2


@pytest.mark.parametrize('content', [None, '{}', 'no JSON'])
def test_a_report_of_no_benchmark(tmp_path, content):
    if content:
        (tmp_path / 'benchmark.json').write_text(content)
    status, _, stderr = run(tmp_path, '--report')
    assert status == 1 and f'{tmp_path / "benchmark.json"} is not what benchmark.py writes. ' in error_line(stderr)
    assert len(list(tmp_path.iterdir())) == bool(content)
