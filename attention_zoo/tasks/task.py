"""What a task is: endless training batches that can be resumed, fixed evaluation sets, and how to score them.

Letters: B rows of a batch, L tokens of a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attention_zoo.contract import Tokens

IGNORED = -100
"""Target of a token that is not scored."""


class Batch(NamedTuple):
    """One step's rows.

    Fields:
        ids: [B, L] long, what the model reads; of an encoder-decoder, what its decoder does.
        targets: [B, L] long, what the model should say at each token (already shifted for language modelling);
            `IGNORED` where nothing is asked. [B] for tasks whose objective is "classify".
        tokens: padding, packing and global flags; None where every token is valid and all belong together.
        fresh: [B], True where the row starts something new, so that a recurrent state must not enter it.
        types: [B, L] long, the token types (BERT's segments); None where there are none.
        source: [B, S] long, what an encoder reads; None without one.
        source_tokens: as `tokens`, of the source.
        labels: further targets by name, [B] long each: one more answer for the row, beside that for its tokens.
        groups: integers by name, of the targets' shape: what the scored tokens are told apart by, such as the
            "distance" to the evidence. Negative where a token belongs to no group.
        source_seen: [B, S], of which tokens of the source the decoder sees what the encoder made of them; the encoder
            reads all. None: of all.
    """

    ids: Int[Tensor, "B L"]
    targets: Int[Tensor, "B L"] | Int[Tensor, " B"]
    tokens: Tokens | None
    fresh: Bool[Tensor, " B"]
    types: Int[Tensor, "B L"] | None = None
    source: Int[Tensor, "B S"] | None = None
    source_tokens: Tokens | None = None
    labels: Mapping[str, Int[Tensor, " B"]] = MappingProxyType({})
    groups: Mapping[str, Tensor] = MappingProxyType({})
    source_seen: Bool[Tensor, "B S"] | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with every tensor changed."""
        return Batch(*(_changed(field, change) for field in self))

    def tensors(self) -> list[Tensor]:
        """All of the batch, in one order."""
        found: list[Tensor] = []

        def take(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self.each(take)
        return found

    def to(self, device: Any) -> Batch:
        """The same batch on another device."""
        return self.each(lambda tensor: tensor.to(device))

    def rows(self, part: slice | Tensor) -> Batch:
        """Some of the rows, as gradient accumulation needs them."""
        return self.each(lambda tensor: tensor[part])


def _changed(field: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if field is None:
        return None
    if isinstance(field, Tokens):
        return Tokens(*map(change, field))
    if isinstance(field, Mapping):
        return {name: change(tensor) for name, tensor in field.items()}
    return change(field)


def joined(batches: Sequence[Batch]) -> Batch:
    """The rows of batches of the same lengths, one after another."""
    first = batches[0]
    if len(batches) == 1:
        return first
    parts = iter(zip(*(batch.tensors() for batch in batches), strict=True))
    return first.each(lambda _: torch.cat(next(parts)))


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
        objective: what a model is trained for, a word of `training.objective.OBJECTIVES`: "causal_lm", "masked_lm",
            "classify" (one answer for the row), "label" (one for each token), "seq2seq" (an encoder reads a source).
            It says the model's head and direction.
        classes: number of answers where the objective is "classify" or "label", or `labels` has one for the row.
        streams: whether row b of one batch goes on in row b of the next, so that a recurrent state is of use.
        global_tokens: whether rows have tokens that see and are seen by all. Where they have none, weights that only
            such tokens need are not built.
        lessons: first steps of training whose rows are easier, and may be shorter: the first ones do not tell what a
            run takes. The place in such batches is {"step": n}.
        metric: name of the main metric among those of `score`.
        better: whether a higher or a lower main metric is better.
    """

    name: ClassVar[str]
    objective: ClassVar[str] = "causal_lm"
    streams: ClassVar[bool] = False
    global_tokens: bool = False
    lessons: int = 0
    metric: ClassVar[str]
    better: ClassVar[Literal["higher", "lower"]]
    vocab: int
    classes: int | None = None

    def check(self, seq_len: int) -> None:
        """Raise a ValueError where rows of `seq_len` tokens cannot be made; cheap, called before anything is built."""

    def describe(self, seq_len: int) -> dict[str, Any]:
        """What the data are, as JSON values. `digest` names their content: other data, another result."""
        raise NotImplementedError

    def sample(self, seq_len: int) -> Batch | None:
        """One row as a model would read it, where that takes no reading of the whole data; None elsewhere."""
        return None

    def train_batches(self, batch_size: int, seq_len: int, seed: int) -> Batches:
        """Endless batches [batch_size, seq_len], a function of the arguments alone."""
        raise NotImplementedError

    def evaluation_sets(self, batch_size: int, seq_len: int) -> Mapping[str, Iterable[Batch]]:
        """Fixed sets; each can be iterated again and again and gives the same batches.

        "validation", or the first without one, is looked at during training, and by it runs are stopped. A run's result
        is that on "test", where there is one, else that on the first.
        """
        raise NotImplementedError

    def chance(self, seq_len: int) -> float | None:
        """The main metric of a blind guess; None where it has no meaning."""
        return None

    def baselines(self, seq_len: int) -> dict[str, float]:
        """The main metric that trivial rules reach on the set of a run's result: what a model has to beat."""
        return {}

    def further_baselines(self, seq_len: int) -> dict[str, dict[str, float]]:
        """The same for metrics beside the main one, by the metric's name."""
        return {}

    def share(self) -> None:
        """Make what every run of these options needs and takes long, so that forked processes have it; default nothing.

        In numpy alone: threads do not survive a fork.
        """

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
