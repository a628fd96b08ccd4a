"""Files of a finished run that are cut, flipped in some bits, swapped, emptied, replaced by others' or by a folder.

A damaged model must not load, and a run whose files are damaged must say which, and end with the same model and figures
as before.
"""

from __future__ import annotations

import contextlib
import io
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attention_zoo as zoo
from attention_zoo.training.config import compose_training
from attention_zoo.training.run import run_training

from . import Counts
from .disk import TINY

TITLE = "torn, flipped, foreign and missing files of models and runs"
SMALL, LARGE = 40, 2_000
FILES = ("model.safetensors", "model.safetensors", "checkpoint.pt", "result.json", "metrics.jsonl")
FOREIGN = (b"", b"\0", b"{}", b"[]", b"null", b"PK\x03\x04", b"\x80\x04.", b"\xff" * 99, b"[" * 50_000, b'{"id": NaN}')


def run(count: int, seed: int) -> Counts:
    """Damage `count` files, one at a time."""
    found = Counts()
    config = compose_training(TINY)
    with tempfile.TemporaryDirectory() as made:
        sound = Path(made) / "sound"
        whole = run_training(config, sound)
        assert whole["status"] == "ok", whole["error"]
        for number in range(count):
            case = f"torn {seed}:{number}"
            folder = Path(made) / str(number)
            shutil.copytree(sound, folder)
            found.tries += 1
            for way, problem in _throw(random.Random(case), config, folder, whole):
                found.failed(way, f"{case}: {problem}")
            shutil.rmtree(folder)
    return found


def _throw(
    rng: random.Random, config: dict[str, Any], folder: Path, whole: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    path = folder / rng.choice(FILES)
    before = path.read_bytes()
    said = f"{path.name} {damage(rng, path)}"
    if path.is_file() and path.read_bytes() == before:
        return
    if path.name == "model.safetensors":
        try:
            zoo.load(path)
            yield "wrong", f"{said}: loaded"
        except (ValueError, OSError) as error:
            if "\n" in str(error) or path.name not in str(error):
                yield "raw", f"{said}: {error}"
        except Exception as error:
            yield "raw", f"{said}: {type(error).__name__}: {error}"
    if rng.random() < 0.5 and path.name != "checkpoint.pt":
        (folder / "result.json").unlink(missing_ok=True) if not (folder / "result.json").is_dir() else None
    spoken = io.StringIO()
    try:
        with contextlib.redirect_stdout(spoken), contextlib.redirect_stderr(spoken):
            row = run_training(config, folder)
            if row["status"] != "ok":  # then it must have said what to do, which is this
                if path.name not in str(row["error"]):
                    yield "raw", f"{said}: {row['error']}"
                row = run_training({**config, "force": True}, folder)
    except Exception as error:
        yield "raw", f"{said}: {type(error).__name__}: {error}"
        return
    if (row["status"], row["metrics"]) != ("ok", whole["metrics"]):
        yield "lost", f"{said}: {row['status']}, {row['error']}"
        return
    if row["model_sha256"] != whole["model_sha256"]:
        yield "wrong", f"{said}: another model"
    try:
        zoo.load(folder)
    except (ValueError, OSError) as error:
        yield "lost", f"{said}: no model afterwards: {error}"


def damage(rng: random.Random, path: Path) -> str:
    """Damage a file in a random way; what was done."""
    content = path.read_bytes()
    way = rng.choice(("cut", "flip", "flip", "foreign", "missing", "folder", "swap", "longer"))
    if way == "cut":
        path.write_bytes(content[: rng.randrange(len(content))])
    elif way == "flip":
        at, bit = rng.randrange(len(content)), rng.randrange(8)
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :])
        way = f"flipped bit {bit} of byte {at}"
    elif way == "foreign":
        path.write_bytes(foreign := rng.choice(FOREIGN))
        way = f"foreign {foreign[:8]!r}"
    elif way == "swap":
        other = path.with_name(rng.choice([name for name in FILES if name != path.name]))
        path.write_bytes(other.read_bytes())
        way = f"replaced by {other.name}"
    elif way == "longer":
        path.write_bytes(content + rng.randbytes(rng.randrange(1, 64)))
    else:
        path.unlink()
        if way == "folder":
            path.mkdir()
    return way
