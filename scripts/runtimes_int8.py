"""How a network is exported in int8 for the runtimes that have it.

Each export takes images to calibrate the ranges of activations with, or else calibrates with those that it gets. The
least and the largest value count in ONNX Runtime, OpenVINO and LiteRT. ExecuTorch looks for the range of the least
error, and MNN takes averages over batches.
"""
import json
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np
import timm.utils
import torch
from PIL import Image
from runtimes import RUNTIMES, Files, Runtime, convert_to_mnn, create_onnx_model, export_onnx
from torch import nn


def split(images: torch.Tensor, calibration: Optional[torch.Tensor]) -> List[torch.Tensor]:
    """Batches of the shape of `images`, out of `calibration` or of `images`. What is left over is dropped.

    Raises:
        ValueError: If there is none.
    """
    batches = (images if calibration is None else calibration).split(len(images))
    whole = [batch for batch in batches if len(batch) == len(images)]
    if not whole:
        raise ValueError(f'{len(calibration)} images to calibrate with are no batch of {len(images)}')
    return whole


def export_onnxruntime_int8(
        network: nn.Module, images: torch.Tensor, calibration: Optional[torch.Tensor] = None) -> Files:
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
            prepared, target, Reader(), per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
        return [target.read_bytes()]


def export_openvino_int8(
        network: nn.Module, images: torch.Tensor, calibration: Optional[torch.Tensor] = None) -> Files:
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
                activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX))
        openvino.save_model(model, target, compress_to_fp16=False)
        return [target.read_bytes(), target.with_suffix('.bin').read_bytes()]


def export_executorch_int8(
        network: nn.Module, images: torch.Tensor, calibration: Optional[torch.Tensor] = None) -> Files:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    quantizer = xnnpack_quantizer.XNNPACKQuantizer().set_global(
        xnnpack_quantizer.get_symmetric_quantization_config(is_per_channel=True))
    program = torch.export.export(
        timm.utils.reparameterize_model(network), (images.repeat(2, 1, 1, 1),),  # a batch size of 1 would be fixed
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    prepared = prepare_pt2e(program.module(), quantizer)
    with torch.no_grad():
        for batch in (images if calibration is None else calibration).split(32):  # one by one it is slow
            prepared(batch)
    program = torch.export.export(convert_pt2e(prepared), (images,))
    return [to_edge_transform_and_lower(
        program, partitioner=[XnnpackPartitioner()], compile_config=EdgeCompileConfig(_check_ir_validity=False),
    ).to_executorch().buffer]


def export_litert_int8(
        network: nn.Module, images: torch.Tensor, calibration: Optional[torch.Tensor] = None) -> Files:
    from ai_edge_quantizer import calibrator, qtyping, quantizer, recipe
    from ai_edge_quantizer.utils.qsv_utils import min_max_update
    mode = calibrator.CalibrationMode.CALIBRATION_PRESERVE_ALL_TENSORS
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'model.tflite')
        path.write_bytes(RUNTIMES['litert'].export(network, images)[0])
        ranges = calibrator.CalibrationInterpreter(str(path), mode, min_max_update)
        runner = ranges.get_signature_runner()
        for batch in split(images, calibration):
            runner(args_0=batch.numpy())
        converter = quantizer.Quantizer(str(path), recipe.static_wi8_ai8())
        for name in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):  # float, like the others'
            converter.update_quantization_recipe('.*', name, algorithm_key='no_quantize')
        return [bytes(converter.quantize(ranges.get_calibration_results()).quantized_model)]


def export_mnn_int8(network: nn.Module, images: torch.Tensor, calibration: Optional[torch.Tensor] = None) -> Files:
    import _tools  # the command mnnquant would install packages
    if images.shape[1] not in (1, 3):
        raise ValueError(f"MNN's quantizer takes images of 1 or 3 channels, got {images.shape[1]}")
    calibration = images if calibration is None else calibration
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


def export_mnn_int8_weights(
        network: nn.Module, images: torch.Tensor, calibration: Optional[torch.Tensor] = None) -> Files:
    """Weights in int8. Arithmetic is in float32, so that nothing is calibrated."""
    return convert_to_mnn(export_onnx(network, images)[0], '--weightQuantBits', '8')


INT8_RUNTIMES: Dict[str, Runtime] = {
    f'{name}_{precision}': Runtime(
        RUNTIMES[name].packages + packages, export, RUNTIMES[name].load,
        tolerance=0.5)  # untrained networks amplify errors: enough to tell of a broken one
    for name, precision, packages, export in (
        ('onnxruntime', 'int8', (), export_onnxruntime_int8),
        ('openvino', 'int8', ('nncf',), export_openvino_int8),
        ('executorch', 'int8', ('torchao',), export_executorch_int8),
        ('litert', 'int8', ('ai_edge_quantizer',), export_litert_int8),
        ('mnn', 'int8_weights', (), export_mnn_int8_weights),
        ('mnn', 'int8', (), export_mnn_int8),
    )
}
ALL_RUNTIMES = dict(sorted({**RUNTIMES, **INT8_RUNTIMES}.items()))
