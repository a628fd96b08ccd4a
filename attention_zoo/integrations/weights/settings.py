"""A checkpoint's config, read key by key: what nobody reads and nobody knows to be harmless is refused by name.

A key that is skipped in silence is a model that computes something else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from attention_zoo.contract import Unsupported

HARMLESS = frozenset({
    # about the file
    "_name_or_path", "_commit_hash", "_num_labels", "architectures", "dtype", "model_type", "name_or_path",
    "tokenizer_class", "torch_dtype", "transformers_version",
    # about ids and labels
    "bos_token_id", "cls_token_id", "decoder_start_token_id", "eos_token_id", "finetuning_task", "id2label", "label2id",
    "mask_token_id", "num_labels", "pad_token_id", "problem_type", "sep_token_id", "task_specific_params",
    # about how a call is run or what it returns
    "chunk_size_feed_forward", "gradient_checkpointing", "output_attentions", "output_hidden_states", "output_past",
    "return_dict", "return_dict_in_generate", "torchscript", "use_bfloat16", "use_cache",
    # about training and heads that are not converted
    "classifier_dropout", "initializer_range", "layer_norm_eps_init",
    # about generation
    "bad_words_ids", "do_sample", "early_stopping", "forced_bos_token_id", "forced_eos_token_id", "length_penalty",
    "max_length", "max_new_tokens", "min_length", "no_repeat_ngram_size", "num_beams", "num_return_sequences", "prefix",
    "repetition_penalty", "temperature", "top_k", "top_p", "typical_p",
})  # fmt: skip
"""Keys of any model that do not change what it computes."""


class Settings:
    """The config of one checkpoint.

    Args:
        config: of config.json.
        where: what errors name.
        ignore: keys that the caller takes for harmless.
    """

    def __init__(self, config: Mapping[str, Any], where: str, ignore: Collection[str] = ()):
        self._config, self.where = config, where
        self._known = {*HARMLESS, *ignore}
        self.model_type = str(config.get("model_type"))

    def get(self, name: str, default: Any = None) -> Any:
        """The value, or what the family takes where there is none (null counts as none)."""
        self._known.add(name)
        value = self._config.get(name)
        return default if value is None else value

    def given(self, name: str, default: Any) -> Any:
        """The value as it stands, null too; the default only where the key is missing."""
        self._known.add(name)
        return self._config.get(name, default)

    def number(self, name: str, default: Any = None) -> Any:
        """A number; without a default there must be one."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{self.where}: {name} must be a number, got {value!r}")
        return value

    def only(self, name: str, *allowed: Any, instead: str) -> None:
        """Refuse any value but these; where there is none, the first is meant."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            raise self.unsupported(name, value, f"only {' or '.join(map(repr, allowed))} is converted", instead)

    def unsupported(self, name: str, value: Any, reason: str, instead: str) -> Unsupported:
        """The refusal of one setting."""
        return Unsupported(f"{self.where}: {self.model_type}", f"{name}={value!r}", reason, instead)

    def harmless(self, *names: str) -> None:
        """These keys of the family change nothing that is converted."""
        self._known.update(names)

    def finish(self) -> None:
        """Refuse what was neither read nor is known to be harmless."""
        left = {key: value for key, value in self._config.items() if key not in self._known and value is not None}
        if left:
            listed = ", ".join(f"{key}={value!r}" for key, value in sorted(left.items()))
            raise Unsupported(
                f"{self.where}: {self.model_type}", listed, "the conversion does not know what that changes",
                f"ignore={sorted(left)} if you know that it changes nothing",
            )  # fmt: skip
