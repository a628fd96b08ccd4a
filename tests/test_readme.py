"""The README is a promise: its commands are well-formed, its code runs, its tables are what code and results say."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from faults.__main__ import table
from faults.kinds import KINDS
from readme_tables import distance_table, reach_table, steps_table
from recorded import NEWER, RECORDED, WRAPPERS

from attention_zoo import overview
from attention_zoo.advice.matrix import Matrix
from attention_zoo.commands import work as commands
from attention_zoo.commands.main import main
from attention_zoo.commands.plain import PLAIN
from attention_zoo.files import read_json, read_jsonl
from attention_zoo.report import Findings, markdown_table, read, rivals
from attention_zoo.report.published import published
from attention_zoo.report.summary import summary

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def between(name):
    found = re.findall(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", README, re.DOTALL)
    assert len(found) == 1, f"README.md must hold one section {name}"
    return found[0].strip()


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def command(name):
    (block,) = blocks("bash", between(name))
    (line,) = block.strip().splitlines()
    return line


def test_the_two_commands_do_their_own_set_up():
    for name, end in (("main", "-m experiments.compare"), ("tests", '-m pytest -n 2 -m "not slow"')):
        make, install, run = command(name).split(" && ")
        assert make == "python3 -m venv .venv"
        assert install.startswith(".venv/bin/pip install -q -e ")
        assert run == f".venv/bin/python {end}"


def test_ci_runs_the_test_command_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text()
    assert "<!-- tests -->" in script
    assert '-m pytest -n 2 -m "slow and not long"' in script, "and the tests that README's command leaves out"


def test_the_table_of_abilities_is_generated():
    rows = overview.abilities_rows([*RECORDED, *NEWER, *WRAPPERS])
    assert between("abilities") == overview.markdown(overview.COLUMNS, rows)


def test_the_table_of_faults_is_that_of_the_committed_counts():
    (path,) = re.findall(r"\(([\w/.-]+faults\.json)\)", between("faults"))
    found = read_json(ROOT / path)
    assert list(found) == list(KINDS)
    assert table(found) in between("faults")


@pytest.mark.parametrize("name", ["results", "families", "short_parity"])
def test_the_table_of_results_is_that_of_the_committed_rows(name):
    (path,) = re.findall(r"\(([\w/.-]+results\.jsonl)\)", between(name))
    found = Findings.of(read([ROOT / path]))
    assert markdown_table(found) in between(name)
    for note in summary(found).notes:
        assert note in between(name)


@pytest.mark.parametrize("preset", ["rounds", "sinks", "longer_memory", "rmt", "induction"])
def test_the_published_table_stands_beside_the_committed_rows(preset):
    (path,) = re.findall(r"\(([\w/.-]+results\.jsonl)\)", between(preset))
    for beside in published(read([ROOT / path])):
        assert overview.markdown(beside.table.headers, beside.table.cells) in between(preset)


def test_the_matrix_of_problems_is_that_of_the_committed_rows():
    (path,) = re.findall(r"\(([\w/.-]+results\.jsonl)\)", between("choice"))
    matrix = Matrix.of(read([ROOT / path]), 4096)
    assert matrix.markdown() in between("choice")
    assert (matrix.ranking() or "") in between("choice")


VERDICTS = ("not told apart", "worse, and yet as good", "better, and yet as good", "as good", "better", "worse")
CONTRARY = ({"better", "worse"}, {"better, and yet as good", "worse"}, {"worse, and yet as good", "better"})


def verdicts(path: str) -> dict[tuple[str, int], str]:
    """By mechanism and column of the matrix, where there is one."""
    found = {}
    for line in Matrix.of(read([ROOT / path]), 4096).markdown().splitlines()[2:]:
        mechanism, *cells = line.strip("|").split(" | ")
        for column, cell in enumerate(cells):
            words = [each for each in VERDICTS if cell.endswith(f", {each}")]
            if words:
                found[mechanism, column] = words[0]
    return found


def test_other_seeds_contradict_no_verdict_of_the_matrix():
    mine, again = verdicts("experiments/results/choice_cpu/results.jsonl"), between("again")
    (path,) = re.findall(r"\(([\w/.-]+results\.jsonl)\)", again)
    theirs = verdicts(path)
    both = mine.keys() & theirs.keys()
    assert not [at for at in both if {mine[at], theirs[at]} in CONTRARY]
    same = sum(mine[at] == theirs[at] for at in both)
    assert f"of the {len(mine)} verdicts {same} are the same" in again
    assert (len(mine) - len(both), len(both) - same) == (3, 1)  # which the sentence names


def test_the_work_of_the_presets_is_that_of_the_committed_turns():
    rows = list(read_jsonl(ROOT / "experiments/results/turns_cpu/turns.jsonl"))

    def minutes(rows):
        return tuple(
            round(sum(row["wall_seconds"] * row[f"{side}_seconds"] / row["before_seconds"] for row in rows) / 60)
            for side in ("after", "before")
        )

    every, choice = minutes(rows), minutes([row for row in rows if row["rows"] == "choice_again_cpu"])
    said = "{} core-minutes where those rows took {}, `choice` {} of {}".format(*every, *choice)
    assert said in README


def test_the_table_of_recall_by_distance_is_that_of_the_committed_rows():
    (path,) = re.findall(r"\(([\w/.-]+results\.jsonl)\)", between("distance"))
    assert overview.markdown(*distance_table(read([ROOT / path]))) in between("distance")


def test_the_pictures_of_the_readme_are_there():
    for picture in re.findall(r"!\[[^]]+\]\(([^)]+)\)", between("results")):
        assert (ROOT / picture).stat().st_size > 10_000


def test_the_tables_of_peers_and_of_goals_are_those_of_the_committed_rows():
    (path,) = re.findall(r"\(([\w/.-]+results\.jsonl)\)", between("peers"))
    rows = read([ROOT / path])
    peers = [row for row in rows if row["kind"] == "peer"]
    table = rivals.short_table([row for row in peers if row["length"] > 1024 or row["backend"] == "transformer_xl"])
    assert overview.markdown(table.headers, table.cells) in between("peers")
    assert overview.markdown(*reach_table()) in between("peers")
    goals = rivals.figures_table(rows)
    assert overview.markdown(goals.headers, goals.cells) in (ROOT / path).with_name("figures.md").read_text()


def test_the_table_of_the_newer_families_is_that_of_the_committed_rows():
    (path,) = re.findall(r"\(([\w/.-]+results\.jsonl)\)", between("newer"))
    rows = read([ROOT / path])
    table = rivals.short_table([row for row in rows if row["kind"] == "peer"])
    assert overview.markdown(table.headers, table.cells) in between("newer")
    goals = rivals.figures_table(rows)
    assert overview.markdown(goals.headers, goals.cells) in (ROOT / path).with_name("figures.md").read_text()


def test_the_table_of_steps_is_that_of_the_committed_rows():
    assert overview.markdown(*steps_table()) in between("steps")


def test_what_is_said_of_growth_is_what_the_committed_rows_say():
    folder = ROOT / "experiments" / "results" / "growth_cpu"
    goals = rivals.figures_table(read([folder / "results.jsonl"]))
    assert overview.markdown(goals.headers, goals.cells) in (folder / "figures.md").read_text()


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_the_module_example_runs():
    (example,) = [block for block in blocks("python") if "zoo.build" in block]
    names: dict = {}
    exec(example, names)
    assert names["out"].hidden.shape == (2, 1009, 512)
    whole = names["layer"](names["x"], names["tokens"]).hidden
    cut = torch.cat([names["first"].hidden, names["rest"].hidden], 1)
    torch.testing.assert_close(cut[names["valid"]], whole[names["valid"]], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("what", ["huggingface.register", "integrations.multihead", "integrations import weights"])
def test_the_examples_of_integrations_run(what, tmp_path, monkeypatch):
    (example,) = [block for block in blocks("python") if what in block]
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(example, names)
    if "generate" in example:
        assert names["tokens"].shape == (1, 308)
    elif "MultiheadAttention" in example:
        assert names["out"].shape == (2, 300, 64)
    else:
        longer = names["long"].eval()(names["ids"], names["weights"].tokens_of(names["attention_mask"])).logits
        torch.testing.assert_close(longer, names["logits"], atol=1e-5, rtol=1e-5)


LAUNCHERS = re.compile(r"^(torchrun|srun) .*?-m experiments\.")
COMMANDS = [
    line
    for block in blocks("bash")
    for given in block.splitlines()
    for line in [LAUNCHERS.sub("python -m experiments.", given)]
    if line.startswith(("python -m experiments.", "attention-zoo "))
]


def test_every_kind_of_command_is_shown():
    shown = {line.removeprefix("python -m experiments.").removeprefix("attention-zoo ").split()[0] for line in COMMANDS}
    prose = {name for name in commands.COMMANDS if f"`python -m experiments.{name} " in README}
    assert shown | prose == {*commands.COMMANDS, *PLAIN}


@pytest.mark.parametrize("line", COMMANDS)
def test_every_other_command_is_understood(line, capsys):
    unquoted = re.sub(r"'[^']*'", "", line.partition("#")[0])
    assert not set("[]{}*?~") & set(unquoted), "zsh takes these for itself"
    words = shlex.split(line, comments=True)
    name, *rest = words[1:] if words[0] == "attention-zoo" else [words[2].removeprefix("experiments."), *words[3:]]
    if name in commands.COMMANDS:
        # a sweep's choices, one of each: composing one job is what shows that all words are known
        rest = [re.sub(r"^(attention|seed)=([^,\[]+),.*", r"\1=\2", word) for word in rest if word != "-m"]
        rest += ["--cfg", "job"]
    assert main([name, *rest]) == 0
    told = capsys.readouterr()
    assert told.out.strip()
    assert not told.err


def test_every_recorded_backend_is_named_with_its_file():
    for name in RECORDED:
        assert f"[{name}](attention_zoo/attention/{name}.py)" in README
    for name in WRAPPERS:
        assert f"[{name}](attention_zoo/model/{name}.py)" in README
