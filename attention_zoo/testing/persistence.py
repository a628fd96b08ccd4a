"""The same again: evaluation, training, stored and copied layers."""

from __future__ import annotations

import copy
import io
import pickle

import torch

from attention_zoo.contract import Attention
from attention_zoo.testing.case import PRIME, Case, run, same
from attention_zoo.testing.check import check


@check()
def evaluation_is_a_function_of_its_inputs(case: Case) -> None:
    """Twice bitwise equal, whatever torch's random state; and drawing nothing from it."""
    for causal in case.sides:
        layer = case.build(causal=causal)
        x = case.data(3, PRIME)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            before = torch.get_rng_state()
            first = run(layer, x).hidden
            where = f"{case.name} causal={causal}: evaluation"
            assert torch.equal(torch.get_rng_state(), before), f"{where} draws from torch's default generator"
            torch.manual_seed(1)
            same(run(layer, x).hidden, first, f"{where} a second time")


@check()
def the_same_seed_trains_identically(case: Case) -> None:
    """Three steps of training, twice from the same seeds: bitwise equal parameters; and they did move."""

    def trained(causal: bool) -> Attention:
        layer = case.build(causal=causal, dtype=torch.float32).train()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            for step in range(3):
                out = layer(case.data(3, PRIME, seed=step, dtype=torch.float32))
                optimizer.zero_grad()
                (out.hidden.square().mean() + sum(out.losses.values())).backward()
                optimizer.step()
        return layer

    for causal in case.sides:
        once, again, start = trained(causal), trained(causal), case.build(causal=causal, dtype=torch.float32)
        moved = False
        for (name, a), b, c in zip(once.named_parameters(), again.parameters(), start.parameters()):
            same(a, b, f"{case.name} causal={causal}: parameter {name} after the same three steps")
            moved = moved or not torch.equal(a, c)
        assert moved, f"{case.name} causal={causal}: three steps of training moved no parameter"


@check()
def copies_compute_the_same(case: Case) -> None:
    """deepcopy, pickle, torch.save and state_dict into a fresh layer: bitwise the same outputs."""
    for causal in case.sides:
        layer = case.build(causal=causal)
        x = case.data(3, PRIME)
        expected = run(layer, x).hidden
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        fresh = case.build(causal=causal)
        with torch.no_grad():
            for parameter in fresh.parameters():
                parameter.zero_()
        fresh.load_state_dict(torch.load(file, weights_only=True))
        where = f"{case.name} causal={causal}:"
        same(run(fresh, x).hidden, expected, f"{where} state_dict in a fresh layer")
        same(run(copy.deepcopy(layer), x).hidden, expected, f"{where} deepcopy")
        same(run(pickle.loads(pickle.dumps(layer)), x).hidden, expected, f"{where} pickle")
