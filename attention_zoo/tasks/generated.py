"""Tasks whose rows are drawn: endless training rows and fixed sets, of which no row is ever in two.

A row is drawn from a generator that is keyed by (task, split, seed, step) and then kept or thrown away by a hash of
what the model reads: one row in eight is for validation, one for test, the rest for training. So the splits never meet,
whatever the seed and however few rows there are. A task draws rows and says nothing of splits:

    class Parity(Generated):
        name, objective, metric, better = "parity", "classify", "accuracy", "higher"
        vocab, classes = 2, 2

        def draw(self, random, rows, length):
            ids = random.integers(0, 2, (rows, length))
            return of(ids, ids.sum(1) % 2)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from traceback import extract_tb
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from attention_zoo.contract import Tokens
from attention_zoo.options import Positive, checked
from attention_zoo.rules import shown
from attention_zoo.tasks.task import IGNORED, Batch, Task, digest, generator, joined

PARTS = {"test": (0,), "validation": (1,), "train": (2, 3, 4, 5, 6, 7)}
"""Eighths of all rows that are of a split."""
TRIES = 200
"""Draws in a row without a single row of the split, after which there is taken to be none."""


class Setting(NamedTuple):
    """What rows are asked for.

    Fields:
        length: tokens of a row.
        changes: (option, value) of `draw` that differ from the task's own.
    """

    length: int
    changes: tuple[tuple[str, Any], ...] = ()


class Generated(Task):
    """Base of tasks that draw their rows. A subclass gives `draw`, and `guesses` for its baselines.

    Attributes, of which a subclass without a constructor of its own has three as options:
        examples: number of distinct training rows, rounded up to whole batches; None draws new ones for ever.
        test: lengths of further evaluation sets.
        test_examples: rows of each evaluation set.
        disjoint: whether rows of one split never stand in another. False where a task is to learn one fixed table.
    """

    disjoint: ClassVar[bool] = True
    examples: int | None = None
    test: Sequence[Any] = ()
    test_examples: int = 1000

    @checked
    def __init__(
        self,
        *,
        examples: Positive | None = None,
        test: Sequence[Positive] | None = None,
        test_examples: Positive | None = None,
    ):
        for name, given in (("examples", examples), ("test", test), ("test_examples", test_examples)):
            if given is not None:
                setattr(self, name, given)

    def draw(self, random: np.random.Generator, rows: int, length: int, **changes: Any) -> Batch:
        """`rows` rows of `length` tokens, a function of the task's options and of what `random` gives."""
        raise NotImplementedError

    def guesses(self, batch: Batch) -> dict[str, Tensor]:
        """What trivial rules answer, by the rule's name, each of the shape of `targets`. They must not read those."""
        return {}

    def trained(self, seq_len: int) -> list[tuple[Setting, float]]:
        """What is trained on, and how large a share of the batches each setting has."""
        return [(Setting(seq_len), 1.0)]

    def tested(self, seq_len: int) -> dict[str, Setting]:
        """Further evaluation sets by name."""
        return {f"length_{length}": Setting(length) for length in self.test}

    def need(
        self, seq_len: int, least: int, why: str, lengths: Sequence[int] | None = None, others: str = "task.test"
    ) -> None:
        """Raise a ValueError for a length below `least`, naming the option that it is of.

        Args:
            lengths: those that must be as long; None: of all sets, where `test` lists plain lengths.
            others: the option that those other than `seq_len` are of.
        """
        for length in (seq_len, *self.test) if lengths is None else lengths:
            if length < least:
                option = "seq_len" if length == seq_len else others
                raise ValueError(f"{self.name}: {option} must be at least {least}, {why}, got {length}")

    def sample(self, seq_len: int) -> Batch:
        self.check(seq_len)
        return self.batch("test", ("digest",), 1, self.trained(seq_len)[-1][0])

    def describe(self, seq_len: int) -> dict[str, Any]:
        return {"digest": digest([tensor.numpy().tobytes() for tensor in self.sample(seq_len).tensors()])}

    def batch(self, split: str, key: Sequence[int | str], rows: int, setting: Setting) -> Batch:
        """Rows of a split that depend on `key`, the setting and the task's options alone.

        Raises:
            ValueError: if there seem to be no rows of this split.
        """
        length, changes = setting
        random = generator(self.name, split, *key, length, *(f"{name}={value}" for name, value in changes))
        if not self.disjoint:
            return self._drawn(random, rows, setting)
        found: list[Batch] = []
        missing, vain = rows, 0
        while missing > 0:
            drawn = self._drawn(random, math.ceil(missing * 8 / len(PARTS[split]) * 1.1) + 8, setting)
            kept = np.flatnonzero(np.isin(part_of(drawn), PARTS[split]))[:missing]
            if len(kept):
                found.append(drawn.rows(torch.from_numpy(kept)))
            missing, vain = missing - len(kept), 0 if len(kept) else vain + 1
            if vain == TRIES:
                raise ValueError(
                    f"{self.name}: rows of {length} tokens must be enough for every split, got none for {split} in "
                    f"{TRIES} draws; give options by which rows differ more"
                )
        return joined(found)

    def _drawn(self, random: np.random.Generator, rows: int, setting: Setting) -> Batch:
        with self._placed("draw"):
            found = self.draw(random, rows, setting.length, **dict(setting.changes))
        if not isinstance(found, Batch):
            raise ValueError(f"{type(self).__name__}.draw must return a Batch, such as `of` makes, got {shown(found)}")
        return found

    @contextmanager
    def _placed(self, method: str) -> Iterator[None]:
        """Errors of other people's code say where they come from; ours are sentences."""
        kind = type(self)
        try:
            yield
        except Exception as error:
            if kind.__module__.startswith(__package__):
                raise
            code = getattr(getattr(kind, method), "__code__", None)
            source = None if code is None else code.co_filename
            lines = [frame.lineno for frame in extract_tb(error.__traceback__) if frame.filename == source]
            place = f", line {lines[-1]} of {kind.__module__}" if lines else ""
            raise ValueError(f"{kind.__name__}.{method}{place}: {type(error).__name__}: {error}") from error

    def train_batches(self, batch_size: int, seq_len: int, seed: int) -> GeneratedBatches:
        self.check(seq_len)
        return GeneratedBatches(self, batch_size, seq_len, seed)

    def evaluation_sets(self, batch_size: int, seq_len: int) -> Mapping[str, GeneratedSet]:
        self.check(seq_len)
        main = self.trained(seq_len)[-1][0]
        sample = self.sample(seq_len)
        if sample.targets.ndim == (1 if self.objective == "classify" else 2):  # else the batch itself is refused
            self._guessed(sample)  # what is wrong is said before training, not after
        sets = {split: GeneratedSet(self, batch_size, split, main) for split in ("validation", "test")}
        for name, setting in self.tested(seq_len).items():
            self.batch("test", (), 1, setting)  # so is what has no rows
            sets[name] = GeneratedSet(self, batch_size, "test", setting)
        return sets

    def baselines(self, seq_len: int) -> dict[str, float]:
        whole = self.batch("test", (), self.test_examples, self.trained(seq_len)[-1][0])
        asked = whole.targets != IGNORED
        return {
            name: float((guess == whole.targets)[asked].double().mean()) for name, guess in self._guessed(whole).items()
        }

    def _guessed(self, batch: Batch) -> dict[str, Tensor]:
        """`guesses`, with an error that says what they must be."""
        kind, shape = type(self).__name__, tuple(batch.targets.shape)
        with self._placed("guesses"):
            found = self.guesses(batch)
        if not isinstance(found, dict):
            raise ValueError(f"{kind}.guesses must return a dict, got {shown(found)}")
        for name, guess in found.items():
            if not isinstance(guess, Tensor) or tuple(guess.shape) != shape:
                got = tuple(guess.shape) if isinstance(guess, Tensor) else shown(guess)
                raise ValueError(f"{kind}.guesses: {name} must be a tensor of the targets' shape, {shape}, got {got}")
        return found


