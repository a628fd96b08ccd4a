"""Writing on: the cache changes nothing, padding changes nothing, and draws come from where they should."""

from __future__ import annotations

import pytest
import torch
from small_models import (
    CARRYING,
    CAUSAL,
    PREFIX,
    TWO_SIDED,
    VOCAB,
    entry,
    far,
    in_pieces,
    paired,
    ragged,
    small,
    some_ids,
)

from attention_zoo import EncoderDecoder, Source, Tokens, Transformer, generate
from attention_zoo.model.generate import draw, narrow, stream


def depth_of(name: str) -> int:
    """Later tokens move earlier LSH buckets: a deeper Reformer is no function of the prefix alone."""
    return 2 if name in PREFIX else 1


@torch.no_grad()
def by_hand(model, prompt: torch.Tensor, steps: int, **rest) -> list[int]:
    """The most likely token again and again, of one row, each time from the whole prefix."""
    row = prompt[None]
    for _ in range(steps):
        row = torch.cat([row, model(row, **rest).logits[:, -1:].argmax(-1)], 1)
    return row[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", CARRYING)
def test_the_cache_changes_nothing(name):
    model = small(name, depth=depth_of(name), short_conv=3)
    ids = some_ids(length=9)
    written = generate(model, ids, steps=12, greedy=True)
    assert written.shape == (3, 12)
    assert torch.equal(written, generate(model, ids, steps=12, greedy=True, cached=False))
    assert written[1].tolist() == by_hand(model, ids[1], 12)
    assert len(written.unique()) > 2


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CARRYING)
def test_ragged_prompts_are_written_on_as_if_alone(name, side, cached):
    model = small(name, depth=depth_of(name), short_conv=3)
    valid, ids = ragged(9, [9, 5, 1], side), some_ids(length=9)
    written = generate(model, torch.where(valid, ids, 3), steps=8, valid=valid, greedy=True, cached=cached)
    for row in range(3):
        assert written[row].tolist() == by_hand(model, ids[row, valid[row]], 8)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", PREFIX)
def test_prompts_may_be_read_in_chunks(name, side):
    """Also where a chunk is nothing but padding in some rows, or in all."""
    model = small(name, short_conv=3)
    valid, ids = ragged(21, [17, 5, 1], side), some_ids(length=21)
    whole = generate(model, ids, steps=8, valid=valid, greedy=True, prefill_chunk=21)
    for chunk in (1, 8, 40):
        assert torch.equal(generate(model, ids, steps=8, valid=valid, greedy=True, prefill_chunk=chunk), whole)
    assert torch.equal(torch.stack(list(stream(model, ids, steps=8, valid=valid, greedy=True)), 1), whole)


def test_the_last_logits_are_those_of_the_last_valid_token():
    model, ids = small("full"), some_ids(length=9)
    tokens = Tokens.of(ragged(9, [9, 5, 1], "right"))
    whole = model(ids, tokens).logits
    assert far(model(ids, tokens, last_only=True).logits[:, 0], whole[[0, 1, 2], [8, 4, 0]]) < 1e-12
    assert far(model(ids, last_only=True).logits, model(ids).logits[:, -1:]) < 1e-12
    with pytest.raises(ValueError, match="last_only needs a head that answers for each token alone, got head=classify"):
        small("full", head="classify", classes=2)(ids, last_only=True)


def test_hybrid_stacks_and_extra_global_tokens():
    ids = some_ids(length=9)
    valid = ragged(9, [9, 5, 2], "left")
    for attention in ([entry(name) for name in PREFIX], entry("bigbird", extra_global_tokens=2)):
        torch.manual_seed(3)
        model = Transformer(attention=attention, vocab=VOCAB, dim=16, heads=2, depth=len(PREFIX)).double().eval()
        written = generate(model, ids, steps=8, valid=valid, greedy=True)
        assert written[1].tolist() == by_hand(model, ids[1, valid[1]], 8)


