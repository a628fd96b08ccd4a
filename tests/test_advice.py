"""Advice from invented rows: the sentences that must come, and those that must not. No figure here was measured."""

from __future__ import annotations

import json
import math
import re
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_page import text_of
from report_rows import quality, speed
from rich.console import Console
from scipy import stats

from attention_zoo.advice import sources
from attention_zoo.advice.command import AdviseConfig, advise, question_of, told
from attention_zoo.advice.gaps import gaps
from attention_zoo.advice.kinds import KINDS, WORDS, kinds_of
from attention_zoo.advice.lines import line_of
from attention_zoo.advice.matrix import Matrix
from attention_zoo.advice.prices import FARTHEST, price
from attention_zoo.advice.section import section
from attention_zoo.advice.sentences import Advice, advice
from attention_zoo.commands.main import main
from attention_zoo.report import build_report, costs
from attention_zoo.report.costs import PEAK, TIME
from attention_zoo.report.reach import ALL, accuracy, reach_of
from attention_zoo.report.rows import sift
from attention_zoo.statistics import Pairs, judge, preset_seeds

SEEDS = 7
BRIEF = {"curve": [], "quality_curve": [], "loss_by_position": []}
LONGFORMER = {"name": "longformer", "window": 16}
OPTIONS = {
    "full": {"name": "full"}, "longformer": LONGFORMER, "bigbird": {"name": "bigbird", "block": 8, "random": 1},
    "reformer": {"name": "reformer", "chunk": 16, "rounds": 2},
    "transformer_xl": {"name": "transformer_xl", "segment_length": 16, "memory_length": 16},
}  # fmt: skip
GIVEN = {"longformer": (16, 36), "bigbird": (63, 63), "reformer": (63, 63), "transformer_xl": (31, 63)}
"""Backend -> layer_reach and reach of rows of 64 tokens."""


def trained(backend: str, task: str, seed: int, score: float, **changes: Any) -> dict[str, Any]:
    """A training at the options above."""
    metric = "bits_per_byte" if task == "text" else "accuracy"
    row = quality(
        "full", "text" if task == "text" else "mqar", seed, metrics={metric: score, "loss": 1.0},
        evaluations={"test": {metric: score}}, metric=metric, better="lower" if task == "text" else "higher", **BRIEF,
    )  # fmt: skip
    layer, model = GIVEN.get(backend, (63, 63))
    row |= {
        "backend": backend, "task": task, "id": f"{backend}-{task}-{seed}", "seq_len": 64,
        "config": {"attention": dict(OPTIONS[backend])},
        "given": {"layer_reach": layer, "reach": model, "length": 64, "keys_mean": 10.0},
    }  # fmt: skip
    return row | changes


def recall(backend: str, seed: int, near: float, far: float) -> dict[str, Any]:
    """Answers 1 to 16 tokens back and 17 to 64, a hundred in each bin."""
    bins = [[at, near if at <= 16 else far, 1.0, 100] for at in (1, 2, 4, 8, 16, 32, 64)]
    score = (5 * near + 2 * far) / 7
    return trained(backend, "mqar", seed, score, by_group={"distance": bins})


def measured(backend: str = "longformer", lengths: tuple[int, ...] = (1024, 4096, 16384), **changes: Any) -> list[Any]:
    options = {key: value for key, value in OPTIONS[backend].items() if key != "name"}
    kernel = "sdpa" if backend == "full" else "auto"
    return [speed(backend, kernel, n, config={"options": options}, flops=10**6 * n, **changes) for n in lengths]


def known(rng: np.random.Generator | None = None) -> list[dict[str, Any]]:
    """Seven seeds: longformer as good within, 80 points worse beyond; and its costs."""
    rng = rng or np.random.default_rng(0)
    rows = []
    for seed in range(SEEDS):
        rows.append(recall("full", seed, 0.995, 0.99))
        rows.append(recall("longformer", seed, 0.994 + 0.001 * rng.random(), 0.19 + 0.02 * rng.random()))
    return [*rows, *measured()]


