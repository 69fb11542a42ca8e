"""Arrow's values as Python's, whatever one of them holds.

In: a record batch or table. Out: its rows as objects.
Invariant: one bad value (bytes that are not UTF-8, a day after the year 9999), however deep in lists,
structs, maps or dictionaries, costs its row: texts keep it as lone surrogates, which checks of texts find,
others as an `Unreadable`, which is of no type that anything reads.
Trade-off: batches are converted by Arrow itself (1 microsecond a value); only one that fails is walked value
by value (10 microseconds each).
"""

from __future__ import annotations

from typing import Any


class Unreadable:
    """Stands for a value that Python has no object for."""

    def __init__(self, why: Exception) -> None:
        self._why = str(why).split("\n")[0]

    def __repr__(self) -> str:
        return f"<unreadable: {self._why}>"


def python_rows(table: Any) -> list[dict[str, Any]]:
    """The rows of a record batch or table."""
    import pyarrow as pa

    try:
        rows: list[dict[str, Any]] = table.to_pylist(maps_as_pydicts="strict")
    except (ValueError, ArithmeticError, LookupError, pa.ArrowException):
        columns = [[_value(scalar) for scalar in column] for column in table.columns]
        return [dict(zip(table.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]
    return rows


def _value(scalar: Any) -> Any:
    """A scalar's value, its parts one by one where it can't be had at once."""
    import pyarrow as pa

    if not scalar.is_valid:
        return None
    try:
        return _parts(scalar)
    except (ValueError, ArithmeticError, LookupError, pa.ArrowException) as error:
        return Unreadable(error)


def _parts(scalar: Any) -> Any:
    import pyarrow as pa

    kind = scalar.type
    if pa.types.is_dictionary(kind) or isinstance(scalar, pa.ExtensionScalar):
        return _value(scalar.value)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return scalar.as_buffer().to_pybytes().decode(errors="surrogateescape")
    if pa.types.is_struct(kind):
        return {field.name: _value(scalar[i]) for i, field in enumerate(kind)}
    if pa.types.is_map(kind):
        pairs = [_value(entry) for entry in scalar.values]
        return {pair[kind.key_field.name]: pair[kind.item_field.name] for pair in pairs}
    if isinstance(scalar, pa.ListScalar):  # of every kind: large, of fixed size, views
        return [_value(item) for item in scalar.values]
    return scalar.as_py()
