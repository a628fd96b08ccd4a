"""Hugging Face models with our attention inside: equal to their own, padded, cached, in chunks, packed, and trained."""

from __future__ import annotations

import inspect
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attention_zoo import Unsupported
from attention_zoo.integrations import guard, huggingface
from attention_zoo.integrations.bare import bare_pattern

transformers = pytest.importorskip("transformers")

VOCAB, LENGTH = 61, 23
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CAUSAL = ("llama", "qwen3", "gpt2", "mistral")
TWO_SIDED = ("bert", "modernbert")
OPTIONS = {"full": {}, "longformer": {"window": 4}, "bigbird": {"block": 3, "random": 1}}


def build(kind: str, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    """A tiny model with random weights, seeded."""
    torch.manual_seed(0)
    t = transformers
    grouped = {**SMALL, "num_key_value_heads": 2}
    models = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**{**grouped, **more})),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**{**grouped, "head_dim": 16, **more})),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**{**grouped, "sliding_window": 6, **more})),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(
                vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0,
                **{"attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, **more},
            )
        ),
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(**{**SMALL, **NO_DROPOUT, **more})),
        # layers 1 and 2 slide, over 4 tokens a side
        "modernbert": lambda: t.ModernBertForMaskedLM(
            t.ModernBertConfig(
                **{**SMALL, "local_attention": 8, "global_attn_every_n_layers": 3, "cls_token_id": 1, "sep_token_id": 2,
                   **more}
            )
        ),
    }  # fmt: skip
    return models[kind]().to(dtype).eval()


def use(model: Any, name: str, **options: Any) -> Any:
    model.set_attn_implementation(name)
    model.config.zoo_attention = options
    return model


def zoo(model: Any, name: str, **options: Any) -> Any:
    return use(model, f"zoo_{name}", **(options or OPTIONS[name]))


def padding(side: str) -> Tensor:
    """[3, LENGTH]: no padding, some, and nearly all."""
    counts = torch.tensor([[0], [4], [LENGTH - 2]])
    column = torch.arange(LENGTH)[None]
    kept = column >= counts if side == "left" else column < LENGTH - counts
    return kept.long() if side != "none" else torch.ones(3, LENGTH, dtype=torch.long)


def checkpoint(model: Any, **how: Any) -> None:
    """Under the name that this version of transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(how)


def some_ids() -> Tensor:
    return torch.randint(3, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(1))


def run(model: Any, mask: Any, ids: Tensor | None = None, kept: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """Logits of the kept tokens and the gradients of a function of them."""
    model.zero_grad()
    kept = mask if kept is None else kept
    logits = model(some_ids() if ids is None else ids, attention_mask=mask).logits[kept.bool()]
    weights = torch.randn(logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(2))
    (logits * weights).sum().backward()
    grads = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    return logits.detach(), grads


def close(a: Tensor, b: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-8)


@pytest.fixture(autouse=True)
def registered() -> None:
    assert {"zoo_full", "zoo_longformer", "zoo_bigbird"} <= set(huggingface.register())


# --- equal to their own ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("kind", [*CAUSAL, *TWO_SIDED])
def test_full_is_their_sdpa(kind: str, side: str) -> None:
    """Logits and every gradient; the models' own sliding windows (mistral, modernbert) honoured."""
    model, mask = build(kind), padding(side)
    logits, grads = run(zoo(model, "full"), mask)
    expected, expected_grads = run(use(model, "sdpa"), mask)
    close(logits, expected)
    assert len(grads) == len(expected_grads) > 20
    for got, want in zip(grads, expected_grads):
        close(got, want)


@pytest.mark.parametrize("kind", [*CAUSAL, *TWO_SIDED])
def test_full_is_their_sdpa_in_float32(kind: str) -> None:
    model, mask = build(kind, torch.float32), padding("left")
    close(run(zoo(model, "full"), mask)[0], run(use(model, "sdpa"), mask)[0], 1e-6)


@pytest.mark.parametrize("kind", [*CAUSAL, *TWO_SIDED])
def test_a_window_over_everything_is_full(kind: str) -> None:
    model, mask = build(kind), padding("left")
    expected = run(use(model, "sdpa"), mask)[0]
    close(run(zoo(model, "longformer", window=LENGTH), mask)[0], expected)


