"""Figures of the authors' network for weights and inputs that are recreated from names and seeds.

`ARCHITECTURES` has, for each architecture, its size, the released state dict's keys and shapes, and cases: inputs and
float64 outputs. `CHECKPOINTS` lists the 19 released checkpoints, as `results/published.csv` has them.
"""
import csv
import json
import zlib
from pathlib import Path
from typing import Any, Dict

import numpy as np
import torch

DATA = Path(__file__).parent / 'data'
ARCHITECTURES = json.loads((DATA / 'hbonet_reference.json').read_text())
with (Path(__file__).parents[1] / 'results/published.csv').open(newline='') as _file:
    CHECKPOINTS = [
        {**row, 'img_size': int(row['img_size']), 'macs': int(row['macs'])} for row in csv.DictReader(_file)]


def release_state_dict(name: str, dtype: torch.dtype = torch.float64) -> Dict[str, torch.Tensor]:
    """Recreated weights of an architecture (a tag is ignored), with the names and order of the release."""
    shapes = ARCHITECTURES[name.split('.')[0]]['state_dict']
    return {key: _tensor(key, shape, dtype) for key, shape in shapes}


def _tensor(key, shape, dtype):
    random = np.random.RandomState(zlib.crc32(key.encode()))
    if key.endswith('.num_batches_tracked'):
        return torch.tensor(0)
    if len(shape) == 4:
        values = random.standard_normal(shape) * np.sqrt(2 / (shape[1] * shape[2] * shape[3]))
    elif len(shape) == 2:
        values = random.standard_normal(shape) * 0.05
    elif key.endswith(('.weight', '.running_var')):
        values = random.uniform(0.5, 1.5, shape)
    else:
        values = random.standard_normal(shape) * 0.1
    return torch.from_numpy(values).to(dtype)


def find_case(name: str, height: int, width: int) -> Dict[str, Any]:
    """The case of an architecture (a tag is ignored) at an image size."""
    cases = ARCHITECTURES[name.split('.')[0]]['cases']
    return next(case for case in cases if (case['height'], case['width']) == (height, width))


def case_input(case: Dict[str, Any], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Images of a case, batch x 3 x height x width."""
    shape = (case['batch'], 3, case['height'], case['width'])
    return torch.from_numpy(np.random.RandomState(case['input_seed']).standard_normal(shape)).to(dtype)


def probe(tensor: torch.Tensor) -> torch.Tensor:
    """The 8 values of a tensor that the reference keeps, float64."""
    flat = tensor.flatten().double()
    return flat[[i * (len(flat) - 1) // 7 for i in range(8)]]


def assert_close(tensor: torch.Tensor, expected: Dict[str, Any], tolerance: float) -> None:
    """Compare a tensor with the reference's record of it, relative to its largest recorded value."""
    assert list(tensor.shape) == expected['shape']
    values = torch.tensor([*expected['values'], expected['mean'], expected['std']], dtype=torch.float64)
    found = torch.stack([*probe(tensor), tensor.double().mean(), tensor.double().std(correction=0)])
    error = ((found - values).abs().max() / values.abs().max()).item()
    assert error <= tolerance, f'relative error {error:.1e}, at most {tolerance:.0e} is allowed'
