"""The turns of a chat: who speaks, what, and whether it is trained, under the names that people give this.

In: one element of `messages` or `conversations`. Out: a `Message`, or `OddRow` with the key's name.
Invariant: a turn's keys are a white list: what is neither read here nor known to say nothing about training
costs the row; every spelling of "no loss on this turn" is honoured, or refused by its name.
Trade-off: names decide what is meta data (metadata.py), not what a template happens to read: a new corpus
may need `columns.ignore` once (1 line), and no template can pick up a stray field.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sftcore.data.contents import Fields, Message, OddRow
from sftcore.data.ledger import Change, Reason
from sftcore.data.metadata import TRAINED_IF_FALSE, TRAINED_IF_TRUE, left_out, says_nothing, truth

ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
SHAREGPT = "conversations"
FLAGS = TRAINED_IF_TRUE | TRAINED_IF_FALSE
SYSTEM_NAMES = ("system", "system_prompt", "system_message")  # a first turn that some corpora keep apart


def parse_turns(fields: Fields, turns: list[dict[str, Any]], ignored: Collection[str]) -> list[Message]:
    """The turns of a row; what is left out of them is noted, once a row.

    Args:
        ignored: names that the recipe leaves out of turns, too; "*" is of rows alone.

    Raises:
        OddRow: with the number of the turn that has a field that nothing reads.
    """
    left: dict[str, None] = {}
    ignored = [name for name in ignored if name != "*"]
    messages = []
    for i, turn in enumerate(turns, 1):
        try:
            if len(turn) > 2:
                left.update(dict.fromkeys(_left_out(turn, ignored)))
            messages.append(parse_message(fields, turn))
        except OddRow as odd:
            if odd.reason is Reason.UNKNOWN_KEY:
                raise OddRow(odd.reason, f"turn {i}: {odd.detail}", odd.excerpt) from odd
            raise
    if left:
        fields.changed(Change.COLUMN_LEFT_OUT, f"of turns: {', '.join(left)}")
    return messages


def _left_out(turn: dict[str, Any], ignored: Collection[str]) -> list[str]:
    read = ("from", "value") if _is_sharegpt(turn) else ("role", "content")
    return left_out(turn, {*read, *FLAGS}, what="a turn", place="turn", ignored=ignored)


def _is_sharegpt(turn: Mapping[str, Any]) -> bool:
    return turn.get("role") is None and turn.get("from") is not None


def parse_message(fields: Fields, turn: dict[str, Any]) -> Message:
    """A turn as {role, content}, or as ShareGPT's {from, value}, with its flags."""
    is_sharegpt = _is_sharegpt(turn)
    role, text = ("from", "value") if is_sharegpt else ("role", "content")
    known = SHAREGPT_ROLES if is_sharegpt else ROLES
    speaker = turn.get(role)
    if not isinstance(speaker, str) or speaker not in known:
        raise OddRow(Reason.WRONG_TYPE, f"{role} {speaker!r} is none of {', '.join(known)}")
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
        left_out(part, ("type", "text"), what=f"a part of {name!r}", place="turn")
        texts.append(fields.checked(part.get("text"), f"{name}.text", verbatim=True))
    if len(texts) > 1:
        fields.changed(Change.PARTS_JOINED, name)
    return "".join(texts)
