"""Where the processes of one attempt meet: a store in which nothing is found of an attempt before.

An agent of torchrun's keeps its store when it starts its processes again (`--max-restarts`), and addresses of dead ones
with it: gloo would wait for these without end. So each process says a word that it has just made up, process 0 answers
each word with a name for this attempt, and under that name alone all look for each other.
"""

from __future__ import annotations

import os
import secrets
import time
from datetime import timedelta

from torch import distributed as there

from attention_zoo.parallel.launched import Launched

KEPT = "TORCHELASTIC_USE_AGENT_STORE"
"""In the environment where the store is the agent's."""
LOOK_S = 0.05


def store_of(found: Launched, timeout_s: float) -> there.Store | None:
    """The store of this attempt; None where a launcher has one for each anyway.

    Args:
        found: which process this is.
        timeout_s: how long the others are waited for.

    Raises:
        torch.distributed.DistError: where they do not come.
    """
    if os.environ.get(KEPT) != "True":
        return None
    limit = timedelta(seconds=timeout_s)
    store, _, _ = next(there.rendezvous("env://", found.rank, found.size, timeout=limit))
    store.set_timeout(limit)
    return there.PrefixStore(agreed_name(store, found.rank, found.size, timeout_s), store)


def agreed_name(store: there.Store, rank: int, size: int, timeout_s: float) -> str:
    """A name that all processes of this attempt have got, and no other."""
    if rank:
        word = secrets.token_hex(8)
        store.set(f"word of {rank}", word)
        name = store.get(f"answer to {word}").decode()
        store.set(f"{name} heard by {rank}", "")
        return str(name)
    name, missing, until = secrets.token_hex(8), set(range(1, size)), time.monotonic() + timeout_s
    while missing:
        for each in sorted(missing):
            if store.check([f"{name} heard by {each}"]):
                missing.discard(each)
            elif store.check([f"word of {each}"]):  # which may be that of a dead one
                store.set(f"answer to {store.get(f'word of {each}').decode()}", name)
        if missing:
            if time.monotonic() > until:
                raise there.DistStoreError(f"process {min(missing)} has not come")
            time.sleep(LOOK_S)
    return name
