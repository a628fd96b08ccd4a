"""A model in a file: the same after loading, bit for bit, and one clear line for whatever is wrong with it."""

from __future__ import annotations

import json
import re
import warnings
from functools import partial
from random import Random

import pytest
import torch
import torch.nn.utils.prune
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import CAUSAL, VOCAB, entry, small, some_ids

import attention_zoo as zoo
from attention_zoo import EncoderDecoder, Transformer
from attention_zoo.attention.full import Full
from attention_zoo.attention.longformer import Longformer
from attention_zoo.integrations.weights.lengthen import lengthen


def same(one, other, ids, **rest) -> bool:
    weights = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) and x.dtype == y.dtype for (a, x), (b, y) in weights) and torch.equal(
        one(ids, **rest).logits, other(ids, **rest).logits
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CAUSAL)
def test_round_trip_is_bitwise(name, dtype, tmp_path):
    model = small(name, short_conv=3, seed=5).to(dtype)
    path = zoo.save(model, tmp_path / "deep" / "model.safetensors")
    loaded = zoo.load(path)
    assert loaded is not model
    assert not loaded.training
    assert same(model, loaded, some_ids())
    assert [layer.seed for layer in loaded.stack.attentions] == [5, 6]


@pytest.mark.parametrize("options", [
    {"positions": "alibi"}, {"positions": "learned", "max_length": 40}, {"tied": False}, {"reversible": True},
    {"norm": "rms", "feed_forward": "swiglu"}, {"pre_norm": False}, {"head": "classify", "classes": 3, "causal": False},
], ids=str)  # fmt: skip
def test_every_option_comes_back(options, tmp_path):
    model = small("full", **options)
    loaded = zoo.load(zoo.save(model, tmp_path / "model"))
    assert same(model, loaded, some_ids())
    assert loaded.config == model.config


def test_partials_ties_and_extra_tokens_come_back(tmp_path):
    def through_a_file(*attention) -> Transformer:
        model = Transformer(attention=attention, vocab=VOCAB, dim=16, heads=2, depth=4).eval()
        loaded = zoo.load(zoo.save(model, tmp_path / "model"))
        assert same(model, loaded, some_ids())
        assert loaded.parameter_count == model.parameter_count
        return loaded

    loaded = through_a_file(partial(Longformer, window=3), entry("bigbird", extra_global_tokens=2))
    assert loaded.stack.attentions[2].window == 3
    assert len(loaded.stack.embedding) == 2
    loaded = through_a_file(entry("transformer_xl"), "full")
    assert loaded.stack.attentions[0].u is loaded.stack.attentions[2].u
    assert loaded.head.weight is loaded.embedding.weight


def test_encoder_and_decoder_come_back(tmp_path):
    model = EncoderDecoder(
        encoder=small("bigbird", causal=False, head="hidden"), decoder=small("longformer", cross=True)
    ).eval()
    loaded = zoo.load(zoo.save(model, tmp_path / "model"))
    assert isinstance(loaded, EncoderDecoder)
    assert same(model, loaded, some_ids(), source=some_ids(seed=3))


def test_shared_weights_are_written_once(tmp_path):
    model = small("transformer_xl", depth=4)
    names = load_file(zoo.save(model, tmp_path / "model"))
    assert sum(name.endswith(".u") for name in names) == 1
    assert sum(tensor.numel() for tensor in names.values()) == model.parameter_count