def test_eos_ends_a_row_and_then_the_batch():
    model = small("full")
    ids = some_ids(length=5)
    free = generate(model, ids, steps=12, seed=1)
    eos = int(free[0, 3])
    written = generate(model, ids, steps=12, seed=1, eos=eos)
    ended = 0
    for row in range(3):
        told = free[row].tolist()
        stop = told.index(eos) + 1 if eos in told else 12
        assert written[row, :stop].tolist() == told[:stop]
        assert (written[row, stop:] == eos).all()
        ended += told[stop:] != [eos] * (12 - stop)
    assert 0 < ended < 3  # one row would have gone on, and another did
    greedy = generate(model, ids[:1], steps=12, greedy=True)[0].tolist()
    alone = generate(model, ids[:1], steps=12, greedy=True, eos=greedy[2])
    assert alone.tolist() == [greedy[: greedy.index(greedy[2]) + 1]]


def test_draws_follow_the_model_and_the_seed():
    model = small("full", depth=1)
    ids = torch.zeros(4000, 1, dtype=torch.long)
    drawn = generate(model, ids, steps=1, seed=1)[:, 0]
    expected = model(ids[:1]).logits[0, -1].detach().softmax(-1)
    share = torch.bincount(drawn, minlength=VOCAB) / len(drawn)
    assert far(share.double(), expected) < 4 * 0.5 / 4000**0.5
    assert torch.equal(drawn, generate(model, ids, steps=1, seed=1)[:, 0])
    assert not torch.equal(drawn, generate(model, ids, steps=1, seed=2)[:, 0])
    before = torch.random.get_rng_state()
    generate(model, ids[:2], steps=2)
    assert torch.equal(before, torch.random.get_rng_state())


def test_narrow_keeps_exactly_what_it_says():
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.15, 0.05]]).log()
    kept = {
        (0, 1.0): [0, 1, 2, 3, 4], (2, 1.0): [1, 2], (1, 1.0): [1], (9, 1.0): [0, 1, 2, 3, 4],
        (0, 0.39): [1], (0, 0.41): [1, 2], (0, 0.69): [1, 2], (0, 0.71): [1, 2, 3], (0, 1e-9): [1],
        # top-p counts among the top-k: 0.4 of 0.7 reaches one half
        (2, 0.5): [1], (2, 0.6): [1, 2],
    }  # fmt: skip
    for (top_k, top_p), tokens in kept.items():
        left = narrow(logits, 1.0, top_k, top_p)
        assert left.isfinite().nonzero()[:, 1].tolist() == tokens, (top_k, top_p)
        assert torch.equal(left[:, tokens], logits[:, tokens])
    assert torch.allclose(narrow(logits, 0.5, 0, 1.0), 2 * logits)


def test_top_k_keeps_k_of_equal_tokens():
    assert narrow(torch.zeros(3, 7), 1.0, 2, 1.0).isfinite().sum(-1).tolist() == [2, 2, 2]


def test_draws_stay_inside_and_in_proportion():
    logits = torch.tensor([0.1, 0.4, 0.3, 0.15, 0.05]).log().expand(5000, 5)
    drawn = draw(logits, 1.0, 0, 0.6, torch.Generator().manual_seed(0))
    assert drawn.unique().tolist() == [1, 2]
    assert abs((drawn == 1).double().mean().item() - 4 / 7) < 0.03
    cold = draw(logits, 0.05, 0, 1.0, torch.Generator().manual_seed(0))
    assert (cold == 1).double().mean() > 0.99


def test_the_model_is_left_as_it_was():
    model = small("full", output_dropout=0.5).train()
    ids = some_ids(length=5)
    assert torch.equal(generate(model, ids, steps=6, greedy=True), generate(model, ids, steps=6, greedy=True))
    assert model.training
    assert model.stack.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("greedy", [True, False])
def test_a_model_that_holds_nan_writes_nothing(greedy):
    """The first token would be drawn from nothing, or be a number that is the same for every text."""
    model = small("longformer")
    with torch.no_grad():
        model.stack.attentions[0].to_v.weight[0] = float("nan")
    with pytest.raises(ValueError, match="logits must be numbers, got NaN: the model's weights hold some"):
        generate(model, some_ids(), steps=2, greedy=greedy)
    assert not model.training


