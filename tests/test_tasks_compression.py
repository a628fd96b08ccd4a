"""Compression: the row is asked whole, and nothing but its last token's hidden state reaches the decoder."""

from __future__ import annotations

import pytest
import torch

from attention_zoo.model.encoder_decoder import EncoderDecoder
from attention_zoo.model.transformer import Transformer
from attention_zoo.tasks.compression import Compression
from attention_zoo.tasks.task import Batch
from attention_zoo.training.streams import Stream


def batch_of(length: int = 7, count: int = 5) -> Batch:
    return next(Compression(symbols=6).train_batches(count, length, seed=0))


def model_of() -> EncoderDecoder:
    options = {"dim": 16, "depth": 1, "heads": 2, "vocab": 7, "attention": "full"}
    return EncoderDecoder(
        encoder=Transformer(**options, causal=False, head="hidden"), decoder=Transformer(**options, cross=True)
    ).eval()


@pytest.mark.parametrize("length", [1, 7, 8])
def test_the_row_is_asked_whole(length: int) -> None:
    batch = batch_of(length)
    assert batch.source is not None
    assert batch.source_seen is not None
    assert torch.equal(batch.targets, batch.source)
    for read, row in zip(batch.ids.tolist(), batch.source.tolist()):
        assert read == [0, *row[:-1]]
    assert batch.source_seen.tolist() == [[False] * (length - 1) + [True]] * 5


def test_the_decoder_sees_one_hidden_state_of_all_that_the_encoder_read() -> None:
    model, batch = model_of(), batch_of()
    stream = Stream(model, carry=False)
    said = stream(batch).logits
    once = stream.encoded(batch)
    assert torch.equal(stream(once).logits, said), "the same, read beforehand"
    hidden, tokens = once.source  # type: ignore[misc]
    other = hidden.clone()
    other[:, :-1] += 1
    assert torch.equal(stream(once._replace(source=type(once.source)(other, tokens))).logits, said)
    assert not torch.allclose(stream(batch._replace(source_seen=None)).logits, said), "all of it says more"
    changed = batch.source.clone()  # type: ignore[union-attr]
    changed[:, 0] = changed[:, 0] % 6 + 1
    assert not torch.allclose(stream(batch._replace(source=changed)).logits, said), "the encoder reads all"


def test_symbols_are_uniform_and_trivial_rules_fail() -> None:
    counts = torch.bincount(batch_of(count=4000).targets.flatten())[1:]
    assert len(counts) == 6
    assert counts.min() > 0.9 * counts.max()
    task = Compression(symbols=8)
    found = task.baselines(8)
    assert found["one symbol"] == pytest.approx(task.chance(8), abs=0.02)
    assert found["last token"] == pytest.approx(1 / 8 + 7 / 8 / 8, abs=0.02)
    assert found["commonest symbol"] == pytest.approx(0.32, abs=0.03)


def test_options_outside_their_rule_are_refused() -> None:
    with pytest.raises(ValueError, match="symbols must be an integer of at least 2"):
        Compression(symbols=1)
