"""Where the rows of a recipe come from: files, their format, the names of their columns.

In: plain values. Out: frozen `Source`s, of which config.py makes the section `data`.
Invariant: columns that a format can't honour are refused by name; a preset only fills in what is not given.
Trade-off: one `columns` section for pairs and for prompts (four keys of each, of which the other four must
keep their defaults) rather than a type a format: a resolved recipe then always has the same keys.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sftcore.settings import MAX_COUNT, PathText, Positive, Settings


class Columns(Settings):
    """The names of a file's columns, or of its rows' fields."""

    a: str | int = Field("sentence1", description="pairs: first text, by name or (in tables) 0-based number")
    b: str | int = Field("sentence2", description="pairs: second text")
    label: str | int | None = Field(
        "label",
        description="pairs: 0 or 1, or a label word of the recipe; null: none (`sftcore match` only)",
    )
    rationale: str | int = Field(
        "rationale", description="pairs: why the label is right; the column may be absent"
    )
    prompt: str = Field("prompt", description="jsonl: what is not trained")
    input: str | None = Field(
        None,
        description="jsonl: text that goes with some prompts, put after them, a blank line between; the"
        " completion then follows after a blank line, too",
    )
    completion: str = Field("completion", description="jsonl: what is trained after the prompt")
    messages: str | None = Field(
        None, description="jsonl: the turns of a chat; null: `messages`, else `conversations` (ShareGPT)"
    )

    id: str | None = Field(
        "id", description="the rows' own ids, which may not repeat within a split; null: rows are numbered"
    )
    ignore: list[str] = Field(
        [], description='fields of rows (by name of turns, too) left out on purpose; ["*"]: all others'
    )

    def of_pair(self) -> dict[str, str | int]:
        """Name or number of each field of a pair that is wanted."""
        named = {"a": self.a, "b": self.b, "label": self.label, "rationale": self.rationale}
        return {field: name for field, name in named.items() if name is not None}


OF_PAIRS = ("a", "b", "label", "rationale", "id", "ignore")
OF_EXAMPLES = ("prompt", "input", "completion", "messages", "id", "ignore")
OF_FACTS = ("id", "ignore")
FIELDS_READ = {
    "pairs": OF_PAIRS,
    "jsonl": OF_EXAMPLES,
    "facts": OF_FACTS,
    "entityquestions": OF_FACTS,
}
PRESETS: dict[str, dict[str, str | int]] = {  # layouts of pairs, as the corpora's authors spread them
    "lcqmc": {"a": "text_a", "b": "text_b", "label": "label"},
    "bq": {"a": "sentence1", "b": "sentence2", "label": "label"},
    "pawsx": {"a": "sentence1", "b": "sentence2", "label": "label"},
    "afqmc": {"a": "sentence1", "b": "sentence2", "label": "label"},
    "mrpc": {"a": "#1 String", "b": "#2 String", "label": "Quality"},
    "qqp": {"a": "question1", "b": "question2", "label": "is_duplicate"},
}
ALPACA = {"prompt": "instruction", "input": "input", "completion": "output"}  # tatsu-lab/stanford_alpaca


class Source(Settings):
    """One group of files."""

    preset: Literal["lcqmc", "bq", "pawsx", "afqmc", "mrpc", "qqp", "alpaca"] | None = Field(
        None, description="layout of a known corpus: fills in format and columns"
    )
    format: Literal["entityquestions", "facts", "pairs", "jsonl"] = Field(
        description="how the files are read"
    )
    path: PathText = Field(
        description="file, glob or data set folder; relative to the recipe, then to here; `assets:` for"
        " shipped data, `hub:NAME` for a data set by name"
    )
    subset: str | None = Field(None, description="`hub:` only: the data set's configuration")
    split: str | None = Field(None, description="`hub:` only, required there: the data set's split")
    quotes: Literal["auto", "csv", "none"] = Field(
        "auto",
        description='of cells in tables: csv: "say ""hi""" is one cell; none: quotes are text; auto: csv for'
        " .csv, and for .tsv and .txt where the whole file is written so",
    )
    limit: Positive | None = Field(None, description="take N rows, evenly from the tops of the files")
    columns: Columns = Field(default_factory=lambda: Columns(), description="names of fields or columns")
    weight: Annotated[float, Field(ge=1e-9, le=MAX_COUNT)] | None = Field(
        None, description="training only: this source's share of an epoch's samples, relative to the others"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: Any) -> Any:
        """Format and columns of the preset, where they aren't given."""
        if not isinstance(values, dict) or not isinstance(values.get("preset"), str):
            return values
        if values.get("preset") == "alpaca":
            return {"format": "jsonl", "columns": ALPACA, **values}
        if values.get("preset") not in PRESETS:
            return values
        return {"format": "pairs", "columns": PRESETS[values["preset"]], **values}

    @model_validator(mode="after")
    def _consistent(self) -> Source:
        layout_of = "jsonl" if self.preset == "alpaca" else "pairs"
        if self.preset and self.format != layout_of:
            raise ValueError(f"preset {self.preset} is a layout of {layout_of}, not of {self.format}")
        if self.columns.label is None:
            raise ValueError("training and test pairs need a label column")
        if unread := self._columns_not_read():
            readable = ", ".join(FIELDS_READ[self.format]) or "none"
            raise ValueError(f"format {self.format} has no columns.{unread[0]}; those it has: {readable}")
        is_hub = self.path.startswith("hub:")
        if is_hub and ("://" in self.path or not self.path.removeprefix("hub:").strip("./ ")):
            raise ValueError("after `hub:` stands a data set's name, e.g. hub:org/name")
        if is_hub and self.split is None:
            raise ValueError("a data set by name needs `split`, e.g. split: train")
        if not is_hub and (self.split or self.subset):
            raise ValueError("`split` and `subset` are for `hub:` paths; on disk, name the split's folder")
        return self

    def _columns_not_read(self) -> list[str]:
        """Columns that were given a name, but are another format's."""
        given, defaults = self.columns.model_dump(), Columns().model_dump()
        others = [key for key in given if key not in FIELDS_READ[self.format]]
        return [key for key in others if given[key] != defaults[key]]


class InlineTemplate(Settings):
    """A prompt template in the recipe, e.g. {prompt: "Q: {question}\\nA: ", completion: "{answer}"}."""

    prompt: str = Field(
        description="text before the answer, not trained; holds {question} or {subject} (task qa), or {a} and"
        " {b}, perhaps {label_0} and {label_1} (task matching); {{ stands for a brace"
    )
    completion: str = Field(
        description="text that is trained; holds {answer} (task qa) or {label} (task matching)"
    )
