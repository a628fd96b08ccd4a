"""The report says what the rows say: no more (verdicts), no less (failures), and derived figures are right."""

from __future__ import annotations

import csv
import io
import math
import re

import pytest
from report_page import ask, data_of, drawn, page_of, text_of
from report_rows import LENGTHS, LOSSES, made_up, portrait, quality, speed, unfinished
from rich.console import Console

from attention_zoo.report import Findings, build_report, costs, headline, rich_table, write_csv
from attention_zoo.report import quality as learnt
from attention_zoo.report.costs import MEMORY, TIME
from attention_zoo.report.palette import INK, KNOWN, PAIRS, place, styles
from attention_zoo.report.summary import markdown_table, show, summary
from attention_zoo.report.units import log_ticks, millions, seconds, significant, size, whole


def test_page_holds_every_section_and_loads_nothing(tmp_path):
    page = page_of(made_up(), tmp_path)
    for key in ("summary", "runs-section", "learning", "abilities", "method", "missing"):
        assert f'<section id="{key}">' in page
    shell = page[: page.index("<script>")]  # what comes before plotly.js
    assert not re.search(r'(?:src|href)="(?!#|data:)', shell)
    assert "default-src 'none'" in shell
    assert page.count("<script>") == 2, "plotly.js and our script, each once"


def test_summary_holds_the_figures_of_the_rows():
    found = Findings.of(made_up())
    assert found.length == 4096, "materialised attention was not measured beyond"
    table = summary(found)
    columns = [f"{group}|{column}" for group, many in table.groups for column in many]
    cells = dict(zip(table.names, table.cells))
    line = dict(zip(columns, cells["longformer"]))
    row = speed("longformer", "auto", 4096)
    assert line["At 4,096 tokens|time"] == seconds(row["seconds"])
    assert line["At 4,096 tokens|peak memory"] == size(row["peak_bytes"])
    assert line["At its longest measured|tokens"] == "16,384"
    assert line["Grows as length to the|time"] == "1.04"
    assert line["What it learnt|text: bits per byte"] == f"{LOSSES['longformer']:.3f}"
    assert line["What it learnt|mqar: accuracy"] == "41.0 %"
    assert line["Model|carries state"] == "no"
    assert dict(zip(columns, cells["transformer_xl"]))["Model|carries state"] == "yes"
    assert table.names[:2] == ["full (materialised)", "full (fused)"]


def test_what_was_learnt_at_other_options_than_its_costs_are_of_says_so(tmp_path):
    rows = made_up()
    for row in rows:
        if row["backend"] == "longformer" and row.get("task") == "mqar":
            row["config"]["attention"]["window"] = 8
    found = Findings.of(rows)
    table = summary(found)
    columns = [column for _, many in table.groups for column in many]
    line = dict(zip(columns, table.cells[table.names.index("longformer")]))
    assert line["mqar: accuracy"] == "41.0 % °"
    assert "°" not in line["text: bits per byte"] + "".join(table.cells[table.names.index("bigbird")])
    note = "° trained at other options than the costs of its line are of: mqar: longformer (window=8)"
    assert note in table.notes
    assert "41.0 % °" in markdown_table(found)
    assert note in text_of(build_report(rows, tmp_path / "report.html").read_text())
    for row in rows:
        if row["backend"] == "longformer" and row["kind"] == "speed":
            row["config"]["options"] = {"window": 8}
    (note,) = summary(Findings.of(rows)).notes
    assert note == "° trained at other options than the costs of its line are of: text: longformer (defaults)"


def test_a_task_at_several_lengths_has_columns_that_tell_them_apart():
    rows = [
        quality(backend, "mqar", seq_len=length, id=f"{backend}-{length}")
        for backend in ("full", "longformer") for length in (64, 2048)
    ]  # fmt: skip
    rows.append(quality("full", "text"))
    found = Findings.of(rows)
    columns = summary(found).groups[0]
    mqar = ["mqar, 64 tokens: accuracy", "mqar, 2,048 tokens: accuracy"]
    assert columns == ("What it learnt", ["text: bits per byte", *mqar])
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(rich_table(found))
    said = console.export_text()
    assert "64 tokens" in said
    assert "2,048 tokens" in said
    assert markdown_table(found).splitlines()[0].count("tokens") == 2