def test_loading_draws_nothing_and_training_goes_on(tmp_path):
    path = zoo.save(small("full"), tmp_path / "model")
    before = torch.get_rng_state()
    loaded = zoo.load(path, device="cpu").train()
    assert torch.equal(before, torch.get_rng_state())
    loaded(some_ids()).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = zoo.save(small("full"), tmp_path / "model")
    old = path.read_bytes()

    def crash(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(OSError, match="disk full"):
        zoo.save(small("full", depth=3), path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_down_is_refused(tmp_path):
    class Mine(Full):
        pass

    for attention in (lambda **options: Full(**options), Mine):
        model = Transformer(attention=attention, vocab=VOCAB, dim=16, heads=2)
        with pytest.raises(ValueError, match="save needs attention given by name, mapping or partial"):
            zoo.save(model, tmp_path / "model")
    model = Transformer(attention=partial(Full), vocab=VOCAB, dim=16, heads=2, origin={"loss": float("inf")})
    with pytest.raises(ValueError, match="plain numbers, words and lists"):
        zoo.save(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_damaged_and_foreign_files_are_refused_in_one_line(tmp_path):
    path = zoo.save(small("full"), tmp_path / "model")
    with pytest.raises(FileNotFoundError, match=r"none: no such model file"):
        zoo.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no such model file"):
        zoo.load(tmp_path)
    whole = path.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"hello", b"\xff" * 100):
        (tmp_path / "bad").write_bytes(damage)
        with pytest.raises(ValueError, match="bad: not a readable model file") as caught:
            zoo.load(tmp_path / "bad")
        assert "\n" not in str(caught.value)
    save_file(load_file(path), tmp_path / "foreign")
    with pytest.raises(ValueError, match="holds tensors, but no model config"):
        zoo.load(tmp_path / "foreign")


def rewritten(path, tensors=None, **header):
    """The model file with other tensors, or other header fields."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        old = json.loads(file.metadata()["attention_zoo"])
    other = path.with_name("other")
    save_file(load_file(path) if tensors is None else tensors, other, {"attention_zoo": json.dumps({**old, **header})})
    return other


def test_weights_that_do_not_fit_are_named(tmp_path):
    model = small("full")
    path = zoo.save(model, tmp_path / "model")
    tensors = load_file(path)
    assert same(model, zoo.load(rewritten(path)), some_ids())
    first = next(iter(tensors))
    lacking = {name: tensor for name, tensor in tensors.items() if name != first}
    with pytest.raises(ValueError, match=f"missing {first}, unexpected nothing"):
        zoo.load(rewritten(path, lacking))
    with pytest.raises(ValueError, match="missing nothing, unexpected a, b, c and 1 more"):
        zoo.load(rewritten(path, {**tensors, **{name: torch.zeros(1) for name in "abcd"}}))
    with pytest.raises(ValueError, match=r"embedding.weight must have shape \(11, 16\), got \(2,\)"):
        zoo.load(rewritten(path, {**tensors, "embedding.weight": torch.zeros(2)}))


@pytest.mark.parametrize(("header", "message"), [
    ({"format": 2}, "format 2 of 'Transformer' is not known here, only 1"),
    ({"kind": "os.system"}, "'os.system' is not known"),
    ({"config": {}}, "its config builds no model"),
    ({"config": {"attention": "nope", "vocab": 3}}, "its config builds no model: attention must be one of"),
    ({"config": {"attention": "full", "vocab": 3, "wat": 1}}, "its config builds no model: .*wat"),
], ids=str)  # fmt: skip
def test_wrong_headers_are_refused_in_one_line(header, message, tmp_path):
    path = zoo.save(small("full"), tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        zoo.load(rewritten(path, **header))


# --- what is in a file that somebody or something else has changed ---------------------------------------------------


def refused(path) -> str:
    """The one line that says why."""
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        zoo.load(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return str(caught.value)


def flipped(data: bytes, place: int, bit: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def test_every_flipped_bit_is_noticed(tmp_path):
    """In the length, at every place of the header that is not like the one before, in the padding and the weights."""
    path = zoo.save(small("longformer", depth=1), tmp_path / "model")
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    digest = whole.index(b"sha256")
    random = Random(0)
    places = [*range(40), *range(digest - 8, digest + 90), *random.sample(range(40, header), 60)]
    places += [*range(header - 9, header + 8), *random.sample(range(header, len(whole)), 40), len(whole) - 1]
    for place in places:
        path.write_bytes(flipped(whole, place, random.randrange(8)))
        refused(path)
    path.write_bytes(whole)
    assert same(small("longformer", depth=1), zoo.load(path), some_ids())


def test_cuts_and_additions_are_noticed(tmp_path):
    path = zoo.save(small("full"), tmp_path / "model")
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for content in (
        *(whole[:length] for length in (1, 8, 9, header - 1, header, header + 3, len(whole) - 1)),
        whole + b"0",
    ):
        path.write_bytes(content)
        assert "not a readable model file" in refused(path)


def test_weights_changed_by_others_are_noticed_and_files_without_a_digest_load(tmp_path):
    path = zoo.save(small("full"), tmp_path / "model")
    tensors, metadata = load_file(path), dict(metadata_of(path))
    assert metadata.keys() == {"attention_zoo", "sha256"}
    assert same(small("full"), zoo.load(rewritten(path)), some_ids())
    tensors["norm.bias"] += 1
    other = tmp_path / "other"
    save_file(tensors, other, metadata)
    assert "damaged: its config and weights are not those whose SHA-256" in refused(other)
    config = metadata["attention_zoo"].replace('"seed": 0', '"seed": 1')
    save_file(load_file(path), other, {**metadata, "attention_zoo": config})
    assert "damaged" in refused(other)


def metadata_of(path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_the_same_model_gives_the_same_file(tmp_path):
    """Whatever the order in which safetensors walks its metadata: a row holds the file's SHA-256."""
    files = {zoo.save(small("full"), tmp_path / str(number)).read_bytes() for number in range(12)}
    assert len(files) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value, tmp_path):
    model = small("full")
    with torch.no_grad():
        model.stack.attentions[1].to_q.weight[2, :3] = value
    path = zoo.save(model, tmp_path / "model")  # a run that diverged leaves its record
    assert "got NaN or infinity in 3 of 256 numbers of stack.layers.1" in refused(path)


@pytest.mark.parametrize(("options", "message"), [
    ({"depth": 10**9}, "its config says depth=1000000000, and its"),
    ({"dim": 10**9}, "its config says dim=1000000000"),
    ({"attention": ["full"] * 5000}, "its config names 5000 mechanisms"),
    ({"vocab": 10**12}, "its config says vocab=1000000000000"),
    ({"heads": 10**9, "attention": [{"name": "longformer", "head_width": 1}]}, "its config says heads=1000000000"),
    ({"ff_mult": 10**7}, r"into.weight must have shape \(160000000, 16\), got \(32, 16\)"),
    ({"ff_mult": 10**30}, "its config builds no model"),
    ({"short_conv": 10**9}, "missing .*body.layers.0.weight"),
    ({"positions": "learned", "max_length": 10**11}, "max_length must be at most 2147483647"),
    ({"attention": [{"name": "full", "head_width": 60_000}]}, r"must have shape \(120000"),
    ({"attention": [{"name": "nonesuch"}]}, "its config builds no model: attention must be one of"),
    ({"attention": 3}, "its config builds no model"),
    ({"dim": "wide"}, "its config builds no model"),
    ({"origin": 7}, "its config builds no model"),
], ids=str)  # fmt: skip
def test_absurd_configs_are_refused_before_anything_of_that_size_is_built(options, message, tmp_path):
    path = zoo.save(small("full"), tmp_path / "model")
    config = json.loads(metadata_of(path)["attention_zoo"])["config"]
    assert re.search(message, refused(rewritten(path, config={**config, **options})))


@pytest.mark.parametrize("text", [
    "", "[]", "null", "{}", "[" * 100_000,
    '{"format": [], "kind": {}, "config": {}}',
    '{"format": 1, "kind": "Transformer", "config": []}',
    '{"format": 1, "kind": "EncoderDecoder", "config": {}}',
    '{"format": 1, "kind": "EncoderDecoder", "config": {"encoder": 1}}',
    '{"format": 1, "kind": "Transformer", "config": {"vocab": ' + "9" * 5000 + "}}",
], ids=lambda text: text[:60])  # fmt: skip
def test_hostile_headers_are_refused(text, tmp_path):
    path = zoo.save(small("full"), tmp_path / "model")
    save_file(load_file(path), path, {"attention_zoo": text})
    refused(path)


def test_weights_of_another_kind_are_refused(tmp_path):
    path = zoo.save(small("full"), tmp_path / "model")
    tensors = load_file(path)
    for dtype in (torch.int64, torch.float8_e4m3fn, torch.bool):
        other = rewritten(path, {**tensors, "norm.weight": torch.ones(16).to(dtype)})
        assert "norm.weight must be of dtype" in refused(other)


def test_a_folder_of_a_run_is_its_model_and_devices_are_named(tmp_path):
    path = zoo.save(small("full"), tmp_path / "run" / "model.safetensors")
    assert same(small("full"), zoo.load(path.parent), some_ids())
    with pytest.raises(FileNotFoundError, match=r"model.safetensors: no such model file"):
        zoo.load(tmp_path)
    for device in ("banana", "cpu:x", 10**9, "cuda" if not torch.cuda.is_available() else "cuda:99"):
        with pytest.raises(ValueError, match=f"device must be one that is here, got {device!r}"):
            zoo.load(path, device=device)


# --- what is wrapped around a model, and what was changed in it ------------------------------------------------------


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled_parts(model):
    for layer in model.stack.layers:
        layer.compile(backend="eager")
    model.stack.layers[0] = torch.compile(model.stack.layers[0], backend="eager")
    return model


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": torch.nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "averaged and compiled": lambda model: torch.compile(torch.optim.swa_utils.AveragedModel(model), backend="eager"),
    "compiled parts": compiled_parts,
}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_model_is_saved_and_writes_as_the_one_inside(wrap, tmp_path):
    model, ids = small("longformer"), some_ids()
    expected, text = model(ids).logits, zoo.generate(model, ids, steps=3, greedy=True)
    wrapped = WRAPPERS[wrap](model)
    loaded = zoo.load(zoo.save(wrapped, tmp_path / "model"))
    assert torch.equal(loaded(ids).logits, expected)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(zoo.generate(wrapped, ids, steps=3, greedy=True), text)
    if wrap != "compiled parts":
        assert lengthen(wrapped, attention="longformer", window=8).stack.attentions[0].window == 8


