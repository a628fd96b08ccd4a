"""Processes of a run without any: who a launcher says that they are, whose rows are whose, what is refused by name."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed import HashStore

from attention_zoo.commands.main import main
from attention_zoo.model.transformer import Transformer
from attention_zoo.parallel.config import ParallelConfig
from attention_zoo.parallel.dropout import RankDropout, by_rank
from attention_zoo.parallel.launched import Launched, first_host, launched
from attention_zoo.parallel.meeting import agreed_name
from attention_zoo.parallel.recompute import prepare
from attention_zoo.parallel.refusals import refuse, refuse_compiled_states
from attention_zoo.parallel.rows import all_of_part, check_divides, own_rows
from attention_zoo.parallel.sharded import kept_whole, shared_parameters
from attention_zoo.parallel.stored import STATE, Unreadable, fetch, said_in, sizes, store
from attention_zoo.parallel.world import Team, World, is_lost, joined
from attention_zoo.rules import Unsupported
from attention_zoo.training.config import check, compose_training
from attention_zoo.training.lifted import lifted, lowered, referred
from attention_zoo.training.run import run_training
from attention_zoo.training.shares import Uneven, divided_anew

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "node[03-04],x",
    "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "2",
}  # fmt: skip
TWO = World(Team(1, 2), Team(1, 2))


def test_who_a_launcher_says_that_it_is() -> None:
    assert launched({}) == Launched()
    assert launched(TORCHRUN) == Launched(3, 8, 1, "env://")
    assert launched({"WORLD_SIZE": "1", "RANK": "0"}) == Launched()
    found = launched(SLURM)
    assert found[:3] == (5, 8, 1)
    assert found.meeting is not None
    assert found.meeting.startswith("tcp://node03:")
    assert launched({**SLURM, "MASTER_PORT": "1234", "MASTER_ADDR": "a"}).meeting == "tcp://a:1234"
    assert launched({**SLURM, "SLURM_STEP_ID": "3"}).meeting != found.meeting, "steps beside each other meet apart"
    # a script of sbatch that starts no step has tasks, and is one process
    assert launched({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "77"}) == Launched()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("n[1-3]", "n1"), ("n[03,07-9],m", "n03"), ("n-[003-9]-ib", "n-003-ib")],
)
def test_the_first_of_slurms_machines(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"MASTER_PORT": ""}, "MASTER_PORT must be set where WORLD_SIZE=8 is"),
        ({"RANK": "8"}, "RANK must be below WORLD_SIZE, got 8 of 8"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number of at least 1, got 'two'"),
        ({"RANK": "-1"}, "RANK must be a whole number of at least 0, got '-1'"),
    ],
)
def test_a_wrong_environment_is_named(changes: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        launched({**TORCHRUN, **changes})


def test_processes_of_an_attempt_meet_beside_what_a_dead_one_left() -> None:
    store = HashStore()
    store.set("word of 1", "of the dead")
    store.set("answer to of the dead", "an attempt before")
    with ThreadPoolExecutor(3) as each:
        names = [each.submit(agreed_name, store, rank, 3, 10.0) for rank in (2, 1, 0)]
        found = {name.result(timeout=20) for name in names}
    assert len(found) == 1
    assert found != {"an attempt before"}
    with pytest.raises(torch.distributed.DistStoreError, match="process 1 has not come"):
        agreed_name(HashStore(), 0, 2, 0.1)


def test_a_world_of_one_asks_nobody() -> None:
    with joined("cpu", timeout_s=1.0, found=Launched()) as world:
        assert (world.rank, world.size, world.first) == (0, 1, True)
        assert not torch.distributed.is_initialized()
        assert world.everybody.gathered("a") == ["a"]
        assert world.by_first(lambda: 3) == 3
        assert world.everybody.most(2.0) == 2.0
        assert torch.equal(world.everybody.sum(torch.ones(2)), torch.ones(2))
        asked = lambda: None  # noqa: E731
        assert world.agreed(asked) is asked


def test_processes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"parallel.sequence must divide the number of processes, got 3 for 8"):
        with joined("cpu", sequence=3, timeout_s=1.0, found=Launched(0, 8, 0, "env://")):
            pass


@pytest.mark.parametrize("rows", [0, 1, 5, 7, 8])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_rows_are_shared_out_whole_and_in_order(rows: int, size: int) -> None:
    parts = [own_rows(rows, Team(rank, size)) for rank in range(size)]
    assert [row for part in parts for row in range(rows)[part]] == list(range(rows))
    counts = [part.stop - part.start for part in parts]
    assert max(counts) - min(counts) <= 1


def test_a_batch_that_does_not_divide_is_named() -> None:
    check_divides(8, 2, Team(0, 4))
    with pytest.raises(ValueError, match=r"batch must be a multiple of the 4 processes .* times trainer.accumulate=3"):
        check_divides(8, 3, Team(0, 4))
    with pytest.raises(ValueError, match=r"batch must be a multiple of the 3 processes that share its rows, got 8"):
        check_divides(8, 1, Team(0, 3))


def test_parts_start_anew_where_the_same_parts_of_all_do() -> None:
    flags = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1], dtype=torch.bool)
    assert all_of_part(flags, 2, Team(1, 2)) == [True, False]
    assert all_of_part(flags, 2, Team()) == [None, None]


def test_masks_of_dropout_differ_by_rank_and_come_back_with_the_generator() -> None:
    x = torch.ones(64, 64)
    masks = {}
    for rank in range(3):
        torch.manual_seed(5)
        layer = RankDropout(0.25, rank)
        masks[rank] = layer(x), layer(x)
        torch.manual_seed(5)
        assert torch.equal(masks[rank][0], layer(x))
        state = torch.get_rng_state()
    assert len({mask.sum().item() for pair in masks.values() for mask in pair}) > 3
    for first, second in masks.values():
        assert not torch.equal(first, second)
        assert first.unique().tolist() == pytest.approx([0.0, 4 / 3])
        assert first.mean().item() == pytest.approx(1, abs=0.05)
    torch.manual_seed(5)
    RankDropout(0.25, 7)(torch.ones(3, 3))
    assert torch.equal(torch.get_rng_state(), state), "whatever is dropped, all draw one number"
    assert torch.equal(RankDropout(0.25, 1).eval()(x), x)


def test_every_dropout_of_a_model_becomes_the_ranks_own() -> None:
    model = Transformer(attention="full", vocab=5, dim=16, heads=2, output_dropout=0.1)
    names = model.state_dict().keys()
    by_rank(model, 3)
    found = [part for part in model.modules() if isinstance(part, nn.Dropout)]
    assert {type(part) for part in found} == {RankDropout}
    assert all(part.rank == 3 for part in found)  # type: ignore[union-attr]
    assert model.state_dict().keys() == names


def test_what_layers_share_and_what_stays_whole() -> None:
    model = Transformer(attention="transformer_xl", vocab=5, dim=16, heads=2, depth=3)
    blocks = list(model.stack.layers)
    names = {name for name, each in model.named_parameters() if each in shared_parameters(model, blocks)}
    assert {name.rpartition(".")[2] for name in names} == {"u", "v"}
    span = Transformer(attention="adaptive_span", vocab=5, dim=16, heads=2)
    assert {name.rpartition(".")[2] for name, each in span.named_parameters() if each in kept_whole(span)} == {"span"}
    memory = Transformer(attention="memory_tokens", vocab=5, dim=16, heads=2)
    assert [name for name, each in memory.named_parameters() if each in kept_whole(memory)] == ["stack.memory"]


@pytest.mark.parametrize(
    ("model", "options", "precision", "said"),
    [
        ({"norm": "batch", "causal": False}, {}, "float32", "norm=batch: training in several processes"),
        ({"reversible": True}, {"checkpoint": True}, "float32", "model.reversible: parallel.checkpoint=true"),
        ({"reversible": True}, {"compile": True}, "float32", "model.reversible: parallel.compile=true"),
        ({"reversible": True}, {"data": "fsdp"}, "float32", "model.reversible: parallel.data=fsdp"),
        ({}, {"data": "fsdp"}, "float16", "trainer.precision=float16: parallel.data=fsdp"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    model: dict[str, Any], options: dict[str, Any], precision: str, said: str
) -> None:
    made = Transformer(attention="full", vocab=5, dim=16, heads=2, **model)
    with pytest.raises(Unsupported, match=said):
        refuse(made, ParallelConfig(**options), TWO, precision)
    refuse(made, ParallelConfig(), World(), precision)


def test_blocks_that_run_as_often_as_rows_need_are_not_shared_out() -> None:
    made = Transformer(attention="memory_tokens", vocab=5, dim=16, heads=2)
    with pytest.raises(Unsupported, match=r"memory_tokens: parallel.data=fsdp"):
        refuse(made, ParallelConfig(data="fsdp"), TWO, "float32")


def test_compiled_blocks_carry_no_states() -> None:
    refuse_compiled_states(ParallelConfig(compile=True), carry=False)
    with pytest.raises(Unsupported, match=r"parallel.compile=true: trainer.carry_state=true"):
        refuse_compiled_states(ParallelConfig(compile=True), carry=True)


@pytest.mark.parametrize("attention", ["full", "reformer", "compressive"])
def test_recomputed_blocks_give_the_same_gradients(attention: str) -> None:
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = Transformer(attention=attention, vocab=7, dim=16, heads=2, depth=2, output_dropout=0.2).double()
        prepare(model, recompute=recompute, compiled=False)
        torch.manual_seed(1)
        out = model(torch.arange(26).view(2, 13) % 7)
        (out.logits.square().sum() + sum(out.losses.values())).backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*found):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # which torch's own tracing reads
@pytest.mark.parametrize("attention", ["full", "reformer", "transformer_xl"])
@torch._dynamo.config.patch(recompile_limit=8, allow_unspec_int_on_nn_module=True)  # numbers of layers as symbols
def test_compiled_blocks_are_compiled_however_many_there_are(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counter, found = CompileCounter(), []
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Transformer(attention=attention, vocab=7, dim=8, heads=2, depth=10).double()
        prepare(model, recompute=False, compiled=compiled)
        for rows, length in ((2, 13), (3, 7)):
            torch.manual_seed(1)  # of hashes
            out = model(torch.arange(rows * length).view(rows, length) % 7)
            out.logits.square().sum().backward()
        found.append([out.logits.detach(), *(x.grad for x in model.parameters())])
    assert counter.frame_count >= 10
    for one, other in zip(*found):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(other, one, rtol=1e-11, atol=1e-11)


def test_carried_states_are_divided_anew_by_rows() -> None:
    rows = torch.arange(12.0).view(12, 1)
    parts = [{"sequence": "list", "items": [part, {"plain": 3}]} for part in rows.split(3)]
    found = divided_anew(parts, World(Team(1, 3), Team(1, 3)), 2)
    assert [each["items"][0].flatten().tolist() for each in found] == [[4, 5], [6, 7]]
    assert found[0]["items"][1] == {"plain": 3}
    parts[2]["items"][1] = {"plain": 4}
    with pytest.raises(Uneven, match="they are at different places"):
        divided_anew(parts, World(), 1)
    with pytest.raises(Uneven, match="12 rows are not 5 equal parts"):
        divided_anew(parts[:1] * 4, World(Team(1, 5), Team(1, 5)), 1)


def test_a_state_comes_back_as_it_lay_in_memory() -> None:
    tree = {"items": [torch.arange(24.0).view(2, 3, 4).transpose(0, 2), torch.tensor(3.0)], "again": 1, "plain": None}
    found: dict[str, torch.Tensor] = {}
    plain = json.loads(json.dumps(lifted(tree, "carried.3", found)))
    assert all(each.is_contiguous() for each in found.values())
    assert sorted(referred(plain)) == sorted(found)
    back = lowered(plain, found)
    for one, other in zip(back["items"], tree["items"]):  # type: ignore[call-overload]
        assert torch.equal(one, other)
        assert one.stride() == other.stride()
    assert (back["again"], back["plain"]) == (1, None)


def stored(folder: Path, number: float) -> None:
    tensors = {"a": torch.full((5, 2), number), "step": torch.tensor(number), "flag": torch.tensor([True, False])}
    store(folder / "now", tensors, {"number": number}, World(), before=folder / "before")


def test_a_folder_of_tensors_comes_back_and_keeps_the_one_before(tmp_path: Path) -> None:
    for number in (1.0, 2.0, 3.0):
        stored(tmp_path, number)
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == ["before", "now"]
    assert [said_in(tmp_path / name, World())["number"] for name in ("before", "now")] == [2.0, 3.0]
    assert sizes(tmp_path / "now")["a"] == ((5, 2), torch.float32)
    taken = {"a": torch.zeros(5, 2), "step": torch.tensor(0.0), "flag": torch.tensor([False, True])}
    fetch(tmp_path / "now", taken, World())
    assert torch.equal(taken["a"], torch.full((5, 2), 3.0))
    assert taken["step"].item() == 3.0
    assert taken["flag"].tolist() == [True, False]
    assert {path.suffix for path in (tmp_path / "now").iterdir()} == {".json", ".safetensors"}, "nothing is pickled"


def damages(folder: Path) -> dict[str, Any]:
    (tensors,) = folder.glob("*.safetensors")
    state = folder / STATE
    return {
        "cut off": lambda: tensors.write_bytes(tensors.read_bytes()[:-1]),
        "a bit": lambda: tensors.write_bytes(tensors.read_bytes()[:-1] + b"\x07"),
        "no tensors": tensors.unlink,
        "one more": lambda: (folder / "other.safetensors").write_bytes(b""),
        "no state": state.unlink,
        "half a state": lambda: state.write_text(state.read_text()[:50]),
        "other state": lambda: state.write_text(state.read_text().replace("1.0", "2.0")),
        "foreign": lambda: state.write_text(json.dumps({"step": 3})),
        "a list": lambda: state.write_text("[1]"),
    }


@pytest.mark.parametrize(
    "kind",
    ["cut off", "a bit", "no tensors", "one more", "no state", "half a state", "other state", "foreign", "a list"],
)
def test_every_damage_is_found_in_one_line(kind: str, tmp_path: Path) -> None:
    stored(tmp_path, 1.0)
    damages(tmp_path / "now")[kind]()
    with pytest.raises(Unreadable, match=r"is damaged|is no checkpoint") as caught:
        said_in(tmp_path / "now", World())
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "now") in str(caught.value)


def test_errors_of_lost_peers_are_told_from_others() -> None:
    assert is_lost(RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1707"))
    assert is_lost(RuntimeError("Application timeout caused pair closure"))
    assert is_lost(torch.distributed.DistBackendError("x"))
    assert not is_lost(RuntimeError("The size of tensor a (3) must match"))
    assert not is_lost(ValueError("gloo"))


def test_several_processes_do_no_sweep_and_no_other_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "-m", "seed=0,1"]) == 2
    assert (
        "-m must be started by one process, which starts one for each run, got WORLD_SIZE=8" in capsys.readouterr().err
    )
    assert main(["compare"]) == 2
    assert "compare is the work of one process, got WORLD_SIZE=8" in capsys.readouterr().err


def test_a_wrong_environment_is_a_row_of_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    row = run_training(compose_training(["device=cpu", "tracker=none"]), tmp_path / "run")
    assert row["status"] == "failed"
    assert "RANK and MASTER_ADDR and MASTER_PORT must be set where WORLD_SIZE=2 is" in row["error"]
    assert row["refused"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("parallel.data=zero", "parallel.data must be one of ddp, fsdp, got 'zero'"),
        ("parallel.sequence=0", "parallel.sequence"),
        ("parallel.timeout_s=0", "parallel.timeout_s"),
    ],
)
def test_wrong_options_are_named(words: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check(compose_training([words]))
