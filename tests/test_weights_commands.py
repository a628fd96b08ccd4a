"""Convert and evaluate, as commands: model and tokeniser in one folder, and figures that are those of theirs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from pretrained import saved
from small_models import small
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import attention_zoo as zoo
from attention_zoo.integrations import weights
from attention_zoo.integrations.weights.commands import (
    ConvertConfig,
    EvaluateConfig,
    LengthenConfig,
    TextConfig,
    run_convert,
    run_evaluate,
)
from attention_zoo.integrations.weights.score import masked, score, windows
from attention_zoo.tasks.task import IGNORED

TEXT = "the cat sat on the mat, and the dog lay on the log; then the cat ran. Où est le chat? " * 6
SPECIAL = ["<s>", "<pad>", "</s>", "<mask>"]


@pytest.fixture(scope="module")
def tokeniser() -> hf.PreTrainedTokenizerFast:
    """Byte-pair encoding over bytes, learned from the text."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    found.train_from_iterator([TEXT], trainer)
    found.decoder = decoders.ByteLevel()
    names = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "mask_token": "<mask>"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=found, **names)


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_a_causal_model_scores_as_theirs(tokeniser, book, tmp_path, capsys) -> None:
    theirs = saved(hf.GPT2LMHeadModel, hf.GPT2Config, tmp_path / "theirs", vocab_size=len(tokeniser), n_positions=400)
    tokeniser.save_pretrained(tmp_path / "theirs")
    run_convert(ConvertConfig(source=str(tmp_path / "theirs"), output=str(tmp_path / "ours")))
    assert "gpt2 with" in capsys.readouterr().out
    assert not (tmp_path / "ours" / "config.json").exists()
    figures = tmp_path / "figures.json"
    config = EvaluateConfig(
        source=str(tmp_path / "ours"), task=TextConfig(str(book)), device="cpu", output=str(figures)
    )
    found = run_evaluate(config)
    assert json.loads(figures.read_text()) == found
    ids = tokeniser(TEXT, return_tensors="pt")["input_ids"]
    assert 20 < ids.shape[1] < 400, "one window"
    loss = theirs(ids, labels=ids).loss.item()
    first = len(tokeniser.decode(ids[0, :1]).encode())
    assert found["loss"] == pytest.approx(loss, rel=1e-6), "theirs is summed in float32"
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]), rel=1e-12)
    assert (found["tokens"], found["bytes"]) == (ids.shape[1] - 1, len(TEXT.encode()) - first)
    assert found["bits_per_byte"] == pytest.approx(loss * found["tokens"] / math.log(2) / found["bytes"], rel=1e-6)
    again = run_evaluate(EvaluateConfig(source=str(tmp_path / "theirs"), task=TextConfig(str(book)), device="cpu"))
    assert again == found, "a checkpoint is converted on the way"


@torch.no_grad()
def test_a_masked_model_scores_as_theirs(tokeniser, book, tmp_path) -> None:
    theirs = saved(
        hf.RobertaForMaskedLM, hf.RobertaConfig, tmp_path / "theirs", vocab_size=len(tokeniser),
        max_position_embeddings=70,
    )  # fmt: skip
    tokeniser.save_pretrained(tmp_path / "theirs")
    ours = weights.convert(tmp_path / "theirs")
    found = score(ours, [TEXT.encode()], tokeniser, seq_len=50, batch=3, seed=4)
    losses, hits = [], 0
    for row in masked(tokeniser, TEXT.encode(), 50, 0.15, 4):
        ids, targets = torch.tensor([row.ids]), torch.tensor(row.targets)
        assert (row.ids[0], row.ids[-1]) == (tokeniser.cls_token_id, tokeniser.sep_token_id)
        assert len(row.ids) <= 50
        assert all((at == tokeniser.mask_token_id) == (want != IGNORED) for at, want in zip(row.ids, row.targets))
        logits = theirs(ids).logits[0][targets != IGNORED]
        wanted = targets[targets != IGNORED]
        losses += torch.nn.functional.cross_entropy(logits, wanted, reduction="none").tolist()
        hits += int((logits.argmax(-1) == wanted).sum())
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-10)
    assert found["accuracy"] == pytest.approx(hits / len(losses))
    assert found["tokens"] == len(losses)
    assert 0.08 < len(losses) / len(tokeniser(TEXT)["input_ids"]) < 0.25
    assert score(ours, [TEXT.encode()], tokeniser, seq_len=50, batch=7, seed=4)["loss"] == pytest.approx(found["loss"])


@pytest.mark.parametrize(("length", "stride"), [(8, 4), (8, 7), (5, 1), (50, 25)])
def test_windows_ask_for_every_token_once_and_give_it_context(length, stride) -> None:
    ids = list(range(100, 137))
    asked = []
    for row in windows(ids, length, stride):
        assert len(row.ids) == len(row.targets) <= length
        for at, target in enumerate(row.targets):
            if target != IGNORED:
                assert target == row.ids[at] + 1, "the next token"
                assert at + 1 >= min(length - stride, target - 100), "context"
                asked.append(target)
    assert asked == ids[1:]


def test_a_model_over_bytes_needs_no_tokeniser(tmp_path, book) -> None:
    torch.manual_seed(0)
    model = zoo.Transformer(attention="longformer", vocab=256, dim=16, heads=2, depth=1).double()
    path = zoo.save(model, tmp_path / "run" / "model.safetensors")
    found = run_evaluate(EvaluateConfig(source=str(path.parent), task=TextConfig(str(book)), seq_len=64, device="cpu"))
    assert found["bytes"] == found["tokens"] == len(TEXT.encode()) - 1
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2))
    whole = score(model, [TEXT.encode()], seq_len=4096)["loss"]
    logits = model(torch.tensor([list(TEXT.encode())])).logits[0, :-1]
    targets = torch.tensor(list(TEXT.encode())[1:])
    assert whole == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-10)