def asked(rows: list[Any], **given: Any) -> tuple[Advice, str]:
    config = AdviseConfig(**{"length": 16384, "memory": "8GiB", "problem": "recall", **given})
    question = question_of(config)
    found = advice(Matrix.of(sift(rows), question.length, kinds=question.kinds, device=question.device), question)
    return found, "\n".join(map(str, told(found)))


def test_reach_is_of_the_options_and_of_what_rows_say() -> None:
    far = reach_of(recall("longformer", 0, 1.0, 0.0))
    assert (far.surely, far.layer, far.model, far.edge) == (16, 16, 36, 16)
    said = {16: "surely", 17: "through layers", 36: "through layers", 37: "no", 16384: "no"}
    assert {at: far.sees(at) for at in said} == said
    assert reach_of(recall("full", 0, 1.0, 1.0)).sees(10**9) == "surely"
    hashed = reach_of(recall("reformer", 0, 1.0, 1.0))
    assert (hashed.surely, hashed.edge) == (None, 63)
    assert hashed.sees(63) == "perhaps"
    assert hashed.sees(64) == "not known", "its rows are of 64 tokens"
    shortened = recall("full", 0, 1.0, 1.0)
    shortened["config"] = {"attention": {"name": "full"}, "model": {"shorten": "1@1 2@2 1@1"}}
    assert reach_of(shortened).surely is None


def test_a_figure_is_never_of_both_sides_of_the_edge() -> None:
    row = recall("longformer", 0, 0.9, 0.1)
    assert accuracy(row, 16, beyond=False) == pytest.approx(0.9)
    assert accuracy(row, 16, beyond=True) == pytest.approx(0.1)
    row["by_group"]["distance"] = [[16, 1.0, 1.0, 100], [32, 0.5, 1.0, 100], [64, 0.2, 1.0, 100]]
    assert accuracy(row, 24, beyond=False) == pytest.approx(1.0), "17 to 32 holds both sides of 24"
    assert accuracy(row, 24, beyond=True) == pytest.approx(0.2)
    assert accuracy(row, None, beyond=True) is None
    assert accuracy(row, 64, beyond=True) is None


def test_gaps_are_those_of_the_rows() -> None:
    rows = known()
    found = gaps(sift(rows), kinds_of("recall"))
    line = line_of(rows[1])
    for part, place in (("recall_within", 16), ("recall_beyond", 64)):
        gap = found[line, part]
        own = [row for row in rows if row["kind"] == "quality" and row["backend"] == "longformer"]
        ends = [{each[0]: each[1] for each in row["by_group"]["distance"]}[place] for row in own]
        full = 0.995 if part == "recall_within" else 0.99
        differences = np.array(ends) - full
        low, high = stats.t.interval(0.95, SEEDS - 1, differences.mean(), stats.sem(differences))
        assert gap.value == pytest.approx(np.mean(ends))
        assert gap.full == pytest.approx(full)
        assert gap.verdict is not None
        assert gap.verdict.pairs.mean == pytest.approx(differences.mean())
        assert gap.interval == pytest.approx((low, high))
    assert found[line, "recall_within"].verdict.equivalent
    assert found[line, "recall_beyond"].judged == "worse"


