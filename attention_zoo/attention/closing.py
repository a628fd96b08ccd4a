"""A mechanism that computes its tokens closed up, where padding between them would cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.contract import Attention, Output
from attention_zoo.layout import grid
from attention_zoo.layout.closed import Closed
from attention_zoo.layout.layout import Layout
from attention_zoo.ops.relative.projections import of_zeros


class Closing(Attention):
    """Base of mechanisms that end in a projection `to_out`, and to which padding is as if it were not there.

    Attributes:
        needs_columns: whether its kernels of CUDA, too, ask for columns that are positions. Elsewhere tokens are moved
            on a CPU alone, where operators cost less than tokens.
    """

    needs_columns: bool = False

    def _closed_up(
        self, run: Callable[[Tensor, Layout], Output], x: Float[Tensor, "B L E"], layout: Layout, *, front: bool = True
    ) -> Output:
        """What `run` gives without a state, computed of tokens closed up where that pays.

        Args:
            x: zeros at padding, with no gradient from there: as `enter` leaves it.
            front: whether padding in front of a row costs, too.
        """
        way = Closed.of(layout, front=front) if self.needs_columns or grid.copies_rows(x) else None
        if way is None:
            return run(x, layout)
        out = run(way.close(x), way.layout)
        return out._replace(hidden=way.open(out.hidden, self._of_padding(x)))

    def _of_padding(self, x: Float[Tensor, "B L E"]) -> Float[Tensor, " E"]:
        """What a call gives at padding."""
        return of_zeros(cast(nn.Module, self.to_out), self.heads * self.head_width, x)
