"""Encoders of transformers, saved and converted: the same logits, with padding and token types."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from pretrained import ragged_mask, saved

from attention_zoo import Tokens
from attention_zoo.integrations import weights

BERT = (transformers.BertForMaskedLM, transformers.BertConfig)
ROBERTA = (transformers.RobertaForMaskedLM, transformers.RobertaConfig)


@pytest.mark.parametrize("kind", [BERT, ROBERTA], ids=["bert", "roberta"])
def test_logits_are_theirs(kind, tmp_path: Path) -> None:
    theirs = saved(*kind, tmp_path)
    ours = weights.convert(tmp_path)
    ids, mask = ragged_mask(theirs, [17, 9, 3])
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask).logits
        found = ours(ids, Tokens.of(mask.bool())).logits
    assert (expected - found)[mask.bool()].abs().max() < 1e-10
