"""Every test runs on one thread, deterministically.

With `ATTENTION_ZOO_TYPECHECK=1` the shapes in the package's signatures are checked at every call (jaxtyping,
beartype). That is three times slower and meets wrong shapes before our own messages do, so test_shapes.py runs a part
of the suite that way.
"""

from __future__ import annotations

import gc
import os
import signal

import pytest
from jaxtyping import install_import_hook

if os.environ.get("ATTENTION_ZOO_TYPECHECK") == "1":
    # before anything imports the package
    tensors = ("layout", "contract", "ops", "positions", "attention", "model")
    install_import_hook([f"attention_zoo.{part}" for part in tensors], "beartype.beartype")

import torch

if not torch.cuda.is_available():
    # read once, when triton is first imported: our kernels then run on a CPU, slowly
    os.environ.setdefault("TRITON_INTERPRET", "1")


# a shell's background job ignores Ctrl-C, one of nohup the end of its terminal, and so would all that the tests start
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_finish() -> None:
    """What is imported by now stays: looking through it for garbage again and again took an eighth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Sums are split over threads; one thread makes them, and the tests, the same on every machine."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """`torch.manual_seed` notes the stack for each kind of device that is absent, which takes a millisecond."""
    seed = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed
    seed(0)
