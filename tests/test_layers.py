"""Imports go down the levels only; heavy and optional packages stay where the design puts them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ORDER = [  # a module imports from its own group or an earlier one
    "sftcore.display",
    "sftcore.amounts",
    "sftcore.errors",
    "sftcore.leftovers",
    "sftcore.paths",
    "sftcore.fsio",
    "sftcore.log",
    "sftcore.yaml_text",
    "sftcore.wrong_values",
    "sftcore.settings",
    "sftcore.sources",
    "sftcore.data.ledger",
    "sftcore.data.rationales",
    "sftcore.knowledge.spelling",
    "sftcore.knowledge.numbers",
    "sftcore.knowledge.dates",
    "sftcore.knowledge.aliases",
    "sftcore.knowledge.names",
    "sftcore.knowledge.containment",
    "sftcore.tasks.template",
    "sftcore.tasks.kinds",
    "sftcore.data.rows",
    "sftcore.data.cells",
    "sftcore.data.tables",
    "sftcore.data.contents",
    "sftcore.data.metadata",
    "sftcore.data.turns",
    "sftcore.data.examples",
    "sftcore.tasks",
    "sftcore.config",
    "sftcore.reference",
    "sftcore.catalogue",
    "sftcore.recipe",
    "sftcore.hub",
    "sftcore.run_recipe",
    "sftcore.stages.stage",
    "sftcore.shares",
    "sftcore.dist",
    "sftcore.heap",
    "sftcore.precision",
    "sftcore.data",
    "sftcore.knowledge",
    "sftcore.batching",
    "sftcore.generate.api",
    "sftcore.model",
    "sftcore.objectives",
    "sftcore.generate",
    "sftcore.knowledge.likelihood",
    "sftcore.knowledge.probe",
    "sftcore.knowledge.restore",
    "sftcore.train",
    "sftcore.evaluate",
    "sftcore.study",
    "sftcore.runs",
    "sftcore.planning.preflight",
    "sftcore.stages",
    "sftcore.planning",
    "sftcore.launcher",
]
TORCH_FREE = [
    "sftcore.display",
    "sftcore.paths",
    "sftcore.yaml_text",
    "sftcore.settings",
    "sftcore.sources",
    "sftcore.tasks",
    "sftcore.config",
    "sftcore.recipe",
    "sftcore.errors",
    "sftcore.fsio",
    "sftcore.log",
    "sftcore.stages.stage",
    "sftcore.shares",
]
DEEPSPEED_IMPORTERS = {
    f"sftcore/train/{name}.py" for name in ("casting", "engine", "checkpoint", "optimizers")
}


def modules() -> dict[str, Path]:
    files = {f: f.relative_to(ROOT) for f in sorted((ROOT / "sftcore").rglob("*.py"))}
    files |= {f: "sftcore" / f.relative_to(ROOT) for f in sorted((ROOT / "launcher").rglob("*.py"))}
    return {
        str(name.with_suffix("")).replace("/", ".").removesuffix(".__init__"): f for f, name in files.items()
    }


def imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def place(module: str) -> int:
    """Position of the longest group of ORDER that holds `module`; -1 for none."""
    groups = [g for g in ORDER if module == g or module.startswith(g + ".")]
    return ORDER.index(max(groups, key=len)) if groups else -1


def test_imports_go_down_only():
    checked = 0
    for name, file in modules().items():
        for target in imported(file):
            if place(target) >= 0 and place(name) >= 0:
                checked += 1
                assert place(target) <= place(name), f"{name} imports {target}, which is above it"
    assert checked > 100


def test_every_module_has_a_place():
    assert [m for m in modules() if place(m) < 0 and m not in ("sftcore", "sftcore.assets.make_facts")] == []


def test_only_the_modules_around_the_engine_import_deepspeed():
    users = {
        str(file.relative_to(ROOT))
        for file in modules().values()
        if any(name.split(".")[0] == "deepspeed" for name in imported(file))
    }
    assert users and users <= DEEPSPEED_IMPORTERS


def test_base_modules_and_help_need_no_torch():
    code = f"import sys, {', '.join(TORCH_FREE)}, sftcore.launcher.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_no_folder_or_module_is_a_junk_drawer():
    words = {part for name in modules() for part in name.split(".")}
    assert not words & {"utils", "util", "common", "helpers", "helper", "misc", "manager"}


def test_what_differs_by_task_or_kind_of_record_is_asked_of_it():
    """Outside of sftcore/tasks/ nobody asks for a task's name, but commands that are for one task."""
    commands = {"sftcore/stages/rationales.py", "launcher/starting.py", "sftcore/data/sniff.py"}
    kinds = "(Fact|Pair|Completion|Chat)"
    asks = re.compile(rf'\btask (==|!=|in) [("]|isinstance\([^)]*\b{kinds}\b|case {kinds}\(')
    found = {
        str(file.relative_to(ROOT))
        for file in modules().values()
        if "tasks" not in file.parts and asks.search(file.read_text(encoding="utf-8"))
    }
    assert found and found <= commands, "write a method of the task or of the kind: docs/extending.md"
