"""Tiny tokenizers built in code, one per trap: pad = eos, automatic bos, automatic eos, whole words, chat."""

from __future__ import annotations

TEXT = [
    "Q: Where is Paris? A: Paris is in France.",
    "Question: Who was born in Rome? Answer: Paris, Rome, London",
    "<|question|> Where is it? <|answer|> Paris",
    "user assistant system You are a helpful assistant",
    "句子 不同 相同 北京 上海",
] * 3
CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["[UNK]", "<s>", "</s>", "Q", "A", ":", "?", "why", "so", "because", "not"]


def build_bpe(*, bos: bool = False, eos: bool = False, with_eos_token: bool = True):
    """Byte-level BPE in which " Paris" is one token; pad is eos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if bos or eos:
        single = ["<|im_start|>"] * bos + ["$A"] + ["<|im_end|>"] * eos
        ids = [(token, tokenizer.token_to_id(token)) for token in special]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    end = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"} if with_eos_token else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|im_start|>", **end)


def build_spaces_in_front():
    """As Llama 2's: each text gets a space in front, which belongs to the first word: "Paris" is "▁Paris"."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [*"▁ParisWhe北京上海"]
    merges = [("P", "a"), ("Pa", "r"), ("Par", "i"), ("Pari", "s"), ("▁", "Paris"), ("i", "s"), ("▁", "is")]
    pieces = ["<unk>", "<s>", "</s>", *dict.fromkeys([*letters, *(a + b for a, b in merges)])]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Replace("▁", " ")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def build_nfkc():
    """As T5's relatives: bytes where a letter is unknown, NFKC, doubled spaces are one, "▁" a space."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(33, 127)]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", *bytes_, *letters, "▁"]
    model = models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    one_space = normalizers.Replace(Regex(" {2,}"), " ")
    steps = [normalizers.NFKC(), one_space, normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    made.chat_template = CHATML
    return made


def build_words():
    """One id a word, in the order of WORDS; adds <s> by itself."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="[UNK]"
    )
