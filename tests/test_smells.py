"""The figures of our style, kept: sizes, reflection, broad excepts, prints."""

from __future__ import annotations

import ast
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).parent.parent
FILES = [f for top in ("sftcore", "launcher") for f in sorted((ROOT / top).rglob("*.py"))]
TREES = {f: ast.parse(f.read_text(encoding="utf-8")) for f in FILES}
FUNCTIONS = [
    (node.end_lineno - node.lineno + 1, node, f)
    for f, tree in TREES.items()
    for node in ast.walk(tree)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
]
NUM_LINES = sum(len(f.read_text(encoding="utf-8").splitlines()) for f in FILES)


def test_files_and_functions_are_small():
    lengths = [size for size, _, _ in FUNCTIONS]
    assert len(lengths) > 200
    assert median(lengths) <= 15
    assert quantiles(lengths, n=20)[-1] <= 45
    assert max(lengths) <= 80
    assert max(len(f.read_text(encoding="utf-8").splitlines()) for f in FILES) <= 400


def test_every_module_has_a_docstring():
    assert [str(f) for f, tree in TREES.items() if not ast.get_docstring(tree)] == []


def test_little_reflection_and_no_broad_excepts():
    calls = [
        node.func.id
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    assert sum(name in ("getattr", "hasattr") for name in calls) / NUM_LINES * 1000 < 0.5
    handlers = [n for tree in TREES.values() for n in ast.walk(tree) if isinstance(n, ast.ExceptHandler)]
    broad = [
        h for h in handlers if h.type is None or getattr(h.type, "id", "") in ("Exception", "BaseException")
    ]
    assert len(broad) / NUM_LINES * 1000 < 0.5


def test_no_print_in_the_library():
    printing = [
        f"{f.name}:{node.lineno}"
        for f, tree in TREES.items()
        for node in ast.walk(tree)
        if "sftcore" in f.relative_to(ROOT).parts[:1]
        and f.name != "make_facts.py"
        and isinstance(node, ast.Call)
        and getattr(node.func, "id", "") == "print"
    ]
    assert printing == []
