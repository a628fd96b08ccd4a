"""Training steps in forked processes, beside the same in one: what tests of several processes have in common.

`python tests/parallel_processes.py CASES OUTPUT` imports the package once, and forks one process for each rank. CASES
is a JSON list of {name, words, processes, dtype, ...}; OUTPUT gets {name: what `steps` found, by rank}.
"""

from __future__ import annotations

import json
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attention_zoo.tasks.generated import Generated, of

HERE = Path(__file__)
LIMIT_S = 120.0
ALL_S = 3600.0
"""For a whole list: 100 s of two idle cores, of which a busy machine may leave a tenth."""
TINY = (
    "tracker=none", "device=cpu", "trainer.progress=none", "model.dim=16", "model.heads=2", "model.depth=2",
    "model.ff_mult=2", "steps=20", "threads=1", "optimizer.lr=0.01", "schedule=constant",
)  # fmt: skip


class Ragged(Generated):
    """Rows of very different lengths, of which few ask for much and few have global tokens: no two ranks are alike."""

    name, objective, metric, better = "ragged", "causal_lm", "loss", "lower"
    vocab = 13
    global_tokens = True
    disjoint = False

    test_examples = 11

    def __init__(self, *, marked: bool = True):
        self.marked = marked

    def draw(self, random: np.random.Generator, rows: int, length: int) -> Any:
        ids = random.integers(0, self.vocab, (rows, length))
        count = random.integers(1, length + 1, rows)
        valid = np.arange(length) < count[:, None]
        asked = valid & (random.random((rows, length)) < random.random((rows, 1)))
        asked[:, 0] |= ~asked.any()
        targets = np.where(asked, np.roll(ids, 3, 1), -100)
        # of one step in three no row has any, of the others few rows
        some = self.marked * (random.random() < 2 / 3)
        marked = valid & (random.random((rows, length)) < 0.2) & (random.random((rows, 1)) < 0.4) & bool(some)
        return of(ids, targets, valid=valid, is_global=marked)


def write_texts(folder: Path, first: int, step: int) -> Path:
    """The folder, which gets six texts: the first of so many letters, each other of `step` more than the one before."""
    folder.mkdir()
    for index in range(6):
        letters = bytes(97 + (7 * k * k + index * k) % 23 for k in range(first + step * index))
        (folder / f"{index}.txt").write_bytes(letters)
    return folder


def composed_of(words: Sequence[str]) -> list[str]:
    """With those that are common to all; a file to start from brings its own model."""
    own = any(word.startswith("init=") for word in words)
    return [*(word for word in TINY if not (own and word.startswith("model."))), *words]


def steps(
    config: Mapping[str, Any], world: Any, *, dtype: str, count: int, task: Any = None, moved: int = 0
) -> dict[str, Any]:
    """Losses, further losses and norms of a run's first steps, and what it is worth afterwards.

    Args:
        moved: the seed by which half of the initial weights are moved to the next larger number; 0: none are.
    """
    import torch

    from attention_zoo.parallel.sharded import whole_state
    from attention_zoo.training.assembly import assemble
    from attention_zoo.training.building import build
    from attention_zoo.training.config import options_of
    from attention_zoo.training.models import mechanism_of
    from attention_zoo.training.seed import contained

    options = options_of(config)
    with contained():
        torch.set_default_dtype(getattr(torch, dtype))
        torch.manual_seed(options.seed)
        task = build(options.task, "task") if task is None else task
        parts = assemble(options, mechanism_of(options), task, world)
        generator = torch.Generator().manual_seed(moved)
        for weight in parts.trainer.parameters if moved else ():
            up = torch.rand(weight.shape, generator=generator) < 0.5
            weight.data = torch.where(up, weight.data.nextafter(weight.new_tensor(torch.inf)), weight.data)
        found = [parts.trainer.step() for _ in range(count)]
        score = parts.score(parts.main, lambda: None)
        weights = {name: float(value.double().sum()) for name, value in whole_state(parts.model).items()}
    return {
        "loss": [step.loss for step in found],
        "auxiliary": [step.auxiliary for step in found],
        "norm": [step.gradient_norm for step in found],
        "tokens": [step.tokens for step in found],
        "metrics": score.metrics,
        "by_position": score.loss_by_position,
        "by_group": score.by_group,
        "readings": score.readings,
        "weights": weights,
    }


