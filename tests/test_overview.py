"""`python -m attention_zoo`: tables of what there is, and a page for each mechanism."""

from __future__ import annotations

import inspect

import pytest
from recorded import RECORDED

import attention_zoo as zoo
from attention_zoo import overview
from attention_zoo.commands.main import main
from attention_zoo.model.shorten import FORMS
from attention_zoo.registry import options_of, recipe


@pytest.mark.parametrize("name", [*zoo.available(), *zoo.wrappers()])
def test_a_page_holds_text_options_abilities_and_kernels(name: str) -> None:
    page = overview.about(name)
    cls = recipe(name)[0]
    module = inspect.getdoc(inspect.getmodule(cls))
    assert module is not None
    assert page.startswith(f"# {name}\n\n{module}")
    rows = {row[0]: row for row in overview.option_rows(name)}
    assert set(rows) == set(options_of(name))
    for option, default in options_of(name).items():
        expected = (
            "must be given" if default is inspect.Parameter.empty else "null" if default is None else str(default)
        )
        assert rows[option][1] == expected
        assert rows[option][2], f"{option} of {name} is not described under `Args:` of its class"
        assert "| " + " | ".join(rows[option]) + " |" in page
    assert f"| compute | {cls.declared.compute} |" in page
    for kernel in getattr(zoo.build(name, dim=16, heads=2), "kernels", ()):
        assert f"| {kernel.name} | {kernel.about} |" in page


@pytest.mark.parametrize("name", [*RECORDED, "global_tokens"])
def test_a_page_says_what_paper_code_and_we_do_and_how_it_was_checked(name: str) -> None:
    page = overview.about(name)
    places = [page.index(f"\n\n{word}") for word in ("Paper", "Released code", "Here", "Checked", "## Options")]
    assert places == sorted(places)


@pytest.mark.parametrize("name", list(FORMS))
def test_what_shortens_a_stack_has_a_page_too(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["about", name, "--markdown"]) == 0
    page, form = capsys.readouterr().out, FORMS[name]
    places = [page.index(f"\n\n{word}") for word in ("Paper", "Released code", "Here", "When", "Checked", "## Options")]
    assert places == sorted(places)
    assert set(form.MEANINGS) == set(form.DEFAULTS) == set(form.RULES)
    for option, default in form.DEFAULTS.items():
        assert f"| {option} | {default} | {form.MEANINGS[option]} |" in page


@pytest.mark.parametrize("name", ["reformer.local", "memory_compressed.local"])
def test_what_stands_beside_a_mechanism_in_a_hybrid_has_a_page_too(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["about", name, "--markdown"]) == 0
    page = capsys.readouterr().out
    assert page.startswith(f"# {name}\n")
    assert "## Options" in page


def test_own_options_come_first_with_their_meaning() -> None:
    rows = overview.option_rows("longformer")
    assert rows[0] == ("window", "256", "tokens per side; at least 1.")
    names = [row[0] for row in rows]
    assert names.index("dilation") < names.index("dim")
    assert "Reach is window · dilation." in rows[names.index("dilation")][2], "a second line belongs to it"


def test_the_command_prints_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["about", "bigbird", "--markdown"]) == 0
    assert capsys.readouterr().out.strip() == overview.about("bigbird")
    main(["about", "bigbird"])
    drawn = capsys.readouterr().out
    assert "window_blocks" in drawn
    assert "Zaheer et al. 2020" in drawn


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["about"], "required: name"),
        (["kernels", "full"], "unrecognized arguments: full"),
        (["about", "longfomer"], "did you mean longformer"),
        (["nothing"], "the command must be one of train, "),
        (["kernels", "--length", "0"], "length must be an integer of at least 1, got 0"),
        (["kernels", "--length", "-5"], "length must be an integer of at least 1, got -5"),
        (["kernels", "--length", str(10**12)], "length must be at most 16,777,216 tokens, got 1,000,000,000,000"),
        (["kernels", "--device", "banana"], "device must be cpu, cuda or cuda:<number>, got 'banana'"),
    ],
)
def test_mistakes_are_told_in_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
