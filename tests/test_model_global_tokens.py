"""Learned global tokens that the skeleton puts at the start of each document, as ETC asks."""

from __future__ import annotations

import pytest
import torch
from small_models import VOCAB, entry, far, in_pieces, packed, ragged, some_ids

from attention_zoo import Output, Tokens, Transformer, Unsupported
from attention_zoo.attention.full import Full
from attention_zoo.model.global_tokens import asked_for


class Watched(Full):
    """Full attention with two extra global tokens, that notes what it is given."""

    extra_global_tokens = 2
    given: Tokens

    def forward(self, x, tokens=None, **rest) -> Output:
        self.given, self.seen = tokens, x
        return super().forward(x, tokens, **rest)


class Other(Full):
    extra_global_tokens = 3


def etc(**options) -> Transformer:
    torch.manual_seed(7)
    attention = entry("bigbird", extra_global_tokens=3)
    return Transformer(attention=attention, vocab=VOCAB, dim=16, heads=2, **options).double().eval()


def test_they_are_inserted_before_every_document_and_stripped():
    model = Transformer(attention=Watched, vocab=VOCAB, dim=16, heads=2, depth=1, positions="none")
    ids = some_ids(2, 7)
    valid = torch.tensor([[False, True, True, True, True, True, True], [True, True, True, True, True, False, False]])
    out = model(ids, packed(valid, 4))
    given = model.stack.attentions[0].given
    # row 0: padding, extra, three tokens, extra, three tokens; row 1: one of its four tokens left, then padding
    assert given.valid.int().tolist() == [[0] + [1] * 10, [1] * 9 + [0] * 2]
    assert given.is_global.int().tolist() == [[0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0]]
    assert given.position[0, 1:].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    assert given.position[1, :9].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]
    assert given.document[0, 1:].tolist() == [0] * 5 + [1] * 5
    assert given.length[0, 1:].tolist() == [5] * 10
    assert given.length[1, :9].tolist() == [6] * 6 + [3] * 3
    assert out.logits.shape == (2, 7, VOCAB)
    branch = model.stack.inner.branches[0]
    normed = branch.norm(model.stack.embedding)
    assert far(model.stack.attentions[0].seen[0, 1:3], normed) < 1e-6
    assert far(model.stack.attentions[0].seen[1, 6:8], normed) < 1e-6


@pytest.mark.parametrize("cuts", [[1], [6], [5, 13, 14, 20], list(range(1, 23))], ids=len)
def test_pieces_equal_the_whole(cuts):
    model = etc(short_conv=3)
    ids = some_ids()
    valid = torch.stack([ragged(23, [18], "left")[0], ragged(23, [19], "right")[0], torch.ones(23, dtype=torch.bool)])
    tokens = packed(valid, 6, 14)
    whole = model(ids, tokens).logits
    assert far(in_pieces(model, ids, tokens, cuts)[valid], whole[valid]) < 1e-10
    assert far(in_pieces(model, ids, None, cuts), model(ids).logits) < 1e-10


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("cuts", [[9], [4, 5, 6, 13, 20], list(range(1, 23))], ids=len)
def test_another_layers_own_projections_of_them_are_there_in_every_call(cuts, gradients):
    """Documents, and rows, that begin in a later call: nothing that their global tokens must see is gone."""
    torch.manual_seed(7)
    attention = [entry("bigbird", extra_global_tokens=3), entry("longformer", global_projections="separate")]
    model = Transformer(attention=attention, vocab=VOCAB, dim=16, heads=2, positions="rotary").double().eval()
    for layer in (model.stack.attentions[1].to_k_global, model.stack.attentions[1].to_v_global):
        torch.nn.init.normal_(layer.weight, std=0.3)
    ids = some_ids()
    valid = torch.stack([ragged(23, [8], "left")[0], ragged(23, [19], "right")[0], torch.ones(23, dtype=torch.bool)])
    tokens = packed(valid, 6, 14)
    with torch.set_grad_enabled(gradients):
        whole = model(ids, tokens).logits
        assert far(in_pieces(model, ids, tokens, cuts)[valid], whole[valid]) < 1e-10
        state = model(ids[:, :5], state=model.initial_state(3)).state
        fresh = torch.tensor([True, False, True])
        out = model(ids[:, 5:], state=state, fresh=fresh).logits
        assert far(out[fresh], model(ids[fresh, 5:]).logits) < 1e-10


@pytest.mark.parametrize("causal", [True, False])
def test_documents_and_rows_are_apart_and_fresh_rows_get_their_own(causal):
    model = etc(causal=causal)
    ids = some_ids()
    whole = model(ids, packed(torch.ones_like(ids, dtype=torch.bool), 11)).logits
    for part in (slice(0, 11), slice(11, 23)):
        assert far(model(ids[:, part]).logits, whole[:, part]) < 1e-10
    if causal:
        state = model(ids[:, :5], state=model.initial_state(3)).state
        fresh = torch.tensor([True, False, True])
        out = model(ids[:, 5:], state=state, fresh=fresh).logits
        assert far(out[fresh], model(ids[fresh, 5:]).logits) < 1e-10
        assert far(out[1], model(ids).logits[1, 5:]) < 1e-10


def test_they_learn_and_matter():
    model = etc(causal=False)
    ids = some_ids()
    before = model(ids).logits
    before.square().mean().backward()
    assert model.stack.embedding.grad.abs().sum() > 0
    with torch.no_grad():
        model.stack.embedding.normal_()
    assert far(model(ids).logits, before) > 1e-4


def test_layers_that_ask_must_agree():
    assert asked_for([Full(dim=4, heads=1)]) == 0
    model = Transformer(attention=[Full, Watched], vocab=VOCAB, dim=16, heads=2)
    assert len(model.stack.embedding) == 2
    with pytest.raises(ValueError, match=r"must be the same in all layers that ask, got \[2, 3\]"):
        Transformer(attention=[Other, Watched], vocab=VOCAB, dim=16, heads=2)
    with pytest.raises(Unsupported, match="transformer_xl: extra_global_tokens of another layer is not supported"):
        Transformer(attention=[Watched, "transformer_xl"], vocab=VOCAB, dim=16, heads=2)
