"""Runtimes that take an exported network: how it is exported for each in float32, and how each runs it.

Batches and image sizes are fixed. What a runtime computes, it gets from memory, and hands back as an array.
"""
import collections
import functools
import io
import json
import os
import sys
import tempfile
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np
import timm.utils
import torch
from torch import nn

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


def create_onnx_model(network: nn.Module, shape: torch.Size, dynamic_batch: bool = False) -> Any:
    """ONNX model of a network, re-parameterized, as a protobuf. For images of a shape, or any number of them."""
    network, images = timm.utils.reparameterize_model(network), torch.randn(shape)
    if dynamic_batch:
        images = images.repeat(2, 1, 1, 1)  # torch.export fixes a batch size of 1
    return torch.onnx.export(
        network, (images,), input_names=['images'], output_names=['logits'], dynamo=True, opset_version=18,
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},) if dynamic_batch else None, verbose=False).model_proto


@functools.lru_cache(maxsize=None)
def export_onnx_model(network: nn.Module, shape: torch.Size) -> Any:
    return create_onnx_model(network, shape)


def export_onnx(network: nn.Module, images: torch.Tensor) -> Files:
    return [export_onnx_model(network, images.shape).SerializeToString()]


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
    for node in export_onnx_model(network, images.shape).graph.node:
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
    program = torch.export.export(timm.utils.reparameterize_model(network), (images,))
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
    return [litert_torch.convert(timm.utils.reparameterize_model(network), (images,)).model_content()]


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
            timm.utils.reparameterize_model(network), inputs=images[:1], fp16=False,
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


@dataclass(frozen=True)
class Runtime:
    """A runtime: packages that it needs, how to export for it, and how to load that.

    `export` takes a network and images, of the shape of those to come, and returns the files that the runtime loads;
    `load` takes the files and the number of threads, and returns the function from images to logits. These differ from
    the network's by `tolerance` at most, as a share of the largest.
    """
    packages: Tuple[str, ...]
    export: Callable[[nn.Module, torch.Tensor], Files]
    load: Callable[[Files, int], Predict]
    tolerance: float = 1e-3

    def build(self, network: nn.Module, images: torch.Tensor, threads: int) -> Tuple[Callable[[], Any], int]:
        """Export and load a network. Returns its call on the images, and the bytes of its files.

        Raises:
            ValueError: If the logits are not those of the network in PyTorch.
        """
        with silence():
            files = self.export(network, images)
            call = functools.partial(self.load(files, threads), images)
            logits = torch.as_tensor(call())
        with torch.no_grad():
            check_logits(logits, network(images), self.tolerance)
        return call, sum(map(len, files))


RUNTIMES = {
    'onnxruntime': Runtime(('onnx', 'onnxscript', 'onnxruntime'), export_onnx, load_onnxruntime),
    'openvino': Runtime(('onnx', 'onnxscript', 'openvino'), export_onnx, load_openvino),
    'executorch': Runtime(('executorch',), export_executorch, load_executorch),
    'litert': Runtime(('litert_torch', 'ai_edge_litert'), export_litert, load_litert),
    'ncnn': Runtime(('pnnx', 'ncnn'), export_ncnn, load_ncnn),
    'mnn': Runtime(('onnx', 'onnxscript', 'MNN'), export_mnn, load_mnn),
}
