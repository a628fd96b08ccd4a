"""Beam search against an exhaustive one, and sources that are encoded once however a text is written."""

from __future__ import annotations

from itertools import cycle, product
from pathlib import Path

import pytest
import torch
from small_models import CARRYING, PREFIX, TWO_SIDED, far, in_pieces, paired, ragged, small, some_ids

from attention_zoo import EncoderDecoder, Tokens, Transformer, Unsupported, generate, load, save
from attention_zoo.commands.main import main
from attention_zoo.model.beam import beam_search

FEW = 3
"""Tokens of the vocabulary, so that all texts can be looked at."""


def tiny(name: str, **options):
    # later tokens move earlier LSH buckets: a deeper Reformer is no function of the prefix alone
    return small(name, **{"vocab": FEW, "depth": 2 if name in PREFIX else 1, **options})


def pair(reader: str, writer: str, **options) -> EncoderDecoder:
    encoder = small(reader, causal=False, head="hidden")
    return EncoderDecoder(encoder=encoder, decoder=tiny(writer, cross=True, **options)).eval()


@torch.no_grad()
def after(model, prompt: torch.Tensor, texts: list[tuple[int, ...]], **rest) -> torch.Tensor:
    """Log-probabilities [texts, vocab] of what follows the prompt and each of some texts of one length."""
    ids = torch.stack([torch.cat([prompt, torch.tensor(text, dtype=torch.long)]) for text in texts])
    logits = model(ids, **{name: given.expand(len(texts), -1) for name, given in rest.items()}).logits
    return logits[:, -1].double().log_softmax(-1)


def every_text(model, prompt: torch.Tensor, steps: int, eos: int | None, penalty: float, **rest):
    """All texts and their scores, the best first, from probabilities that are read from the whole prefix each time."""
    said: dict[tuple[int, ...], torch.Tensor] = {}
    for length in range(steps):
        begun = list(product(range(FEW), repeat=length))
        said |= dict(zip(begun, after(model, prompt, begun, **rest)))
    texts = set()
    for text in product(range(FEW), repeat=steps):
        texts.add(text[: text.index(eos) + 1] if eos in text else text)
    scored = {t: sum(said[t[:n]][t[n]].item() for n in range(len(t))) / len(t) ** penalty for t in texts}
    return sorted(scored.items(), key=lambda each: -each[1])


@pytest.mark.parametrize(
    ("eos", "penalty", "cached"), [(None, 1.0, True), (1, 0.0, True), (2, 0.6, False), (0, -1.0, True), (2, 3.0, True)]
)
@pytest.mark.parametrize("name", CARRYING)
def test_with_beams_for_all_texts_it_is_exhaustive(name, eos, penalty, cached):
    model, valid = tiny(name, short_conv=3), ragged(5, [5, 2], "left")
    ids = some_ids(2, 5) % FEW
    options = {"steps": 3, "eos": eos, "length_penalty": penalty, "valid": valid, "cached": cached}
    found = beam_search(model, ids, beams=30, **options)
    for row in range(2):
        texts = every_text(model, ids[row, valid[row]], 3, eos, penalty)
        assert found.scores[row].isfinite().sum() == len(texts)
        for place, (text, score) in enumerate(texts):
            length = int(found.lengths[row, place])
            assert tuple(found.tokens[row, place, :length].tolist()) == text
            assert abs(found.scores[row, place].item() - score) < 1e-10
            assert set(found.tokens[row, place, length:].tolist()) <= {eos}
    best = generate(model, ids, beams=30, **options)
    assert torch.equal(best, found.tokens[:, 0, : int(found.lengths[:, 0].max())])


@pytest.mark.parametrize("name", CARRYING)
def test_one_beam_is_greedy(name):
    model, ids = small(name, depth=2 if name in PREFIX else 1), some_ids(length=9)
    valid = ragged(9, [9, 5, 1], "right")
    free = generate(model, ids, steps=10, valid=valid, greedy=True)
    found = beam_search(model, ids, steps=10, beams=1, valid=valid)
    assert torch.equal(found.tokens[:, 0], free)
    eos = int(free[0, 4])
    greedy = generate(model, ids, steps=10, valid=valid, greedy=True, eos=eos)
    for penalty in (0.0, 2.0):
        found = beam_search(model, ids, steps=10, beams=1, valid=valid, eos=eos, length_penalty=penalty)
        assert torch.equal(found.tokens[:, 0], greedy)
    assert int(found.lengths[0, 0]) == free[0].tolist().index(eos) + 1


