"""Where everything stands on the page: the findings, the dashboard, then what is said about both."""

from __future__ import annotations

from attention_zoo.report.page import escape, section

BEFORE = {"summary": "Summary", "advice": "Which attention for which problem"}
AFTER = {
    "learning": "What they learnt",
    "published": "Beside published tables",
    "peers": "Against other implementations",
    "budget": "The longest length within a memory",
    "abilities": "Abilities",
    "method": "How this was measured",
    "missing": "What is missing or old",
    "left-out": "Rows left out",
}
"""Headings of the sections by their keys."""
DASHBOARD = """
<div id="facets" class="bar" role="search" aria-label="Filter and group runs"></div>
<div id="legend" class="legend" role="group" aria-label="Groups: point at one, or switch it off, in all charts"></div>
<div id="charts" class="charts"></div>
<h3>All runs</h3>
<div id="table-tools" class="bar"></div>
<div id="table" class="table" role="region" aria-label="All runs"></div>
<div id="pictures"></div>
<div id="heads"></div>
"""
NONE = '<noscript><p class="warn">Charts and the table of runs need JavaScript; all else stands below.</p></noscript>'


def body(title: str, sections: dict[str, str], *, live: bool = False) -> str:
    """The page's body.

    Args:
        sections: HTML by key; "lead" stands on top, and what is not there has no heading.
        live: whether it says when it last heard of its server.
    """
    before = {key: heading for key, heading in BEFORE.items() if key in sections}
    after = {key: heading for key, heading in AFTER.items() if key in sections}
    links = "".join(
        f'<a href="#{key}">{heading}</a>'
        for key, heading in [*before.items(), ("runs-section", "Runs"), *after.items()]
    )
    said = '<output id="live" class="note"></output> ' if live else ""
    return (
        '<a class="skip" href="#runs-section">Skip to the runs</a><main>'
        f'<header class="top"><h1>{escape(title)}</h1><div>{said}<button type="button" id="theme">Theme</button></div>'
        f'</header><div id="lead">{sections.get("lead", "")}</div><nav>{links}</nav>'
        + "".join(_section(key, heading, sections) for key, heading in before.items())
        + section("runs-section", "Runs", NONE, DASHBOARD)
        + "".join(_section(key, heading, sections) for key, heading in after.items())
        + "<footer>Drawn by attention_zoo from result rows alone; every figure can be read in results.jsonl.</footer>"
        '</main><aside id="details" class="panel" hidden aria-labelledby="details-title"></aside>'
        '<dialog id="diff" aria-labelledby="diff-title"></dialog>'
    )


def _section(key: str, heading: str, sections: dict[str, str]) -> str:
    return section(key, heading, f'<div id="{key}-content">{sections[key]}</div>')
