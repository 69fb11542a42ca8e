"""Files -> records: formats, odd rows, ids, limits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftcore.data.contents import label_numbers
from sftcore.data.ledger import Change, Reason
from sftcore.data.records import (
    Chat,
    Completion,
    Fact,
    Message,
    Pair,
    even_shares,
    id_prefixes,
    read_source,
)
from sftcore.errors import UserInputError
from sftcore.settings import LabelWords
from sftcore.sources import Columns, Source

FACT = {"relation": "P19", "subject": "Ann", "answers": ["Rome"]}
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " yo "}]


def questions(*subjects: str) -> str:
    return json.dumps([{"question": f"Where was {s} born?", "answers": ["Rome", "Roma"]} for s in subjects])


@pytest.mark.parametrize("name", ["P19.train.json", "P19.train.json.gz"])
def test_entityquestions_rows_get_relation_subject_and_their_own_question(write, read, name):
    records, rejections, _ = read("entityquestions", write(name, questions("Ann", 'Bob "B" (2)')))
    assert [(r.id, r.row, r.split) for r in records] == [
        ("P19.train:1", 1, "train"),
        ("P19.train:2", 2, "train"),
    ]
    assert records[1].content == Fact(
        relation="P19",
        subject='Bob "B" (2)',
        answers=("Rome", "Roma"),
        question='Where was Bob "B" (2) born?',
    )
    assert rejections == []


def test_odd_entityquestions_rows_do_not_shift_their_neighbours(write, read):
    rows = [
        {"question": "Where was Ann born?", "answers": ["Rome"]},
        {"question": "", "answers": ["Rome"]},
        {"question": "Where was Cid born?", "answers": []},
        "Where was Dot born?",
        {"question": "Where was Eve born?"},
        {"question": "Where was Fay born?", "answers": ["Oslo"]},
    ]
    records, rejections, _ = read("entityquestions", write("P19.json", json.dumps(rows)))
    assert [(r.row, r.content.subject) for r in records] == [(1, "Ann"), (6, "Fay")]
    assert [(r.row, r.reason) for r in rejections] == [
        (2, Reason.EMPTY_PROMPT),
        (3, Reason.EMPTY_ANSWER),
        (4, Reason.WRONG_TYPE),
        (5, Reason.MISSING_FIELD),
    ]
    assert "a JSON object is expected, not str" in str(rejections[2])
    assert "no 'answers'" in str(rejections[3])


def test_entityquestions_needs_the_relation_in_the_name(write, read):
    with pytest.raises(UserInputError, match="relation is read from the file's name"):
        read("entityquestions", write("born.json", questions("Ann", "Bob")))


def test_unrecoverable_subjects_name_the_file(write, read):
    with pytest.raises(UserInputError, match="P19.json"):
        read("entityquestions", write("P19.json", questions("Ann")))


def test_facts(write, read):
    rows = [
        FACT | {"id": "x"},
        FACT | {"id": 7, "answers": "Oslo"},
        FACT | {"answers": [1969, " Bern "], "question": "When? "},
        FACT | {"question": "", "id": None},
    ]
    records, rejections, ledger = read("facts", write("f.jsonl.gz", rows))
    assert rejections == []
    assert [r.id for r in records] == ["x", "7", "f:3", "f:4"]
    assert [r.content.answers for r in records] == [("Rome",), ("Oslo",), ("1969", "Bern"), ("Rome",)]
    assert [r.content.question for r in records] == [None, None, "When?", None]
    assert ledger.altered_by_reason == {Change.NUMBER_AS_TEXT: 2, Change.WHITESPACE_TRIMMED: 2}


@pytest.mark.parametrize(
    ("change", "reason", "detail"),
    [
        ({"subject": None}, Reason.MISSING_FIELD, "no 'subject'"),
        ({"subject": "  "}, Reason.EMPTY_PROMPT, "'relation' or 'subject' is empty"),
        ({"subject": ["Ann"]}, Reason.WRONG_TYPE, "'subject' must be text, not list"),
        ({"subject": True}, Reason.WRONG_TYPE, "'subject' must be text, not bool"),
        ({"answers": []}, Reason.EMPTY_ANSWER, "'answers' is empty"),
        ({"answers": ["Rome", ""]}, Reason.EMPTY_ANSWER, "one of 'answers' is empty"),
        ({"answers": [1.5]}, Reason.WRONG_TYPE, "'answers' must be text, not float"),
        ({"answers": {"a": 1}}, Reason.WRONG_TYPE, "'answers' must be text, not dict"),
        ({"answers": ["Ro\0me"]}, Reason.NUL_CHARACTER, "in 'answers'"),
        ({"answers": ["\ud800"]}, Reason.UNDECODABLE_BYTES, "'answers' is not UTF-8"),
        ({"id": ""}, Reason.WRONG_TYPE, "'id' is empty"),
        ({"id": [1]}, Reason.WRONG_TYPE, "'id' must be text, not list"),
    ],
)
def test_odd_facts_are_rejected_with_reason(write, read, change, reason, detail):
    path = write("f.jsonl", json.dumps(FACT | change) + "\n" + json.dumps(FACT) + "\n")
    records, rejections, _ = read("facts", path)
    assert [r.row for r in records] == [2]
    assert [(r.file, r.row, r.reason, r.detail) for r in rejections] == [(str(path), 1, reason, detail)]


def test_bytes_that_are_not_utf8_reject_their_row_only(write, read):
    good = "你好\t您好\t1\n".encode()
    path = write("p.tsv", good + "你们\t乗\t1\n".encode("gbk") + good)
    records, rejections, _ = read("pairs", path, columns=Columns(a=0, b=1, label=2))
    assert [r.row for r in records] == [1, 3]
    assert [(r.row, r.reason) for r in rejections] == [(2, Reason.UNDECODABLE_BYTES)]
    assert "\\udc" in rejections[0].excerpt


def test_pairs_labels_are_numbers_strings_or_words(write, read):
    labels = [0, "1", " 1 ", "Same", "different", "相同", "不同", 2, 0.5, "yes", None]
    path = write("p.jsonl", [{"sentence1": "a", "sentence2": "b", "label": label} for label in labels])
    records, rejections, _ = read("pairs", path)
    assert [r.content for r in records] == [Pair(a="a", b="b", label=n) for n in (0, 1, 1, 1, 0, 1, 0)]
    assert [r.reason for r in rejections] == [Reason.UNKNOWN_LABEL] * 3 + [Reason.MISSING_FIELD]
    assert rejections[0].detail == "label 2"


def test_other_spellings_of_the_numbers_are_labels_and_counted(write, read):
    labels = [1.0, "0.0", True, "False", "\uff11", 1]
    path = write("p.jsonl", [{"sentence1": "a", "sentence2": "b", "label": label} for label in labels])
    records, rejections, ledger = read("pairs", path)
    assert [r.content.label for r in records] == [1, 0, 1, 0, 1, 1] and rejections == []
    assert ledger.altered_by_reason[Change.LABEL_SPELLING] == 5


def test_empty_texts_of_pairs_are_rejected(write, read):
    path = write("p.tsv", "sentence1\tsentence2\tlabel\na\t \t1\na\tb\t1\n")
    _, rejections, _ = read("pairs", path)
    assert [(r.row, r.reason, r.detail) for r in rejections] == [
        (1, Reason.EMPTY_PROMPT, "one of the two texts is empty")
    ]


def test_lone_carriage_return_in_a_tsv_text_stays(write, read):
    records, _, _ = read("pairs", write("p.tsv", "sentence1\tsentence2\tlabel\r\na\rb\tc\t1\r\n"))
    assert records[0].content == Pair(a="a\rb", b="c", label=1)


def test_jsonl_is_verbatim(write, read):
    rows = [{"id": "g1", "prompt": " Q\n", "completion": "\tA ", "source": None}, {"messages": TURNS}]
    records, _, ledger = read("jsonl", write("c.jsonl", rows))
    assert records[0].content == Completion(prompt=" Q\n", completion="\tA ")
    assert records[1].content == Chat(
        messages=(Message(role="user", content="Hi"), Message(role="assistant", content=" yo "))
    )
    assert ledger.altered_by_reason == {}


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({"prompt": "a"}, Reason.MISSING_FIELD, "this row has prompt; needed: messages [{role, content}] or"),
        ({"question": "a", "answer": "b"}, Reason.MISSING_FIELD, "this row has question, answer; needed: "),
        ({"prompt": "\n", "completion": "b"}, Reason.EMPTY_PROMPT, "'prompt' is empty"),
        ({"prompt": "a", "completion": " "}, Reason.EMPTY_ANSWER, "'completion' is empty"),
        ({"prompt": "a", "completion": 7}, Reason.WRONG_TYPE, "'completion' must be text, not int"),
        ({"messages": "Hi"}, Reason.WRONG_TYPE, "'messages' must be a list"),
        ({"messages": []}, Reason.EMPTY_ANSWER, "no assistant turn"),
        ({"messages": TURNS[:1]}, Reason.EMPTY_ANSWER, "no assistant turn"),
        ({"messages": TURNS[1:]}, Reason.EMPTY_PROMPT, "the first turn is the assistant's"),
        (
            {"messages": [*TURNS, TURNS[1] | {"content": ""}]},
            Reason.EMPTY_ANSWER,
            "an assistant turn is empty",
        ),
        ({"messages": TURNS, "tools": [{"name": "f"}]}, Reason.UNKNOWN_KEY, "a row with 'tools'"),
        ({"messages": [TURNS[0] | {"content": " "}, TURNS[1]]}, Reason.EMPTY_PROMPT, "nothing is said"),
        ({"messages": [{"content": "Hi"}]}, Reason.WRONG_TYPE, "role None is none of system"),
        ({"messages": [TURNS[0], TURNS[1] | {"weight": 0.5}]}, Reason.UNKNOWN_KEY, "a turn with 'weight'"),
        ({"messages": [{"role": "user", "content": None}]}, Reason.WRONG_TYPE, "'content' must be text"),
    ],
)
def test_odd_examples_are_rejected_with_reason(write, read, row, reason, detail):
    _, rejections, _ = read("jsonl", write("c.jsonl", [row, {"prompt": "a", "completion": "b"}]))
    assert [r.reason for r in rejections] == [reason]
    assert detail in rejections[0].detail


@pytest.mark.parametrize(
    ("format", "name", "content", "message"),
    [
        ("facts", "f.jsonl", "", "f.jsonl: the file holds no rows"),
        ("facts", "f.jsonl", "\n \n", "the file holds no rows"),
        (
            "facts",
            "f.jsonl",
            "{}\nnope\n",
            "f.jsonl: no usable row\n.*f.jsonl:1: missing_field.*\n.*unreadable_line",
        ),
        ("pairs", "p.tsv", "sentence1\tsentence2\tlabel\n", "p.tsv: the file holds no rows"),
        ("entityquestions", "P19.json", "", "P19.json: the file holds no rows"),
        ("entityquestions", "P19.json", "[1]", "P19.json: no usable row"),
    ],
)
def test_files_without_a_usable_row_are_named(write, read, format, name, content, message):
    with pytest.raises(UserInputError, match=message):
        read(format, write(name, content))


def test_a_source_without_files_is_named(read, tmp_path):
    with pytest.raises(UserInputError, match=r"data.train: no file matches\n.*nothing\*"):
        read("facts", tmp_path / "nothing*")


def test_limit_counts_rows_and_keeps_every_file(write, read, tmp_path):
    for name, n in (("a", 10), ("b", 2), ("c", 10)):
        write(f"{name}.jsonl", [FACT] * n)
    records, _, _ = read("facts", tmp_path / "*.jsonl", limit=9)
    assert [r.id for r in records] == [*(f"a:{i}" for i in (1, 2, 3, 4)), "b:1", "b:2", "c:1", "c:2", "c:3"]
    assert len(read("facts", tmp_path / "a.jsonl", limit=3)[0]) == 3
    assert [r.id for r in read("facts", tmp_path / "*.jsonl", limit=2)[0]] == ["a:1", "b:1"]


def test_limit_counts_rejected_rows_too(write, read):
    records, rejections, ledger = read(
        "facts", write("f.jsonl", "nope\n" + json.dumps(FACT) + "\n" * 2), limit=2
    )
    assert (len(records), len(rejections), ledger.num_rows_read) == (1, 1, 2)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(0, 100))
def test_even_shares(counts, total):
    shares = even_shares(counts, total)
    assert sum(shares) == min(total, sum(counts))
    assert all(share <= count for share, count in zip(shares, counts, strict=True))
    open_ended = [s for s, count in zip(shares, counts, strict=True) if s < count]
    assert not open_ended or max(shares) - min(open_ended) <= 1


def test_id_prefixes_tell_files_apart():
    files = [Path(p) for p in ("/d/x/a.jsonl", "/d/y/a.jsonl", "/d/y/a.jsonl.gz", "/d/b.tsv")]
    assert list(id_prefixes(files).values()) == ["x/a", "/d/y/a.jsonl", "/d/y/a.jsonl.gz", "b"]
    assert id_prefixes([files[0], files[0]]) == {files[0]: "a"}


def test_prefixes_of_the_whole_split_are_used(write):
    path = write("f.jsonl", [FACT])
    source = Source(format="facts", path=str(path))
    (record,) = read_source(source, split="test", labels=LabelWords(), prefixes={path: "x/f"})
    assert (record.id, record.split) == ("x/f:1", "test")


def test_label_words_ignore_case():
    assert label_numbers(LabelWords(zh=("否", "是"), en=("No", "Yes"))) == {
        "0": 0, "1": 1, "否": 0, "是": 1, "no": 0, "yes": 1,
    }  # fmt: skip


DEEP = range(900, 1101, 10)  # around the depths at which orjson, repr and json.dumps give up


@pytest.mark.parametrize(
    ("format", "row", "good"),
    [
        ("jsonl", "DEEP", {"prompt": "Q", "completion": "A"}),
        ("jsonl", '{"prompt": DEEP, "completion": "A"}', {"prompt": "Q", "completion": "A"}),
        ("jsonl", '{"messages": [{"role": DEEP, "content": "x"}]}', {"messages": TURNS}),
        ("jsonl", '{"id": DEEP, "prompt": "Q", "completion": "A"}', {"prompt": "Q", "completion": "A"}),
        ("facts", '{"relation": "P1", "subject": "S", "answers": DEEP}', FACT),
        ("pairs", '{"sentence1": "a", "sentence2": "b", "label": DEEP}',
         {"sentence1": "a", "sentence2": "b", "label": 1}),
    ],
)  # fmt: skip
def test_rows_nested_deeper_than_python_can_show_are_rejections(write, read, format, row, good):
    deep = [row.replace("DEEP", opening * n + '""' + closing * n)
            for n in DEEP for opening, closing in (("[", "]"), ('{"k":', "}"))]  # fmt: skip
    path = write("d.jsonl", "\n".join([*deep, json.dumps(good)]))
    records, rejections, _ = read(format, path)
    assert len(records) == 1 and len(rejections) == len(deep)
    assert all(r.excerpt and r.detail for r in rejections)


def test_a_list_with_a_deep_element_costs_that_element_only(write, read):
    good = questions("Ann", "Bob")[:-1]
    for n in DEEP:
        path = write(f"P{n}.json", f"{good}, {'[' * n + ']' * n}]")
        try:
            records, rejections, _ = read("entityquestions", path)
        except UserInputError as error:
            assert "not valid JSON" in str(error)  # deeper than the reader goes
        else:
            assert (len(records), [r.row for r in rejections]) == (2, [3])


def test_a_table_that_begins_with_pk_is_no_zip_archive(write, read):
    records, rejections, _ = read("pairs", write("pk.tsv", "PK是什么意思\t什么是PK\t1\n你好吗\t你好\t0\n"))
    assert records[0].content == Pair(a="PK是什么意思", b="什么是PK", label=1) and rejections == []
    with pytest.raises(UserInputError, match="a zip archive, not UTF-8 text"):
        read("pairs", write("archive.tsv", b"PK\x03\x04\x14\x00"))


LEFT = {"id": "x", "recall": 0.5, "s_pop": 12, "subject_id": "Q7", "aliases": []}


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"context": "Rome is old."}, "a row with 'context', which is not read"),
        ({"weight": 0.5, "aliases": ["Roma"]}, "a row with 'weight', 'aliases', which are not read"),
        ({"Question": "Where?"}, "a row with 'Question', which is not read"),
        ({"metadata": {"train": False}}, "a row with 'metadata.train', which is not read"),
    ],
)
def test_what_stands_next_to_a_fact_is_meta_data_or_costs_the_row(write, read, more, named):
    path = write("f.jsonl", [FACT | LEFT, FACT | more])
    records, rejections, ledger = read("facts", path)
    assert [record.id for record in records] == ["x"]
    assert [(r.row, r.reason, r.detail) for r in rejections] == [(2, Reason.UNKNOWN_KEY, named)]
    assert ledger.altered_by_reason == {Change.COLUMN_LEFT_OUT: 1}
    records, rejections, _ = read("facts", path, columns=Columns(ignore=list(more)))
    assert len(records) == 2 and not rejections


@pytest.mark.parametrize("kind", ["jsonl", "tsv", "csv"])
@pytest.mark.parametrize(("name", "value"), [("context", "He said:"), ("loss_weight", "2"), ("notes", "ok")])
def test_what_stands_next_to_a_pair_is_meta_data_or_costs_the_row(write, read, kind, name, value):
    def path_of(row):
        if kind == "jsonl":
            return write("p.jsonl", [row])
        separator = "," if kind == "csv" else "\t"
        return write(f"p.{kind}", "\n".join(separator.join(map(str, line)) for line in (row, row.values())))

    good = {"id": "7", "sentence1": "x", "sentence2": "y", "label": "1", "genre": "fiction", "qid1": 3}
    records, _, ledger = read("pairs", path_of(good))
    assert len(records) == 1 and ledger.altered_by_reason == {Change.COLUMN_LEFT_OUT: 1}
    with pytest.raises(UserInputError, match=f"(?s)a row with '{name}', which is not read.*ignore"):
        read("pairs", path_of(good | {name: value}))
    for ignored in ([name], ["*"]):
        records, _, _ = read("pairs", path_of(good | {name: value}), columns=Columns(ignore=ignored))
        assert [record.content.label for record in records] == [1]
    assert len(read("pairs", path_of(good | {name: ""}))[0]) == 1  # an empty cell says nothing


def test_columns_of_pairs_that_are_chosen_by_number_stand_for_themselves(write, read):
    path = write("p.tsv", "x\ty\t1\tsome notes\n")
    assert len(read("pairs", path, columns=Columns(a=0, b=1, label=2))[0]) == 1
