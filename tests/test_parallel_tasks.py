"""Two processes are one with every objective, with adapters and from files: sources, pairs, masks, labels, lessons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from parallel_processes import outcomes, write_texts

from attention_zoo.model.saved import save
from attention_zoo.model.transformer import Transformer

STEPS = 8
REFERENCE = ["task=reference", "seq_len=32", "batch=8", "task.test_examples=7"]
QUOTE = ["task=quote", "seq_len=48", "batch=8", "task.test_examples=7"]
MASKED = ["task=mlm", "seq_len=24", "batch=8", "task.evaluation_rows=3"]
TEXT = ["task=text", "task.held_out=null", "task.evaluation_rows=5", "task.span=3", "seq_len=12", "batch=8"]
LISTOPS = ["task=listops", "task.shortest=10", "seq_len=64", "batch=8", "task.test_examples=7"]
CASES: Mapping[str, Sequence[str]] = {
    "reference": [*REFERENCE, "attention=full"],
    "reference, other halves": [*REFERENCE, "encoder.attention=bigbird", "decoder.attention=transformer_xl"],
    "reference, recomputed parts": [
        *REFERENCE, "encoder.attention=longformer", "decoder.attention=adaptive_span", "trainer.accumulate=2",
        "parallel.checkpoint=true",
    ],
    "quote, global": [*QUOTE, "attention=longformer", "attention.window=4", "task.global_quote=true"],
    "quote, hashes": [*QUOTE, "attention=reformer", "attention.chunk=4"],
    "masked, hierarchical": [*MASKED, "attention=hierarchical", "attention.segment_length=8"],
    "masked, hierarchical between": [
        *MASKED, "attention=hierarchical", "attention.segment_length=5", "model.depth=3", "attention.layout=S SD D",
    ],
    "adapters": [*TEXT, "init=causal", "lora={r: 4}"],
    "adapters, quote": [*QUOTE, "init=two-sided", "lora={r: 4}"],
    "from a file": [*TEXT, "init=causal"],
    "labels": [*LISTOPS, "attention=h_transformer_1d"],
    "global tokens": [*TEXT, "attention=global_tokens"],
    "memory_compressed": [*TEXT, "attention=memory_compressed"],
    "block_recurrent": [*TEXT, "attention=block_recurrent", "attention.window=4", "attention.states=3"],
    "hybrid": [*TEXT, "hybrid=[longformer,transformer_xl,full]", "model.depth=3"],
}  # fmt: skip
ROUNDED = ("reference", "quote, global", "masked, hierarchical", "adapters", "hybrid")
DATA = ("ddp", "fsdp")
ALONE = ("", "bfloat16", "float32")


def near(words: Sequence[str]) -> float:
    """Weights of a file are float32, and so is what is computed with them."""
    return 2e-6 if any(word.startswith("init=") for word in words) else 1e-11


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("tasks")
    text = write_texts(place / "text", 390, 137)
    torch.manual_seed(3)
    shape = {"vocab": 256, "dim": 16, "heads": 2, "depth": 2, "ff_mult": 2}
    save(Transformer(attention="full", **shape), place / "causal.safetensors")
    save(Transformer(attention="longformer", causal=False, **shape), place / "two-sided.safetensors")

    def given(name: str) -> list[str]:
        words = [f"init={place}/{w[5:]}.safetensors" if w.startswith("init=") else w for w in CASES[name]]
        return [*words, f"task.path={text}"] if words[0] in ("task=text", "task=mlm") else words

    cases: list[dict[str, Any]] = []
    for name in CASES:
        for kind in ALONE if name in ROUNDED else ALONE[:1]:
            words = [*given(name), *([f"trainer.precision={kind}"] if kind else [])]
            shared = {"dtype": "float32" if kind else "float64", "count": STEPS}
            cases.append({"name": f"{name}-{kind}-one", "words": words, "processes": 1, **shared})
            for data in () if kind == "float32" else DATA:
                own = {"name": f"{name}-{kind}-{data}", "words": [*words, f"parallel.data={data}"], "processes": 2}
                cases.append(own | shared)
    return outcomes(cases, place)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one_with_every_objective(name: str, data: str, found: dict[str, Any]) -> None:
    (one,), (first, second), within = found[f"{name}--one"], found[f"{name}--{data}"], near(CASES[name])
    assert "error" not in one, one
    assert first == second
    assert first["loss"] == pytest.approx(one["loss"], rel=within)
    assert first["norm"] == pytest.approx(one["norm"], rel=30 * within)
    assert first["tokens"] == one["tokens"]
    assert first["metrics"] == pytest.approx(one["metrics"], rel=10 * within)
    for step, alone in zip(first["auxiliary"], one["auxiliary"]):
        assert step == pytest.approx(alone, rel=within)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("name", ROUNDED)
def test_bfloat16_is_as_near_as_its_own_rounding(name: str, data: str, found: dict[str, Any]) -> None:
    """Losses are no further from each other than two of one process's could be, as in test_parallel_precision."""
    (one,), (exact,), (first, second) = (
        found[f"{name}-{kind}"] for kind in ("bfloat16-one", "float32-one", f"bfloat16-{data}")
    )
    assert first == second
    own = max(abs(a - b) for a, b in zip(one["loss"], exact["loss"]))
    assert own > 0, "it is rounded"
    assert max(abs(a - b) for a, b in zip(first["loss"], one["loss"])) <= 2 * own
    assert first["loss"][0] == pytest.approx(one["loss"][0], rel=2e-4)
