"""The shapes in signatures are true: a part of the contract suite with every annotation checked at run time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = (
    "half_precision_gradients_are_finite",
    "documents_in_one_row",
    "states_are_stored",
    "reach_hides_nothing",
    "every_parameter",
    "cross_attention_equals",
)


def run_pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "ATTENTION_ZOO_TYPECHECK": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_annotated_shapes_hold_at_run_time() -> None:
    done = run_pytest("tests/test_contract_suite.py", "-k", " or ".join(CHECKS))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_a_wrong_shape_is_met(tmp_path: Path) -> None:
    """The checker is really on: three dimensions where four are annotated."""
    file = tmp_path / "test_wrong.py"
    file.write_text(
        "import torch\n"
        "from attention_zoo.ops.softmax.dense import dense\n"
        "def test_it():\n"
        "    dense(*(torch.zeros(2, 5, 4) for _ in range(3)), scale=1.0)\n"
    )
    done = run_pytest("--rootdir=.", "--confcutdir=.", "-c", "pyproject.toml", "-p", "tests.conftest", str(file))
    assert "TypeCheckError" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
