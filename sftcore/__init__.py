"""sftcore: find out what a base model remembers, then fine-tune it on exactly the data that pays.

In: `from sftcore import load_recipe, probe, train, evaluate, ...`. Out: the functions that commands call.
Invariant: `import sftcore` takes milliseconds and no torch; a function brings what it needs when it is used.
Trade-off: packages such as `sftcore.train` have names of functions; these can be called like the functions,
so that a name is one object whichever was imported first.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sftcore.batching.packing import pack
    from sftcore.planning.outlook import plan
    from sftcore.runs.load import load_recipe
    from sftcore.stages.evaluate import evaluate
    from sftcore.stages.generate import generate
    from sftcore.stages.prepare import prepare, probe, select
    from sftcore.stages.report import report
    from sftcore.stages.train import train_recipe as train

__all__ = [
    "evaluate",
    "generate",
    "load_recipe",
    "pack",
    "plan",
    "prepare",
    "probe",
    "report",
    "select",
    "train",
]
PLACES = {
    "evaluate": "sftcore.stages.evaluate",
    "generate": "sftcore.stages.generate",
    "load_recipe": "sftcore.runs.load",
    "pack": "sftcore.batching.packing",
    "plan": "sftcore.planning.outlook",
    "prepare": "sftcore.stages.prepare",
    "probe": "sftcore.stages.prepare",
    "report": "sftcore.stages.report",
    "select": "sftcore.stages.prepare",
    "train": "sftcore.stages.train:train_recipe",
}


def _function(name: str) -> Any:
    module, _, function = PLACES[name].partition(":")
    return vars(import_module(module))[function or name]


class _Callable(ModuleType):
    """A package of ours that is called like the function of its name."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return _function(self.__name__.rpartition(".")[2])(*arguments, **options)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name in PLACES and isinstance(value, ModuleType):  # Python has imported a package of ours
            value.__class__ = _Callable
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    is_package = find_spec(f"{__name__}.{name}") is not None
    return import_module(f"{__name__}.{name}") if is_package else _function(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
