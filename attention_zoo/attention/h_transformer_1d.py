"""H-Transformer-1D: near keys exactly, farther ones in ever larger groups. Zhu & Soricut 2021, "H-Transformer-1D".

Tokens stand in blocks of `block`. A query sees its own block and the two beside it key by key. Everything else it sees
in groups of 2, 4, 8, ... tokens, by their mean key and mean value, a group of n counting n times: the farther, the
larger. O(L · log L) time, O(L) memory.

    level of the pair (i, j):  the smallest l with |i // (block · 2^l) - j // (block · 2^l)| <= 1
    j is seen by i as          itself (level 0), or as one of the group of j // 2^l of that level
    out_i = Σ_groups n · exp(q_i · mean k) · mean v  /  Σ_groups n · exp(q_i · mean k),    causal: j <= i alone

So every pair is covered exactly once, and one softmax holds all levels.

Paper: keys are means and values sums; queries are coarsened, too, and a level's output is handed to all tokens of a
group: O(L) time. Blocks of a level that the finer one covers already are masked. Relative positions of each level.

Released code (flaxformer's h_transformer): the same, with one largest score for all levels of a head. In a causal model
a coarsened query holds later tokens than the first of its group. Its blocks of queries are never coarsened further than
the row is long, which must be a power of two of blocks.

Here: keys and values alone are coarsened, never queries, so that a causal token is blind to the future to the last bit;
it costs the logarithm. Any length: the last group of a document may be smaller, and counts for what it holds. Groups
count the valid tokens of a document. The softmax is one over all levels, by log-sum-exp. No relative positions.

A state keeps the keys and values of the document, O(L). Single-token steps without gradients keep the groups beside
them, as large again: a step makes one group and reads block · log L keys (attention/h_transformer_1d_step.py). Other
calls form the groups anew, O(L). Forward and backward hold,
beside what a window does, tokens and groups of all levels as one set of keys, twice as many as the tokens, and their
gradients: 98 MiB where longformer has 36 (core, 4,096 tokens, 8 heads of 64, float32).

When: a long context of which the near part matters word by word and the far part by its gist. Not where single far
tokens must be found again: a mean over many keys does not point to one of them. With model=tiny, block=4 and one seed:
task=flip_flop, a bit remembered over up to 128 tokens, 97.4 % (full 99.1 %, longformer with window=8 66.8 %);
task=needle steps=800 59.9 % (Transformer-XL with memories of 8, 11.3 %); two-sided task=brackets 71.1 % (full 68.6 %,
that window 67.1 %), but task=marked, two symbols anywhere, 85.6 % (99.9 %, 92.4 %).

Checked: against a loop over pairs in tests/references/h_transformer_1d.py, outputs and gradients, 1e-12 in float64. The
package h-transformer-1d is no oracle: it stops a level early, and takes another maximum for each level.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from attention_zoo.attention import h_transformer_1d_step as step
from attention_zoo.attention.derived_keys import DOCUMENT, DerivedKeys
from attention_zoo.contract import Abilities
from attention_zoo.layout.host import Array, tensor_of
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.ledger import Columns
from attention_zoo.layout.levels import Level, levels
from attention_zoo.layout.placement import Placement
from attention_zoo.layout.visible import Visible, between
from attention_zoo.ops.exchange.groups import Gathered, Parts, gathered, gathering
from attention_zoo.ops.pattern import several_flex
from attention_zoo.ops.pattern.key_set import Keys
from attention_zoo.ops.pattern.means import stages_of, with_means
from attention_zoo.ops.pattern.several import attend_to_several
from attention_zoo.ops.pattern.several_flex import Set
from attention_zoo.options import LARGEST


class HTransformer1D(DerivedKeys):
    """Attention over a hierarchy of means.

    Args:
        block: tokens of a block at level 0 (the paper's numerical rank), an even number.
        shared: the options of `Attention`.
    """

    name = "h_transformer_1d"
    tiny = {"block": 2}
    travels = "keys of the blocks beside a run, and means of far ones: the block times a logarithm of the length"
    declared = Abilities(
        causality="strict",
        carry="prefix",
        two_sided=True,
        global_tokens="none",
        cross=False,
        compute="loglinear",
        activations="linear",
        state="linear",
        grouped_heads=True,
    )

    def __init__(
        self,
        *,
        block: Annotated[int, Field(ge=2, le=LARGEST, multiple_of=2, description="an even number of at least 2")] = 16,
        **shared: Any,
    ):
        super().__init__(**shared)
        self.block = block

    def pairs(self, length: int) -> float:
        """See `Attention`: a group is one pair."""
        layout = Layout.plain(1, length)
        parts = [self._near(layout, layout), *(self._far(layout, level.groups, n + 1) for n, level in self._up(layout))]
        return float(sum((seen.stop - seen.first).sum() for part in parts for seen in part))

    def keys_seen(self, length: int) -> list[float]:
        """See `Attention`: tokens, and means of groups."""
        layout = Layout.plain(1, length)
        parts = [self._near(layout, layout), *(self._far(layout, level.groups, n + 1) for n, level in self._up(layout))]
        return [float(each) for each in sum((seen.stop - seen.first)[0] for part in parts for seen in part)]

    def oldest_seen(self, length: int) -> list[int]:
        """See `Attention`: the coarsest groups reach the first token."""
        return [0] * length

    def keep(
        self, layout: Layout, k: Float[Tensor, "B K L D"], v: Float[Tensor, "B K L D"], state: Columns | None
    ) -> tuple[Columns, Columns | None]:
        """See `DerivedKeys`: keys and values, in steps also the groups that stand beside them."""
        if state is None:
            return super().keep(layout, k, v, None)
        if not self.causal or not step.is_step(layout, state.ledger):
            return super().keep(layout, k, v, state._replace(buffers=state.buffers[:2]))
        held = step.append(step.with_groups(state), layout, k, v, DOCUMENT)
        return held, held

    # --- the levels --------------------------------------------------------------------------------------------------

    def answer(
        self, q: Float[Tensor, "B H L D"], queries: Layout, held: Columns, scale: float
    ) -> Float[Tensor, "B H L D"]:
        """See `DerivedKeys`: of near keys and of the means of far ones."""
        if len(held.buffers) == 3:
            return step.attend(q, queries, held, block=self.block, scale=scale)
        (k, v), keys = held.held, held.tokens
        sets = [Keys(k, v, keys, seen=self._near(queries, keys))]
        both = torch.cat([k, v], 1)
        for number, level in self._up(keys):
            both = level.mean(both)
            seen = self._far(queries, level.groups, number + 1)
            k, v = both.chunk(2, 1)
            sets.append(Keys(k, v, level.groups, weight=level.log_count, seen=seen))
        return attend_to_several(q, queries, sets, scale=scale, causal=self.causal)

    def alone(
        self,
        q: Float[Tensor, "B H L D"],
        queries: Layout,
        k: Float[Tensor, "B K S D"],
        v: Float[Tensor, "B K S D"],
        keys: Layout,
        scale: float,
    ) -> Float[Tensor, "B H L D"]:
        """See `DerivedKeys`: on CUDA with the groups of all levels in one operator."""
        if several_flex.refuse_queries(q):
            return super().alone(q, queries, k, v, keys, scale)
        sets, above = [Set(k.shape[2], keys, None, self._near(queries, keys))], list(self._up(keys))
        for number, level in above:
            seen = self._far(queries, level.groups, number + 1)
            sets.append(Set(level.groups.valid.shape[1], level.groups, level.log_count, seen))
        columns = several_flex.columns_for([each.columns for each in sets])
        k, v = with_means(k, v, stages_of(keys, [level for _, level in above], columns, k))
        return several_flex.run_joined(q, queries, k, v, sets, scale)

    def in_place(
        self,
        q: Float[Tensor, "B H L D"],
        queries: Layout,
        k: Float[Tensor, "B K L D"],
        v: Float[Tensor, "B K L D"],
    ) -> Float[Tensor, "B H L D"]:
        """See `DerivedKeys`: each process takes the means of its own tokens, and who sees a group the mean of those."""
        K, D, sets = k.shape[1], k.shape[3], []
        plans = queries.plan(("gathered levels", self.block, self.causal), lambda: self._gathering(queries.placement))
        both = torch.cat([k, v], -1)  # [B, K, n, 2 · D]
        for number, (plan, level) in enumerate(plans):
            both = both if level is None else level.mean(both)
            kind = "keys" if level is None else "means"
            found = gathered(both.transpose(1, 2).flatten(2), plan, kind).unflatten(2, (K, 2 * D)).transpose(1, 2)
            keys, values = found.chunk(2, 3)
            if level is None:
                sets.append(Keys(keys, values, plan.groups, seen=self._near(queries, plan.groups)))
                continue
            weight = tensor_of(np.log(plan.tokens.clip(min=1)), q.device)
            seen = self._far(queries, plan.groups, number)
            sets.append(Keys(keys, values, plan.groups, weight=weight, seen=seen))
        return attend_to_several(q, queries, sets, scale=self.scale, causal=self.causal)

    def _gathering(self, placement: Placement) -> list[tuple[Gathered, Level | None]]:
        """Of the tokens, and of each level: what is gathered, and the level of this process's own tokens."""
        whole = placement.whole
        each = [Placement.chosen(whole, columns) for columns in placement.columns]
        ranges = self._near_ends(whole.host.position)
        tokens = [Parts(layout.host, np.ones_like(layout.host.position)) for layout in each]
        found: list[tuple[Gathered, Level | None]] = [(gathering(placement, tokens, *ranges, mean=True), None)]
        for number, _ in self._up(whole):
            made = [levels(layout, number + 1)[number] for layout in each]
            parts = [Parts(level.groups.host, _counts(level)) for level in made]
            low, high = (
                np.concatenate(ends) for ends in zip(*self._far_ends(whole.host.position, number + 1), strict=True)
            )
            found.append((gathering(placement, parts, low, high, mean=True), made[placement.rank]))
        return found

    def _up(self, keys: Layout) -> Any:
        """(0, level 1), (1, level 2), ...: as many as there are pairs for."""
        host = keys.host
        last = int(np.where(host.valid, host.position, 0).max(initial=0)) // self.block
        return enumerate(levels(keys, max(0, last.bit_length() - 1)))

    def _near(self, queries: Layout, keys: Layout) -> Visible:
        """What is seen key by key."""

        def find() -> tuple[Visible, Layout]:
            return (between(queries, keys, *self._near_ends(queries.host.position)),), keys

        # the plan keeps what the key's id is of
        return queries.plan(("near", id(keys), self.block, self.causal), find)[0]

    def _far(self, queries: Layout, groups: Layout, level: int) -> Visible:
        """What is seen in groups of this level: in the blocks beside the own one, but for what the finer level has."""

        def find() -> tuple[Visible, Layout]:
            ends = self._far_ends(queries.host.position, level)
            return tuple(between(queries, groups, low, high) for low, high in ends), groups

        return queries.plan(("far", id(groups), level, self.block, self.causal), find)[0]

    def _near_ends(self, at: Array) -> tuple[Array, Array]:
        """Positions from the first up to the second, without it, which tokens at these positions see."""
        own = at // self.block * self.block
        return own - self.block, at + 1 if self.causal else own + 2 * self.block

    def _far_ends(self, at: Array, level: int) -> list[tuple[Array, Array]]:
        """The same of groups of a level, in one range or two."""
        half = self.block // 2
        fine = at // (half << level)  # which block of the level below
        own = fine // 2
        found = [((own - 1) * self.block, (fine - 1) * half)]
        return found if self.causal else [*found, ((fine + 2) * half, (own + 2) * self.block)]


def _counts(level: Level) -> Array:
    """How many tokens each group of a level has; 0 where there is none."""
    host = level.groups.host
    return np.rint(np.exp(level.log_count.numpy(force=True))).astype(np.int64) * host.valid
