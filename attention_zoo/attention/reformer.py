"""Reformer: attend where hashes agree. Kitaev, Kaiser & Levskaya 2020, "Reformer", §2-3.

Queries and keys share one projection; k_j = q_j / |q_j|. In each of several rounds tokens are hashed by random
rotations, sorted by bucket and cut into chunks; a token attends to its own chunk and the one before (in sorted order):

    h(x)  = argmax [xR; -xR]
    out_i = sum_r exp(z_r - logsumexp_r z_r) · softmax over the window of round r,    z_r = its log-sum-exp

O(rounds·L·(log L + chunk)) time, O(L) memory (ops/lsh/hashing.py, ops/lsh/chunks.py).

Paper: queries have 1/sqrt(D). A token attends inside its bucket, as far as the window shows it, and a key that several
rounds show counts once; to itself only where it sees nothing else. Causal order is of time, inside the sorted chunks.
The stack is reversible; layers may alternate with local ones (`reformer.local`).

Released code (trax; Hugging Face follows it): scores have no 1/sqrt(D). Windows show all buckets, and a key counts each
time that it is shown. All rounds form one ring of chunks, in which the first looks back into the round before. The
future and the token itself are hidden by large finite numbers, which costs digits where a token sees nothing else.
Lengths are filled up to whole chunks, padding is sorted last, and buckets are counted by the filled length; Hugging
Face keeps the count of the first call.

Here: 1/sqrt(D) as in the paper (`scale=1.0` is theirs); buckets and repeats as in the code (`attend_across_buckets`,
`correct_duplicates` are the paper's). Each round is a ring of its own (`wrap="reference"` is theirs). A token attends
to itself only where no round shows it anything else, exactly, and then its output is its value. Buckets follow the
valid tokens of each document; padding is not sorted, no length needs to be a multiple of the chunk, and documents in a
row have chunks of their own (`fill` is theirs, `hash_seed` its rotations). Chunks follow buckets, not time, so that a
causal token may look at the next chunk, too. Causality is of values: a later token may change the bucket count and move
borders of chunks, its value never leaks.

Checked: against Hugging Face's LSHSelfAttention and reformer-pytorch (one and four rounds, causal and not, padding,
their key norm; with buckets replayed, and with nothing replayed), in tests/oracles/reformer.py, and its
ReversibleSequence. Largest error of outputs and gradients 9e-7 in float32 and 3e-15 in float64; 3e-12 for tokens that
see only themselves, by their large numbers (tests/oracles/README.md). Whole models: tests/test_weights_reformer.py.
Token by token: tests/references/reformer.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from attention_zoo.attention.operator import one_operator, refuse_export
from attention_zoo.attention.reformer_buckets import FACTORS, Documents, Hashed, HashedAttention, factors_of, since
from attention_zoo.contract import Abilities, Operands, Output, Source, at_least, of_tensor
from attention_zoo.layout.host import tensor_of
from attention_zoo.layout.kernel import check_name, choose, explain
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.ledger import Columns, Horizon, Ledger, behind, goes_on, none
from attention_zoo.layout.ragged import put, take
from attention_zoo.ops.lsh import hashing, step
from attention_zoo.ops.lsh import layout as lsh_layout
from attention_zoo.ops.lsh.arcs import shows_arcs
from attention_zoo.ops.lsh.call import KERNELS, WHOLE, HashedCall
from attention_zoo.ops.lsh.plan import HashedPlan
from attention_zoo.ops.lsh.whole import Together
from attention_zoo.ops.softmax.function import zeros_for
from attention_zoo.options import LARGEST, Around, Chunk, Fill, Seed
from attention_zoo.place import place_of
from attention_zoo.rules import OneOf
from attention_zoo.tokens import Tokens

Buckets = Annotated[int, Field(ge=2, le=2**16)]
MOST_PAIRS = 2**24
"""Of a chunk's queries and the keys of its window, so that one chunk's scores fit into memory."""


class Reformer(HashedAttention):
    """LSH attention with shared queries and keys.

    `Output.choices` are the buckets, int32 [B, H, rounds, L, 1]; handed back they are replayed. With a state every call
    equals the last rows of the whole prefix in one call. The prefix is hashed again when its bucket count changes, that
    is when its length doubles; until then a step hashes its own tokens only. Single-token steps without gradients cost
    the same at any length but for that, and for sorting the prefix now and then (ops/lsh/step.py); they need
    consecutive tokens, the defaults of `wrap`, `look_ahead`, `fill` and `kernel`. Other calls sort the whole prefix.

    `rounds` may be changed on a built layer: more in evaluation are slower and nearer to full attention.

    Args:
        rounds: hash rounds; each has rotations of its own.
        chunk: tokens in a chunk.
        look_back: chunks before the own one that a chunk attends to.
        look_ahead: chunks after it.
        buckets: an even number; or two, whose product hashes at the cost of their sum; None: for each document the
            largest power of two up to 2·tokens/chunk (the paper's count), in two factors above 64.
        attend_across_buckets: whether a window shows tokens of other buckets, too.
        correct_duplicates: whether a key that several rounds show counts once (the paper's log N_ij) or each time.
        wrap: "row": the first chunk looks back to the last of its own round; "reference": to that of the round before.
        key_norm_epsilon: k = q / sqrt(|q|² + D·epsilon); Hugging Face uses 1e-6.
        fill: 0: a document has as many chunks and buckets as its tokens ask for. Else, as Hugging Face does: as many as
            its `Tokens.length` (padding, too, where this counts columns) filled up to a multiple of `fill` asks for, so
            that chunks of padding stand at the end of each round; and a window that goes round a short ring shows a
            chunk twice.
        split_above: more buckets than this are the product of two factors; for `buckets=None`.
        hash_seed: draw rotations as Hugging Face does with this `hash_seed` on a CPU, the same in every call and every
            layer; None: by `seed` and `resample`.
        resample: draw rotations at each training call from torch's default generator; False: `seed` decides them, as
            it always does in evaluation.
        kernel: auto | triton | whole | short | chunks | dense; dense materialises all pairs of tokens, for checking.
        shared: the options of `Attention`.
    """

    name = "reformer"
    declared = Abilities(
        causality="values",
        carry="prefix",
        two_sided=True,
        global_tokens="none",
        cross=False,
        compute="loglinear",
        activations="linear",
        state="linear",
        adjustable=("rounds",),
    )
    tiny = {"chunk": 4, "rounds": 2}
    companions = {"local": "attention_zoo.attention.reformer_local.ReformerLocal"}

    def __init__(
        self,
        *,
        rounds: Annotated[int, Field(ge=1, le=1024)] = 4,
        chunk: Chunk = 64,
        look_back: Around = 1,
        look_ahead: Around = 0,
        buckets: Annotated[Buckets | Sequence[Buckets] | None, Field(description=FACTORS)] = None,
        attend_across_buckets: bool = True,
        correct_duplicates: bool = False,
        wrap: Annotated[str, OneOf("row", "reference")] = "row",
        key_norm_epsilon: Annotated[float, Field(ge=0, le=10_000, description="at least 0")] = 0.0,
        fill: Fill = 0,
        split_above: Annotated[int, Field(ge=2, le=LARGEST)] = hashing.DIRECT,
        hash_seed: Seed | None = None,
        resample: bool = True,
        kernel: str = "auto",
        **shared: Any,
    ):
        super().__init__(**shared)
        check_name(self.name, KERNELS, kernel)
        if (pairs := chunk * chunk * (1 + look_back + look_ahead)) > MOST_PAIRS:
            raise ValueError(f"chunk, look_back, look_ahead must give at most {MOST_PAIRS} pairs a chunk, got {pairs}")
        self.rounds, self.chunk, self.look_back, self.look_ahead = rounds, chunk, look_back, look_ahead
        self.factors = None if buckets is None else factors_of(buckets)
        self.attend_across_buckets, self.correct_duplicates = attend_across_buckets, correct_duplicates
        self.wrap, self.key_norm_epsilon, self.resample, self.kernel = wrap, key_norm_epsilon, resample, kernel
        self.fill, self.split_above, self.hash_seed = fill, split_above, hash_seed
        width = self.heads * self.head_width
        self.to_qk = nn.Linear(self.dim, width, bias=self.bias_into)
        self.to_v = nn.Linear(self.dim, width, bias=self.bias_into)
        self.to_out = nn.Linear(width, self.dim, bias=self.bias_out)

    def core(self, batch: int, length: int) -> Operands:
        """See `Attention`: queries that are the keys, and values; hashing and sorting are part of the call."""
        return Operands(((batch, self.heads, length, self.head_width),) * 2, by_rows=True)

    @property
    def keeps(self) -> tuple[Any, ...]:
        return Hashed, self.heads * self.head_width

    def initial_state(self, batch_size: int) -> Hashed:
        at_least(0, batch_size=batch_size)
        device, dtype = place_of(self)
        empty = torch.zeros(batch_size, 0, self.heads * self.head_width, device=device, dtype=dtype)
        buckets = torch.zeros(batch_size, self.heads, 0, 0, 1, dtype=torch.int32, device=device)
        return Hashed(Columns.of(none(batch_size, device), empty, empty, buckets))

    def forward(
        self,
        x: Float[Tensor, "B L E"],
        tokens: Tokens | None = None,
        *,
        state: Hashed | None = None,
        source: Source | None = None,
        choices: Int[Tensor, "B H R L 1"] | None = None,
    ) -> Output:
        """See `Layer`."""
        if isinstance(tokens, Layout) and tokens.goes_with(x, state, source, choices):
            return self._attended(x, tokens)
        return self._checked(x, tokens, state=state, source=source, choices=choices)

    @one_operator
    def _checked(
        self, x: Tensor, tokens: Tokens | None = None, *, state: Any = None, source: Any = None, choices: Any = None
    ) -> Output:
        x, layout = self.enter(x, tokens, state, source, choices)
        self._check_choices(choices, *x.shape[:2])
        return self._attended(x, layout, state, choices)

    def _attended(
        self, x: Tensor, layout: Layout, state: Hashed | None = None, choices: Tensor | None = None
    ) -> Output:
        L, keys, ledger = x.shape[1], layout, None
        if state is None:
            rows = x.flatten(0, 1) if layout.dense else take(x, layout)  # padding is not projected
            flat_qk, flat_v = (to(rows).unflatten(-1, (self.heads, -1)) for to in (self.to_qk, self.to_v))
        else:
            qk, v = self.to_qk(x), self.to_v(x)
            if choices is None and self._is_step(layout, state):
                return self._step(qk, v, layout, state)
            qk, v = (torch.cat(pair, 1) for pair in zip(state.columns.held, (qk, v)))
            ledger = self._behind(state.columns.ledger, layout)
            keys = ledger.layout
            flat_qk, flat_v = (take(y, keys).unflatten(-1, (self.heads, -1)) for y in (qk, v))
        at_least(1, rounds=self.rounds)
        is_new, documents = since(keys, L), self._documents(keys)
        buckets = self._buckets(flat_qk.detach(), documents, is_new, layout, state, choices)
        asked = None if state is None else tensor_of(is_new.nonzero()[0], x.device)
        out = self._attend(flat_qk, flat_v, lambda: buckets, documents, keys, asked)
        hidden = put(self.to_out(out.flatten(1)), layout)
        padded = put(buckets.movedim(-1, 0), keys).permute(0, 2, 3, 1)[..., None]
        new = None
        if ledger is not None:
            seeded = choices is None and not self._draws
            columns = Columns.of(ledger, qk, v, padded if seeded else padded[:, :, :0])
            new = Hashed(columns.settle(layout, horizon=CURRENT)[0])
        return Output(hidden, new, choices=padded[..., padded.shape[3] - L :, :])

    def remember(self, x: Float[Tensor, "B L E"], tokens: Tokens, *, state: Hashed) -> Hashed:
        """See `Attention`: projections alone; the next call hashes."""
        x, layout = self.enter(x, tokens, state, None)
        qk, v, buckets = state.columns.buffers
        columns = state.columns._replace(buffers=(qk, v, buckets[:, :, :0]))
        added = (self.to_qk(x), self.to_v(x), buckets.new_zeros(len(x), self.heads, 0, x.shape[1], 1))
        return Hashed(columns.append(layout, *added, horizon=CURRENT).settle(layout, horizon=CURRENT)[0])

    def _behind(self, ledger: Ledger, layout: Layout) -> Ledger:
        """With a call's tokens, all of which are sorted anew."""
        if not ledger.filled:
            return Ledger.of(layout, ledger.reserve)
        key = ("behind", id(ledger.fields), ledger.filled, ledger.own)
        keys = layout.plan(key, lambda: (behind(ledger.layout, layout), ledger))[0]
        return Ledger.of(keys, ledger.reserve)

    def _is_step(self, layout: Layout, state: Hashed) -> bool:
        """Whether this call is one more token for each row, whose windows can be found without sorting."""
        plain = self.kernel == "auto" and self.wrap == "row" and not self.look_ahead and self.rounds > 0
        ledger = state.columns.ledger
        if not plain or layout.valid.shape[1] != 1 or torch.is_grad_enabled() or not ledger.steady:
            return False
        sizes = ledger.host.valid.sum(1)
        return goes_on(ledger, layout) and self._keeps_buckets(state) and self._hash_alike(sizes, sizes + 1)

    def _step(self, qk: Float[Tensor, "B 1 HD"], v: Float[Tensor, "B 1 HD"], layout: Layout, state: Hashed) -> Output:
        """See ops/lsh/step.py."""
        q = qk[:, 0].unflatten(-1, (self.heads, -1))
        sizes = state.columns.ledger.host.valid.sum(1) + 1
        one = Documents(np.ones_like(sizes), sizes)
        found = self._buckets(q, one, np.ones(len(q), bool), layout, None, None)  # [H, R, B]
        mine = found.movedim(-1, 0)[..., None, None]
        columns = state.columns.append(layout, qk, v, mine, horizon=CURRENT)
        all_qk, all_v, all_buckets = columns.held
        keys, known = columns.tokens, state.sorted
        all_qk, all_v = (x.unflatten(-1, (self.heads, -1)) for x in (all_qk, all_v))
        options: Any = {"scale": self.scale, "epsilon": self.key_norm_epsilon, "once": self.correct_duplicates}
        if self.attend_across_buckets and sizes.max() <= self.chunk * (1 + self.look_back):
            # every window holds the whole document, in whatever order
            others = keys.valid[:, None].float()
            others[..., -1] = 0
            out = step.attend_to_all(q, all_qk, all_v, others, **options)
        else:
            moved = columns.ledger.fields is not state.columns.ledger.fields
            known = None if moved else known
            known, column, seen = self._windows(columns, known, all_buckets[..., 0], mine[..., 0], sizes)
            if columns.filled <= column.shape[-1]:
                shown = step.times_shown(column, seen, columns.filled)
                out = step.attend_to_all(q, all_qk, all_v, shown, **options)
            else:
                every_qk, every_v = (x.unflatten(-1, (self.heads, -1)) for x in columns.buffers[:2])
                out = step.attend(q, every_qk, every_v, column, seen, last=columns.filled - 1, **options)
        return Output(self.to_out(out.flatten(1))[:, None], Hashed(columns, known), choices=mine)

    def _windows(
        self,
        columns: Columns,
        known: step.Sorted | None,
        buckets: Int[Tensor, "B H R S"],
        mine: Int[Tensor, "B H R 1"],
        sizes: Int[np.ndarray, " B"],
    ) -> tuple[step.Sorted, Int[Tensor, "B H RW"], Bool[Tensor, "B H RW"]]:
        """The order that is known from here on; columns in the last tokens' windows, and which of them they see."""
        keys = columns.tokens
        if known is None or known.is_stale(columns.filled):
            count = max(math.prod(self.factors_for(size)) for size in sizes.tolist())
            known = step.Sorted.of(buckets[..., :-1], keys.valid[:, :-1], count)
        left = columns.filled - sizes[:, None, None, None]
        fillers = keys.plan("fillers", lambda: tensor_of(left, buckets.device))
        column, seen = step.windows(known, buckets, fillers, chunk=self.chunk, look_back=self.look_back)
        if not self.attend_across_buckets:
            seen = seen & (buckets.gather(-1, column) == mine)
        return known, column.flatten(2), seen.flatten(2)

    def attend(
        self,
        qk: Float[Tensor, "B H L D"],
        v: Float[Tensor, "B H L D"],
        tokens: Tokens | None = None,
        *,
        choices: Int[Tensor, "B H R L 1"] | None = None,
    ) -> Float[Tensor, "B H L D"]:
        """The mechanism on given queries (which are also the keys, before their norm) and values, without projections.

        Args:
            tokens: default all valid from position 0. At padding the output is zero.
            choices: buckets to use; default those of the layer's rotations (see `resample` and `seed`).
        """
        refuse_export(self.name)
        if qk.ndim != 4 or qk.shape != v.shape or (qk.shape[1], qk.shape[3]) != (self.heads, self.head_width):
            wanted = f"[batch, {self.heads}, length, {self.head_width}]"
            raise ValueError(f"qk and v must both be {wanted}, got {tuple(qk.shape)} and {tuple(v.shape)}")
        B, _, L, _ = qk.shape
        layout = Layout.plain(B, L, qk.device) if tokens is None else Layout.of(tokens)
        if layout.valid.shape != (B, L):
            raise ValueError(f"tokens must have shape {(B, L)}, got {tuple(layout.valid.shape)}")
        self._check_choices(choices, B, L)
        if not (B and L):
            return zeros_for(v, (qk, v))
        flat_qk, flat_v = (take(y.transpose(1, 2), layout) for y in (qk, v))
        documents, is_new = self._documents(layout), np.ones(len(flat_qk), bool)
        buckets = partial(self._buckets, flat_qk.detach(), documents, is_new, layout, None, choices)
        return put(self._attend(flat_qk, flat_v, buckets, documents, layout, None), layout).transpose(1, 2)

    def choices_shape(self, batch: int, length: int) -> tuple[int, ...]:
        return batch, self.heads, self.rounds, length, 1

    def _check_choices(self, choices: Tensor | None, B: int, L: int) -> None:
        wanted = self.choices_shape(B, L)
        if choices is not None and (not isinstance(choices, Tensor) or choices.shape != wanted):
            raise ValueError(f"choices must be buckets of shape {wanted}, got {of_tensor(choices)}")

    def _attend(
        self,
        qk: Float[Tensor, "M H D"],
        v: Float[Tensor, "M H D"],
        buckets: Callable[[], Int[Tensor, "H R M"]],
        documents: Documents,
        keys: Layout,
        asked: Int[Tensor, " m"] | None,
    ) -> Float[Tensor, "m H D"]:
        """`buckets` are not made where nobody asks for them."""
        if not len(qk if asked is None else asked):
            return v[:0]
        call = self._described(documents, len(qk if asked is None else asked), qk.device, qk.dtype)
        kernel = choose(self.name, KERNELS, self.kernel, call)
        if kernel is WHOLE:
            together = Together(documents.sizes, self.causal, self.scale, self.key_norm_epsilon)
            return kernel.run(call)(qk, v, together)
        shape: Any = {name: getattr(self, name) for name in ("rounds", "chunk", "look_back", "look_ahead")}
        shape |= {"across_rounds": self.wrap == "reference", "slots": documents.slots if self.fill else None}
        make = partial(lsh_layout.laid_out, documents.sizes, **shape, device=qk.device)
        layout = keys.plan(("hashed", *list(shape.values())[:5], self.fill), make)
        plan = HashedPlan(
            layout=layout,
            buckets=buckets(),
            inside=not self.attend_across_buckets,
            asked=asked,
            causal=self.causal,
            scale=self.scale,
            epsilon=self.key_norm_epsilon,
            once=self.correct_duplicates,
        )
        return kernel.run(call)(qk, v, plan)

    def _described(self, documents: Documents, asked: int, device: torch.device, dtype: torch.dtype) -> HashedCall:
        chunks = -(-documents.slots // self.chunk)
        window = self.chunk * (1 + self.look_back + self.look_ahead)
        around = 1 if self.wrap == "reference" or self.fill else 1 + self.look_back + self.look_ahead
        longest, tokens = int(documents.sizes.max()), int(documents.sizes.sum())
        slots = self.rounds * min(asked, int(chunks.sum())) * self.chunk
        arcs = shows_arcs(
            chunks, rounds=self.rounds, look_back=self.look_back, look_ahead=self.look_ahead, filled=bool(self.fill),
            across_rounds=self.wrap == "reference", inside=not self.attend_across_buckets,
        )  # fmt: skip
        return HashedCall(
            device, dtype, self.chunk, self.head_width, once=self.correct_duplicates,
            inside=not self.attend_across_buckets, slots=slots, pairs=slots * window, rounds=self.rounds,
            all_pairs=len(documents.sizes) * longest * max(1, longest * asked // tokens),
            chunks=self.rounds * int(chunks.max()), arcs=arcs,
            whole=asked == tokens and bool(chunks.max() <= around), longest=longest,
        )  # fmt: skip

    def explain_kernels(self, length: int, device: torch.device, dtype: torch.dtype) -> list[tuple[str, str | None]]:
        """See `Attention`."""
        documents = self._documents(Layout.plain(1, length, device))
        return explain(KERNELS, self._described(documents, length, device, dtype))


CURRENT = Horizon()
"""Tokens of finished documents are never asked for again."""