def test_what_must_be_said_and_what_must_not() -> None:
    rows = known()
    found, text = asked(rows)
    lines = {line.label: many for line, many in found.lines.items()}
    said = {each.about: each for each in lines["longformer (window=16)"] if each.about != "learns"}
    peak = next(row["peak_bytes"] for row in rows if row["kind"] == "speed" and row["length"] == 16384)
    time = next(row["seconds"] for row in rows if row["kind"] == "speed" and row["length"] == 16384)
    assert said["fits"].text == f"fits: needs {peak / 2**20:.0f} MiB, measured at 16,384 tokens"
    assert said["costs"].text == f"takes {time * 1e3:.0f} ms, measured at 16,384 tokens"
    assert said["sees"].text.startswith(
        "does not see 16,384 tokens back: a query of a layer surely sees 16 tokens back"
    )
    assert re.search(
        r"recall beyond reach \(mqar, 64 tokens, over 16 back\): worse than full attention, gap −7\d\.\d", text
    )
    assert re.search(r"recall within reach \(mqar, 64 tokens, up to 16 back\): .*as good", text)
    assert "better" not in text
    (end,) = [each for each in found.ends if each.text.startswith("Known to")]
    assert end.text.endswith("as well as full attention: none."), "longformer does not see so far"
    found, text = asked(rows, distance=16)
    assert text.count("learn recall at that distance as well as full attention: longformer (window=16).") == 1
    assert "beyond reach as well" not in text, "it is 80 points worse there"
    rows += measured("full", seconds=9.0)
    assert "as well as full attention: full and longformer (window=16)." in asked(rows, distance=16)[1]
    assert "as well as full attention: full." in asked(rows, distance=63)[1]
    assert "as well as full attention: none." in asked(rows, distance=64)[1], "rows of 64 hold no such distance"


def test_what_is_not_asked_keeps_nobody_from_the_end() -> None:
    """Without a memory whether it fits is no part of the sentence, be it known or not."""
    rows = known()
    _, text = asked(rows, length=64, distance=16, memory=None)
    assert "whether it fits is not known: shorter than" in text
    assert "Known to see 16 tokens back and learn recall at that distance as well as full attention: full and" in text
    _, text = asked(rows, length=64, distance=16)
    assert "Known to fit, see 16 tokens back and learn recall at that distance as well as full attention: none." in text


def test_costs_of_another_setting_are_not_denied() -> None:
    rows = sift(known())
    question = question_of(AdviseConfig(problem="recall"))
    text = "\n".join(map(str, told(advice(Matrix.of(rows, 4096, kinds=question.kinds, phase="decode"), question))))
    assert "no costs of it were measured on this device and in this setting" in text
    assert "measured on this device\n" not in text


def test_learning_is_of_the_rows_that_were_trained() -> None:
    said = "All that is learnt was learnt in rows of 64 tokens: of rows of 16,384 nothing is known."
    found, text = asked(known(), distance=16)
    assert said in text
    assert [each.rows[0]["seq_len"] for each in found.ends if each.text == said] == [64]
    assert "All that is learnt" not in asked(known(), length=64, distance=16)[1]


def test_positions_of_its_own_are_said_beside_a_gap() -> None:
    """They may be all of it: on text they are worth more than the pattern."""
    rows = [
        trained(backend, "text", seed, score + 0.001 * seed + (score < 2.6) * 0.001 * (seed % 2),
                given={"positions": "none", "layer_reach": 16, "length": 64, "keys_mean": 10.0, "reach": 36})
        for backend, score in (("full", 2.6), ("longformer", 2.4), ("transformer_xl", 2.5)) for seed in range(SEEDS)
    ]  # fmt: skip
    found, _ = asked(rows, problem="text")
    said = {line.backend: many[-2].text for line, many in found.lines.items()}
    assert "better than full attention" in said["transformer_xl"]
    assert said["transformer_xl"].endswith("7 seeds, with positions of its own where full attention has none")
    assert said["longformer"].endswith("of 7 seeds")


def test_what_is_not_told_apart_says_what_would_have_been() -> None:
    random = np.random.default_rng(6)
    rows = [
        trained(backend, "copy", seed, 0.97 + 0.01 * random.normal())
        for backend in ("full", "longformer") for seed in range(SEEDS)
    ]  # fmt: skip
    _, text = asked(rows, problem="copy")
    assert re.search(
        r"not told apart from full attention, gap [−+][\d.]+ points \([−+][\d.]+ to [−+][\d.]+\), 95 % interval of 7 "
        r"seeds; these 7 seeds could have shown [\d.]+ points; [\d,]+ seeds would show the [\d.]+ points seen",
        text,
    )


