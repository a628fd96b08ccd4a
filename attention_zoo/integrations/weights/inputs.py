"""Their masks -> our tokens, with their idea of where a token stands."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

from attention_zoo.contract import Tokens


def tokens_of(attention_mask: Int[Tensor, "B L"], global_attention_mask: Int[Tensor, "B L"] | None = None) -> Tokens:
    """Tokens as transformers places them: at their column, whether what comes before is padding or not.

    `Tokens.of(valid)` counts valid tokens instead, which is the same where padding is on the right, but for what the
    length decides: BigBird plans its blocks by the length of the row there, and by that of the padded batch here.
    RoBERTa and Longformer count the tokens that are not padding in either case. `generate` takes no tokens: it counts,
    as theirs does.

    Args:
        attention_mask: 1 keeps a token, 0 is padding.
        global_attention_mask: 1 makes a token global (Longformer).

    Returns:
        for the whole batch in one call: not for a call with a state, which numbers tokens itself.
    """
    valid = attention_mask.bool()
    B, L = valid.shape
    everyone = Tokens.all_valid(B, L, valid.device)
    flags = everyone.is_global if global_attention_mask is None else global_attention_mask.bool() & valid
    return everyone._replace(valid=valid, is_global=flags)