def test_growth_and_overtaking_follow_from_the_made_up_laws():
    found = Findings.of(made_up())
    by_name = {each.label: each for each in found.series}
    dense, sdpa = by_name["full (materialised)"], by_name["full (fused)"]
    assert costs.growth(dense, TIME) == pytest.approx(1.95, abs=0.01)
    assert costs.growth(by_name["bigbird"], MEMORY) == pytest.approx(1.0, abs=0.01)
    # 0.05 x^1.04 = 0.045 x^1.6, x = L / 1024, on the line between measured lengths since both are power laws
    crossing = costs.overtakes(by_name["longformer"], sdpa, TIME)
    assert crossing is not None
    assert crossing.length == pytest.approx(1024 * (0.05 / 0.045) ** (1 / 0.56), rel=0.01)
    assert costs.crossing_words(crossing) == "1,200"
    never = costs.overtakes(by_name["transformer_xl"], sdpa, TIME)
    assert never is not None
    assert costs.crossing_words(never) == "> 4,096"
    always = costs.overtakes(by_name["longformer"], dense, MEMORY)
    assert always is not None
    assert costs.crossing_words(always) == "≤ 256"


def test_a_baseline_that_ran_out_of_memory_is_overtaken_there():
    rows = [speed("reformer", "auto", n) for n in LENGTHS] + [speed("full", "sdpa", n) for n in LENGTHS[:3]]
    rows.append(unfinished(speed("full", "sdpa", 16384), "oom", "killed"))
    found = Findings.of(rows)
    crossing = found.cheaper_from(found.series[1], "sdpa", MEMORY)
    assert crossing is not None
    assert costs.crossing_words(crossing) == "≤ 16,384"


def test_one_seed_has_no_verdicts_and_seven_have(tmp_path):
    one, seven = Findings.of(made_up(1)), Findings.of(made_up(7))
    why = "no verdict: one seed shows no difference, 7 are needed for 4 comparisons"
    assert all(why in sentence for sentence in headline(one)[-2:])
    assert why in text_of(page_of(made_up(1), tmp_path))
    said = headline(seven)[-2]
    assert "no verdict" not in said
    assert "transformer_xl 2.297, better than full by 0.030" in said
    assert "reformer 2.537, worse than full by 0.210" in said
    assert "no verdict" not in text_of(page_of(made_up(7), tmp_path))


def test_undertrained_full_attention_forbids_verdicts(tmp_path):
    rows = [quality(backend, "mqar", seed) for backend in LOSSES for seed in range(3)]
    for row in rows:
        if row["backend"] == "full":
            row["metrics"] = {"accuracy": 0.949}
    text = text_of(page_of(rows, tmp_path))
    assert "undertrained, no verdict: full attention itself reached 94.9 %, below 95%" in text
    assert learnt.tasks(rows)[0].obstacles()
    for row in rows:
        if row["backend"] == "full":
            row["metrics"] = {"accuracy": 0.951}
    assert not learnt.tasks(rows)[0].obstacles()


def test_without_full_attention_there_are_no_verdicts():
    rows = [quality("longformer", "mqar", seed) for seed in range(3)]
    assert any("no full attention" in each for each in learnt.tasks(rows)[0].obstacles())


def test_a_run_cut_short_by_time_is_not_compared(tmp_path):
    rows = [quality(backend, "text", seed) for backend in LOSSES for seed in range(2)]
    rows[-1] |= {"stopped": "time: 60 s were over after step 120 of 300", "steps": 120}
    assert "unequal training, no verdict: time was over before the planned steps (" in text_of(page_of(rows, tmp_path))


def test_unequal_parameters_are_called_out(tmp_path):
    rows = [quality("full", "text"), quality("longformer", "text", parameters=870_000), quality("reformer", "text")]
    assert learnt.tasks(rows)[0].parity() is None, "7 % is within the tenth"
    rows[1]["parameters"] = 940_000
    assert "longformer 940 k (+16%)" in text_of(page_of(rows, tmp_path))


def test_everything_that_failed_is_listed_with_its_reason_and_marked_in_the_charts(tmp_path):
    rows = made_up()
    rows += [
        unfinished(speed("reformer", "auto", 16384), "timeout", "not through within 60 s"),
        unfinished(quality("bigbird", "text"), "failed", "NotFinite: the loss became nan <at step 7>"),
        {**portrait("bigbird"), "status": "failed", "error": "RuntimeError: no picture", "pairs": None},
    ]
    page = page_of(rows, tmp_path)
    text = text_of(page)
    for said in (
        "reformer, layer forward + backward, 16,384 tokens", "not through within 60 s", "timed out",
        "bigbird, trained on text, seed 0", "the loss became nan &lt;at step 7&gt;",
        "bigbird, attention picture", "RuntimeError: no picture",
        "full (materialised), layer forward + backward, 16,384 tokens", "predicted out of memory, not run",
    ):  # fmt: skip
        assert said in text
    data = data_of(page)
    lost = {(run["label"], ask(data, run, "kind")): run for run in data["runs"] if "why" in run}
    assert lost["reformer", "cost"]["error"] == "not through within 60 s"
    assert lost["full (materialised)", "cost"]["why"] == "predicted out of memory, not run"
    assert "pairs" not in lost["bigbird", "picture"]


