"""What the page inlines: the chart library as it was published, and scripts that stay readable."""

from __future__ import annotations

from pathlib import Path

import pytest

from attention_zoo.report import library
from attention_zoo.report.assets import SCRIPTS, STYLES, script, style
from attention_zoo.report.library import LICENSE, SCRIPT, STATIC, plotly_script


def test_the_chart_library_is_the_published_file_beside_its_licence() -> None:
    assert "Licensed under the MIT license" in plotly_script()[:300]
    assert "MIT" in LICENSE.read_text()
    assert SCRIPT.stat().st_size < 2e6, "the whole of plotly is three times as large"
    assert "</script" not in plotly_script(), "it would end the element that it is inlined in"


def test_another_file_in_its_place_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plotly.js").write_text("let it = 1;")
    monkeypatch.setattr(library, "SCRIPT", tmp_path / "plotly.js")
    plotly_script.cache_clear()
    with pytest.raises(ValueError, match=r"must have SHA-256 .*python -m attention_zoo.report.library"):
        plotly_script()
    monkeypatch.undo()
    plotly_script.cache_clear()


def test_every_file_is_inlined_and_stays_readable() -> None:
    own = {path.stem for path in STATIC.iterdir() if path.suffix in (".js", ".css") and path != SCRIPT}
    assert own == {*SCRIPTS, *STYLES}
    for name in [*(f"{each}.js" for each in SCRIPTS), *(f"{each}.css" for each in STYLES)]:
        lines = (STATIC / name).read_text().splitlines()
        assert len(lines) <= 400, name
        assert max(map(len, lines)) <= 120, name
    for name in SCRIPTS:
        assert (STATIC / f"{name}.js").read_text().startswith("// "), f"{name}.js must say what it is for"
    inlined = script() + style()
    assert "</script" not in inlined
    assert "</style" not in inlined
    assert "insertAdjacentHTML" not in inlined
    assert "document.write" not in inlined
