"""What is said on paper of several processes: formulas against what they send, and the page that is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from attention_zoo.advice.plan import PlanConfig, page
from attention_zoo.contract import Unsupported
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.needs import needs
from attention_zoo.model.transformer import Transformer
from attention_zoo.parallel.sequence.batch import columns_for
from attention_zoo.parallel.sequence.paper import LONGEST_COUNTED, Sent, Shape, _line, sent, state_bytes
from tests.processes import together
from tests.sequence_models import ROWS, SHARED, Found
from tests.test_sequence_model import MODELS, TINY

LONG = pytest.mark.slow, pytest.mark.long
EXACT = {
    "longformer": {"attention": TINY["longformer"]},
    "a window beyond neighbours": {"attention": {"name": "longformer", "window": 40}},
    "sinks": {"attention": {"name": "longformer", "window": 3, "sinks": 2}},
    "adaptive_span": {"attention": TINY["adaptive_span"]},
    "full": {"attention": "full"},
    "grouped heads": {"attention": {"name": "longformer", "window": 5, "kv_heads": 1}},
    "memory_compressed": {"attention": TINY["memory_compressed"]},
    **{
        name: MODELS[name]
        for name in (
            "transformer_xl", "transformer_xl, same length", "transformer_xl, long memory", "compressive",
            "compressive, dilated", "block_recurrent", "block_recurrent, rotary", "memory_tokens", "hierarchical",
            "h_transformer_1d", "short convolution", "gated convolution", "hourglass",
        )
    },
}  # fmt: skip
LENGTHS = (48, 61)


def counted(found: Found, way: str) -> float:
    """Bytes of all kinds, one way."""
    return sum(count for kind, count in found.sent.items() if kind.endswith(way))


def on_paper(options: dict[str, Any], length: int, processes: int) -> list[Sent]:
    model = Transformer(**SHARED | options).double()
    return sent(model, Shape(ROWS, length, processes, torch.float64))


@pytest.mark.parametrize(
    "size",
    [
        2,
        pytest.param(3, marks=LONG),
        pytest.param(4, marks=LONG),
    ],
)
def test_formulas_say_what_is_sent(size: int) -> None:
    cases = [(name, length) for name in EXACT for length in LENGTHS[: 1 if size == 2 else 2]]
    ran = together(size, "tests.sequence_models:all_compared", [(EXACT[n], "none", at, "float64") for n, at in cases])
    wrong = {}
    for (name, length), each in zip(cases, ran, strict=True):
        found, paper = Found(*each), on_paper(EXACT[name], length, size)
        if name == "full" and length % (2 * size):
            continue  # runs of a zig-zag differ in length
        for way, said in (("forward", sum(x.forward for x in paper)), ("backward", sum(x.backward for x in paper))):
            if said != counted(found, way):
                wrong[name, length, way] = said, found.sent
    assert not wrong, wrong


def test_links_of_bigbird_are_as_many_as_expected() -> None:
    """Random links by expectation: within a tenth of what the real links need."""
    model = Transformer(**SHARED | {"attention": {"name": "bigbird", "block": 4, "random": 2}, "depth": 1, "heads": 4})
    (layer,) = model.stack.attentions
    length, size = 4096, 4
    columns = columns_for(model, length, size)
    whole = layer._marked(Layout.plain(1, length))
    wanted = needs(whole, columns, layer.reach, causal=True, key_heads=4, heads=4)
    foreign = sum(int(each.sum()) - int(each[:, own].sum()) for each, own in zip(wanted, columns))
    (said,) = sent(model, Shape(1, length, size))
    assert said.forward == pytest.approx(foreign * 2 * layer.head_width * 4, rel=0.1)


def test_a_long_state_lies_on_a_line() -> None:
    """What is not counted any more is extrapolated: a state that grows, and one that does not."""
    for name in ("hierarchical", "block_recurrent"):
        stack = Transformer(**SHARED | {"depth": 1, "attention": TINY[name]}).stack
        layer = stack if stack.travels is None else stack.attentions[0]
        line = _line(layer, 1, torch.float32, LONGEST_COUNTED + 1, {})
        for way, told in zip(state_bytes(layer, 1, 2 * LONGEST_COUNTED, torch.float32), line(2 * LONGEST_COUNTED)):
            assert told == pytest.approx(way, rel=0.01)


def test_a_ring_and_a_refusal_have_their_words() -> None:
    (ring, _) = on_paper({"attention": "full"}, 64, 4)
    assert ring.way == "ring"
    assert ring.bytes == 64 * 3 * 0.75 * 3 * 2 * 8 * 8 * ROWS
    with pytest.raises(Unsupported, match="hashes are sorted"):
        on_paper({"attention": "reformer"}, 64, 4)
    with pytest.raises(Unsupported, match="formulas are of causal models"):
        on_paper({"attention": "longformer", "causal": False}, 64, 4)


ROOT = Path(__file__).parents[1]
PAGE, CONF = ROOT / "experiments" / "results" / "plan.md", ROOT / "conf" / "plan.yaml"
QUICK = ("longformer", "transformer_xl", "reformer")


def tables(text: str) -> dict[str, str]:
    """By mechanism; "" what stands before all."""
    head, *parts = text.strip().split("\n## ")
    return {"": head.strip()} | {part.split("\n", 1)[0]: part.split("\n", 1)[1].strip() for part in parts}


@pytest.mark.parametrize("names", [pytest.param(QUICK, id="some"), pytest.param(None, id="all", marks=LONG)])
def test_the_page_is_of_today(names: tuple[str, ...] | None) -> None:
    """`python -m experiments.plan output=experiments/results/plan.md` writes it again."""
    said = {key: value for key, value in OmegaConf.load(CONF).items() if key not in ("defaults", "hydra", "backends")}
    config = PlanConfig(**said, backends=names)
    made, kept = tables("\n".join(page(config))), tables(PAGE.read_text())
    assert made == {name: kept[name] for name in made}
    if names is None:
        assert made.keys() == kept.keys()
