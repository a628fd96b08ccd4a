"""The W&B workspace of a project as code: its charts, axes, grouping and filters are the same for everybody.

    pip install 'attention-zoo[workspaces]'
    python -m attention_zoo.tracking.workspace ENTITY [PROJECT]      saves it and prints where it is

Runs are grouped by mechanism. Losses stand over steps and over tokens, time and memory over the length of a row, beside
what each run ends with, its tables and its pictures.
"""

from __future__ import annotations

import sys
from typing import Any

INSTALL = "W&B workspaces need a package of their own: pip install 'attention-zoo[workspaces]'"
TABLES = ("loss_by_position", "accuracy_by_distance", "accuracy_by_recall")


def workspace(entity: str, project: str = "attention-zoo") -> Any:
    """The workspace, unsaved: a `wandb_workspaces.workspaces.Workspace`.

    Args:
        entity: W&B user or team.
        project: of the runs.

    Raises:
        ModuleNotFoundError: without the package, saying what to install.
    """
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as spaces
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(INSTALL) from error

    def lines(metric: str, x: str, **axes: bool) -> Any:
        return panels.LinePlot(title=f"{metric} over {x}", x=x, y=[metric], groupby="backend", **axes)

    both = {"log_x": True, "log_y": True}
    sections = {
        "Quality": [
            panels.BarPlot(title="bits per byte", metrics=["final/bits_per_byte"], groupby="backend"),
            panels.BarPlot(title="accuracy", metrics=["final/accuracy"], groupby="backend"),
            lines("evaluate/bits_per_byte", "step"),
            lines("evaluate/accuracy", "step"),
        ],
        "Training": [lines("train/loss", "step"), lines("train/loss", "tokens"), lines("train/gradient_norm", "step")],
        "Cost": [
            lines("speed/forward_backward_seconds", "seq_len", **both),
            lines("memory/forward_backward_peak_bytes", "seq_len", **both),
            lines("speed/train_tokens_per_second", "seq_len", **both),
            lines("memory/train_peak_bytes", "seq_len", **both),
        ],
        "By position and distance": [panels.WeavePanelSummaryTable(table_name=f"tables/{name}") for name in TABLES],
        "Patterns and report": [panels.MediaBrowser(media_keys=["patterns/*", "attention/*", "report"])],
    }
    return spaces.Workspace(
        entity=entity,
        project=project,
        name="Attention compared",
        sections=[spaces.Section(name=name, panels=many, is_open=True) for name, many in sections.items()],
        runset_settings=spaces.RunsetSettings(groupby=[spaces.Config("backend")]),
    )


def main(words: list[str]) -> int:
    """Save it; returns an exit code."""
    if not 1 <= len(words) <= 2:
        print("usage: python -m attention_zoo.tracking.workspace ENTITY [PROJECT]", file=sys.stderr)
        return 2
    try:
        print(workspace(*words).save().url)
    except ModuleNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
