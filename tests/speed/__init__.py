"""A net for settings at which speed falls apart: `python -m tests.speed --help`.

Settings are drawn for every mechanism: batch, length, heads, widths, type, padding, documents, global tokens, sizes of
the mechanism's own, training, prefill or step. What a call takes is held to what its FLOPs and bytes would take on this
machine (`predict`), and to small changes of the same setting (`setting.neighbours`): one token more or less, one padded
token, a row more, bfloat16. The small version, in tests/test_speed.py, counts operators and bytes instead of seconds.
"""