def narrow_by_hand(model, prompt: torch.Tensor, steps: int, beams: int, eos: int, penalty: float):
    """The same rule with lists, one prompt, each hypothesis read anew."""
    kept = [((), 0.0)]
    for _ in range(steps):
        longer = [(text, total) for text, total in kept if eos in text]
        if open_ones := [(text, total) for text, total in kept if eos not in text]:
            for (text, total), said in zip(open_ones, after(model, prompt, [text for text, _ in open_ones])):
                longer += [((*text, token), total + value.item()) for token, value in enumerate(said)]
        kept = sorted(longer, key=lambda each: -each[1] / len(each[0]) ** penalty)[:beams]
    return kept


@pytest.mark.parametrize("beams", [2, 4])
@pytest.mark.parametrize("name", PREFIX)
def test_few_beams_keep_what_the_rule_says(name, beams):
    """Far beyond the window, so that states that are handed on matter, and rows that end at different steps."""
    model, ids = small(name), some_ids(length=12)
    valid, penalty = ragged(12, [12, 7, 1], "left"), 0.7
    eos = int(generate(model, ids, steps=4, valid=valid, greedy=True)[1, 2])
    found = beam_search(model, ids, steps=9, beams=beams, valid=valid, eos=eos, length_penalty=penalty)
    for row in range(3):
        expected = narrow_by_hand(model, ids[row, valid[row]], 9, beams, eos, penalty)
        for place, (text, total) in enumerate(expected):
            length = int(found.lengths[row, place])
            assert tuple(found.tokens[row, place, :length].tolist()) == text
            assert abs(found.scores[row, place].item() - total / len(text) ** penalty) < 1e-10


def test_the_search_ends_when_all_beams_have():
    model = small("full")
    with torch.no_grad():
        model.head.weight.zero_()
    model.embedding.weight.requires_grad_(False)
    model.head.bias = torch.nn.Parameter(torch.tensor([9.0] + [0.0] * 10, dtype=torch.float64))
    calls = counted(model.stack)
    found = beam_search(model, some_ids(), steps=50, beams=2, eos=0)
    assert found.tokens.shape[-1] == len(calls) < 5
    assert found.tokens[:, 0].tolist() == [[0] * found.tokens.shape[-1]] * 3
    assert found.lengths[:, 0].tolist() == [1, 1, 1]
    assert generate(model, some_ids(), steps=50, beams=2, eos=0).tolist() == [[0]] * 3
    # there is one text alone, and further beams are none
    alone = small("full", vocab=1)
    found = beam_search(alone, torch.zeros(2, 3, dtype=torch.long), steps=9, beams=3, eos=0)
    assert found.tokens.shape == (2, 3, 1)
    assert found.scores[:, 0].tolist() == [0.0, 0.0]
    assert (found.scores[:, 1:] == -torch.inf).all()


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_without_rows(beams):
    ids = torch.zeros(0, 3, dtype=torch.long)
    assert generate(small("full"), ids, steps=2, beams=beams, **({"greedy": True} if beams == 1 else {})).shape[0] == 0


def test_the_model_is_left_as_it_was():
    model = small("full", output_dropout=0.5).train()
    one, other = (generate(model, some_ids(), steps=5, beams=3) for _ in range(2))
    assert torch.equal(one, other)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_holds_nan_writes_nothing():
    model = small("longformer")
    with torch.no_grad():
        model.stack.attentions[0].to_v.weight[0] = float("nan")
    with pytest.raises(ValueError, match="logits must be numbers, got NaN: the model's weights hold some"):
        beam_search(model, some_ids(), steps=2, beams=2)
    assert not model.training


