"""What benchmark, report and overview ask of a mechanism: its core alone, its pairs, its kernels."""

from __future__ import annotations

import torch

from attention_zoo.measure.core import Shape, core_of
from attention_zoo.measure.flops import count_pairs
from attention_zoo.testing.case import Case
from attention_zoo.testing.check import check
from attention_zoo.testing.costs import PER_DOUBLING, SLACK

CPU = torch.device("cpu")


def has_core(case: Case) -> bool:
    return case.build(causal=case.sides[0]).core(1, 8) is not None


@check(has_core)
def the_core_runs_alone(case: Case) -> None:
    """`attend` on the operands that `core` says, forward and backward: what `variant=core` measures."""
    for causal in case.sides:
        layer = case.build(causal=causal, dtype=torch.float32)
        where = f"{case.name} causal={causal}: its core"
        for length in (7, 40):
            with torch.random.fork_rng(devices=[]):
                core = core_of(layer, Shape(2, length, CPU, torch.float32))
            operands = [each.requires_grad_() for each in core.operands]
            shapes = ", ".join(str(list(each.shape)) for each in operands)
            try:
                out = core.call(*operands)
            except Exception as error:
                raise AssertionError(
                    f"{where} must be callable as attend({shapes}), got {type(error).__name__}: {error}; override "
                    f"`core` to say what attend takes, or to return None"
                ) from error
            wanted = list(core.out_shape)
            assert list(out.shape) == wanted, f"{where}: attend({shapes}) must return {wanted}, got {list(out.shape)}"
            out.square().sum().backward()
            for number, each in enumerate(operands):
                good = each.grad is not None and bool(each.grad.isfinite().all())
                assert good, f"{where}: operand {number} of attend gets no finite gradient"


@check()
def pairs_grow_as_declared(case: Case) -> None:
    """What FLOPs are counted from, at 2,048 and 4,096 tokens and default options.

    Optional for what is no pattern: then none are reported.
    """
    allowed = PER_DOUBLING[case.can.compute] * SLACK
    layer = case.build(causal=case.sides[0], tiny=False)
    short, long = count_pairs(layer, 2048), count_pairs(layer, 4096)
    if short is None or long is None:
        return
    assert short > 0, f"{case.name}: `pairs` must count the query-key pairs that are scored, got {short}"
    assert long <= allowed * short, (
        f"{case.name}: query-key pairs grow {long / short:.2f} times from 2,048 to 4,096 tokens, allowed for "
        f"{case.can.compute} compute: {allowed:.2f}; declare what it costs, or correct `pairs`"
    )


@check()
def kernels_say_why(case: Case) -> None:
    """`explain_kernels` names each kernel once, and one of them runs on a CPU."""
    for causal in case.sides:
        found = case.build(causal=causal).explain_kernels(512, CPU, torch.float32)
        names = [name for name, _ in found]
        assert len(set(names)) == len(names), f"{case.name}: explain_kernels names a kernel twice: {names}"
        assert any(reason is None for _, reason in found), (
            f"{case.name} causal={causal}: no kernel runs 512 tokens on a CPU: "
            + "; ".join(f"{name}: {reason}" for name, reason in found)
        )
