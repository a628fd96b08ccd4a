"""One optimisation step, exactly resumable: forward, backward, clip, step, carry.

Accumulation splits a batch's rows: the parts' gradients add up to those of the whole batch, since each part's loss is
divided by the number of scored tokens of the whole; further losses are means over tokens, and weigh what the part has
of them. A carried state is kept per part. Several processes share the rows first: each draws the whole batch, so that
all know what it asks for, and reads its own rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from attention_zoo.parallel.rows import all_of_part, own_part
from attention_zoo.parallel.sequence.cut import Cut
from attention_zoo.parallel.sharded import Whole
from attention_zoo.parallel.shared import Shared
from attention_zoo.parallel.world import World
from attention_zoo.tasks.task import Batch, Batches
from attention_zoo.training.checkpoint import (
    check_like,
    check_optimizer,
    foreign,
    load_weights,
    pack,
    unpack,
)
from attention_zoo.training.copies import Copied, Copies, nothing_carried
from attention_zoo.training.following import steps_of
from attention_zoo.training.objective import MAIN, counts
from attention_zoo.training.precision import Precision
from attention_zoo.training.reading import Reading, read_by, share_of
from attention_zoo.training.schedule import Schedule
from attention_zoo.training.seed import random_state
from attention_zoo.training.streams import Stream

SENT = "sent"
"""Bytes, summed as losses are."""


class NotFinite(ArithmeticError):
    """A loss or gradient became NaN or infinite; the weights are still those of the step before."""


class Step(NamedTuple):
    """What one step was like: mean loss in nats of the scored tokens, further losses by name, gradient norm before
    clipping, learning rate, tokens read; bytes that processes sent each other since they share the tokens of a row."""

    loss: float
    auxiliary: dict[str, float]
    gradient_norm: float
    lr: float
    tokens: int
    sent: int = 0


class Standing(NamedTuple):
    """Where a run stands between two steps, beside its weights and their averages.

    Fields:
        batches: the place in the data.
        random: of all generators.
        carried: of every process; None where it is not known here.
    """

    batches: dict[str, Any]
    random: dict[str, Any]
    carried: Copied | None


class Trainer:
    """A model in training.

    Args:
        model: already on its device.
        optimizer: over its parameters; the groups' `lr` are those at factor 1.
        schedule: step -> factor on the learning rate.
        batches: endless training batches.
        accumulate: parts that a batch is split into; divides its rows.
        clip: largest norm of the gradient; None leaves it.
        precision: how to compute.
        carry: whether to carry the model's state over consecutive segments.
        check: is shown the first batch, and raises where it is none.
        world: the processes that train it together; default this one alone.
        whole: of a model whose parameters are shared out among them; see `parallel.sharded`.
        order: the optimizer's parameters as it was built with them; default as it has them.
        copies: whether each process has what the rows of all carry; see `parallel.copy_states`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        batches: Batches,
        accumulate: int = 1,
        clip: float | None = 1.0,
        precision: Precision,
        carry: bool,
        device: str,
        check: Callable[[Batch], None] = lambda batch: None,
        world: World | None = None,
        whole: Whole | None = None,
        order: Sequence[torch.Tensor] | None = None,
        copies: bool = True,
    ):
        self.model, self.optimizer, self.schedule, self.batches = model, optimizer, schedule, batches
        self.accumulate, self.clip, self.precision, self.device = accumulate, clip, precision, device
        self.streams = [Stream(model, carry=carry) for _ in range(accumulate)]
        self.after_step = steps_of(model)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.order = self.parameters_by_index() if order is None else list(order)
        self.base_lr = [group["lr"] for group in optimizer.param_groups]
        self.done = 0
        self.check: Callable[[Batch], None] | None = check
        self.world = World(device=device) if world is None else world
        self.shared = Shared(Reading(model), self.world, whole=whole)
        self.cut = Cut(model, self.world.sequence)
        # whoever holds all weights can tell where all stood when a step's communication fails: see `survivors`
        self.tells = self.world.size > 1 and whole is None
        self.copies = Copies(self.world.everybody) if self.tells and carry and copies else None
        self.carried: Copied | None = None
        self.in_flight: Standing | None = None

    def step(self) -> Step:
        """Read one batch and move the weights once.

        Raises:
            NotFinite: for a NaN or infinite loss or gradient, naming the step and what to try.
        """
        factor = self.schedule(self.done)
        for group, lr in zip(self.optimizer.param_groups, self.base_lr):
            group["lr"] = lr * factor
        if self.copies is not None and self.carried is None:
            self.copies.begin([stream.state for stream in self.streams])
            self.carried = self.copies.end()
        self.in_flight = self.standing() if self.tells else None
        batch = next(self.batches)
        if self.check is not None:
            self.check(batch)
            self.check = None
        scored = counts(batch)
        read = batch.ids.numel() + (0 if batch.source is None else batch.source.numel())
        valid, parts = read_by(batch), self.accumulate * self.world.data.size
        anew = all_of_part(batch.fresh, self.accumulate, self.world.data)
        batch = own_part(batch, self.world.data)
        rows = len(batch.ids) // self.accumulate
        pieces = [batch.rows(slice(index * rows, (index + 1) * rows)) for index in range(self.accumulate)]
        shares = [share_of(read_by(piece), valid, parts) for piece in pieces]
        total = dict[str, float]()
        scaler = self.precision.scaler
        self.optimizer.zero_grad(set_to_none=True)
        for index, (stream, share) in enumerate(zip(self.streams, shares, strict=True)):
            part, last = self.cut(pieces[index].to(self.device)), index == self.accumulate - 1
            with self.shared.reducing(last=last):
                with self.precision.autocast():
                    found = self.shared(stream, part, scored, share, anew[index])
                for name, value in found.items():
                    total[name] = total.get(name, 0.0) + float(value.detach())
                if last and self.copies is not None:
                    self.copies.begin([each.state for each in self.streams])
                main = found.pop(MAIN)
                self.shared.backward(scaler.scale(main + sum(found.values())))
        self.shared.finish()
        auxiliary = self.shared.summed(total | {SENT: float(self.cut.sent())})
        loss, sent = auxiliary.pop(MAIN), int(auxiliary.pop(SENT))
        if not math.isfinite(loss + sum(auxiliary.values())):
            raise NotFinite(self._advice(f"the loss became {loss + sum(auxiliary.values())}"))
        scaler.unscale_(self.optimizer)
        norm = self.shared.norm(self.parameters, math.inf if self.clip is None else self.clip)
        # a scaled float16 gradient may overflow: the scaler then skips the step and halves its scale
        if not math.isfinite(norm) and (not scaler.is_enabled() or scaler.get_scale() < 1):
            raise NotFinite(self._advice(f"the gradient's norm became {norm}"))
        carried = None if self.copies is None else self.copies.end()
        # from here to the end of the step nobody else is asked: no peer that dies leaves weights half changed
        scaler.step(self.optimizer)
        scaler.update()
        for after in self.after_step:
            after()
        self.done += 1
        self.carried, self.in_flight = carried, None
        return Step(loss, auxiliary, norm, self.base_lr[0] * factor, read, sent)

    def standing(self) -> Standing:
        """Where the run stood after the last step that was finished, also from within the one after it."""
        if self.in_flight is not None:
            return self.in_flight
        carried = self.carried if self.streams[0].carry else nothing_carried(self.world.size, self.accumulate)
        return Standing(self.batches.state_dict(), random_state(), carried)

    def _advice(self, what: str) -> str:
        tries = [] if self.precision.dtype == torch.float32 else ["trainer.precision=float32"]
        if not self.done:  # no learning rate has had a part in it
            where = "at step 1, with the weights that the run began with: stopped"
        else:
            lr = self.optimizer.param_groups[0]["lr"]
            where = f"at step {self.done + 1} with learning rate {lr:.3g}: stopped"
            tries = ["a smaller optimizer.lr", "a longer schedule.warmup", "a smaller trainer.clip", *tries]
        return f"{what} {where}" + (f"; try {', '.join(tries)}" if tries else "")

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on exactly, but for the generators of random numbers."""
        return {
            "step": self.done,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "batches": self.batches.state_dict(),
            "carried": [pack(stream.state) for stream in self.streams],
        }

    def close(self) -> None:
        """End what draws the batches, where that is a process of its own."""
        if (close := getattr(self.batches, "close", None)) is not None:
            close()

    def parameters_by_index(self) -> list[torch.Tensor]:
        """The optimizer's parameters in the order by which its state names them."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def load_state_dict(self, state: dict[str, Any], path: str | Path) -> None:
        """Go on where the state was taken; `path` is named in errors.

        Raises:
            CheckpointError: for a state that `state_dict` of this trainer cannot have given.
        """
        own = self.state_dict()
        for name in ("step", "scaler", "batches", "carried"):
            check_like(own[name], state[name], name, path)
        if state["step"] < 0:
            raise foreign(path, f"step must be at least 0, got {state['step']}")
        load_weights(self.model, state["model"], path)
        check_optimizer(own["optimizer"], state["optimizer"], self.parameters_by_index(), path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.precision.scaler.load_state_dict(state["scaler"])
        self.batches.load_state_dict(state["batches"])
        self.carried = None
        for stream, carried in zip(self.streams, state["carried"], strict=True):
            stream.state = unpack(carried, self.device)
        self.done = state["step"]
