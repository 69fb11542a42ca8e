"""`sftcore prepare --check`: what the training data is like, before anything is trained on it.

In: a finished store. Out: numbers, the same as text, and as a picture.
Invariant: every number is counted from the store's columns or taken from its account; nothing is sampled.
Trade-off: one look at N lengths in memory (20 bytes a sample), no second pass over the tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sftcore.amounts import counted
from sftcore.config import Recipe
from sftcore.data.store import TokenStore
from sftcore.display import shown

QUANTILES = (0, 5, 25, 50, 75, 95, 99, 100)
NUM_BINS = 20
BAR = 40


def check_store(recipe: Recipe, store: TokenStore) -> dict[str, Any]:
    """The numbers of the report."""
    manifest, lengths = store.manifest, store.lengths
    edges = np.linspace(0, max(1, int(lengths.max())), NUM_BINS + 1)
    labels = store.labels_of_pairs
    rejected, altered = manifest["rejected_by_reason"], manifest["altered_by_reason"]
    return {
        "fingerprint": store.fingerprint,
        "num_rows_read": manifest["num_rows_read"],
        "num_samples": len(store),
        "num_tokens": manifest["num_tokens"],
        "trained_share": manifest["num_trained_tokens"] / manifest["num_tokens"],
        "length_quantiles": {str(q): int(np.percentile(lengths, q, method="lower")) for q in QUANTILES},
        "length_histogram": {
            "edges": edges.round(1).tolist(),
            "num_samples": np.histogram(lengths, edges)[0].tolist(),
        },
        "max_length": recipe.max_length,
        "labels": {str(label): int((labels == label).sum()) for label in (0, 1) if (labels >= 0).any()},
        "duplicates_kept": altered.get("duplicate_kept", 0),
        "duplicates_dropped": rejected.get("duplicate", 0),
        "other_answers": altered.get("other_answer", 0),
        "contradictory": rejected.get("contradictory_label", 0),
        "leaks": rejected.get("leak", 0),
        "overlength": rejected.get("overlength", 0),
        "rejected_by_reason": rejected,
        "altered_by_reason": altered,
        "sources": manifest["sources"],
    }


def describe_store(store: TokenStore) -> str:
    """What a store holds, in a sentence; which rows were left out or noted is in its ledger."""
    found = store.manifest
    counts = f"{counted(found['num_samples'], 'sample')} of {counted(found['num_tokens'], 'token')}"
    trained = f"{found['num_trained_tokens']:,} of them trained"
    rejected, noted = (_reasons(found[f"{kind}_by_reason"]) for kind in ("rejected", "altered"))
    others = f", {found['num_rejected']:,} rejected ({rejected})" if rejected else ""
    others += f", noted: {noted}" if noted else ""
    where = f"{store.folder}{' (ledger.jsonl lists such rows)' if others else ''}"
    return f"{counts} ({trained}) from {counted(found['num_rows_read'], 'row')}{others}: {where}"


def _reasons(counts: dict[str, int]) -> str:
    """Reasons of the ledger as people say them."""
    return ", ".join(f"{reason.replace('_', ' ')} {count:,}" for reason, count in counts.items())


def check_text(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    quantiles = "  ".join(f"p{q} {n}" for q, n in report["length_quantiles"].items())
    lines = [
        f"samples          {report['num_samples']:,} of {counted(report['num_rows_read'], 'row')}",
        f"tokens           {report['num_tokens']:,}, {report['trained_share']:.1%} of them trained",
        f"lengths          {quantiles}  (at most {report['max_length']} fit)",
        *_histogram_lines(report["length_histogram"]),
    ]
    if labels := report["labels"]:
        total = sum(labels.values())
        shares = ", ".join(f"{label}: {n:,} ({n / total:.1%})" for label, n in labels.items())
        lines.append(f"labels           {shares}")
    lines += [
        f"duplicates       {report['duplicates_kept']:,} kept, {report['duplicates_dropped']:,} dropped",
        f"other answers    {report['other_answers']:,} samples share a prompt that is answered otherwise",
        f"contradictory    {report['contradictory']:,} dropped",
        f"leaks into test  {report['leaks']:,} dropped",
        f"over-long        {report['overlength']:,} dropped",
    ]
    for kind in ("rejected", "altered"):
        counts = report[f"{kind}_by_reason"]
        lines.append(f"{kind:<17}" + (", ".join(f"{reason} {n:,}" for reason, n in counts.items()) or "none"))
    for source in report["sources"]:
        share = source["num_tokens"] / report["num_tokens"]
        counts = f"{counted(source['num_samples'], 'sample')}, "
        counts += f"{counted(source['num_tokens'], 'token')} ({share:.1%})"
        lines.append(f"source           {source['name']}: {counts}")
    return "\n".join(lines)


def _histogram_lines(histogram: dict[str, Any]) -> list[str]:
    counts, edges = histogram["num_samples"], histogram["edges"]
    most = max(counts)
    return [
        f"  {start:>7.0f}-{end:<7.0f} {'#' * -(-BAR * n // most):<{BAR}} {n:,}"
        for start, end, n in zip(edges, edges[1:], counts, strict=False)
    ]


def draw_check(report: dict[str, Any], path: Path) -> None:
    """The report as a picture: lengths, what became of the rows, tokens per source."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):  # a file's name may hold $ signs
        _draw_check(report, path)


def _draw_check(report: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    (lengths, fate), (sources, labels) = figure.subplots(2, 2)
    edges = report["length_histogram"]["edges"]
    lengths.stairs(report["length_histogram"]["num_samples"], edges, fill=True)
    lengths.set(title="tokens per sample", xlabel="tokens", ylabel="samples")
    _bars(fate, {"samples": report["num_samples"], **report["rejected_by_reason"]}, "what became of the rows")
    _bars(sources, {s["name"]: s["num_tokens"] for s in report["sources"]}, "tokens per source")
    trained = round(report["trained_share"] * report["num_tokens"])
    shares = {"trained": trained, "prompt": report["num_tokens"] - trained}
    pairs = {f"label {label}": n for label, n in report["labels"].items()}
    _bars(labels, pairs or shares, "labels" if pairs else "tokens")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _bars(axes: Any, counts: dict[str, int], title: str) -> None:
    bars = axes.barh([shown(name, 30) for name in counts], list(counts.values()))
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_title(title)
