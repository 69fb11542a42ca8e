"""What a report says in words: sentences, notes and the terminal's table, each by a rule on the numbers.

In: the content of report.json and the run's settings. Out: plain text, not yet escaped for HTML.
Invariant: "rose" and "fell" are said only where McNemar's p is below 0.05; a share has its n and interval.
Trade-off: fixed sentences rather than free prose: dull, but two runs with the same numbers read the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from sftcore.amounts import counted, duration
from sftcore.evaluate.score import FEW_ITEMS
from sftcore.knowledge.templates import load_relations
from sftcore.study.run_folder import MODELS, PREDICTIONS, RunFiles

SIGNIFICANT = 0.05
MINUS = "\N{MINUS SIGN}"
PAPER_PROBE = {"templates": 21, "samples": 10, "temperature": 0.7, "max_new_tokens": 32}  # docs/methods.md M1
WORDS = {"base": "before", "tuned": "after"}
ITEMS = {"matching": "pairs", "chat": "items"}  # task -> what a row of predictions is; else facts
SPLIT_WORDS = {"test": "held-out", "ood": "out-of-domain"}


def describe(report: Mapping[str, Any]) -> list[str]:
    """What happened, one sentence a split, decided by rule from the counts."""
    noun = ITEMS.get(report["settings"].get("task", ""), "facts")
    sentences = [
        describe_change(block, items=f"{SPLIT_WORDS.get(split, split)} {noun}")
        for split, block in report["splits"].items()
        if block["n"]
    ]
    if constant := report["constant"]:
        sentences.append(describe_constant(constant))
    training = report["training"]
    if training and not sentences:
        losses = f"{training['first_loss']:.3f} to {training['last_loss']:.3f}"
        steps = counted(training["num_steps"], "step")
        return [f"Trained for {steps}; the loss went from {losses}. Not evaluated yet."]
    return sentences or ["Neither trained nor evaluated yet."]


def describe_constant(constant: Mapping[str, Any]) -> str:
    """What always giving a relation's most frequent training answer gets, and what training has over it.

    Args:
        constant: `score` of the rule, with `over`.
    """
    over = constant["over"]
    rule = f"{format_share(constant['accuracy'])} [{100 * constant['low']:.1f}, {100 * constant['high']:.1f}]"
    points = f"{100 * over['difference']:+.1f} points [{100 * over['low']:.1f}, {100 * over['high']:.1f}]"
    verdict = (
        "not clearly more than the constant"
        if over["p_value"] >= SIGNIFICANT
        else "clearly more than the constant"
        if over["difference"] > 0
        else "clearly less than the constant"
    )
    return (
        f"Always answering with the relation's most frequent training answer gets {rule}; the trained model "
        f"has {points.replace('-', MINUS)} over that (McNemar {format_p(over['p_value'])}): {verdict}."
    )


def describe_change(block: Mapping[str, Any], *, items: str) -> str:
    """One sentence on a split: rose, fell, or (p >= 0.05) did not change beyond chance.

    Args:
        block: `side_by_side` plus `paired_change`.
        items: what is counted, such as "held-out facts".
    """
    change, n, noun = block["paired_change"], f"{block['n']:,}", items.split()[-1]
    if change is None:
        model = "base" if block["acc_base"] is not None else "tuned"
        share = _share(block, model)
        return f"Accuracy on {n} {items} {WORDS[model]} training: {share}; no other model to compare."
    counts = (
        f"{change['gained']:,} {noun} gained, {change['lost']:,} lost (McNemar {format_p(change['p_value'])})"
    )
    before, after = _share(block, "base"), _share(block, "tuned")
    if change["p_value"] >= SIGNIFICANT:
        return (
            f"Accuracy on {n} {items} did not change beyond chance: {before} before, {after} after; {counts}."
        )
    verb = "rose" if change["gained"] > change["lost"] else "fell"
    return f"Accuracy on {n} {items} {verb} from {before} to {after}: {counts}."


def list_notes(report: Mapping[str, Any], files: RunFiles) -> list[str]:
    """What a reader must know to read the numbers rightly, each by a rule on the run's own settings."""
    environment, probe = (
        {key.rsplit(".", 1)[-1]: value for key, value in flatten(files.mapping(file))}
        for file in ("environment.json", "levels.manifest.json")
    )
    adapter = files.setting("adapter", "kind")
    notes = [*_weights_notes(environment, probe, adapter=adapter), *_probe_notes(probe)]
    few = [
        f"level {level} ({cell['n']})" for level, cell in report["by_level"].items() if cell["n"] < FEW_ITEMS
    ]
    if few:
        notes.append(f"Fewer than {FEW_ITEMS} test items, read with care: {', '.join(few)}.")
    if report["by_level"] and report["without_level"]:
        items = counted(report["without_level"], "test item")
        notes.append(f"{items} without a memory level: counted in the total only.")
    notes += [*_reply_notes(files), *_training_notes(report["training"], report["plan"] or {})]
    if report["paired_change"]:
        notes.append(
            "One run, one training draw, one seed: the intervals and p-values cover the choice of test "
            "items, not the luck of the draw. A study with several draws shows that."
        )
    return notes


