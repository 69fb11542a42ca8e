"""Whatever a recipe or `--set` holds: it ends soon, with a plan or with one message of bounded length.

The cases come from a seed: shipped recipes in which a key gets a nasty value, whose text is damaged, or that
an override changes. What loads is planned, with a tiny model and a few rows.
"""

from __future__ import annotations

import contextlib
import copy
import os
import random
import resource
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from tiny import tiny_config, write_lines
from tiny_tokenizers import CHATML, build_bpe

from sftcore.config import Recipe
from sftcore.errors import EXIT_ENVIRONMENT, EXIT_USER_INPUT, SftError
from sftcore.recipe import load_recipe

ROOT = Path(__file__).parent.parent
NUM_CASES = 2000
CASE_SECONDS = 20  # a plan takes 0.1 s; other load may slow it down a hundredfold
SPARE_BYTES = 6 << 30
MAX_MESSAGE = 20_000  # letters
BASES = ("qa-small", "chat", "matching-rationale", "matching-classifier", "matching-fewshot", "quickstart")
MILD = (1, 2, 3, 7, 50, 1000, 100_000, 10**9, 0, 0.5, 1e-9, 1e3, True, False, None, "auto", "none", "all")
CHOICES = (
    "lora",
    "qlora",
    "zero0",
    "zero3",
    "generative",
    "discriminative",
    "encoder",
    "complex",
    "likelihood",
)
CHOICES += (
    "before",
    "after",
    "mean",
    "muon",
    "adamw-8bit",
    "wsd",
    "linear",
    "full",
    "sample",
    "best",
    "error",
)
CHOICES += ("qa", "matching", "chat", "trim_prompt", "keep", "flex", "sdpa_docs", "float32", "zh", "trackio")
HUGE = (2**31, 2**63, 10**18, 10**40, -1, -(2**63), 0)
ODD_FLOATS = (1e308, 1e-308, -0.0, float("inf"), float("-inf"), float("nan"), 0.5, 1.0, 2.0)
ODD_TEXTS = (
    *("", " ", ".", "..", "/", "~", "-", "\0", "a\0b", "\n", "\x1b[31mred\x1b[0m", "[red]x[/red]", "\u202e"),
    *("x" * 5000, "/" + "y" * 5000, "a/" * 2500, "/dev/zero", "/dev/full", "/dev/stdin", "/proc/self/mem"),
    *("fifo", "dangling", "loop", "locked/x", "socket", "assets:**", "assets:../../**", "hub:", "hub:\0"),
    *("**", "*" * 300, "[", "[!", "{", "}", "{}", "{0}", "{question", "{question!r:{question}}", "{{{{"),
    *(
        "$x^2$",
        "<script>alert(1)</script>",
        "http://user:hunter2@host/v1?api_key=hunter2",
        "\ufeff",
        "Ⅷ",
        "²",
    ),
    *(
        "1e400",
        "nan",
        "yes",
        "null",
        "1_000",
        "0x" + "f" * 20,
        "2026-13-45",
        "1:99:99",
        "!!python/x",
        "a: b: c",
    ),
)
NESTED: Any = None
for _ in range(200):
    NESTED = [NESTED]