def test_lengths_that_were_not_planned_are_said(tmp_path):
    text = text_of(page_of(made_up(), tmp_path))
    assert re.search(r"Not planned at every length \(layer.*\): full \(fused\) only to 4,096 tokens", text)


def test_rows_of_other_code_are_called_stale(tmp_path):
    rows = made_up()
    rows[0]["environment"] = {**rows[0]["environment"], "source": "0123456789abcdef"}
    text = text_of(page_of(rows, tmp_path))
    assert f"1 of {len(rows)} results are stale" in text
    assert "made by code 0123456789abcdef" in text
    assert "stale" not in text_of(page_of(made_up(), tmp_path))


def test_rows_of_two_machines_are_called_out(tmp_path):
    rows = made_up()
    rows[0]["environment"] = {**rows[0]["environment"], "cpu": "Another CPU"}
    assert "different machines (Another CPU; Made-up CPU)" in text_of(page_of(rows, tmp_path))


def test_settings_that_differ_never_share_a_chart():
    rows = [speed("full", "sdpa", n) for n in LENGTHS]
    rows += [speed("full", "sdpa", n, dtype="bfloat16", id=f"half-{n}") for n in LENGTHS[:2]]
    data = drawn(rows)
    assert len(data["settings"]) == 2
    halves = [run for run in data["runs"] if ask(data, run, "setting") == data["settings"][1]]
    assert [ask(data, run, "length") for run in halves] == list(map(str, LENGTHS[:2]))


def test_option_sets_of_one_backend_are_lines_of_their_own():
    rows = []
    for window in (64, 256):
        for n in LENGTHS:
            rows.append(speed("longformer", "auto", n, id=f"{window}-{n}", config={"options": {"window": window}}))
    assert [each.label for each in Findings.of(rows).series] == ["longformer (window=256)", "longformer (window=64)"]


def test_text_of_rows_cannot_break_out_of_the_page(tmp_path):
    row = unfinished(speed("full", "sdpa", 256), "failed", "</script><script>alert(1)</script>")
    page = page_of([row, speed("full", "sdpa", 1024)], tmp_path)
    assert "alert(1)</script>" not in page


def test_reports_of_single_kinds_are_drawn(tmp_path):
    for rows in ([speed("full", "sdpa", 256)], [quality("full", "text")], [portrait("full")]):
        assert len(data_of(page_of(rows, tmp_path))["runs"]) == 1
    lost = [unfinished(speed("full", "sdpa", 256), "oom", "killed")]
    assert "No cell finished" in text_of(page_of(lost, tmp_path))
    with pytest.raises(ValueError, match="rows must hold at least one result"):
        build_report([], tmp_path / "report.html")


def test_the_same_rows_make_the_same_page(tmp_path):
    assert page_of(made_up(), tmp_path / "a") == page_of(made_up(), tmp_path / "b")


def test_csv_holds_one_line_a_row_and_nested_values_by_dotted_names(tmp_path):
    rows = made_up()
    with open(write_csv(rows, tmp_path / "results.csv"), newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows)
    assert list(lines[0])[:5] == ["kind", "backend", "status", "error", "id"]
    text = next(line for line in lines if line["kind"] == "quality" and line["backend"] == "full")
    assert float(text["metrics.bits_per_byte"]) == pytest.approx(LOSSES["full"])
    assert lines[0]["environment.cpu"] == "Made-up CPU"
    assert float(lines[0]["seconds"]) == rows[0]["seconds"]


def test_terminal_table_fits_eighty_columns():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(rich_table(Findings.of(made_up())))
    said = console.export_text()
    assert "transformer_xl" in said
    assert "…" not in said, "nothing is cut off"


