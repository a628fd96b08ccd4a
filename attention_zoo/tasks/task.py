"""What a task is: endless training batches that can be resumed, fixed evaluation sets, and how to score them.

Letters: B rows of a batch, L tokens of a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor

from attention_zoo.contract import Tokens

IGNORED = -100
"""Target of a token that is not scored."""


class Batch(NamedTuple):
    """One step's rows.

    Fields:
        ids: [B, L] long.
        targets: [B, L] long, what the model should say at each token (already shifted for language modelling);
            `IGNORED` where nothing is asked. [B] for tasks whose head is "classify".
        tokens: padding, packing and global flags; None where every token is valid and all belong together.
        fresh: [B], True where the row starts something new, so that a recurrent state must not enter it.
    """

    ids: Int[Tensor, "B L"]
    targets: Int[Tensor, "B L"] | Int[Tensor, " B"]
    tokens: Tokens | None
    fresh: Bool[Tensor, " B"]

    def to(self, device: Any) -> Batch:
        """The same batch on another device."""
        tokens = None if self.tokens is None else Tokens(*(field.to(device) for field in self.tokens))
        return Batch(self.ids.to(device), self.targets.to(device), tokens, self.fresh.to(device))

    def rows(self, part: slice) -> Batch:
        """Some of the rows, as gradient accumulation needs them."""
        tokens = None if self.tokens is None else Tokens(*(field[part] for field in self.tokens))
        return Batch(self.ids[part], self.targets[part], tokens, self.fresh[part])


class Batches(Protocol):
    """Endless training batches whose place can be saved and restored."""

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]:
        """The place in the data as plain numbers and lists."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken. The iterator must have been made with the same arguments."""
        ...


class Task:
    """Base of all tasks.

    Attributes:
        name: as in conf/task/<name>.yaml.
        vocab: number of token ids.
        head: what the model puts out: "lm" and "tokens" one answer per token, "classify" one per row.
        causal: whether the model may see the past only.
        streams: whether row b of one batch goes on in row b of the next, so that a recurrent state is of use.
        metric: name of the main metric among those of `score`.
        better: whether a higher or a lower main metric is better.
    """

    name: ClassVar[str]
    head: ClassVar[Literal["lm", "tokens", "classify"]] = "lm"
    causal: ClassVar[bool] = True
    streams: ClassVar[bool] = False
    metric: ClassVar[str]
    better: ClassVar[Literal["higher", "lower"]]
    vocab: int

    def check(self, seq_len: int) -> None:
        """Raise a ValueError where rows of `seq_len` tokens cannot be made; cheap, called before anything is built."""

    def describe(self, seq_len: int) -> dict[str, Any]:
        """What the data are, as JSON values. `digest` names their content: other data, another result."""
        raise NotImplementedError

    def train_batches(self, batch_size: int, seq_len: int, seed: int) -> Batches:
        """Endless batches [batch_size, seq_len], a function of the arguments alone."""
        raise NotImplementedError

    def evaluation_sets(self, batch_size: int, seq_len: int) -> Mapping[str, Iterable[Batch]]:
        """Fixed sets, the main one first; each can be iterated again and again and gives the same batches."""
        raise NotImplementedError

    def score(self, loss: float, accuracy: float) -> dict[str, float]:
        """Metrics from the mean cross-entropy in nats and the share of right answers, both over the scored tokens."""
        return {"loss": loss, "accuracy": accuracy}


def generator(*key: int | str) -> np.random.Generator:
    """A stream of random numbers that depends on its whole key and on nothing else (no process state, no clock)."""
    name = hashlib.sha256("/".join(str(part) for part in key).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(name[:16], "big")))


def digest(parts: Sequence[bytes | str]) -> str:
    """16 hexadecimal digits that name the parts and their order."""
    found = hashlib.sha256()
    for part in parts:
        data = part.encode(errors="surrogateescape") if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "big") + data)
    return found.hexdigest()[:16]
