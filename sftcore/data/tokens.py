"""The tokenizer's edge: text <-> ids, special tokens, what identifies a tokenizer.

In: a model folder or hub name. Out: a `Codec`, whose ids are the same for training and inference.
Invariant: its own prefix (bos) comes once, its own suffix (some add eos) never ends a prompt. A text that
spells out a special token gets that token: such chats are rejected, other records counted (special.py).
Trade-off: only fast tokenizers, which encode a batch on all cores (0.8 million tokens/s on two, questions of
EntityQuestions, SmolLM2, 2026-11) and can write out their whole state; models with slow ones are refused.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers.models import BPE

from sftcore.catalogue import how_to_pull
from sftcore.data.chat_template import choose_template
from sftcore.data.words import KNOWN_PATTERNS, Words, state_of, word_pattern
from sftcore.errors import MissingEnvironmentError, Problem, UserInputError

Tokenizer = Any  # transformers' PreTrainedTokenizerFast; its import takes 2 s, so it is named nowhere here
LETTERS = frozenset(string.ascii_letters)
SPACE = "\u2581"  # how SentencePiece spells a space
CUT_CHARACTERS = 200  # how far before a border a cut is looked for
PROBES = ("a", "1", ".", "的")  # a text that yields at least one id in any vocabulary we have met


@dataclass(frozen=True, kw_only=True)
class Codec:
    """Encodes texts as training and inference both see them.

    Args:
        tokenizer: a fast tokenizer.
        prefix: ids that it puts before a text by itself (bos, or none).
        stop_id: eos (of an encoder the separator), the id that ends an answer.
        special_ids: ids of its special tokens.
        is_local: it encodes what stands before and after a space between two words independently.
    """

    tokenizer: Tokenizer
    prefix: tuple[int, ...]
    stop_id: int
    special_ids: frozenset[int]
    is_local: bool = False

    @cached_property
    def stop_text(self) -> str:
        """How a text spells the stop token."""
        return str(self.tokenizer.convert_ids_to_tokens(self.stop_id))

    @cached_property
    def named_special(self) -> frozenset[str]:
        """Special tokens that have a part to play: bos, eos, pad, unk, ..."""
        names = self.tokenizer.special_tokens_map.values()
        return frozenset(str(n) for name in names for n in (name if isinstance(name, list) else [name]))

    @cached_property
    def longest_token(self) -> int | None:
        """Bytes that a token stands for at most; None where that isn't known. Reads the vocabulary: 60 ms."""
        return max(map(len, self.tokenizer.get_vocab())) if self.is_local else None

    @cached_property
    def _words(self) -> Words | None:
        backend = self.tokenizer.backend_tokenizer
        pattern = word_pattern(backend)
        return Words(backend, pattern) if pattern else None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without prefix and stop."""
        if not texts:
            return []
        backend = self.tokenizer.backend_tokenizer
        if backend.truncation is not None or backend.padding is not None:  # from an earlier call elsewhere
            backend.no_truncation()
            backend.no_padding()
        if self._words:
            return self._words.encode(texts)
        full = [text for text in texts if text]
        encodings = iter(backend.encode_batch_fast(full, add_special_tokens=False))
        return [next(encodings).ids if text else [] for text in texts]

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text as a model is to go on with it: after the prefix, without the suffix."""
        return [self.with_prefix(ids) for ids in self.encode(texts)]

    def encode_joined(self, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Ids of each pair of texts with all that the tokenizer puts around and between them."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return [found.ids for found in backend.encode_batch_fast(list(pairs), add_special_tokens=True)]

    def may_alter(self, text: str) -> bool:
        """Whether ids of `text` may stand for another text: NFKC, doubled spaces, U+2581 as a space, ...

        A tokenizer without a normalizer and without such spaces alters none, at no cost.
        """
        normalizer = self.tokenizer.backend_tokenizer.normalizer
        if self._writes_spaces and SPACE in text:
            return True
        if normalizer is None:
            return False
        found = str(normalizer.normalize_str(text)).replace(SPACE, " ")
        return found.removeprefix(" ") != text.removeprefix(" ")  # some put a space in front

    @cached_property
    def _writes_spaces(self) -> bool:
        """Whether its vocabulary has U+2581 for a space."""
        return SPACE in json.dumps(state_of(self.tokenizer.backend_tokenizer.decoder), ensure_ascii=False)

    def starts_again(self, text: str) -> bool:
        """Whether the tokenizer puts a space into `text`, after an added token."""
        return self._continuing is not None and self._added is not None and bool(self._added.search(text))

    def encode_continued(self, texts: Sequence[str], exact: Sequence[bool] = ()) -> list[list[int]]:
        """Ids of each text after another one: without the space that some tokenizers put in front of it.

        One that the vocabulary can't spell so keeps the space.

        Args:
            exact: of each text, whether it gets none after added tokens within it either; empty: none does.
        """
        plain = self.encode(texts)
        if (backend := self._continuing) is None:
            return plain
        heads = [
            text if is_exact else self._before_added(text)
            for text, is_exact in zip(texts, exact or [False] * len(texts), strict=True)
        ]
        bare = [found.ids for found in backend.encode_batch_fast(heads, add_special_tokens=False)]
        rests = self.encode([text[len(head) :] for text, head in zip(texts, heads, strict=True)])
        unknown = self.tokenizer.unk_token_id
        return [
            ids if unknown in head and unknown not in ids else [*head, *rest]
            for ids, head, rest in zip(plain, bare, rests, strict=True)
        ]

    def _before_added(self, text: str) -> str:
        """What stands before the first added token, at which a tokenizer starts again."""
        found = self._added.search(text) if self._added else None
        return text[: found.start()] if found else text

    @cached_property
    def _continuing(self) -> Any:
        """The tokenizer without a space in front of texts; None if it puts none there."""
        backend = self.tokenizer.backend_tokenizer
        states = [state_of(backend.normalizer), state_of(backend.pre_tokenizer)]
        if states == [_without_space(state) for state in states]:
            return None
        described = json.loads(backend.to_str())
        for part in ("normalizer", "pre_tokenizer"):
            described[part] = _without_space(described[part]) or None
        return type(backend).from_str(json.dumps(described))

    @cached_property
    def _added(self) -> re.Pattern[str] | None:
        """Added tokens before which a text can be cut; None where one of them looks around itself."""
        tokens = self.tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
        if any(token.lstrip or token.single_word for token in tokens):
            return None
        names = sorted((t.content for t in tokens if not t.normalized), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names))) if names else None

    def last_added(self, text: str, start: int, end: int) -> int:
        """The place of the last added token in text[start:end], or `start`; `start` has to be a cut itself.

        Tokenizers take a text apart at these first of all, so ids(before) + ids(after) = ids(whole) there.
        """
        if self._added is None:
            return start
        places = [found.start() for found in self._added.finditer(text, start, end)]
        return places[-1] if places else start

    def last_cut(self, text: str, start: int, end: int) -> int:
        """The last place in text[start:end] with ids(before) + ids(after) = ids(whole), or `start`.

        Such a place stands before a space between two ASCII letters, if the tokenizer is local.
        """
        if not self.is_local:
            return start
        first = max(start, end - CUT_CHARACTERS) + 1
        cut = text.rfind(" ", first, max(first, end - 1))
        while cut >= 0 and not (text[cut - 1] in LETTERS and text[cut + 1] in LETTERS):
            cut = text.rfind(" ", first, cut)
        return start if cut < 0 else cut

    def with_prefix(self, ids: list[int]) -> list[int]:
        """`ids` after the tokenizer's own prefix, unless the text already spelt it out."""
        return ids if self.starts_with_prefix(ids) else [*self.prefix, *ids]

    def starts_with_prefix(self, ids: list[int]) -> bool:
        """Whether `ids` begin with the prefix (also when there is none to begin with)."""
        return tuple(ids[: len(self.prefix)]) == self.prefix


