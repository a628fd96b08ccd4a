"""Inspection says what the definition says, in blocks at any length, and refuses what it cannot know."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from references.reformer import reference as reformer_reference
from torch import Tensor

from attention_zoo import registry
from attention_zoo.inspect.command import InspectConfig, inspect
from attention_zoo.inspect.figures import figures
from attention_zoo.inspect.probe import Call, calls_of
from attention_zoo.inspect.rows import is_plain, rows
from attention_zoo.layout.layout import Layout
from attention_zoo.model.saved import save
from attention_zoo.model.transformer import Transformer
from attention_zoo.report.inspected import inspected
from attention_zoo.tracking import NoTracker

L = 37


def layer_of(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    cls, _ = registry.recipe(name)
    return registry.build(name, dim=16, heads=2, **{"causal": True, **cls.tiny, **options}).double().eval()


def by_pattern(layer: Any, x: Tensor) -> Tensor:
    """softmax(scale · q·k + bias) of a pattern's definition, [H, L, L]."""
    tokens = Layout.plain(1, x.shape[1])
    q, k = (to(x).view(x.shape[1], layer.heads, -1).transpose(0, 1) for to in (layer.to_q, layer.to_k))
    return (layer.scale * q @ k.mT + layer.full_bias(tokens, tokens)[0]).softmax(-1)