def test_each_sentence_names_its_rows() -> None:
    found, text = asked(known())
    ids = {row["id"] for row in known()}
    for many in found.lines.values():
        for each in many:
            assert each.rows or "not known" in each.text, each.text
            assert {row["id"] for row in each.rows} <= ids
    cited = dict(re.findall(r"^\[(\d+)\] (.*)$", text, re.MULTILINE))
    used = set(re.findall(r"\[(\d+)\]", re.sub(r"^\[.*$", "", text, flags=re.MULTILINE)))
    assert used == set(cited)
    assert all("Made-up CPU" in each and "code " in each for each in cited.values())
    assert any("longformer-mqar-0" in each for each in cited.values())


def test_equal_mechanisms_are_hardly_ever_called_better_or_worse() -> None:
    random, wrong = np.random.default_rng(3), 0
    for _ in range(30):
        rows = []
        for seed in range(SEEDS):
            together = 0.97 + 0.01 * random.normal()
            for backend in OPTIONS:
                rows.append(trained(backend, "copy", seed, float(np.clip(together + 0.01 * random.normal(), 0, 1))))
        found = Matrix.of(sift(rows)).cells.values()
        wrong += any(gap.judged in ("better", "worse") for gap in found)
    assert wrong <= 4


def test_unequal_ones_are_told_apart() -> None:
    random, right = np.random.default_rng(4), 0
    for _ in range(24):
        rows = []
        for seed in range(SEEDS):
            together = 0.97 + 0.01 * random.normal()
            for backend in OPTIONS:
                gap = 0.02 * math.sqrt(2) if backend == "longformer" else 0.0
                score = together - gap + 0.01 * random.normal()
                rows.append(trained(backend, "copy", seed, float(np.clip(score, 0, 1))))
        found = Matrix.of(sift(rows)).cells
        right += [gap.judged for (line, _), gap in found.items() if line.backend == "longformer"] == ["worse"]
    assert right >= 18


def test_within_and_beyond_reach_are_one_family() -> None:
    """Of all that both columns of one task say nothing is false with 95 %: each alone would make that 92 % of equal
    mechanisms. And it does not depend on how many columns are asked for."""
    random = np.random.default_rng(8)
    scores = 0.97 + 0.005 * random.normal(size=(3, SEEDS, 2))
    backends = ("full", "longformer", "transformer_xl")
    rows = [
        recall(backend, seed, *map(float, scores[number, seed]))
        for number, backend in enumerate(backends) for seed in range(SEEDS)
    ]  # fmt: skip
    found = gaps(sift(rows), kinds_of("recall"))
    by_hand = {
        (backend, part): Pairs.of(enumerate(scores[number, :, side]), enumerate(scores[0, :, side]))
        for number, backend in enumerate(backends) if number for side, part in enumerate(("within", "beyond"))
    }  # fmt: skip
    expected = judge({" ".join(key): pairs for key, pairs in by_hand.items()}, 0.01)
    told = {f"{line.backend} {key.removeprefix('recall_')}": gap for (line, key), gap in found.items()}
    for name, verdict in expected.items():
        gap = told[name]
        assert gap.verdict is not None
        assert (gap.verdict.level, gap.verdict.detectable) == pytest.approx((verdict.level, verdict.detectable))
        assert (gap.verdict.different, gap.verdict.equivalent) == (verdict.different, verdict.equivalent)
    assert expected["longformer within"].level == pytest.approx(0.05 / 4), "four comparisons, none of them decided"
    alone = gaps(sift(rows), kinds_of("recall_within"))
    assert {cell: gap.verdict for cell, gap in alone.items()} == {cell: found[cell].verdict for cell in alone}


def test_one_seed_ranks_nothing_and_says_what_would() -> None:
    rows = [recall(backend, 0, 0.99, 0.99 if backend == "full" else 0.2) for backend in OPTIONS]
    matrix = Matrix.of(sift(rows))
    assert not any(gap.known for gap in matrix.cells.values())
    assert matrix.ranking() == (
        "No ranking from 1 seed: 7 seeds are needed for 4 mechanisms beside full attention, `preset=choice` runs them."
    )
    assert "not known: one seed; reached 20.0 %" in matrix.markdown()


