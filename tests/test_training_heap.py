"""What a training has freed stays with its process, and is not asked of the system again."""

import subprocess
import sys

import pytest

from attention_zoo.training.heap import keep_freed

CODE = """
import resource, torch
from attention_zoo.training.heap import keep_freed
{told}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        for size in (2**18, 2**22, 2**24):  # 1, 16 and 64 MiB
            torch.ones(size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def faults(told: str) -> int:
    said = subprocess.run([sys.executable, "-c", CODE.format(told=told)], capture_output=True, text=True, check=True)
    return int(said.stdout)


def test_pages_are_asked_for_once() -> None:
    if not keep_freed():
        pytest.skip("the C library takes no such word")
    kept, anew = faults("assert keep_freed()"), faults("")
    assert kept < 200 < anew / 10  # pages of 4 KiB: 64 MiB are 16,384
