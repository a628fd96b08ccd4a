"""Compression: a row must go through one vector. An encoder reads it, and a decoder that sees its last token's hidden
state alone writes it again.

    source    c a b d b e        the encoder reads all of it; the decoder sees what stands under e, nothing else
    ids       # c a b d b        #: begin; the decoder reads what it should have written before
    targets   c a b d b e

Rules: symbols are independent and uniform, so that those before say nothing of the next: all of log2(vocab) bits a
token must be in the vector. The decoder needs to know the place alone, and has it from its positions.

Source: Poli et al. 2024, "Mechanistic Design and Scaling of Hybrid Architectures" (MAD), compression. Chance: one over
the number of symbols. Trivial rules at 8 tokens of 8 symbols: "one symbol", at chance; "last token", which stands in
the vector for nothing, .24; "commonest symbol" of the row, .32.

Deviations: MAD decodes with an MLP at sines and cosines of the place; here it is a decoder of any kind, whose
cross-attention over a single column hands the same vector to all places. MAD's layers look backwards, here the encoder
looks both ways. MAD's last token is always the same and is asked too; here it is a symbol like the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from attention_zoo.options import Positive, checked
from attention_zoo.tasks.generated import Generated, of
from attention_zoo.tasks.guessing import commonest
from attention_zoo.tasks.task import Batch

BEGIN, FIRST = 0, 1


class Compression(Generated):
    """Writing a row again from one vector. `seq_len` is the row's.

    Args:
        symbols: number of different symbols.
        examples: number of distinct training rows, rounded up to whole batches; None draws new ones for ever.
        test: lengths of further evaluation sets.
        test_examples: rows of each evaluation set.
    """

    name = "compression"
    objective = "seq2seq"
    metric, better = "accuracy", "higher"

    @checked
    def __init__(
        self,
        *,
        symbols: Annotated[int, Field(ge=2, le=2**24)] = 16,
        examples: Positive | None = None,
        test: Sequence[Positive] = (),
        test_examples: Positive = 1000,
    ):
        self.symbols, self.vocab = symbols, FIRST + symbols
        self.examples, self.test, self.test_examples = examples, tuple(test), test_examples

    def draw(self, random: np.random.Generator, rows: int, length: int, **changes: Any) -> Batch:
        row = random.integers(FIRST, self.vocab, (rows, length))
        read = np.concatenate([np.full((rows, 1), BEGIN), row[:, :-1]], axis=1)
        seen = torch.zeros(row.shape, dtype=torch.bool)
        seen[:, -1] = True
        return of(read, row, source=row)._replace(source_seen=seen)

    def guesses(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.source is not None
        rules = {"last token": batch.source[:, -1:], "commonest symbol": commonest(batch.source, FIRST, self.vocab)}
        return {"one symbol": torch.full_like(batch.targets, FIRST)} | {
            name: said.expand_as(batch.targets) for name, said in rules.items()
        }

    def chance(self, seq_len: int) -> float:
        return 1 / self.symbols
