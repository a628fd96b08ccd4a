"""The parts of training, each against what it must equal: schedule, decay, accumulation, carried state, checkpoints."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from attention_zoo import Transformer
from attention_zoo.contract import Tokens
from attention_zoo.tasks import IGNORED, Batch, Mqar, Text
from attention_zoo.tracking import Trackers
from attention_zoo.training.checkpoint import CheckpointError, OtherRun, load_checkpoint, pack, save_checkpoint, unpack
from attention_zoo.training.evaluate import Evaluation, evaluate
from attention_zoo.training.fit import History, _judge
from attention_zoo.training.groups import TrainerConfig
from attention_zoo.training.objective import token_losses
from attention_zoo.training.optimizer import adamw, decay_groups
from attention_zoo.training.precision import Precision
from attention_zoo.training.progress import Progress
from attention_zoo.training.schedule import constant, warmup_cosine
from attention_zoo.training.seed import random_state, restore_random_state, seed_all
from attention_zoo.training.streams import Stream
from attention_zoo.training.trainer import NotFinite, Trainer

LENGTH = 12


def model(attention: Any = "full", *, vocab: int = 256, double: bool = True) -> Transformer:
    torch.manual_seed(1)
    built = Transformer(attention=attention, vocab=vocab, dim=16, heads=2, depth=2, ff_mult=2, short_conv=3)
    return built.double() if double else built


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    draw = random.Random(0)
    path.write_bytes(bytes(draw.choice(b"abcdefgh \n") for _ in range(6000)))
    return Text(path=str(path), held_out=None, span=3, evaluation_rows=5)


def trainer(net: nn.Module, task: Any, *, batch: int = 4, lr: float = 1e-2, carry: bool = False, **options: Any):
    return Trainer(
        net,
        optimizer=adamw(net, lr=lr, weight_decay=0.1),
        schedule=constant(steps=100),
        batches=task.train_batches(batch, LENGTH, seed=0),
        precision=options.pop("precision", Precision("float32", "cpu")),
        carry=carry,
        device="cpu",
        **options,
    )


def test_schedule_rises_then_falls_along_half_a_cosine() -> None:
    factor = warmup_cosine(steps=100, warmup=0.1, floor=0.2)
    assert [factor(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert factor(10) == pytest.approx(1.0)
    assert factor(99) == pytest.approx(0.2)
    assert factor(10 + 89 // 2) == pytest.approx(0.6, abs=0.02)
    assert all(factor(step + 1) < factor(step) for step in range(10, 99))
    assert factor(500) == pytest.approx(0.2)
    assert [constant(steps=10)(step) for step in (0, 9)] == [1.0, 1.0]
    assert warmup_cosine(steps=1)(0) == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"schedule.warmup must be a share between 0 and 1, got 200"):
        warmup_cosine(steps=1000, warmup=200)


def test_only_weight_matrices_decay() -> None:
    net = model({"name": "transformer_xl", "segment_length": 4, "memory_length": 4})
    decays, stays = decay_groups(net)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    chosen = {names[id(parameter)] for parameter in decays}
    assert len(decays) + len(stays) == len(names)
    assert all(name.endswith("weight") and "norm" not in name and "embedding" not in name for name in chosen)
    linear = {f"{name}.weight" for name, part in net.named_modules() if isinstance(part, nn.Linear)}
    assert linear <= chosen | {"head.weight"}
    groups = adamw(net, lr=0.1, weight_decay=0.3).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    with pytest.raises(ValueError, match=r"optimizer.lr must be a number of at least 0, got -1"):
        adamw(net, lr=-1, weight_decay=0)


@pytest.mark.parametrize("carry", [False, True])
def test_accumulated_parts_equal_the_whole_batch(text: Text, carry: bool) -> None:
    """Four steps, so that carried states meet fresh rows too; targets are ignored unevenly over the parts."""
    results = []
    for accumulate in (1, 2, 4):
        one = trainer(model("longformer"), text, accumulate=accumulate, carry=carry)
        uneven = one.batches.__next__

        class Uneven:
            def __next__(self, draw=uneven):
                batch = draw()
                batch.targets[0, 3:] = IGNORED
                return batch

        one.batches = Uneven()
        losses = [one.step().loss for _ in range(4)]
        results.append((losses, [p.detach().clone() for p in one.model.parameters()]))
    for losses, weights in results[1:]:
        assert losses == pytest.approx(results[0][0], rel=1e-10)
        for got, expected in zip(weights, results[0][1]):
            torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


COMPRESSIVE = {
    "name": "compressive", "segment_length": 2, "memory_length": 1, "compressed_length": 2, "ratio": 1,
    "reconstruction": 50.0,
}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"attention": COMPRESSIVE},
        {"attention": COMPRESSIVE, "depth": 3, "shorten": "1@1 1@2 1@1"},
        {"attention": {"name": "memory_tokens", "inner": COMPRESSIVE, "segment_length": 7, "count": 1}},
        {"attention": {"name": "adaptive_span", "limit": 9, "start": 3.0, "span_loss": 0.5}},
    ],
    ids=["compressive", "shortened", "memory_tokens", "adaptive_span"],
)
def test_further_losses_of_accumulated_parts_are_those_of_the_whole_batch(text: Text, options: dict[str, Any]) -> None:
    """They are means over tokens, of which the parts have many, few or none."""
    valid, results = torch.ones(4, LENGTH, dtype=torch.bool), []
    valid[1, 5:], valid[2], valid[3, :7] = False, False, False
    for accumulate in (1, 2, 4):
        torch.manual_seed(1)
        net = Transformer(**({"vocab": 256, "dim": 16, "heads": 2, "depth": 2} | options)).double()
        one = trainer(net, text, accumulate=accumulate)
        one.batches = (batch._replace(tokens=Tokens.of(valid)) for batch in iter(one.batches.__next__, None))
        results.append([(step.loss, step.auxiliary, step.gradient_norm) for step in (one.step() for _ in range(3))])
    assert all(loss for _, auxiliary, _ in results[0] for loss in auxiliary.values())
    assert results[0][0][1]
    for parts in results[1:]:
        for got, expected in zip(parts, results[0]):
            assert got[0] == pytest.approx(expected[0], rel=1e-10)
            assert got[1] == pytest.approx(expected[1], rel=1e-10)
            assert got[2] == pytest.approx(expected[2], rel=1e-10)


def test_clipping_limits_the_step_and_tells_the_norm_before_it(text: Text) -> None:
    net = model()
    one = trainer(net, text, clip=1e-3)
    found = one.step()
    norm = torch.sqrt(sum(p.grad.square().sum() for p in net.parameters()))
    assert found.gradient_norm > 0.1
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(
    "attention", ["full", "longformer", {"name": "transformer_xl", "segment_length": 8, "memory_length": 64}]
)
def test_carried_segments_equal_the_whole_document(attention: Any) -> None:
    net = model(attention).eval()
    ids = torch.randint(256, (2, 3 * LENGTH), generator=torch.Generator().manual_seed(0))
    stream = Stream(net, carry=True)
    for index in range(3):
        part = ids[:, index * LENGTH : (index + 1) * LENGTH]
        logits = stream(Batch(part, part, None, torch.full((2,), index == 0))).logits
    torch.testing.assert_close(logits, net(ids).logits[:, 2 * LENGTH :], rtol=1e-10, atol=1e-10)
    for tensor in torch.utils._pytree.tree_leaves(stream.state):
        assert not (isinstance(tensor, torch.Tensor) and tensor.requires_grad), "gradients stop at the border"


def test_a_fresh_row_sees_nothing_of_what_the_row_held_before() -> None:
    net = model("longformer").eval()
    ids = torch.randint(256, (2, 2 * LENGTH), generator=torch.Generator().manual_seed(0))
    first, second = ids[:, :LENGTH], ids[:, LENGTH:]
    stream = Stream(net, carry=True)
    stream(Batch(first, first, None, torch.tensor([True, True])))
    logits = stream(Batch(second, second, None, torch.tensor([False, True]))).logits
    torch.testing.assert_close(logits[1:], net(second[1:]).logits)
    torch.testing.assert_close(logits[:1], net(ids[:1]).logits[:, LENGTH:])


def test_evaluation_is_the_mean_over_scored_tokens_and_leaves_no_trace(text: Text) -> None:
    net = model()
    net.train()
    batches = list(text.evaluation_sets(2, LENGTH)["validation"])
    before = torch.get_rng_state()
    found = evaluate(net, text, batches, precision=Precision("float32", "cpu"), device="cpu", carry=False)
    assert net.training
    assert torch.equal(torch.get_rng_state(), before)
    net.eval()
    with torch.no_grad():
        losses = torch.cat([token_losses(net(b.ids).logits, b.targets).flatten() for b in batches])
    assert found.metrics["loss"] == pytest.approx(float(losses.mean()))
    places = [place for place, _ in found.loss_by_position]
    assert places == sorted(places)
    assert places[-1] < 3 * LENGTH
    assert float(np.mean([loss for _, loss in found.loss_by_position])) == pytest.approx(found.metrics["loss"], rel=0.1)


def test_position_counts_from_where_the_row_became_fresh() -> None:
    class Fixed(nn.Module):
        def forward(self, ids: Any, tokens: Tokens | None) -> Any:
            logits = torch.zeros(*ids.shape, 4)
            logits[..., 0] = ids.double() * 0 + torch.arange(ids.shape[1])
            return type("Out", (), {"logits": logits, "losses": {}})

    class Toy(Text):
        def __init__(self) -> None:
            pass

    ids = torch.zeros(2, 3, dtype=torch.long)
    batches = [
        Batch(ids, ids, None, torch.tensor([True, True])),
        Batch(ids, ids, None, torch.tensor([False, True])),
    ]
    found = evaluate(Fixed(), Toy(), batches, precision=Precision("float32", "cpu"), device="cpu", carry=False)
    by_place = dict(found.loss_by_position)
    assert sorted(by_place) == [0, 1, 2, 3, 4, 5]
    assert by_place[0] == pytest.approx(by_place[3])
    assert by_place[0] == pytest.approx(float(np.log(4)), rel=1e-4)
    assert by_place[5] < by_place[3]


def test_mqar_accuracy_is_over_queries_alone() -> None:
    task = Mqar(vocab=16, pairs=2, prefix=0, test_examples=10)

    class Perfect(nn.Module):
        def forward(self, ids: Any, tokens: Tokens | None) -> Any:
            answers = torch.zeros(*ids.shape, 16)
            for row in range(len(ids)):
                table = {int(ids[row, i]): int(ids[row, i + 1]) for i in (0, 2)}
                for column in range(4, ids.shape[1]):
                    answers[row, column, table.get(int(ids[row, column]), 0)] = 9
            return type("Out", (), {"logits": answers, "losses": {}})

    batches = task.evaluation_sets(4, 16)["test"]
    found = evaluate(Perfect(), task, batches, precision=Precision("float32", "cpu"), device="cpu", carry=False)
    assert found.metrics["accuracy"] == 1.0
    assert found.loss_by_position == []


def test_nan_stops_before_the_weights_are_touched(text: Text) -> None:
    net = model()
    one = trainer(net, text)
    one.step()
    with torch.no_grad():
        next(iter(net.parameters()))[ord("a")] = float("nan")
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(
        NotFinite, match=r"the loss became nan at step 2 with learning rate 0.01: stopped; try a smaller"
    ):
        one.step()
    assert all(torch.equal(p, q) or torch.isnan(p).any() for p, q in zip(net.parameters(), before))
    assert one.done == 1


def test_auxiliary_losses_are_added_and_told(text: Text) -> None:
    """Gradients, in float64 and before clipping: those of the task plus those of the auxiliary loss."""
    plain, extra = model(), model()
    inner, weight = extra.forward, extra.norm.weight
    extra.forward = lambda *given, **named: inner(*given, **named)._replace(  # type: ignore[method-assign]
        losses={"pull": 3 * weight.square().sum()}
    )
    expected = 3 * float(weight.detach().square().sum())
    found = trainer(extra, text, accumulate=2, clip=None).step()
    alone = trainer(plain, text, clip=None).step()
    assert found.auxiliary == {"pull": pytest.approx(expected)}
    assert found.loss == pytest.approx(alone.loss)
    # AdamW has moved the weights already, but gradients stay: d/dw of 3 w^2 at w = 1 is 6
    torch.testing.assert_close(extra.norm.weight.grad, plain.norm.weight.grad + 6.0)


def test_bfloat16_trains_and_float16_needs_cuda(text: Text) -> None:
    one = trainer(model(double=False), text, precision=Precision("bfloat16", "cpu"))
    losses = [one.step().loss for _ in range(8)]
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in one.model.parameters())
    with pytest.raises(ValueError, match="precision=float16 needs a CUDA device, got device=cpu"):
        Precision("float16", "cpu")
    with pytest.raises(ValueError, match="precision must be one of float32, bfloat16, float16, got 'fp8'"):
        Precision("fp8", "cpu")


def test_every_generator_goes_on_where_it_was() -> None:
    def draw() -> tuple[Any, ...]:
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), float(torch.rand(()))

    seed_all(3)
    first = draw()
    seed_all(3)
    assert draw() == first
    kept = random_state()
    expected = draw()
    draw()
    restore_random_state(kept)
    assert draw() == expected


@pytest.mark.parametrize("name", ["full", "longformer", "bigbird", "reformer", "transformer_xl"])
def test_states_survive_packing_bit_for_bit(name: str) -> None:
    net = model(name)
    state = net(torch.randint(256, (2, 9)), state=net.initial_state(2)).state
    again = unpack(pack(state))
    flat, structure = torch.utils._pytree.tree_flatten(state)
    other, same = torch.utils._pytree.tree_flatten(again)
    assert structure == same
    for left, right in zip(flat, other, strict=True):
        assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
    with pytest.raises(TypeError, match="a recurrent state must be made of tensors"):
        pack({"x": object()})


def test_a_checkpoint_is_whole_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"identity": "abc", "weights": torch.arange(1000.0)})
    assert torch.equal(load_checkpoint(path, "abc")["weights"], torch.arange(1000.0))
    with pytest.raises(OtherRun, match="belongs to run abc, not to xyz"):
        load_checkpoint(path, "xyz")
    raw = path.read_bytes()
    for damaged in (raw[:-1], raw[: len(raw) // 2], raw[:-900] + bytes([raw[-900] ^ 1]) + raw[-899:], raw + b"x"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"is damaged: .* use force=true to start afresh"):
            load_checkpoint(path, "abc")
    for foreign in (b"", b"PK\x03\x04 something else", raw[3:]):
        path.write_bytes(foreign)
        with pytest.raises(CheckpointError, match="is no attention_zoo checkpoint"):
            load_checkpoint(path, "abc")


def test_weights_that_do_not_fit_are_named(text: Text) -> None:
    state = trainer(model(), text).state_dict()
    other = trainer(model(vocab=300), text)
    with pytest.raises(CheckpointError, match=r"embedding.weight has shape \(256, 16\), this model needs \(300, 16\)"):
        other.load_state_dict(state, "x.pt")
    del state["model"]["embedding.weight"]
    with pytest.raises(CheckpointError, match=r"x.pt lacks the weight embedding.weight"):
        trainer(model(), text).load_state_dict(state, "x.pt")


def test_a_loss_that_begins_as_nan_is_no_matter_of_the_learning_rate(text: Text) -> None:
    net = model()
    with torch.no_grad():
        next(iter(net.parameters()))[ord("a")] = float("nan")
    with pytest.raises(
        NotFinite, match=r"^the loss became nan at step 1, with the weights that .* began with: stopped$"
    ):
        trainer(net, text).step()


def test_a_score_that_is_nan_says_what_is_known_beside_it() -> None:
    found = Evaluation({"loss": 2.5, "strange": float("nan")}, [])
    task, silent = SimpleNamespace(metric="strange", better="higher"), Progress("", 1, "none")
    with pytest.raises(
        NotFinite, match=r"^strange on the evaluation set became nan at step 3, beside loss 2.5: stopped$"
    ):
        _judge(found, History(), 3, task, TrainerConfig(), Trackers([]), silent)  # type: ignore[arg-type]


def test_adamw_takes_one_pass_and_the_steps_of_the_loop() -> None:
    torch.manual_seed(0)
    net = nn.Linear(7, 5).double()
    other = copy.deepcopy(net)
    ours = adamw(net, lr=0.1, weight_decay=0.3)
    groups = [{"params": [other.weight], "weight_decay": 0.3}, {"params": [other.bias], "weight_decay": 0.0}]
    loop = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), fused=False, foreach=False)
    assert ours.defaults["fused"], "the loop takes several times as long"
    for _ in range(3):
        for model, optimizer in ((net, ours), (other, loop)):
            optimizer.zero_grad()
            model(torch.linspace(-1, 1, 14, dtype=torch.float64).view(2, 7)).square().sum().backward()
            optimizer.step()
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)
