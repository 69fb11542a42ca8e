"""The alias table: names that mean the same, and longer phrases in which they mean something else.

In: a TSV file, `canonical<TAB>alias|alias|!near miss` a line. Out: rows found by any of their names.
Invariant: no name stands in two rows, so that what counts for an answer never depends on their order.
Trade-off: a name that means several things stays out of the table (Georgia, New York for the city), which
loses some hits rather than counting wrong ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sftcore.errors import Problem, UserInputError
from sftcore.fsio import fingerprint_of
from sftcore.knowledge.spelling import normalise

ALIASES_PATH = Path(__file__).parent.parent / "assets" / "aliases.tsv"
HEADER = "canonical\taliases"
NEAR_MISS_MARK = "!"
MIN_NAME_LENGTH = 2  # characters of an alias


@dataclass(frozen=True, kw_only=True, slots=True)
class AliasRow:
    """One row of the alias table.

    Args:
        names: canonical name first, then its aliases; each stands for all the others.
        near_misses: longer phrases in which a name of this row means something else.
    """

    names: tuple[str, ...]
    near_misses: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AliasTable:
    """Rows of names that mean the same, found by any of their names.

    Args:
        rows: normalised name -> its row; every name of a row is a key.
    """

    rows: Mapping[str, AliasRow]

    @classmethod
    def load(cls, path: Path = ALIASES_PATH) -> AliasTable:
        """Read a table: a header, then `canonical<TAB>alias|alias|!near miss` a line.

        Raises:
            UserInputError: with every line that is malformed or repeats a name of another line.
        """
        lines = path.read_text(encoding="utf-8").splitlines()
        problems = [] if lines[:1] == [HEADER] else [_wrong_header(path, lines)]
        rows: dict[str, AliasRow] = {}
        for number, line in enumerate(lines[1:], start=2):
            row = _parse_row(line)
            keys = {normalise(name) for name in row.names}
            faults = [
                *_row_faults(row),
                *(f"'{key}' stands in an earlier line too" for key in keys & rows.keys()),
            ]
            problems += [Problem(what=fault, where=f"{path}:{number}", got=line) for fault in sorted(faults)]
            rows.update(dict.fromkeys(keys, row))
        if problems:
            raise UserInputError(*problems)
        return cls(rows=rows)

    def row_of(self, answer: str) -> AliasRow:
        """The row that lists `answer`, or a row of `answer` alone."""
        return self.rows.get(normalise(answer), AliasRow(names=(answer,), near_misses=()))

    def fingerprint(self) -> str:
        """Identity of what the table says, for the manifests of what was judged with it."""
        return fingerprint_of({name: [row.names, row.near_misses] for name, row in self.rows.items()})


def _wrong_header(path: Path, lines: Sequence[str]) -> Problem:
    return Problem(what="wrong header", where=f"{path}:1", got=repr(lines[:1]), allowed=repr(HEADER))


def _parse_row(line: str) -> AliasRow:
    """`Mexico<TAB>México|!New Mexico` -> names (Mexico, México), near misses (New Mexico,)."""
    canonical, _, aliases = line.partition("\t")
    items = aliases.split("|")
    names = (canonical, *(item for item in items if not item.startswith(NEAR_MISS_MARK)))
    return AliasRow(
        names=names, near_misses=tuple(item[1:] for item in items if item.startswith(NEAR_MISS_MARK))
    )


def _row_faults(row: AliasRow) -> Iterator[str]:
    """What is wrong with one row taken by itself."""
    if len(row.names) < 2:
        yield "a row needs a canonical name and at least one alias"
    for name in row.names:
        if len(name.strip()) < MIN_NAME_LENGTH or name != name.strip():
            yield f"name '{name}' is shorter than {MIN_NAME_LENGTH} characters or has spaces around it"
    for phrase in row.near_misses:
        if not any(normalise(name) in normalise(phrase) for name in row.names):
            yield f"near miss '{phrase}' holds no name of its row"
