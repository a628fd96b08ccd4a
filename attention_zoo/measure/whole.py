"""Whole models: ids in, logits out, and what a step of training takes. For what a layer alone does not tell of, such as
a stack that is shorter in its middle, or whether attention still counts beside all the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from attention_zoo.contract import Unsupported
from attention_zoo.measure.core import Shape
from attention_zoo.measure.work import Work, moments, without_gradients
from attention_zoo.model.transformer import Transformer
from attention_zoo.rules import shown

VOCAB = 256
"""Ids where a cell's model says nothing of them: bytes."""
TOLD = ("attention", "dim", "heads", "causal")
"""What the cell says itself."""


def build_model(backend: str, options: Mapping[str, Any], given: Mapping[str, Any], **shared: Any) -> Transformer:
    """A model whose blocks attend by that backend.

    Args:
        options: of the backend.
        given: options of `Transformer`.
        shared: dim, heads, causal.

    Raises:
        ValueError: for an option of the model that is the cell's to say, or outside its rule.
    """
    if told := [key for key in TOLD if key in given]:
        raise ValueError(f"models must leave {' and '.join(told)} to the cell, got {shown(dict(given))}")
    return Transformer(**{"attention": {"name": backend, **options}, "vocab": VOCAB, **shared, **given})


def work_of(model: Transformer, shape: Shape, phase: str) -> Work:
    """The call of one cell, on random ids.

    Args:
        phase: "forward", "forward_backward" or "train_step" (with AdamW).

    Raises:
        Unsupported: for another phase, or another head than lm.
    """
    if phase in ("prefill", "decode"):
        raise Unsupported("a whole model", f"phase={phase}", "its steps are not measured", "variant=layer")
    if model.head_name != "lm":
        raise Unsupported("a whole model", f"head={model.head_name}", "its loss is that of each token", "head=lm")

    def outputs(ids: Tensor) -> list[Tensor]:
        out = model(ids)
        return [out.logits, *out.losses.values()]

    model.train(phase != "forward")
    return model_work(outputs, list(model.parameters()), shape, phase=phase, vocab=model.vocab)


def model_work(
    outputs: Callable[[Tensor], Sequence[Tensor]],
    parameters: Sequence[Tensor],
    shape: Shape,
    *,
    phase: str,
    vocab: int,
) -> Work:
    """A model on ids, ours or a peer's: `outputs` gives logits [B, L, V] first, then losses.

    The loss is the mean cross-entropy of random answers: what is learned costs nothing else.
    """
    size = shape.batch, shape.length
    ids, answers = (torch.randint(vocab, size, device=shape.device) for _ in range(2))
    if phase == "forward":
        return Work(without_gradients(lambda: outputs(ids)), shape.length, held=lambda: [ids, *parameters])
    optimizer = torch.optim.AdamW(parameters, lr=1e-4) if phase == "train_step" else None

    def before() -> None:
        for parameter in parameters:
            parameter.grad = None

    def run() -> None:
        logits, *losses = outputs(ids)
        loss = cross_entropy(logits.flatten(0, 1).float(), answers.flatten())
        torch.autograd.backward([loss, *losses], [torch.ones_like(each) for each in (loss, *losses)])
        if optimizer is not None:
            optimizer.step()

    return Work(run, shape.length, before, held=lambda: [ids, answers, *parameters, *moments(optimizer)])