def by_transformer_xl(layer: Any, x: Tensor) -> Tensor:
    """The released formula pair by pair."""
    H, D, E = layer.heads, layer.head_width, layer.dim
    q, k = (to(x[0]).view(-1, H, D) for to in (layer.to_q, layer.to_k))
    scores = torch.full((H, len(q), len(q)), -torch.inf, dtype=torch.float64)
    for i in range(len(q)):
        for j in range(max(0, i - i % layer.segment_length - layer.memory_length), i + 1):
            turns = [(i - j) / 10_000 ** (2 * n / E) for n in range(E // 2)]
            wave = torch.tensor([*map(math.sin, turns), *map(math.cos, turns)], dtype=torch.float64)
            r = layer.to_r(wave).view(H, D)
            scores[:, i, j] = layer.scale * (((q[i] + layer.u) * k[j]).sum(-1) + ((q[i] + layer.v) * r).sum(-1))
    return scores.softmax(-1)


def by_reformer(layer: Any, x: Tensor) -> Tensor:
    """The token-by-token reference, asked for one key after the other."""
    tokens, found = Layout.plain(1, x.shape[1]), []
    for j in range(x.shape[1]):
        kept: list[Tensor] = []
        named = torch.zeros(x.shape[1], layer.heads * layer.head_width, dtype=torch.float64)
        named[j] = 1
        hooks = [
            layer.to_v.register_forward_hook(lambda module, given, made, named=named: named),
            layer.to_out.register_forward_pre_hook(lambda module, given, kept=kept: kept.append(given[0])),
        ]
        reformer_reference(layer, x, tokens)
        for hook in hooks:
            hook.remove()
        found.append(kept[0].view(x.shape[1], layer.heads, -1)[..., 0].T)
    return torch.stack(found, -1)


CASES = [
    ("full", {}, by_pattern), ("full", {"causal": False}, by_pattern), ("longformer", {}, by_pattern),
    ("longformer", {"sinks": 2}, by_pattern), ("bigbird", {}, by_pattern), ("adaptive_span", {}, by_pattern),
    ("transformer_xl", {}, by_transformer_xl), ("reformer", {"resample": False}, by_reformer),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "definition"), CASES)
@torch.no_grad()
def test_weights_and_figures_are_those_of_the_definition(name: str, options: Any, definition: Any) -> None:
    layer, x = layer_of(name, **options), torch.randn(1, L, 16, dtype=torch.float64)
    call, wanted = Call.of(layer, x), definition(layer, x)
    torch.testing.assert_close(call.weights(torch.eye(L)), wanted, rtol=0, atol=1e-11)
    found = figures(call, window=3, sinks=2, blocks=8, exact=L)
    place = torch.arange(L)
    far = (place[:, None] - place).abs()
    home = place * 8 // L
    for head in range(2):
        p = wanted[head]
        assert found["distance"][head] == pytest.approx(float((p * far).sum(-1).mean()), abs=1e-9)
        assert found["outside"][head] == pytest.approx(float((p * (far > 3)).sum(-1).mean()), abs=1e-9)
        assert found["sinks"][head] == pytest.approx(float(p[:, :2].sum(-1).mean()), abs=1e-9)
        assert found["mass"][head] == pytest.approx(1.0, abs=1e-9)
        bits = -torch.special.xlogy(p, p).sum(-1).mean() / math.log(2)
        assert found["entropy"][head] == pytest.approx(float(bits), abs=1e-6)
        block = p[home == 3][:, home == 1].sum(-1).mean()
        assert found["blocks"][head][3][1] == pytest.approx(float(block), abs=1e-9)
    if layer.causal:  # the cheap way of long texts
        cheap = figures(call, window=3, sinks=2, blocks=8, exact=0)
        assert cheap["distance"] == pytest.approx(found["distance"], abs=1e-4)
        by_rows = definition is by_pattern
        assert cheap["entropy"] == (pytest.approx(found["entropy"], abs=1e-9) if by_rows else None)
        assert cheap["outside"] == (pytest.approx(found["outside"], abs=1e-9) if by_rows else None)


@torch.no_grad()
def test_rows_of_rotated_and_grouped_patterns_are_those_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attention_zoo.inspect.rows.AT_ONCE", 2 * L * 5)
    layer = layer_of("longformer", positions="rotary", kv_heads=1)
    call = Call.of(layer, torch.randn(1, L, 16, dtype=torch.float64))
    found = torch.cat([weights for _, weights in rows(call)], 1)
    torch.testing.assert_close(found, call.weights(torch.eye(L)), rtol=0, atol=1e-11)
    assert not is_plain(Call.of(layer_of("full", sink_logit=True), call.parts[0].given.x))


def test_long_texts_stay_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attention_zoo.inspect.rows.AT_ONCE", 2**20)
    torch.manual_seed(0)
    length = 4096
    model = Transformer(attention="longformer", vocab=256, dim=16, heads=1, depth=1)
    (call,) = calls_of(model, torch.randint(0, 256, (1, length)))
    found = figures(call, window=256, sinks=4, blocks=64, exact=64)
    blocks = torch.tensor(found["blocks"])
    assert blocks.shape == (1, 64, 64)
    assert blocks.sum(-1).allclose(torch.ones(1, 64), atol=1e-4)
    assert found["outside"][0] == pytest.approx(0.0, abs=1e-6), "its window"
    assert 0 < found["entropy"][0] < math.log2(257)
    assert all(weights.numel() <= 2**20 for _, weights in rows(call)), "never all pairs"


PICTURES: list[str] = []


class Ear(NoTracker):
    """Hears of pictures."""

    def figure(self, name: str, figure: Any) -> None:
        assert len(figure["data"][0]["z"]) == 64
        PICTURES.append(name)


def test_runs_are_compared_in_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for name in ("full", "longformer"):
        save(Transformer(attention=name, vocab=256, dim=16, heads=2, depth=2), tmp_path / name / "model.safetensors")
    (tmp_path / "text").write_bytes(b"<b>a text & more" * 4)
    runs = [str(tmp_path / name) for name in ("full", "longformer")]
    tracker = {"_target_": f"{__name__}.Ear", "_partial_": True}
    path = inspect(InspectConfig(run=runs, text=f"@{tmp_path}/text", output=str(tmp_path / "seen"), tracker=tracker))
    assert len(PICTURES) == 2 * 2 * 2
    assert PICTURES[-1] == "attention/longformer_layer_1_head_1"
    found = json.loads(path.read_text())
    assert [run["name"] for run in found["runs"]] == ["full", "longformer"]
    assert found["tokens"] == 64
    for run in found["runs"]:
        assert len(run["layers"]) == 2
        assert all(len(layer["blocks"]) == 2 for layer in run["layers"])
    assert path.with_name("attention.png").read_bytes().startswith(b"\x89PNG")
    seen = inspected([tmp_path])
    assert (seen.inspections, seen.left_out) == ([("seen", found)], []), "what the dashboard reads"
    page = path.with_name("attention.html").read_text()
    assert page.count("<tr>") == 1 + 2 * 2 * 2
    with pytest.raises(ValueError, match="text must be at least one token"):
        inspect(InspectConfig(run=runs, text=""))
    with pytest.raises(ValueError, match="run must be the folder of a finished run"):
        inspect(InspectConfig(run=[], text="a"))