def test_enough_seeds_of_trainings_that_were_too_short_are_not_called_too_few() -> None:
    rows = [recall(backend, seed, 0.5, 0.2) for backend in OPTIONS for seed in range(7)]
    matrix = Matrix.of(sift(rows))
    assert not any(gap.known for gap in matrix.cells.values())
    assert matrix.ranking() == "No ranking from 7 seeds: each cell says why."
    assert "undertrained" in matrix.markdown()
    assert Matrix.of(sift(known())).ranking() is None
    _, text = asked(rows)
    assert not re.search(r"better|worse than|as good", text)


def test_seeds_are_asked_for_as_many_comparisons_as_there_are() -> None:
    """Thirteen mechanisms are twenty-six comparisons where answers lie within and beyond the reach of each."""
    rows = [recall("full", 0, 0.99, 0.99)]
    for window in range(8, 21):
        row = recall("longformer", 0, 0.99, 0.2)
        row["config"] = {"attention": {"name": "longformer", "window": window}}
        rows.append({**row, "id": f"longformer-{window}"})
    matrix = Matrix.of(sift(rows))
    assert (preset_seeds(13), preset_seeds(26)) == (8, 9)
    assert {gap.family for gap in matrix.cells.values()} == {26}
    assert (matrix.ranking() or "").startswith("No ranking from 1 seed: 9 seeds are needed for 13 mechanisms")
    assert "9 are needed for 26 comparisons" in asked(rows)[1]


def test_undertrained_stands_beside_its_bar() -> None:
    rows = [
        trained(backend, "text", seed, 3.3 + 0.01 * seed, baselines={"order-3 n-gram": 2.063})
        for backend in ("full", "longformer") for seed in range(SEEDS)
    ]  # fmt: skip
    matrix = Matrix.of(sift(rows))
    assert not any(gap.known for gap in matrix.cells.values())
    assert "not known: undertrained; reached 3.330" in matrix.markdown()
    (said,) = matrix.bars()
    assert said == (
        "On text, 64 tokens full attention reached 3.330 bits per byte, the best rule without a model (order-3 n-gram) "
        "2.063: undertrained."
    )


def test_a_mechanism_that_misses_what_it_sees_is_undertrained() -> None:
    rows = [row for row in known() if row["backend"] == "full"]
    rows += [recall("longformer", seed, 0.5, 0.1 + 0.01 * seed) for seed in range(SEEDS)]
    found = gaps(sift(rows), kinds_of("recall"))
    (why,) = {gap.why for gap in found.values() if gap.line.backend == "longformer"}
    assert why is not None
    assert why.startswith("undertrained: it reached 50.0 % within the 16 tokens")


def test_short_and_local_text_are_told_apart_by_what_rows_saw() -> None:
    whole = {"given": {"layer_reach": 63, "length": 64, "keys_mean": 32.5, "reach": 63}}
    for given, key in ((whole, "short"), ({}, "text")):
        rows = [trained(backend, "text", 0, 2.0, **given) for backend in ("full", "longformer")]
        assert {key for _, key in Matrix.of(sift(rows)).cells} == {key}


def test_copies_of_a_word_that_is_gone_are_the_streaming_column() -> None:
    for start, key in ((True, "copy"), (False, "streaming")):
        rows = [trained(backend, "copy", 0, 0.9) for backend in ("full", "longformer")]
        for row in rows:
            row["config"]["task"] = {"start": start, "reverse": not start}
        assert {key for _, key in Matrix.of(sift(rows)).cells} == {key}


# --- costs -----------------------------------------------------------------------------------------------------------


def series(rows: list[Any]) -> costs.Series:
    (setting,) = costs.settings(rows)
    (found,) = costs.lines(rows, setting)
    return found


