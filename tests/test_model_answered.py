"""Logits of those tokens alone that are asked for: the same, with the same gradients, and none of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import VOCAB, far, packed, ragged, small, some_ids
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attention_zoo import EncoderDecoder, Tokens
from attention_zoo.tasks.task import IGNORED, Batch
from attention_zoo.training.objective import answers, counts, losses
from attention_zoo.training.streams import Stream

HEADS: dict[str, dict[str, Any]] = {
    "lm": {},
    "untied": {"tied": False},
    "transform": {"head": {"name": "lm", "bias": True, "transform": "gelu"}},
    "batch norm": {"head": {"name": "lm", "transform": "gelu"}, "norm": "batch"},
    "tokens": {"head": "tokens", "classes": 5},
    "adaptive": {"embedding": {"cutoffs": [4], "divide": 2}},
}


def some(ids: Tensor) -> Tensor:
    return torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.3


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("training", [False, True])
def test_logits_of_some_tokens_are_those_of_all(name: str, training: bool) -> None:
    model = small("longformer", causal=False, **HEADS[name]).train(training)
    ids = some_ids()
    tokens = packed(ragged(23, [18, 23, 7], "right"), 6, 14)
    answered = some(ids) & tokens.valid
    whole, part = model(ids, tokens), model(ids, tokens, answered=answered)
    assert part.logits.shape == (int(answered.sum()), whole.logits.shape[-1])
    assert far(part.logits, whole.logits[answered]) < 1e-12
    assert far(part.hidden, whole.hidden) < 1e-12
    given = torch.randn_like(part.logits)
    weights = list(model.parameters())
    found = torch.autograd.grad((part.logits * given).sum(), weights, allow_unused=True)
    right = torch.autograd.grad((whole.logits[answered] * given).sum(), weights, allow_unused=True)
    assert [each is None for each in found] == [each is None for each in right]
    assert max(far(a, b) for a, b in zip(found, right) if a is not None and b is not None) < 1e-11


def test_a_row_is_answered_as_ever() -> None:
    ids = some_ids()
    model = small("full", causal=False, head="classify", classes=3)
    assert far(model(ids, answered=some(ids)).logits, model(ids).logits) == 0
    model = small("full", causal=False, head="pretraining", classes=3)
    whole, part = model(ids).logits, model(ids, answered=some(ids)).logits
    assert far(part.row, whole.row) == 0
    assert far(part.tokens, whole.tokens[some(ids)]) < 1e-12


def test_a_decoder_answers_for_some() -> None:
    encoder, decoder = small("full", causal=False, head="hidden"), small("full", cross=True)
    pair = EncoderDecoder(encoder=encoder, decoder=decoder)
    ids, source = some_ids(), some_ids(seed=2)
    whole, part = pair(ids, source=source), pair(ids, source=source, answered=some(ids))
    assert far(part.logits, whole.logits[some(ids)]) < 1e-12


@pytest.mark.parametrize(
    ("answered", "more", "line"),
    [
        (torch.ones(3, 22, dtype=torch.bool), {}, r"answered must be a bool mask of ids' shape \(3, 23\), got"),
        (torch.ones(3, 23), {}, "answered must be a bool mask of ids' shape"),
        (torch.ones(3, 23, dtype=torch.bool), {"last_only": True}, "answered needs last_only=False"),
    ],
)
def test_what_is_no_mask_is_refused(answered: Tensor, more: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        small("full")(some_ids(), answered=answered, **more)


class Largest(TorchDispatchMode):
    """The most numbers that a tensor of a last width had."""

    def __init__(self, width: int):
        super().__init__()
        self.width, self.most = width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, Tensor) and each.shape[-1:] == (self.width,):
                self.most = max(self.most, each.numel())
        return out


def batch_of(ids: Tensor, answered: Tensor, tokens: Tokens | None = None) -> Batch:
    targets = torch.where(answered, ids, IGNORED)
    return Batch(ids, targets, tokens, torch.ones(len(ids), dtype=torch.bool))


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_training_and_evaluation_make_logits_of_scored_tokens_alone(share: float) -> None:
    model = small("full", head={"name": "lm", "bias": True}, tied=False)
    ids = some_ids(4, 50)
    answered = torch.arange(50).expand(4, -1) < 50 * share
    batch, many = batch_of(ids, answered), int(answered.sum())
    with Largest(VOCAB) as seen:
        output = Stream(model, carry=False)(batch)
        loss = losses(output, batch, counts(batch))["main"]
        loss.backward()
    assert seen.most <= VOCAB * max(many, 16)  # 16: the weight itself
    whole = model(ids).logits[answered]
    right = torch.nn.functional.cross_entropy(whole, ids[answered], reduction="sum") / max(1, many)
    assert far(loss, right) < 1e-12
    said = answers(output, batch)["main"]
    assert torch.equal(said.hits, whole.argmax(-1) == ids[answered])
