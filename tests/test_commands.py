"""Every command ends in one line and an exit code that a script can act on, in a checkout and installed, alone and in
sweeps; its help says a word on each option."""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attention_zoo_start
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

import attention_zoo as zoo
from attention_zoo import stopping
from attention_zoo.commands import help as helping
from attention_zoo.commands.launch import launch
from attention_zoo.commands.main import main
from attention_zoo.commands.plain import PLAIN
from attention_zoo.commands.refusals import EXTRAS, flags, of_hydra
from attention_zoo.commands.work import COMMANDS, Command, Outcome, failures
from attention_zoo.files import append_jsonl
from attention_zoo.jobs.compare import CompareConfig

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any folder will do, and what a command leaves there can be seen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line of a command that is refused and leaves nothing behind."""
    assert main(words) == 2
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert line.startswith("error: ")
    left = [str(path) for path in Path().rglob("*") if path.is_file()]
    assert not left or (left == ["runs/sweep/multirun.yaml"] and "-m" in words), "nothing was begun"
    return line.removeprefix("error: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train seed=0,1", "seed got several values, 0,1: -m runs one after the other (-m seed=0,1)"),
        ("train preset=gpu", "preset is no group of this command: --help lists its groups"),
        ("train attention=longfromer", "got 'longfromer'; did you mean longformer?"),
        ("train hydra/launcher=jobli", "hydra/launcher must be one of basic"),
        ("train steps=???", "steps must be given, got ???"),
        ("train steps=${nothing}", "steps: Interpolation key 'nothing' not found"),
        ("train a=b=c", "a=b=c is no override: mismatched input '='"),
        ("train key", "key is no override"),
        ("train seed=[0", "seed=[0 is no override"),
        ("train seed=abc", "seed: Value 'abc'"),
        ("train sede=1", "sede is no known option; did you mean seed?"),
        ("train --seed=1", "--seed is no flag; options are written without dashes: seed=1."),
        ("train --seed 1", "--seed is no flag; options are written without dashes: seed=1."),
        ("train --multirun=3", "--multirun takes no value, got '3'"),
        ("train =3", "'=3' is no override: write key=value"),
        ("train --cfg", "--cfg must be followed by job or hydra or all, got nothing"),
        ("train -m attention=nope,full", "attention must be one of adaptive_span, bigbird"),
        ("train -m task=mqar,copy task.test_examples=8", "while task is swept: write ++task.test_examples=8"),
        ("train -m task=mqar,copy +task.test_examples=8", "while task is swept: write ++task.test_examples=8"),
        ("train -m attention=full,bigbird attention.block=8,16", "write ++attention.block=8,16"),
        ("train task=mqar task.test_example=8", "task.test_example is no known option; did you mean test_examples?"),
        ("benchmark lengths=4096", "lengths must be a list, got 4096: 'lengths=[4096]'"),
        ("benchmark options=3", "options must be a mapping, got 3: 'options={name: value}'"),
        ("benchmark backends=[longfromer]", "did you mean longformer?"),
        ("benchmark options={longfromer:{window:8}}", "options must be of a measured backend"),
        ("compare preset=smoke measure.options={longformer:{windw:8}}", "did you mean window?"),
        ("report results=[nope.jsonl]", "nope.jsonl"),
        ("evaluate", "source and task.path must be given, got ???"),
        ("convert output=x", "source must be given, got ???"),
        ("inspect run=nope text=x", "run must name folders of finished runs, got 'nope', which is no folder"),
        ("inspect run=null text=x", "run must name folders of finished runs, got None"),
        ("inspect run=[/,7] text=x", "run must name folders of finished runs, got '/', which holds no model."),
        ("context run=7", "run must name folders of finished runs, got 7, which is no folder"),
        ("generate nope x", "nope: no such model file"),
        ("generate nope", "the following arguments are required: prompt"),
        ("generate nope x --device banana", "device must be cpu, cuda or cuda:<number>, got 'banana'"),
        ("generate nope x --steps many", "invalid int value: 'many'"),
        ("trian", "got 'trian'; did you mean train?"),
    ],
)
def test_what_cannot_be_meant_is_one_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, *words.split())


def test_an_output_that_is_a_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, file = tmp_path / "rows.jsonl", tmp_path / "file"
    rows.write_text(json.dumps({"kind": "portrait", "backend": "full", "status": "failed", "error": "x"}) + "\n")
    file.write_text("mine")
    assert main(["report", f"results=[{rows}]", f"output={file}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {file}")
    assert file.read_text() == "mine"


def test_a_sweep_whose_folder_cannot_be_made_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(["train", "-m", "task=mqar", "seed=0,1", f"output={tmp_path / 'file'}", "dry=true"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: {tmp_path / 'file' / 'sweep'}: Not a directory"


ENDINGS: list[tuple[BaseException, int, str]] = [
    (ValueError("window must be\nat least 1"), 2, "error: window must be at least 1"),
    (FileNotFoundError(errno.ENOENT, "No such file", "there"), 2, "error: there: No such file"),
    (PermissionError(errno.EACCES, "Permission denied", "there"), 2, "error: there: Permission denied"),
    (OSError(errno.ENOSPC, "No space left on device", "there"), 1, "error: there: No space left on device"),
    (OSError(errno.EROFS, "Read-only file system", "a", None, "b"), 1, "error: a to b: Read-only file system"),
    (MemoryError(), 1, "error: out of memory: MemoryError"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "error: out of memory: DefaultCPUAllocator"),
    (ModuleNotFoundError("No module named 'transformers'", name="transformers"), 2, "attention-zoo[huggingface]'"),
    (ModuleNotFoundError("No module named 'submitit'", name="submitit"), 2, "pip install 'attention-zoo[sweep]'"),
    (ModuleNotFoundError("No module named 'local_attention'", name="local_attention.x"), 2, "attention-zoo[peers]'"),
    (ImportError("needs it: pip install 'mine'"), 2, "error: needs it: pip install 'mine'"),
    (TypeError("unhashable"), 1, "error: TypeError: unhashable (HYDRA_FULL_ERROR=1 shows where)"),
    (KeyboardInterrupt(), 130, "stopped by Ctrl-C; what is finished is kept"),
    (stopping.Stopped(signal.SIGTERM), 75, "stopped by SIGTERM; what is finished is kept"),
    (stopping.Stopped(signal.SIGUSR1), 75, "stopped by SIGUSR1"),
    (SystemExit("a plug-in gave up"), 1, "error: a plug-in gave up"),
    (ValueError("lone \udcff surrogate"), 2, "error: lone \\udcff surrogate"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "code", "line"), ENDINGS, ids=lambda value: repr(value)[:30])
def test_however_it_ends_it_is_one_line_and_a_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        raise error

    assert launch(work) == code
    (told,) = capsys.readouterr().err.splitlines()
    assert line in told


def test_what_ends_well_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert (launch(lambda: None), launch(lambda: 1)) == (0, 1)
    assert capsys.readouterr() == ("", "")


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    before = warnings.showwarning
    assert launch(lambda: warnings.warn("of\nsomething", stacklevel=1)) == 0
    assert capsys.readouterr().err == "warning: of something\n"
    assert warnings.showwarning is before


def test_signals_stop_a_command_and_are_given_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    assert launch(lambda: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(5)) == 75
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before
    assert capsys.readouterr().err.startswith("stopped by SIGTERM")


def test_a_traceback_is_there_for_the_asking(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        raise ValueError("wrong")

    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert launch(work) == 2
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert "in work" in told
    assert main(["report", "results=[nope.jsonl]"]) == 2
    assert "in read" in capsys.readouterr().err
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


def test_a_launcher_without_its_plug_in_names_the_extra() -> None:
    error = MissingConfigException("no", missing_cfg_file="hydra/launcher/joblib", options=["basic"])
    assert of_hydra(error) == "hydra/launcher=joblib needs pip install 'attention-zoo[sweep]'"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(EXTRAS) <= set(extras)


def test_flags_may_stand_anywhere() -> None:
    assert flags(["a=1", "-m", "b=2", "--cfg", "job"]) == ["a=1", "b=2", "-m", "--cfg", "job"]
    assert flags(["--info", "a=1"]) == ["a=1", "--info"]
    assert flags(["--info", "plugins", "~a", "+b=-1"]) == ["~a", "+b=-1", "--info", "plugins"]
    assert flags(["--config-dir=x", "a=1"]) == ["a=1", "--config-dir=x"]


def row(kind: str, status: str) -> dict[str, Any]:
    return {"kind": kind, "status": status}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([row("speed", status) for status in ("ok", "unsupported", "oom", "oom_predicted", "timeout")], ""),
        ([row("peer", "missing"), row("portrait", "unsupported"), row("quality", "unsupported")], ""),
        ([row("portrait", "failed"), row("portrait", "ok"), row("portrait", "timeout")], "2 of 3 pictures failed"),
        ([row("speed", "failed"), row("speed", "lost"), row("speed", "ok")], "2 of 3 cells failed"),
        ([row("quality", status) for status in ("ok", "oom", "timeout", "lost", "failed")], "4 of 5 trainings failed"),
        ([row("speed", "failed"), row("quality", "oom")], "1 of 1 cells and 1 of 1 trainings failed"),
    ],
)
def test_failures_are_counted_and_limits_are_no_failures(rows: list[dict[str, Any]], words: str) -> None:
    assert failures(rows) == words


def test_benchmark_and_compare_end_with_1_when_a_result_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row("speed", "failed"), row("speed", "ok"), row("quality", "lost")]

    def compare(config: CompareConfig) -> Path:
        for each in rows:
            append_jsonl(tmp_path / config.output / "results.jsonl", each)
        return tmp_path / config.output / "report.html"

    monkeypatch.setattr("attention_zoo.jobs.benchmark.benchmark", lambda config: rows)
    monkeypatch.setattr("attention_zoo.jobs.compare.compare", compare)
    for name in ("benchmark", "compare"):
        assert main([name, "output=out"]) == 1
        assert capsys.readouterr().err == "error: 1 of 2 cells and 1 of 1 trainings failed\n"
    rows[:] = [row("speed", "ok"), row("quality", "failed") | {"refused": True}]
    assert main(["compare", "output=refused"]) == 2
    assert capsys.readouterr().err == "error: 1 of 1 trainings failed\n"
    rows[:] = [row("speed", "ok"), row("quality", "unsupported")]
    assert (main(["benchmark", "output=out"]), main(["compare", "output=again"])) == (0, 0)
    assert capsys.readouterr().err == ""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`report` does what its title says; the titles that it was called with."""
    seen: list[str] = []

    def run(composed: Any) -> Outcome:
        seen.append(composed.title)
        if composed.title == "refused":
            raise ValueError("this cannot be meant")
        if composed.title == "bug":
            raise TypeError("a bug")
        return Outcome(1, "2 of 3 cells failed") if composed.title == "failed" else Outcome()

    monkeypatch.setitem(COMMANDS, "report", Command("", COMMANDS["report"].register, run))
    return seen


