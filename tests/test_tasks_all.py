"""What every task of conf/task/ keeps, whatever it is: rows, splits, baselines, and that each word alone trains."""

from collections.abc import Iterable, Iterator
from functools import cache
from itertools import islice
from typing import Any

import pytest
import torch

import attention_zoo as zoo
from attention_zoo.contract import Tokens
from attention_zoo.overview import markdown
from attention_zoo.tasks import catalogue
from attention_zoo.tasks.generated import PARTS, Generated, part_of
from attention_zoo.tasks.task import IGNORED, Batch
from attention_zoo.training.building import build
from attention_zoo.training.config import check, compose_training, options_of
from attention_zoo.training.models import mechanism_of, model_of
from attention_zoo.training.objective import objective_of
from attention_zoo.training.run import run_training

PUBLIC = [name for name in catalogue.names() if "public" in catalogue.class_of(name).__module__]
"""Of published data, which must be there first."""
NAMES = [name for name in catalogue.names() if name not in PUBLIC]
DRAWN = [name for name in NAMES if issubclass(catalogue.class_of(name), Generated)]
BATCH = 8


@cache
def composed(name: str, attention: str = "full") -> dict[str, Any]:
    words = [f"task={name}", f"attention={attention}", "tracker=none", "trainer.progress=none", "threads=1"]
    found = compose_training(words)
    found["task"] = dict(found["task"])
    few = {"test_examples": 64, "evaluation_rows": 2, "max_bytes": 400_000, "held_out_bytes": 40_000}
    for option, value in few.items():
        if option in found["task"]:
            found["task"][option] = value
    return {**found, "steps": 2, "batch": BATCH}


@cache
def task_of(name: str) -> Any:
    return build(composed(name)["task"], "task")


@cache
def catalogued() -> list[Any]:
    return list(catalogue.rows())


def length_of(name: str) -> int:
    return int(composed(name)["seq_len"])


def rows_of(batches: Iterable[Batch]) -> set[tuple[int, ...]]:
    """What a model reads of each row."""
    found = set()
    for batch in batches:
        read = batch.ids if batch.source is None else torch.cat([batch.ids, batch.source], 1)
        found |= {tuple(row) for row in read.tolist()}
    return found


def every(name: str) -> Iterator[Batch]:
    """Some batches of training, and the first of each set."""
    task = task_of(name)
    yield from islice(task.train_batches(BATCH, length_of(name), 0), 3)
    for batches in task.evaluation_sets(BATCH, length_of(name)).values():
        yield next(iter(batches))


@pytest.mark.parametrize("name", NAMES)
def test_batches_are_well_formed(name: str) -> None:
    task = task_of(name)
    for batch in every(name):
        assert 0 <= int(batch.ids.min()) <= int(batch.ids.max()) < task.vocab
        asked = batch.targets[batch.targets != IGNORED]
        answers = task.classes if task.objective in ("classify", "label") else task.vocab
        assert len(asked), "a batch in which nothing is asked"
        assert 0 <= int(asked.min()) <= int(asked.max()) < answers
        assert batch.targets.shape == (batch.ids.shape if task.objective != "classify" else batch.ids.shape[:1])
        assert (batch.source is None) == (task.objective != "seq2seq")
        assert batch.ids.shape[1] <= length_of(name) or not isinstance(task, Generated) or task.test
        if isinstance(batch.tokens, Tokens):
            assert batch.tokens.valid.any(1).all()
            if task.objective != "classify":
                assert not (batch.targets != IGNORED)[~batch.tokens.valid].any(), "padding is asked"
        for label in batch.labels.values():
            assert label.shape == batch.ids.shape[:1]
            assert 0 <= int(label.min()) <= int(label.max()) < task.classes
        for group in batch.groups.values():
            assert group.shape == batch.targets.shape


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_rows_and_another_one_others(name: str) -> None:
    task, length = task_of(name), length_of(name)
    first, again, other = (list(islice(task.train_batches(BATCH, length, seed), 3)) for seed in (0, 0, 1))
    for one, two in zip(first, again, strict=True):
        for a, b in zip(one.tensors(), two.tensors(), strict=True):
            assert torch.equal(a, b)
    assert rows_of(first) != rows_of(other)
    sets = task.evaluation_sets(BATCH, length)
    for one, two in zip(
        islice(iter(next(iter(sets.values()))), 2), islice(iter(next(iter(sets.values()))), 2), strict=True
    ):
        assert torch.equal(one.ids, two.ids)


