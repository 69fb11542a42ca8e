"""The turns of a chat: who speaks, what, and whether it is trained, under the names that people give this.

In: one element of `messages` or `conversations`. Out: a `Message`, or `OddRow` with the key's name.
Invariant: a turn's keys are a white list: what is neither read here nor known to say nothing about training
costs the row; every spelling of "no loss on this turn" is honoured, or refused by its name.
Trade-off: names decide what is meta data (`*_id`, `score_*`, `timestamp`, ...), not what a template happens
to read: a new corpus may need `columns.ignore` once (1 line), and no template can pick up a stray field.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from sftcore.data.contents import Fields, Message, OddRow
from sftcore.data.ledger import Change, Reason

ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
SHAREGPT = "conversations"
SYSTEM_NAMES = ("system", "system_prompt", "system_message")  # a first turn that some corpora keep apart
TRAINED_IF_TRUE = frozenset(
    "loss loss_mask loss_weight weight train trained training trainable is_trained is_trainable compute_loss"
    " train_on_turn learn".split()
)
TRAINED_IF_FALSE = frozenset("masked is_masked mask_loss ignore_loss no_loss".split())
IDLE = {
    "prefix": False,
    "enabled": True,
    "partial": False,
    "ipython": False,
    "eot": True,
}  # the value that asks for nothing
TRUTHS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
NOTHING = ("", "[]", "{}", "null")
UNNAMED = re.compile(r"|Unnamed: \d+|__index_level_\d+__")
DECIDES = re.compile(  # names that are never taken for meta data
    r"loss|mask|weight|train|learn|system|developer|instruct|tool|function|think|thought|reason|image|video|audio"
    r"|history|context|persona|kwargs|persist",
    re.IGNORECASE,
)
METADATA = re.compile(
    r"(.*_)?(id|ids|uuid|guid|hash|hashed_ip|md5|sha\d*|idx|index|row|number|num|count|counts|length|len|url|urls"
    r"|uri|link|source|sources|src|origin|dataset|split|subset|config|lang|langs|language|languages|locale|date"
    r"|time|timestamp|created|created_at|updated_at|version|license|licence|author|annotators?|model|models"
    r"|generator|category|categories|domain|domains|topic|topics|tag|tags|type|task|difficulty|scores?|rating"
    r"|ratings|rank|quality|votes?|reward|toxic|toxicity|moderation|redacted|country|state|header|meta"
    r"|metadata|embeddings?|turn|turns|turn_identifier|conv|level|relation|key|seed|file|file_name|path|page)"
    r"|(num|n|score|len|length|tokens?|index)_.*",
    re.IGNORECASE,
)


def says_nothing(value: Any) -> bool:
    """Whether a field asks for nothing: null, and empty texts, lists and objects, also written as JSON.

    >>> [says_nothing(value) for value in (None, [], " [] ", "a", 0, False)]
    [True, True, True, False, False, False]
    """
    if isinstance(value, str):
        return value.strip() in NOTHING
    return value is None or (isinstance(value, list | dict | tuple) and not value)


def is_metadata(name: str) -> bool:
    """Whether a field of this name says nothing about what is trained.

    >>> [is_metadata(name) for name in ("prompt_id", "score_chosen", "system", "loss_type", "notes")]
    [True, True, False, False, False]
    """
    return METADATA.fullmatch(name) is not None and DECIDES.search(name) is None


def refuse_unknown(
    values: Mapping[Any, Any], known: Collection[str], *, what: str, ignored: Collection[str] = ()
) -> None:
    """Refuse fields that nothing reads, unless they are empty or meta data.

    Args:
        known: names that are read elsewhere.
        what: has them, for the message: "a row" or "a turn".
        ignored: names that the recipe leaves out; "*" is all.

    Raises:
        OddRow: with the first such name.
    """
    for name, value in values.items():
        if name in known or name in ignored or says_nothing(value):
            continue
        if "*" in ignored or is_metadata(name) or _is_idle(name, value) or _numbers_rows(name, value):
            continue
        raise OddRow(Reason.UNKNOWN_KEY, f"{what} with {name!r}, which is not read")


def _numbers_rows(name: str, value: Any) -> bool:
    """Whether this is the nameless column of row numbers that pandas writes."""
    return UNNAMED.fullmatch(name) is not None and str(value).isdigit()


def _is_idle(name: str, value: Any) -> bool:
    """Whether a flag asks for what happens anyway."""
    if name in TRAINED_IF_TRUE:
        return truth(value) is True
    if name in TRAINED_IF_FALSE:
        return truth(value) is False
    return name in IDLE and truth(value) is IDLE[name]


def truth(value: Any) -> bool | None:
    """A flag's value; None if it is neither true nor false.

    >>> [truth(value) for value in (False, 0, 1.0, "True", 0.5, "maybe")]
    [False, False, True, True, None, None]
    """
    if isinstance(value, bool | int | float):
        return bool(value) if value in (0, 1) else None
    return TRUTHS.get(value.strip().lower()) if isinstance(value, str) else None


def parse_message(fields: Fields, turn: dict[str, Any]) -> Message:
    """A turn as {role, content}, or as ShareGPT's {from, value}."""
    is_sharegpt = turn.get("role") is None and turn.get("from") is not None
    role, text = ("from", "value") if is_sharegpt else ("role", "content")
    known = SHAREGPT_ROLES if is_sharegpt else ROLES
    speaker = turn.get(role)
    if not isinstance(speaker, str) or speaker not in known:
        raise OddRow(Reason.WRONG_TYPE, f"{role} {speaker!r} is none of {', '.join(known)}")
    if len(turn) > 2:
        refuse_unknown(turn, {role, text, *TRAINED_IF_TRUE, *TRAINED_IF_FALSE}, what="a turn")
    content = fields.checked(_joined_parts(fields, turn.get(text), text), text, verbatim=True)
    is_trained = len(turn) == 2 or _is_trained(turn, known[speaker])
    return Message(role=known[speaker], content=content, is_trained=is_trained)


def _is_trained(turn: Mapping[str, Any], role: str) -> bool:
    """What a turn's flags say, all of which have to agree."""
    asked: dict[str, bool] = {}
    for name, value in turn.items():
        is_direct = name in TRAINED_IF_TRUE
        if says_nothing(value) or not (is_direct or name in TRAINED_IF_FALSE):
            continue
        if (found := truth(value)) is None:
            raise OddRow(Reason.UNKNOWN_KEY, f"a turn with {name!r}: {value!r}; true, false, 1 or 0 is read")
        asked[name] = found is is_direct
    if role != "assistant":
        loud = [name for name, is_on in asked.items() if is_on and name in TRAINED_IF_TRUE - {"weight"}]
        if loud:
            raise OddRow(Reason.UNKNOWN_KEY, f"a turn of role {role} with {loud[0]!r}: it is never trained")
        return True
    if len(set(asked.values())) > 1:
        raise OddRow(Reason.UNKNOWN_KEY, f"a turn with {' and '.join(map(repr, asked))}, which disagree")
    return all(asked.values())


def _joined_parts(fields: Fields, value: Any, name: str) -> Any:
    """Text parts, one after another as multimodal templates write them; other values as they are."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if not isinstance(part, dict) or kind != "text":
            raise OddRow(Reason.WRONG_TYPE, f"a part of {name!r} of type {kind!r}; only text is read")
        refuse_unknown(part, ("type", "text"), what=f"a part of {name!r}")
        texts.append(fields.checked(part.get("text"), f"{name}.text", verbatim=True))
    if len(texts) > 1:
        fields.changed(Change.PARTS_JOINED, name)
    return "".join(texts)