def warm() -> None:
    """Import what a training imports on its way, once for all that are forked: most of a short one's time. Nothing is
    computed backward, since autograd's threads do not live on in a fork."""
    import torch._dynamo
    import torch.distributed.checkpoint
    import torch.distributed.fsdp  # noqa: F401

    from attention_zoo.parallel.world import World
    from attention_zoo.training.config import check, compose_training

    words = ("task=copy", "seq_len=11", "batch=8", "attention=longformer", "attention.window=3")
    steps(check(compose_training([*TINY, *words])), World(), dtype="float32", count=0, task=Ragged())


def forked(
    size: int, work: Callable[[Any], Any], *, sequence: int = 1, timeout_s: float = LIMIT_S, join: bool = True
) -> list[Any]:
    """What `work(world)` gives in each of `size` forked processes; errors as text.

    Args:
        join: whether they are joined already; otherwise they get None, and what torchrun would leave them.
    """
    from attention_zoo.parallel.launched import launched
    from attention_zoo.parallel.world import joined

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(size):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            said: dict[str, Any] = {}
            try:
                own = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_PORT": port}
                os.environ |= {name: str(value) for name, value in own.items()} | {"MASTER_ADDR": "127.0.0.1"}
                if join:
                    with joined("cpu", sequence=sequence, timeout_s=timeout_s, found=launched()) as world:
                        said = {"value": work(world)}
                else:
                    said = {"value": work(None)}
            except BaseException:
                said = {"error": traceback.format_exc()}
            with os.fdopen(write, "w") as pipe:
                json.dump(said, pipe)
            os._exit(0)
        os.close(write)
        children.append((child, read))
    said = {child: b"" for child, _ in children}
    with selectors.DefaultSelector() as waiting:
        for child, read in children:
            waiting.register(read, selectors.EVENT_READ, child)
        first_ended = math.inf
        while waiting.get_map():
            for key, _ in waiting.select(1.0):
                if text := os.read(key.fd, 1 << 16):
                    said[key.data] += text
                    continue
                waiting.unregister(key.fd)
                os.close(key.fd)
                os.waitpid(key.data, 0)
                first_ended = min(first_ended, time.monotonic())
            if time.monotonic() > first_ended + timeout_s:  # whoever hangs, hangs
                for key in list(waiting.get_map().values()):
                    os.kill(key.data, signal.SIGKILL)
    return [json.loads(text) if text else {"error": "died"} for text in said.values()]


def main() -> None:
    import torch

    from attention_zoo.training.config import check, compose_training

    torch.set_num_threads(1)
    warm()
    cases = json.loads(Path(sys.argv[1]).read_text())
    configs: dict[str, Any] = {}
    for case in cases:
        key = json.dumps(case["words"])
        configs[key] = configs.get(key) or check(compose_training(composed_of(case["words"])))
    found: dict[str, Any] = {}

    def run(case: Mapping[str, Any], world: Any) -> Any:
        task = Ragged(**case["ragged"]) if "ragged" in case else None
        config, more = configs[json.dumps(case["words"])], {"task": task, "moved": case.get("moved", 0)}
        return steps(config, world, dtype=case["dtype"], count=case["count"], **more)

    for size in sorted({case["processes"] for case in cases}):
        own = [case for case in cases if case["processes"] == size]

        def work(world: Any, own: Sequence[Any] = own) -> Any:
            said: dict[str, Any] = {}
            for case in own:
                try:
                    said[case["name"]] = run(case, world)
                except (ValueError, NotImplementedError) as error:
                    said[case["name"]] = {"error": str(error)}
            return said

        ranks = forked(size, work)
        wrong = [rank["error"] for rank in ranks if "error" in rank]
        if wrong:
            print("\n".join(wrong), file=sys.stderr)
            sys.exit(1)
        values = [rank["value"] for rank in ranks]
        for case in own:
            found[case["name"]] = [value[case["name"]] for value in values]
    Path(sys.argv[2]).write_text(json.dumps(found))


def outcomes(cases: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What every case gave, rank by rank."""
    return started(HERE, cases, folder)


def started(script: Path, given: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What a script of this kind makes of a list. Who hangs ends much sooner: by the limit of what it waits for."""
    (folder / "given.json").write_text(json.dumps(list(given)))
    command = [sys.executable, str(script), str(folder / "given.json"), str(folder / "found.json")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=ALL_S)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads((folder / "found.json").read_text()))


if __name__ == "__main__":
    main()