def test_the_narrower_of_both_windows_counts() -> None:
    """A longformer of window 5 in a model that slides over 6 tokens, itself included, and the other way."""
    ids = some_ids()
    five = use(build("mistral", sliding_window=6), "sdpa")(ids).logits
    close(zoo(build("mistral", sliding_window=9), "longformer", window=5)(ids).logits, five)
    close(zoo(build("mistral", sliding_window=6), "longformer", window=9)(ids).logits, five)


@pytest.mark.parametrize(("kind", "sides"), [("llama", 1), ("bert", 2)])
def test_a_token_sees_its_window_and_no_more(kind: str, sides: int) -> None:
    """One layer, window 4: exactly what changes when token 10 is replaced."""
    model = zoo(build(kind, num_hidden_layers=1), "longformer", window=4)
    ids = some_ids()
    other = ids.clone()
    other[:, 10] = 3 + (ids[:, 10] + 1) % (VOCAB - 3)
    changed = (model(ids).logits != model(other).logits).any(-1).all(0)
    assert changed.nonzero().flatten().tolist() == list(range(10 if sides == 1 else 6, 15))


@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_it_is_the_definition(kind: str, name: str) -> None:
    """The first layer's attention against `dense` on the queries, keys and values that the model hands over."""
    model = zoo(build(kind, num_hidden_layers=1), name)
    seen: dict[str, Tensor] = {}

    def recording(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **rest: Any) -> Any:
        out = transformers.AttentionInterface._global_mapping[f"zoo_{name}"](module, query, key, value, mask, **rest)
        seen.update(query=query, key=key, value=value, out=out[0])
        return out

    transformers.AttentionInterface.register("recording", recording)
    transformers.AttentionMaskInterface.register("recording", huggingface.describe)
    model.set_attn_implementation("recording")
    model(some_ids())
    heads = {"heads": 4, "kv_heads": seen["key"].shape[1], "head_width": seen["key"].shape[3]}
    pattern = bare_pattern(name, OPTIONS[name], **heads, causal=kind == "llama", dtype=torch.float64)
    want = pattern.attend(seen["query"], seen["key"], seen["value"], kernel="dense").transpose(1, 2)
    close(seen["out"], want)


