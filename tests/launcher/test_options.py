"""Groups of options: each field is an option of its own, in its place, and comes back in its group."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from sftcore.errors import UserInputError
from sftcore.launcher.options import Place, Ranks, Shares, Slurm, spread

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True, kw_only=True)
class Inner:
    depth: Annotated[int, typer.Option(min=1)] = 1


@dataclass(frozen=True, kw_only=True)
class Outer:
    first: bool = False
    inner: Inner = Inner()
    last: Annotated[list[str] | None, typer.Option("--last-of")] = None


def run(*words: str) -> tuple[int, list]:
    """Exit code, and what the command was given."""
    given: list = []
    app = typer.Typer()

    @app.command()
    @spread
    def command(name: str, group: Outer, *, then: int = 3) -> None:
        """Help."""
        given.extend([name, group, then])

    assert list(signature(spread(command)).parameters) == ["name", "first", "depth", "last", "then"]
    return CliRunner().invoke(app, list(words)).exit_code, given


def test_fields_of_groups_are_options_in_their_place():
    assert run("a") == (0, ["a", Outer(), 3])
    code, given = run("a", "--first", "--depth", "2", "--last-of", "x", "--last-of", "y", "--then", "4")
    assert (code, given) == (0, ["a", Outer(first=True, inner=Inner(depth=2), last=["x", "y"]), 4])
    assert run("a", "--depth", "0")[0] == 2, "checked as a command's own"


def test_two_groups_with_one_name_are_refused_when_the_program_starts():
    def command(one: Shares, two: Shares) -> None: ...

    with pytest.raises(ValueError, match="duplicate parameter name"):
        spread(command)


def test_a_place_checks_its_options():
    slurm = Slurm(cpus_per_rank=2, sbatch=["exclusive", "--mem=4G"], partition="long")
    expected = {"cpus-per-task": "2", "partition": "long", "exclusive": "", "mem": "4G"}
    machines = Place(on="slurm", ranks=Ranks(gpus_per_node=2), slurm=slurm).machines()
    assert machines.options == expected and machines.gpus_per_node == 2
    with pytest.raises(UserInputError, match="not with --on debug"):
        Place(slurm=slurm).machines()


def test_no_command_has_more_than_six_parameters():
    functions = [
        node
        for file in (ROOT / "launcher").glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    assert len(functions) > 100
    wide = [f.name for f in functions if len(f.args.args) + len(f.args.kwonlyargs) > 6]
    assert wide == []
