"""Commands for the first five minutes: recipes to look at, and one written for a file of your own.

In: a data file and a model. Out: a recipe with comments, which `sftcore plan` takes as it is.
Invariant: what is written was read before: the first rows went through the readers that training uses.
Trade-off: defaults that fit most (8 samples a step, 3 epochs, the default rate of its kind of training)
rather than questions; each stands in the file with what it means.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml

from sftcore.data.ledger import printable
from sftcore.errors import Problem, UserInputError
from sftcore.fsio import atomic_file

RECIPES = Path(__file__).parent.parent / "recipes"
Kind = Literal["chat", "facts", "pairs"]
TELLS = {
    "qa": "question answering, or prompts with completions",
    "chat": "chats through the model's template; all assistant turns are trained",
    "matching": "do two texts mean the same?",
}
EPOCHS = 3
NAME_LETTERS = 50


def recipes(
    name: Annotated[str | None, typer.Argument(help="print this one", metavar="NAME")] = None,
) -> None:
    """List the shipped recipes and studies, or print one: `sftcore recipes NAME > mine.yaml`."""
    files = {file.stem: file for file in sorted(RECIPES.glob("*.yaml"), key=lambda file: file.stem)}
    if name is None:
        width = max(map(len, files))
        for stem, file in files.items():
            print(f"{stem:<{width}}  {_first_comment(file)}")
        return
    stem = name.removesuffix(".yaml")
    if stem not in files:
        raise UserInputError(Problem(what="no shipped recipe", got=name, allowed=", ".join(files)))
    print(files[stem].read_text(encoding="utf-8"), end="")


def _first_comment(file: Path) -> str:
    """The first sentence of a recipe's comment."""
    text = file.read_text(encoding="utf-8")
    comment = " ".join(line.removeprefix("#").strip() for line in re.findall(r"^#.*$", text, flags=re.M))
    return textwrap.shorten(re.split(r"(?<=[.])\s", comment, maxsplit=1)[0], 100, placeholder=" ...")


def init(
    data: Annotated[Path, typer.Option(metavar="FILE", help="training rows: JSON lines, a table, Parquet")],
    model: Annotated[str, typer.Option(metavar="M", help="a model folder, or a hub name")],
    kind: Annotated[Kind | None, typer.Argument(help="what it holds, if that can't be known")] = None,
    test: Annotated[Path | None, typer.Option(metavar="FILE", help="held-out rows of the same form")] = None,
    to: Annotated[Path | None, typer.Option(metavar="FILE", help="the recipe; NAME-OF-DATA.yaml")] = None,
) -> None:
    """Write a recipe for a file of yours: columns are found by reading, each key is explained."""
    from sftcore.data.sniff import guess_source, require_rows

    target = to or Path(f"{_name_of(data)}.yaml")
    if target.exists():
        remedy = "give another name: --to FILE"
        raise UserInputError(Problem(what="a file of this name is there", where=str(target), remedy=remedy))
    guess = guess_source(data, kind)
    if test:
        require_rows(test, guess)
    is_here = target.resolve().parent == Path.cwd()  # else a file of this name next to the recipe would win
    if not is_here:
        data, test = data.resolve(), test and test.resolve()
    text = _recipe_text(guess, data=data, test=test, model=model)
    with atomic_file(target) as handle:
        handle.write(text)
    read = f"{guess.num_records} of the first {guess.num_rows} rows of {printable(str(data))}"
    print(f"{target}: {read} are {_noun(guess)}")
    if guess.ignored:
        print(f"left out on purpose: {', '.join(guess.ignored)} (columns.ignore)")
    print(f"next: sftcore inspect {target}; sftcore plan {target}; sftcore train {target}")


def _name_of(data: Path) -> str:
    stem = data.name.removesuffix(".gz").rsplit(".", 1)[0]
    return re.sub(r"[^\w-]+", "-", stem)[:NAME_LETTERS].strip("-") or "mine"


def _noun(guess: Any) -> str:
    if guess.task == "qa":
        return "prompts with completions" if guess.source["format"] == "jsonl" else "facts"
    return {"chat": "chats", "matching": "pairs"}[guess.task]


def _recipe_text(guess: Any, *, data: Path, test: Path | None, model: str) -> str:
    """The recipe, as a person would write it."""
    held_out = _source(guess, test) if test else ""
    name = printable(data.name)
    lines = [
        f"# For {name}: {guess.num_records} of its first {guess.num_rows} rows are {_noun(guess)}.",
        "# All keys, defaults and values: docs/recipe.md, or `sftcore schema --markdown`.",
        f"name: {_scalar(_name_of(data))}    # the run goes to runs/NAME",
        f"model: {{path: {_scalar(model)}, dtype: auto}}    # a folder, or a hub name",
        f"task: {guess.task}    # {TELLS[guess.task]}",
        "adapter: {kind: none}    # all weights; lora or qlora for less memory",
        "data:",
        f"  train: [{_source(guess, data)}]",
        f"  test: [{held_out}]    # held-out rows, for `sftcore evaluate`",
        "batch: {samples_per_step: 8, capacity: 4096}    # 8 samples an optimizer step, over all GPUs",
        f"train: {{epochs: {EPOCHS}, lr: auto, warmup_ratio: 0.03}}    # auto: adapters get a higher one",
        "deepspeed: zero1    # `sftcore plan` says which of them fit",
        "checkpoint: {save_every_steps: 50, keep: 2}",
    ]
    if guess.source["format"] in ("facts", "entityquestions"):
        lines.append("# after `sftcore probe`: train on 60 facts of memory level 2 (docs/memory-levels.md)")
        lines.append("# select: {levels: [2], n: 60, balance: relation}")
    return "\n".join(lines) + "\n"


def _source(guess: Any, file: Path) -> str:
    """One source in YAML's flow style."""
    values = {**guess.source, "path": str(file)}
    if "preset" in values:
        del values["format"]
    return yaml.safe_dump(
        values, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False
    ).strip()


def _scalar(text: str) -> str:
    return yaml.safe_dump([text], default_flow_style=True, width=10**6, allow_unicode=True).strip()[1:-1]
