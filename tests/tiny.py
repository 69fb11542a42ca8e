"""Tiny models and tokenizers, built in code: nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path

SUBJECTS = ("Ann", "Bob", "Cid", "Dot", "Eve", "Fay", "Gus", "Hal", "Ida", "Jon", "Kim", "Leo")
TOWNS = ("Rome", "Oslo", "Lima", "Bern")
TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def tiny_tokenizer():
    """Byte-level BPE over a few words; pad is eos, as in many released models."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [f" {town} {name} was born in" for town in TOWNS for name in SUBJECTS], trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def tiny_config(kind: str):
    """A small Llama, Qwen3 (q/k norms, untied head) or Gemma-3 (sliding windows of 4) configuration."""
    from transformers import Gemma3TextConfig, LlamaConfig, Qwen3Config

    if kind == "llama":
        return LlamaConfig(**TINY, tie_word_embeddings=True)
    if kind == "qwen3":
        return Qwen3Config(**TINY, tie_word_embeddings=False)
    layers = ["sliding_attention", "full_attention"]
    return Gemma3TextConfig(**TINY, sliding_window=4, layer_types=layers, query_pre_attn_scalar=8)


def write_lines(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
