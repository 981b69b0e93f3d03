"""Every architecture computes the same in the runtimes of docs/mobile.md, by the commands that stand there."""
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import count_convs, create_network, images, released
from pages import assert_equal_to
from reference import ARCHITECTURES
from script_runner import SCRIPTS
from timm.utils import reparameterize_model

runtimes = importlib.import_module('runtimes')
PAGE = (SCRIPTS.parent / 'docs' / 'mobile.md').read_text(encoding='utf-8')
# of each runtime, what must be there
MODULES = {
    'ExecuTorch': ('executorch',), 'LiteRT': ('litert_torch', 'ai_edge_litert'), 'ncnn': ('pnnx', 'ncnn'),
    'MNN': ('MNN', 'onnxscript'), 'Core ML': ('coremltools',), 'OpenVINO': ('openvino',),
    'ONNX Runtime': ('onnxruntime', 'onnxscript'),
}
SIZES = ((97, 111), (96, 96), (64, 64), (72, 72), (65, 65))


def need(*names):
    for name in names:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed. Run: pip install -e '.[mobile]'")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def to_executorch(model, image):
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime
    program = to_edge_transform_and_lower(torch.export.export(model, (image,)), partitioner=[XnnpackPartitioner()])
    calls = [str(n.target) for n in program.exported_program().graph.nodes if n.op == 'call_function']
    Path('model.pte').write_bytes(program.to_executorch().buffer)
    logits = Runtime.get().load_program('model.pte').load_method('forward').execute([image])[0]
    others = [name for name in calls if 'delegate' not in name and 'getitem' not in name]
    return logits, sum('delegate' in name for name in calls), others


def to_litert(model, image):
    import litert_torch
    from ai_edge_litert.interpreter import Interpreter
    litert_torch.convert(model, (image,)).export('model.tflite')
    interpreter = Interpreter('model.tflite', num_threads=1)
    logits = interpreter.get_signature_runner()(args_0=image.numpy())['output_0']
    return logits, sum(op['op_name'] == 'DELEGATE' for op in interpreter._get_ops_details()), []


# every architecture, at sizes that are a multiple of 32 and that are not; pages and results have the larger ones
CASES = [pytest.param(name, SIZES[i % len(SIZES)], id=f'{name}-{"x".join(map(str, SIZES[i % len(SIZES)]))}')
         for i, name in enumerate(ARCHITECTURES)]


@functools.lru_cache(maxsize=1)
def create(name, size):
    model = create_network(name, torch.float32).requires_grad_(False)
    image = images(1, 3, *size, dtype=torch.float32)
    return model, reparameterize_model(model), image, model(image)


@pytest.mark.parametrize('name, size', CASES)
@pytest.mark.parametrize('runtime, convert', [('ExecuTorch', to_executorch), ('LiteRT', to_litert)])
def test_xnnpack(runtime, convert, name, size):
    need(*MODULES[runtime])
    _, graph, image, expected = create(name, size)
    logits, delegates, others = convert(graph, image)
    assert_equal_to(logits, expected, 1e-4)
    assert (delegates, others) == (1, [])


def test_xnnpack_without_reparameterization_and_in_channels_last():
    need(*MODULES['ExecuTorch'], *MODULES['LiteRT'])
    model, graph, image, expected = create('hbonet_025_8x_d8', (97, 111))
    for logits, *_ in (
            to_executorch(model, image), to_litert(model, image),
            to_executorch(graph, image.to(memory_format=torch.channels_last)),
    ):
        assert_equal_to(logits, expected, 1e-4)


@pytest.mark.parametrize('name, size', CASES)
def test_other_runtimes(name, size):
    """Of one architecture together, as three of them take the same ONNX file."""
    model, _, image, expected = create(name, size)
    for mode in map(runtimes.MODES.get, ('onnxruntime', 'openvino', 'mnn', 'ncnn')):
        need(*mode.packages)
        predict, _ = mode.build(model, [image], 1)
        assert_equal_to(predict(image), expected, 1e-4)


@pytest.mark.parametrize('name, size', CASES)
def test_core_ml_converts(name, size):
    need(*MODULES['Core ML'])
    import coremltools
    _, graph, image, _ = create(name, size)
    program = torch.export.export(graph, (image,)).run_decompositions({})
    converted = coremltools.convert(program, skip_model_load=True)
    types = [op.op_type for op in converted._mil_program.functions['main'].operations]
    # Core ML merges a few
    assert types.count('conv') > 0.9 * count_convs(graph)
    assert not [name for name in types if 'upsample' in name or 'resize' in name]


