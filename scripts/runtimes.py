"""How a network runs: in PyTorch and in the runtimes that deploy it, in float32 and in int8.

`MODES` is the table of all. `MODES[name].build` takes a network, batches of images, all of the shape of those to come,
and the number of threads. It returns the function from images to logits, and the bytes of the files that are loaded, or
of a state dict. Networks are re-parameterized for runtimes.

int8 is calibrated with all batches; other modes use the first, for its shape. The least and the largest value count in
ONNX Runtime, OpenVINO and LiteRT. ExecuTorch looks for the range of the least error. Weights have seven bits for ONNX
Runtime and OpenVINO: processors without VNNI add pairs of their products in 16 bits, which eight would overflow.
"""
import copy
import functools
import importlib.util
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, List, Sequence, Tuple, Union

import numpy as np
import torch
from timm.utils import reparameterize_model
from torch import nn

Batches = Sequence[torch.Tensor]
Predict = Callable[[torch.Tensor], Any]  # logits of images


def check_logits(logits: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Check that logits are the expected ones but for rounding.

    Args:
        tolerance: Largest difference that is allowed, as a share of the largest expected logit.

    Raises:
        ValueError: If they are not.
    """
    if logits.shape != expected.shape:
        raise ValueError(f'Logits of shape {tuple(logits.shape)}, expected {tuple(expected.shape)}')
    error = ((logits - expected).abs().max() / expected.abs().max()).item()
    if not error <= tolerance:
        raise ValueError(f'Logits differ by {error:.1e} relative, at most {tolerance:.0e} is allowed')


def describe_error(error: Exception) -> str:
    return ' '.join(f'{type(error).__name__}: {error}'.split())[:300]


def create_training_step(network: nn.Module) -> Predict:
    """Forward, cross entropy with random labels, backward, SGD with momentum."""
    optimizer = torch.optim.SGD(network.train().parameters(), lr=1e-3, momentum=0.9)

    def step(images: torch.Tensor) -> torch.Tensor:
        logits = network(images)
        nn.functional.cross_entropy(logits, torch.randint(logits.shape[1], (len(images),))).backward()
        optimizer.step()
        optimizer.zero_grad()
        return logits

    return step


@dataclass(frozen=True)
class PyTorch:
    channels_last: bool = True  # of network and images
    reparameterize: bool = False
    compile: bool = False  # for a fixed shape
    train: bool = False
    packages = ()

    def build(self, network: nn.Module, batches: Batches, threads: int) -> Tuple[Predict, float]:
        network = reparameterize_model(network) if self.reparameterize else copy.deepcopy(network)
        network = network.to(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)
        if self.train:
            return create_training_step(network), math.nan
        size = sum(tensor.nbytes for tensor in network.state_dict().values())
        if self.compile:
            torch._dynamo.config.recompile_limit = 1000  # models of one class share the limit
            network = torch.compile(network, fullgraph=True, dynamic=False)
        return torch.no_grad()(lambda images: network(images)), size


@dataclass(frozen=True)
class Runtime:
    """`export` writes files into a folder, and returns those that `load` reads."""
    export: Callable[[nn.Module, Batches, Path], List[Path]]
    load: Callable[[List[Path], int], Predict]
    packages: Tuple[str, ...]
    channels_last = train = False

    def build(self, network: nn.Module, batches: Batches, threads: int) -> Tuple[Predict, float]:
        with tempfile.TemporaryDirectory() as folder:
            files = self.export(network, batches, Path(folder))
            predict = self.load(files, threads)
            predict(batches[0])  # runtimes may read the files as late as now
            return predict, sum(path.stat().st_size for path in files)


def find_missing(mode: Union[PyTorch, Runtime]) -> List[str]:
    """Packages that are not installed."""
    return [package for package in mode.packages if importlib.util.find_spec(package) is None]


def choose_installed(names: Sequence[str]) -> Tuple[List[str], List[str]]:
    """Modes that can run, each once, and a line on each of the others, which is printed too."""
    missing = {name: find_missing(MODES[name]) for name in names}
    skipped = [
        f"{name}: needs {', '.join(packages)}. Run: pip install {' '.join(packages)}"
        for name, packages in missing.items() if packages]
    for line in skipped:
        print(f'Skipping {line}', file=sys.stderr)
    return [name for name, packages in missing.items() if not packages], skipped


@functools.lru_cache
def create_onnx_model(network: nn.Module, shape: torch.Size) -> bytes:
    return torch.onnx.export(
        reparameterize_model(network), (torch.randn(shape),), input_names=['images'], output_names=['logits'],
        dynamo=True, opset_version=18, verbose=False,
    ).model_proto.SerializeToString()


def export_onnx(network: nn.Module, batches: Batches, folder: Path) -> List[Path]:
    path = folder / 'model.onnx'
    path.write_bytes(create_onnx_model(network, batches[0].shape))
    return [path]


def load_onnxruntime(files: List[Path], threads: int) -> Predict:
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')  # spinning disturbs who comes next
    session = onnxruntime.InferenceSession(files[0], options, providers=['CPUExecutionProvider'])
    return lambda images: session.run(None, {'images': images.numpy()})[0]


def load_openvino(files: List[Path], threads: int) -> Predict:
    import openvino
    request = openvino.Core().compile_model(files[0], 'CPU', {
        'INFERENCE_NUM_THREADS': threads,
        'NUM_STREAMS': 1,
        'PERFORMANCE_HINT': 'LATENCY',
        'INFERENCE_PRECISION_HINT': 'f32',
        'ENABLE_CPU_PINNING': False,  # pinned threads disturb those of the others
        'ENABLE_MMAP': False,  # the file does not stay
    }).create_infer_request()
    return lambda images: request.infer([images.numpy()])[0]


def lower_to_xnnpack(program: torch.export.ExportedProgram, folder: Path, **options: Any) -> List[Path]:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    path = folder / 'model.pte'
    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], **options)
    path.write_bytes(edge.to_executorch().buffer)
    return [path]


def export_executorch(network: nn.Module, batches: Batches, folder: Path) -> List[Path]:
    return lower_to_xnnpack(torch.export.export(reparameterize_model(network), (batches[0],)), folder)


def load_executorch(files: List[Path], threads: int) -> Predict:
    """Load a program of ExecuTorch. All that a process has at a time must be for the same number of threads."""
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime
    # the pool has a thread for each core, and there is no other way to it; programs that are loaded keep the old one
    if portable_lib._threadpool_get_thread_count() != threads:
        portable_lib._unsafe_reset_threadpool(threads)
    program = Runtime.get().load_program(files[0].read_bytes())
    return lambda images: program.load_method('forward').execute([images])[0]  # a method does not keep its program


def export_litert(network: nn.Module, batches: Batches, folder: Path) -> List[Path]:
    import litert_torch
    path = folder / 'model.tflite'
    litert_torch.convert(reparameterize_model(network), (batches[0],)).export(str(path))
    return [path]


def load_litert(files: List[Path], threads: int) -> Predict:
    from ai_edge_litert.interpreter import Interpreter
    interpreter = Interpreter(model_content=files[0].read_bytes(), num_threads=threads)
    interpreter.allocate_tensors()
    place = interpreter.get_input_details()[0]['index']
    result = interpreter.get_output_details()[0]['index']

    def predict(images: torch.Tensor) -> Any:  # by less than a signature's runner, which adds up to 0.2 ms
        interpreter.set_tensor(place, images.numpy())
        interpreter.invoke()
        return interpreter.get_tensor(result)

    return predict


def export_ncnn(network: nn.Module, batches: Batches, folder: Path) -> List[Path]:
    import pnnx
    with torch.no_grad():
        pnnx.export(reparameterize_model(network), str(folder / 'model.pt'), batches[0][:1], fp16=False)
    return [folder / 'model.ncnn.param', folder / 'model.ncnn.bin']


def load_ncnn(files: List[Path], threads: int) -> Predict:
    """Load a model of ncnn. It has no batches: images come one after another."""
    import ncnn
    model = ncnn.Net()
    model.opt.num_threads = threads
    for name in ('fp16_packed', 'fp16_storage', 'fp16_arithmetic', 'bf16_storage'):
        setattr(model.opt, f'use_{name}', False)
    if model.load_param(str(files[0])) or model.load_model(str(files[1])):
        raise ValueError('ncnn cannot load what pnnx wrote, which says more above')

    def predict(images: torch.Tensor) -> Any:
        logits = []
        for array in images.numpy():
            extractor = model.create_extractor()
            extractor.input('in0', ncnn.Mat(array))
            logits.append(np.array(extractor.extract('out0')[1]))
        return np.stack(logits)

    return predict


def export_mnn(network: nn.Module, batches: Batches, folder: Path, options: Sequence[str] = ()) -> List[Path]:
    import _tools  # the command mnnconvert would install packages
    onnx, = export_onnx(network, batches, folder)
    path = folder / 'model.mnn'
    _tools.mnnconvert([
        'mnnconvert', '-f', 'ONNX', '--modelFile', str(onnx), '--MNNModel', str(path), '--bizCode', 'timm_hbonet',
        *options])
    return [path]


def load_mnn(files: List[Path], threads: int) -> Predict:
    from MNN import expr
    from MNN import nn as mnn
    manager = mnn.create_runtime_manager(({'backend': 0, 'numThread': threads, 'precision': 'high'},))
    model = mnn.load_module_from_file(str(files[0]), ['images'], ['logits'], runtime_manager=manager)

    def predict(images: torch.Tensor) -> Any:
        logits = model.forward([expr.const(images.numpy(), list(images.shape), expr.NCHW)])[0]
        return logits.read().copy()  # MNN's own memory, which it uses again once its holder is gone

    return predict


def export_onnxruntime_int8(network: nn.Module, batches: Batches, folder: Path) -> List[Path]:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        inputs = iter([{'images': images.numpy()} for images in batches])

        def get_next(self) -> Any:
            return next(self.inputs, None)

    source, = export_onnx(network, batches, folder)
    prepared, target = folder / 'prepared.onnx', folder / 'int8.onnx'
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared, target, Reader(), per_channel=True, reduce_range=True, activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8)
    return [target]


def export_openvino_int8(network: nn.Module, batches: Batches, folder: Path) -> List[Path]:
    import nncf
    import openvino
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet
    source, = export_onnx(network, batches, folder)
    dataset = nncf.Dataset([images.numpy() for images in batches])
    model = nncf.quantize(
        openvino.Core().read_model(source), dataset, subset_size=len(batches),
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
            overflow_fix=nncf.OverflowFix.ENABLE))
    path = folder / 'int8.xml'
    openvino.save_model(model, path, compress_to_fp16=False)
    return [path, path.with_suffix('.bin')]


def export_executorch_int8(network: nn.Module, batches: Batches, folder: Path) -> List[Path]:
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer
    from executorch.exir import EdgeCompileConfig
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    quantizer = xnnpack_quantizer.XNNPACKQuantizer().set_global(
        xnnpack_quantizer.get_symmetric_quantization_config(is_per_channel=True))
    program = torch.export.export(
        reparameterize_model(network), (batches[0].repeat(2, 1, 1, 1),),  # a batch size of 1 would be fixed
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    prepared = prepare_pt2e(program.module(), quantizer)
    with torch.no_grad():
        for images in torch.cat(tuple(batches)).split(32):  # one by one it is slow
            prepared(images)
    program = torch.export.export(convert_pt2e(prepared), (batches[0],))
    return lower_to_xnnpack(program, folder, compile_config=EdgeCompileConfig(_check_ir_validity=False))


def export_litert_int8(network: nn.Module, batches: Batches, folder: Path) -> List[Path]:
    from ai_edge_quantizer import calibrator, qtyping, quantizer, recipe
    from ai_edge_quantizer.utils.qsv_utils import min_max_update
    source = str(export_litert(network, batches, folder)[0])
    mode = calibrator.CalibrationMode.CALIBRATION_PRESERVE_ALL_TENSORS
    ranges = calibrator.CalibrationInterpreter(source, mode, min_max_update)
    runner = ranges.get_signature_runner()
    for images in batches:
        runner(args_0=images.numpy())
    converter = quantizer.Quantizer(source, recipe.static_wi8_ai8())
    for name in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):  # float, like the others'
        converter.update_quantization_recipe('.*', name, algorithm_key='no_quantize')
    path = folder / 'int8.tflite'
    path.write_bytes(converter.quantize(ranges.get_calibration_results()).quantized_model)
    return [path]


ONNX = ('onnx', 'onnxscript')
LITERT = ('litert_torch', 'ai_edge_litert')
MODES = {
    'eager': PyTorch(channels_last=False),
    'channels_last': PyTorch(),
    'reparam': PyTorch(reparameterize=True),
    'compiled': PyTorch(reparameterize=True, compile=True),
    'train': PyTorch(channels_last=False, train=True),
    'train_channels_last': PyTorch(train=True),
    'executorch': Runtime(export_executorch, load_executorch, ('executorch',)),
    'executorch_int8': Runtime(export_executorch_int8, load_executorch, ('executorch', 'torchao')),
    'litert': Runtime(export_litert, load_litert, LITERT),
    'litert_int8': Runtime(export_litert_int8, load_litert, (*LITERT, 'ai_edge_quantizer')),
    'mnn': Runtime(export_mnn, load_mnn, (*ONNX, 'MNN')),
    'mnn_int8_weights': Runtime(
        functools.partial(export_mnn, options=['--weightQuantBits', '8']), load_mnn, (*ONNX, 'MNN')),
    'ncnn': Runtime(export_ncnn, load_ncnn, ('pnnx', 'ncnn')),
    'onnxruntime': Runtime(export_onnx, load_onnxruntime, (*ONNX, 'onnxruntime')),
    'onnxruntime_int8': Runtime(export_onnxruntime_int8, load_onnxruntime, (*ONNX, 'onnxruntime')),
    'openvino': Runtime(export_onnx, load_openvino, (*ONNX, 'openvino')),
    'openvino_int8': Runtime(export_openvino_int8, load_openvino, (*ONNX, 'openvino', 'nncf')),
}