@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("kind", ["llama", "bert", "modernbert"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_the_row_alone(kind: str, name: str, side: str) -> None:
    if name == "bigbird" and kind == "modernbert":
        pytest.skip("bigbird refuses layers with a sliding window; tested below")
    model, mask, ids = zoo(build(kind), name), padding(side), some_ids()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    together = model(ids, attention_mask=mask, position_ids=positions).logits
    for row in range(3):
        kept = mask[row].bool()
        close(together[row, kept], model(ids[row : row + 1, kept]).logits[0])


def by_hand(kept: Tensor, window: int | None, causal: bool) -> Tensor:
    """bool [B, 1, L, L], True where seen: what a user would write, to be handed to the model's own sdpa."""
    column = torch.arange(kept.shape[1])
    gap = column[:, None] - column
    seen = torch.ones_like(gap, dtype=torch.bool)
    if causal:
        seen &= gap >= 0
    if window is not None:
        seen &= gap.abs() <= window
    return (seen & kept.bool()[:, None, :])[:, None]


def random_padding(rng: random.Random, rows: int, length: int) -> Tensor:
    """Every row its own: none, left, right or holes; never nothing at all."""
    kept = torch.ones(rows, length, dtype=torch.long)
    for row in kept:
        count = rng.randrange(length)
        kind = rng.choice(["none", "left", "right", "holes"])
        if kind == "left":
            row[:count] = 0
        elif kind == "right":
            row[length - count :] = 0
        elif kind == "holes":
            row[rng.sample(range(length), count)] = 0
    return kept


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", [*CAUSAL, *TWO_SIDED])
def test_longformer_is_sdpa_under_a_mask_by_hand(kind: str, seed: int) -> None:
    """Random widths, windows, lengths and padding: logits and every gradient."""
    rng = random.Random(f"{kind} {seed}")
    own = rng.choice([2, 3, 6, 40])
    more = {"mistral": {"sliding_window": own}, "modernbert": {"local_attention": 2 * own}}.get(kind, {})
    model = build(kind, **more)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    length, window = rng.choice([1, 2, 7, 31, 64, 67]), rng.choice([1, 2, 3, 5, 16, 63])
    ids, kept = torch.randint(3, VOCAB, (3, length)), random_padding(rng, 3, length)
    masks: Any = by_hand(kept, window, kind in CAUSAL)
    if kind == "mistral":
        masks = by_hand(kept, min(window, own - 1), True)
    if kind == "modernbert":
        masks = {"full_attention": masks, "sliding_attention": by_hand(kept, min(window, own), False)}
    want, want_grads = run(use(model, "sdpa"), masks, ids, kept)
    got, grads = run(zoo(model, "longformer", window=window), kept, ids, kept)
    assert want.isfinite().all()
    close(got, want)
    for one, other in zip(grads, want_grads):
        assert (one - other).norm() <= 1e-10 * (1 + other.norm())


@pytest.mark.parametrize("side", ["left", "right"])
def test_full_is_their_sdpa_at_padding_too(side: str) -> None:
    """A loss that counts padding is nobody's intention, but it is the same."""
    model, mask = build("llama"), padding(side)
    got = zoo(model, "full")(some_ids(), attention_mask=mask).logits
    close(got, use(model, "sdpa")(some_ids(), attention_mask=mask).logits)


@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_row_of_padding_alone_is_finite_and_moves_no_other(kind: str, name: str) -> None:
    model, mask = zoo(build(kind), name), padding("right")
    alone = model(some_ids()[:2], attention_mask=mask[:2]).logits
    mask[2] = 0
    logits, grads = run(model, mask)
    assert logits.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)
    close(logits, alone[mask[:2].bool()])


# --- generation ------------------------------------------------------------------------------------------------------


def generated(model: Any, mask: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
    out = model.generate(
        some_ids(), attention_mask=mask, max_new_tokens=9, do_sample=False, return_dict_in_generate=True,
        output_logits=True, **how,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits, 1).double()  # which generate rounds to float32


@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_cached_generation_is_generation_without_a_cache(kind: str, name: str) -> None:
    """Greedy, left-padded: dynamic and static caches and a prefill in chunks; and all of it is one forward call."""
    model, mask = zoo(build(kind), name), padding("left")
    tokens, logits = generated(model, mask, use_cache=False)
    for how in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 5}):
        again, again_logits = generated(model, mask, **how)
        assert torch.equal(again, tokens), how
        close(again_logits, logits, 1e-7)
    whole = torch.cat([mask, torch.ones(3, 9, dtype=torch.long)], 1)
    positions = (whole.cumsum(1) - 1).clamp(min=0)
    once = model(tokens, attention_mask=whole, position_ids=positions).logits
    close(once[:, LENGTH - 1 : -1], logits, 1e-6)
    theirs = generated(use(model, "sdpa"), mask)[1]
    assert torch.allclose(theirs, logits, atol=1e-7) == (name == "full")


@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 5}], ids=str)
def test_sinks_stay_in_a_cache(how: dict[str, Any]) -> None:
    model, mask = zoo(build("llama"), "longformer", window=4, sinks=2), padding("left")
    tokens, logits = generated(model, mask, use_cache=False)
    again, again_logits = generated(model, mask, **how)
    assert torch.equal(again, tokens)
    close(again_logits, logits, 1e-7)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["full", "longformer"])
def test_generation_with_sliding_layers(name: str, cache: str) -> None:
    """Mistral's cache forgets what its window cannot see: columns then start late."""
    model, mask = zoo(build("mistral"), name, **({} if name == "full" else {"window": 3})), padding("left")
    tokens, logits = generated(model, mask, use_cache=False)
    again, again_logits = generated(model, mask, cache_implementation=cache)
    assert torch.equal(again, tokens)
    close(again_logits, logits, 1e-7)
    if name == "full":
        close(generated(use(model, "sdpa"), mask)[1], logits, 1e-7)