def find_code(heading, language='python'):
    """The code under a heading of the page, which has larger networks."""
    section = re.search(rf'^{re.escape(heading)}\n(.*?)(?=^###? |\Z)', PAGE, re.MULTILINE | re.DOTALL)[1]
    code = '\n'.join(re.findall(rf'^```{language}\n(.*?)^```', section, re.MULTILINE | re.DOTALL))
    assert code
    return code.replace('hbonet_100', 'hbonet_010').replace('hbonet_035', 'hbonet_010')


def run_page(heading, **variables):
    exec(compile(find_code(heading), heading, 'exec'), variables)
    return variables


def run_commands(heading, folder):
    """Run the shell commands under a heading of the page, with the programs of this Python."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ['PATH']])
    done = subprocess.run(
        ['bash', '-euc', find_code(heading, 'sh')], cwd=folder, env={**os.environ, 'PATH': path}, capture_output=True,
        text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope='module')
def network():
    return released('hbonet_010', torch.float32)


@pytest.mark.parametrize('runtime', MODULES)
def test_page(server, folder, network, runtime):
    need('timmx', *MODULES[runtime])
    output = run_commands(f'## {runtime}', folder)
    if runtime == 'Core ML':
        assert 'saved' in output and Path('hbonet_010.mlpackage').is_dir()
        if sys.platform != 'darwin':
            pytest.skip('Core ML predicts on macOS only, here it converted')
    image = images(1, 3, 224, 224, dtype=torch.float32)
    logits = torch.as_tensor(run_page(f'## {runtime}', image=image)['logits']).reshape(1, -1)
    assert_equal_to(logits, network(image), 1e-3 if runtime == 'Core ML' else 1e-4)


def test_page_without_timmx(server, network):
    need(*MODULES['ExecuTorch'], *MODULES['LiteRT'], *MODULES['ncnn'])
    image = images(1, 3, 224, 224, dtype=torch.float32)
    run_page('## Without timmx', image=image)
    from executorch.runtime import Runtime
    method = Runtime.get().load_program('hbonet_010.pte').load_method('forward')
    assert_equal_to(method.execute([image])[0], network(image), 1e-4)
    assert all(Path(f'hbonet_010.{suffix}').stat().st_size > 4e6 for suffix in ('tflite', 'ncnn.bin'))


def test_int8(folder):
    need('executorch', 'litert_torch', 'ai_edge_quantizer', 'nncf', 'openvino', 'MNN', 'onnxscript')
    model = create_network('hbonet_010', torch.float32, num_classes=10, in_chans=1).requires_grad_(False)
    torch.save({'state_dict': model.state_dict()}, 'last.pth.tar')
    calibration_images = images(32, 1, 32, 32, dtype=torch.float32)
    page = run_page('## int8', calibration_images=calibration_images, image=calibration_images[:1])
    for runtime in ('ExecuTorch', 'LiteRT', 'OpenVINO', 'MNN'):
        page = run_page(f'### int8 in {runtime}', **page)
        if runtime != 'MNN':
            assert np.isfinite(page['logits']).all() and tuple(page['logits'].shape) == (1, 10)

    # the input's 256 values span the images to calibrate with
    to_int8 = next(n for n in page['program'].graph.nodes if 'quantize_per_tensor' in str(n.target))
    tensor = next(
        t for t in page['interpreter'].get_tensor_details()
        if t['dtype'] == np.int8 and tuple(t['shape']) == page['image'].shape)
    fake = next(op for op in page['network'].get_ordered_ops() if op.get_type_name() == 'FakeQuantize')
    low, high = (fake.input_value(i).get_node().data.item() for i in (1, 2))
    span = (calibration_images.max() - calibration_images.min()).item()
    assert [to_int8.args[1], tensor['quantization'][0], (high - low) / 255] == pytest.approx([span / 255] * 3, rel=0.1)
    sizes = [os.path.getsize(f'model_int8.{suffix}') for suffix in ('pte', 'tflite', 'mnn')]
    assert max(sizes) < os.path.getsize('model.onnx') / 2


def test_known_problems(folder):
    need('pnnx', 'ncnn', 'coremltools', 'MNN')
    page = run_page('## Known problems')
    for package, version, problem in (
            ('coremltools', '9.0', 'core_ml_refuses'), ('pnnx', '20261020', 'ncnn_is_wrong'),
            ('MNN', '3.6.1', 'mnn_overwrites')):
        if importlib.metadata.version(package) == version:
            assert page[problem], f'{package} {version} has no such problem any more: mend docs/mobile.md'
