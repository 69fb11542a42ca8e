"""Prompts and chats as people have them: other names, tables, ShareGPT, Alpaca, one JSON list."""

from __future__ import annotations

import json

import pytest

from sftcore.config import Recipe
from sftcore.data.contents import Chat, Completion, Message, Pair
from sftcore.data.fingerprint import store_fingerprint
from sftcore.data.ledger import REMEDIES, Ledger, Reason
from sftcore.data.records import Record, span_records
from sftcore.data.units import cut_sources
from sftcore.errors import UserInputError
from sftcore.settings import LabelWords
from sftcore.sources import Source

SHAREGPT = [
    {"from": "system", "value": "Be kind."},
    {"from": "human", "value": "Hi"},
    {"from": "gpt", "value": " yo "},
]
NAMED = {"prompt": "question", "completion": "answer"}
QUESTION = {"question": "Where?", "answer": "Rome"}


def contents(records):
    return [record.content for record in records]


def test_a_row_of_another_shape_says_what_it_has_and_what_is_needed(write, read):
    good = {"prompt": "a", "completion": "b"}
    long = {f"key-{i}-{'x' * 30}": "v" for i in range(9)}
    path = write("r.jsonl", [good, {"dialog": [], "id": "7"}, QUESTION | {"prompt": None}, {}, long])
    records, rejections, ledger = read("jsonl", path)
    assert len(records) == 1 and {r.reason for r in rejections} == {Reason.MISSING_FIELD}
    needed = "needed: messages [{role, content}] or prompt + completion"
    has = ["dialog, id", "question, answer", "nothing"]
    assert [r.detail for r in rejections[:3]] == [f"this row has {keys}; {needed}" for keys in has]
    assert "4 more; " in rejections[3].detail and rejections[3].detail.endswith(needed)
    problem = ledger.problem(frozenset(Reason), num_rows=5, max_fraction=0.01)
    assert "columns` of the source: {prompt: ..., completion: ...}" in problem.remedy


def test_a_file_without_a_usable_row_says_so_too(write, read):
    with pytest.raises(UserInputError) as caught:
        read("jsonl", write("r.jsonl", [QUESTION] * 5))
    text = str(caught.value)
    assert (
        "this row has question, answer; needed: messages" in text and REMEDIES[Reason.MISSING_FIELD] in text
    )


@pytest.mark.parametrize(
    "name", ["r.jsonl", "r.jsonl.gz", "r.json", "r.json.gz", "r.csv", "r.tsv", "r.parquet"]
)
def test_columns_name_prompt_and_completion_in_every_kind_of_file(write, read, tmp_path, name):
    rows = [QUESTION | {"id": "x"}, {"question": " When,\u2028 then?", "answer": "1969\r", "id": "y"}]
    if name.endswith("parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = tmp_path / name
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name.endswith("v"):
        cells = ["id,question,answer", "x,Where?,Rome", 'y," When,\u2028 then?","1969\r"']
        text = "\n".join(cells) + "\n"
        tabbed = "id\tquestion\tanswer\nx\tWhere?\tRome\ny\t When,\u2028 then?\t1969\n"
        path = write(name, text if name.endswith("csv") else tabbed)
    else:
        path = write(name, json.dumps(rows) if ".json" in name and ".jsonl" not in name else rows)
    records, rejections, _ = read("jsonl", path, columns=NAMED)
    assert rejections == [] and [(r.id, r.row) for r in records] == [("x", 1), ("y", 2)]
    assert records[0].content == Completion(prompt="Where?", completion="Rome")
    last = records[1].content
    assert last.prompt == " When,\u2028 then?" and last.completion.strip() == "1969"


def test_a_data_set_with_columns(read, tmp_path):
    from datasets import Dataset

    folder = tmp_path / "set"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yo"}]
    Dataset.from_list([{"chat": turns}, {"chat": turns}]).save_to_disk(folder)
    records, _, _ = read("jsonl", folder, columns={"messages": "chat"})
    assert contents(records) == [Chat(messages=tuple(Message(**turn) for turn in turns))] * 2


def test_rows_of_a_table_are_counted_without_its_header(write, read):
    text = 'question,answer\nWhere?,Rome\nbad\n"stray,x\n"When\nthen?",now\n'
    records, rejections, _ = read("jsonl", write("r.csv", text), columns=NAMED)
    assert [(r.row, r.content.prompt) for r in records] == [(1, "Where?"), (4, "When\nthen?")]
    reasons = [(2, Reason.WRONG_FIELD_COUNT), (3, Reason.UNREADABLE_LINE)]
    assert [(r.row, r.reason) for r in rejections] == reasons


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.csv", "question,question\na,b\n", "names two columns alike"),
        ("r.csv", '"question,answer\na,b\n', "the first line can't be read"),
        ("r.tsv", "Question\tAnswer\na\tb\n", "this row has Question, Answer; needed: "),
        ("r.tsv", "", "the file holds no rows"),
        ("r.json", '[{"question": "a"', "not valid JSON"),
    ],
)
def test_odd_tables_and_lists_are_named(write, read, name, content, message):
    with pytest.raises(UserInputError, match=message):
        read("jsonl", write(name, content), columns=NAMED)


