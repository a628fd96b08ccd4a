"""Others' attention, timed beside ours in the same run: what is compared, how fairly, and how it came out.

One adapter a peer (adapter.py says what that is) hands our queries, keys and values to code that is not ours, in the
layout in which that code gets them from its own projections. contest.py runs both sides in turns.
"""
