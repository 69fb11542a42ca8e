"""How long a text may be: models that look positions up in a table end where the table does.

In: a transformers configuration. Out: the number of tokens that fit, or None.
Invariant: a text that fits has a row of the table for each of its tokens; models whose positions are computed
(RoPE, ALiBi) have no such end and get None.
Trade-off: encoders that count positions from after the pad token (RoBERTa's kin) are known by name: two rows
of their 514 are never used, and no key of a configuration tells. So are decoders whose number of positions
bounds nothing.
"""

from __future__ import annotations

from typing import Any

OFFSET_MODEL_TYPES = frozenset(  # create_position_ids_from_input_ids in transformers 5
    {"roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod", "camembert", "mpnet"}
    | {"data2vec-text"}
)
UNBOUNDED_MODEL_TYPES = frozenset(  # positions of state-space layers, or a table that grows
    {"jamba", "kimi_linear", "nemotron_h", "rwkv", "xglm", "zamba", "zamba2"}
)


def position_limit(config: Any) -> int | None:
    """Tokens that a model's table of positions holds; None where it has none.

    >>> from transformers import BertConfig, LlamaConfig, RobertaConfig
    >>> position_limit(BertConfig()), position_limit(LlamaConfig())
    (512, None)
    >>> position_limit(RobertaConfig(max_position_embeddings=514))
    512
    """
    text = config.get_text_config()
    values = text.to_dict()
    limit = values.get(text.attribute_map.get("max_position_embeddings", "max_position_embeddings"))
    if limit is None or "rope_parameters" in values or text.model_type in UNBOUNDED_MODEL_TYPES:
        return None
    return int(limit) - (text.pad_token_id + 1 if text.model_type in OFFSET_MODEL_TYPES else 0)