@pytest.mark.parametrize(
    ("titles", "code", "lines"),
    [
        ("fine", 0, []),
        ("failed", 1, ["error: 2 of 3 cells failed"]),
        ("refused", 2, ["error: this cannot be meant"]),
        ("fine,well", 0, []),
        ("refused,fine", 2, ["error: this cannot be meant", "1 of 2 runs failed"]),
        ("bug,failed,refused,fine", 1, [
            "error: TypeError: a bug (HYDRA_FULL_ERROR=1 shows where)", "error: 2 of 3 cells failed",
            "error: this cannot be meant", "3 of 4 runs failed",
        ]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("batch", ["null", "1"])
def test_a_job_that_fails_does_not_stop_the_others(
    titles: str, code: int, lines: list[str], batch: str, fake: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"title={titles}", "-m", f"hydra.sweeper.max_batch_size={batch}"] if "," in titles else [f"title={titles}"]
    assert main(["report", *words]) == code
    assert fake == titles.split(",")
    assert capsys.readouterr().err.splitlines() == lines


SWEEP = [
    "task=mqar", "device=cpu", "threads=1", "steps=1", "batch=4", "seq_len=16", "model.dim=16", "task.test_examples=8",
    "tracker=none", "trainer.progress=none", "output=swept",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "ray"])
def test_a_sweep_in_other_processes_tells_what_failed(launcher: str) -> None:
    words = [*SWEEP, f"hydra/launcher={launcher}", "-m", "model.heads=3,2"]
    words += {
        "submitit_local": ["hydra.launcher.timeout_min=2"],
        "ray": ["+hydra.launcher.ray.init.include_dashboard=false"],
    }.get(launcher, [])
    done = subprocess.run(
        [sys.executable, "-m", "attention_zoo", "train", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "error: full: failed: model.heads must divide model.dim, got heads=3" in done.stderr
    assert done.stderr.endswith("1 of 2 runs failed\n")
    assert "Traceback" not in done.stderr
    found = sorted(json.loads(path.read_text())["status"] for path in Path("swept").glob("mqar-*/result.json"))
    assert found == ["failed", "ok"]


def test_a_training_leaves_its_output_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        assert main(["train", *SWEEP]) == 0
    finally:
        torch.set_num_threads(threads)
    assert capsys.readouterr().out.startswith("full mqar: loss")
    assert [path.name for path in Path().iterdir()] == ["swept"]
    (run,) = Path("swept").iterdir()
    assert json.loads((run / "result.json").read_text())["status"] == "ok"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("model.norm=foo", "model.norm must be one of layer, rms, batch, got 'foo'"),
        ("model.heads=3", "model.heads must divide model.dim, got heads=3"),
        ("seq_len=7", "mqar: seq_len must be at least 16"),
        ("+attention.foo=1", "attention.foo is no option of full"),
        ("attention=reformer model.positions=rotary", "positions=rotary is not supported"),
        ("optimizer.lr=-1", "optimizer.lr must be a number of at least 0, got -1"),
        ("optimizer._target_=torch.optim.Adam", "optimizer._target_=torch.optim.Adam does not fit"),
        ("optimizer._target_=torch.optim.Nope", "optimizer._target_ must name a class or function"),
        ("init=nosuch model.dim=16", "model.dim is of new models, and init=nosuch brings one"),
        ("task=reference init=nosuch", "init must be a model file, or a folder that holds one, got 'nosuch'"),
        ("lora={r:8}", "lora belongs to init="),
        ("decode.beams=3", "decode.beams belongs to tasks whose rows have a source"),
        ("task=reference encoder.norm=foo", "encoder.norm must be one of layer, rms, batch"),
        ("task=reference seq_len=32 decode.top_p=7", "decode.top_p must be at most 1, got 7.0"),
        ("task=reference seq_len=32 decode.top_k=5", "decode.top_k needs decode.greedy=false"),
        ("task=reference seq_len=32 encoder.attention=transformer_xl", "encoder.attention=transformer_xl"),
        ("output=file", "Not a directory"),
    ],
)  # fmt: skip
def test_a_training_that_cannot_be_meant_ends_with_2_each_time(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").write_text("mine")
    for _ in range(2):
        assert main(["train", *SWEEP, *words.split()]) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert message in told.err.splitlines()[-1]
        assert "Traceback" not in told.err


def test_a_training_that_crashes_or_diverges_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *SWEEP, "steps=3", "optimizer.lr=1e30", "schedule=constant"]) == 1
    assert "the loss became" in capsys.readouterr().err
    monkeypatch.setattr("attention_zoo.training.trainer.Trainer.step", lambda self: {}["bug"])
    assert main(["train", *SWEEP]) == 1
    assert "KeyError: 'bug'" in capsys.readouterr().err


def test_a_training_starts_from_a_file_by_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *SWEEP]) == 0
    (first,) = Path("swept").iterdir()
    words = ["train", *(word for word in SWEEP if not word.startswith("model.")), f"init={first}", "output=second"]
    assert main(words) == 0
    assert main([*words, "attention=longformer"]) == 2
    assert "attention is of new models, and init=" in capsys.readouterr().err


