"""Which checkpoints can be converted: the config's `model_type` -> its family. A new one is a file and a line here."""

from __future__ import annotations

from attention_zoo.integrations.weights import bert
from attention_zoo.integrations.weights.bigbird import BIGBIRD
from attention_zoo.integrations.weights.family import Family
from attention_zoo.integrations.weights.gpt2 import GPT2
from attention_zoo.integrations.weights.llama import LLAMA, MISTRAL, QWEN2
from attention_zoo.integrations.weights.longformer import LONGFORMER
from attention_zoo.integrations.weights.reformer import REFORMER
from attention_zoo.integrations.weights.transformer_xl import TRANSFORMER_XL

FAMILIES: dict[str, Family] = {
    "bert": bert.BERT,
    "big_bird": BIGBIRD,
    "camembert": bert.CAMEMBERT,
    "gpt2": GPT2,
    "llama": LLAMA,
    "longformer": LONGFORMER,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "reformer": REFORMER,
    "roberta": bert.ROBERTA,
    "transfo-xl": TRANSFORMER_XL,
    "xlm-roberta": bert.XLM_ROBERTA,
}