class GeneratedBatches:
    """Training batches; the place in them is a single number."""

    def __init__(self, task: Generated, batch_size: int, seq_len: int, seed: int):
        self.task, self.batch_size, self.seed, self.step = task, batch_size, seed, 0
        self.settings, shares = zip(*task.trained(seq_len))
        self.shares = np.array(shares) / sum(shares)

    def __iter__(self) -> GeneratedBatches:
        return self

    def __next__(self) -> Batch:
        index = self.step
        if self.task.examples is not None:
            index %= -(-self.task.examples // self.batch_size)
        self.step += 1
        key = (self.seed, index)
        choice = generator(f"{self.task.name}-mixture", *key).choice(len(self.settings), p=self.shares)
        return self.task.batch("train", key, self.batch_size, self.settings[choice])

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = int(state["step"])


class GeneratedSet:
    """One evaluation set: the same rows whatever the training seed."""

    def __init__(self, task: Generated, batch_size: int, split: str, setting: Setting):
        self.task, self.batch_size, self.split, self.setting = task, batch_size, split, setting

    def __iter__(self) -> Iterator[Batch]:
        whole = self.task.batch(self.split, (), self.task.test_examples, self.setting)
        for start in range(0, self.task.test_examples, self.batch_size):
            yield whole.rows(slice(start, start + self.batch_size))


def of(
    ids: np.ndarray,
    targets: np.ndarray,
    *,
    valid: np.ndarray | None = None,
    is_global: np.ndarray | None = None,
    types: np.ndarray | None = None,
    source: np.ndarray | None = None,
    source_valid: np.ndarray | None = None,
    labels: Mapping[str, np.ndarray] | None = None,
    groups: Mapping[str, np.ndarray] | None = None,
) -> Batch:
    """A batch of rows that all start something new, from arrays; see `Batch`.

    Args:
        valid, source_valid: [B, L] bool; None: every token is.
        is_global: [B, L] bool, tokens that see and are seen by all; None: none is.
    """
    tokens = None
    if valid is not None or is_global is not None:
        valid = np.ones(ids.shape, bool) if valid is None else valid
        flags = None if is_global is None else torch.from_numpy(is_global)
        tokens = Tokens.of(torch.from_numpy(valid), is_global=flags)
    return Batch(
        _long(ids), _long(targets), tokens, torch.ones(len(ids), dtype=torch.bool),
        None if types is None else _long(types),
        None if source is None else _long(source),
        None if source_valid is None else Tokens.of(torch.from_numpy(source_valid)),
        {name: _long(value) for name, value in (labels or {}).items()},
        {name: _long(value) for name, value in (groups or {}).items()},
    )  # fmt: skip


def _long(array: np.ndarray) -> Tensor:
    if (kind := np.asarray(array).dtype).kind not in "biu":  # what is cut to whole numbers would be other data
        raise ValueError(f"a batch is of whole numbers, got {kind} of shape {np.shape(array)}")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))


def part_of(batch: Batch) -> np.ndarray:
    """[B], in 0...7: which eighth of all rows each row is in, by a hash of what the model reads."""
    total = np.zeros(len(batch.ids), np.uint64)
    for name, ids in (("ids", batch.ids), ("source", batch.source)):
        if ids is not None:
            weights = generator("part", name).integers(0, 2**64, ids.shape[1], dtype=np.uint64) | np.uint64(1)
            total += ((ids.numpy().astype(np.uint64) + np.uint64(1)) * weights).sum(1, dtype=np.uint64)
    total ^= total >> np.uint64(31)
    total *= np.uint64(0x9E3779B97F4A7C15)  # odd, its bits without order: the upper ones depend on all of the sum's
    return (total >> np.uint64(61)).astype(np.int64)
