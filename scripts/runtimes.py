"""How a network runs: in PyTorch and in the runtimes that deploy it, in float32 and in int8.

`MODES` is the table of all, `Candidate` a network in one of them. Networks are re-parameterized for runtimes. Batches
and image sizes are fixed. What a runtime computes, it gets from memory, and hands back as an array.

int8 is calibrated with images. The least and the largest value count in ONNX Runtime, OpenVINO and LiteRT. ExecuTorch
looks for the range of the least error, and MNN takes averages over batches. Weights have seven bits for ONNX Runtime
and OpenVINO: processors without VNNI add pairs of their products in 16 bits, which eight would overflow.
"""
import collections
import copy
import functools
import importlib.util
import io
import json
import math
import os
import sys
import tempfile
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np
import torch
from PIL import Image
from timm.utils import reparameterize_model
from torch import nn
from torch.utils.benchmark import timer

Files = List[bytes]
Predict = Callable[[torch.Tensor], Any]  # logits of images
PROFILED_CALLS = 5


@contextmanager
def silence() -> Iterator[None]:
    """Hold back what is printed, by libraries in C++ too, and show it on stderr if an exception is raised."""
    sys.stdout.flush()
    saved = [os.dup(descriptor) for descriptor in (1, 2)]
    # never closed, as loggers that are made now may keep them
    out, err = (open(descriptor, 'w', buffering=1, closefd=False) for descriptor in (1, 2))
    with tempfile.TemporaryFile() as log:
        try:
            for descriptor in (1, 2):
                os.dup2(log.fileno(), descriptor)
            with redirect_stdout(out), redirect_stderr(err):
                yield
        except Exception:
            log.seek(0)
            os.write(saved[1], log.read())
            raise
        finally:
            for descriptor, original in zip((1, 2), saved, strict=True):
                os.dup2(original, descriptor)
                os.close(original)


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


@functools.lru_cache(maxsize=None)
def create_onnx_model(network: nn.Module, shape: torch.Size, dynamic_batch: bool = False) -> Any:
    """ONNX model of a network, re-parameterized, as a protobuf. For images of a shape, or any number of them."""
    network, images = reparameterize_model(network), torch.randn(shape)
    if dynamic_batch:
        images = images.repeat(2, 1, 1, 1)  # torch.export fixes a batch size of 1
    return torch.onnx.export(
        network, (images,), input_names=['images'], output_names=['logits'], dynamo=True, opset_version=18,
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},) if dynamic_batch else None, verbose=False).model_proto


def export_onnx(network: nn.Module, images: torch.Tensor) -> Files:
    return [create_onnx_model(network, images.shape).SerializeToString()]


def open_onnxruntime(files: Files, threads: int, profile: Optional[Path] = None) -> Any:
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')  # spinning disturbs who comes next
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(files[0], options, providers=['CPUExecutionProvider'])


def load_onnxruntime(files: Files, threads: int) -> Predict:
    session = open_onnxruntime(files, threads)
    return lambda images: session.run(None, {'images': images.numpy()})[0]


def profile_onnxruntime(network: nn.Module, images: torch.Tensor, threads: int) -> Dict[str, List[float]]:
    """Nodes in the ONNX model, nodes in ONNX Runtime's graph, and their milliseconds in a call, by type of node."""
    with tempfile.TemporaryDirectory() as folder:
        session = open_onnxruntime(export_onnx(network, images), threads, Path(folder, 'profile'))
        for _ in range(PROFILED_CALLS + 1):
            session.run(None, {'images': images.numpy()})
        events = json.loads(Path(session.end_profiling()).read_text(encoding='utf-8'))
    calls = [event for event in events if event['cat'] == 'Node' and event['name'].endswith('_kernel_time')]
    per_call = len(calls) // (PROFILED_CALLS + 1)
    types = collections.defaultdict(lambda: [0, 0, 0.])
    for node in create_onnx_model(network, images.shape).graph.node:
        types[node.op_type][0] += 1
    for i, event in enumerate(calls[per_call:]):  # without the first call
        types[event['args']['op_name']][1] += i < per_call
        types[event['args']['op_name']][2] += event['dur'] / PROFILED_CALLS / 1e3
    return types


