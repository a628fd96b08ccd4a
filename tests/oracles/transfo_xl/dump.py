"""Random TransfoXL models and what they compute, for those who cannot run them: `python dump.py FOLDER SEED...`

Runs in the environment that build.sh makes, and imports nothing of this project. For each seed a folder

    config.json, model.safetensors or pytorch_model.bin     as transformers saves them
    numbers.safetensors                                     inputs and results

with, for each run r of "zeros" (no memory given: theirs begins with zeros) and "empty" (as the original begins):

    ids [B, L], cuts [segments]     input ids, and the lengths of the segments that they are fed in
    <r>.logits [B, L, V]            log-probabilities in float64, and as float32 in <r>.logits32
    <r>.mems.<layer> [B, M, E]      what is remembered after the last segment
    written [B, 6]                  what they generate after ids, greedily, from zeros
    weight [B, L, V]                the loss is (logits · weight).sum(), memories being detached
    <r>.gradient.<name>             of every parameter, in float64

Two things are patched in float64: their masking casts scores to float32, and their frequencies are float32 numbers.
"""

from __future__ import annotations

import random
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

warnings.simplefilter("ignore")
from transformers import TransfoXLConfig, TransfoXLLMHeadModel  # noqa: E402


def random_config(rng: random.Random) -> TransfoXLConfig:
    heads, width = rng.choice([1, 2, 3]), rng.choice([4, 8])
    dim = rng.choice([8, 12, 16])
    vocab = rng.randint(20, 40)
    cutoffs = sorted(rng.sample(range(3, vocab - 2), rng.choice([0, 1, 2, 3])))
    divide = rng.choice([1, 2]) if dim != 16 else rng.choice([1, 2, 4])
    cutoffs = cutoffs[:2] if divide == 4 else cutoffs  # or nothing of 16 channels is left
    return TransfoXLConfig(
        vocab_size=vocab,
        cutoffs=cutoffs,
        d_model=dim,
        d_embed=rng.choice([dim, dim, 16]),
        n_head=heads,
        d_head=width,
        d_inner=rng.choice([2 * dim, 20]),
        div_val=divide,
        n_layer=rng.randint(1, 3),
        mem_len=rng.randint(1, 12),
        clamp_len=rng.choice([-1, -1, 4, 7]),
        same_length=rng.random() < 0.6,
        untie_r=rng.random() < 0.6,
        pre_lnorm=rng.random() < 0.25,
        proj_share_all_but_first=rng.random() < 0.5,
        tie_word_embeddings=rng.random() < 0.75,
        layer_norm_epsilon=rng.choice([1e-5, 1e-3]),
        dropout=0.0,
        dropatt=0.0,
    )


def run(model: TransfoXLLMHeadModel, ids: torch.Tensor, cuts: list[int], empty: bool):
    config, mems, logits = model.config, None, []
    if empty:
        like = next(model.parameters())
        mems = [like.new_zeros(0, len(ids), config.d_model) for _ in range(config.n_layer)]
    for piece in ids.split(cuts, 1):
        out = model(piece, mems=mems)
        mems = out.mems
        logits.append(out.prediction_scores)
    return torch.cat(logits, 1), mems


def dump(seed: int, folder: Path) -> None:
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    config = random_config(rng)
    model = TransfoXLLMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
            mean = 1.0 if name.endswith("layer_norm.weight") else 0.0
            parameter.copy_(mean + spread * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder, safe_serialization=rng.random() < 0.75)
    segment = rng.randint(1, 7)
    cuts = [segment] * rng.randint(1, 3) + [rng.randint(1, segment)]
    ids = torch.randint(config.vocab_size, (2, sum(cuts)), generator=generator)
    numbers = {"ids": ids, "cuts": torch.tensor(cuts)}
    model.generation_config.eos_token_id = None
    written = model.generate(ids, max_new_tokens=6, do_sample=False)
    numbers["written"] = written[:, ids.shape[1] :].contiguous()
    with torch.no_grad():
        single = {empty: run(model, ids, cuts, empty)[0] for empty in (False, True)}
    model = model.double()
    frequencies = 10_000 ** (torch.arange(0.0, config.d_model, 2.0, dtype=torch.float64) / config.d_model)
    model.transformer.pos_emb.inv_freq = 1 / frequencies
    own, torch.Tensor.float = torch.Tensor.float, lambda self: self
    try:
        for empty, kind in ((False, "zeros"), (True, "empty")):
            logits, mems = run(model, ids, cuts, empty)
            numbers[f"{kind}.logits"], numbers[f"{kind}.logits32"] = logits.detach(), single[empty]
            numbers.update({f"{kind}.mems.{i}": each.transpose(0, 1).contiguous() for i, each in enumerate(mems)})
            if "weight" not in numbers:
                numbers["weight"] = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
            parameters = dict(model.named_parameters())
            loss = (logits * numbers["weight"]).sum()
            found = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
            numbers.update({f"{kind}.gradient.{name}": each.contiguous() for name, each in zip(parameters, found)})
    finally:
        torch.Tensor.float = own
    save_file(numbers, folder / "numbers.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for word in sys.argv[2:]:
        dump(int(word), Path(sys.argv[1]) / f"seed-{word}")
