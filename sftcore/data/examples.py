"""Rows of format `jsonl`: a prompt with its completion, or a chat, under the names that people give them.

In: a row and the source's `columns`; the cells of a table whose first line names them. Out: `Completion` or
`Chat`, or `OddRow` with the row's own keys and the shapes that are read.
Invariant: texts stay verbatim; a row that says more than its shape can hold (tool calls, a history next to
the prompt) is rejected by the field's name rather than trained without it.
Trade-off: `conversations` are taken for ShareGPT's turns without being asked (one look-up more in a row
without `messages`); every other name has to stand in `columns`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

from sftcore.data.cells import num_named, table_rows, without_tail
from sftcore.data.contents import Chat, Completion, Fields, Message, OddRow
from sftcore.data.ledger import Change, Reason, Rejection, printable
from sftcore.data.metadata import left_out, says_nothing
from sftcore.data.rows import WHOLE, Note, RawRow, Span, damaged, ignore
from sftcore.data.turns import SHAREGPT, SYSTEM_NAMES, parse_turns
from sftcore.sources import Columns

RENDERING = "text"  # of a whole row, next to its parts
MAX_KEYS_SHOWN = 5
Table = Iterator[RawRow | Rejection]


def named_rows(path: Path, quotes: str = "auto", note: Note = ignore, span: Span = WHOLE) -> Table:
    """The rows of a TSV or CSV file as objects; the first line names the columns, and does not count.

    Raises:
        UserInputError: the first line can't be read, or names two columns alike.
    """
    rows = table_rows(path, quotes, note, span)
    first = next(rows if span.start == 0 else table_rows(path, quotes), None)
    if first is None:
        return
    if isinstance(first, Rejection):
        raise damaged(path, f"the first line can't be read: {first.detail}", got=first.excerpt)
    names = [cell.strip() for cell in first.value[: num_named(first.value)]]
    if len(set(names)) < len(names):
        raise damaged(path, "the first line names two columns alike", got=printable(" | ".join(names)))
    for row in rows:
        yield _named(path, row, names)


def _named(path: Path, row: RawRow | Rejection, names: list[str]) -> RawRow | Rejection:
    if isinstance(row, Rejection):
        return replace(row, row=row.row - 1)
    if len(cells := without_tail(row.value, len(names))) == len(names):
        return RawRow(number=row.number - 1, value=dict(zip(names, cells, strict=True)))
    return Rejection(
        file=str(path),
        row=row.number - 1,
        reason=Reason.WRONG_FIELD_COUNT,
        excerpt=printable(" | ".join(row.value)),
        detail=f"{len(row.value)} fields, not {len(names)}",
    )


def parse_example(fields: Fields, columns: Columns) -> Completion | Chat:
    """A row of a `jsonl` source: the turns of a chat, else prompt and completion."""
    if turns := _turns_name(fields, columns):
        return _parse_chat(fields, turns, columns)
    if not (fields.has(columns.prompt) and fields.has(columns.completion)):
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
    if len(fields.row.value) > len(names):
        _beside_completion(fields, columns, completion)
    if columns.input is None:
        return Completion(prompt=prompt, completion=completion)
    given = fields.text(columns.input, verbatim=True) if fields.has(columns.input) else ""
    parts = [prompt, given] if given.strip() else [prompt]
    return Completion(prompt="".join(f"{part}\n\n" for part in parts), completion=completion)


def _beside_completion(fields: Fields, columns: Columns, completion: str) -> None:
    """Note what is left out: meta data, and a rendering of the row such as Alpaca's `text`."""
    row = fields.row.value
    known = {columns.prompt, columns.completion, *filter(None, (columns.input, columns.id))}
    text = row.get(RENDERING)
    rendering = [RENDERING] if RENDERING not in known and isinstance(text, str) and completion in text else []
    known.update(rendering)
    left = left_out(row, known, what="a row", place="prompt", ignored=columns.ignore)
    if left or rendering:
        fields.changed(Change.COLUMN_LEFT_OUT, ", ".join([*rendering, *left]))


def _parse_chat(fields: Fields, name: str, columns: Columns) -> Chat:
    turns = fields.get(name)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise OddRow(Reason.WRONG_TYPE, f"{name!r} must be a list of {{role, content}}")
    messages = parse_turns(fields, turns, columns.ignore)
    if len(fields.row.value) > 1:
        messages = _beside(fields, name, columns, messages)
    chat = Chat(messages=tuple(messages))
    _refuse_silent(chat)
    return chat


def _beside(fields: Fields, name: str, columns: Columns, messages: list[Message]) -> list[Message]:
    """The turns with what stands next to them in the row: a system text is said first, other texts are left.

    What is left (a `prompt` next to the turns, say) is noted; fields that nothing reads cost the row.
    """
    row = fields.row.value
    texts = [
        t for t in (columns.prompt, columns.completion, columns.input) if t and t != name and fields.has(t)
    ]
    systems = [s for s in SYSTEM_NAMES if s not in columns.ignore and not says_nothing(row.get(s))]
    known = {name, *texts, *systems, *filter(None, (columns.id,))}
    left = left_out(row, known, what="a row", place="turns", ignored=columns.ignore)
    if left or texts:
        fields.changed(Change.COLUMN_LEFT_OUT, ", ".join([*texts, *left]))
    for system in systems[:1]:
        if len(systems) > 1:
            raise OddRow(Reason.UNKNOWN_KEY, f"a row with {' and '.join(map(repr, systems))}")
        text = fields.text(system, verbatim=True)
        if messages and messages[0].role == "system":
            if messages[0].content.strip() != text.strip():
                raise OddRow(Reason.WRONG_TYPE, f"{system!r} next to another system turn")
            return messages
        fields.changed(Change.SYSTEM_FROM_COLUMN, system)
        return [Message(role="system", content=text), *messages]
    return messages


def _refuse_silent(chat: Chat) -> None:
    """Refuse a chat that trains nothing, or an answer to nothing."""
    messages = chat.messages
    answers = [message.content for message in messages if message.role == "assistant"]
    if not answers:
        raise OddRow(Reason.EMPTY_ANSWER, "no assistant turn")
    if not all(answer.strip() for answer in answers):
        raise OddRow(Reason.EMPTY_ANSWER, "an assistant turn is empty")
    if not chat.answers:
        raise OddRow(Reason.EMPTY_ANSWER, "no assistant turn is to be trained")
    if messages[0].role == "assistant":
        raise OddRow(Reason.EMPTY_PROMPT, "the first turn is the assistant's")
    before = takewhile(lambda message: message.role != "assistant", messages)
    if not any(message.content.strip() for message in before):
        raise OddRow(Reason.EMPTY_PROMPT, "nothing is said before the first answer")
