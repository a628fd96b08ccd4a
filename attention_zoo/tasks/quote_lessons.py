"""Lessons before quote matching: rows of which a part of the answer pays already, in turn, easier first.

    unrelated    5 1 7 2 | 5 1 7 2      1        5 1 7 2 | 0 9 9 4      0: other bytes
    scattered    5 1 7 2 | 5 1 7 2      1        5 1 7 2 | 7 5 1 2      0: the same bytes in random order
    exchanged    as in the task, without what hides the borders of the quarters

In the first five the document is the passage and nothing else. Which lesson a training batch is of follows from its
step alone. After the last one all rows are the task's own, as those of every evaluation set are from the start.

Source: our own, after curricula from easy to hard (Bengio et al. 2009, "Curriculum learning", §4), with steps in place
of a look at the loss, so that a run depends on nothing but its options and goes on where it was cut off.
"""

from __future__ import annotations

from typing import NamedTuple

from attention_zoo.tasks.generated import Generated, GeneratedBatches, Setting
from attention_zoo.tasks.task import Batch


class Lesson(NamedTuple):
    """Rows of one kind.

    Fields:
        twin: how the passage's twin differs from it, a word of `TWINS`.
        part: one over which share of the quote's length its quotes have.
        whole: whether rows have the task's length; else the document is as long as the quote.
        share: of the steps of all lessons, in hundredths.
    """

    twin: str
    part: int
    whole: bool
    share: int


TWINS = ("unrelated", "scattered", "exchanged")
LESSONS = (
    Lesson("unrelated", 4, False, 25),
    Lesson("unrelated", 2, False, 15),
    Lesson("unrelated", 1, False, 15),
    Lesson("scattered", 1, False, 15),
    Lesson("exchanged", 1, False, 15),
    Lesson("exchanged", 1, True, 15),
)


def lesson_at(step: int, lessons: int, quote: int, seq_len: int) -> Setting | None:
    """What rows a step is of; None where lessons are over.

    Args:
        lessons: steps of all lessons.
        quote: bytes of the task's quote.
        seq_len: tokens of the task's rows.
    """
    ends = 0
    for lesson in LESSONS:
        ends += lesson.share
        if 100 * step < ends * lessons:
            size = quote // lesson.part
            changes = (("quote", size), ("seam", 0), ("twin", lesson.twin))
            return Setting(seq_len if lesson.whole else 2 * size + 1, changes)
    return None


class Lessons(GeneratedBatches):
    """Training batches of which the first `lessons` are lessons.

    Args:
        quote: bytes of the task's quote.
    """

    def __init__(self, task: Generated, batch_size: int, seq_len: int, seed: int, *, lessons: int, quote: int):
        super().__init__(task, batch_size, seq_len, seed)
        self.seq_len, self.lessons, self.quote = seq_len, lessons, quote

    def __next__(self) -> Batch:
        setting = lesson_at(self.step, self.lessons, self.quote, self.seq_len)
        if setting is None:
            return super().__next__()
        batch = self.task.batch("train", (self.seed, self.step), self.batch_size, setting)
        self.step += 1
        return batch
