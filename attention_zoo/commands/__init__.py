"""The commands: `attention-zoo NAME ...` anywhere, `python -m experiments.NAME ...` in a checkout."""
