# SPDX-License-Identifier: MIT
"""The table of NeuRBF's numbers of parameters."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "bench" / "neurbf_parameters.py").exists():
    pytest.skip("the bench folder is not here", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import neurbf_parameters  # noqa: E402


def test_the_published_fields(capsys):
    assert neurbf_parameters.main() == 0
    fields, radiance = capsys.readouterr().out.split("\n\n")
    rows = fields.splitlines()[2:]
    assert len(rows) == len(neurbf_parameters.PICTURES) + len(neurbf_parameters.SHAPES)
    assert rows[0].endswith("| 61,435,779 | 32,000,512 | 795,365 | 25,451,680 | 57,458,951 | 57.46 M |")
    assert rows[4].endswith("| 950,417 | 472,040 | 23,600 | 377,600 | 856,009 | 856 K |")
    assert radiance.splitlines()[2:] == [
        "| TensoRF, synthetic scenes | 41,564 | 32 | 1,330,048 | 1.33 M |",
        "| TensoRF, small | 2,125 | 32 | 68,000 | 0.068 M |",
        "| K-planes, LLFF | 31,457 | 16 | 503,312 | 0.50 M |",
    ]
