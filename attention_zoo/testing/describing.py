"""What a mechanism says of itself: for readers of its file, `help(layer)`, `about` and `--help`."""

from __future__ import annotations

import inspect

from attention_zoo.overview import meanings_of
from attention_zoo.testing.case import Case
from attention_zoo.testing.check import check
from attention_zoo.testing.refusals import own_options


@check()
def the_file_says_what_it_is(case: Case) -> None:
    """Its docstring is the page of `about`: idea, source, cost, and where paper and code differ."""
    assert inspect.getdoc(inspect.getmodule(case.cls)), (
        f"{case.name}: begin the file of {case.cls.__name__} with a docstring: idea, paper, cost"
    )


@check()
def options_are_described(case: Case) -> None:
    """Each stands under `Args:` of the class or a base."""
    meanings = meanings_of(case.cls)
    for name in own_options(case.cls):
        assert meanings.get(name), f"{case.name}: say under `Args:` of {case.cls.__name__} what its option {name} means"