def test_a_cost_is_measured_or_derived_from_its_own_rows() -> None:
    line = series(measured())
    own = {length: row["seconds"] for length, row in line.rows.items()}
    assert price(line, TIME, 4096).value == own[4096]
    between = price(line, TIME, 8192)
    assert not between.measured
    assert between.value == pytest.approx(math.sqrt(own[4096] * own[16384]))
    assert "interpolated between 4,096 and 16,384" in between.how
    beyond = price(line, TIME, 65536)
    assert beyond.value == pytest.approx(own[16384] * 4**1.04)
    assert "extrapolated from 16,384 tokens as length^1.04" in beyond.how
    assert beyond.words(TIME).startswith("≈ ")


def test_nothing_is_said_too_far_or_too_near_or_from_one_length() -> None:
    line = series(measured())
    for length, said in (
        (FARTHEST * 16384 + 1, "more than 4 times the longest measured length"), (512, "shorter than the 1,024 tokens"),
    ):  # fmt: skip
        found = price(line, TIME, length)
        assert found.value is None
        assert said in found.how
    alone = price(series(measured(lengths=(1024,))), PEAK, 2048)
    assert alone.value is None
    assert "no growth is known" in alone.how


def test_two_lengths_of_growth_beyond_the_flops_say_nothing_of_a_third() -> None:
    """A core that leaves its cache between them would go on leaving it."""
    rows = [*known(), *measured("bigbird", (1024, 4096), seconds=1.0)]
    for row in rows:
        if row["kind"] == "speed" and row["backend"] == "bigbird":
            row["seconds"] = (row["length"] / 1024) ** 1.3
    said = asked(rows)[0].lines
    (costs,) = (
        each for line, many in said.items() if line.backend == "bigbird" for each in many if each.about == "costs"
    )
    assert "two lengths do not show whether its growth has settled by 4,096 tokens, length^1.30" in costs.text
    rows.append({**rows[-1], "id": "third", "length": 512, "seconds": 0.5**1.3, "flops": 512 * 10**6})
    said = asked(rows)[0].lines
    (costs,) = (
        each for line, many in said.items() if line.backend == "bigbird" for each in many if each.about == "costs"
    )
    assert "extrapolated from 4,096 tokens as length^1.30" in costs.text


def test_reach_that_nobody_knows_is_said_and_what_was_reached() -> None:
    rows = known()
    for row in rows:
        if row["kind"] == "quality" and row["backend"] == "longformer":
            row["given"] = {**row["given"], "layer_reach": None}
            row["config"] = {**row["config"], "attention": {"name": "hourglass_of_somebody"}}
    _, text = asked(rows)
    assert re.search(r"how far it sees is not known, so that its recall is not told by distance \(in all: \d", text)


def test_rows_of_another_verdict_are_told_beside() -> None:
    found = {key: gap for (line, key), gap in gaps(known(), kinds_of("recall")).items() if line.backend == "longformer"}
    good, worse = found["recall_within"], found["recall_beyond"]
    assert re.search(r"; other rows say worse, gap −7\d[^;]*, 7 seeds \(", good.beside(worse).plainly())
    assert "other rows" not in good.beside(good).plainly()
    longer = [{**row, "id": f"longer-{row['id']}", "seq_len": 128} for row in known() if row["kind"] == "quality"]
    for row in longer:
        if row["backend"] == "longformer":
            row["by_group"] = {
                "distance": [[edge, 0.96 * right, *rest] for edge, right, *rest in row["by_group"]["distance"]]
            }
    both = gaps([*known(), *longer], kinds_of("recall_within"))
    (gap,) = (gap for gap in both.values() if gap.line.backend == "longformer")
    assert "; other rows say " in gap.plainly(), gap.plainly()


def test_growth_that_has_not_settled_is_not_extended() -> None:
    rows = measured("full", (1024, 4096, 16384))
    rows[2]["seconds"] *= 3  # the square begins to rule
    assert price(series(rows), TIME, 32768).value is None
    rows = measured()
    for row in rows:
        row["flops"] = int(row["length"] ** 1.5)
    found = price(series(rows), TIME, 32768)
    assert found.value is None
    assert "FLOPs as length^1.50" in found.how
    assert price(series(rows), PEAK, 32768).value is not None, "bytes are no FLOPs"
    for row in rows:
        row["flops"], row["seconds"] = 10**6 * row["length"], row["seconds"] / row["length"] ** 0.5
    slow = price(series(rows), TIME, 32768)
    assert slow.value == pytest.approx(2 * rows[2]["seconds"]), "never slower than in proportion"