def test_of_many_mechanisms_a_terminal_gets_a_screen_and_how_many_more_there_are(tmp_path):
    rows = []
    for number in range(65):
        options = {"longformer": {"window": 8 + number}}
        for length in LENGTHS[:2]:
            row = speed("longformer", "auto", length)
            rows.append(
                {**row, "config": {**row["config"], "options": options["longformer"]}, "id": f"{number}-{length}"}
            )
        lost = quality("longformer", "text", config={"attention": {"name": "longformer", "window": 8 + number}})
        rows.append(unfinished({**lost, "id": f"lost {number}"}, "failed", "boom " * 500))
    console = Console(width=100, record=True, file=io.StringIO())
    show(rows, tmp_path / "report.html", console)
    said = console.export_text()
    whole = Console(width=100, record=True, file=io.StringIO())
    whole.print(rich_table(Findings.of(rows)))
    shown, every = (text.count("longformer") for text in (said.partition("•")[0], whole.export_text()))
    assert len(said.splitlines()) < 100
    assert max(map(len, said.splitlines())) < 1100
    assert 0 < shown < every
    assert f"and {every - shown} more, in the report" in said
    assert "! and 55 more, in the report" in said
    assert f"report: {tmp_path / 'report.html'}" in said


def test_colours_belong_to_the_name_whatever_stands_beside_it():
    assert len(set(KNOWN.values())) == len(KNOWN) == len(PAIRS), "no shipped mechanism shares a colour"
    names = ["of_my_own", "bigbird", "longformer", "reformer", "transformer_xl"]
    for name in names:
        alone = styles({name: name})[name]
        sweep = {f"{name} (window={n})": name for n in range(20)} | {other: other for other in names} | {"full": "full"}
        together = styles(sweep)
        assert together[name] == alone
        assert {together[f"{name} (window={n})"].color for n in range(20)} == {alone.color}
        assert len({style[2:] for line, style in together.items() if line.startswith(name)}) == 21
    assert styles({"full": "full"})["full"].color == INK[0]
    assert place("of_my_own") == place("of_my_own") < len(PAIRS)


def test_what_runs_say_is_kept_once_and_found_by_its_name():
    rows = made_up(2)
    data = drawn(rows)
    assert len(data["runs"]) == len(rows)
    assert len({run["key"] for run in data["runs"]}) == len(rows)
    names = [name for name, _ in data["fields"]]
    assert len(set(names)) == len(names)
    assert all(len(set(values)) == len(values) for _, values in data["fields"])
    text = next(run for run in data["runs"] if run["key"] == "longformer-text-1")
    assert [ask(data, text, name) for name in ("mechanism", "task", "seed", "attention.name")] == [
        "longformer", "text, 512 tokens", "1", "longformer",
    ]  # fmt: skip
    assert text["n"]["score"] == pytest.approx(LOSSES["longformer"] + 0.004 / math.log(2), 1e-4)
    assert ask(data, text, "environment.cpu") == "Made-up CPU"
    assert text["curve"][0][-1] == 300


def test_long_curves_are_thinned_to_the_means_of_neighbours():
    row = quality("full", "text", curve=[[step, float(step % 2)] for step in range(1, 4001)])
    (run,) = drawn([row])["runs"]
    steps, values = run["curve"]
    assert len(steps) == 160
    assert steps[-1] == 4000
    assert set(values[:-1]) <= {0.48, 0.52, 0.5}


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (seconds(0.00123), "1.23 ms"), (seconds(4.5e-5), "45.0 µs"), (seconds(59.96), "60.0 s"),
        (seconds(600), "10.0 min"),
        (size(1000), "1,000 B"), (size(2**20), "1.00 MiB"), (size(3.5 * 2**30), "3.50 GiB"), (size(None), "–"),
        (millions(812_000), "812 k"), (millions(1.23e6), "1.23 M"), (significant(12345), "12,300"),
        (significant(0), "0"), (whole("1.00 GiB"), "1 GiB"), (whole("1.05 s"), "1.05 s"), (whole("100 ms"), "100 ms"),
    ],
)  # fmt: skip
def test_numbers_are_written_for_people(said, expected):
    assert said == expected


@pytest.mark.parametrize(
    ("low", "high", "binary"), [(5e6, 3e9, True), (1e-3, 40, False), (0.2, 0.9, False), (1, 2, True)]
)
def test_log_ticks_cover_the_range_with_few_round_values(low, high, binary):
    ticks = log_ticks(low, high, binary=binary)
    assert 2 <= len(ticks) <= 9
    assert ticks[0] <= low * 1.0001
    assert ticks == sorted(set(ticks))
    if binary:
        assert all(math.log2(tick).is_integer() for tick in ticks)
