"""BigBird: blocks of tokens that see a window of blocks, a few random blocks, and global ones. Zaheer et al. 2020, §2.

ITC (internal): the first and the last block of a document are global: they see and are seen by all. ETC (external):
`extra_global_tokens` learned tokens in front are global instead. O(L · block · (window_blocks + random + 2)).

Paper: each row of query blocks is linked to `random` blocks, any of the sequence. Decoders use full attention.

Released code (Hugging Face follows it): has ITC alone. In training it links rows within the first blocks of a sequence
alone, at 1,024, 3,072 and 4,096 tokens by a plan that may pick a block twice, which then counts twice; in evaluation
all links are to block 0 (bigbird_plans.py has the details). It hides padding by -10,000, plans by the padded length,
and attends to everything up to 2·random + 5 blocks.

Here: the paper's links by default, since the released ones reach the beginning of a long text alone;
`plan="reference"` and `"reference_eval"` replay the released ones, which pretrained weights were trained with. Ours
are fixed by `seed`, head and block row (and, two-sided, by the number of blocks): nothing is drawn at a call. The
causal form, which the paper leaves to full attention, keeps what lies in the past: the window is the own block and
those before it, links are to earlier blocks alone, and the first block is global. A last block may be shorter than the
others. Padding is hidden, and counts for no length.

Checked: against Hugging Face's block-sparse BigBird with replayed links, in training, in evaluation, at lengths of the
older plan and short enough for full attention (tests/oracles/bigbird.py). Largest error of outputs 7e-7 in float32
(3e-6 at 1,024 tokens, where theirs itself is 2e-6 from its float64 result) and 6e-15 in float64, of gradients 3e-6 and
3e-15 (tests/oracles/README.md). The links' distribution is tested by itself (tests/test_bigbird.py); ETC, which nobody
else offers, against the dense definition.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from attention_zoo.attention.bigbird_plans import LinkPlan, Reference, Uniform
from attention_zoo.attention.pattern import PatternAttention, hide
from attention_zoo.contract import Abilities, Tokens
from attention_zoo.layout.reach import Blocks
from attention_zoo.options import Chunk, Natural, Positive
from attention_zoo.place import place_of
from attention_zoo.rules import OneOf, Unsupported


class BigBird(PatternAttention):
    """Block-sparse attention: window, random and global blocks.

    Args:
        block: tokens of a block.
        window_blocks: blocks of the window, odd: 3 is the own block and one on each side.
        random: blocks that each row of query blocks is linked to at random, for each head; all where fewer are left.
        plan: "uniform" (the paper), or what the released code does in training ("reference") or in evaluation
            ("reference_eval"); those are two-sided, with window_blocks=3, and `seed` is the layer's number.
        extra_global_tokens: learned tokens that the skeleton puts in front and marks global (ETC); with any, no block
            is global. 0: first and last block are (ITC).
        sink_logit: learn for each head the score of one more key, whose value is zero; see `full`.
        kernel: auto | linked_row | row | short | triton | covered | flex | blocks | tiles | dense.
        shared: the options of `Attention`.
    """

    name = "bigbird"
    tiny = {"block": 4, "random": 1}
    declared = Abilities(
        causality="strict",
        carry="prefix",
        two_sided=True,
        global_tokens="any",
        cross=False,
        compute="linear",
        activations="linear",
        state="linear",
        positions=("none", "rotary", "alibi"),
        grouped_heads=True,
    )

    def __init__(
        self,
        *,
        block: Positive = 64,
        window_blocks: Chunk = 3,
        random: Annotated[int, Field(ge=0, le=1024)] = 3,
        plan: Annotated[str, OneOf("uniform", "reference", "reference_eval")] = "uniform",
        extra_global_tokens: Natural = 0,
        sink_logit: bool = False,
        kernel: str = "auto",
        **shared: Any,
    ):
        if window_blocks % 2 == 0:
            raise ValueError(f"window_blocks must be odd, the own block and as many on each side, got {window_blocks}")
        super().__init__(sink_logit=sink_logit, kernel=kernel, **shared)
        self.needs_columns = self.causal  # two-sided, FlexAttention is first, which takes holes
        self.block, self.window_blocks, self.random, self.plan = block, window_blocks, random, plan
        self.extra_global_tokens = extra_global_tokens
        self.side = window_blocks // 2
        self._reference: Reference | None = None
        if plan == "uniform":
            ends = 0 if extra_global_tokens else 1
            self._plan: LinkPlan = Uniform(self.seed, self.heads, random, self.side, ends, self.causal)
        else:
            self._check_reference()
            self._plan = self._reference = Reference(self.seed, self.heads, random, block, plan == "reference")
        self.reach = Blocks(
            block,
            self.links,
            most=(2 if self._reference else 0) + self.side + 1 + (0 if self.causal else self.side) + random,
            knows_length=not self.causal,
            whole=self._whole if self._reference else None,
            weights="counts",
        )

    def _check_reference(self) -> None:
        if self.causal:
            raise Unsupported(
                self.name, f"plan={self.plan} with causal=True", "the released plans need to know the whole length",
                "plan=uniform",
            )  # fmt: skip
        if self.extra_global_tokens:
            raise Unsupported(
                self.name, f"plan={self.plan} with extra_global_tokens={self.extra_global_tokens}",
                "the released plans have global blocks", "plan=uniform",
            )  # fmt: skip
        if self.window_blocks != 3:
            raise ValueError(f"window_blocks must be 3 with plan={self.plan}, got {self.window_blocks}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2^32) with plan={self.plan}, got {self.seed}")

    # --- the definition --------------------------------------------------------------------------------------------

    def mark(self, tokens: Tokens) -> Tokens:
        """First and last block (causal: the first) of the uniform plan. The released plans weigh theirs, in `bias`."""
        if self.extra_global_tokens or self._reference:
            return tokens
        block = tokens.position // self.block
        end = block == 0
        if not self.causal:
            end = end | (block == self._blocks_of(tokens.length) - 1)
        return tokens._replace(is_global=tokens.is_global | (end & tokens.valid))

    def bias(self, queries: Tokens, keys: Tokens) -> Float[Tensor, "B #H L S"]:
        """log of how often the key's block is among those of the query's row: window, ends and picks."""
        row, column = queries.position // self.block, (keys.position // self.block)[:, None, None, :]
        blocks = self._blocks_of(queries.length)
        listed = (row[:, None, :, None] - column).abs() <= self.side
        if self._reference:
            listed = listed | (column == 0) | (column == blocks[:, None, :, None] - 1)
        times = listed.short()
        for pick in self._plan.picks(row, blocks).unbind(-1):
            times = times + (pick.transpose(1, 2)[..., None] == column)
        if not self._reference:
            return hide(times > 0)  # the paper's plan lists no block twice
        everything = self._whole(row, blocks)
        times = times.masked_fill(everything[:, None, :, None], 1)
        counts = torch.arange(self.random + 2, device=times.device)
        logs = counts.to(torch.promote_types(place_of(self)[1], torch.float32)).log()
        return logs[times.long()]

    # --- as lists ----------------------------------------------------------------------------------------------------

    def links(
        self, row: Int[Tensor, "#B R"], blocks: Int[Tensor, "#B #R"]
    ) -> tuple[Int[Tensor, "#B H R m"], Float[Tensor, "#B H R m"]]:
        """What `bias` says, as a list of key blocks for each row; see `Blocks`."""
        row, blocks = torch.broadcast_tensors(row, blocks)
        offset = torch.arange(-self.side, 1 if self.causal else self.side + 1, device=row.device)
        fixed = row[..., None] + offset
        if not self.causal:
            fixed = torch.where(fixed < blocks[..., None], fixed, -1)
        if self._reference:
            ends = torch.stack([torch.zeros_like(blocks), blocks - 1], -1)
            fixed = torch.cat([torch.where((row[..., None] - ends).abs() > self.side, ends, -1), fixed], -1)
        picks = self._plan.picks(row, blocks).transpose(1, 2)
        found = torch.cat([picks, fixed[:, None].expand(*picks.shape[:-1], -1)], -1)
        # a block that is listed again is left to its first place, which weighs for all
        same = found[..., :, None] == found[..., None, :]
        again = same.tril(-1).any(-1) | (found < 0)
        weight = same.sum(-1).double().log()
        return found.clamp(min=0), weight.masked_fill(again, -torch.inf)

    def _whole(self, row: Any, blocks: Any) -> Any:
        """Rows of the released plans' global blocks; everyone in a document that is too short for links."""
        assert self._reference
        return (row == 0) | (row == blocks - 1) | (blocks <= self._reference.full_blocks)

    def _blocks_of(self, length: Tensor) -> Tensor:
        return (length + self.block - 1) // self.block