def _reply_notes(files: RunFiles) -> list[str]:
    """What "right" means of a chat or completion, and of how many it can't be said."""
    rows = next((rows for model in MODELS if (rows := files.rows(PREDICTIONS.format(model)))), [])
    lengths = [row["label_tokens"] for row in rows if isinstance(row.get("label_tokens"), int)]
    if not lengths:
        return []
    limit = files.setting("evaluate", "max_new_tokens")
    num_long = sum(length > limit for length in lengths) if isinstance(limit, int) else 0
    note = "Chats and completions count as right only where the reply equals the reference exactly"
    if num_long:
        note += f"; {num_long:,} of {len(lengths):,} references are longer than the {limit} tokens decoded "
        note += "(evaluate.max_new_tokens), so they can't be matched"
    return [f"{note}."]


def _weights_notes(environment: Mapping[str, Any], probe: Mapping[str, Any], *, adapter: Any) -> list[str]:
    notes = []
    quantised = environment.get("quantised_weights") or probe.get("quantised_weights")
    if quantised:
        notes.append(
            f"The base model's weights were quantised ({quantised}) and dequantised again: levels and "
            "accuracies are this checkpoint's, not the original release's."
        )
    if adapter == "qlora":
        notes.append("QLoRA: the base weights were held in 4 bits during training.")
    fingerprints = environment.get("model_fingerprint"), probe.get("model_fingerprint")
    if None not in fingerprints and fingerprints[0] != fingerprints[1]:
        notes.append(
            f"The memory levels belong to another model (fingerprint {fingerprints[1]}) than the one trained "
            f"({fingerprints[0]}): they don't say what this model remembers."
        )
    return notes


def _probe_notes(probe: Mapping[str, Any]) -> list[str]:
    used = {key: probe[key] for key in PAPER_PROBE if isinstance(probe.get(key), int | float)}
    trials, paper_trials = (_trials_of(settings) for settings in (used, PAPER_PROBE))
    notes = []
    if trials and trials < paper_trials:
        half_width = 1.96 * 0.5 / trials**0.5  # normal approximation at recall 1/2, where it is widest
        notes.append(
            f"Reduced probe: {used['templates']} templates x {used['samples']} samples instead of the "
            f"paper's {PAPER_PROBE['templates']} x {PAPER_PROBE['samples']}: levels are rough. The recall of "
            f"a fact at {trials} trials has a 95 % interval of up to ±{half_width:.2f}; a level is 0.25 wide."
        )
    others = [
        f"{key} {used[key]} instead of {PAPER_PROBE[key]}"
        for key in ("temperature", "max_new_tokens")
        if key in used and used[key] != PAPER_PROBE[key]
    ]
    return [*notes, *([f"The probe differs from the paper's: {'; '.join(others)}."] if others else [])]


def _trials_of(settings: Mapping[str, Any]) -> int:
    return int(settings.get("templates", 0) * settings.get("samples", 0))


def _training_notes(training: Mapping[str, Any] | None, totals: Mapping[str, Any]) -> list[str]:
    if not training:
        return []
    notes, planned = [], totals.get("num_steps")
    if isinstance(planned, int) and planned != training["num_steps"]:
        notes.append(
            f"{training['num_steps']:,} of {planned:,} planned steps are recorded: the run is not complete."
        )
    if again := training["steps_done_twice"]:
        notes.append(
            f"The run was resumed: {counted(again, 'step')} {'was' if again == 1 else 'were'} done more than"
            " once and counted once, as last done."
        )
    return notes


def terminal_table(report: Mapping[str, Any]) -> str:
    """The report's main numbers as plain text with aligned columns, no trailing newline."""
    lines = [f"{report['name']} ({report['model']})", *report["verdict"]]
    rows = [row for split, block in report["splits"].items() for row in _table_rows(split, block)]
    if rows:
        table = [("split", "items", "n", "before", "after"), *rows]
        widths = [max(len(row[column]) for row in table) for column in range(5)]
        lines += ["", *("  ".join(_pad(row, widths)).rstrip() for row in table)]
    training = report["training"]
    if training:
        seconds = training["seconds"]
        spent = "" if seconds is None else f", {duration(seconds)}"
        losses = f"loss {training['first_loss']:.3f} -> {training['last_loss']:.3f}"
        lines += ["", f"training: {counted(training['num_steps'], 'step')}, {losses}{spent}"]
    notes = [f"note: {note}" for note in report["notes"]]
    missing = [f"not in this folder: {', '.join(report['missing'])}"] if report["missing"] else []
    return "\n".join([*lines, *([""] if notes or missing else []), *notes, *missing])


