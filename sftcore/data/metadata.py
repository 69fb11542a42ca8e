"""What stands in a row or a turn next to what is read: flags, meta data, and what nothing reads.

In: the fields of a row or a turn. Out: the names of what is left out, or `OddRow` with the names that decide.
Invariant: a field is left out if it is empty, asks for what happens anyway, is named in `columns.ignore`, or
is meta data by an explicit list; all else costs the row by its name, also within an object of meta data.
Trade-off: the list is short, and shorter next to a prompt (where `source` or `language` may be half of the
task) than next to turns: a new corpus may need `columns.ignore` once (1 line).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any, Literal

from sftcore.data.contents import Fields, OddRow
from sftcore.data.ledger import Change, Reason, printable

Place = Literal["turn", "prompt", "turns", "fact", "pair"]  # in a turn; next to a prompt, to turns, ...
TRAINED_IF_TRUE = frozenset(
    "loss loss_mask loss_weight weight train trained training trainable is_trained is_trainable compute_loss"
    " train_on_turn learn".split()
)
TRAINED_IF_FALSE = frozenset("masked is_masked mask_loss ignore_loss no_loss".split())
IDLE = {  # the value that asks for nothing
    "prefix": False,
    "enabled": True,
    "partial": False,
    "ipython": False,
    "eot": True,
    "end_turn": True,
    "redacted": False,
    "deleted": False,
    "skip_prompt_formatting": False,
}
TRUTHS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
NOTHING = ("", "[]", "{}", "null")
UNNAMED = re.compile(r"|Unnamed: \d+|__index_level_\d+__")
ANYWHERE = frozenset(  # names that can't be a part of what is asked
    "id ids uuid guid hash hashed_ip md5 sha1 sha256 idx index row_number url urls uri timestamp time date"
    " datetime created created_at updated_at created_date license licence version dataset dataset_name"
    " author annotator annotators generator model model_name score scores score_chosen score_rejected rating"
    " ratings avg_rating rank votes num_turns n_turns num_tokens n_tokens token_count num_words num_chars"
    " length embedding embeddings toxic toxicity moderation openai_moderation detoxify_moderation country"
    " turn_identifier meta metadata".split()
)
MORE = {  # names that are meta data in one place, and may be a text that is asked about in another
    "turn": frozenset(["lang", "language", "locale"]),
    "prompt": frozenset(
        "category categories domain difficulty quality views avatarUrl chosen rejected data_source".split()
    ),
    "turns": frozenset(
        "category categories domain domains difficulty quality views avatarUrl data_source dataset_source"
        " source sources src origin subset config lang langs langdetect language languages locale topic"
        " topics tag tags task type level title file file_name path page conv turn custom_instruction"
        " text chosen rejected".split()
    ),
    "fact": frozenset(  # with what `sftcore probe` and Wikidata say of one
        "category categories domain difficulty quality source sources data_source lang language locale topic"
        " topics tag tags type level recall hits trials popularity s_pop o_pop prop relation_label"
        " relation_name subject_label object_label subj obj object answer".split()
    ),
    "pair": frozenset(
        "category categories domain difficulty quality genre source sources data_source lang language locale"
        " topic topics tag tags qid qid1 qid2 pairID promptID captionID annotator_labels".split()
    )
    | {"#1 ID", "#2 ID"},
}
BY_VALUE = re.compile(  # names of identifiers, and of numbers
    r"(?P<word>key|[a-z0-9_]+_(id|ids|uuid|guid|hash|md5|sha1|sha256|url|idx|timestamp|date))"
    r"|[a-z0-9_]+_(index|count|counts|score|length|tokens|rating)|(num|score)_[a-z0-9_]+"
)
DECIDES = re.compile(  # names that are never taken for meta data
    r"loss|mask|weight|train|learn|system|developer|instruct|tool|function|think|thought|reason|image|video|audio"
    r"|history|context|persona|kwargs|persist|reward",
    re.IGNORECASE,
)
DECIDES_WITHIN = re.compile(  # words of names within an object of meta data
    r"(?<![a-z])(loss|mask|masked|weight|train|trained|training|trainable|learn|system|developer|instructions?"
    r"|persona|tools?|functions?|history|thinking|thoughts?|reasoning)(?![a-z])",
    re.IGNORECASE,
)
NOT_TRAINED = re.compile(  # said by a tag
    r"\b(no|not|never|dont|skip|without|ignore|exclude)[\s_-]*(in[\s_-]*)?(train|loss|learn|sft)"
    r"|\b(train\w*|loss)[\s_:=-]*(false|off|no)\b|\bmask(ed)?\b",
    re.IGNORECASE,
)
MAX_DEPTH = 20
MAX_NAMED = 5


def says_nothing(value: Any) -> bool:
    """Whether a field asks for nothing: null, and empty texts, lists and objects, also written as JSON.

    >>> [says_nothing(value) for value in (None, [], " [] ", "a", 0, False)]
    [True, True, True, False, False, False]
    """
    if isinstance(value, str):
        return value.strip() in NOTHING
    return value is None or (isinstance(value, list | dict | tuple) and not value)


@lru_cache(maxsize=4096)
def is_metadata(name: str, place: Place) -> bool:
    """Whether a field of this name says nothing about what is trained, unless its value decides.

    >>> [is_metadata(name, "turns") for name in ("prompt_id", "source", "system", "loss_type", "notes")]
    [True, True, False, False, False]
    >>> is_metadata("source", "prompt")
    False
    """
    if name in ANYWHERE or name in MORE[place]:
        return True
    return BY_VALUE.fullmatch(name) is not None and DECIDES.search(name) is None


def left_out(
    values: Mapping[Any, Any],
    known: Collection[str],
    *,
    what: str,
    place: Place,
    ignored: Collection[str] = (),
) -> list[str]:
    """The meta data among the fields that nothing reads.

    Args:
        known: names that are read elsewhere.
        what: has them, for the message: "a row" or "a turn".
        ignored: names that the recipe leaves out; "*" is all.

    Raises:
        OddRow: with the names of all other fields, unless they are empty or ask for what happens anyway.
    """
    left: list[str] = []
    odd: dict[str, Any] = {}
    names: dict[str, str] = {}  # of those of which a part decides
    for name, value in values.items():
        if name in known or name in ignored or "*" in ignored or says_nothing(value) or is_idle(name, value):
            continue
        if _numbers_rows(name, value):
            left.append(name)
        elif not is_metadata(name, place) or not _fits(name, value):
            odd[name] = value
        elif within := deciding(value):
            odd[name] = value
            names[name] = f"{name}.{within}"
        else:
            left.append(name)
    if odd:
        raise _not_read(what, odd, [names.get(name, name) for name in odd])
    return left


def leave_out(
    fields: Fields,
    others: Mapping[Any, Any],
    known: Collection[str],
    *,
    place: Place,
    ignored: Collection[str],
) -> None:
    """Note the meta data of a row; arguments and what is raised are those of `left_out`."""
    if others.keys() <= set(known):
        return
    if left := left_out(others, known, what="a row", place=place, ignored=ignored):
        fields.changed(Change.COLUMN_LEFT_OUT, ", ".join(left))


def _not_read(what: str, odd: Mapping[str, Any], names: list[str]) -> OddRow:
    names = [repr(printable(name, 60)) for name in names]
    more = [f"{len(names) - MAX_NAMED} more"] if len(names) > MAX_NAMED else []
    verb = "is" if len(names) == 1 else "are"
    excerpt = json.dumps(dict(odd), ensure_ascii=False, default=str)
    return OddRow(
        Reason.UNKNOWN_KEY,
        f"{what} with {', '.join([*names[:MAX_NAMED], *more])}, which {verb} not read",
        excerpt,
    )


def _numbers_rows(name: str, value: Any) -> bool:
    """Whether this is the nameless column of row numbers that pandas writes."""
    return UNNAMED.fullmatch(name) is not None and str(value).isdigit()


def _fits(name: str, value: Any) -> bool:
    """Whether a value is what its name makes one expect: `x_id` one word or a number, `x_count` a number."""
    found = None if name in ANYWHERE else BY_VALUE.fullmatch(name)
    if found is None:
        return True
    values = value if isinstance(value, list | tuple) else [value]
    if found["word"]:
        return all(not isinstance(v, str) or len(v.split()) <= 1 or v[:4].isdigit() for v in values)
    return all(isinstance(v, int | float) or _is_number(v) for v in values)


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def deciding(value: Any, depth: int = 0) -> str:
    """The name within meta data, or the tag, that says what is trained or what is asked; else "".

    >>> deciding({"a": [{"train": False}]}), deciding('{"system": "Be rude."}'), deciding({"train": True})
    ('a.train', 'system', '')
    """
    if isinstance(value, str):
        return _deciding_text(value, depth)
    if isinstance(value, list | tuple):
        return next((found for item in value if (found := deciding(item, depth + 1))), "")
    if not isinstance(value, dict):
        return ""
    if depth > MAX_DEPTH:
        return "…"
    for name, inner in value.items():
        if says_nothing(inner) or is_idle(name, inner):
            continue
        if name in IDLE or DECIDES_WITHIN.search(name):
            return str(name)
        if found := deciding(inner, depth + 1):
            return f"{name}.{found}"
    return ""


def _deciding_text(text: str, depth: int) -> str:
    """Of a text: what it holds as JSON, or that it is a tag such as `no_train`."""
    start = text.lstrip()[:1]
    if start in ("{", "[") and depth <= MAX_DEPTH:
        try:
            return deciding(json.loads(text), depth + 1)
        except (ValueError, RecursionError):
            return ""
    found = NOT_TRAINED.search(text) if depth and len(text) < 40 else None  # of a list or object: a tag
    return found[0] if found else ""


def is_idle(name: str, value: Any) -> bool:
    """Whether a flag asks for what happens anyway."""
    if name in TRAINED_IF_TRUE:
        return truth(value) is True
    if name in TRAINED_IF_FALSE:
        return truth(value) is False
    if name == "split":
        return isinstance(value, str) and value.startswith("train")
    return name in IDLE and truth(value) is IDLE[name]


def truth(value: Any) -> bool | None:
    """A flag's value; None if it is neither true nor false.

    >>> [truth(value) for value in (False, 0, 1.0, "True", 0.5, "maybe")]
    [False, False, True, True, None, None]
    """
    if isinstance(value, bool | int | float):
        return bool(value) if value in (0, 1) else None
    return TRUTHS.get(value.strip().lower()) if isinstance(value, str) else None
