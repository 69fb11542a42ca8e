"""The HTML templates of all pages, filled: everything is escaped, an absent value is an error.

In: a template's name, values. Out: HTML.
Invariant: one environment with one set of filters; what is no text (figures) comes as `Markup`.
Trade-off: a new environment a page (2 ms), rather than one that lives as long as the process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2

from sftcore.amounts import counted, duration
from sftcore.study.wording import (
    flatten,
    format_interval,
    format_points,
    format_relation,
    format_setting,
    format_share,
    format_value,
    tie_numbers,
)

FILTERS: dict[str, Callable[..., Any]] = {
    "counted": counted,
    "duration": duration,
    "flat": flatten,
    "interval": format_interval,
    "points": format_points,
    "relation": format_relation,
    "setting": format_setting,
    "share": format_share,
    "tie": tie_numbers,
    "value": format_value,
}


def render(name: str, values: Mapping[str, Any], **filters: Callable[..., Any]) -> str:
    """A page.

    Args:
        name: of the template in this folder.
        filters: the page's own, besides `FILTERS`.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS | filters
    return environment.get_template(name).render(values)
