"""The README speaks the truth: its commands, files and recipe exist; so do scripts and tables."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import typer
import yaml

from launcher.cli import app
from sftcore.config import Recipe
from sftcore.recipe import DS_CONFIGS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"`(sftcore [^`]+)`", README)))


def options_of(name: str) -> set[str]:
    command = typer.main.get_command(app)
    for part in name.split():
        command = command.commands[part]
    return {option for parameter in command.params for option in parameter.opts}


@pytest.mark.parametrize("line", COMMANDS)
def test_each_command_exists_with_its_options(line):
    words = line.split()[1:]
    name = " ".join(words[:2]) if words[0] == "model" else words[0]
    options = options_of(name)
    assert {word for word in words if word.startswith("--")} <= options


def test_the_command_table_is_complete():
    group = typer.main.get_command(app)
    names = {n if n != "model" else "model pull" for n in group.commands}
    assert len(COMMANDS) > 8
    assert {" ".join(c.split()[1:3]) if "model" in c else c.split()[1] for c in COMMANDS} >= names


def test_make_targets_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`", README, flags=re.M))
    assert {"quickstart", "test"} <= {a or b for a, b in targets}
    for target in {a or b for a, b in targets}:
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
    dry = subprocess.run(["make", "-n", "help"], cwd=ROOT, capture_output=True, text=True)
    assert dry.returncode == 0


def test_links_and_named_files_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
    for path in re.findall(r"(?:recipes|launcher|sftcore/assets|ds_configs)/[\w./-]+", README):
        assert (ROOT / path.rstrip(".")).exists(), path


def test_the_recipe_in_the_readme_is_valid():
    text = re.search(r"```yaml\n(.*?)```", README, flags=re.S).group(1)
    recipe = Recipe.model_validate(yaml.safe_load(text))
    assert recipe.select.n == 60


def test_every_ds_config_stands_in_its_table():
    table = (DS_CONFIGS / "README.md").read_text(encoding="utf-8")
    for file in DS_CONFIGS.glob("*.json"):
        assert f"| `{file.stem}` |" in table


@pytest.mark.parametrize(
    "script", sorted(p for p in [ROOT / ".ci" / "run", *ROOT.rglob("slurm/*.s*")]), ids=lambda p: p.name
)
def test_shell_scripts_parse(script):
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
