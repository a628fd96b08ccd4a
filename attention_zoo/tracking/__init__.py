"""Where a run's figures go while it runs: always to JSONL, the source of truth, and to W&B where wished."""

from attention_zoo.tracking.jsonl import JsonlTracker
from attention_zoo.tracking.tracker import Guarded, NoTracker, RunInfo, Tracker, Trackers
from attention_zoo.tracking.wandb import WandbTracker

__all__ = ["Guarded", "JsonlTracker", "NoTracker", "RunInfo", "Tracker", "Trackers", "WandbTracker"]
