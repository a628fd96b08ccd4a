"""Published tables: refused where they cannot be meant, rows like any others, drawn with ours beside, nothing averaged
that differs in more than the seed."""

import copy

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from report_rows import quality

from attention_zoo.jobs.compare import CompareConfig, register
from attention_zoo.jobs.published import published_rows, published_tables
from attention_zoo.report.build import build_report
from attention_zoo.report.published import published
from attention_zoo.results.check import wrong_with
from attention_zoo.training.assembly import assemble
from attention_zoo.training.building import build
from attention_zoo.training.config import CONF, options_of
from attention_zoo.training.elsewhere import elsewhere
from attention_zoo.training.models import mechanism_of

TABLE = {
    "title": "Accuracy by rounds", "source": "Somebody 2020, table 2", "task": "mqar",
    "values": {"full": {"test": 1.0, "test@r8": 0.948}, "reformer": {"test": None, "test@r8": 0.5}},
    "remark": "other data",
}  # fmt: skip


def rows_of(table=TABLE):
    return published_rows(published_tables({"rounds": table}, ["full", "reformer"]))


def trained(backend, seed, value, **more):
    row = copy.deepcopy(quality(backend, "mqar", seed))
    scores = {"loss": 1.0, "accuracy": value}
    return {**row, "task": "mqar", "metric": "accuracy", "better": "higher", "metrics": scores,
            "evaluations": {"test": scores, "test@r8": {"loss": 1.0, "accuracy": value / 2}}, **more}  # fmt: skip


def test_a_figure_is_a_row():
    rows = rows_of()
    assert [wrong_with(row) for row in rows] == [None] * 4
    assert (rows[1]["backend"], rows[1]["set"], rows[1]["value"]) == ("full", "test@r8", 0.948)


def test_ours_stand_beside_with_their_range():
    rows = [*rows_of(), trained("full", 0, 0.9), trained("full", 1, 0.8), trained("reformer", 0, 0.25)]
    (found,) = published(rows)
    assert found.table.headers == ["", "test", "r8"]
    assert found.table.cells == [
        ["full", "100.0 % · 85.0 % (80.0–90.0)", "94.8 % · 42.5 % (40.0–45.0)"],
        ["reformer", "– · 25.0 %", "50.0 % · 12.5 %"],
    ]
    assert "1 to 2 seeds" in found.notes[0]
    assert "Somebody 2020, table 2" in found.notes[0]
    assert found.notes[-1] == "other data"


def test_runs_of_two_settings_are_not_averaged():
    other = trained("full", 1, 0.5)
    other["config"] = {**other["config"], "batch": 99}
    (found,) = published([*rows_of(), trained("full", 0, 0.9), other])
    assert found.table.cells[0][1] == "100.0 % · 90.0 %; 50.0 %"
    assert any("more than their seed" in note for note in found.notes)


def test_the_report_draws_it_and_escapes_it(tmp_path):
    rows = [*rows_of({**TABLE, "title": "<script>alert(1)</script>"}), trained("full", 0, 0.9)]
    page = build_report(rows, tmp_path / "report.html").read_text()
    assert "Beside published tables" in page
    assert "<script>alert(1)" not in page
    assert "100.0\u00a0% · 90.0\u00a0%" in page


def test_published_figures_alone_are_drawn(tmp_path):
    assert "Somebody 2020" in build_report(rows_of(), tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"title": ""}, "must say title, source, task and values, got no title"),
        ({"value": 3}, "published.rounds.value is no option; did you mean values"),
        ({"values": {"nope": {"test": 1.0}}}, "of backends or variants that are compared, got nope"),
        ({"values": {"full": {"test": "much"}}}, "published.rounds.values"),
        ({"seq_len": 0}, "published.rounds.seq_len must be an integer of at least 1, got 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(change, said):
    with pytest.raises(ValueError, match=r"published\.rounds") as caught:
        CompareConfig(backends=["full", "reformer"], published={"rounds": {**TABLE, **change}}).planned()
    assert said in str(caught.value)


PRESETS = ("rounds", "longer_memory", "sinks", "induction", "short_parity", "rmt")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_of_published_results_can_be_trained_and_evaluated_as_it_says(preset):
    """Each of its models is built, and so is each of `evaluate_at`."""
    register()
    with initialize_config_module(CONF, version_base="1.3"):
        config = OmegaConf.to_object(compose("compare", [f"preset={preset}", "output=runs"]))
    assert config.measure.cells() == []
    runs = [run for run in config.runs() if run.config["seed"] == 0]
    sets = {run.config["backend"]: set() for run in runs}
    for run in runs:
        options = options_of(run.config)
        task = build(options.task, "task")
        parts = assemble(options, mechanism_of(options), task)
        others = [f"{name}@{each.name}" for each in elsewhere(options, parts) for name in each.sets]
        sets[run.config["backend"]] |= {(task.name, name) for name in [*parts.sets, *others]}
    tables = published_tables(config.published, config.names())
    said = {
        (line, (table.task, name)) for table in tables.values() for line in table.values for name in table.values[line]
    }
    assert all(what in sets[line] for line, what in said), "published figures stand beside sets that there are"
