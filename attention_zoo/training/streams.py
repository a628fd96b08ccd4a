"""Carrying a model's recurrent state from one batch to the next, for training and evaluation alike.

Truncated backpropagation: values cross the border between two segments, gradients do not. A row that starts something
new sees nothing of what it held before.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from attention_zoo.model.state import detach
from attention_zoo.tasks.task import Batch
from attention_zoo.training.objective import scored_only


class Stream:
    """One model reading consecutive batches.

    Args:
        model: what is called.
        carry: whether to carry its state; otherwise each batch starts afresh.
    """

    def __init__(self, model: nn.Module, *, carry: bool):
        self.model: Any = model
        self.carry = carry
        self.state: Any = None

    def encoded(self, batch: Batch) -> Batch:
        """The same batch with its source as the encoder read it, for several calls of the decoder."""
        source = self.model.encode(batch.source, batch.source_tokens, batch.source_seen)[0]
        return batch._replace(source=source, source_tokens=None, source_seen=None)

    def __call__(self, batch: Batch, *, anew: bool | None = None) -> Any:
        """The model's output on the batch, logits of its scored tokens alone where the model can be asked for some;
        afterwards `state` is what the next batch continues from.

        Args:
            anew: whether all rows start something new, those that other processes read beside these included; default
                whether these do.
        """
        given: dict[str, Any] = {} if batch.types is None else {"types": batch.types}
        if batch.source is not None:
            whole = batch.source_tokens is None and batch.source_seen is None
            given["source"] = batch.source if whole else (batch.source, batch.source_tokens, batch.source_seen)
        if batch.targets.ndim == 2 and getattr(self.model, "answers_some", False):
            given["answered"] = scored_only(batch.targets)
        if not self.carry:
            return self.model(batch.ids, batch.tokens, **given)
        fresh = None
        if self.state is None or (bool(batch.fresh.all()) if anew is None else anew):
            self.state = self.model.initial_state(len(batch.ids))
        elif bool(batch.fresh.any()):
            fresh = batch.fresh
        output = self.model(batch.ids, batch.tokens, state=self.state, fresh=fresh, **given)
        self.state = detach(output.state)
        return output