def test_a_distributed_model_is_saved_and_writes(tmp_path, process_group):
    model, ids = small("longformer"), some_ids()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    assert same(model, zoo.load(zoo.save(wrapped, tmp_path / "model")), ids)
    assert torch.equal(zoo.generate(wrapped, ids, steps=3), zoo.generate(model, ids, steps=3))


def test_sharded_weights_are_refused(tmp_path, process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = small("full").float()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match="save needs whole weights, and these are sharded: gather them"):
        zoo.save(model, tmp_path / "model")


def adapted(model):
    model.stack.attentions[0].to_q = torch.nn.Sequential(model.stack.attentions[0].to_q)


def pruned(model):
    torch.nn.utils.prune.l1_unstructured(model.stack.attentions[0].to_q, "weight", amount=0.5)


def widened(model):
    model.stack.attentions[0].to_q = torch.nn.Linear(16, 48)


@pytest.mark.parametrize("change", [adapted, pruned, widened])
def test_a_model_that_is_not_what_its_config_builds_is_refused(change, tmp_path):
    model = small("full")
    change(model)
    with pytest.raises(ValueError, match=r"save needs the weights that the model's config builds: .*to_q"):
        zoo.save(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_model_of_ours_is_refused(tmp_path):
    class Mine(Transformer):
        pass

    with pytest.raises(ValueError, match="save knows Transformer and EncoderDecoder alone, not the subclass Mine"):
        zoo.save(Mine(attention="full", vocab=VOCAB, dim=16, heads=2), tmp_path / "model")
    for other in (torch.nn.Linear(2, 2), torch.nn.DataParallel(torch.nn.Linear(2, 2)), None):
        with pytest.raises(ValueError, match="save needs a Transformer or an EncoderDecoder, itself or wrapped"):
            zoo.save(other, tmp_path / "model")
        with pytest.raises(ValueError, match="generate needs a Transformer or an EncoderDecoder, itself or wrapped"):
            zoo.generate(other, some_ids(), steps=1)
    with torch.device("meta"):
        model = Transformer(attention="full", vocab=VOCAB, dim=16, heads=2)
    with pytest.raises(ValueError, match="this model is on the meta device"):
        zoo.save(model, tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to move this function elsewhere
        quantised = torch.ao.quantization.quantize_dynamic(small("full").float(), {torch.nn.Linear})
    with pytest.raises(ValueError, match="is quantised or packed: save before that"):
        zoo.save(quantised, tmp_path / "model")
