"""Trainings of several processes of which one is killed or stops for ever, whose newest checkpoint is half written, and
that go on in another number of processes.

Each is compared with one that nobody disturbed: bit for bit where as many processes end it, else by its figures. All of
them run in forked processes of one that has torch already.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from parallel_runs import rows

from faults import Counts

TITLE = "processes of a distributed training killed, hung or asked to stop, checkpoints torn, another world size"
SMALL, LARGE = 3, 60
STEPS = 9
TIMEOUT_S = 40.0
ALLOWED_S = 60.0
"""Beyond the limit that the run states: to begin, to train and to say so on a machine that others use, too."""
WORDS = (
    "task=text", "task.held_out=null", "task.evaluation_rows=3", "task.span=3", "seq_len=12", "batch=8",
    f"steps={STEPS}", "trainer.eval_every=4", "trainer.log_every=1",
    "model.output_dropout=0.1", f"parallel.timeout_s={TIMEOUT_S:g}",
)  # fmt: skip
MECHANISMS = (
    ("attention=full",),
    ("attention=transformer_xl", "attention.segment_length=5", "attention.memory_length=7"),
    ("attention=adaptive_span", "attention.limit=9", "attention.ramp=3"),
)
SIGNALS = ("SIGKILL", "SIGKILL", "SIGSTOP", "SIGTERM")
DAMAGES = ("torn", "state", "missing", "renaming", "half")
EXACT = ("status", "steps", "curve", "quality_curve", "metrics", "evaluations", "model_sha256", "stopped", "id")


def run(count: int, seed: int) -> Counts:
    """Disturb `count` trainings."""
    found = Counts()
    rng = random.Random(f"distributed {seed}")
    with tempfile.TemporaryDirectory() as place:
        text = Path(place) / "text"
        text.mkdir()
        for index in range(6):
            (text / f"{index}.txt").write_bytes(bytes(rng.choice(b"abcdefgh \n") for _ in range(170 + 20 * index)))
        asked: list[dict[str, Any]] = []
        plans = [_plan(number, rng, Path(place), text) for number in range(count)]
        for plan in plans:
            if plan["whole"] not in [each["name"] for each in asked]:
                folder = str(Path(place) / plan["whole"])
                whole = {"name": plan["whole"], "processes": plan["on"]["processes"], "words": plan["on"]["words"]}
                asked.append({**whole, "folder": folder})
            asked += [plan["cut"], plan["on"]]
        ended = rows(asked, Path(place))
        for plan in plans:
            found.tries += 1
            for way, problem in _problems(plan, ended):
                found.failed(way, f"distributed {seed}: {plan['case']}: {problem}")
    return found


def _plan(number: int, rng: random.Random, place: Path, text: Path) -> dict[str, Any]:
    mechanism = MECHANISMS[number % len(MECHANISMS)]
    data = rng.choice(("ddp", "fsdp"))
    size = rng.choice((2, 2, 4))
    how = SIGNALS[number % len(SIGNALS)]
    cut: dict[str, Any] = {"rank": rng.randrange(size), "how": how}
    cut |= {"step": rng.randrange(1, STEPS)} if rng.random() < 0.6 else {"after": rng.uniform(0.1, 6)}
    again = rng.choice((size, size, 1, 2, 4))
    on: dict[str, Any] = {"processes": again}
    if "step" in cut and rng.random() < 0.5 and cut["step"] > 1:
        on["damage"] = rng.choice(DAMAGES)
    # who is left saves the last step where each has the whole model: no checkpoint is due then
    every = rng.choice((1, 1000)) if data == "ddp" and "damage" not in on else 1
    words = [*mechanism, *WORDS, f"task.path={text}", f"parallel.data={data}", f"trainer.checkpoint_every={every}"]
    folder = str(place / f"cut-{number}")
    case = f"{' '.join(mechanism)} {data}, a checkpoint every {every}, {size} processes, {cut}, {on}"
    return {
        "case": case,
        "whole": f"whole-{number % len(MECHANISMS)}-{data}-{every}-{again}",
        "cut": {
            "name": f"cut-{number}", "processes": size, "words": words, "folder": folder, "cut": cut, "left_s": 5.0,
        },
        "on": {"name": f"on-{number}", "words": words, "folder": folder, **on},
    }  # fmt: skip


def _problems(plan: dict[str, Any], ended: dict[str, list[dict[str, Any]]]) -> Iterator[tuple[str, str]]:
    cut, (whole, *_), on = ended[plan["cut"]["name"]], ended[plan["whole"]], ended[plan["on"]["name"]]
    for rank, each in enumerate(cut):
        status = each.get("status")
        if each.get("seconds", 0) > TIMEOUT_S + ALLOWED_S:
            yield "hung", f"process {rank} went on for {each['seconds']:.0f} s"
        if status not in ("ok", "lost", None) and not str(status).startswith("stopped by"):
            yield "raw", f"process {rank} ended as {status}: {each.get('error')}"
    step, row = plan["cut"]["cut"].get("step"), on[0]
    if row.get("status") != "ok":
        yield "lost", f"it does not go on: {row}"
        return
    damage = plan["on"].get("damage")
    # at most the step in flight; of a damaged checkpoint the one before is taken
    least = None if step is None else step - (damage in ("torn", "state", "missing"))
    if least is not None and (row["resumed_at"] or 0) < least:
        yield "lost", f"it goes on after step {row['resumed_at']}, at least {least} is kept"
    if damage in ("torn", "state", "missing") and not any("the one before, is taken" in n for n in row["notices"]):
        yield "raw", f"nothing is said of the damage: {row['notices']}"
    same = plan["cut"]["processes"] == plan["on"]["processes"]
    if same:
        for name in EXACT:
            if row[name] != whole[name]:
                yield "wrong", f"{name} differs"
    elif [at for at, _ in row["curve"]] != [at for at, _ in whole["curve"]] or row["steps"] != whole["steps"]:
        yield "wrong", "its curve has other steps"
    elif abs(row["metrics"]["loss"] / whole["metrics"]["loss"] - 1) > 0.1:  # other masks of dropout
        yield "wrong", f"its loss is {row['metrics']['loss']}, that of the undisturbed {whole['metrics']['loss']}"
    left = [path.name for path in Path(plan["on"]["folder"]).glob(".*.????????*")]
    if left:
        yield "orphan", f"half-written {left}"
