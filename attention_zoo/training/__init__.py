"""One run: from a config to a result row. Start reading at `run.py`."""