def _table_rows(split: str, block: Mapping[str, Any]) -> list[tuple[str, ...]]:
    cells = [*((f"level {level}", cell) for level, cell in block["by_level"].items()), ("all", block)]
    rows: list[tuple[str, ...]] = [
        (split, name, f"{cell['n']:,}", _share(cell, "base"), _share(cell, "tuned")) for name, cell in cells
    ]
    means = block["mean_over_levels"]
    if means["levels_counted"]:
        name = f"mean of {len(means['levels_counted'])} levels"
        rows.append((split, name, "", format_share(means["base"]), format_share(means["tuned"])))
    return rows


def _pad(row: tuple[str, ...], widths: list[int]) -> list[str]:
    """Text to the left, counts to the right."""
    return [
        text.rjust(w) if i == 2 else text.ljust(w)
        for i, (text, w) in enumerate(zip(row, widths, strict=True))
    ]


def _share(cell: Mapping[str, Any], model: str) -> str:
    """Accuracy with its interval, such as "12.3 % [9.1, 16.5]"."""
    return f"{format_share(cell[f'acc_{model}'])} {format_interval(cell, model)}".strip()


def format_share(share: float | None) -> str:
    """A share as per cent with one decimal; a dash where there is none.

    >>> format_share(0.1234), format_share(None)
    ('12.3 %', '-')
    """
    return "-" if share is None else f"{100 * share:.1f} %"


def format_interval(cell: Mapping[str, Any], model: str) -> str:
    """The interval of a cell of `side_by_side` in per cent: "[9.1, 16.5]"; empty where it has none."""
    low, high = cell[f"low_{model}"], cell[f"high_{model}"]
    return "" if low is None else f"[{100 * low:.1f}, {100 * high:.1f}]"


def format_points(cell: Mapping[str, Any]) -> str:
    """Accuracy after minus before in percentage points, with its sign; a dash where one is missing.

    >>> [format_points({"acc_base": 0.5, "acc_tuned": tuned}) for tuned in (0.625, 0.4999, 0.375)]
    ['+12.5', '0.0', '−12.5']
    """
    if cell["acc_base"] is None or cell["acc_tuned"] is None:
        return "-"
    points = f"{100 * (cell['acc_tuned'] - cell['acc_base']):+.1f}"
    return "0.0" if points in ("+0.0", "-0.0") else points.replace("-", "\N{MINUS SIGN}")


def tie_numbers(text: str) -> str:
    """Keep "12.3 % [9.1, 16.5]" and "p < 0.001" on one line of a page, by no-break spaces.

    >>> tie_numbers("from 2.0 % [0.6, 7.8] (p < 0.001)").split(" ")
    ['from', '2.0\\xa0%\\xa0[0.6,\\xa07.8]', '(p\\xa0<\\xa00.001)']
    """
    return re.sub(
        r"(?<=\d) (?=%)|(?<=%) (?=\[)|(?<=\d,) (?=[\d.]+\])|(?<=\bp) (?=[<=])|(?<=[<=]) (?=\d)", "\xa0", text
    )


def format_p(p_value: float) -> str:
    """A p-value as papers write it.

    >>> format_p(0.0312), format_p(1e-9), format_p(1.0)
    ('p = 0.031', 'p < 0.001', 'p = 1.000')
    """
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested keys as dotted ones; mappings in a list are numbered.

    >>> flatten({"a": {"b": 1, "c": {"d": 2}}, "e": [3], "f": [{"g": 4}]})
    [('a.b', 1), ('a.c.d', 2), ('e', [3]), ('f.0.g', 4)]
    """
    rows: list[tuple[str, Any]] = []
    for key, value in mapping.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            value = dict(enumerate(value))
        nested = isinstance(value, dict) and value
        rows += flatten(value, f"{prefix}{key}.") if nested else [(f"{prefix}{key}", value)]
    return rows


def format_value(value: Any) -> str:
    """A count or measurement for a table cell.

    >>> [format_value(v) for v in (12345, 0.98765, 1834.26, None, True)]
    ['12,345', '0.9877', '1,834.3', '-', 'true']
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        large = isinstance(value, float) and abs(value) >= 1000
        return f"{value:,.1f}" if large else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return "-" if value is None else format_setting(value)


def format_setting(value: Any) -> str:
    """A setting as people would write it in a recipe.

    >>> [format_setting(v) for v in (4096, 1e-05, None, True, "auto", [2, 3])]
    ['4096', '1e-05', 'null', 'true', 'auto', '[2, 3]']
    """
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def format_relation(relation: str) -> str:
    """A shipped relation's id with its name; a relation of the user's own as it is.

    >>> format_relation("P17"), format_relation("inventor of")
    ('P17 country', 'inventor of')
    """
    name = _shipped_names().get(relation)
    return f"{relation} {name}" if name else relation


@cache
def _shipped_names() -> dict[str, str]:
    return {key: relation.name for key, relation in load_relations().items()}
