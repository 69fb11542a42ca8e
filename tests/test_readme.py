"""README and the pages of docs/ are true: commands, files, recipes and cited pages exist; scripts parse."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import typer
import yaml

from sftcore.config import Recipe
from sftcore.launcher.cli import app
from sftcore.recipe import DS_CONFIGS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    page: page.read_text(encoding="utf-8")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
BLOCKS = re.findall(r"^```\n(.*?)^```", "\n".join(PAGES.values()), flags=re.M | re.S)
COMMANDS = sorted({found for text in PAGES.values() for found in re.findall(r"`(sftcore [^`]+)`", text)})
FENCED = sorted(
    {line.partition("#")[0].strip() for line in "\n".join(BLOCKS).splitlines() if line.startswith("sftcore ")}
)


def options_of(name: str) -> set[str]:
    command = typer.main.get_command(app)
    for part in name.split():
        command = command.commands[part]
    return {option for parameter in command.params for option in parameter.opts}


@pytest.mark.parametrize("line", [*COMMANDS, *FENCED])
def test_each_command_exists_with_its_options(line):
    words = line.split()[1:]
    name = " ".join(words[:2]) if words[0] == "model" else words[0]
    options = options_of(name)
    assert {word for word in words if word.startswith("--")} <= options


def test_the_command_table_is_complete():
    group = typer.main.get_command(app)
    names = {n if n != "model" else "model pull" for n in group.commands}
    table = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `sftcore ([^`]+)`", table, flags=re.M)
    assert len(listed) > 8
    assert {" ".join(c.split()[:2]) if c.startswith("model ") else c.split()[0] for c in listed} == names


def test_make_targets_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`", README, flags=re.M))
    assert {"quickstart", "test"} <= {a or b for a, b in targets}
    for target in {a or b for a, b in targets}:
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
    dry = subprocess.run(["make", "-n", "help"], cwd=ROOT, capture_output=True, text=True)
    assert dry.returncode == 0


def test_links_and_named_files_exist():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), (page.name, target)
        for path in re.findall(r"(?<![\w/])(?:recipes|launcher|sftcore/assets|ds_configs)/[\w./-]+", text):
            assert (ROOT / path.rstrip(".")).exists(), (page.name, path)


def test_every_page_that_code_cites_is_in_the_repository():
    files = [file for top in ("sftcore", "launcher") for file in (ROOT / top).rglob("*.py")]
    page = re.compile(r"\b(?:docs|benchmarks|ds_configs|slurm)/[\w-]+\.md\b|\b[A-Z]+\.md\b")
    cited = {(file, name) for file in files for name in page.findall(file.read_text(encoding="utf-8"))}
    assert len(cited) > 8
    assert [(file.name, name) for file, name in sorted(cited) if not (ROOT / name).is_file()] == []


def test_the_readme_is_short():
    assert README.count("\n") < 130


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


def test_the_workflow_and_the_hooks_run_what_contributors_run():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "check.yml").read_text(encoding="utf-8"))
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert commands == ["make test", ".ci/run"] and os.access(ROOT / ".ci" / "run", os.X_OK)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0][
        "hooks"
    ]
    lint = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\nlint:")[2].partition("\n\n")[0]
    checked = {hook["entry"].split()[0].split("/")[-1] for hook in hooks}
    assert checked >= {word.removeprefix("$(BIN)/") for word in lint.split() if word.startswith("$(BIN)/")}
