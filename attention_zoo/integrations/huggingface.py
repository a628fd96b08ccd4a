"""Our patterns as attention implementations of Hugging Face transformers.

    from attention_zoo.integrations import huggingface
    huggingface.register()                                  # zoo_bigbird, zoo_full, zoo_longformer, ...
    config = AutoConfig.from_pretrained(path)
    config.zoo_attention = {"window": 64}                   # the mechanism's own options, and seed
    model = AutoModelForCausalLM.from_pretrained(path, config=config, attn_implementation="zoo_longformer")

or, for a model at hand, `model.set_attn_implementation("zoo_longformer")`. Any model that attends through transformers'
attention interface will do. Building another one (Bloom, Falcon, RoFormer, ...) with our names is refused by name; a
living one keeps its own attention, with transformers' warning (`model.config._attn_implementation` says which it is).
What still gets at our mask in another way than through the interface is refused when it computes with it. A model
keeps its projections, its position scheme, its cache and its `generate`; we decide which keys a query sees. Distances
are those of columns, as in every mask of transformers, and positions start at a row's first token: padding may stand on
either side or in holes, and whatever the cuts, cached generation equals one call. Sequences packed by `position_ids`,
which transformers recognises where there is neither mask nor cache, are documents.

Direction comes from the model: its mask where it has one, `module.is_causal` where not. A model's own sliding window
(Mistral, Qwen, ModernBERT, ...) is honoured by zoo_full and zoo_longformer, which then see what both allow; other
patterns refuse it. Cross-attention runs under zoo_full alone, unless `zoo_attention` has "cross": "full".

Deviations. Longformer's global queries have no projections of their own here (global_projections=shared), and a
transformers model marks no token global: what is left is the sliding window. Layer i draws BigBird's links by seed + i.
Weights of the attention are not returned. Dropout inside the attention does not exist here: training needs it to be 0.
Outputs at padding are of no meaning, as everywhere. A model made of several has a config for each of its parts, and the
part that attends reads its own: `config.text_config.zoo_attention`.

Refused by name: reformer, whose queries are its keys, and transformer_xl, whose memory holds hidden states.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attention_zoo.attention.longformer import Longformer
from attention_zoo.attention.operator import refuse_export
from attention_zoo.attention.pattern import PatternAttention
from attention_zoo.contract import Tokens, Unsupported, one_of
from attention_zoo.integrations.bare import at_columns, at_padding_too, bare_pattern, refusal
from attention_zoo.integrations.guard import Description, refuse_others
from attention_zoo.layout.layout import Layout
from attention_zoo.registry import available, recipe

PREFIX = "zoo_"
LEAST = (5, 23)
"""The oldest transformers that was tested. Earlier ones call masks in other ways, and results would be wrong."""
HARMLESS = frozenset(
    {
        "cache_position", "deterministic", "encoder_hidden_states", "num_items_in_batch", "output_hidden_states",
        "output_router_logits", "position_ids", "return_dict", "use_cache",
    }
)  # fmt: skip
"""What models hand to every attention and what does not change what a pattern computes. All else that is set raises."""

CAUSAL, TWO_SIDED, EITHER = -11, -12, -13
"""Direction of a mask; EITHER where there is too little to see to tell. Numbers that no mask of a user's holds."""
ROWS = 8


