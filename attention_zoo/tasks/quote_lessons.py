"""Lessons before quote matching: rows that a part of the whole answer gets right, in turn, easier first.

    unrelated    5 1 7 2 | 5 1 7 2      1        5 1 7 2 | 0 9 9 4      0: other bytes
    mixed        either of both
    exchanged    5 1 7 2 | 5 1 7 2      1        5 1 7 2 | 5 7 1 2      0: as in the task

First come short rows, whose document is at first the passage alone and grows, a byte at a time, to twice the quote:
what the document holds beside the passage is what takes long to be passed over, and short rows cost little. Then rows
of either kind with quotes of doubled length until the task's, then exchanged quarters alone, without what hides their
borders there. A training batch's lesson follows from its step alone. After the last one all rows are the task's own, as
those of every evaluation set are from the start.

Why mixed: that any byte of the quote is missing tells other bytes, and says nothing of the order. Full attention that
had learned so to certainty went back to 50 % with some seeds when only exchanged quarters followed, and stayed there
until the end of 4,500 steps.

Source: our own, after curricula from easy to hard (Bengio et al. 2009, "Curriculum learning", §4), with steps in place
of a look at the loss, so that a run depends on nothing but its options and goes on where it was cut off.
"""

from __future__ import annotations

from typing import NamedTuple

from attention_zoo.tasks.generated import Generated, GeneratedBatches, Setting
from attention_zoo.tasks.task import Batch

SHORTEST = 4
"""Bytes of the first lesson's quotes."""


class Lesson(NamedTuple):
    """Rows of one kind.

    Fields:
        twin: what stands in the quote or in the document for the passage where both differ.
        quote: bytes of the quote.
        grows: whether the document has `quote` bytes at first and twice as many at last; else twice as many always.
        share: of the steps of all lessons.
    """

    twin: str
    quote: int
    grows: bool
    share: float


def lessons_for(quote: int) -> list[Lesson]:
    """What comes before a quote of so many bytes, in order."""
    sizes = [quote]
    while sizes[0] > 2 * SHORTEST:
        sizes.insert(0, -(-sizes[0] // (2 * SHORTEST)) * SHORTEST)  # as the task's, of four quarters
    longer = [Lesson("mixed", size, True, 0.4 / len(sizes)) for size in sizes]
    return [Lesson("unrelated", SHORTEST, True, 0.3), *longer, Lesson("exchanged", quote, False, 0.3)]


def lesson_at(step: int, lessons: int, quote: int, seq_len: int) -> Setting | None:
    """What rows a step is of; None where lessons are over.

    Args:
        lessons: steps of all lessons.
        quote: bytes of the task's quote.
        seq_len: tokens of the task's rows, which no lesson's exceed.
    """
    if step >= lessons:
        return None
    begins, place = 0.0, step / lessons
    for lesson in lessons_for(quote):
        if place < begins + lesson.share:
            break
        begins += lesson.share
    grown = int((place - begins) / lesson.share * (lesson.quote + 1)) if lesson.grows else lesson.quote
    length = min(2 * lesson.quote + 1 + grown, seq_len)
    return Setting(length, (("quote", lesson.quote), ("seam", 0), ("twin", lesson.twin)))


class Lessons(GeneratedBatches):
    """Training batches of which the first `lessons` are easier.

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
