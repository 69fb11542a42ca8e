"""The stages of a run, a row each; run, submit, claim, reuse between runs and the report read them here.

In: nothing. Out: `STAGES`, in the order in which a run takes them.
Invariant: a recipe key that no row spares counts for the trained weights, so a new section of the recipe is
refused on a run folder that has begun until a row says otherwise.
Trade-off: a row names its function by text, so that the table needs no torch (an import of 5 s); mypy can't
follow the text, a test does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from sftcore.config import Recipe

NUMBERLESS = (  # change no number of a run; what a teacher wrote is data of its own
    "run",
    "tracking",
    "checkpoint",
    "train.hang_seconds",
    "matching.teacher",
)
EVERY_KEY = ("*",)
HELD_OUT = ("data.test", "data.ood")


@dataclass(frozen=True, slots=True)
class Named:
    """A function that is imported when it is called first.

    Args:
        place: "module:function".
    """

    place: str

    def resolve(self) -> Callable[..., Any]:
        """The function itself."""
        module, _, name = self.place.partition(":")
        found: Callable[..., Any] = getattr(import_module(module), name)
        return found

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.resolve()(*arguments, **options)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage of a run.

    Args:
        name: of its command, too, if it has one.
        run: recipe (or, of `takes` "folder", the run folder) -> result.
        keys: of the recipe, dotted, that its files depend on; `EVERY_KEY`: all but those of `NUMBERLESS`.
        spares: of these, keys that don't count.
        until_done: of these, keys that count only until its last file is there.
        files: patterns in the run folder; one file tells that the stage has begun.
        under_other_keys: its files are kept, and such a recipe "refused"; or "made again"; or they tell
            nothing of the run's state and are "ignored".
        finished: patterns of what is finished for good, perhaps a part, for counting a job's progress.
        folders: patterns of the folders in which it writes files by rename.
        common: names of the results that runs of a study share, if their recipes agree in `keys`.
        is_wanted: whether a recipe asks for it.
        within: the stage that does this one, if it was not done before.
        has_command: whether it can be done alone.
        share: (recipe, a job's share) -> what was done, of a stage that jobs can share.
        by_ranks: it runs as one process a GPU that work together.
        takes: what `run` and its command are given.
    """

    name: str
    run: Callable[..., Any]
    keys: tuple[str, ...] = EVERY_KEY
    spares: tuple[str, ...] = ()
    until_done: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    under_other_keys: Literal["refused", "made again", "ignored"] = "refused"
    finished: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    common: tuple[str, ...] = ()
    is_wanted: Callable[[Recipe], bool] = lambda recipe: True
    within: str = ""
    has_command: bool = True
    share: Callable[..., str] | None = None
    by_ranks: bool = False
    takes: Literal["recipe", "folder"] = "recipe"

    def has_begun(self, run: Path) -> bool:
        """Whether the run folder holds a file of this stage."""
        return any(True for pattern in self.files for _ in run.glob(pattern))

    def depends_on(self, key: str) -> bool:
        """Whether its files would be others if a dotted key had another value."""
        if is_within(key, (*NUMBERLESS, *self.spares)):
            return False
        return self.keys == EVERY_KEY or is_within(key, self.keys)

    def refuses(self, key: str, *, is_done: bool) -> bool:
        """Whether files that it has begun bind a key to its value."""
        is_over = is_done and is_within(key, self.until_done)
        return self.under_other_keys == "refused" and self.depends_on(key) and not is_over

    @property
    def sections(self) -> list[str]:
        """The recipe's sections that hold `keys`, in their order."""
        return list(dict.fromkeys(key.partition(".")[0] for key in self.keys))


def is_within(key: str, sections: Sequence[str]) -> bool:
    """Whether a dotted key is one of these or below one.

    >>> is_within("data.test", HELD_OUT), is_within("data.tests", HELD_OUT)
    (True, False)
    """
    return any(key == section or key.startswith(f"{section}.") for section in sections)


PROBED = ("data.train", "data.trivial_facts", "data.relations", "probe", "seed", "model")
ROWS = (
    Stage(
        name="probe",
        run=Named("sftcore.stages.prepare:probe"),
        share=Named("sftcore.stages.prepare:probe_share"),
        keys=PROBED,
        files=("levels.*", "shards/*"),
        finished=("levels.manifest.json",),
        folders=("shards/*",),
        common=("levels",),
        is_wanted=lambda recipe: recipe.selects_by_level,
    ),
    Stage(
        name="select",
        run=Named("sftcore.stages.prepare:select"),
        keys=(*PROBED, "select", "task", "matching"),
        files=("selection.jsonl",),
        under_other_keys="ignored",  # drawn again by each prepare
        is_wanted=lambda recipe: recipe.select is not None,
        within="prepare",
        has_command=False,
    ),
    Stage(
        name="prepare",
        run=Named("sftcore.stages.prepare:prepare"),
        share=Named("sftcore.stages.prepare:prepare_share"),
        under_other_keys="ignored",  # a store's folder is named by its content
        within="train",
    ),
    Stage(
        name="train",
        run=Named("sftcore.stages.train:train_recipe"),
        spares=("evaluate",),
        until_done=HELD_OUT,  # training leaves out what they ask
        files=("metrics.jsonl", "checkpoints/*", "best", "model", "adapter"),
        finished=("model", "adapter"),
        folders=("checkpoints",),
        by_ranks=True,
    ),
    Stage(
        name="evaluate",
        run=Named("sftcore.stages.evaluate:evaluate"),
        share=Named("sftcore.stages.evaluate:evaluate_share"),
        keys=(*PROBED, "task", "matching", "evaluate", "batch", *HELD_OUT),
        files=("eval/*",),
        under_other_keys="made again",
        finished=("eval/*/manifest.json", "eval/*/shards/*/manifest.json"),
        folders=("eval", "eval/*"),
        common=("base", "fewshot"),
        is_wanted=lambda recipe: bool(recipe.data.test or recipe.data.ood),
    ),
    Stage(
        name="report",
        run=Named("sftcore.stages.report:report"),
        files=("report.*",),
        under_other_keys="ignored",
        takes="folder",
    ),
)
STAGES = {row.name: row for row in ROWS}


def wanted(recipe: Recipe) -> Iterator[Stage]:
    """The stages that a recipe asks for, in order."""
    return (stage for stage in STAGES.values() if stage.is_wanted(recipe))


def commands() -> list[str]:
    """Names of the commands that do one stage."""
    return [stage.name for stage in STAGES.values() if stage.has_command]


def begun(run: Path) -> list[Stage]:
    """The stages whose files tell that a run folder is in use."""
    return [s for s in STAGES.values() if s.under_other_keys != "ignored" and s.has_begun(run)]


def rescored_keys() -> tuple[str, ...]:
    """Keys that change scores, which are made again, but not the weights that are there."""
    train = STAGES["train"]
    return (*train.spares, *train.until_done)


def command_of(stage: Stage) -> str:
    """The command that a run does a stage with: its own, or that of the stage around it."""
    while stage.within:
        stage = STAGES[stage.within]
    return stage.name


def maker_of(file: str) -> str:
    """The command that makes a file of the run folder.

    >>> maker_of("levels.jsonl"), maker_of("selection.jsonl"), maker_of("eval/base/scores.json")
    ('probe', 'train', 'evaluate')
    """
    parents = [Path(file), *Path(file).parents]
    for stage in STAGES.values():
        if any(parent.match(pattern) for pattern in stage.files for parent in parents):
            return command_of(stage)
    return STAGES["train"].name