@pytest.mark.parametrize(("options", "message"), [
    ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
    ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
    ({"temperature": float("nan")}, "temperature must be above 0, got nan"),
    ({"temperature": "warm"}, "temperature must be above 0, got 'warm'"),
    ({"top_p": float("nan")}, "top_p must be a probability above 0, got nan"),
    ({"steps": 10**30}, "steps must be at most 2147483648, got 1000000"),
    ({"seed": 10**30}, "seed must be at most"),
    ({"seed": 1.5}, "seed must be an integer"),
    ({"top_k": -1}, "top_k must be a number of tokens, 0 for all, got -1"),
    ({"top_p": 0.0}, "top_p must be a probability above 0, got 0.0"),
    ({"top_p": 1.5}, "top_p must be a probability above 0, got 1.5"),
    ({"prefill_chunk": 0}, "prefill_chunk must be an integer of at least 1, got 0"),
    ({"greedy": True, "top_k": 3}, "greedy=True takes no temperature"),
    ({"valid": torch.zeros(2, 3, dtype=torch.bool)}, "at least one token of every prompt"),
], ids=str)  # fmt: skip
def test_wrong_options_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        generate(small("full"), some_ids(2, 3), **{"steps": 2, **options})


def test_models_that_cannot_write_are_refused():
    for model in (small("full", causal=False), small("full", head="hidden")):
        with pytest.raises(ValueError, match="generate needs a causal model with head=lm"):
            generate(model, some_ids(), steps=1)


# --- encoder and decoder ----------------------------------------------------------------------------------------------


def pair(reader: str, writer: str, **options) -> EncoderDecoder:
    encoder = small(reader, causal=False, head="hidden")
    return EncoderDecoder(encoder=encoder, decoder=small(writer, cross=True, depth=depth_of(writer), **options)).eval()


@pytest.mark.parametrize(("reader", "writer"), paired(TWO_SIDED, CAUSAL))
def test_any_encoder_and_any_decoder(reader, writer):
    model = pair(reader, writer, short_conv=3)
    source, ids = some_ids(length=15, seed=4), some_ids(length=9)
    tokens = Tokens.of(ragged(15, [15, 9, 2], "right"))
    out = model(ids, source=(source, tokens))
    out.logits.square().mean().backward()
    assert model.encoder.embedding.weight.grad.abs().sum() > 0
    # the source is padded as if it were not, and it matters
    alone = model(ids[1:2], source=source[1:2, :9]).logits
    assert far(alone, out.logits[1:2]) < 1e-10
    assert far(model(ids[1:2], source=source[1:2]).logits, alone) > 1e-6
    if model.carries:
        first = {"source": model.encode(source, tokens)[0]}
        if writer in PREFIX:
            assert far(in_pieces(model, ids, None, [1, 2, 5], **first), out.logits) < 1e-10
        prompts = ragged(9, [9, 4, 1], "left")
        written = generate(model, ids, steps=6, valid=prompts, greedy=True, source=(source, tokens))
        assert written[1].tolist() == by_hand(model, ids[1, prompts[1]], 6, source=source[1:2, :9])
        again = generate(model, ids, steps=6, valid=prompts, greedy=True, source=(source, tokens), cached=False)
        assert torch.equal(written, again)


def test_the_decoder_sees_the_source_through_hidden_states_alone():
    model = pair("full", "full")
    source = some_ids(length=15, seed=4)
    encoded, losses = model.encode(source)
    assert isinstance(encoded, Source)
    assert losses == {}
    assert torch.equal(model(some_ids(), source=encoded).logits, model(some_ids(), source=source).logits)
    assert model.parameter_count == model.encoder.parameter_count + model.decoder.parameter_count


def test_wrong_pairs_and_missing_sources_are_refused():
    encoder, decoder = small("full", causal=False, head="hidden"), small("full", cross=True)
    with pytest.raises(ValueError, match="encoder must be built with causal=False, head=hidden"):
        EncoderDecoder(encoder=decoder, decoder=decoder)
    with pytest.raises(ValueError, match="decoder must be built with causal=True and cross=True"):
        EncoderDecoder(encoder=encoder, decoder=encoder)
    with pytest.raises(ValueError, match="the same dim, got 16 and 8"):
        EncoderDecoder(encoder=encoder, decoder=small("full", cross=True, dim=8))
    model = EncoderDecoder(encoder=encoder, decoder=decoder)
    ids = some_ids()
    for state in (None, model.initial_state(3)):
        with pytest.raises(ValueError, match="source must be given to a model built with cross=True"):
            model(ids, state=state)
    with pytest.raises(ValueError, match="source needs a model built with cross=True"):
        small("full")(ids, source=model.encode(ids)[0])
    with pytest.raises(ValueError, match="fresh is for one stream of text"):
        model(ids, source=ids, fresh=torch.ones(3, dtype=torch.bool))
