"""YAML that people write: read within bounds, whatever is in it.

In: a file or a text. Out: plain values (texts, numbers, lists, mappings), or one `UserInputError`.
Invariant: reading ends, in memory that the text's length bounds: depth and number of values, aliases
followed, are counted on the parser's events before anything is built.
Trade-off: the text is parsed twice (a recipe of 40 lines: 10 ms more), since PyYAML builds by recursion; tags
such as !!binary are refused, which no recipe needs.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from sftcore.display import VALUE_LETTERS, shown, shown_value
from sftcore.errors import Problem, UserInputError
from sftcore.paths import file_fault

MAX_BYTES = 2**20  # our longest file has 4 kB
MAX_DEPTH = 30  # a recipe's deepest key stands at 7
MAX_VALUES = 100_000
MAX_DIGITS = 40
INT = "tag:yaml.org,2002:int"
QUOTE = "put text with : # [ ] { } , * & ! % @ ` or a quote in it into quotes; indent with spaces"
UNCLOSED = "brackets do not match, or a comma is missing"
WORDS = {  # how a message of PyYAML's begins, or what it holds -> what is meant
    "mapping values are not allowed": "a colon stands where no key can be",
    "could not find expected ':'": "a key without its colon",
    "unexpected end of stream": "a quote is opened and not closed",
    "unexpected document separator": "a quote is opened and not closed",
    "found character '\\t'": "a tab begins this value",
    "that cannot start any token": "a sign that has a meaning of its own begins this value",
    "block sequence entries are not allowed": "a list item (-) needs a line of its own",
    "sequence entries are not allowed": "a list item (-) needs a line of its own",
    "mapping keys are not allowed": "a question mark stands where no key can be",
    "unknown escape character": "a backslash in double quotes: use single quotes, or write it twice",
    "expected alphabetic or numeric": "* and & begin names of YAML's own",
    "undefined alias": "* begins a name of YAML's own, and none was given before",
    "expected <block end>": "the indentation does not fit, or a bracket or quote is closed early",
    "expected the node content": UNCLOSED,
    "expected ',' or": UNCLOSED,
    "another document": "only one document can be here: leave out the second ---",
    "expected '<document start>'": "more stands here than one value",
    "special characters are not allowed": "special characters (control codes) can't be here",
    "chomping or indentation": "| and > begin a text of several lines: nothing else can stand in theirs",
    "for merging": "<< takes a mapping, or a list of them",
}


class _Refused(yaml.constructor.ConstructorError):
    """A value that we refuse, said in our words."""

    def __init__(self, what: str, mark: yaml.Mark) -> None:
        super().__init__(None, None, what, mark)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-5 as a number (YAML 1.1 wants 1.0e-5) and refuses a key given twice."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """A node's value; dates and numbers that are none are named with their line."""
        if node.tag == INT and len(node.value) > MAX_DIGITS:
            what = f"a whole number of {len(node.value):,} digits"
            raise _Refused(what, node.start_mark)
        try:
            return super().construct_object(node, deep)
        except (ValueError, ArithmeticError) as error:
            what = f"{shown_value(node.value)} looks like a date or a number and is none: put text in quotes"
            raise _Refused(what, node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            value = "<<" if key.tag == "tag:yaml.org,2002:merge" else self.construct_object(key, deep=True)
            if not isinstance(value, str | int | float | bool | None):
                raise _Refused(f"a key must be a name, not a {type(value).__name__}", key.start_mark)
            if value in seen:
                raise _Refused(f"key {value!r} given twice", key.start_mark)
            seen.add(value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> Any:
    """The value of a YAML file.

    Raises:
        UserInputError: no file, too large, not UTF-8, not YAML, or a value that can't be read.
    """
    if fault := file_fault(path):
        raise UserInputError(Problem(what=fault, where=str(path)))
    with open(path, "rb") as handle:
        content = handle.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        what = f"over {MAX_BYTES:,} bytes: this is no recipe or study"
        raise UserInputError(Problem(what=what, where=str(path)))
    try:
        return parse_yaml(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserInputError(Problem(what="this must be UTF-8 text", where=str(path))) from error
    except ValueError as error:
        raise UserInputError(
            Problem(what=f"not valid YAML: {error}", where=str(path), remedy=f"fix that line: {QUOTE}")
        ) from error


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: not YAML, nested too deeply, too many values, or one that can't be read.

    >>> parse_yaml("{lr: 1e-5, levels: [2]}")
    {'lr': 1e-05, 'levels': [2]}
    """
    try:
        _check_size(text)
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(_in_words(error, text)) from error


def _in_words(error: yaml.YAMLError, text: str) -> str:
    """What is wrong with a text, and in which line if there are several.

    >>> try: yaml.safe_load("a: [1,\\nb: 2")
    ... except yaml.YAMLError as error: print(_in_words(error, "a: [1,\\nb: 2"))
    brackets do not match, or a comma is missing, line 2: b: 2
    """
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    said = str(error.problem) if isinstance(error, yaml.MarkedYAMLError) else str(error)
    found = (words for part, words in WORDS.items() if part in said)
    words = said if isinstance(error, _Refused) else next(found, "YAML does not read this")
    lines = text.splitlines()
    if mark is None or len(lines) < 2:
        return words
    line = shown(lines[min(mark.line, len(lines) - 1)].strip(), VALUE_LETTERS)
    return f"{words}, line {mark.line + 1}: {line}"


def _check_size(text: str) -> None:
    """Refuse what would be too much to build, by the parser's events.

    A node is (values in it, levels in it); those with an anchor are kept for the aliases that name them.
    """
    anchored: dict[str, tuple[int, int] | None] = {}
    open_nodes: list[tuple[str | None, int, int]] = [(None, 0, 0)]
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            known = anchored.get(event.anchor or "", (0, 0))  # an unknown one is the loader's to refuse
            if known is None:
                raise ValueError(f"*{event.anchor} stands inside itself{_place(event)}")
            size = known
        elif isinstance(event, yaml.ScalarEvent):
            size = (1, 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, 1, 1))
            anchored |= {event.anchor: None} if event.anchor else {}
            size = (0, 0)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, *values_and_levels = open_nodes.pop()
            size = (values_and_levels[0], values_and_levels[1])
            anchored |= {anchor: size} if anchor else {}
        else:
            continue
        _check_event(event, size, len(open_nodes))
        anchor, values, levels = open_nodes[-1]
        open_nodes[-1] = (anchor, values + size[0], max(levels, size[1] + 1))


def _check_event(event: Any, size: tuple[int, int], depth: int) -> None:
    """Refuse a tag, or a node of `size` that stands `depth` levels down."""
    if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag not in (None, "!"):
        raise ValueError(f"tags such as {event.tag} are not read{_place(event)}")
    if depth + size[1] > MAX_DEPTH:
        raise ValueError(f"nested over {MAX_DEPTH} levels deep{_place(event)}")
    if size[0] > MAX_VALUES:
        raise ValueError(f"over {MAX_VALUES:,} values, with aliases followed{_place(event)}")


def _place(event: Any) -> str:
    return f", line {event.start_mark.line + 1}"
