"""Whether the hub of models can be reached, asked once, before anything waits for it.

In: recipes, or names of models. Out: nothing; without a network the process goes on with what is cached, or
one message.
Invariant: a hub that can't be reached costs `TIMEOUT_SECONDS` at most; huggingface_hub by itself tries again
for 50 s for each file, with two lines a try (measured with 1.x, December 2026).
Trade-off: any answer below 500 counts as reached, so a hub that refuses us (401, 404) is asked again by
huggingface_hub, which doesn't try twice then.
"""

from __future__ import annotations

import logging
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable
from http.client import HTTPException
from pathlib import Path
from typing import Any

from sftcore.catalogue import how_to_pull
from sftcore.config import Recipe
from sftcore.errors import MissingEnvironmentError, Problem
from sftcore.recipe import HUB_PREFIX

log = logging.getLogger("sftcore.hub")
TIMEOUT_SECONDS = 5.0
OFFLINE = "HF_HUB_OFFLINE"
ENDPOINT = "https://huggingface.co"


def require_hub(recipes: Iterable[Recipe]) -> None:
    """Go offline if models or data of recipes come from the hub and it can't be reached.

    Raises:
        MissingEnvironmentError: as `require_models`.
    """
    found = list(recipes)
    sections = [(each.data.train, each.data.valid, each.data.test, each.data.ood) for each in found]
    paths = [source.path for section in sections for sources in section for source in sources]
    is_data_there = not any(path.startswith(HUB_PREFIX) for path in paths)
    require_models([recipe.model.path for recipe in found], offline_anyway=not is_data_there)


def require_models(paths: Iterable[str], *, offline_anyway: bool = False) -> None:
    """Go offline if models come from the hub and it can't be reached.

    Args:
        paths: folders, which need no hub, and hub names.
        offline_anyway: something else, of which a cache knows whether it is there, comes from the hub.

    Raises:
        MissingEnvironmentError: offline, and models are not cached; all such.
    """
    names = sorted({path for path in paths if not os.path.exists(path)})
    why = why_unreachable() if names or offline_anyway else ""
    if not why:
        return
    if missing := [name for name in names if not _is_cached(name)]:
        raise MissingEnvironmentError(*(_not_there(name, why) for name in missing))
    log.info("%s: only what is cached is used", why)
    _go_offline()


def _not_there(name: str, why: str) -> Problem:
    remedy = f"where there is a network: {how_to_pull(name)}; or give a model folder"
    return Problem(what=f"this model is not cached, and {why}", where="model.path", got=name, remedy=remedy)


def why_unreachable() -> str:
    """Empty if the hub answers."""
    if os.environ.get(OFFLINE, "").upper() in ("1", "ON", "YES", "TRUE"):
        return f"{OFFLINE} is set"
    endpoint = os.environ.get("HF_ENDPOINT", ENDPOINT)
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError as error:
        return f"the hub ({endpoint}) answers {error.code}" if error.code >= 500 else ""
    except urllib.error.URLError as error:
        return f"the hub ({endpoint}) can't be reached: {_in_words(error.reason)}"
    except (OSError, ValueError, HTTPException) as error:
        return f"the hub ({endpoint}) can't be reached: {_in_words(error)}"
    return ""


def _in_words(error: BaseException | str) -> str:
    """Without the error's number: "Name or service not known"."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _is_cached(name: str) -> bool:
    """Whether a file of a model is in huggingface_hub's cache."""
    home = Path(os.environ.get("HF_HOME", Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")))
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    return any((cache / f"models--{name.replace('/', '--')}" / "snapshots").glob("*/*"))


def _go_offline() -> None:
    """For what is imported from now on, for processes to come, and for huggingface_hub if it is there."""
    os.environ[OFFLINE] = "1"
    constants: Any = sys.modules.get("huggingface_hub.constants")
    if constants is not None:
        constants.HF_HUB_OFFLINE = True