@pytest.mark.parametrize("name", list(OPTIONS))
def test_chunked_prefill_is_one_call(name: str) -> None:
    model, mask, ids = zoo(build("llama"), name), padding("left"), some_ids()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    # transformers 5.24 has another word for it
    word = "cache" if "cache" in inspect.signature(model.model.forward).parameters else "past_key_values"
    whole, past, start = model(ids, attention_mask=mask, position_ids=positions).logits, None, 0
    for end in (1, 2, 9, LENGTH):
        cut = slice(start, end)
        out = model(
            ids[:, cut], attention_mask=mask[:, :end], position_ids=positions[:, cut], use_cache=True, **{word: past}
        )
        kept = mask[:, cut].bool()
        close(out.logits[kept], whole[:, cut][kept])
        past, start = out[word], end


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_generation_is_sdpa_under_a_mask_by_hand(kind: str, seed: int) -> None:
    """Each step's logits, through every cache, against one call of sdpa over what came out."""
    rng = random.Random(f"{kind} {seed}")
    own, window, length = rng.choice([2, 4, 40]), rng.choice([1, 2, 5, 30]), rng.choice([1, 2, 9, 14])
    model = build(kind, **({"sliding_window": own} if kind == "mistral" else {}))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    ids, kept = torch.randint(3, VOCAB, (3, length)), random_padding(rng, 3, length)
    kept[:, -1] = 1
    caches: list[dict[str, Any]] = [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}]
    how = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    how |= rng.choice(caches)
    out = zoo(model, "longformer", window=window).generate(ids, attention_mask=kept, **how)
    whole = torch.cat([kept, torch.ones(3, 6, dtype=torch.long)], 1)
    mask = by_hand(whole, min(window, own - 1) if kind == "mistral" else window, True)
    positions = (whole.cumsum(1) - 1).clamp(min=0)
    want = use(model, "sdpa")(out.sequences, attention_mask=mask, position_ids=positions).logits[:, length - 1 : -1]
    assert torch.equal(want.argmax(-1), out.sequences[:, length:])
    got = torch.stack(out.logits, 1).double()
    assert (got - want).abs().max() < 1e-6 * want.abs().max()


def test_beam_search_keeps_rows_apart() -> None:
    model = zoo(build("llama"), "longformer")
    beams = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False, "attention_mask": padding("left")}
    cached = model.generate(some_ids(), **beams)
    assert torch.equal(cached, model.generate(some_ids(), use_cache=False, **beams))


# --- documents, direction, training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(OPTIONS))
def test_packed_rows_are_documents(name: str) -> None:
    model, ids = zoo(build("llama"), name), some_ids()
    positions = torch.cat([torch.arange(9), torch.arange(LENGTH - 9)])[None].expand(3, -1)
    packed = model(ids, position_ids=positions, use_cache=False).logits
    close(packed[:, :9], model(ids[:, :9]).logits)
    close(packed[:, 9:], model(ids[:, 9:]).logits)


def test_a_decoder_made_two_sided_is_two_sided() -> None:
    model, mask = build("llama", is_causal=False), padding("right")
    close(run(zoo(model, "full"), mask)[0], run(use(model, "sdpa"), mask)[0])


def test_cross_attention_runs_under_full_alone() -> None:
    config = transformers.BertConfig(**{**SMALL, **NO_DROPOUT, "is_decoder": True, "add_cross_attention": True})
    torch.manual_seed(0)
    model = transformers.BertLMHeadModel(config).double().eval()
    for length in (LENGTH, 7):
        source = torch.randn(3, length, 32, dtype=torch.float64)
        rest = {"encoder_hidden_states": source, "encoder_attention_mask": padding("right")[:, :length]}
        expected = use(model, "sdpa")(some_ids(), **rest).logits
        close(zoo(model, "full")(some_ids(), **rest).logits, expected)
        with pytest.raises(Unsupported, match='"cross": "full"'):
            zoo(model, "longformer")(some_ids(), **rest)
        far = zoo(model, "longformer", window=LENGTH, cross="full")(some_ids(), **rest).logits
        close(far, expected)
        near = zoo(model, "longformer", window=2, cross="full")(some_ids(), **rest).logits
        assert (near - expected).abs().max() > 1e-4