def test_what_ran_out_of_memory_does_not_fit_and_says_what_would() -> None:
    rows = [*known(), *measured("full")]
    found, text = asked(rows, memory="100MiB")
    assert "does not fit: needs" in text
    (end,) = [each for each in found.ends if each.about == "fits"]
    assert end.text.startswith("Nothing is known to fit 100 MiB at 16,384 tokens; what would: full up to about ")
    up_to = int(re.findall(r"longformer \(window=16\) up to about ([\d,]+) tokens", end.text)[0].replace(",", ""))
    peaks = {row["length"]: row["peak_bytes"] for row in rows if row["kind"] == "speed" and row["backend"] != "full"}
    assert peaks[1024] * (up_to / 1024) ** 1.01 <= 100 * 2**20, "what would fit fits"
    assert up_to > 2048
    assert "at least" not in end.text
    _, text = asked(rows, memory="8GiB", length=10**6)
    carried = "longformer (window=16) up to about 65,000 tokens at least, as far as its rows carry"
    assert carried in text, "four times what was measured, and no limit of its memory"
    rows[-1] |= {"status": "oom", "error": "killed", "seconds": None, "peak_bytes": None}
    _, text = asked(rows)
    assert "does not fit: out of memory" in text


def test_costs_of_other_options_are_said_to_be() -> None:
    rows = [row for row in known() if row["kind"] == "quality"]
    rows += [speed("longformer", "auto", n) for n in (1024, 4096, 16384)]
    found, text = asked(rows)
    assert "at other options than were trained: longformer (defaults)" in text
    line = next(line for line in found.lines if line.label == "longformer (window=16)")
    assert found.lines[line][0].state == "not known"
    assert "[of longformer (defaults)]" in Matrix.of(sift(rows), 16384).markdown()
    assert "as well as full attention: none." in asked(rows, distance=16)[1]


def test_options_are_alike_however_they_are_written() -> None:
    given = recall("longformer", 0, 1.0, 0.0)
    written = {**LONGFORMER, "sinks": 0, "dilation": 1, "kernel": "auto", "global_projections": "shared"}
    assert line_of(given) == line_of({**given, "config": {"attention": written}}) == line_of(measured()[0])
    assert line_of({**given, "config": {"attention": {"name": "longformer", "window": 256}}}).label == (
        "longformer (defaults)"
    )


# --- page and command ------------------------------------------------------------------------------------------------


def test_the_report_holds_the_matrix(tmp_path: Path) -> None:
    rows = known()
    page = text_of(build_report(rows, tmp_path / "report.html").read_text())
    assert "Which attention for which problem" in page
    assert re.search(r"−7\d\.\d points \(−\d+\.\d to −\d+\.\d\), worse", page)
    alone = text_of(build_report([recall(b, 0, 1.0, 0.5) for b in OPTIONS], tmp_path / "one.html").read_text())
    assert "No ranking from 1 seed: 7 seeds are needed" in alone
    assert section(measured(), None, None) == "", "nothing was trained"


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_command_reads_rows_and_writes_the_matrix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_rows(tmp_path / "a" / "results.jsonl", known())
    words = ["length=16384", "memory=8GiB", "task=recall", "device=cpu", f"results={rows}", f"output={tmp_path}/out"]
    assert main(["advise", *words]) == 0
    said = capsys.readouterr().out
    assert "longformer (window=16)" in said
    assert "results.jsonl: longformer-1024" not in said
    assert "day not known" in said
    cells = json.loads((tmp_path / "out" / "matrix.json").read_text())
    (cell,) = [
        each for each in cells if each["column"] == "recall_beyond" and each["mechanism"].startswith("longformer")
    ]
    assert cell["known"]
    assert cell["gap"] == pytest.approx(-0.79, abs=0.02)
    assert {row["id"] for row in cell["rows"]} >= {"longformer-mqar-0", "full-mqar-6"}
    assert (tmp_path / "out" / "matrix.csv").read_text().startswith("mechanism,column,")
    assert "| longformer (window=16) |" in (tmp_path / "out" / "matrix.md").read_text()