STRUCTURES = (
    *(
        None,
        True,
        False,
        [],
        {},
        [[]],
        {"": 1},
        {"a": {}},
        NESTED,
        list(range(1000)),
        [None],
        [{}],
        {"path": 1},
    ),
    *({"r" * 3000: 1}, {i: i for i in range(500)}),
)
RAW = (  # YAML as text, which no value dumps to
    *("9" * 5000, "0x" + "9" * 5000, "-" + "9" * 5000, "1e400", ".inf", ".nan", "1e-400", "0b" + "1" * 20000),
    *("[" * 5000, "{" * 3000, "[" * 90 + "]" * 90, "- " * 4000 + "x", "{a: " * 400 + "1" + "}" * 400),
    *("&a [*a]", "&a {b: *a}", "*nowhere", "<<: 1", "{<<: [1]}", "{<<: {a: 1}}", "=", "{=: 1}", "? x"),
    *("2026-13-45", "2026-12-01 25:61:61", "0001-01-01", "12:30:45", "1:" * 2000 + "1", "!!binary zzz", "\t"),
    *(
        "!!python/object/apply:os.system [true]",
        "!!set {a, b}",
        "!!omap [a: 1]",
        "!!pairs [a: 1]",
        "!!timestamp x",
    ),
    *(
        "{[1]: 2}",
        "{{a: 1}: 2}",
        "{? {a: 1} : 2}",
        "{null: 1}",
        "{1: 2}",
        "{true: 1}",
        "!!int x",
        "!!float x",
    ),
    *(
        "{!!binary YQ==: 1}",
        "!!null x",
        "!!bool x",
        "!!int ''",
        "!!float ''",
        "%TAG ! x",
        "--- 1\n--- 2",
        "\x00",
        "\x07",
    ),
    *(
        '"\\ud800"',
        '"\\x1b[2J"',
        "'" + "z" * 100_000 + "'",
        "|\n  text",
        "!<x> y",
        "!!map [1]",
        "!!seq {a: 1}",
    ),
)
BOMB = "b0: &b0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 10)}]\n" for i in range(1, 10)
)


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """A folder with a tiny model, data of each format, and odd things that are no files."""
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "sftcore.planning.outlook.may_have_async_io", lambda: False
    )  # a compiler's run, each time
    torch.manual_seed(0)
    config = tiny_config("llama")
    config.vocab_size = 400
    AutoModelForCausalLM.from_config(config).save_pretrained("model")
    tokenizer = build_bpe()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained("model")
    for name, letter in (("", "a"), ("held-out-", "b")):
        facts = [{"relation": "P19", "subject": f"Ann{letter}{i}", "answers": ["Rome"]} for i in range(6)]
        write_lines(Path(f"{name}facts.jsonl"), facts)
        pairs = [{"sentence1": f"{letter}{i}", "sentence2": "so", "label": i % 2} for i in range(6)]
        write_lines(Path(f"{name}pairs.jsonl"), [pair | {"rationale": "since"} for pair in pairs])
        turns = [{"role": "user", "content": f"Hi {letter}"}, {"role": "assistant", "content": "Yes"}]
        write_lines(Path(f"{name}jsonl.jsonl"), [{"messages": turns}] * 4)
    os.mkfifo("fifo")
    Path("dangling").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    return tmp_path


def base_recipes() -> list[dict]:
    """Shipped recipes with our model and data; levels can't be drawn from, since nothing is probed."""
    found = []
    for name in BASES:
        recipe = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
        recipe["model"]["path"] = "./model"
        recipe.pop("select", None)
        for split in ("train", "test", "ood", "valid"):
            for source in recipe["data"].get(split, []):
                source["path"] = f"{'' if split == 'train' else 'held-out-'}{source['format']}.jsonl"
        found.append(recipe)
    return found


def keys_of_recipes() -> list[str]:
    """Each dotted key of a recipe, those of optional sections and of a source, too."""
    found: list[str] = []

    def walk(model: Any, prefix: str) -> None:
        for name, field in model.model_fields.items():
            found.append(prefix + name)
            is_list = "list[" in str(field.annotation)
            for each in _models_in(field.annotation):
                walk(each, f"{prefix}{name}.{'0.' if is_list else ''}")

    walk(Recipe, "")
    return found


def _models_in(annotation: Any) -> list[Any]:
    import typing

    if isinstance(annotation, type) and hasattr(annotation, "model_fields"):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models_in(part)]


def put(recipe: dict, key: str, value: Any) -> None:
    """Set a dotted key, making sections and lists on the way."""
    target: Any = recipe
    parts = key.split(".")
    last = parts[-1]
    for part, following in zip(parts[:-1], parts[1:], strict=True):
        new: Any = [{"format": "facts", "path": "facts.jsonl"}] if following == "0" else {}
        if isinstance(target, list):
            target = target[int(part)]
        else:
            if not isinstance(target.get(part), dict | list):
                target[part] = new
            target = target[part]
        if isinstance(target, list) and not target:
            target.append({})
    if isinstance(target, list):
        target[int(last)] = value
    else:
        target[last] = value


def nasty(random_: random.Random) -> Any:
    return random_.choice(random_.choice((HUGE, ODD_FLOATS, ODD_TEXTS, STRUCTURES)))


