"""Relative effective context: the paper's formulas in an obvious loop, losses after so many tokens, the command."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from attention_zoo.inspect.context import ContextConfig, context
from attention_zoo.measure.relative_context import losses_after, places_for, relative_context
from attention_zoo.model.saved import save
from attention_zoo.model.transformer import Transformer

Table = dict[str, dict[int, list[float]]]


def drawn(seed: int, models: int, contexts: list[int], tokens: int) -> Table:
    """Losses that mostly fall with context, in steps that come ever closer."""
    random.seed(seed)
    found: Table = {}
    for model in range(models):
        line = [random.uniform(0.1, 6.0) for _ in range(tokens)]
        found[f"m{model}"] = {}
        for length in contexts:
            line = [max(0.0, loss - random.uniform(-0.01, 0.9 / length)) for loss in line]
            found[f"m{model}"][length] = line
    return found


def loop(losses: Table, share: float, threshold: float) -> dict[str, tuple[int, bool]]:
    """Appendix C of Dai et al. 2019, line by line."""
    contexts = sorted(next(iter(losses.values())))
    tokens = range(len(next(iter(losses.values()))[contexts[0]]))

    def b(c: int, t: int) -> float:
        return min(mine[c][t] for mine in losses.values())

    def f(model: str, c: int, longer: int) -> float:
        chosen = sorted(tokens, key=lambda t: (-b(c, t), t))[: math.ceil(share * len(tokens))]
        return sum(min(b(c, t), losses[model][longer][t]) for t in chosen) / len(chosen)

    found = {}
    for model in losses:
        c = contexts[0]
        while True:
            longer = next((each for each in contexts if each > c), None)
            if longer is None:
                found[model] = (c, False)
                break
            gain = (math.exp(f(model, c, c)) - math.exp(f(model, c, longer))) / math.exp(f(model, c, c))
            if gain < threshold:
                found[model] = (c, True)
                break
            c = longer
    return found


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("threshold", [0.003, 0.01, 0.02])
def test_it_is_the_papers_algorithm(share: float, threshold: float) -> None:
    seen = set()
    for seed in range(16):
        losses = drawn(seed, 1 + seed % 4, [4, 8, 12, 16, 20, 31], 1 + 7 * seed)
        found = relative_context(losses, share=share, threshold=threshold)
        expected = loop(losses, share, threshold)
        assert {name: (each.tokens, each.falls) for name, each in found.items()} == expected
        seen |= set(expected.values())
    assert len(seen) > 1, "the losses told nothing apart"


def test_a_model_alone_and_large_losses() -> None:
    losses = {"a": {10: [400.0, 2.0], 20: [100.0, 2.0], 30: [100.0, 2.0]}}
    found = relative_context(losses, share=0.5)["a"]
    assert (found.tokens, found.falls) == (20, True)
    assert found.gains == pytest.approx([1.0, 0.0])
    assert relative_context({"a": {1: [3.0], 2: [2.0]}}, share=1.0)["a"].falls is False


def test_a_poor_model_gains_nothing_below_the_baseline_of_the_group() -> None:
    poor = {10: [5.0] * 4, 20: [4.0] * 4, 30: [3.5] * 4}
    good = {10: [3.0] * 4, 20: [2.0] * 4, 30: [2.0] * 4}
    assert relative_context({"poor": poor}, share=1.0)["poor"].tokens == 30
    both = relative_context({"poor": poor, "good": good}, share=1.0)
    assert {name: each.tokens for name, each in both.items()} == {"poor": 10, "good": 20}


@pytest.mark.parametrize(
    ("losses", "share", "said"),
    [
        ({}, 0.1, "at least one model"),
        ({"a": {1: [1.0]}}, 0.1, r"two contexts or more, got \[1\]"),
        ({"a": {1: [1.0], 2: [1.0]}, "b": {1: [1.0], 3: [1.0]}}, 0.1, r"of b must be at .*\[1, 2\], got \[1, 3\]"),
        ({"a": {1: [1.0], 2: [1.0, 2.0]}}, 0.1, r"same tokens .* got \[1, 2\]"),
        ({"a": {1: [1.0], 2: [math.nan]}}, 0.1, "must be finite"),
        ({"a": {1: [1.0], 2: [1.0]}}, 0.0, "share must be above 0 and at most 1, got 0.0"),
    ],
)  # fmt: skip
def test_what_is_no_table_of_losses_is_refused(losses: Any, share: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        relative_context(losses, share=share)


def test_places_have_their_context_within_their_document() -> None:
    ends = np.array([5, 20, 22, 60])
    starts = [0, 5, 20, 22]
    for most in (1, 2, 7, 1000):
        places = places_for(ends, 7, most)
        allowed = [t for start, end in zip(starts, ends) for t in range(start + 7, end)]
        assert set(places) <= set(allowed)
        assert len(places) == len(set(places)) == min(most, len(allowed))
    assert places.tolist() == allowed
    with pytest.raises(ValueError, match="shorter than a document, got 38 tokens where the longest document has 38"):
        places_for(ends, 38, 5)


OPTIONS = {"full": {}, "longformer": {"window": 3}, "transformer_xl": {"segment_length": 4, "memory_length": 4}}


def model(name: str, **options: Any) -> Transformer:
    torch.manual_seed(0)
    attention = {"name": name, **OPTIONS[name]}
    return Transformer(attention=[attention], vocab=256, dim=16, heads=2, depth=1, causal=True, head="lm", **options)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("length", [1, 5, 13])
def test_a_loss_is_that_after_exactly_so_many_tokens(name: str, length: int) -> None:
    reader = model(name).double().eval()
    text = np.random.default_rng(0).integers(0, 256, 90).astype(np.uint8)
    places = np.array([13, 14, 40, 89])
    expected = []
    for t in places:
        row = torch.from_numpy(text[t - length : t].astype(np.int64))[None]
        logits = reader(row).logits[0, -1].detach()
        expected.append(float(F.cross_entropy(logits, torch.tensor(int(text[t])))))
    for batch_tokens in (1, 2 * length, 10_000):
        found = losses_after(reader, text, places, length, batch_tokens=batch_tokens)
        assert found == pytest.approx(expected, rel=1e-12)
    changed = text.copy()
    changed[: 13 - length] += 1  # what lies before the context of the first token
    changed[14 : 40 - length] += 1  # the second token's own value, and what lies before the third's context
    assert losses_after(reader, changed, places[[0, 2]], length, batch_tokens=99) == pytest.approx(
        [expected[0], expected[2]], rel=1e-12
    )


def test_no_call_is_larger_than_a_batch() -> None:
    reader, sizes = model("full").eval(), []
    reader.register_forward_pre_hook(lambda module, args: sizes.append(args[0].numel()))
    text = np.zeros(500, np.uint8)
    losses_after(reader, text, np.arange(50, 400), 50, batch_tokens=170)
    assert max(sizes) == 150
    assert sum(sizes) == 350 * 50


def runs(folder: Path) -> list[str]:
    for name in OPTIONS:
        save(model(name), folder / name / "model.safetensors")
        row = {"kind": "quality", "backend": name, "id": f"id-{name}", "status": "ok", "seq_len": 16}
        (folder / name / "result.json").write_text(json.dumps(row))
    (folder / "text").write_bytes(bytes(range(256)) * 2)
    return [str(folder / name) for name in OPTIONS]


def test_the_command_writes_what_the_function_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ContextConfig(run=runs(tmp_path), text=str(tmp_path / "text"), positions=21, device="cpu",
                          output=str(tmp_path / "out"))  # fmt: skip
    found = json.loads(context(given).read_text())
    assert found["contexts"] == [4, 8, 12, 16, 20, 24, 28, 32], "eight steps up to twice the trained length"
    assert [run["name"] for run in found["runs"]] == list(OPTIONS)
    losses = {run["name"]: dict(zip(found["contexts"], run["losses"])) for run in found["runs"]}
    assert {len(line) for mine in losses.values() for line in mine.values()} == {found["positions"]} == {21}
    for place, share in enumerate((0.1, 0.5, 1.0)):
        for name, expected in relative_context(losses, share=share).items():
            (run,) = [each for each in found["runs"] if each["name"] == name]
            assert run["reach"][place] == {"share": share, **expected._asdict()}
            assert run["bits_per_byte"][0] == pytest.approx(np.mean(losses[name][4]) / math.log(2))
    assert "transformer_xl" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"run": []}, "run must be the folder of a finished run"),
        ({"contexts": [8]}, r"contexts must be two numbers of tokens or more, in rising order, got \[8\]"),
        ({"contexts": [16, 8]}, "in rising order"),
        ({"contexts": [8, 512]}, "contexts must be shorter than a document, got 512 tokens"),
        ({"text": None}, "trainings over one text, or text=FILE be given"),
        ({"positions": 0}, "positions"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    given = {"run": runs(tmp_path), "text": str(tmp_path / "text"), "device": "cpu"} | changes
    with pytest.raises(ValueError, match=said):
        context(ContextConfig(**given))


def test_models_that_are_no_language_models_over_bytes_are_refused(tmp_path: Path) -> None:
    save(Transformer(attention="full", vocab=32, dim=16, heads=2, depth=1, causal=True, head="lm"),
         tmp_path / "model.safetensors")  # fmt: skip
    with pytest.raises(ValueError, match="causal language models over bytes"):
        context(ContextConfig(run=str(tmp_path), text="x"))


def test_more_context_than_positions_is_said_before_anything_is_read(tmp_path: Path) -> None:
    save(model("full", positions="learned", max_length=20), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"at most the 20 positions of .*, got 21"):
        context(ContextConfig(run=str(tmp_path), text="none", contexts=[2, 21]))