def test_what_it_comes_to_is_said_first_and_silence_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*known(), *measured("bigbird", seconds=1.0)]
    found, _ = asked(rows)
    (other,) = (line.label for line in found.lines if line.backend == "bigbird")
    assert [line.label for line in found.telling()] == ["full", "longformer (window=16)"]
    brief = [each if isinstance(each, str) else "TABLE" for each in told(found, details=False)]
    ends = [number for number, each in enumerate(brief) if each.startswith("Known to fit")]
    assert ends[0] < brief.index("TABLE") < brief.index("longformer (window=16)")
    silent = f"Of these rows give no verdict on what is asked (details=true says why): {other}."
    assert silent in brief
    assert other not in brief
    every = [each if isinstance(each, str) else "TABLE" for each in told(found)]
    assert other in every
    assert silent not in every
    shown = next(each for each in told(found, details=False) if not isinstance(each, str))
    Console(width=200).print(shown)
    row = next(each for each in capsys.readouterr().out.splitlines() if "longformer" in each)
    assert re.search(r"yes, \d+ MiB +no +.*as good +−7\d.*worse +\d+ ms", row), row


def test_rows_of_several_files_are_families_of_their_own(tmp_path: Path) -> None:
    other = known(np.random.default_rng(5))
    one = write_rows(tmp_path / "a" / "results.jsonl", [{**row, "id": f"other-{row['id']}"} for row in other])
    two = write_rows(tmp_path / "b" / "results.jsonl", known())
    rows = sources.rows_of([str(one), str(two)])
    assert {row["from"] for row in rows} == {str(one), str(two)}
    found = gaps(rows, kinds_of("recall"))
    assert all(gap.known for gap in found.values() if gap.line.backend == "longformer")


def test_the_rows_of_a_clone_are_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = StringIO()
    advise(AdviseConfig(length=4096, problem="text", details=True), Console(file=out, width=200))
    assert "experiments/results/compare_cpu/results.jsonl" in out.getvalue()
    assert re.search(r"\d{4}-\d\d-\d\d, commit [0-9a-f]{7}|day not known", out.getvalue())
    told = [line for line in out.getvalue().splitlines() if re.search(r"(worse|better) than full|as good as", line)]
    assert all(re.search(r"95 % interval of ([7-9]|\d\d) seeds", line) for line in told), "one seed gives no verdict"
    monkeypatch.setattr(sources, "COMMITTED", tmp_path / "none")
    with pytest.raises(
        ValueError, match="results must name files or folders of results: this installation is no clone"
    ):
        sources.rows_of(None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["task=recal"], r"task must be one of .*, got 'recal'; did you mean recall\?"),
        (["length=0"], "length must be an integer of at least 1|length must be"),
        (["memory=lots"], "memory must be a size such as 8GiB or 512MiB, or null, got 'lots'"),
        (["memory=0"], "memory must be a size"),
        (["device=tpu"], "device must be one of cpu, cuda, got 'tpu'"),
        (["length=64", "distance=65"], "distance must be at most the length, 64, got 65"),
        (["results=nowhere"], "results must name JSONL files or folders of runs, got 'nowhere', which does not exist"),
        (["phase=backwards"], "phase must be one of"),
        (["lenght=3"], "did you mean length"),
    ],
)
def test_wrong_words_are_one_clear_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(said, error), error


def test_every_word_means_columns() -> None:
    assert {kind.key for word in WORDS for kind in kinds_of(word)} == {kind.key for kind in KINDS}
    assert ALL > 2**60
