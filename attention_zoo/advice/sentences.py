"""Plain sentences on which mechanisms fit, see, learn and cost what, each with the rows that carry it.

What rows do not carry is said to be not known. Nobody is called the best: mechanisms are compared with full attention
alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from attention_zoo.advice.kinds import Kind
from attention_zoo.advice.lines import Line
from attention_zoo.advice.matrix import Matrix
from attention_zoo.advice.prices import Costed, Price
from attention_zoo.report import units
from attention_zoo.report.costs import PEAK, TIME, Setting
from attention_zoo.report.reach import ALL, Reach, reach_of
from attention_zoo.results.row import Row


@dataclass(frozen=True)
class Question:
    """What is asked.

    Fields:
        length: tokens of a row.
        memory: bytes that there are; None: no limit.
        kinds: of problem.
        distance: tokens between an answer and what it needs.
        device: on which.
    """

    length: int
    memory: int | None
    kinds: Sequence[Kind]
    distance: int
    device: str

    def words(self) -> str:
        within = "" if self.memory is None else f", within {units.whole(units.size(self.memory))}"
        asked = units.listed([kind.title for kind in self.kinds])
        return f"{asked}, rows of {self.length:,} tokens, {self.distance:,} tokens back{within}, on {self.device}"


class Sentence(NamedTuple):
    """Fields:
    about: fits | sees | learns | costs | all.
    text: the sentence.
    rows: that carry it; none where something is not known.
    state: yes | no | not known, of what is asked; "aside": of what is not.
    brief: the same in a word or two, for a table; empty where nothing is known.
    """

    about: str
    text: str
    rows: Sequence[Row]
    state: str
    brief: str = ""


@dataclass(frozen=True)
class Advice:
    """Sentences by mechanism, and what they come to.

    Fields:
        setting: of all costs, but where a sentence says another.
    """

    question: Question
    setting: Setting | None
    lines: dict[Line, list[Sentence]]
    ends: list[Sentence]

    def telling(self) -> list[Line]:
        """Of which rows give a verdict on a problem that is asked, and what they are compared with."""
        return [
            line for line, many in self.lines.items() if any(each.about == "learns" and each.brief for each in many)
        ]


def advice(matrix: Matrix, question: Question) -> Advice:
    """Every mechanism of which rows say anything that is asked."""
    used = Counter(each.setting for each in matrix.prices.values() if each.setting is not None)
    setting = used.most_common(1)[0][0] if used else None
    found: dict[Line, list[Sentence]] = {}
    for line in matrix.lines:
        costs = matrix.prices[line]
        trained = any((line, kind.key) in matrix.cells for kind in question.kinds)
        if not trained and costs.line != line:
            continue
        where = _where(costs, line, setting)
        said = [_fits(line, costs, question, where)]
        if trained:
            said.append(_sees(line, matrix, question))
            said += [_learns(line, matrix, kind, question) for kind in question.kinds]
        else:
            asked = units.listed([kind.title for kind in question.kinds])
            said.append(Sentence("learns", f"not known, nor how far it sees: no rows of {asked}", [], "not known"))
        said.append(_costs(line, costs, question, where))
        if any(each.rows for each in said):
            found[line] = said
    ends = [*_nothing_fits(matrix, found, question), _together(found, question), *_lengths(matrix, found, question)]
    if (ranking := matrix.ranking()) is not None:
        ends.append(Sentence("all", ranking, [], "not known"))
    return Advice(question, setting, found, ends)


def _where(costs: Costed, line: Line, usual: Setting | None) -> str:
    """Of what a cost is, where it is not of what all are."""
    said = [] if costs.setting is None or costs.setting == usual else [costs.setting.words()]
    if costs.line is not None and costs.line != line:
        said.append(f"at other options than were trained: {costs.line.label}")
    return f" ({'; '.join(said)})" if said else ""


def _amount(price: Price, key: str) -> str:
    return f"{price.words(key)}, {price.how}" if price.value is not None else price.words(key)


def _brief(price: Price, key: str, own: bool) -> str:
    return price.words(key) if own else f"{price.words(key)} (other options)"


def _fits(line: Line, costs: Costed, asked: Question, where: str) -> Sentence:
    price = costs.price(PEAK, asked.length)
    if price.value is None:
        how = "no costs of it were measured on this device and in this setting" if costs.series is None else price.how
        return Sentence("fits", f"whether it fits is not known: {how}", [], "not known")
    if math.isinf(price.value):
        return Sentence("fits", f"does not fit: {price.how}{where}", price.rows, "no", "no")
    brief = _brief(price, PEAK, costs.line == line)
    if asked.memory is None:
        return Sentence("fits", f"needs {_amount(price, PEAK)}{where}", price.rows, "yes", brief)
    fits = price.value <= asked.memory
    start = "fits: needs" if fits else "does not fit: needs"
    own = costs.line == line
    state = ("yes" if fits else "no") if own else "not known"
    if not own:
        start = f"not known at these options; at others it {'fits' if fits else 'does not fit'}: needs"
    brief = f"{'yes' if fits else 'no'}, {brief}" if own else f"not known, {brief}"
    return Sentence("fits", f"{start} {_amount(price, PEAK)}{where}", price.rows, state, brief)


def _costs(line: Line, costs: Costed, asked: Question, where: str) -> Sentence:
    price = costs.price(TIME, asked.length)
    if price.value is None:
        return Sentence("costs", f"how long it takes is not known: {price.how}", [], "not known")
    if math.isinf(price.value):
        return Sentence("costs", f"did not finish: {price.how}{where}", price.rows, "no", "did not finish")
    brief = _brief(price, TIME, costs.line == line)
    return Sentence("costs", f"takes {_amount(price, TIME)}{where}", price.rows, "yes", brief)


def _sees(line: Line, matrix: Matrix, asked: Question) -> Sentence:
    row = next(
        (row for kind in matrix.kinds for row in matrix.cell(line, kind).rows if row["backend"] == line.backend), None
    )
    if row is None:
        return Sentence("sees", "how far it sees is not known: no training at these options", [], "not known")
    far = reach_of(row)
    how, back = far.sees(asked.distance), f"{asked.distance:,} tokens back"
    state = {"surely": "yes", "perhaps": "not known", "through layers": "no", "no": "no"}.get(how, "not known")
    if far.surely == ALL:
        return Sentence("sees", f"sees {back}: every query sees every key before it", [row], "yes", "yes")
    said = {
        "surely": f"sees {back}: every query of a layer sees {far.surely or 0:,}",
        "perhaps": f"may see {back}, but not every key: {_seen(far)}",
        "through layers": f"does not see {back} in one layer: {_seen(far)}; layers hand on what lies up to "
                          f"{far.model or 0:,} back",
        "no": f"does not see {back}: {_seen(far)}, all layers together {far.model or 0:,}",
        "not known": f"whether it sees {back} is not known: {_seen(far)}, in rows of {far.length:,}",
    }[how]  # fmt: skip
    brief = {"surely": "yes", "perhaps": "perhaps", "through layers": "not in one layer", "no": "no"}.get(how, "")
    return Sentence("sees", said, [row], state, brief)


def _seen(far: Reach) -> str:
    parts = []
    if far.surely is not None:
        parts.append(f"a query of a layer surely sees {far.surely:,} tokens back")
    if far.layer is not None and far.layer > (far.surely or 0):
        most = f"at most {far.layer:,}"
        parts.append(most if parts else f"a query of a layer sees {most} tokens back")
    return ", ".join(parts) or "its rows do not say how far a query sees"


def _learns(line: Line, matrix: Matrix, kind: Kind, asked: Question) -> Sentence:
    gap = matrix.cell(line, kind)
    if gap.task is None:
        return Sentence("learns", f"{kind.title}: not known, no rows", [], "not known")
    unsure = kind.part != "all" and reach_of(gap.rows[0]).surely is None
    where = f"{kind.title} ({gap.task.title}{_told(kind, gap.edge)}{', as far as it may see' if unsure else ''})"
    if gap.reference:
        said = f"{where}: is what others are compared with, reached {gap.words()}"
        if gap.value is None:
            said = f"{where}: nothing lies beyond what it sees"
        state = "yes" if gap.why is None else "not known"
    else:
        said = f"{where}: {gap.plainly()}"
        state = "yes" if gap.as_good else "no" if gap.judged == "worse" else "not known"
    if kind.part != "all" and gap.edge is not None and (asked.distance <= gap.edge) != (kind.part == "within"):
        state = "aside"  # the distance that is asked lies on the other side of the edge
    elif kind.part != "all" and asked.distance >= gap.task.seq_len:
        state = "not known"  # no answer that far back was ever scored
    words = gap.words()
    return Sentence("learns", said, gap.rows, state, "" if words.startswith("not known") else words)


def _told(kind: Kind, edge: int | None) -> str:
    """Of which distances a figure is."""
    if edge is None or edge >= ALL:
        return ""
    return f", up to {edge:,} back" if kind.part == "within" else f", over {edge:,} back"


def _nothing_fits(matrix: Matrix, found: dict[Line, list[Sentence]], asked: Question) -> Iterable[Sentence]:
    """Where nothing is known to fit: what would."""
    said_of = [each for many in found.values() for each in many if each.about == "fits"]
    if asked.memory is None or any(each.state == "yes" for each in said_of):
        return
    parts, rows = [], list[Row]()
    for line in found:
        costs = matrix.prices[line]
        within = costs.longest_within(asked.memory) if costs.line == line else None
        if within is not None and costs.series is not None and within[0] < asked.length:
            carried = "" if within[1] else " at least, as far as its rows carry"
            parts.append(f"{line.label} up to about {_rounded(within[0]):,} tokens{carried}")
            rows += [row for row in costs.series.rows.values() if row.get(PEAK)]
    would = f"; what would: {units.listed(parts)}" if parts else ""
    said = f"Nothing is known to fit {units.whole(units.size(asked.memory))} at {asked.length:,} tokens{would}."
    yield Sentence("fits", said, rows, "no")


def _rounded(length: int) -> int:
    """Downwards, to two figures."""
    scale = 10 ** max(math.floor(math.log10(max(length, 1))) - 1, 0)
    return length // scale * scale


def _together(found: dict[Line, list[Sentence]], asked: Question) -> Sentence:
    """Of which all that is asked is known to be so."""
    good, rows = [], list[Row]()
    for line, many in found.items():
        left_out = ("costs", "fits") if asked.memory is None else ("costs",)
        states = [each.state for each in many if each.about not in left_out and each.state != "aside"]
        if states and all(state == "yes" for state in states):
            good.append(line.label)
            rows += [row for each in many if each.about not in left_out for row in each.rows]
    said = units.listed(good) or "none"
    # of recall the side of the edge that the distance lies on, which differs from mechanism to mechanism
    learn = units.listed(list(dict.fromkeys(
        kind.title if kind.part == "all" else f"{kind.title.split()[0]} at that distance" for kind in asked.kinds
    )))  # fmt: skip
    fit = "" if asked.memory is None else "fit, "
    text = f"Known to {fit}see {asked.distance:,} tokens back and learn {learn} as well as full attention: {said}."
    return Sentence("all", text, rows, "yes" if good else "not known")


def _lengths(matrix: Matrix, found: Iterable[Line], asked: Question) -> Iterable[Sentence]:
    """That trainings were of shorter rows than is asked, and so are all that is said to be learnt."""
    cells = [matrix.cell(line, kind) for line in found for kind in asked.kinds]
    told = [gap for gap in cells if gap.task is not None and gap.value is not None]
    lengths = sorted({gap.task.seq_len for gap in told if gap.task is not None and gap.task.seq_len})
    if lengths and lengths[-1] < asked.length:
        of = units.listed([f"{length:,}" for length in lengths])
        text = f"All that is learnt was learnt in rows of {of} tokens: of rows of {asked.length:,} nothing is known."
        longest = [row for gap in told for row in gap.rows if row.get("seq_len") == lengths[-1]]
        yield Sentence("all", text, longest[:1], "not known")
