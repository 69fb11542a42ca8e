"""Rows of format `jsonl`: a prompt with its completion, or a chat, under the names that people give them.

In: a row and the source's `columns`; the cells of a table whose first line names them. Out: `Completion` or
`Chat`, or `OddRow` with the row's own keys and the shapes that are read.
Invariant: texts stay verbatim; a row that says more than its shape can hold (tool calls, a system text beside
the turns) is rejected by name rather than trained without it.
Trade-off: `conversations` are taken for ShareGPT's turns without being asked (one look-up more in a row
without `messages`); every other name has to stand in `columns`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from sftcore.data.contents import Chat, Completion, Fields, Message, OddRow
from sftcore.data.ledger import Reason, Rejection, printable
from sftcore.data.rows import WHOLE, Note, RawRow, Span, csv_rows, damaged, ignore, suffix_of, tsv_rows
from sftcore.sources import Columns

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
NOT_IN_A_TURN = ("tool_calls", "function_call", "reasoning_content", "weight", "train")  # alter training
NOT_BESIDE = ("system", "history", "tools")  # parts of a prompt that some corpora keep in fields of their own
NOT_BESIDE_MESSAGES = ("tools", "functions", "chat_template_kwargs")  # reach the template at inference
SHAREGPT = "conversations"
MAX_KEYS_SHOWN = 5
Table = Iterator[RawRow | Rejection]


def named_rows(path: Path, note: Note = ignore, span: Span = WHOLE) -> Table:
    """The rows of a TSV or CSV file as objects; the first line names the columns, and does not count.

    Raises:
        UserInputError: the first line can't be read, or names two columns alike.
    """
    read = csv_rows if suffix_of(path) == ".csv" else tsv_rows
    rows = read(path, note, span)
    first = next(rows if span.start == 0 else read(path, ignore, WHOLE), None)
    if first is None:
        return
    if isinstance(first, Rejection):
        raise damaged(path, f"the first line can't be read: {first.detail}", got=first.excerpt)
    names = [cell.strip() for cell in first.value]
    if len(set(names)) < len(names):
        raise damaged(path, "the first line names two columns alike", got=printable(" | ".join(names)))
    for row in rows:
        yield _named(path, row, names)


def _named(path: Path, row: RawRow | Rejection, names: list[str]) -> RawRow | Rejection:
    if isinstance(row, Rejection):
        return replace(row, row=row.row - 1)
    if len(row.value) == len(names):
        return RawRow(number=row.number - 1, value=dict(zip(names, row.value, strict=True)))
    return Rejection(
        file=str(path),
        row=row.number - 1,
        reason=Reason.WRONG_FIELD_COUNT,
        excerpt=printable(" | ".join(row.value)),
        detail=f"{len(row.value)} fields, not {len(names)}",
    )


def parse_example(fields: Fields, columns: Columns) -> Completion | Chat:
    """A row of a `jsonl` source: prompt and completion, or the turns of a chat."""
    turns = _turns_name(fields, columns)
    texts = [name for name in (columns.prompt, columns.completion) if fields.has(name)]
    if turns and texts:
        raise OddRow(
            Reason.WRONG_TYPE, f"{turns!r} together with {columns.prompt!r} or {columns.completion!r}"
        )
    if turns:
        return _parse_chat(fields, turns)
    if len(texts) < 2:
        raise _no_example(fields, columns)
    return _parse_completion(fields, columns)


def _turns_name(fields: Fields, columns: Columns) -> str | None:
    names = ("messages", SHAREGPT) if columns.messages is None else (columns.messages,)
    return next((name for name in names if fields.has(name)), None)


def _no_example(fields: Fields, columns: Columns) -> OddRow:
    """What the row has, and what it needs: the two shapes under their names in this source."""
    if not isinstance(fields.row.value, dict):
        kind = type(fields.row.value).__name__
        return OddRow(Reason.WRONG_TYPE, f"a JSON object is expected, not {kind}")
    keys = [str(key) for key, value in fields.row.value.items() if value is not None]
    more = [f"{len(keys) - MAX_KEYS_SHOWN} more"] if len(keys) > MAX_KEYS_SHOWN else []
    has = ", ".join([*(printable(key, 20) for key in keys[:MAX_KEYS_SHOWN]), *more]) or "nothing"
    shapes = f"{columns.messages or 'messages'} [{{role, content}}] or "
    shapes += f"{columns.prompt} + {columns.completion}"
    return OddRow(Reason.MISSING_FIELD, f"this row has {has}; needed: {shapes}")


def _parse_completion(fields: Fields, columns: Columns) -> Completion:
    names = (columns.prompt, columns.completion)
    prompt, completion = (fields.text(name, verbatim=True) for name in names)
    if not prompt.strip():
        raise OddRow(Reason.EMPTY_PROMPT, f"{columns.prompt!r} is empty")
    if not completion.strip():
        raise OddRow(Reason.EMPTY_ANSWER, f"{columns.completion!r} is empty")
    if columns.input is None:
        return Completion(prompt=prompt, completion=completion)
    _refuse_beside(fields, columns.prompt)
    given = fields.text(columns.input, verbatim=True) if fields.has(columns.input) else ""
    parts = [prompt, given] if given.strip() else [prompt]
    return Completion(prompt="".join(f"{part}\n\n" for part in parts), completion=completion)


def _refuse_beside(fields: Fields, name: str, others: Sequence[str] = NOT_BESIDE) -> None:
    """A row whose prompt is spread over more fields than are read."""
    for other in others:
        if fields.has(other) and fields.get(other):
            raise OddRow(Reason.WRONG_TYPE, f"{other!r} beside {name!r}, which is not supported")


def _parse_chat(fields: Fields, name: str) -> Chat:
    turns = fields.get(name)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise OddRow(Reason.WRONG_TYPE, f"{name!r} must be a list of {{role, content}}")
    _refuse_beside(fields, name, NOT_BESIDE if name == SHAREGPT else NOT_BESIDE_MESSAGES)
    messages = tuple(parse_message(fields, turn) for turn in turns)
    answers = [message.content for message in messages if message.role == "assistant"]
    if not answers:
        raise OddRow(Reason.EMPTY_ANSWER, "no assistant turn")
    if not all(answer.strip() for answer in answers):
        raise OddRow(Reason.EMPTY_ANSWER, "an assistant turn is empty")
    if messages[0].role == "assistant":
        raise OddRow(Reason.EMPTY_PROMPT, "the first turn is the assistant's")
    before = takewhile(lambda message: message.role != "assistant", messages)
    if not any(message.content.strip() for message in before):
        raise OddRow(Reason.EMPTY_PROMPT, "nothing is said before the first answer")
    return Chat(messages=messages)


def parse_message(fields: Fields, turn: dict[str, Any]) -> Message:
    """A turn as {role, content}, or as ShareGPT's {from, value}."""
    is_sharegpt = turn.get("role") is None and turn.get("from") is not None
    role, text = ("from", "value") if is_sharegpt else ("role", "content")
    known = SHAREGPT_ROLES if is_sharegpt else dict(zip(ROLES, ROLES, strict=True))
    speaker = turn.get(role)
    if not isinstance(speaker, str) or speaker not in known:
        raise OddRow(Reason.WRONG_TYPE, f"{role} {speaker!r} is none of {', '.join(known)}")
    if unsupported := [key for key in NOT_IN_A_TURN if turn.get(key) is not None]:
        raise OddRow(Reason.WRONG_TYPE, f"a turn with {unsupported[0]!r}, which is not supported")
    return Message(role=known[speaker], content=fields.checked(turn.get(text), text, verbatim=True))