@pytest.mark.parametrize(("options", "message"), [
    ({"beams": 0}, "beams must be an integer of at least 1, got 0"),
    ({"beams": True}, "beams must be an integer of at least 1, got True"),
    ({"beams": 10**9}, "beams must be at most 65536, got 1000000000"),
    ({"length_penalty": float("nan")}, "length_penalty must be a number from -4 to 4, got nan"),
    ({"length_penalty": "long"}, "length_penalty must be a number from -4 to 4, got 'long'"),
    ({"length_penalty": 9}, "length_penalty must be a number from -4 to 4, got 9"),
    ({"beams": 1, "length_penalty": 0.5}, "length_penalty needs beams above 1, got 0.5 with beams=1"),
    ({"greedy": True, "seed": 3}, "beams above 1 takes no greedy, seed: it draws nothing"),
    ({"top_k": 3}, "beams above 1 takes no top_k: it draws nothing"),
    ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
    ({"eos": 11}, r"eos must lie in \[0, 11\), got 11"),
    ({"eos": -1}, "eos must be an integer of at least 0, got -1"),
    ({"valid": torch.zeros(3, 23, dtype=torch.bool)}, "at least one token of every prompt"),
], ids=str)  # fmt: skip
def test_wrong_options_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        generate(small("full"), some_ids(), **{"steps": 2, "beams": 2, **options})


def test_models_that_cannot_write_are_refused():
    with pytest.raises(ValueError, match="generate needs a causal model with head=lm"):
        beam_search(small("full", causal=False), some_ids(), steps=1, beams=2)
    with pytest.raises(ValueError, match="source needs a model built with cross=True"):
        beam_search(small("full"), some_ids(), steps=1, beams=2, source=pair("full", "full").encode(some_ids())[0])


# --- encoder and decoder ----------------------------------------------------------------------------------------------


def counted(part: torch.nn.Module) -> list[int]:
    """Rows of each call of a module, from now on."""
    calls: list[int] = []
    part.register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))
    return calls


WAYS = [{"greedy": True}, {"seed": 3}, {"beams": 4}]


@pytest.mark.parametrize(
    ("options", "given", "cached"),
    [
        (WAYS[way], given, bool((way + place) % 2))
        for way in range(3)
        for place, given in enumerate(("ids", "tokens", "source"))
    ],
    ids=str,
)
def test_the_encoder_runs_once(options, given, cached):
    model = pair("longformer", "full", vocab=11)
    source, tokens = some_ids(length=15, seed=4), Tokens.of(ragged(15, [15, 9, 2], "right"))
    free = generate(model, some_ids(), steps=8, source=(source, tokens), **options)
    calls = counted(model.encoder)
    sources = {"ids": source, "tokens": (source, tokens), "source": model.encode(source, tokens)[0]}
    options = {**options, "steps": 8, "source": sources[given], "cached": cached}
    prompts = ragged(23, [23, 4, 1], "left")
    for eos in (None, int(free[0, 2])):
        del calls[:]
        written = generate(model, some_ids(), valid=prompts, prefill_chunk=5 if cached else None, eos=eos, **options)
        assert written.shape[0] == 3
        assert calls == ([] if given == "source" else [3])  # and never once a beam


@pytest.mark.parametrize(
    ("options", "cached"), [({"greedy": True}, True), ({"greedy": True}, False), ({"beams": 3}, True)], ids=str
)
@pytest.mark.parametrize(("reader", "writer"), paired(TWO_SIDED, CARRYING))
def test_rows_are_written_as_if_alone(reader, writer, options, cached):
    """Ragged sources and prompts, and rows that end early."""
    model = pair(reader, writer, vocab=11)
    source, ids = some_ids(length=15, seed=4), some_ids(length=6)
    kept, prompts = ragged(15, [15, 9, 2], "right"), ragged(6, [6, 4, 1], "left")
    given = {"valid": prompts, "source": (source, Tokens.of(kept)), **options}
    eos = int(generate(model, ids, steps=7, **given)[0, 2])
    together = generate(model, ids, steps=7, eos=eos, cached=cached, **given)
    for row in range(3):
        alone = generate(
            model, ids[row : row + 1, prompts[row]], steps=7, eos=eos,
            source=source[row : row + 1, kept[row]], **options,
        )[0].tolist()  # fmt: skip
        assert together[row].tolist() == alone + [eos] * (together.shape[1] - len(alone))


@pytest.mark.parametrize("writer", CARRYING)
def test_with_a_source_it_is_exhaustive_too(writer):
    model = pair("bigbird", writer)
    source, ids = some_ids(2, 15, seed=4), some_ids(2, 3) % FEW
    kept = ragged(15, [15, 4], "right")
    found = beam_search(model, ids, steps=3, beams=30, eos=1, source=(source, Tokens.of(kept)))
    for row in range(2):
        texts = every_text(model, ids[row], 3, 1, 1.0, source=source[row : row + 1, kept[row]])
        for place, (text, score) in enumerate(texts):
            assert tuple(found.tokens[row, place, : int(found.lengths[row, place])].tolist()) == text
            assert abs(found.scores[row, place].item() - score) < 1e-10