def load_openvino(files: Files, threads: int) -> Predict:
    """Load an ONNX model, or OpenVINO's own two files."""
    import openvino
    core = openvino.Core()
    request = core.compile_model(core.read_model(*map(io.BytesIO, files)), 'CPU', {
        'INFERENCE_NUM_THREADS': threads,
        'NUM_STREAMS': 1,
        'PERFORMANCE_HINT': 'LATENCY',
        'INFERENCE_PRECISION_HINT': 'f32',
        'ENABLE_CPU_PINNING': False,  # pinned threads disturb those of the others
    }).create_infer_request()
    return lambda images: request.infer([images.numpy()])[0]


def export_executorch(network: nn.Module, images: torch.Tensor) -> Files:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    program = torch.export.export(reparameterize_model(network), (images,))
    return [to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch().buffer]


def load_executorch(files: Files, threads: int) -> Predict:
    """Load a program of ExecuTorch. All that a process has at a time must be for the same number of threads."""
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime
    # the pool has a thread for each core, and there is no other way to it; programs that are loaded keep the old one
    if portable_lib._threadpool_get_thread_count() != threads:
        portable_lib._unsafe_reset_threadpool(threads)
    program = Runtime.get().load_program(files[0])
    return lambda images: program.load_method('forward').execute([images])[0]  # a method does not keep its program


def export_litert(network: nn.Module, images: torch.Tensor) -> Files:
    import litert_torch
    return [litert_torch.convert(reparameterize_model(network), (images,)).model_content()]


def load_litert(files: Files, threads: int) -> Predict:
    from ai_edge_litert.interpreter import Interpreter
    interpreter = Interpreter(model_content=files[0], num_threads=threads)
    interpreter.allocate_tensors()
    place, = (details['index'] for details in interpreter.get_input_details())
    result, = (details['index'] for details in interpreter.get_output_details())

    def predict(images: torch.Tensor) -> Any:
        interpreter.set_tensor(place, images.numpy())
        interpreter.invoke()
        return interpreter.get_tensor(result)

    return predict


def export_ncnn(network: nn.Module, images: torch.Tensor) -> Files:
    import pnnx
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        names = {
            'ptpath': 'traced.pt', 'pnnxparam': 'pnnx.param', 'pnnxbin': 'pnnx.bin', 'pnnxpy': 'model_pnnx.py',
            'pnnxonnx': 'pnnx.onnx', 'ncnnpy': 'model_ncnn.py', 'ncnnparam': 'ncnn.param', 'ncnnbin': 'ncnn.bin'}
        pnnx.export(
            reparameterize_model(network), inputs=images[:1], fp16=False,
            **{key: str(Path(folder, name)) for key, name in names.items()})
        return [Path(folder, name).read_bytes() for name in ('ncnn.param', 'ncnn.bin')]


def load_ncnn(files: Files, threads: int) -> Predict:
    """Load a model of ncnn. It has no batches: images come one after another."""
    import ncnn
    model = ncnn.Net()
    model.opt.num_threads = threads
    for name in ('fp16_packed', 'fp16_storage', 'fp16_arithmetic', 'bf16_storage'):
        setattr(model.opt, f'use_{name}', False)
    with tempfile.TemporaryDirectory() as folder:
        for load, content in zip((model.load_param, model.load_model), files, strict=True):
            path = Path(folder, load.__name__)
            path.write_bytes(content)
            if load(str(path)):
                raise ValueError(f'ncnn cannot {load.__name__.replace("_", " ")}')

    def predict(images: torch.Tensor) -> Any:
        logits = []
        for array in images.numpy():
            extractor = model.create_extractor()
            extractor.input('in0', ncnn.Mat(array))
            logits.append(np.array(extractor.extract('out0')[1]))
        return np.stack(logits)

    return predict


def convert_to_mnn(onnx_model: bytes, *options: str) -> Files:
    import _tools  # the command mnnconvert would install packages
    with tempfile.TemporaryDirectory() as folder:
        onnx, path = Path(folder, 'model.onnx'), Path(folder, 'model.mnn')
        onnx.write_bytes(onnx_model)
        _tools.mnnconvert([
            'mnnconvert', '-f', 'ONNX', '--modelFile', str(onnx), '--MNNModel', str(path), '--bizCode', 'timm_hbonet',
            *options])
        return [path.read_bytes()]