@pytest.mark.parametrize("pretty", [None, 1])
def test_a_json_list_is_read_as_rows_by_every_format(write, read, pretty):
    rows = [QUESTION, "odd", QUESTION, {"question": "", "answer": "x"}]
    path = write("r.json", "\ufeff \n" + json.dumps(rows, indent=pretty))
    records, rejections, _ = read("jsonl", path, columns=NAMED)
    assert [(r.id, r.row) for r in records] == [("r:1", 1), ("r:3", 3)]
    assert [(r.row, r.reason) for r in rejections] == [(2, Reason.WRONG_TYPE), (4, Reason.EMPTY_PROMPT)]
    pair = {"sentence1": "a", "sentence2": "b", "label": 1}
    records, _, _ = read("pairs", write("p.json", json.dumps([pair], indent=pretty)))
    assert contents(records) == [Pair(a="a", b="b", label=1)]
    fact = {"relation": "P19", "subject": "Ann", "answers": ["Rome"]}
    records, _, _ = read("facts", write("f.json", json.dumps([fact, fact], indent=pretty)))
    assert [r.row for r in records] == [1, 2]


def test_json_lines_named_json_are_still_lines(write, read):
    records, rejections, _ = read("jsonl", write("r.json", [QUESTION, QUESTION]), columns=NAMED)
    assert [r.row for r in records] == [1, 2] and rejections == []


@pytest.mark.parametrize(("name", "is_cut"), [("r.json", False), ("lines.json", True), ("r.tsv", True)])
def test_units_of_lists_and_tables_hold_each_row_once(write, name, is_cut):
    rows = [QUESTION | {"question": f"{i}?"} for i in range(40)]
    cells = "question\tanswer\n" + "".join(f"{i}?\tRome\n" for i in range(40))
    path = write(name, {"r.json": json.dumps(rows, indent=1), "lines.json": rows, "r.tsv": cells}[name])
    source = Source(format="jsonl", path=str(path), columns=NAMED)
    units = cut_sources([source], LabelWords(), part_bytes=200)
    assert (len(units) > 3) == is_cut
    found = []
    for unit in units:
        about = {"split": "train", "labels": LabelWords(), "prefix": "r", "span": unit.span}
        found += span_records(source, path, **about)
    assert all(isinstance(row, Record) for row in found)
    assert [(r.id, r.row, r.content.prompt) for r in found] == [
        (f"r:{i + 1}", i + 1, f"{i}?") for i in range(40)
    ]