def codec_of(tokenizer: Tokenizer) -> Codec:
    """Look at what the tokenizer adds by itself.

    Raises:
        UserInputError: it has no eos token, or changes a text beyond adding a prefix and a suffix.
    """
    stop_id = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if stop_id is None:
        raise UserInputError(
            Problem(
                what="the tokenizer has no end-of-sequence token, so answers could never end",
                where="model.path",
                got=tokenizer.name_or_path,
                remedy='set "eos_token" in its tokenizer_config.json',
            )
        )
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return Codec(
        tokenizer=tokenizer,
        prefix=_own_prefix(tokenizer),
        stop_id=stop_id,
        special_ids=frozenset(special | set(tokenizer.all_special_ids)),
        is_local=_is_local(tokenizer),
    )


def _is_local(tokenizer: Tokenizer) -> bool:
    """Whether every part of the tokenizer is known to split before a space between two letters.

    Byte-level BPE does: its patterns (GPT-2's is built into ByteLevel) end a word at a space, look at no
    character before a match, and BPE merges within words only. An added token with a space in it, or one that
    starts or ends with a letter, could reach across.
    """
    backend = tokenizer.backend_tokenizer
    steps = state_of(backend.pre_tokenizer)
    steps = steps.get("pretokenizers", [steps])
    tokens = [token.content for token in backend.get_added_tokens_decoder().values()]
    return (
        isinstance(backend.model, BPE)
        and not backend.model.dropout
        and state_of(backend.normalizer).get("type", "NFC") == "NFC"
        and all(_splits_words(step) for step in steps)
        and any(step.get("use_regex") or step.get("type") == "Split" for step in steps)
        and not any(re.search(r"\s|^[^\W\d_]|[^\W\d_]$", token) for token in tokens)
    )