@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on_where_its_state_was_taken(name: str) -> None:
    task, length = task_of(name), length_of(name)
    batches = task.train_batches(BATCH, length, 3)
    for _ in range(2):
        next(batches)
    state = batches.state_dict()
    expected = next(batches)
    again = task.train_batches(BATCH, length, 3)
    again.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(expected.tensors(), next(again).tensors(), strict=True))


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("_published")])
def test_training_watches_validation_and_the_result_is_on_test(name: str) -> None:
    sets = list(task_of(name).evaluation_sets(BATCH, length_of(name)))
    assert sets[0] == "validation"
    assert "test" in sets


@pytest.mark.parametrize("name", DRAWN)
def test_no_row_of_a_split_stands_in_another(name: str) -> None:
    task, length = task_of(name), length_of(name)
    if not task.disjoint:
        pytest.skip("one fixed table is to be learnt")
    sets = task.evaluation_sets(BATCH, length)
    test, validation = rows_of(sets["test"]), rows_of(sets["validation"])
    train = rows_of(islice(task.train_batches(BATCH, length, 0), 40)) | rows_of(
        islice(task.train_batches(BATCH, length, 1), 40)
    )
    for split, batches in (("train", islice(task.train_batches(BATCH, length, 0), 5)), ("test", sets["test"])):
        for batch in batches:
            assert set(part_of(batch).tolist()) <= set(PARTS[split])
    assert sorted(part for parts in PARTS.values() for part in parts) == list(range(8)), "each eighth is of one split"
    assert not test & validation
    assert not train & (test | validation)


@pytest.mark.parametrize("name", [name for name in DRAWN if name != "quote"])
def test_a_length_that_is_too_short_is_named(name: str) -> None:
    task = task_of(name)
    if task.name == "compression":
        pytest.skip("rows of one token are rows")
    with pytest.raises(ValueError, match=r"seq_len|every split") as caught:
        task.evaluation_sets(BATCH, 1)
    assert "\n" not in str(caught.value)
    assert "task.vocab" not in str(caught.value), "not every task has such an option"


@pytest.mark.parametrize("name", NAMES)
def test_something_trivial_is_there_to_be_beaten(name: str) -> None:
    task = task_of(name)
    chance, baselines = task.chance(length_of(name)), task.baselines(length_of(name))
    assert chance is not None
    assert baselines, "no baseline: what would a model have to beat?"
    worst = max(baselines.values()) if task.better == "higher" else -min(baselines.values())
    assert worst < (0.95 if task.better == "higher" else 0), "a trivial rule solves it"


@pytest.mark.parametrize("name", catalogue.names())
def test_each_task_says_in_a_line_what_it_is(name: str) -> None:
    (row,) = [row for row in catalogued() if row[0] == name]
    assert all(row)
    assert len(row[-1]) < 160
    assert catalogue.about(name).startswith(f"# {name}")


@pytest.mark.parametrize("name", NAMES)
def test_the_word_alone_builds_a_model_for_the_task(name: str) -> None:
    options = options_of(check(composed(name)))
    task = task_of(name)
    with torch.device("meta"):
        model: Any = model_of(options, mechanism_of(options), task, objective_of(task))
    assert model.parameter_count > 0


@pytest.mark.parametrize("name", [name for name in NAMES if "published" not in name and "zoology" not in name])
def test_the_word_alone_trains(name: str, tmp_path: Any) -> None:
    row = run_training(composed(name), tmp_path)
    assert (row["status"], row["error"]) == ("ok", None)
    assert row["metric"] in row["metrics"]


@pytest.mark.slow
@pytest.mark.parametrize("attention", [name for name in zoo.available() if name != "full"])
@pytest.mark.parametrize("name", [name for name in NAMES if "published" not in name and "zoology" not in name])
def test_every_mechanism_that_can_is_trained_on_it(name: str, attention: str, tmp_path: Any) -> None:
    row = run_training(composed(name, attention), tmp_path)
    can = zoo.registry.recipe(attention)[0].declared
    allowed = task_of(name).objective == "causal_lm" or can.two_sided
    if composed(name, attention)["model"]["positions"] in ("rotary", "alibi"):  # as some protocols ask for
        allowed = allowed and composed(name, attention)["model"]["positions"] in can.positions
    assert row["status"] == ("ok" if allowed else "unsupported"), row["error"]


def test_the_readmes_table_is_that_of_the_command() -> None:
    from test_readme import between

    assert markdown(catalogue.COLUMNS, catalogue.rows()) == between("tasks")