def export_mnn(network: nn.Module, images: torch.Tensor) -> Files:
    return convert_to_mnn(export_onnx(network, images)[0])


def load_mnn(files: Files, threads: int) -> Predict:
    from MNN import expr
    from MNN import nn as mnn
    manager = mnn.create_runtime_manager(({'backend': 0, 'numThread': threads, 'precision': 'high'},))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'model.mnn')
        path.write_bytes(files[0])
        model = mnn.load_module_from_file(str(path), ['images'], ['logits'], runtime_manager=manager)

    def predict(images: torch.Tensor) -> Any:
        logits = model.forward([expr.const(images.numpy(), list(images.shape), expr.NCHW)])[0]
        return logits.read().copy()  # MNN's own memory, which it uses again once its holder is gone

    return predict


def split(images: torch.Tensor, calibration: torch.Tensor) -> List[torch.Tensor]:
    """Batches of `calibration` of the shape of `images`. What is left over is dropped.

    Raises:
        ValueError: If there is none.
    """
    whole = [batch for batch in calibration.split(len(images)) if len(batch) == len(images)]
    if not whole:
        raise ValueError(f'{len(calibration)} images to calibrate with are no batch of {len(images)}')
    return whole


def export_onnxruntime_int8(network: nn.Module, images: torch.Tensor, calibration: torch.Tensor) -> Files:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        batches = iter(split(images, calibration))

        def get_next(self) -> Any:
            batch = next(self.batches, None)
            return None if batch is None else {'images': batch.numpy()}

    with tempfile.TemporaryDirectory() as folder:
        source, prepared, target = (Path(folder, f'{name}.onnx') for name in ('source', 'prepared', 'target'))
        source.write_bytes(export_onnx(network, images)[0])
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared, target, Reader(), per_channel=True, reduce_range=True, activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8)
        return [target.read_bytes()]


def export_openvino_int8(network: nn.Module, images: torch.Tensor, calibration: torch.Tensor) -> Files:
    import nncf
    import openvino
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet
    batches = [batch.numpy() for batch in split(images, calibration)]
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, 'source.onnx'), Path(folder, 'target.xml')
        source.write_bytes(export_onnx(network, images)[0])
        model = nncf.quantize(
            openvino.Core().read_model(source), nncf.Dataset(batches), subset_size=len(batches),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
                overflow_fix=nncf.OverflowFix.ENABLE))
        openvino.save_model(model, target, compress_to_fp16=False)
        return [target.read_bytes(), target.with_suffix('.bin').read_bytes()]


def export_executorch_int8(network: nn.Module, images: torch.Tensor, calibration: torch.Tensor) -> Files:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    quantizer = xnnpack_quantizer.XNNPACKQuantizer().set_global(
        xnnpack_quantizer.get_symmetric_quantization_config(is_per_channel=True))
    program = torch.export.export(
        reparameterize_model(network), (images.repeat(2, 1, 1, 1),),  # a batch size of 1 would be fixed
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    prepared = prepare_pt2e(program.module(), quantizer)
    with torch.no_grad():
        for batch in calibration.split(32):  # one by one it is slow
            prepared(batch)
    program = torch.export.export(convert_pt2e(prepared), (images,))
    return [to_edge_transform_and_lower(
        program, partitioner=[XnnpackPartitioner()], compile_config=EdgeCompileConfig(_check_ir_validity=False),
    ).to_executorch().buffer]


def export_litert_int8(network: nn.Module, images: torch.Tensor, calibration: torch.Tensor) -> Files:
    from ai_edge_quantizer import calibrator, qtyping, quantizer, recipe
    from ai_edge_quantizer.utils.qsv_utils import min_max_update
    mode = calibrator.CalibrationMode.CALIBRATION_PRESERVE_ALL_TENSORS
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'model.tflite')
        path.write_bytes(export_litert(network, images)[0])
        ranges = calibrator.CalibrationInterpreter(str(path), mode, min_max_update)
        runner = ranges.get_signature_runner()
        for batch in split(images, calibration):
            runner(args_0=batch.numpy())
        converter = quantizer.Quantizer(str(path), recipe.static_wi8_ai8())
        for name in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):  # float, like the others'
            converter.update_quantization_recipe('.*', name, algorithm_key='no_quantize')
        return [bytes(converter.quantize(ranges.get_calibration_results()).quantized_model)]


