"""Quality on a fixed set: mean loss and accuracy over the scored answers, by what came before and by where they stand.

An encoder-decoder is scored twice: with the right answers before each (teacher forcing), and writing freely, where a
row counts as right only if all of it is. Its encoder runs once for both.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attention_zoo.model.generate import generate
from attention_zoo.parallel.rows import own_rows
from attention_zoo.parallel.sequence.cut import Cut
from attention_zoo.parallel.sharded import is_sharded
from attention_zoo.parallel.world import Team, World
from attention_zoo.tasks.task import IGNORED, Batch, Task
from attention_zoo.training.following import readings_of
from attention_zoo.training.objective import MAIN, Answers, answers, counts
from attention_zoo.training.precision import Precision
from attention_zoo.training.streams import Stream

BINS = 32
EACH = 16
"""Groups that are shown one by one; more are gathered in bins that double."""


class Evaluation(NamedTuple):
    """Result on one set.

    Fields:
        metrics: by name.
        loss_by_position: [position, loss in nats] where rows are streams.
        by_group: for each of the batches' `groups`: [group, accuracy, loss in nats, scored answers] in rising order;
            where there are many, a bin is named by its largest member.
        readings: what the model's modules say of themselves; see `following`.
        seq_len: tokens of the longest rows.
        tokens_per_second: tokens read, those of a source included, over the time of the whole evaluation.
    """

    metrics: dict[str, float]
    loss_by_position: list[list[float]]
    by_group: dict[str, list[list[float]]] = {}
    readings: dict[str, list[float]] = {}
    seq_len: int = 0
    tokens_per_second: float = 0.0


class _Seen:
    """What was scored so far."""

    def __init__(self) -> None:
        self.answers: dict[str, list[Answers]] = defaultdict(list)
        self.places: list[Tensor] = []
        self.groups: dict[str, list[Tensor]] = defaultdict(list)
        self.exact: list[Tensor] = []

    def gather(self, team: Team) -> None:
        """What all processes were told of each batch, in the order of its rows."""
        if team.size == 1:
            return
        told = team.gathered((dict(self.answers), self.exact))
        for name in self.answers:
            by_batch = zip(*(answers[name] for answers, _ in told))
            self.answers[name] = [Answers(*(torch.cat(parts) for parts in zip(*each))) for each in by_batch]
        self.exact = [torch.cat(each) for each in zip(*(exact for _, exact in told))]

    def nothing(self, batch: Batch, *, encoded: bool) -> None:
        """Of a batch that this process has no row of."""
        for name in counts(batch):
            self.answers[name].append(Answers(torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.bool)))
        if encoded:
            self.exact.append(torch.zeros(0, dtype=torch.bool))

    def whole(self, name: str) -> Answers:
        return Answers(*(torch.cat(parts) for parts in zip(*self.answers[name])))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Task,
    batches: Iterable[Batch],
    *,
    precision: Precision,
    device: str,
    carry: bool,
    stop: Callable[[], object] = lambda: None,
    decode: Mapping[str, Any] | None = None,
    world: World | None = None,
    cut: Cut | None = None,
) -> Evaluation | None:
    """Score a model on one set. The model is put in evaluation mode and left in the mode it had.

    Args:
        carry: whether the state crosses from batch to batch, as in training.
        stop: asked before every batch; where it answers anything true, the evaluation is given up.
        decode: how an encoder-decoder writes, see `generate`; default greedily.
        world: the processes that share the rows of every batch, of which all get the same result; default this one
            alone. `stop` must answer alike in all.
        cut: of the processes that share the tokens of a row; default there is one.

    Returns:
        the task's metrics; `exact_match` where rows have a source; for each of the batches' `labels` its own loss and
        accuracy. None where it was given up.
    """
    was_training = model.training
    model.eval()
    team, sharded = (World() if world is None else world).data, is_sharded(model)
    cut = Cut(model, Team()) if cut is None else cut
    stream, seen, longest, read, began = Stream(model, carry=carry), _Seen(), 0, 0, time.perf_counter()
    before = torch.zeros(0, dtype=torch.long)
    try:
        for batch in batches:
            if stop():
                return None
            length = batch.ids.shape[1]
            longest = max(longest, length if batch.source is None else batch.source.shape[1])
            read += batch.ids.numel() + (0 if batch.source is None else batch.source.numel())
            before = torch.where(batch.fresh, 0, before) if len(before) == len(batch.fresh) else batch.fresh.long() * 0
            scored = batch.targets != IGNORED
            if task.streams:
                seen.places.append((before[:, None] + torch.arange(length))[scored])
            for name, group in batch.groups.items():
                seen.groups[name].append(group[scored])
            before = before + length
            anew = bool(batch.fresh.all())
            mine = own_rows(len(batch.ids), team)
            kept = mine.stop - mine.start
            if not kept and not sharded:
                seen.nothing(batch, encoded=batch.source is not None)
                continue
            # where parameters are shared out, who has no row reads one nevertheless: the others need its shares
            part = batch.rows(mine if kept else slice(0, 1)) if team.size > 1 else batch
            moved = part.to(device)
            with precision.autocast():
                if batch.source is not None:
                    moved = stream.encoded(moved)
                    seen.exact.append(_exact(model, moved, decode or {"greedy": True}))
                moved = cut(moved)
                output = stream(moved, anew=anew)
            if not kept:
                seen.nothing(batch, encoded=False)
                continue
            said = {name: Answers(x.losses.double().cpu(), x.hits.cpu()) for name, x in answers(output, moved).items()}
            for name, each in cut.whole(said, moved).items():
                seen.answers[name].append(each)
    finally:
        model.train(was_training)
    seen.gather(team)
    rate = read / max(time.perf_counter() - began, 1e-9)
    return _evaluation(task, seen)._replace(readings=readings_of(model), seq_len=longest, tokens_per_second=rate)


def _evaluation(task: Task, seen: _Seen) -> Evaluation:
    main = seen.whole(MAIN)
    if not len(main.losses):
        raise ValueError(f"{task.name}: an evaluation set must ask for something, got targets that are all {IGNORED}")
    metrics = task.score(float(main.losses.mean()), float(main.hits.double().mean()))
    for name in seen.answers.keys() - {MAIN}:
        said = seen.whole(name)
        metrics |= {f"{name}_loss": float(said.losses.mean()), f"{name}_accuracy": float(said.hits.double().mean())}
    if seen.exact:
        metrics["exact_match"] = float(torch.cat(seen.exact).double().mean())
    by_position = _by_position(torch.cat(seen.places), main.losses) if seen.places else []
    return Evaluation(metrics, by_position, {name: _by_group(torch.cat(g), main) for name, g in seen.groups.items()})


def _exact(model: nn.Module, batch: Batch, decode: Mapping[str, Any]) -> Tensor:
    """[B], whether the model writes all of a row's targets by itself, from its first token on."""
    written = generate(model, batch.ids[:, :1], steps=batch.targets.shape[1], source=batch.source, **decode)  # type: ignore[arg-type]
    return ((written == batch.targets) | (batch.targets == IGNORED)).all(1).cpu()


def _by_position(place: Tensor, loss: Tensor) -> list[list[float]]:
    total = int(place.max()) + 1
    width = -(-total // BINS)
    bin = place // width
    count = torch.bincount(bin).double()
    mean = torch.bincount(bin, loss) / count
    return [[min(i * width + width // 2, total - 1), float(mean[i])] for i in range(len(count)) if count[i]]


def _by_group(group: Tensor, main: Answers) -> list[list[float]]:
    kept = group >= 0
    group, loss, hit = group[kept], main.losses[kept], main.hits[kept].double()
    if len(group.unique()) > EACH:  # 0, 1, 2, 3-4, 5-8, 9-16, ...
        group = torch.where(group > 1, 2.0 ** group.clamp(min=1).double().log2().ceil(), group.double()).long()
    return [
        [int(name), float(hit[group == name].mean()), float(loss[group == name].mean()), int((group == name).sum())]
        for name in group.unique().tolist()
    ]


def is_better(task: Task, new: float, old: Any) -> bool:
    """Whether a value of the task's main metric beats the best so far (None: nothing so far)."""
    return old is None or (new > old if task.better == "higher" else new < old)