def register(*names: str) -> tuple[str, ...]:
    """Make patterns available to transformers as attn_implementation="zoo_<name>". May be called again.

    Args:
        names: backends; default all that are patterns, those of other packages among them.

    Returns:
        The names to give as attn_implementation.

    Raises:
        ImportError: without transformers, or with an older one than was tested.
        Unsupported: for a named mechanism that cannot work inside such a model, with the reason.
        ValueError: for an unknown name.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, __version__
    except ImportError as error:
        raise ImportError(
            f"attention_zoo.integrations.huggingface needs transformers: pip install 'attention-zoo[huggingface]' "
            f"({error})"
        ) from error
    if tuple(map(int, __version__.split(".")[:2])) < LEAST:
        raise ImportError(
            f"attention_zoo.integrations.huggingface needs transformers {LEAST[0]}.{LEAST[1]} or later, whose masks "
            f"say where queries stand; got {__version__}: pip install 'attention-zoo[huggingface]'"
        )
    for name in names:
        reason = refusal(name)
        if reason is not None:
            raise Unsupported(name, f'attn_implementation="{PREFIX}{name}"', reason, "longformer, bigbird or full")
    refuse_others(PreTrainedModel, PREFIX)
    registered = []
    for name in names or _patterns():
        AttentionInterface.register(PREFIX + name, _interface(name))
        AttentionMaskInterface.register(PREFIX + name, describe)
        registered.append(PREFIX + name)
    return tuple(registered)


def _patterns() -> tuple[str, ...]:
    found = []
    for name in available():
        try:
            if refusal(name) is None:
                found.append(name)
        except Exception as error:  # a broken package of somebody's must not stop the others
            warnings.warn(f"backend {name!r} cannot be loaded: {error}", stacklevel=3)
    return tuple(found)


# --- the mask: once per forward call, what every layer needs to know of its tokens -----------------------------------


def describe(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    config: Any = None,
    device: torch.device | None = None,
    **unused: Any,
) -> Tensor:
    """What transformers calls a mask: int64 [B, 1, 8, S], not L x S.

    The rows are the fields of `Tokens`, which columns are this call's queries, direction and reach of a sliding window.
    transformers passes on what it takes for a prepared mask only if it is a single 4-D tensor.

    Args:
        batch_size, q_length, kv_length: of the call; a static cache holds more columns than are written.
        q_offset, kv_offset: place of the first query and of the first key in the row.
        mask_function: (row, head, query, key) -> bool. It is not evaluated for all pairs but read: at neighbours, and
            at the border of the window.
        attention_mask: bool [B, length], False at padding.
        local_size: of a sliding window or of chunks.
        use_vmap: whether the model adds conditions of its own.
        config: the model's.

    Raises:
        ValueError: for a mask that is not made of padding, documents, causality and a sliding window.
    """
    refuse_export(getattr(config, "_attn_implementation", None) or f"{PREFIX}attention")
    if use_vmap:
        raise ValueError("the model adds a mask function of its own, which a pattern cannot honour; use sdpa or eager")
    if local_size is not None and local_size != getattr(config, "sliding_window", None):
        raise ValueError(f"chunked attention (attention_chunk_size={local_size}) is not supported; use sdpa or eager")
    start, total = int(q_offset), kv_offset + kv_length
    column = torch.arange(total, device=device)
    document, direction, reach = _read(mask_function, batch_size, column[kv_offset:], local_size)
    # a static cache is longer than what is written
    valid = (column < (total if direction == TWO_SIDED else start + q_length)).expand(batch_size, total)
    if attention_mask is not None:
        known = attention_mask[:, :total].bool()
        valid = valid & nn.functional.pad(known, (0, total - known.shape[1]))
    document = torch.cat([document[:, :1].expand(-1, kv_offset), document], 1)
    tokens = at_columns(valid, document)
    asked = ((column >= start) & (column < start + q_length)).expand(batch_size, total)
    constants = [torch.full_like(tokens.position, value) for value in (direction, reach)]
    rows = torch.stack([*(field.long() for field in tokens), asked.long(), *constants], 1)
    return rows[:, None, :, kv_offset:].as_subclass(Description)


def _read(
    mask_function: Callable[..., Tensor], batch_size: int, column: Tensor, local_size: int | None
) -> tuple[Tensor, int, int]:
    """Documents [B, S], direction and reach (-1: any) of a mask function that knows no more than these."""
    row, size = torch.arange(batch_size, device=column.device)[:, None], len(column)

    def sees(query: Tensor, key: Tensor) -> Tensor:
        return mask_function(row, 0, query[None], key[None]).expand(batch_size, -1)

    back, ahead = sees(column[1:], column[:-1]), sees(column[:-1], column[1:])
    two_sided = bool(ahead.any())
    document = nn.functional.pad((~back).long().cumsum(1), (1, 0))
    reach = -1 if local_size is None else local_size - (not two_sided)
    known = not two_sided or torch.equal(ahead, back)
    for gap in {gap for gap in (reach, reach + 1, size - 1) if 0 < gap < size}:
        expected = (document[:, gap:] == document[:, :-gap]) & (reach < 0 or gap <= reach)
        known = known and torch.equal(sees(column[gap:], column[:-gap]), expected)
    if not known:
        raise ValueError("the model masks more than padding, documents, the future and a window; use sdpa or eager")
    if not two_sided and not bool(back.any()):
        return document, EITHER, -1  # a token sees itself alone: one column, or documents of one token
    return document, TWO_SIDED if two_sided else CAUSAL, reach


class _Said(NamedTuple):
    """What a layer learns from the mask, or from its absence."""

    keys: Layout
    everywhere: Layout  # the same, for queries that count at padding, too
    start: int  # column of the first query
    causal: bool | None  # None: not to be told from the mask
    reach: int | None
    alone: bool = False  # a token sees itself and nothing else, whatever the direction and the reach


def _layout(mask: Tensor | None, key: Tensor) -> _Said:
    B, _, S, _ = key.shape
    if mask is None:
        keys = Layout.plain(B, S, key.device)
        return _Said(keys, keys, 0, None, None)
    found = getattr(mask, "zoo_layout", None)
    if found is None:
        found = _decode(mask)
        mask.zoo_layout = found  # type: ignore[attr-defined]  # every layer of a call is handed the same tensor
    if mask.shape[0] != B or mask.shape[3] != S:
        raise ValueError(f"the mask describes {mask.shape[0]} x {mask.shape[3]} keys, the attention has {B} x {S}")
    if mask.device != key.device:
        keys, everywhere = (
            Layout.fresh(Tokens(*(field.to(key.device) for field in tokens)))
            for tokens in (found.keys, found.everywhere)
        )
        return found._replace(keys=keys, everywhere=everywhere)
    return found


def _decode(mask: Tensor) -> _Said:
    directions = {CAUSAL: True, TWO_SIDED: False, EITHER: None}
    mask = mask.as_subclass(Tensor)
    ours = mask.dtype == torch.long and mask.ndim == 4 and mask.shape[1:3] == (1, ROWS) and mask.numel()
    direction, reach = mask[0, 0, 6:8, 0].tolist() if ours else (0, 0)
    if direction not in directions:
        raise ValueError(
            f"attention_mask must be one that transformers makes from a padding mask [batch, length], got "
            f"{mask.dtype} of shape {tuple(mask.shape)}: patterns honour no masks of a user's own"
        )
    # a copy: views would hold the mask that holds them
    position, valid, is_global, document, length, asked = mask[:, 0, :6].clone().unbind(1)
    tokens = Layout.fresh(Tokens(position, valid.bool(), is_global.bool(), document, length))
    return _Said(
        tokens,
        at_padding_too(tokens),
        int(asked[0].argmax()),
        directions[direction],
        None if reach < 0 else reach,
        direction == EITHER,
    )


# --- the attention: once per layer -----------------------------------------------------------------------------------


def _interface(name: str) -> Callable[..., tuple[Tensor, None]]:
    # the kernels decide by what the masks hold: nothing for a compiler to look through
    @torch.compiler.disable
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """[B, H, L, D] x [B, K, S, D] -> [B, L, H, D], and no weights."""
        refuse_export(PREFIX + name)
        _check_call(name, dropout, others)
        layout = _layout(attention_mask, key)
        if sliding_window is not None and layout.reach != sliding_window - 1 and not layout.alone:
            raise ValueError(f"sliding_window={sliding_window} is not what the mask says, a reach of {layout.reach}")
        causal = layout.causal
        if causal is None:
            causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        L, S = query.shape[2], key.shape[2]
        crosses = not causal and (L != S or _is_cross(name, module))
        pattern = _pattern(name, module, query, key, causal, crosses, layout.reach)
        keys = layout.keys
        if crosses:
            queries = Layout.plain(query.shape[0], L, query.device)
        else:
            end = layout.start + L
            if end > S or (attention_mask is None and L != S):
                raise ValueError(f"{L} queries over {S} keys need a mask that says where they stand")
            # a static cache is longer than what is written, and any cache than what a window reaches
            seen = slice(_first(pattern, layout.start), end)
            key, value, keys = key[:, :, seen], value[:, :, seen], keys.columns(seen)
            queries = (
                keys if keys.valid.shape[1] == L else keys.columns(slice(keys.valid.shape[1] - L, keys.valid.shape[1]))
            )
            if name == "full" and L > 1:  # then equal to sdpa at padding, too: somebody's loss may count it
                queries = layout.everywhere if L == S else layout.everywhere.columns(slice(layout.start, end))
        scale = query.shape[3] ** -0.5 if scaling is None else float(scaling)
        out = pattern.attend(query, key, value, queries, keys, scale=scale)
        return out.transpose(1, 2).contiguous(), None

    return attention


def _first(pattern: PatternAttention, start: int) -> int:
    """The first column that queries from column `start` on may see: columns are as far apart as positions."""
    marks = type(pattern).mark is not PatternAttention.mark  # global tokens are seen from everywhere
    far = pattern.reach.farthest
    return 0 if marks or pattern.reach.first or far is None else max(0, start - far)


def _check_call(name: str, dropout: float, others: Mapping[str, Any]) -> None:
    if dropout:
        raise ValueError(
            f"{PREFIX}{name} has no dropout inside the attention, got {dropout}: set the config's attention dropout "
            f"(attention_dropout, attn_pdrop, attention_probs_dropout_prob) to 0"
        )
    if others.get("output_attentions"):
        raise ValueError(f"{PREFIX}{name} does not return attention weights: output_attentions must be False")
    for key, value in others.items():
        unset = value is None or (isinstance(value, bool | int | float) and not value)
        if key not in HARMLESS and not unset:
            raise ValueError(f"{PREFIX}{name} cannot honour {key}, which this model passes to its attention")


def _is_cross(name: str, module: nn.Module) -> bool:
    """Whether a two-sided layer attends to another sequence: transformers has no one name for that.

    Raises:
        Unsupported: where nothing tells, and it matters.
    """
    flags = [getattr(module, flag, None) for flag in ("is_cross_attention", "is_decoder")]
    if any(flags) or "Cross" in type(module).__name__:
        return True
    unknown = flags == [None, None] and getattr(module.config, "is_encoder_decoder", False)
    if unknown and name != "full":
        raise Unsupported(
            f"{PREFIX}{name}", f"{type(module).__name__} of an encoder-decoder",
            "nothing tells its cross-attention from its self-attention", f"{PREFIX}full",
        )  # fmt: skip
    return unknown


def _pattern(
    name: str, module: nn.Module, query: Tensor, key: Tensor, causal: bool, cross: bool, reach: int | None
) -> PatternAttention:
    options = getattr(module.config, "zoo_attention", None)
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(f"config.zoo_attention must be a dict of options, got {options!r}")
    options = dict(options or {})
    one_of(("same", "full"), cross=options.get("cross", "same"))
    build = partial(
        bare_pattern, heads=query.shape[1], kv_heads=key.shape[1], head_width=query.shape[3], causal=causal,
        cross=cross, layer=getattr(module, "layer_idx", None) or 0, device=query.device, dtype=query.dtype,
    )  # fmt: skip
    if options.pop("cross", "same") == "full" and cross:
        return build("full", {})
    if cross and not recipe(name)[0].declared.cross:
        raise Unsupported(
            PREFIX + name, "cross-attention", "the mechanism attends to its own tokens only",
            f'{PREFIX}full, or "cross": "full" in zoo_attention',
        )  # fmt: skip
    if reach is None:
        return build(name, options)
    # what was asked for must be possible in itself, in every layer alike
    return build(*_within(name, options, build(name, options), reach))


def _within(name: str, options: dict[str, Any], pattern: PatternAttention, reach: int) -> tuple[str, dict[str, Any]]:
    """A pattern that sees what the given one and the model's own sliding window both allow."""
    if name == "full":
        kernel = {key: value for key, value in options.items() if key == "kernel"}
        return "longformer", {"window": reach, **kernel}
    steps = options.get("dilation", 1)
    plain = all(step == 1 for step in ([steps] if isinstance(steps, int) else steps))
    if not isinstance(pattern, Longformer) or not plain or pattern.sinks:
        raise Unsupported(
            name, f"a layer of the model's with a sliding window of {reach}", "what both allow is no pattern of ours",
            "full or longformer without dilation and sinks, or layers without a window (config.layer_types)",
        )  # fmt: skip
    return name, {**options, "window": min(pattern.window, reach)}