def export_mnn_int8(network: nn.Module, images: torch.Tensor, calibration: torch.Tensor) -> Files:
    import _tools  # the command mnnquant would install packages
    if images.shape[1] not in (1, 3):
        raise ValueError(f"MNN's quantizer takes images of 1 or 3 channels, got {images.shape[1]}")
    # MNN reads pictures of 8 bits: each channel is stretched to 0 to 255, which `mean` and `normal` undo
    low, high = (extreme.view(-1, 1, 1) for extreme in torch.aminmax(calibration.transpose(0, 1).flatten(1), dim=1))
    scale = (high - low).clamp(min=1e-6) / 255
    with tempfile.TemporaryDirectory() as folder:
        pictures, config, source, target = (Path(folder, name) for name in ('pictures', 'config', 'source', 'target'))
        pictures.mkdir()
        onnx_model = create_onnx_model(network, images.shape, dynamic_batch=True).SerializeToString()
        source.write_bytes(convert_to_mnn(onnx_model)[0])
        for i, image in enumerate(calibration):
            pixels = ((image - low) / scale).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(np.ascontiguousarray(pixels.squeeze(2) if len(low) == 1 else pixels)).save(
                pictures / f'{i}.png')
        config.write_text(json.dumps(dict(
            format='GRAY' if len(low) == 1 else 'RGB', mean=(-low / scale).flatten().tolist(),
            normal=scale.flatten().tolist(), width=images.shape[3], height=images.shape[2], path=f'{pictures}/',
            used_image_num=len(calibration), feature_quantize_method='EMA',
            batch_size=min(32, len(calibration)),  # averages of the ranges of single images cut off much more
            weight_quantize_method='MAX_ABS')))
        _tools.mnnquant(['mnnquant', str(source), str(target), str(config)])
        return [target.read_bytes()]


def export_mnn_int8_weights(network: nn.Module, images: torch.Tensor) -> Files:
    """Weights in int8. Arithmetic is in float32, so that nothing is calibrated."""
    return convert_to_mnn(export_onnx(network, images)[0], '--weightQuantBits', '8')


def run_pytorch(
        network: nn.Module, images: torch.Tensor, threads: int, calibration: torch.Tensor,
        channels_last: bool = True, reparameterize: bool = False, autocast: bool = False,
        compiler_options: Optional[Dict[str, Any]] = None,
) -> Tuple[Predict, int]:
    network = reparameterize_model(network) if reparameterize else copy.deepcopy(network)
    network = network.to(images.device, memory_format=torch.channels_last if channels_last else torch.preserve_format)
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    if compiler_options is not None:
        torch._dynamo.config.recompile_limit = 1000  # models of one class share the limit
        network = torch.compile(network, fullgraph=True, dynamic=False, options=compiler_options)

    def predict(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), torch.autocast(images.device.type, torch.float16, enabled=autocast):
            return network(images)

    return predict, size


def run_exported(
        network: nn.Module, images: torch.Tensor, threads: int, calibration: torch.Tensor,
        export: Callable[..., Files], load: Callable[[Files, int], Predict], calibrated: bool,
) -> Tuple[Predict, int]:
    with silence():
        files = export(network, images, calibration) if calibrated else export(network, images)
        predict = load(files, threads)
        predict(images)
    return predict, sum(map(len, files))


@dataclass(frozen=True)
class Mode:
    """A way to run a network.

    `build` takes a network, images of the shape of those to come, the number of threads, and images to calibrate with.
    It returns the function from images to logits, and the bytes of the files that are loaded, or of a state dict.
    """
    build: Callable[..., Tuple[Predict, int]]
    packages: Tuple[str, ...] = ()
    devices: Tuple[str, ...] = ('cpu',)
    channels_last: bool = False
    tolerance: float = math.inf  # how far logits may be from those of PyTorch, as a share of the largest
    on_request: bool = True  # as it is slow to compile or to export

    def find_missing(self) -> List[str]:
        """Packages that are not installed."""
        return [package for package in self.packages if importlib.util.find_spec(package) is None]


