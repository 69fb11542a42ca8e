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

from sftcore.errors import Problem, UserInputError
from sftcore.paths import file_fault

MAX_BYTES = 2**20  # our longest file has 4 kB
MAX_DEPTH = 30  # a recipe's deepest key stands at 7
MAX_VALUES = 100_000
MAX_DIGITS = 40
INT = "tag:yaml.org,2002:int"


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-5 as a number (YAML 1.1 wants 1.0e-5) and refuses a key given twice."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """A node's value; dates and numbers that are none are told with their line."""
        if node.tag == INT and len(node.value) > MAX_DIGITS:
            what = f"a whole number of {len(node.value):,} digits"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark)
        try:
            return super().construct_object(node, deep)
        except (ValueError, ArithmeticError) as error:
            what = f"can't be read: {error}"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            value = "<<" if key.tag == "tag:yaml.org,2002:merge" else self.construct_object(key, deep=True)
            if not isinstance(value, str | int | float | bool | None):
                raise yaml.constructor.ConstructorError(
                    None, None, f"a key must be a name, not a {type(value).__name__}", key.start_mark
                )
            if value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {value!r} given twice", node.start_mark
                )
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
        raise UserInputError(Problem(what=f"not valid YAML: {error}", where=str(path))) from error


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
        raise ValueError(str(error)) from error


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
