#!/usr/bin/env python3
"""Score a trained network on all test images in the runtimes that deploy it, in float32 and in int8.

    python scripts/score_runtimes.py RUN/last.pth.tar --config RUN/args.yaml --data-dir DIR --output results/NAME

The network is re-parameterized and converted for one image at a time. int8 is calibrated with training images, in the
transform of the test images. Writes runtimes.csv and runtimes.md:
  top1        in percent
  agreement   percent of the images with PyTorch's class
  error       largest difference from PyTorch's logits, in percent of their range
  bytes       of the files that the runtime loads
  median_ms   of one image on one thread, of this machine and while it does what else it does

Runtimes that are not installed are skipped by name. The exit status is 1 if another failed.
"""
import argparse
import functools
import importlib.util
import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Tuple

import numpy as np
import timm.data
import torch
import yaml
from PIL import Image
from runtimes import silence
from script_utils import BadInput, create_model, number, requirements, run_script, write_file
from timm.models import load_checkpoint
from timm.utils import reparameterize_model
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

with requirements():
    import pandas as pd

# files that are loaded, and the function from one image, [1, C, H, W], to its logits
Runtime = Tuple[List[Path], Callable[[np.ndarray], np.ndarray]]


@dataclass
class Job:
    """What is converted, what int8 is calibrated with, and where files go."""
    network: nn.Module
    images: torch.Tensor
    mean: Sequence[float]
    std: Sequence[float]
    folder: Path

    @functools.cached_property
    def fused(self) -> nn.Module:
        return reparameterize_model(self.network)

    @functools.cached_property
    def onnx(self) -> Path:
        path = self.folder / 'model.onnx'
        torch.onnx.export(
            self.fused, (self.images[:2],), path, input_names=['images'], output_names=['logits'], dynamo=True,
            opset_version=18, external_data=False, verbose=False,
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        return path


def run_pytorch(job: Job, reparameterize: bool) -> Runtime:
    path, network = job.folder / 'model.pth', job.fused if reparameterize else job.network
    torch.save(network.state_dict(), path)
    return [path], lambda image: network(torch.from_numpy(image)).numpy()


def run_onnxruntime(job: Job, int8: bool) -> Runtime:
    import onnxruntime
    path = job.onnx
    if int8:
        from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(CalibrationDataReader):
            batches = iter(job.images.split(32))

            def get_next(self) -> Any:
                batch = next(self.batches, None)
                return None if batch is None else {'images': batch.numpy()}

        path, prepared = job.folder / 'onnxruntime_int8.onnx', job.folder / 'prepared.onnx'
        quant_pre_process(job.onnx, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared, path, Reader(), per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    return [path], lambda image: session.run(None, {'images': image})[0]


def run_openvino(job: Job, int8: bool) -> Runtime:
    import openvino
    model = openvino.Core().read_model(job.onnx)
    model.reshape([1, *job.images.shape[1:]])
    if int8:
        import nncf
        from nncf.quantization.range_estimator import RangeEstimatorParametersSet
        images = [image[None].numpy() for image in job.images]
        model = nncf.quantize(
            model, nncf.Dataset(images), subset_size=len(images),
            # in place of averages of the images' ranges, which cut off what is above
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX))
    path = job.folder / f'openvino_{"int8" if int8 else "float32"}.xml'
    openvino.save_model(model, path, compress_to_fp16=False)
    request = openvino.Core().compile_model(path, 'CPU', {
        'INFERENCE_NUM_THREADS': 1,
        'NUM_STREAMS': 1,
        'INFERENCE_PRECISION_HINT': 'f32',
        'ENABLE_CPU_PINNING': False,
    }).create_infer_request()
    return [path, path.with_suffix('.bin')], lambda image: request.infer([image])[0]


def run_executorch(job: Job, int8: bool) -> Runtime:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from executorch.runtime import Runtime as Loader
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    network = job.fused
    if int8:
        quantizer = xnnpack_quantizer.XNNPACKQuantizer().set_global(
            xnnpack_quantizer.get_symmetric_quantization_config(is_per_channel=True))
        program = torch.export.export(
            network, (job.images[:2],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        network = prepare_pt2e(program.module(), quantizer)
        for batch in job.images.split(32):
            network(batch)
        network = convert_pt2e(network)
    program = torch.export.export(network, (job.images[:1],))
    edge = to_edge_transform_and_lower(
        program, partitioner=[XnnpackPartitioner()], compile_config=EdgeCompileConfig(_check_ir_validity=not int8))
    path = job.folder / f'executorch_{"int8" if int8 else "float32"}.pte'
    path.write_bytes(edge.to_executorch().buffer)
    method = Loader.get().load_program(path).load_method('forward')
    return [path], lambda image: method.execute([torch.from_numpy(image)])[0].numpy().copy()


def run_litert(job: Job, int8: bool) -> Runtime:
    import litert_torch
    from ai_edge_litert.interpreter import Interpreter
    path = job.folder / 'litert_float32.tflite'
    if not path.exists():
        litert_torch.convert(job.fused, (job.images[:1],)).export(str(path))
    if int8:
        from ai_edge_quantizer import calibrator, quantizer, recipe
        from ai_edge_quantizer.utils.qsv_utils import min_max_update
        # in place of moving averages of the images' ranges
        mode = calibrator.CalibrationMode.CALIBRATION_PRESERVE_ALL_TENSORS
        calibration = calibrator.CalibrationInterpreter(str(path), mode, min_max_update)
        runner = calibration.get_signature_runner()
        for image in job.images:
            runner(args_0=image[None].numpy())
        quantized = quantizer.Quantizer(str(path), recipe.static_wi8_ai8())
        path = job.folder / 'litert_int8.tflite'
        path.write_bytes(quantized.quantize(calibration.get_calibration_results()).quantized_model)
    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    source, target = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    (in_scale, in_zero), (out_scale, out_zero) = source['quantization'], target['quantization']

    def predict(image: np.ndarray) -> np.ndarray:
        if int8:
            image = np.clip(np.round(image / in_scale) + in_zero, -128, 127).astype(np.int8)
        interpreter.set_tensor(source['index'], image)
        interpreter.invoke()
        logits = interpreter.get_tensor(target['index'])
        return (logits.astype(np.float32) - out_zero) * out_scale if int8 else logits

    return [path], predict


def run_ncnn(job: Job) -> Runtime:
    import ncnn
    import pnnx
    paths = [job.folder / f'model.ncnn.{name}' for name in ('param', 'bin')]
    others = {
        key: str(job.folder / f'model{name}') for key, name in (
            ('ptpath', '.pt'), ('pnnxparam', '.pnnx.param'), ('pnnxbin', '.pnnx.bin'), ('pnnxpy', '_pnnx.py'),
            ('pnnxonnx', '.pnnx.onnx'), ('ncnnpy', '_ncnn.py'))}
    pnnx.export(
        job.fused, inputs=job.images[:1], ncnnparam=str(paths[0]), ncnnbin=str(paths[1]), fp16=False, **others)
    net = ncnn.Net()
    net.opt.num_threads = 1
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    if net.load_param(str(paths[0])) or net.load_model(str(paths[1])):
        raise RuntimeError('ncnn cannot load what pnnx has written')

    def predict(image: np.ndarray) -> np.ndarray:
        extractor = net.create_extractor()
        extractor.input('in0', ncnn.Mat(image[0]))
        return np.array(extractor.extract('out0')[1])[None]

    return paths, predict


def run_mnn(job: Job, int8: str = '') -> Runtime:
    import _tools  # of MNN, whose commands install packages
    import MNN
    path = job.folder / f'mnn_{int8 or "float32"}.mnn'
    options = ['--weightQuantBits', '8'] if int8 == 'weights' else []
    _tools.mnnconvert([
        'mnnconvert', '-f', 'ONNX', '--modelFile', str(job.onnx), '--MNNModel', str(path), '--bizCode', 'timm',
        *options])
    if int8 == 'all':
        images, config = job.folder / 'images', job.folder / 'mnn.json'
        images.mkdir()
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (job.mean, job.std))
        for i, image in enumerate(job.images):
            pixels = ((image * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels.squeeze()).save(images / f'{i}.png')
        config.write_text(json.dumps(dict(
            format='GRAY' if len(job.mean) == 1 else 'RGB', mean=[255 * value for value in job.mean],
            normal=[1 / 255 / value for value in job.std], width=image.shape[2], height=image.shape[1],
            path=f'{images}/', used_image_num=len(job.images), batch_size=min(32, len(job.images)),
            feature_quantize_method='EMA', weight_quantize_method='MAX_ABS')))
        source, path = path, job.folder / 'mnn_int8.mnn'
        _tools.mnnquant(['mnnquant', str(source), str(path), str(config)])
    runtime = MNN.nn.create_runtime_manager(({'backend': 0, 'numThread': 1, 'precision': 'high'},))
    module = MNN.nn.load_module_from_file(str(path), ['images'], ['logits'], runtime_manager=runtime)

    def predict(image: np.ndarray) -> np.ndarray:
        image = MNN.expr.const(image, list(image.shape), MNN.expr.NCHW)
        logits = module.forward([image])[0]
        return logits.read().copy()  # MNN's own memory, which it uses again once its holder is gone

    return [path], predict


# name, precision: function of a job, and packages that it needs
RUNTIMES: Dict[Tuple[str, str], Tuple[Callable[[Job], Runtime], Sequence[str]]] = {
    ('PyTorch', 'float32'): (functools.partial(run_pytorch, reparameterize=False), ()),
    ('PyTorch, re-parameterized', 'float32'): (functools.partial(run_pytorch, reparameterize=True), ()),
}
for name, run, packages, int8_packages in (
        ('ONNX Runtime', run_onnxruntime, ('onnx', 'onnxscript', 'onnxruntime'), ()),
        ('OpenVINO', run_openvino, ('onnx', 'onnxscript', 'openvino'), ('nncf',)),
        ('ExecuTorch', run_executorch, ('executorch',), ()),
        ('LiteRT', run_litert, ('litert_torch', 'ai_edge_litert'), ('ai_edge_quantizer',)),
):
    RUNTIMES[name, 'float32'] = functools.partial(run, int8=False), packages
    RUNTIMES[name, 'int8'] = functools.partial(run, int8=True), (*packages, *int8_packages)
RUNTIMES['ncnn', 'float32'] = run_ncnn, ('ncnn', 'pnnx')
for precision, int8 in (('float32', ''), ('int8 weights', 'weights'), ('int8', 'all')):
    RUNTIMES['MNN', precision] = functools.partial(run_mnn, int8=int8), ('onnx', 'onnxscript', 'MNN')


@dataclass
class Candidate:
    """A runtime in a precision, and what it computed."""
    name: str
    precision: str
    predict: Callable[[np.ndarray], np.ndarray]
    size: int
    logits: List[np.ndarray] = field(default_factory=list)
    seconds: List[float] = field(default_factory=list)

    def run(self, image: np.ndarray) -> None:
        start = time.perf_counter()
        logits = self.predict(image)
        self.seconds.append(time.perf_counter() - start)
        self.logits.append(logits)

    def summarize(self, expected: np.ndarray, labels: np.ndarray) -> Dict[str, Any]:
        logits = np.concatenate(self.logits)
        classes = logits.argmax(1)
        return {
            'runtime': self.name,
            'precision': self.precision,
            'top1': 100 * (classes == labels).mean(),
            'agreement': 100 * (classes == expected.argmax(1)).mean(),
            'error': 100 * np.abs(logits - expected).max() / np.ptp(expected),
            'bytes': self.size,
            'median_ms': 1e3 * np.median(self.seconds),
        }


def create_data(args: argparse.Namespace, network: nn.Module) -> Tuple[DataLoader, torch.Tensor, Dict[str, Any]]:
    """Batches of test images, training images to calibrate with, and the configuration of the transform."""
    config = timm.data.resolve_data_config(vars(args), model=network)
    transform = timm.data.create_transform(**config, is_training=False)
    datasets = []
    for split in (args.train_split, args.val_split):
        try:
            datasets.append(timm.data.create_dataset(
                args.dataset, root=args.data_dir, split=split, transform=transform, class_map=args.class_map,
                input_img_mode='L' if config['input_size'][0] == 1 else 'RGB'))
        except Exception as e:  # each source of data has errors of its own
            raise BadInput(
                f'--data-dir {args.data_dir} has no {split} images of --dataset {args.dataset or "(a folder)"}: '
                f'{e}') from None
    train, test = datasets
    indices = random.Random(args.seed).sample(range(len(train)), min(args.calibration, len(train)))
    images = torch.stack([train[i][0] for i in tqdm(indices, 'Loading images to calibrate with', leave=False)])
    return DataLoader(test, batch_size=64), images, config


def convert(job: Job, names: Sequence[str]) -> Tuple[List[Candidate], Dict[str, str]]:
    """Make the candidates. Returns what failed with its reason, too."""
    candidates, failed = [], {}
    for (name, precision), (run, packages) in tqdm(RUNTIMES.items(), 'Converting', leave=False):
        if name not in names:
            continue
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if missing:
            tqdm.write(f'score_runtimes.py: skipping {name} {precision}: needs {", ".join(missing)}', sys.stderr)
            continue
        try:
            with silence():
                paths, predict = run(job)
                predict(job.images[:1].numpy())
            candidates.append(Candidate(name, precision, predict, sum(path.stat().st_size for path in paths)))
        except Exception as e:
            failed[f'{name} {precision}'] = ' '.join(f'{type(e).__name__}: {e}'.split())[:300]
    return candidates, failed


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = list(dict.fromkeys(name for name, _ in RUNTIMES))
    add('checkpoint', type=Path, metavar='CHECKPOINT', help="checkpoint of timm's train.py, or a state dict")
    add('--config', type=Path, metavar='FILE', help="args.yaml of the run, or a recipe: timm's options as defaults")
    add('--output', type=Path, default=Path('output/runtimes'), metavar='DIR', help='folder (default: %(default)s)')
    add('--runtimes', nargs='+', choices=names, default=names, metavar='NAME', help=f'out of {", ".join(names)}')
    add('--calibration', type=number(int, 2), default=512, metavar='N',
        help='training images that int8 is calibrated with (default: %(default)s)')
    add('--seed', type=number(int, 0), default=0, metavar='N', help='seed of their choice (default: %(default)s)')
    for option in ('model', 'dataset', 'data-dir', 'class-map', 'interpolation'):
        add(f'--{option}', default='', metavar='NAME', help="as in timm's train.py")
    for option, kind in (('num-classes', int), ('in-chans', int), ('img-size', int), ('crop-pct', float)):
        add(f'--{option}', type=kind, metavar='N', help="as in timm's train.py")
    for option in ('mean', 'std'):
        add(f'--{option}', type=float, nargs='+', metavar='X', help="as in timm's train.py")
    add('--train-split', default='train', metavar='NAME', help='(default: %(default)s)')
    add('--val-split', default='validation', metavar='NAME', help='(default: %(default)s)')
    return parser


def main(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if args.config:
        options = yaml.safe_load(args.config.read_text(encoding='utf-8'))
        own = ('seed', 'output')  # of training
        parser.set_defaults(**{k: v for k, v in options.items() if k in vars(args) and k not in own and v is not None})
        args = parser.parse_args()
    if not args.model:
        parser.error('--model is not given, and --config has none')
    kwargs = {k: v for k in ('num_classes', 'in_chans') if (v := getattr(args, k)) is not None}
    network = create_model(args.model, **kwargs).eval().requires_grad_(False)
    try:
        load_checkpoint(network, str(args.checkpoint), weights_only=True)
    except Exception as e:  # damaged files and those of other networks have many ways to fail
        raise BadInput(
            f'{args.checkpoint} is no checkpoint of --model {args.model}: {type(e).__name__}: {e} Give the options of '
            f'its training.') from None
    loader, images, config = create_data(args, network)
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as folder:
        candidates, failed = convert(Job(network, images, config['mean'], config['std'], Path(folder)), args.runtimes)
        expected, labels = [], []
        for batch, targets in tqdm(loader, 'Scoring', unit='batch'):
            labels.append(targets.numpy())
            expected.append(network(batch).numpy())
            for candidate in candidates:
                for image in batch.numpy():
                    candidate.run(image[None])
    expected, labels = np.concatenate(expected), np.concatenate(labels)
    table = pd.DataFrame([candidate.summarize(expected, labels) for candidate in candidates])
    args.output.mkdir(parents=True, exist_ok=True)
    text = table.to_markdown(index=False, floatfmt=('', '', '.2f', '.2f', '.2f', '.0f', '.2f'))
    write_file(args.output / 'runtimes.csv', table.to_csv(index=False, float_format='%.4f').encode())
    write_file(args.output / 'runtimes.md', f'{text}\n'.encode())
    print(text)
    if failed:
        raise BadInput('; '.join(f'{name} failed: {reason}' for name, reason in failed.items()))


if __name__ == '__main__':
    run_script(main, create_parser())
