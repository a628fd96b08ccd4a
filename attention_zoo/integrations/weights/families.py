"""Which checkpoints can be converted: the config's `model_type` -> its family. A new one is a file and a line here."""

from __future__ import annotations

from attention_zoo.integrations.weights import bert
from attention_zoo.integrations.weights.family import Family

FAMILIES: dict[str, Family] = {
    "bert": bert.BERT,
    "camembert": bert.CAMEMBERT,
    "roberta": bert.ROBERTA,
    "xlm-roberta": bert.XLM_ROBERTA,
}