@pytest.mark.parametrize("length", [LENGTH, 7])
def test_encoder_decoders_say_what_crosses(length: int) -> None:
    """BART: three kinds of attention under one name, also where source and target are of one length."""
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=VOCAB, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, dropout=0.0,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, eos_token_id=2,
        forced_eos_token_id=None,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).double().eval()
    call = {"input_ids": some_ids(), "attention_mask": padding("right"), "decoder_input_ids": some_ids()[:, :length]}
    expected = use(model, "sdpa")(**call).logits
    close(zoo(model, "full")(**call).logits, expected)
    close(zoo(model, "longformer", window=LENGTH, cross="full")(**call).logits, expected)
    with pytest.raises(Unsupported, match="cross-attention"):
        zoo(model, "longformer")(**call)
    model.config.zoo_attention = {"cross": "same", "window": LENGTH}
    with pytest.raises(Unsupported, match="cross-attention"):
        model(**call)
    call.pop("decoder_input_ids")
    beams = {"num_beams": 2, "max_new_tokens": 5, "do_sample": False}
    theirs = use(model, "sdpa").generate(**call, **beams)
    assert torch.equal(zoo(model, "longformer", window=LENGTH, cross="full").generate(**call, **beams), theirs)


def test_an_encoder_decoder_that_says_nothing_is_refused() -> None:
    config = transformers.MoonshineConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, encoder_num_hidden_layers=1, pad_token_id=0,
        decoder_num_hidden_layers=1, encoder_num_attention_heads=4, decoder_num_attention_heads=4,
    )  # fmt: skip
    model = transformers.MoonshineForConditionalGeneration(config).double().eval()
    sound, ids = torch.randn(2, 4000, dtype=torch.float64), some_ids()[:2]
    close(
        zoo(model, "full")(sound, decoder_input_ids=ids).logits, use(model, "sdpa")(sound, decoder_input_ids=ids).logits
    )
    with pytest.raises(Unsupported, match="nothing tells"):
        zoo(model, "longformer", cross="full")(sound, decoder_input_ids=ids)