def pytorch(devices: Tuple[str, ...] = ('cpu', 'cuda'), on_request: bool = False, **options: Any) -> Mode:
    build = functools.partial(run_pytorch, **options)
    return Mode(build, devices=devices, channels_last=options.get('channels_last', True), on_request=on_request)


def exported(
        export: Callable[..., Files], load: Callable[[Files, int], Predict], *packages: str, calibrated: bool = False,
        tolerance: float = 1e-3, on_request: bool = True,
) -> Mode:
    build = functools.partial(run_exported, export=export, load=load, calibrated=calibrated)
    return Mode(build, packages, tolerance=tolerance, on_request=on_request)


ONNX = ('onnx', 'onnxscript')
INT8 = dict(calibrated=True, tolerance=0.5)  # untrained networks amplify errors: enough to tell of a broken one
MODES = {
    'eager': pytorch(channels_last=False),
    'channels_last': pytorch(),
    'reparam': pytorch(reparameterize=True),
    'compiled': pytorch(('cpu',), reparameterize=True, compiler_options={}),
    'compiled_freezing': pytorch(
        ('cpu',), on_request=True, reparameterize=True, compiler_options={'freezing': True}),
    'eager_amp': pytorch(('cuda',), channels_last=False, autocast=True),
    'channels_last_amp': pytorch(('cuda',), autocast=True),
    'reparam_amp': pytorch(('cuda',), reparameterize=True, autocast=True),
    'executorch': exported(export_executorch, load_executorch, 'executorch'),
    'executorch_int8': exported(export_executorch_int8, load_executorch, 'executorch', 'torchao', **INT8),
    'litert': exported(export_litert, load_litert, 'litert_torch', 'ai_edge_litert'),
    'litert_int8': exported(
        export_litert_int8, load_litert, 'litert_torch', 'ai_edge_litert', 'ai_edge_quantizer', **INT8),
    'mnn': exported(export_mnn, load_mnn, *ONNX, 'MNN'),
    'mnn_int8': exported(export_mnn_int8, load_mnn, *ONNX, 'MNN', **INT8),
    'mnn_int8_weights': exported(export_mnn_int8_weights, load_mnn, *ONNX, 'MNN', tolerance=0.5),
    'ncnn': exported(export_ncnn, load_ncnn, 'pnnx', 'ncnn'),
    'onnxruntime': exported(export_onnx, load_onnxruntime, *ONNX, 'onnxruntime', on_request=False),
    'onnxruntime_int8': exported(export_onnxruntime_int8, load_onnxruntime, *ONNX, 'onnxruntime', **INT8),
    'openvino': exported(export_onnx, load_openvino, *ONNX, 'openvino', on_request=False),
    'openvino_int8': exported(export_openvino_int8, load_openvino, *ONNX, 'openvino', 'nncf', **INT8),
}


@dataclass
class Candidate:
    """A network in a mode, what its calls took, and what went wrong."""
    model: str
    network: Optional[nn.Module]
    mode: str
    predict: Optional[Predict] = None
    file_bytes: float = math.nan
    seconds: List[float] = field(default_factory=list)
    error: Optional[str] = None

    def attempt(self, action: Callable[..., Any], *args: Any) -> Any:
        """Do something unless an earlier action failed. Whatever fails, the other candidates go on."""
        try:
            if not self.error:
                return action(*args)
        except Exception as e:  # each runtime has errors of its own
            self.error = describe_error(e)

    def build(self, images: torch.Tensor, threads: int, calibration: torch.Tensor) -> None:
        self.predict, self.file_bytes = MODES[self.mode].build(self.network, images, threads, calibration)

    def time(self, images: torch.Tensor) -> Any:
        """Time a call, and return its logits."""
        start = timer()  # which waits for CUDA
        logits = self.predict(images)
        self.seconds.append(timer() - start)
        return logits


def describe_error(error: Exception) -> str:
    return ' '.join(f'{type(error).__name__}: {error}'.split())[:300]
