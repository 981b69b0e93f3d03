"""Runs the code of the pages in docs/."""
import re
from pathlib import Path
from typing import Any, Dict

import torch


def run_page(page: str, heading: str, **variables: Any) -> Dict[str, Any]:
    """Run the code under a heading of a page, in this process. Returns its variables."""
    text = (Path(__file__).parents[1] / 'docs' / page).read_text(encoding='utf-8')
    section = re.search(rf'^## {re.escape(heading)}\n(.*?)(?=^## |\Z)', text, re.MULTILINE | re.DOTALL)[1]
    code = '\n'.join(re.findall(r'^```python\n(.*?)^```', section, re.MULTILINE | re.DOTALL))
    assert code and 'timm_hbonet' not in code
    exec(compile(code, f'docs/{page}, {heading}', 'exec'), variables)
    return variables


def assert_equal_to(found: Any, expected: torch.Tensor, tolerance: float = 1e-3) -> None:
    # single precision and another order of operations, amplified by random weights
    found, expected = torch.as_tensor(found), expected.detach()
    assert found.shape == expected.shape
    assert expected.abs().max() > 1e-3
    assert (found.detach() - expected).abs().max() <= tolerance * expected.abs().max()
