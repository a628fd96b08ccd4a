"""The interval of one figure over the rows that it was evaluated on."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from report_rows import quality
from torch import nn

from attention_zoo.report.quality import tasks
from attention_zoo.statistics.resampled import interval_over_rows
from attention_zoo.tasks.task import IGNORED, Batch, Task
from attention_zoo.training.evaluate import evaluate
from attention_zoo.training.precision import Precision


def accuracy(loss: float, hits: float) -> float:
    return hits


def test_it_covers_the_figure_of_all_rows_in_about_95_of_100_draws():
    """Rows whose answers stand and fall together: an interval over single answers would be far too narrow."""
    random = np.random.default_rng(0)
    covered, narrow = 0, 0
    for _ in range(200):
        chance = random.beta(8, 2, size=120)
        hits = random.binomial(16, chance)
        low, high = interval_over_rows(np.stack([hits * 0.0, hits, np.full(120, 16.0)], 1), accuracy)
        covered += low <= 0.8 <= high
        alone = 1.96 * math.sqrt(0.8 * 0.2 / (120 * 16))
        narrow += abs(hits.sum() / (120 * 16) - 0.8) <= alone
    assert 0.90 <= covered / 200 <= 0.99
    assert narrow / 200 < 0.85


def test_a_score_that_is_no_mean_has_its_own_interval():
    random = np.random.default_rng(1)
    rows = np.stack([random.gamma(4, 8, size=60), random.binomial(32, 0.5, 60), np.full(60, 32.0)], 1)
    nats = interval_over_rows(rows, lambda loss, hits: loss)
    bits = interval_over_rows(rows, lambda loss, hits: loss / math.log(2))
    assert bits == pytest.approx([end / math.log(2) for end in nats])
    assert nats == interval_over_rows(rows, lambda loss, hits: loss), "the same draws every time"


def test_one_row_tells_no_interval_and_rows_without_answers_do_not_count():
    assert interval_over_rows(np.array([[1.0, 1.0, 2.0]]), accuracy) is None
    assert interval_over_rows(np.array([[1.0, 1.0, 2.0], [0.0, 0.0, 0.0]]), accuracy) is None


class Streams(Task):
    name, vocab, objective, streams = "streams", 4, "causal_lm", True


class Likely(nn.Module):
    """Says 1 everywhere."""

    def forward(self, ids, tokens=None, **given):
        logits = torch.zeros(*ids.shape, 4)
        logits[..., 1] = 1.0
        return SimpleNamespace(logits=logits, state=None, losses={})


def test_a_row_that_goes_on_in_the_next_batch_is_one_row():
    def batch(targets, fresh):
        targets = torch.tensor(targets)
        return Batch(targets * 0, targets, None, torch.tensor(fresh))

    batches = [
        batch([[1, 2], [1, 1], [IGNORED, 0]], [True, True, True]),
        batch([[1, 1], [0, 0], [0, 1]], [False, True, False]),
        batch([[1, 3]], [True]),
    ]
    given = {"precision": Precision("float32", "cpu"), "device": "cpu", "carry": False}
    found = evaluate(Likely(), Streams(), batches, **given)
    assert found.by_row[:, 1:].tolist() == [[3, 4], [2, 2], [1, 3], [0, 2], [1, 2]]
    assert found.by_row[:, 0].sum() / found.by_row[:, 2].sum() == pytest.approx(found.metrics["loss"])

    class Apart(Streams):
        streams = False

    assert len(evaluate(Likely(), Apart(), batches, **given).by_row) == 7


def test_the_report_says_it_of_one_seed_alone():
    """Over several seeds it says how far those lie apart, which is what comparisons rest on."""
    sets = {"test": {"seq_len": 64, "by_group": {}, "loss_by_position": [], "rows": 512, "interval": [0.9, 0.95]}}
    one = [quality("full", "mqar", 0, by_set=sets)]
    (found,) = tasks(one)
    assert found.learnt[0].words() == "99.7 % (95 % over 512 rows: 90.0–95.0)"
    (found,) = tasks([*one, quality("full", "mqar", 1, by_set=sets)])
    assert "rows" not in found.learnt[0].words()