@pytest.mark.parametrize(
    ("reader", "writer"), sorted({*zip(TWO_SIDED, cycle(PREFIX)), *zip(cycle(reversed(TWO_SIDED)), PREFIX)})
)
def test_teacher_forcing_is_decoding(reader, writer):
    """One masked pass over the target says what token after token says, and pieces of any length."""
    model = pair(reader, writer, vocab=11, short_conv=3)
    ids, source = some_ids(), (some_ids(length=15, seed=4), Tokens.of(ragged(15, [15, 9, 2], "left")))
    forced = model(ids, source=source).logits
    encoded = model.encode(*source)[0]
    for cuts in (list(range(1, 23)), [1, 2, 5, 16]):
        assert far(in_pieces(model, ids, None, cuts, source=encoded), forced) < 1e-12
    other = model(ids.roll(1, 1), source=source).logits
    assert far(other, forced) > 1e-3


def test_models_without_a_state_search_by_reading_anew():

    model = small("full")
    model.__class__ = type("Forgetful", (type(model),), {"carries": property(lambda self: False)})
    with pytest.raises(Unsupported, match="this model: state is not supported"):
        beam_search(model, some_ids(), steps=2, beams=2)
    found = beam_search(model, some_ids(), steps=4, beams=2, cached=False)
    assert torch.equal(found.tokens, beam_search(small("full"), some_ids(), steps=4, beams=2).tokens)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A decoder, and an encoder-decoder, of bytes."""
    folder = tmp_path_factory.mktemp("models")
    shape = {"attention": "full", "vocab": 256, "dim": 16, "heads": 2, "depth": 1}
    torch.manual_seed(0)
    both = EncoderDecoder(
        encoder=Transformer(**shape, causal=False, head="hidden"), decoder=Transformer(**shape, cross=True)
    )
    return save(Transformer(**shape), folder / "one.safetensors"), save(both, folder / "both.safetensors")


def test_the_command_searches_and_reads_a_source(written, capsys):
    def call(path: Path, *words: str) -> str:
        assert main(["generate", str(path), "ab", "--steps", "5", "--device", "cpu", *words]) == 0
        said = capsys.readouterr()
        assert ("search: " in said.err) == ("--beams" in words)
        return said.out

    one, both = written
    searched = call(one, "--beams", "3")
    assert searched.startswith("ab")
    assert searched == call(one, "--beams", "3", "--length-penalty", "0.5")
    assert call(one, "--temperature", "0") == call(one, "--temperature", "0", "--seed", "1")
    ids, model = torch.tensor([list(b"ab")]), load(both)
    for source in ("to read", "something else"):
        expected = generate(model, ids, steps=5, beams=3, source=torch.tensor([list(source.encode())]))
        text = bytes([*b"ab", *expected[0]]).decode(errors="replace")
        assert call(both, "--beams", "3", "--source", source) == f"{text}\n"
    sources = ("to read", "something else", "\udcff")
    assert len({call(both, "--steps", "60", "--source", source) for source in sources}) > 1


@pytest.mark.parametrize(("words", "message"), [
    ("--beams 0", "beams must be an integer of at least 1, got 0"),
    ("--beams 2 --top-k 3 --seed 0", "beams above 1 takes no seed, top_k: it draws nothing"),
    ("--length-penalty 1", "--length-penalty needs --beams above 1"),
    ("--beams 2 --length-penalty 7", "length_penalty must be a number from -4 to 4, got 7.0"),
    ("--source x", "--source is for a model with an encoder, which needs one"),
    ("--beams 2 --eos 256", "--eos must be a byte, 0 to 255, got 256"),
])  # fmt: skip
def test_wrong_flags_are_refused_in_one_line(written, words, message, capsys):
    assert main(["generate", str(written[0]), "x", "--device", "cpu", *words.split()]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize("words", [[], ["--source", ""]], ids=str)
def test_an_encoder_needs_a_source(written, words, capsys):
    assert main(["generate", str(written[1]), "x", "--device", "cpu", *words]) == 2
    assert capsys.readouterr().err.startswith("error: --source ")