def _splits_words(step: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer leaves the place before a space between two letters a border."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False} | {"type": "Digits"}:
            return True
        case {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": str(pattern)}}:
            return pattern in KNOWN_PATTERNS
    return False


def _without_space(state: dict[str, Any]) -> dict[str, Any]:
    """A normalizer's or pre-tokenizer's state without what puts a space before a text.

    >>> _without_space({"type": "Sequence", "normalizers": [{"type": "Prepend"}, {"type": "NFC"}]})
    {'type': 'Sequence', 'normalizers': [{'type': 'NFC'}]}
    """
    match state:
        case {"type": "Prepend"}:
            return {}
        case {"type": "Metaspace"}:
            return state | {"prepend_scheme": "never"}
        case {"type": "ByteLevel", "add_prefix_space": True}:
            return state | {"add_prefix_space": False}
        case {"type": "Sequence"}:
            steps = {key: value for key, value in state.items() if isinstance(value, list)}
            return state | {k: [s for s in map(_without_space, steps[k]) if s] for k in steps}
    return state


def _own_prefix(tokenizer: Tokenizer) -> tuple[int, ...]:
    for probe in PROBES:
        bare = tokenizer(probe, add_special_tokens=False)["input_ids"]
        full = tokenizer(probe)["input_ids"]
        starts = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
        if bare and starts:
            return tuple(full[: starts[0]])
    raise UserInputError(
        Problem(
            what="the tokenizer encodes none of the probe texts, so what it adds can't be known",
            where="model.path",
            got=tokenizer.name_or_path,
            remedy="check its tokenizer.json: is the vocabulary complete?",
        )
    )


def tokenizer_identity(tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything about a tokenizer that decides ids, for fingerprints.

    Truncation and padding are left out: a call switches them off, so they would make the fingerprint of a
    tokenizer depend on whether it was used before (trl#6206: a cache key that never repeats).
    """
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    backend = tokenizer.backend_tokenizer.to_str()
    return {
        "backend_sha256": hashlib.sha256(backend.encode()).hexdigest(),
        "chat_template": tokenizer.chat_template,
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }


def load_tokenizer(
    model_path: str,
    trust_remote_code: bool = False,
    *,
    add_tokens: Sequence[str] = (),
    chat_template: str | None = None,
) -> Tokenizer:
    """The fast tokenizer of a model folder or hub name.

    Args:
        add_tokens: special tokens that it gets besides its own.
        chat_template: `model.chat_template`; None: its own.

    Raises:
        UserInputError: the path is a file's; the folder holds no usable tokenizer, or only a slow one.
        MissingEnvironmentError: a hub name that is neither cached nor reachable.
    """
    from transformers import AutoTokenizer

    if Path(model_path).is_file():  # transformers would take it for a hub name, and try the network
        what, remedy = "this is a file, not a model folder", "give the folder that it lies in"
        raise UserInputError(Problem(what=what, where=model_path, remedy=remedy))
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises bare Exception for a file that it can't parse
        raise _explained(model_path, error) from error
    if not tokenizer.is_fast:
        raise UserInputError(
            Problem(
                what="this tokenizer has no fast (Rust) version",
                where=model_path,
                got=type(tokenizer).__name__,
                remedy="convert it once to a tokenizer.json, or use another model",
            )
        )
    tokenizer.add_tokens(list(add_tokens), special_tokens=True)
    if chat_template is not None:
        tokenizer.chat_template = choose_template(tokenizer, chat_template)
    return tokenizer


def _explained(model_path: str, error: Exception) -> UserInputError | MissingEnvironmentError:
    first_line = str(error).strip().split("\n")[0]
    if isinstance(error, OSError) and not Path(model_path).is_dir():
        remedy = f"where there is a network: {how_to_pull(model_path)}; or give a model folder"
        return MissingEnvironmentError(
            Problem(what=f"can't get the tokenizer: {first_line}", where=model_path, remedy=remedy)
        )
    return UserInputError(
        Problem(
            what=f"no usable tokenizer: {first_line}",
            where=model_path,
            remedy="the folder needs tokenizer.json and tokenizer_config.json, complete and as published",
        )
    )
