"""Which runs stand beside the same full attention, and which of several machines are seeds of one comparison.

A pair of runs, a mechanism's and full attention's, is of one place: one machine, one torch, one file. What a place does
to both goes out of their difference, so that differences of several places are seeds of one comparison where everything
else is the same: backend, options, config, steps and code. Figures of several places never stand as one beside costs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from attention_zoo.report import groups
from attention_zoo.report.endings import EARLY, ended
from attention_zoo.report.groups import Group, Place
from attention_zoo.report.learnt import Learnt

KINDS = (("cpu", "gpu"), "machines"), (("torch",), "versions of torch"), (("file",), "files")
"""Facts of a place that may differ in one comparison, and what so many of them are called."""


def strata(learnt: Sequence[Learnt]) -> list[list[Learnt]]:
    """Mechanisms of one task by the full attention that they may be compared with: one list for each code, and for
    each setting of a machine of its own.

    Runs of several places that may be pooled are one `Learnt` there; without any such, all are those that were given.

    Args:
        learnt: by place, as `groups.gather` tells them apart.
    """
    keys = [_settings(each) for each in learnt]
    homes = _homes(learnt, keys)
    pools: dict[tuple[Place, Group], list[Learnt]] = {}
    for each, key in zip(learnt, keys):
        pools.setdefault((homes[each.group.place], key), []).append(each)
    found: dict[Place, list[Learnt]] = {}
    if len(pools) == len(learnt):
        for each in learnt:
            found.setdefault(homes[each.group.place], []).append(each)
        return list(found.values())
    said = groups.labels([key for _, key in pools], {})
    for ((home, key), many), label in zip(pools.items(), said):
        rows, failed = ([row for one in many for row in one.rows], [row for one in many for row in one.failed])
        found.setdefault(home, []).append(replace(many[0], label=label, rows=rows, failed=failed, group=key))
    return list(found.values())


def several(places: Iterable[Place]) -> str:
    """ "2 machines", or of what else there are several; "" of one place."""
    facts = [dict(place) for place in places]
    for keys, word in KINDS:
        count = len({tuple(each.get(key) for key in keys) for each in facts})
        if count > 1:
            return f"{count} {word}"
    return ""


def apart(one: Learnt, other: Learnt) -> list[str]:
    """In what runs of two mechanisms differ, beside the mechanism itself; in their place only if they share none."""
    found = groups.differing([one.group.shared, other.group.shared])
    if not one.places & other.places:
        places = groups.differing([dict(place) for place in (*one.places, *other.places)])
        found += [key for key in places if key not in found]
    return [key for key in found if not groups.meant(key, [*one.rows, *other.rows])]


def _settings(each: Learnt) -> Group:
    """A group without what may differ from place to place, and with its steps, where no config tells them."""
    made = dict(each.group.made)
    steps = sorted({row["steps"] for row in each.rows if row.get("steps") and not any(ended(row, by) for by in EARLY)})
    if steps:
        made.setdefault("steps", ", ".join(map(str, steps)))
    code = tuple(fact for fact in each.group.place if not any(fact[0] in keys for keys, _ in KINDS))
    return each.group._replace(made=tuple(sorted(made.items())), place=code)


def _homes(learnt: Sequence[Learnt], keys: Sequence[Group]) -> dict[Place, Place]:
    """Place -> the first of those that belong together: where the same full attention was trained; and of the others,
    which have none, with one that trained the same mechanism, or else of the same file."""
    homes = {each.group.place: each.group.place for each in learnt}

    def join(place: Place, other: Place) -> None:
        into, old = homes[other], homes[place]
        homes.update({each: into for each, home in homes.items() if home == old})

    first: dict[Group, Place] = {}
    for each, key in zip(learnt, keys):
        if each.backend == "full" and each.rows:
            join(each.group.place, first.setdefault(key, each.group.place))
    having = dict.fromkeys(each.group.place for each in learnt if each.backend == "full" and each.rows)
    theirs = {key: each.group.place for each, key in reversed([*zip(learnt, keys)]) if each.group.place in having}
    files = {dict(place).get("file"): place for place in reversed(having)}
    for place in [place for place in homes if place not in having]:
        mine = [theirs[key] for each, key in zip(learnt, keys) if each.group.place == place and key in theirs]
        file = dict(place).get("file")
        join(place, mine[0] if mine else files.setdefault(file, place))
    return homes