def test_generate_writes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zoo.save(zoo.Transformer(attention="full", vocab=256, dim=16, heads=2, depth=1), tmp_path / "model.safetensors")

    def call(*words: str) -> str:
        assert main(["generate", *words, "--device", "cpu"]) == 0
        return capsys.readouterr().out

    written = call(str(tmp_path), "abc(", "--steps", "9", "--seed", "3")
    assert written.startswith("abc(")
    assert len(written) > len("abc(\n")
    assert call(str(tmp_path), "abc(", "--steps", "9", "--seed", "3") == written
    assert call(str(tmp_path / "model.safetensors"), "abc(", "--steps", "9", "--seed", "4") != written
    assert call(str(tmp_path), "\udcff", "--steps", "1").startswith("�"), "a prompt is bytes, UTF-8 or not"
    assert main(["generate", str(tmp_path), "x", "--eos", "256", "--device", "cpu"]) == 2
    assert capsys.readouterr().err == "error: --eos must be a byte, 0 to 255, got 256\n"
    assert main(["generate", str(tmp_path), "x", "--steps", "0", "--device", "cpu"]) == 2
    assert capsys.readouterr().err == "error: steps must be an integer of at least 1, got 0\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_says_a_word_on_each_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"attention-zoo {name}" in text
    assert "experiments" not in text, "what is installed has no such module"
    COMMANDS[name].register()
    with initialize_config_module("attention_zoo.conf", version_base="1.3"):
        composed = compose(name, return_hydra_config=True)
        groups = helping.choices(composed)
    found = list(helping.options(composed))
    for group, names in groups.items():
        assert f"  {group}: {', '.join(names)}" in text
    leaves = {key.partition(".")[0] for key, _, _ in found}
    keys = {str(key) for key in composed if key != "hydra" and composed._get_node(key) is not None}
    assert leaves | set(groups) == keys | set(groups), "a group's choice may have no options"
    for key, value, word in found:
        assert word, f"{key} of {name} is not described where it is defined"
        assert f"  {key}={'...' if value == 'must be given' else value}" in text
        assert " ".join(word.split()[:2]) in " ".join(text.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_form_that_the_help_shows_is_understood(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    examples = re.findall(rf"^  attention-zoo {name}(.*?)(?:   .*)?$", capsys.readouterr().out, re.MULTILINE)
    assert examples
    for example in examples:
        assert not set("[]{}*?~") & set(re.sub(r"'[^']*'", "", example)), f"zsh takes these for itself: {example}"
        words = [re.sub(r"=([^,\[{]+),.*", r"=\1", word) for word in shlex.split(example) if word != "-m"]
        assert main([name, *words, "--cfg", "job"]) == 0, capsys.readouterr().err
        assert not capsys.readouterr().err


def test_the_help_is_that_of_the_choices_made(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help", "attention=longformer", "task=mqar"], program="python -m experiments.train") == 0
    text = capsys.readouterr().out
    assert "attention.window=256" in text
    assert "tokens per side; at least 1." in text
    assert "task.pairs=4" in text
    assert "python -m experiments.train attention=longformer" in text


def test_the_help_of_the_whole_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in (*COMMANDS, *PLAIN):
        assert f"\n  {name} " in text
    for name in PLAIN:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("COLUMNS", "100")
            assert main([name, "--help"]) == 0
        assert f"usage: attention-zoo {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "override", "place", "value"),
    [
        ("benchmark", "options={longformer: {window: 128}}", "options", {"longformer": {"window": 128}}),
        ("benchmark", "options.longformer.window=128", "options", {"longformer": {"window": 128}}),
        ("benchmark", "+options.longformer.window=128", "options", {"longformer": {"window": 128}}),
        ("benchmark", "peer_python={hf_bigbird: /p}", "peer_python", {"hf_bigbird": "/p"}),
        ("compare", "measure.options={longformer: {window: 128}}", "measure.options", {"longformer": {"window": 128}}),
        ("convert", "lengthen.options={window: 256}", "lengthen.options", {"window": 256}),
        ("convert", "lengthen.options.window=256", "lengthen.options", {"window": 256}),
    ],
)
def test_options_of_mechanisms_take_every_form(name: str, override: str, place: str, value: dict[str, Any]) -> None:
    COMMANDS[name].register()
    with initialize_config_module("attention_zoo.conf", version_base="1.3"):
        composed = compose(name, [override])
        with pytest.raises(Exception, match="nonesuch"):
            compose(name, [f"{place.partition('.')[0]}_nonesuch=1"])
    assert OmegaConf.to_container(OmegaConf.select(composed, place)) == value


def test_the_console_script_and_the_modules_start_the_same() -> None:
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["attention-zoo"]
    module, _, function = script.partition(":")
    entry: Callable[[], None] = getattr(importlib.import_module(module), function)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["attention-zoo", "abilities", "--markdown"])
        patch.setattr(attention_zoo_start, "NUMBERS", [])  # the signals of this process are not the command's
        with pytest.raises(SystemExit) as ended:
            entry()
    assert ended.value.code == 0
    started = {path.stem for path in (ROOT / "experiments").glob("*.py")} - {"__init__"}
    assert started == {*COMMANDS, "generate"}
    for name in started:
        assert f'start("{name}")' in (ROOT / "experiments" / f"{name}.py").read_text()


def installed(*words: str, house: Path, **pipes: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "attention_zoo", *words], cwd=house.parent, text=True, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(house), "OMP_NUM_THREADS": "1"}, **pipes,
    )  # fmt: skip


