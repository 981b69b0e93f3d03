"""Runs the code of the pages in docs/, and has images for it."""
import re
from pathlib import Path
from typing import Any, Dict

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms.v2.functional import normalize


def run_page(page: str, heading: str, **variables: Any) -> Dict[str, Any]:
    """Run the code under a heading of a page, in this process. Returns its variables."""
    text = (Path(__file__).parents[1] / 'docs' / page).read_text(encoding='utf-8')
    section = re.search(rf'^## {re.escape(heading)}\n(.*?)(?=^## |\Z)', text, re.MULTILINE | re.DOTALL)[1]
    code = '\n'.join(re.findall(r'^```python\n(.*?)^```', section, re.MULTILINE | re.DOTALL))
    assert code and 'timm_hbonet' not in code
    exec(compile(code, f'docs/{page}, {heading}', 'exec'), variables)
    return variables


def load_photos() -> torch.Tensor:
    """Two photographs, normalized, [2, 3, 427, 640]."""
    photos = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2).contiguous() / 255
    return normalize(photos, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def assert_equal_to(found: Any, expected: torch.Tensor, tolerance: float = 1e-3) -> None:
    # single precision and another order of operations, amplified by random weights
    found, expected = torch.as_tensor(found), expected.detach()
    assert found.shape == expected.shape
    assert expected.abs().max() > 1e-3
    assert (found.detach() - expected).abs().max() <= tolerance * expected.abs().max()