@pytest.mark.parametrize("text", ["plain", "é and so on", "日本語の文", "é", "\ufffd odd"])
def test_bytes_are_counted_where_a_token_is_a_part_of_a_character(text) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(alphabet)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = decoders.ByteLevel()
    model = zoo.Transformer(attention="full", vocab=256, dim=8, heads=2, depth=1)
    found = score(model, [text.encode()], hf.PreTrainedTokenizerFast(tokenizer_object=bytewise), seq_len=64)
    count = len(text.encode()) - 1  # one token a byte, and nobody is asked for the first
    assert found["bytes"] == found["tokens"] == count
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2))


def test_convert_lengthens_and_keeps_the_tokeniser(tokeniser, tmp_path) -> None:
    saved(hf.RobertaForMaskedLM, hf.RobertaConfig, tmp_path / "theirs", vocab_size=len(tokeniser))
    tokeniser.save_pretrained(tmp_path / "theirs")
    long = LengthenConfig(attention="longformer", max_length=99, options={"window": 4})
    config = ConvertConfig(
        source=str(tmp_path / "theirs"), output=str(tmp_path / "long"), dtype="float32", lengthen=long
    )
    model = zoo.load(run_convert(config))
    assert model.stack.attentions[0].window == 4
    assert model.positions.table.weight.shape == (99, 24)
    assert model.positions.table.weight.dtype == torch.float32
    kept = hf.AutoTokenizer.from_pretrained(tmp_path / "long")
    assert kept(TEXT)["input_ids"] == tokeniser(TEXT)["input_ids"]
    assert kept.model_max_length == 99
    with pytest.raises(ValueError, match=r"holds a model; force=true writes over it"):
        run_convert(config)
    # a folder of ours is a source, too
    run_convert(ConvertConfig(source=str(tmp_path / "long"), output=str(tmp_path / "copy")))
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == (
        tmp_path / "long" / "model.safetensors"
    ).read_bytes()


def test_wrong_options_are_refused_in_one_line(tokeniser, book, tmp_path) -> None:
    model = zoo.Transformer(attention="full", vocab=256, dim=16, heads=2, depth=1)
    raw = [TEXT.encode()]
    for options, message in (
        ({"seq_len": 3}, "seq_len must be an integer of at least 4, got 3"),
        ({"seq_len": 8, "stride": 8}, "stride must be at least 1 and below seq_len=8, got 8"),
        ({"batch": 0}, "batch must be an integer of at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            score(model, raw, **options)
    with pytest.raises(ValueError, match="texts are too short"):
        score(model, [b"a"])
    with pytest.raises(ValueError, match="needs a Transformer with head=lm"):
        score(small("full", head="hidden"), raw)
    encoder = zoo.Transformer(attention="full", vocab=300, dim=16, heads=2, depth=1, causal=False)
    with pytest.raises(ValueError, match=r"mask_probability must lie between 0 and 1, got 1.0"):
        score(encoder, raw, tokeniser, mask_probability=1.0)
    with pytest.raises(ValueError, match="a tokeniser that has a mask token; there is none"):
        score(encoder, raw)
    zoo.save(encoder, tmp_path / "m" / "model.safetensors")
    with pytest.raises(ValueError, match="has no tokeniser beside it, and 300 tokens are no bytes"):
        run_evaluate(EvaluateConfig(source=str(tmp_path / "m"), task=TextConfig(str(book)), device="cpu"))
    with pytest.raises(FileNotFoundError, match=r"task.path=.*nowhere does not exist"):
        run_evaluate(EvaluateConfig(source=str(tmp_path / "m"), task=TextConfig(str(tmp_path / "nowhere"))))
    saved(hf.BertForMaskedLM, hf.BertConfig, tmp_path / "bert")
    with pytest.raises(ValueError, match=r"dtype must be one of float32, .*, got 'int8'"):
        run_convert(ConvertConfig(source=str(tmp_path / "bert"), output=str(tmp_path / "o"), dtype="int8"))
    with pytest.raises(ValueError, match=r"lengthen.attention must name the new attention"):
        run_convert(ConvertConfig(
            source=str(tmp_path / "bert"), output=str(tmp_path / "o"), lengthen=LengthenConfig(max_length=9),
        ))  # fmt: skip


@pytest.mark.slow
def test_the_commands_run_and_say_what_is_wrong_in_one_line(tmp_path, book) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *arguments], capture_output=True, text=True, cwd=Path(__file__).parents[1]
        )

    saved(hf.GPT2LMHeadModel, hf.GPT2Config, tmp_path / "theirs", vocab_size=256)
    output = tmp_path / "ours"
    done = call("experiments.convert", f"source={tmp_path}/theirs", f"output={output}")
    assert done.returncode == 0, done.stderr
    done = call("experiments.evaluate", f"source={output}", f"task.path={book}", "seq_len=40")
    assert done.returncode == 0, done.stderr
    assert "bits_per_byte" in done.stdout
    done = call("experiments.convert", f"source={tmp_path}", f"output={output}", "force=true")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"error: {tmp_path}: holds neither config.json nor model.safetensors"]
    done = call("experiments.evaluate", f"source={output}", f"task.path={book}", "seq_len=abc")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "seq_len" in done.stderr
