"""What each configured command does with its config, and how it says that something failed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from omegaconf import DictConfig

from attention_zoo.commands.launch import FAILED, OK, REFUSED
from attention_zoo.settings import settings
from attention_zoo.stopping import REQUEUE

T = TypeVar("T")
WAIT_S = 1.0
"""Between two looks at a folder that another job works in."""


@dataclass(frozen=True)
class Outcome:
    """How one job ended. It travels back from other processes and machines.

    Fields:
        code: the exit code that it alone would give.
        line: what went wrong, in one line; empty where nothing did.
        told: whether the line was written to standard error where the job ran.
        state: "ended"; or what another try may change: "busy" with somebody else, "lost" to who killed it, "stopped".
    """

    code: int = OK
    line: str = ""
    told: bool = False
    state: Literal["ended", "busy", "lost", "stopped"] = "ended"

    @classmethod
    def of(cls, row: Mapping[str, Any], folder: Path, *, told: bool = False) -> Outcome:
        """Of a training.

        Args:
            row: what it came to.
            folder: where.
            told: see above.
        """
        from attention_zoo.training.saying import report_line

        if row["status"] == "ok":
            return cls()
        code = REFUSED if row.get("refused") else FAILED
        return cls(code, report_line(row, folder), told, "lost" if row["status"] == "lost" else "ended")


@dataclass(frozen=True)
class Command:
    """A command whose config Hydra composes.

    Fields:
        about: what it is for, in a line.
        register: makes its schema known to Hydra.
        run: does it, with the composed config.
        cell: describes what one job of a sweep does (`jobs.cell.Cell`), from its config and Hydra's, where several
            processes may share the sweep; None: a job is run as it would be alone.
        words: what the command line may call a key otherwise: a key that is called as a folder of conf is cannot be
            given a word, since Hydra takes it for a choice of that group.
    """

    about: str
    register: Callable[[], None]
    run: Callable[[DictConfig], Outcome]
    cell: Callable[[DictConfig, Any], Any] | None = None
    words: Mapping[str, str] = field(default_factory=dict)

    def named(self, word: str) -> str:
        """A word of the command line with the key as the config calls it."""
        key, equals, value = word.partition("=")
        return f"{self.words.get(key, key)}{equals}{value}"


def _train(composed: DictConfig) -> Outcome:
    from hydra.core.hydra_config import HydraConfig

    from attention_zoo.parallel.launched import launched
    from attention_zoo.training.config import plain
    from attention_zoo.training.run import run_folder, run_training
    from attention_zoo.training.saying import show

    config = plain(composed, HydraConfig.get())
    folder = run_folder(config)
    if config["dry"]:
        from attention_zoo.jobs.ahead import one_ahead

        if launched().first:
            print(one_ahead(config, folder))
        return Outcome()
    row = run_training(config, folder)
    show(row, folder)
    ended = Outcome.of(row, folder, told=True)
    # another process of this run has died: the same command goes on from what is saved
    return replace(ended, code=REQUEUE) if row["status"] == "lost" else ended


def _cell(composed: DictConfig, hydra: Any) -> Any:
    from attention_zoo.jobs.cell import cell_of

    return cell_of(composed, hydra)


def _benchmark(composed: DictConfig) -> Outcome:
    from attention_zoo.jobs.benchmark import ahead, benchmark

    config = settings(composed)
    if config.dry:
        print(ahead(config))
        return Outcome()
    return _outcome(_in_turn(lambda: benchmark(config)))


def _compare(composed: DictConfig) -> Outcome:
    from attention_zoo.files import read_jsonl
    from attention_zoo.jobs.compare import ahead, compare

    config = settings(composed)
    if config.dry:
        print(ahead(config))
        return Outcome()
    return _outcome(read_jsonl(_in_turn(lambda: compare(config)).with_name("results.jsonl")))


def _in_turn(work: Callable[[], T]) -> T:
    """Jobs of a sweep that share a folder wait for one another; who is alone is told that somebody else works there."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from attention_zoo.locks import Busy

    while True:
        try:
            return work()
        except Busy:
            if HydraConfig.get().mode != RunMode.MULTIRUN:
                raise
        time.sleep(WAIT_S)


def _report(composed: DictConfig) -> Outcome:
    from attention_zoo.report.again import report

    report(settings(composed))
    return Outcome()


def _advise(composed: DictConfig) -> Outcome:
    from attention_zoo.advice.command import advise

    advise(settings(composed))
    return Outcome()


def _plan(composed: DictConfig) -> Outcome:
    from attention_zoo.advice.plan import plan

    plan(settings(composed))
    return Outcome()


def _status(composed: DictConfig) -> Outcome:
    from attention_zoo.jobs.status import status

    status(settings(composed))
    return Outcome()


