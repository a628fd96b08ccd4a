"""All that a run works with, built from its options: model, trainer, evaluation sets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from attention_zoo.model.encoder_decoder import EncoderDecoder
from attention_zoo.model.norm import BatchNorm
from attention_zoo.parallel.dropout import by_rank
from attention_zoo.parallel.recompute import prepare
from attention_zoo.parallel.refusals import refuse, refuse_compiled_states
from attention_zoo.parallel.rows import check_divides
from attention_zoo.parallel.sequence.cut import Asked, refuse_options
from attention_zoo.parallel.sharded import apart, is_sharded, shard, whole_state
from attention_zoo.parallel.world import World
from attention_zoo.tasks.task import Batch, Task
from attention_zoo.training.ahead import drawn_ahead
from attention_zoo.training.building import build
from attention_zoo.training.checking import check_batch, figure
from attention_zoo.training.config import TrainConfig, device_of
from attention_zoo.training.evaluate import Evaluation, evaluate
from attention_zoo.training.groups import DecodeConfig, TrainerConfig
from attention_zoo.training.models import model_of
from attention_zoo.training.objective import objective_of
from attention_zoo.training.pieces import pieces
from attention_zoo.training.precision import Precision
from attention_zoo.training.seed import seed_all
from attention_zoo.training.trainer import Trainer
from attention_zoo.training.tuned import merged


@dataclass(frozen=True)
class Assembly:
    """What is trained, what trains it, and what it is scored on.

    Fields:
        sets: name -> batches; the first is the main one, which is watched while it trains.
        tokens: of a training batch; an evaluation reads as many at a time.
        carry: whether the model's state crosses from batch to batch.
        decode: how an encoder-decoder writes in evaluation.
        world: the processes that do it.
        rebuild: a model of the same config with weights of its own, whole in this process.
    """

    task: Task
    model: nn.Module
    trainer: Trainer
    sets: Mapping[str, Iterable[Batch]]
    tokens: int
    precision: Precision
    carry: bool
    device: str
    decode: Mapping[str, Any]
    world: World
    rebuild: Callable[[], nn.Module]

    @property
    def main(self) -> str:
        """The name of the main set."""
        return next(iter(self.sets))

    def score(self, name: str, stop: Callable[[], object]) -> Evaluation | None:
        """The model on one set; None where `stop` had it given up."""
        # who writes freely calls halves of a model, and each as often as its rows need
        model = self.whole() if isinstance(self.model, EncoderDecoder) else self.model
        return evaluate(
            model, self.task, self.batches(name),
            precision=self.precision, device=self.device, carry=self.carry, stop=stop,
            decode=self.decode, cut=self.trainer.cut, world=self.world,
        )  # fmt: skip

    def batches(self, name: str) -> Iterable[Batch]:
        """Of one set, as they are read."""
        found = self.sets[name]
        return found if self.task.streams else pieces(found, self.tokens, self.world.data.size)

    def whole(self) -> nn.Module:
        """The model as one process has it; where it is shared out a copy, which all processes must ask for."""
        if not is_sharded(self.model):
            return self.model
        state = whole_state(self.model)
        model = self.rebuild().to(self.device)
        model.load_state_dict(state)
        return model.train(self.model.training)

    def finished(self) -> nn.Module:
        """The model as it is saved: whole, and adapters become part of its weights."""
        return merged(self.whole())


def writing(decode: DecodeConfig) -> dict[str, Any]:
    """The arguments of `generate` that a config says.

    Raises:
        ValueError: for options of draws where nothing is drawn.
    """
    said = asdict(decode)
    changed = [f"decode.{name}" for name, value in said.items() if value != getattr(DecodeConfig, name)]
    useless = ", ".join(name for name in changed if name != "decode.beams")
    if decode.beams > 1 and useless:
        raise ValueError(f"decode.beams above 1 takes no {useless}: it draws nothing")
    if decode.greedy and useless:
        raise ValueError(f"{useless} needs decode.greedy=false: the likeliest token is not drawn")
    return said if decode.beams == 1 else {"beams": decode.beams}


def assemble(options: TrainConfig, mechanism: Any, task: Task, world: World | None = None) -> Assembly:
    """Build a run's model and all around it.

    Args:
        mechanism: see `mechanism_of`.
        task: already built.
        world: the processes of the run; default this one alone.
    """
    world = World() if world is None else world
    if world.size == 1:
        world = replace(world, device=device_of(options.device))
    device = world.device
    check_divides(options.batch, options.trainer.accumulate, world.data)
    model = model_of(options, mechanism, task, objective_of(task)).to(device)
    seed_all(options.seed)  # whatever follows draws the same numbers beside every mechanism
    if options.trainer.accumulate > 1 and any(isinstance(part, BatchNorm) for part in model.modules()):
        raise ValueError(
            f"trainer.accumulate must be 1 with norm=batch, whose statistics are those of a whole batch, "
            f"got {options.trainer.accumulate}"
        )
    refuse(model, options.parallel, world, options.trainer.precision)
    if world.size > 1:
        by_rank(model, world.rank)
    prepare(model, recompute=options.parallel.checkpoint, compiled=options.parallel.compile)
    whole = shard(model, world) if world.size > 1 and options.parallel.data == "fsdp" else None
    goes_on = task.streams and getattr(task, "span", None) != 1  # rows of one segment all begin anew
    carry = bool(options.trainer.carry_state and goes_on and getattr(model, "carries", False))
    if world.sequence.size > 1:
        refuse_options(model, Asked(options.parallel.checkpoint, options.parallel.compile, carry))
    refuse_compiled_states(options.parallel, carry)
    if carry:
        check_positions(model, options.seq_len, getattr(task, "span", 1))
    precision = Precision(options.trainer.precision, device)
    optimizer = build(options.optimizer, "optimizer", model=model)
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if whole is not None:
        apart(optimizer)
    trainer = Trainer(
        model,
        optimizer=optimizer,
        schedule=build(options.schedule, "schedule", steps=options.steps),
        batches=drawn_ahead(task.train_batches(options.batch, options.seq_len, options.seed), options.trainer.ahead),
        accumulate=options.trainer.accumulate,
        clip=options.trainer.clip,
        precision=precision,
        carry=carry,
        device=device,
        check=partial(check_batch, task),
        world=world,
        whole=whole,
        order=order,
        copies=options.parallel.copy_states,
    )
    sets = _watched_first(task.evaluation_sets(options.batch, options.seq_len), task, options.trainer)
    figure(task, "chance", task.chance(options.seq_len))  # what is none is said before training, not after

    def rebuild() -> nn.Module:
        with torch.random.fork_rng(devices=[]):  # it draws numbers that training must not miss
            return model_of(options, mechanism, task, objective_of(task))

    return Assembly(
        task, model, trainer, sets, options.batch * options.seq_len, precision, carry, device,
        writing(options.decode), world, rebuild,
    )  # fmt: skip


def _watched_first(
    sets: Mapping[str, Iterable[Batch]], task: Task, trainer: TrainerConfig
) -> Mapping[str, Iterable[Batch]]:
    """The sets with the one first that is looked at in training: validation wherever there is one, and never test where
    that ends a run."""
    if "validation" in sets:
        return {"validation": sets["validation"], **sets}
    for option in ("stop_at", "patience"):
        value = getattr(trainer, option)
        if next(iter(sets)) == "test" and value is not None:
            raise ValueError(
                f"trainer.{option} must be null where a task has no validation set to watch, got {value} for "
                f"{task.name}: a result on test must not say when to stop"
            )
    return sets


def check_positions(model: nn.Module, seq_len: int, span: int) -> None:
    """Refuse rows that go on for more tokens than a table of positions has, before they get there."""
    limit = getattr(getattr(model, "positions", None), "max_length", None)
    if limit is not None and seq_len * span > limit:
        raise ValueError(
            f"task.span must be such that rows stay within the model's {limit} positions, got {span} segments of "
            f"{seq_len} tokens; give fewer, or trainer.carry_state=false, which starts at each segment anew"
        )