def cases(number: int, seed: int) -> Iterator[tuple[str, list[str]]]:
    """(text of a recipe, overrides)."""
    random_ = random.Random(seed)
    bases, keys = base_recipes(), keys_of_recipes()
    for _ in range(number):
        recipe = copy.deepcopy(random_.choice(bases))
        overrides: list[str] = []
        kind = random_.choice(("value", "mild", "mild", "mild", "set", "set", "raw", "damage", "key"))
        key = random_.choice(keys)
        if kind == "value":
            put(recipe, key, nasty(random_))
        elif kind == "mild":
            recipe = accepted(random_, recipe, keys)
        text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
        if kind == "set":
            raw = random_.choice(RAW) if random_.random() < 0.5 else str(nasty(random_))
            overrides = [f"{odd_key(random_, key)}={raw}"]
        elif kind == "raw":
            place = random_.choice(("\nmore: ", "\nname: ", "\ndata: ", "\n", "\ntrain: {epochs: "))
            text += place + random_.choice((*RAW, BOMB, BOMB))
        elif kind == "damage":
            text = damaged(random_, text)
        elif kind == "key":
            found = random_.choice(["name", "train", "path", "model"])
            text = text.replace(found, random_.choice(ODD_TEXTS), 1)
        yield text, overrides


def accepted(random_: random.Random, recipe: dict, keys: list[str]) -> dict:
    """The recipe with some key changed to a value that is accepted there; after 50 attempts, unchanged."""
    for _ in range(50):
        changed = copy.deepcopy(recipe)
        put(changed, random_.choice(keys), random_.choice((*MILD, *CHOICES)))
        with contextlib.suppress(ValidationError):
            Recipe.model_validate(changed)
            return changed
    return recipe


def odd_key(random_: random.Random, key: str) -> str:
    zeros = [key.replace("0", other) for other in ("9" * 5000, "²", "-1", "00", "1e1")]
    odd = ["a." * 5000 + "b", "", ".", "=", key + ".", key + ".x", key.replace(".", ".."), "\0", "x" * 10_000]
    return random_.choice([*[key] * 6, *zeros, *odd, "[red]"])


def damaged(random_: random.Random, text: str) -> str:
    """The text with a stretch left out, doubled, moved or spoilt."""
    a, b = sorted(random_.randrange(len(text)) for _ in range(2))
    b = min(b, a + 40)
    return random_.choice(
        (text[:a] + text[b:], text[:b] + text[a:], text[:a] + text[a:b].upper() + text[b:], text[:a])
    )


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """A case that does not end is ended, and one that takes the machine's memory gets a MemoryError."""

    def too_long(*_: Any) -> None:
        raise AssertionError(f"a case took more than {CASE_SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, left = signal.signal(signal.SIGALRM, too_long), signal.getitimer(signal.ITIMER_REAL)
    resource.setrlimit(resource.RLIMIT_AS, (taken + SPARE_BYTES, hard))
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *left)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def tree(folder: Path) -> dict[str, int]:
    """Every file but the cache of stores, with its size."""
    return {
        str(f): f.lstat().st_size
        for f in folder.rglob("*")
        if f.name != "fuzzed.yaml" and ".cache" not in f.parts
    }


def outcome_of(text: str, overrides: list[str]) -> tuple[str, str]:
    """What became of a case, and the message.

    Returns:
        planned | refused (by the loading) | unplannable.
    """
    from sftcore.planning.outlook import look_ahead
    from sftcore.train.devices import choose_device

    Path("fuzzed.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    stage = "refused"
    try:
        recipe = load_recipe(Path("fuzzed.yaml"), overrides)
        stage = "unplannable"
        device = choose_device("a100", memory_gigabytes=None, teraflops=None)
        _, _, refusal = look_ahead(recipe, world=2, device=device, mfu=0.4)
    except SftError as error:
        assert error.exit_code in (EXIT_USER_INPUT, EXIT_ENVIRONMENT)
        return stage, str(error)
    return "planned", str(refusal or "")


@pytest.mark.slow
def test_any_recipe_ends_with_a_plan_or_one_message(workplace):
    outcomes: Counter[str] = Counter()
    before = tree(workplace)
    with limits():
        for number, (text, overrides) in enumerate(cases(NUM_CASES, seed=18)):
            signal.setitimer(signal.ITIMER_REAL, CASE_SECONDS)
            try:
                stage, message = outcome_of(text, overrides)
            except Exception as error:
                told = f"{type(error).__name__}: {str(error)[:500]}\n{text[:1500]}\n{str(overrides)[:300]}"
                pytest.fail(f"case {number}: {told}")
            outcomes[stage] += 1
            assert len(message) < MAX_MESSAGE, (number, message[:300])
            assert "hunter2" not in message and "\x1b" not in message and "\0" not in message, (
                number,
                message,
            )
            message.encode("utf-8")
    assert tree(workplace) == before
    assert outcomes["planned"] > NUM_CASES / 10 and outcomes["refused"] > NUM_CASES / 4, outcomes
