"""What processes that share the tokens of a row do with a run's batches, where there are several; else nothing.

cut = Cut(model, world.sequence)
part = cut(part)                          # this process's columns
answers = cut.whole(answers, part)        # of all columns, in the order of one process
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from attention_zoo.contract import Unsupported
from attention_zoo.layout.placement import Traffic
from attention_zoo.model.placed import OPTION, beyond_columns, refuse
from attention_zoo.parallel.sequence.batch import sharded
from attention_zoo.parallel.world import Team
from attention_zoo.tasks.task import IGNORED, Batch

Said = TypeVar("Said", bound=tuple[Tensor, ...])


class Cut:
    """Columns of batches for this process.

    Args:
        model: that reads them.
        team: the processes that share the tokens of a row.
    """

    def __init__(self, model: nn.Module, team: Team):
        self.model, self.team = model, team
        self.under_way: list[Traffic] = []
        if team.size > 1:
            refuse(model)

    def __call__(self, part: Batch) -> Batch:
        """The batch that this process reads."""
        if self.team.size == 1:
            return part
        own = sharded(part, self.team.group, self.model)
        self.under_way.append(own.tokens.placement.traffic)  # type: ignore[union-attr]
        return own

    def sent(self) -> int:
        """Bytes that this process has sent since it was last asked, backward included: once that is over."""
        found = sum(traffic.bytes() for traffic in self.under_way)
        self.under_way.clear()
        return found

    def whole(self, said: Mapping[str, Said], part: Batch) -> dict[str, Said]:
        """What all processes say of the scored tokens, for all of them, in the order of rows and columns.

        Args:
            said: tensors [n] for each scored token of this process's part.
        """
        if self.team.size == 1:
            return dict(said)
        placement: Any = part.tokens.placement  # type: ignore[union-attr]
        row, column = (part.targets != IGNORED).cpu().numpy().nonzero()
        place = row * placement.whole.valid.shape[1] + placement.columns[placement.rank][column]
        found = {}
        for name, answers in said.items():
            everybody = self.team.gathered((place, [each.numpy() for each in answers]))
            order = np.argsort(np.concatenate([places for places, _ in everybody]))
            fields = zip(*(each for _, each in everybody))
            found[name] = type(answers)(*(torch.from_numpy(np.concatenate(field)[order]) for field in fields))
        return found


class Asked(NamedTuple):
    """Options of a run that do not go with every way of sharing the tokens of a row.

    Fields:
        recompute: activations are computed again in backward.
        compiled: blocks are compiled.
        carry: the model's state crosses from batch to batch.
    """

    recompute: bool = False
    compiled: bool = False
    carry: bool = False


def refuse_options(model: nn.Module, asked: Asked) -> None:
    """Raise Unsupported for options that do not go with a model whose tokens several processes share."""
    if asked.compiled:
        raise Unsupported(
            "parallel.compile=true", OPTION, "what lies in which process is known to eager mode alone",
            "parallel.compile=false",
        )  # fmt: skip
    if asked.carry:
        raise Unsupported(
            "trainer.carry_state=true", OPTION, "a sequence is one call, from its beginning",
            "trainer.carry_state=false",
        )  # fmt: skip
    handed = [layer for layer in beyond_columns(model) if layer.travels is None or layer.hands_on]
    if asked.recompute and handed:
        name = str(getattr(handed[0], "name", type(handed[0]).__name__))
        raise Unsupported(
            name, f"parallel.checkpoint=true with {OPTION}",
            "its state goes from process to process once, not again in backward", "parallel.checkpoint=false",
        )  # fmt: skip
