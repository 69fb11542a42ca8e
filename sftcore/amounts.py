"""Numbers, durations, sizes and work as people say them; the one place that writes them.

In: counts, seconds, bytes, floating point operations. Out: "1 step", "1 h 02 min", "3.6 GB", "2.8 PFLOP".
Invariant: no exponents, whatever the number; what is shown is rounded once, so 59.6 s are "1 min 00 s".
Trade-off: two or three digits: who wants more reads the JSON files, which hold seconds and bytes.
"""

from __future__ import annotations

import math

MINUTE, HOUR, DAY = 60, 3600, 86400
_BYTES = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
_FLOP = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP", "YFLOP")
STEP = 1000  # from one unit to the next


def counted(number: int, noun: str) -> str:
    """So many things of a kind.

    Args:
        noun: in the singular.

    >>> counted(1, "step"), counted(0, "step"), counted(12345, "batch"), counted(2, "reply")
    ('1 step', '0 steps', '12,345 batches', '2 replies')
    """
    return f"{number:,} {noun if number == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """More than one of them.

    >>> plural("process"), plural("training fact"), plural("day")
    ('processes', 'training facts', 'days')
    """
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}es" if noun.endswith(("s", "x", "tch", "sh")) else f"{noun}s"  # but: epochs


def rate(value: float) -> str:
    """A learning rate or another small number, to three digits, without an exponent.

    >>> rate(1e-5), rate(2.5e-4), rate(0), rate(0.1), rate(1.23456e-7)
    ('0.00001', '0.00025', '0', '0.1', '0.000000123')
    """
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    text = f"{value:.{max(0, digits)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def duration(seconds: float) -> str:
    """A time span.

    >>> [duration(seconds) for seconds in (0, 1e-4, 0.34, 45.2, 59.6, 200, 3720, 200_000, 1e9)]
    ['0 s', 'under 0.1 s', '0.3 s', '45 s', '1 min 00 s', '3 min 20 s', '1 h 02 min', '2 d 8 h', '11,574 d']
    """
    if seconds < 0.1:
        return "under 0.1 s" if seconds > 0 else "0 s"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < MINUTE:
        return f"{whole} s"
    if whole < 10 * MINUTE:
        return f"{whole // MINUTE} min {whole % MINUTE:02d} s"
    minutes = round(seconds / MINUTE)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < DAY // MINUTE:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / HOUR)
    days = hours // 24
    return f"{days} d {hours % 24} h" if days < 100 else f"{days:,} d"


def size(num_bytes: float, *, against: float | None = None) -> str:
    """Bytes, in powers of 1,000.

    Args:
        against: another size that this one is added to or compared with: in its unit, with one more digit.

    >>> size(0), size(512), size(3.6e9), size(139.2e9), size(999_960), size(2.7e8, against=2.1e9)
    ('0 B', '512 B', '3.6 GB', '139 GB', '1.0 MB', '0.27 GB')
    """
    return _scaled(num_bytes, _BYTES, against)


def work(flop: float) -> str:
    """Floating point operations.

    >>> work(2.79e15), work(8.4e9)
    ('2.8 PFLOP', '8.4 GFLOP')
    """
    return _scaled(flop, _FLOP, None)


def _scaled(value: float, units: tuple[str, ...], against: float | None) -> str:
    unit, scaled = 0, abs(value if against is None else against)
    while round(scaled, 1 if scaled < 100 else 0) >= STEP and unit < len(units) - 1:
        unit, scaled = unit + 1, scaled / STEP
    shown = value / STEP**unit
    if unit == 0:
        return f"{shown:,.0f} {units[0]}"
    digits = (0 if abs(shown) >= 100 else 1) + (against is not None)
    text = f"{shown:,.{digits}f}"
    if against is None and abs(shown) >= 10:
        text = text.removesuffix(".0")
    return f"{text} {units[unit]}"
