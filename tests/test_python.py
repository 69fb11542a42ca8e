"""The functions behind the commands, from Python: lazy, typed, and the page's example runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from launcher_commands import save
from tiny import SUBJECTS

import sftcore
from sftcore.errors import UserInputError

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "python.md"


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_the_import_brings_nothing_of_weight():
    done = run(
        "import sys, sftcore\n"
        "heavy = {'torch', 'numpy', 'transformers', 'pydantic', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert set(sftcore.__all__) <= set(dir(sftcore)) and 'torch' not in sys.modules\n"
        "from sftcore import load_recipe\n"
        "assert callable(load_recipe) and 'torch' not in sys.modules\n"
        "sftcore.nothing"
    )
    assert "AttributeError: module 'sftcore' has no attribute 'nothing'" in done.stderr, done.stderr


def test_a_name_is_one_object_whether_its_package_was_imported_before_or_not():
    done = run(
        "from sftcore import train as before\n"
        "import sftcore.train.stopping as module, sftcore\n"
        "from sftcore import train as after\n"
        "assert before is after is sftcore.train and module.SIGNALS\n"
        "try: before()\n"
        "except TypeError as error: assert 'train_recipe() missing' in str(error), error\n"
        "else: raise SystemExit(1)"
    )
    assert done.returncode == 0, done.stderr


def test_all_functions_are_named_on_the_page_and_each_is_there():
    rows = re.findall(r"^\| `(\w+)\(", PAGE.read_text(), flags=re.M)
    assert sorted(rows) == sorted(sftcore.__all__) and len(rows) == 10
    assert all(callable(getattr(sftcore, name)) for name in rows)
    assert (ROOT / "sftcore" / "py.typed").is_file()
    packs = sftcore.pack([3, 1, 2, 4], capacity=5, seed=0)
    assert sorted(i for number in range(len(packs)) for i in packs[number].tolist()) == [0, 1, 2, 3]


def test_the_pages_example_runs(tiny_recipe, capsys):
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)[1]
    Path("recipe.yaml").write_text(Path(save(tiny_recipe)).read_text())
    exec(compile(code, str(PAGE), "exec"), {})
    said = capsys.readouterr().out
    assert "16 samples," in said and "8 steps" in said and "'tuned':" in said
    run_folder = Path("runs/notebook")
    assert (run_folder / "model").is_dir() and (run_folder / "report.html").is_file()


def test_levels_and_their_selection_from_python(tiny_recipe):
    from sftcore import load_recipe, probe, select

    path = save(tiny_recipe)
    with pytest.raises(UserInputError, match="nothing to select by"):
        select(load_recipe(path))
    recipe = load_recipe(path, ["select.n=all", "select.levels=[0,1,2,3,4]"], run="runs/levels")
    levels = probe(recipe)
    assert len(levels) == 2 * len(SUBJECTS) and {level.split for level in levels} == {"train", "test"}
    assert len(select(recipe)) == 16 and Path("runs/levels/selection.jsonl").is_file()
