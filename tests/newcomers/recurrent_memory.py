"""A memory around any mechanism: what the inside said, fading with each token, is handed on to later tokens. O(L · D).

out_i = h_i + gate · m_i,    m_i = decay · m_(i-1) + h_(i-1)  within the document, 0 at its first token
"""

from __future__ import annotations

import copy
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from attention_zoo.contract import Output, Source, Tokens
from attention_zoo.model.wrapper import Nested, Wrapper


class RecurrentMemory(Wrapper):
    """Adds what was said before to what is said now.

    Args:
        inner: whose words are remembered: any mechanism, or a list of such for a stack.
        decay: how much of the memory is left after each token.
        shared: the options of `Attention`, for the mechanism inside.
    """

    name = "recurrent_memory"
    tiny = {"decay": 0.25}

    def __init__(
        self,
        *,
        inner: Any = "full",
        decay: Annotated[float, Field(gt=0, lt=1, description="a share between 0 and 1")] = 0.5,
        **shared: Any,
    ):
        super().__init__(inner=inner, **shared)
        self.decay = decay
        self.gate = nn.Parameter(torch.full((self.dim,), 0.5))

    def own_state(self, batch_size: int) -> Tensor:
        return self.gate.new_zeros(batch_size, self.dim)

    def forward(
        self, x: Tensor, tokens: Tokens | None = None, *, state: Nested | None = None, source: Source | None = None,
        choices: Any = None,
    ) -> Output:  # fmt: skip
        x, layout = self.enter(x, tokens, state, source)
        out = self.inside(x, layout, state=state and state.inner, source=source, choices=choices)
        memory, said = state.own if state else self.own_state(len(x)), []
        for column, hidden in enumerate(out.hidden.unbind(1)):
            valid, starts = layout.valid[:, column, None], layout.position[:, column, None] == 0
            memory = memory.masked_fill(valid & starts, 0)
            said.append(hidden + self.gate * memory)
            memory = torch.where(valid, self.decay * memory + hidden, memory)
        return out._replace(hidden=torch.stack(said, 1), state=state and Nested(memory, out.state))

    @staticmethod
    def reference(layer: Any, x: Tensor, tokens: Tokens) -> Tensor:
        """Token by token, around the definition of what is inside."""
        inside = copy.deepcopy(layer.inner, {id(each): each for each in layer.inner.parameters()})
        inside.kernel = "dense"
        hidden, rows = inside(x, tokens).hidden, []
        for b in range(len(x)):
            out = []
            for i in range(x.shape[1]):
                before = [j for j in range(i) if tokens.valid[b, j] and tokens.document[b, j] == tokens.document[b, i]]
                memory = sum((layer.decay**n * hidden[b, j] for n, j in enumerate(reversed(before))), 0 * hidden[b, i])
                out.append(hidden[b, i] + layer.gate * memory)
            rows.append(torch.stack(out))
        return torch.stack(rows)
