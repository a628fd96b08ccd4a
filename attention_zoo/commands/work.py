"""What each configured command does with its config, and how it says that something failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from attention_zoo.commands.launch import FAILED, OK, REFUSED
from attention_zoo.settings import settings


@dataclass(frozen=True)
class Outcome:
    """How one job ended. It travels back from other processes and machines.

    Fields:
        code: the exit code that it alone would give.
        line: what went wrong, in one line; empty where nothing did.
        told: whether the line was written to standard error where the job ran.
    """

    code: int = OK
    line: str = ""
    told: bool = False


@dataclass(frozen=True)
class Command:
    """A command whose config Hydra composes.

    Fields:
        about: what it is for, in a line.
        register: makes its schema known to Hydra.
        run: does it, with the composed config.
    """

    about: str
    register: Callable[[], None]
    run: Callable[[DictConfig], Outcome]


def _train(composed: DictConfig) -> Outcome:
    from hydra.core.hydra_config import HydraConfig

    from attention_zoo.training.config import plain
    from attention_zoo.training.run import report_line, run_folder, run_training, show

    config = plain(composed, HydraConfig.get())
    folder = run_folder(config)
    row = run_training(config, folder)
    if show(row, folder):
        return Outcome()
    return Outcome(REFUSED if row.get("refused") else FAILED, report_line(row, folder), told=True)


def _benchmark(composed: DictConfig) -> Outcome:
    from attention_zoo.jobs.benchmark import benchmark

    return _outcome(benchmark(settings(composed)))


def _compare(composed: DictConfig) -> Outcome:
    from attention_zoo.files import read_jsonl
    from attention_zoo.jobs.compare import compare

    return _outcome(read_jsonl(compare(settings(composed)).with_name("results.jsonl")))


def _report(composed: DictConfig) -> Outcome:
    from attention_zoo.report.again import report

    report(settings(composed))
    return Outcome()


def _inspect(composed: DictConfig) -> Outcome:
    from attention_zoo.inspect.command import inspect

    print(f"wrote {inspect(settings(composed))}")
    return Outcome()


def _convert(composed: DictConfig) -> Outcome:
    from attention_zoo.integrations.weights.commands import run_convert

    run_convert(settings(composed))
    return Outcome()


def _evaluate(composed: DictConfig) -> Outcome:
    from attention_zoo.integrations.weights.commands import run_evaluate

    run_evaluate(settings(composed))
    return Outcome()


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


def _register_inspect() -> None:
    from attention_zoo.inspect.command import register

    register()


def _register_weights() -> None:
    from attention_zoo.integrations.weights.commands import register

    register()


COMMANDS = {
    "train": Command("train one model, or with -m a sweep of them", _register_train, _train),
    "benchmark": Command("measure time and memory over lengths, or beside peers", _register_benchmark, _benchmark),
    "compare": Command("measure and train every mechanism: one report", _register_compare, _compare),
    "report": Command("draw a report from results, without running anything", _register_report, _report),
    "inspect": Command("show what trained runs attend to on a text", _register_inspect, _inspect),
    "convert": Command(
        "turn a pretrained checkpoint into a model of ours, perhaps a long one", _register_weights, _convert
    ),
    "evaluate": Command("score a language model on a text", _register_weights, _evaluate),
}


def register_all() -> None:
    """Make the schema of every command known to Hydra."""
    for command in COMMANDS.values():
        command.register()