@pytest.mark.parametrize("name", list(OPTIONS))
def test_the_loss_falls(name: str) -> None:
    model = zoo(build("llama", dtype=torch.float32), name).train()
    checkpoint(model, use_reentrant=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids, losses = some_ids(), []
    for _ in range(12):
        loss = model(ids, attention_mask=padding("right"), labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", list(OPTIONS))
def test_checkpointing_changes_no_gradient(name: str, reentrant: bool) -> None:
    model, mask = zoo(build("llama"), name).train(), padding("left")
    logits, grads = run(model, mask)
    checkpoint(model, use_reentrant=reentrant)
    again, again_grads = run(model, mask)
    close(again, logits)
    assert len(again_grads) == len(grads)
    for one, other in zip(again_grads, grads):
        close(one, other)


def test_their_trainer_trains(tmp_path: Path) -> None:
    """Batches of mixed lengths, padded by their collator; the trained model is saved with its options."""
    model = zoo(build("llama", dtype=torch.float32), "longformer", window=3)
    rows = [{"input_ids": row[:length], "labels": row[:length]} for row, length in zip(some_ids(), (LENGTH, 9, 14))]

    def collate(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        ids = nn.utils.rnn.pad_sequence([row["input_ids"] for row in batch], batch_first=True)
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.masked_fill(ids == 0, -100)}

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=25, per_device_train_batch_size=3, learning_rate=3e-3, report_to=[],
        use_cpu=True, logging_steps=1, save_strategy="no", disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    trainer.save_model()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="zoo_longformer")
    batch = collate(rows)
    torch.testing.assert_close(again(**batch).loss, model.eval()(**batch).loss)
    assert again.config.zoo_attention == {"window": 3}


def test_half_precision_is_near_full() -> None:
    model, mask = build("llama", dtype=torch.float32), padding("left")
    expected = run(zoo(model, "longformer"), mask)[0]
    got = run(zoo(model.bfloat16(), "longformer"), mask)[0]
    assert (got.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_training_after_inference_mode() -> None:
    """The pattern is built at the first call, whatever the mode of that call."""
    options = {"block": 5, "random": 2, "seed": 7}
    model, mask = zoo(build("bert"), "bigbird", **options), padding("right")
    with torch.inference_mode():
        first = model(some_ids(), attention_mask=mask).logits[mask.bool()].clone()
    close(run(model, mask)[0], first)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_step_reads_no_files_and_builds_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's options are looked up, not parsed: a token of generation passes every layer."""
    from attention_zoo import registry
    from attention_zoo.integrations import bare

    model = zoo(build(kind), "longformer", window=11)
    model(some_ids())
    for place, name in ((registry, "recipe"), (bare, "recipe"), (bare, "build"), (bare, "options_of")):
        monkeypatch.setattr(place, name, lambda *_, **__: pytest.fail("a second call asks again"))
    model(some_ids())


def test_the_first_call_draws_nothing() -> None:
    model = zoo(build("llama"), "longformer", window=11)
    torch.manual_seed(5)
    model(some_ids())
    drawn = torch.rand(())
    torch.manual_seed(5)
    assert drawn == torch.rand(())


# --- options, and what is kept off the model -------------------------------------------------------------------------


def test_options_travel_with_the_config(tmp_path: Path) -> None:
    model = zoo(build("llama", dtype=torch.float32), "longformer", window=3)
    keys, ids = set(model.state_dict()), some_ids()
    expected = model(ids).logits
    assert set(model.state_dict()) == keys == set(build("llama").state_dict())
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="zoo_longformer")
    assert again.config.zoo_attention == {"window": 3}
    torch.testing.assert_close(again(ids).logits, expected)
    assert not torch.allclose(zoo(model, "longformer", window=4)(ids).logits, expected)


def test_layers_draw_their_own_links() -> None:
    shape = {"heads": 2, "kv_heads": 2, "head_width": 8, "causal": False}
    one, same, other = (bare_pattern("bigbird", {"seed": 3}, **shape, layer=layer) for layer in (1, 1, 2))
    assert one is same
    assert one is not other
    assert (one.seed, other.seed) == (4, 5)
    assert sum(parameter.numel() for parameter in one.parameters()) < 200
    assert not any(parameter.requires_grad for parameter in one.parameters())


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "word"), [("reformer", "queries are its keys"), ("transformer_xl", "hidden states")])
def test_what_does_not_fit_is_refused_with_the_reason(name: str, word: str) -> None:
    with pytest.raises(Unsupported, match=word):
        huggingface.register(name)
    assert f"zoo_{name}" not in huggingface.register()
    assert huggingface.register("full") == ("zoo_full",)
    with pytest.raises(ValueError, match="did you mean longformer"):
        huggingface.register("longfomer")


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("longformer", {"windw": 3}, "did you mean window"),
        ("longformer", {"window": 0}, "at least 1"),
        ("longformer", {"positions": "rotary"}, "the model around it decides"),
        ("longformer", {"global_projections": "separate"}, "no second projection"),
        ("full", {"window": 3}, "no such option"),
        ("bigbird", {"extra_global_tokens": 2}, "no learned tokens"),
        ("longformer", {"window": torch.ones(())}, "plain values"),
    ],
)
def test_options_that_cannot_be_honoured_raise(name: str, options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        zoo(build("llama", num_hidden_layers=1), name, **options)(some_ids())


def test_dropout_of_weights_raises_in_training_alone() -> None:
    model = zoo(build("gpt2", attn_pdrop=0.1), "full")
    assert model(some_ids()).logits.isfinite().all()
    with pytest.raises(ValueError, match="attn_pdrop"):
        model.train()(some_ids())


def test_masks_and_options_of_others_raise() -> None:
    llama, ids = zoo(build("llama", num_hidden_layers=1), "full"), some_ids()
    mask = torch.ones(3, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    for own in (mask, mask.long(), torch.zeros(3, 1, 8, LENGTH, dtype=torch.long), mask.double().log()):
        with pytest.raises(ValueError, match="padding mask"):
            llama(ids, attention_mask=own)
    for extra in ({"softcap": 30.0}, {"s_aux": torch.ones(4)}, {"position_bias": torch.ones(1)}):
        with pytest.raises(ValueError, match=next(iter(extra))):
            llama(ids, **extra)
    assert llama(ids, softcap=None).logits.isfinite().all()
    with pytest.raises(ValueError, match="output_attentions"):
        llama(ids, output_attentions=True)
    layer = llama.model.layers[0].self_attn
    q = torch.ones(1, 4, 2, 8, dtype=torch.float64)
    attention = transformers.AttentionInterface._global_mapping["zoo_full"]
    with pytest.raises(ValueError, match="sliding_window=3"):
        attention(layer, q, q, q, None, sliding_window=3)
    with pytest.raises(ValueError, match="where they stand"):
        attention(layer, q[:, :, :1], q, q, None)


def test_sliding_layers_refuse_other_patterns() -> None:
    for name, options in (
        ("bigbird", {"block": 4}),
        ("longformer", {"window": 4, "dilation": 2}),
        ("longformer", {"sinks": 2}),
    ):
        with pytest.raises(Unsupported, match="sliding window"):
            zoo(build("mistral"), name, **options)(some_ids())


def test_softcap_of_gemma_raises() -> None:
    config = transformers.Gemma2Config(**{**SMALL, "num_key_value_heads": 2, "head_dim": 8})
    model = transformers.Gemma2ForCausalLM(config).eval()
    model.set_attn_implementation("zoo_full")
    with pytest.raises(ValueError, match="softcap"):
        model(some_ids())


def test_masks_that_are_more_than_documents_raise() -> None:
    """Read at neighbours and at borders: chunks, images that see themselves, functions of somebody's own."""
    from transformers.masking_utils import causal_mask_function, chunked_causal_mask_function, or_masks

    def both(row: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
        return (query < 4) & (key < 4)

    shape: dict[str, Any] = {"batch_size": 2, "q_length": 9, "kv_length": 9}
    assert huggingface.describe(**shape, mask_function=causal_mask_function).shape == (2, 1, huggingface.ROWS, 9)
    with pytest.raises(ValueError, match="masks more"):
        huggingface.describe(**shape, mask_function=or_masks(causal_mask_function, both))
    with pytest.raises(ValueError, match="of its own"):
        huggingface.describe(**shape, mask_function=causal_mask_function, use_vmap=True)
    chunks = chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="chunked"):
        huggingface.describe(**shape, mask_function=chunks, local_size=4)
    with pytest.raises(ValueError, match="masks more"):
        huggingface.describe(**shape, mask_function=lambda row, head, q, k: (k <= q) & (q - k < 5))


def test_an_older_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, fine in (("5.22.1", False), ("4.57.6", False), ("5.23.0", True), ("5.30.0.dev0", True)):
        monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
        if fine:
            assert "zoo_full" in huggingface.register()
        else:
            with pytest.raises(ImportError, match=r"5\.23 or later"):
                huggingface.register()


def test_without_transformers_one_line_says_so() -> None:
    script = (
        "import sys; sys.modules['transformers'] = None\n"
        "from attention_zoo.integrations import huggingface\n"
        "try: huggingface.register()\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "attention-zoo[huggingface]" in done.stdout
    assert len(done.stdout.splitlines()) == 1


TINY = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "Bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 4, "vocab_size": VOCAB},
    "Mpt": {"d_model": 32, "n_layers": 1, "n_heads": 4, "vocab_size": VOCAB, "max_seq_len": 64},
    "XGLM": {"d_model": 32, "ffn_dim": 48, "num_layers": 1, "attention_heads": 4, "vocab_size": VOCAB},
    "MPNet": TINY,
    "RoFormer": TINY,
    "RemBert": TINY,
    "IBert": TINY,
    "ConvBert": TINY,
    "SqueezeBert": {**TINY, "embedding_size": 32},
    "MegatronBert": TINY,
    "Longformer": TINY,
    "BigBird": {**TINY, "attention_type": "original_full"},
    "GPTNeo": {
        "vocab_size": VOCAB, "hidden_size": 32, "num_layers": 1, "num_heads": 4, "attention_types": [[["global"], 1]]
    },
    "Falcon": {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
    "XLNet": {"vocab_size": VOCAB, "d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48},
}  # fmt: skip
"""Models that attend by code of their own: with a mask of ours they would run, and be wrong at some lengths."""


@pytest.mark.parametrize("kind", list(OTHERS))
def test_a_model_that_attends_by_itself_is_refused_by_name(kind: str) -> None:
    huggingface.register()
    config = getattr(transformers, f"{kind}Config")(**OTHERS[kind])
    with pytest.raises(Unsupported, match=f"{kind}.*attn_implementation.*attention interface"):
        transformers.AutoModel.from_config(config, attn_implementation="zoo_full")
    config._attn_implementation = "zoo_longformer"
    with pytest.raises(Unsupported, match=kind):
        getattr(transformers, f"{kind}Model")(config)


BEYOND: dict[str, tuple[dict[str, Any], str]] = {
    "T5": (
        {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4},
        "position_bias",
    ),
    "MT5": (
        {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4},
        "position_bias",
    ),
    "LayoutLM": (TINY, "masks that are added"),
    "MarkupLM": (TINY, "masks that are added"),
}
"""Models that attend through the interface, and always with what no pattern can honour."""


@pytest.mark.parametrize("kind", list(BEYOND))
def test_a_model_that_always_asks_for_more_is_refused_when_it_is_built(kind: str, tmp_path: Path) -> None:
    huggingface.register()
    options, word = BEYOND[kind]
    make, said = getattr(transformers, f"{kind}Config"), f"{kind}.*attn_implementation.*{word}"
    with pytest.raises(Unsupported, match=said):
        transformers.AutoModel.from_config(make(**options), attn_implementation="zoo_full")
    model = transformers.AutoModel.from_config(make(**options))
    model.save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match=said):
        transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="zoo_longformer")
    with pytest.raises(Unsupported, match=said):
        model.set_attn_implementation("zoo_full")


def test_which_of_their_models_are_refused_when_they_are_built() -> None:
    """Judged by their sources: those that attend through the interface with masks of theirs alone must not be."""
    taken = (
        "Llama",
        "Mistral",
        "Bert",
        "GPT2",
        "Gemma2",
        "Qwen3",
        "Bart",
        "Whisper",
        "LayoutLMv3",
        "ViT",
        "ModernBert",
    )
    for kind in taken:
        reason, _ = guard.how_it_attends(getattr(transformers, f"{kind}Model"), transformers.PreTrainedModel)
        assert reason is None, kind
    for kind in BEYOND:
        reason, _ = guard.how_it_attends(getattr(transformers, f"{kind}Model"), transformers.PreTrainedModel)
        assert reason is not None, kind


@pytest.mark.parametrize("length", [3, 8, 17])
def test_a_layer_that_adds_our_mask_to_its_scores_is_refused(length: int) -> None:
    """BigBird-Pegasus mixes: its decoder attends through the interface, its encoder does not."""
    sides = {f"{side}_{key}": 32 if key == "ffn_dim" else 1 for side in ("encoder", "decoder") for key in (
        "layers", "attention_heads", "ffn_dim"
    )}  # fmt: skip
    config = transformers.BigBirdPegasusConfig(
        vocab_size=VOCAB, d_model=32, attention_type="original_full", max_position_embeddings=64, **sides
    )
    huggingface.register()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = transformers.AutoModel.from_config(config, attn_implementation="zoo_full")
    assert any("BigBirdPegasusSelfAttention" in str(each.message) for each in said)
    ids = torch.arange(1, length + 1)[None]
    with pytest.raises(Unsupported, match="attention interface"):
        model(input_ids=ids, decoder_input_ids=ids)


def test_a_model_that_picks_its_attention_from_a_table_of_its_own_is_refused() -> None:
    vision = {**{key: TINY[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}, "image_size": 16}
    config = transformers.GitConfig(vision_config={**vision, "patch_size": 8}, **{**TINY, "vocab_size": 120})
    huggingface.register()
    with pytest.raises(Unsupported, match="GitForCausalLM"):
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation="zoo_full")


def test_a_class_of_ones_own_is_judged_by_what_it_is_derived_from() -> None:
    huggingface.register()

    class Mine(transformers.LlamaForCausalLM):
        pass

    class Theirs(transformers.BloomForCausalLM):
        pass

    Mine.__module__ = Theirs.__module__ = "a.prompt"
    grouped = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
    Mine._from_config(transformers.LlamaConfig(**grouped), attn_implementation="zoo_full")
    with pytest.raises(Unsupported, match="Theirs"):
        Theirs._from_config(transformers.BloomConfig(**OTHERS["Bloom"]), attn_implementation="zoo_full")