def test_sharegpt_turns_get_roles(write, read):
    other = [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]
    openai = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"id": "s", "conversations": SHAREGPT}, {"messages": other}, {"conversations": openai}]
    records, rejections, _ = read("jsonl", write("s.json", json.dumps(rows)))
    assert rejections == []
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", " yo ")]
    assert records[0].content == Chat(messages=tuple(Message(role=r, content=c) for r, c in turns))
    assert records[1].content == records[2].content
    named, _, _ = read("jsonl", write("n.jsonl", [{"talk": SHAREGPT}]), columns={"messages": "talk"})
    assert named[0].content == records[0].content


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        (
            {"conversations": [*SHAREGPT, {"from": "observation", "value": "x"}]},
            "from 'observation' is none of",
        ),
        (
            {"conversations": [*SHAREGPT, {"from": "function_call", "value": "x"}]},
            "from 'function_call' is none",
        ),
        ({"conversations": [*SHAREGPT, {"from": ["gpt"], "value": "x"}]}, r"from \['gpt'\] is none of human"),
        ({"conversations": SHAREGPT, "system": "Be rude."}, "'system' next to another system turn"),
        (
            {"conversations": [SHAREGPT[1], {"from": "gpt", "value": None}]},
            "'value' must be text, not NoneType",
        ),
    ],
)
def test_odd_sharegpt_rows_are_rejected_by_name(write, read, row, detail):
    rows = [row, {"conversations": SHAREGPT, "system": "", "tools": []}]
    records, (rejection,), _ = read("jsonl", write("s.jsonl", rows))
    assert len(records) == 1 and rejection.reason is Reason.WRONG_TYPE
    with pytest.raises(AssertionError, match=detail):
        raise AssertionError(rejection.detail)


def test_alpaca_rows_are_prompts_with_completions(write, tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3", "text": "Add.\n1 2\n3"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
        {"instruction": "Say hi.", "output": "hi"},
        {"instruction": "Say hi.", "output": "hi", "history": [["a", "b"]]},
        {"instruction": "Say hi.", "input": 7, "output": "hi"},
    ]
    source = Source(preset="alpaca", path=str(write("alpaca_data.json", json.dumps(rows))))
    assert source.format == "jsonl"
    found = list(
        span_records(source, tmp_path / "alpaca_data.json", split="train", labels=LabelWords(), prefix="a")
    )
    assert [row.content for row in found[:3]] == [
        Completion(prompt="Add.\n\n1 2\n\n", completion="3"),
        Completion(prompt="Say hi.\n\n", completion="hi"),
        Completion(prompt="Say hi.\n\n", completion="hi"),
    ]
    assert [row.detail for row in found[3:]] == [
        "a row with 'history', which is not read",
        "'input' must be text, not int",
    ]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {"format": "pairs", "columns": NAMED},
            "format pairs has no columns.prompt; those it has: a, b, label",
        ),
        (
            {"format": "jsonl", "columns": {"a": "x"}},
            "format jsonl has no columns.a; those it has: prompt, input",
        ),
        ({"format": "facts", "columns": NAMED}, "format facts has no columns.prompt; those it has: id"),
        ({"format": "pairs", "preset": "alpaca"}, "preset alpaca is a layout of jsonl, not of pairs"),
        ({"format": "jsonl", "preset": "bq"}, "preset bq is a layout of pairs, not of jsonl"),
    ],
)
def test_columns_of_another_format_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        Source(path="x", **source)


def test_a_resolved_source_means_the_same():
    for values in (
        {"format": "facts"},
        {"preset": "alpaca"},
        {"preset": "bq"},
        {"format": "jsonl", "columns": NAMED},
    ):
        source = Source(path="x", **values)
        assert Source.model_validate(source.model_dump()) == source


def test_columns_decide_the_key_of_a_store(write, bpe):
    path = write("r.jsonl", [QUESTION | {"instruction": "a", "output": "b"}])

    def key(**source):
        data = {"train": [{"format": "jsonl", "path": str(path)} | source]}
        values = {"model": {"path": "m"}, "data": data, "batch": {"samples_per_step": 1}}
        return store_fingerprint(Recipe.model_validate(values), bpe)

    keys = [key(), key(columns=NAMED), key(columns=NAMED | {"input": "id"}), key(preset="alpaca")]
    assert len(set(keys)) == 4 and key() == keys[0]


def test_ledger_lines_stay_bounded(write, read):
    good = {"prompt": "a", "completion": "b"}
    _, (rejection,), ledger = read("jsonl", write("r.jsonl", [good, {"\u6f22" * 10**5: "x"}]))
    assert isinstance(ledger, Ledger) and len(rejection.detail) <= 200 and len(rejection.excerpt) <= 80