@pytest.mark.slow
def test_installed_it_runs_from_any_folder_and_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    house = tmp_path / "house"  # laid out as the wheel is: no experiments, and conf within the package
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "attention_zoo", house / "attention_zoo", ignore=ignore)
    shutil.copytree(ROOT / "attention_zoo" / "start", house / "attention_zoo_start", ignore=ignore)
    shutil.copytree(ROOT / "conf", house / "attention_zoo" / "conf", ignore=ignore)
    done = installed("train", *SWEEP, "attention=longformer", house=house, stdout=subprocess.PIPE)
    out, err = done.communicate(timeout=100)
    assert done.returncode == 0, err
    assert out.startswith("longformer mqar: loss")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["house", "swept"]
    cut = installed("abilities", house=house, stdout=subprocess.PIPE)
    assert cut.stdout is not None
    cut.stdout.close()
    _, err = cut.communicate(timeout=100)
    assert (cut.returncode, err) == (1, "")


def test_ctrl_c_while_torch_is_loading_is_one_line() -> None:
    hook = "sys.meta_path.insert(0, type('Hook', (), {'find_spec': lambda *_: os.kill(os.getpid(), signal.SIGINT)})());"
    for start, line in (
        ("from experiments import start as go", "python -m experiments.train 'a=[1, 2]'"),
        ("from attention_zoo_start import start; go = lambda _: start()", "attention-zoo train 'a=[1, 2]'"),
    ):
        given = "['train', 'a=[1, 2]', 'force=true']" if "experiments" in line else "['x', 'train', 'a=[1, 2]']"
        first = f"import sys, signal, os; sys.argv = {given}; "
        done = subprocess.run(
            [sys.executable, "-c", f"{first}{start}\n{hook} go('train')"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 130
        assert done.stderr.startswith("stopped by Ctrl-C before anything was begun; what is finished is kept, and this")
        assert done.stderr.endswith(f": {line}\n"), "what goes on"


def test_signals_after_all_is_done_change_nothing() -> None:
    """An interpreter that ends takes its time over torch, and restores what signals do by default on the way."""
    late = "class Late:\n def __del__(self): [os.kill(os.getpid(), n) for n in attention_zoo_start.NUMBERS]\n"
    first = "import sys, os, types, attention_zoo_start\n"
    main = "main = types.ModuleType('attention_zoo.commands.main'); main.main = lambda *given: 7\n"
    there = "for name in ('attention_zoo', 'attention_zoo.commands', main.__name__): sys.modules[name] = main\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{first}{late}{main}{there}keep = Late(); attention_zoo_start.start()"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (7, "")