def _sync(composed: DictConfig) -> Outcome:
    from attention_zoo.jobs.sync import sync

    wrong = sync(settings(composed))
    return Outcome(FAILED, wrong) if wrong else Outcome()


def _inspect(composed: DictConfig) -> Outcome:
    from attention_zoo.inspect.command import inspect

    print(f"wrote {inspect(settings(composed))}")
    return Outcome()


def _context(composed: DictConfig) -> Outcome:
    from attention_zoo.inspect.context import context

    print(f"wrote {context(settings(composed))}")
    return Outcome()


def _convert(composed: DictConfig) -> Outcome:
    from attention_zoo.integrations.weights.commands import run_convert

    run_convert(settings(composed))
    return Outcome()


def _evaluate(composed: DictConfig) -> Outcome:
    from attention_zoo.integrations.weights.commands import run_evaluate

    run_evaluate(settings(composed))
    return Outcome()


def _search(composed: DictConfig) -> Outcome:
    from hydra.core.hydra_config import HydraConfig

    from attention_zoo.jobs.search import options_of, words_of

    options = options_of(composed)
    from attention_zoo.jobs.trials import search

    wrong = search(options, words_of(list(HydraConfig.get().overrides.task)))
    return Outcome(FAILED, wrong) if wrong else Outcome()


def _outcome(rows: Iterable[Mapping[str, Any]]) -> Outcome:
    rows = list(rows)
    words = failures(rows)
    # of trainings that cannot be meant: nothing else went wrong
    refused = not failures([row for row in rows if not row.get("refused")])
    return Outcome(REFUSED if refused else FAILED, words) if words else Outcome()


WORDS = {"speed": "cells", "peer": "matches", "budget": "budgets", "quality": "trainings", "portrait": "pictures"}


def failures(rows: Iterable[Mapping[str, Any]]) -> str:
    """How many results failed, in words; empty where none did.

    What a mechanism does not do is no failure. That a cell runs out of memory or time is what it was measured for; a
    training or a picture that does was to end otherwise.
    """
    every, failed = Counter[str](), Counter[str]()
    for row in rows:
        if row["kind"] not in WORDS:
            continue
        every[row["kind"]] += 1
        fine = {"ok", "unsupported"}
        if row["kind"] not in ("quality", "portrait"):
            fine |= {"oom", "oom_predicted", "timeout", "missing"}
        failed[row["kind"]] += row["status"] not in fine
    parts = [f"{number} of {every[kind]} {WORDS[kind]}" for kind, number in failed.items() if number]
    return f"{' and '.join(parts)} failed" if parts else ""


def _register_train() -> None:
    from attention_zoo.training.config import register

    register()


def _register_benchmark() -> None:
    from attention_zoo.measure.config import register

    register()


def _register_compare() -> None:
    from attention_zoo.jobs.compare import register

    register()


def _register_report() -> None:
    from attention_zoo.report.again import register

    register()


def _register_advise() -> None:
    from attention_zoo.advice.command import register

    register()


def _register_plan() -> None:
    from attention_zoo.advice.plan import register

    register()


def _register_status() -> None:
    from attention_zoo.jobs.status import register

    register()


def _register_sync() -> None:
    from attention_zoo.jobs.sync import register

    register()


def _register_search() -> None:
    from attention_zoo.jobs.search import register

    register()


def _register_inspect() -> None:
    from attention_zoo.inspect.command import register

    register()


def _register_context() -> None:
    from attention_zoo.inspect.context import register

    register()


def _register_weights() -> None:
    from attention_zoo.integrations.weights.commands import register

    register()


COMMANDS = {
    "train": Command("train one model, or with -m a sweep of them", _register_train, _train, _cell),
    "benchmark": Command("measure time and memory over lengths, or beside peers", _register_benchmark, _benchmark),
    "compare": Command("measure and train every mechanism: one report", _register_compare, _compare),
    "search": Command("search for the options with which a model learns best", _register_search, _search),
    "report": Command("draw a report from results, without running anything", _register_report, _report),
    "advise": Command(
        "say which attention fits, sees, learns and costs what, from rows",
        _register_advise,
        _advise,
        words={"task": "problem"},
    ),
    "plan": Command("say on paper what long sequences take on several devices", _register_plan, _plan),
    "status": Command("show how far sweeps are, and how to go on", _register_status, _status),
    "sync": Command("send to W&B what it lacks, from our own files", _register_sync, _sync),
    "inspect": Command("show what trained runs attend to on a text", _register_inspect, _inspect),
    "context": Command("measure how much context trained language models use", _register_context, _context),
    "convert": Command(
        "turn a pretrained checkpoint into a model of ours, perhaps a long one", _register_weights, _convert
    ),
    "evaluate": Command("score a language model on a text", _register_weights, _evaluate),
}


def register_all() -> None:
    """Make the schema of every command known to Hydra."""
    for command in COMMANDS.values():
        command.register()
