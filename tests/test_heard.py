"""A word that changes nothing is refused in one line, which names what stands in its place and what to say instead."""

from pathlib import Path

import pytest

import attention_zoo as zoo
from attention_zoo.jobs.compare import CompareConfig, TrainingPlan
from attention_zoo.training.config import compose_training

PAIR = ["task=reference", "model=encoder_decoder"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            [*PAIR, "model.depth=4"],
            "model.depth changes nothing, since each half has its own: encoder.depth=2, decoder.depth=1; "
            "give encoder.depth and decoder.depth instead",
        ),
        (
            ["task=reference", "attention.window=4", "attention=longformer", "encoder.attention=full",
             "decoder.attention=bigbird"],
            "attention.window changes nothing, since each half has its own: encoder.attention=full, "
            "decoder.attention=bigbird; give encoder.attention and decoder.attention instead",
        ),
        ([*PAIR, "model.pooling=first"], "model.pooling changes nothing: it is for tasks of objective classify or "),
        (["task=text", "model.pooling=first"], "model.pooling changes nothing: it is for tasks of objective classify"),
        (["task=marked", "model.tied=false"], "model.tied changes nothing: it is for tasks of objective causal_lm or "),
        (["attention=bigbird", "hybrid=[full,longformer]"], "attention changes nothing: hybrid stands in the place"),
    ],
)  # fmt: skip
def test_a_word_without_effect_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        compose_training(words)
    assert str(caught.value).startswith(said)


def test_a_word_that_a_part_of_the_model_hears_is_none() -> None:
    for words in (
        [*PAIR, "model.dim=32", "model.heads=2", "model.short_conv=0", "encoder.depth=3"],
        ["task=reference", "model.depth=3"],  # decoder.depth is 1, the encoder's is the model's
        ["task=reference", "attention=bigbird", "decoder.attention=full", "model.tied=false"],
        ["task=marked", "model.pooling=first"],
        ["task=mlm", "model.pooling=first", "model.tied=false"],
    ):
        compose_training(words)


def test_a_half_of_a_file_is_the_files(tmp_path: Path) -> None:
    zoo.save(zoo.Transformer(attention="full", vocab=40, dim=64, heads=4, depth=1, causal=False), tmp_path / "half")
    init = f"init={tmp_path / 'half'}"
    for word, said in (
        ("model.depth=2", f"the encoder is that of {init}, decoder.depth=1; give decoder.depth instead"),
        ("encoder.depth=2", f"encoder.depth changes nothing: the encoder is that of {init}; leave it out"),
    ):
        with pytest.raises(ValueError) as caught:
            compose_training(["task=reference", init, word])
        assert said in str(caught.value)
    compose_training(["task=reference", init, "decoder.depth=2", "model.short_conv=0"])


def test_a_comparison_of_halves_that_are_all_alike_is_refused() -> None:
    halves = {"encoder": {"attention": "full"}, "decoder": {"attention": "full"}}
    config = CompareConfig(backends=["longformer", "bigbird"], trainings={"r": TrainingPlan("reference", set=halves)})
    with pytest.raises(ValueError, match="attention changes nothing, since each half has its own"):
        config.runs()
