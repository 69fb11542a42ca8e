"""Tables: one rule of quotes, line ends that stay, cells of any length, columns without a name."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftcore.data.cells import is_quoted, table_rows
from sftcore.data.fingerprint import store_fingerprint
from sftcore.data.ledger import Change, Reason
from sftcore.data.records import Record, span_records
from sftcore.data.units import cut_sources
from sftcore.errors import UserInputError
from sftcore.settings import LabelWords
from sftcore.sources import Source

QUOTED = 'prompt\tcompletion\n"Say ""hi"""\tYes\n5" disk\t"a\tb"\n"two\r\nlines"\tb\n'
CELLS = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=6) | st.sampled_from(
    ['"', 'say "hi"', "a\tb", "a\nb", "a\r\nb", '""']
)


def contents(records):
    return [(record.content.prompt, record.content.completion) for record in records]


def test_quotes_of_a_tab_separated_file_are_read_where_all_of_it_is_quoted(write, read):
    records, rejections, ledger = read("jsonl", write("q.tsv", QUOTED))
    assert rejections == []
    assert contents(records) == [('Say "hi"', "Yes"), ('5" disk', "a\tb"), ("two\r\nlines", "b")]
    assert ledger.altered_by_reason == {Change.QUOTES_READ: 3}


@pytest.mark.parametrize(
    "text",
    [
        'prompt\tcompletion\nhe said "hi"\tb\n"x"\ty\n',  # a text that is a quotation
        'prompt\tcompletion\n"a" and "b"\tc""d\n',
        'prompt\tcompletion\n"never closed\tb\n"x""y"\tz\n',
        'prompt\tcompletion\na\t"b ""c""\nd\te\n',
    ],
)
def test_other_quotes_in_it_are_text(write, read, text):
    records, _, ledger = read("jsonl", write("q.tsv", text))
    assert contents(records) == [tuple(line.split("\t")) for line in text.splitlines()[1:]]
    assert set(ledger.altered_by_reason) <= {Change.QUOTES_KEPT}


@pytest.mark.parametrize(
    ("rows", "num_kept"),
    [
        (['"Say ""hi"""\tyes', '"open\tx', "a\tb"], 2),
        (['"Hello"\t"World"', "plain\ttext"], 1),
        (['he said "hi"\tb', '5" disk\t"a" and "b" of it'], 0),
    ],
)
def test_cells_that_look_quoted_and_are_read_as_they_stand_are_counted(write, read, rows, num_kept):
    path = write("q.tsv", "prompt\tcompletion\n" + "".join(f"{row}\n" for row in rows))
    records, rejections, ledger = read("jsonl", path)
    assert len(records) == len(rows) and rejections == []
    assert ledger.altered_by_reason.get(Change.QUOTES_KEPT, 0) == num_kept
    assert not read("jsonl", path, quotes="none")[2].altered_by_reason  # asked for


def test_the_recipe_decides_about_quotes(write, read):
    path = write("q.tsv", 'prompt\tcompletion\n"x"\ty\n')
    as_text, _, _ = read("jsonl", path, quotes="none")
    as_quotes, _, ledger = read("jsonl", path, quotes="csv")
    assert contents(as_text) == [('"x"', "y")] and contents(as_quotes) == [("x", "y")]
    assert ledger.altered_by_reason == {Change.QUOTES_READ: 1}
    commas, _, _ = read("jsonl", write("q.csv", 'prompt,completion\n"x",y\n'), quotes="none")
    assert contents(commas) == [('"x"', "y")]


def test_a_quoted_name_shows_that_cells_are_quoted(write, read):
    records, _, _ = read("jsonl", write("q.tsv", '"prompt"\t"completion"\n"x"\t"y"\n'))
    assert contents(records) == [("x", "y")]


@settings(deadline=None)
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5))
def test_what_a_writer_of_quoted_tabs_wrote_is_read_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("tsv") / "a.tsv"
    text = io.StringIO(newline="")
    csv.writer(text, delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(
        [("p", "c"), *rows]
    )
    path.write_bytes(text.getvalue().encode())
    assert is_quoted(path, "auto")
    assert [tuple(row.value) for row in table_rows(path)][1:] == rows


def test_a_table_with_quoted_cells_is_one_unit(write):
    lines = "".join(f"{i}\tx\n" for i in range(60))
    for name, text, is_cut in (("a.tsv", lines, True), ("b.tsv", lines + '"a""b"\t"c\nd"\n', False)):
        source = Source(format="jsonl", path=str(write(name, "prompt\tcompletion\n" + text)))
        units = cut_sources([source], LabelWords(), part_bytes=40)
        assert (len(units) > 3) == is_cut
        about = {"split": "train", "labels": LabelWords(), "prefix": "r"}
        rows = [row for unit in units for row in span_records(source, unit.file, span=unit.span, **about)]
        assert all(isinstance(row, Record) for row in rows) and len(rows) == 61 - is_cut


def test_line_ends_within_a_cell_stay(write, read):
    text = 'prompt,completion\r\n"l1\r\nl2","a\r\nb"\r\n"l1\nl2",c\r\n'
    records, _, _ = read("jsonl", write("a.csv", text))
    assert contents(records) == [("l1\r\nl2", "a\r\nb"), ("l1\nl2", "c")]


def test_cells_may_be_longer_than_csvs_own_limit(write, read):
    long = "x" * 300_000
    records, rejections, _ = read("jsonl", write("a.csv", f'prompt,completion\n"{long}",b\nc,{long}\n'))
    assert rejections == [] and contents(records) == [(long, "b"), ("c", long)]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_empty_columns_at_the_end_are_no_columns(write, read, name):
    tab = "\t" if name.endswith("tsv") else ","
    text = "prompt,completion,,\na,b,,\nc,d\ne,f,,,,\ng,h,x,\ni\n".replace(",", tab)
    records, rejections, _ = read("jsonl", write(name, text))
    assert contents(records) == [("a", "b"), ("c", "d"), ("e", "f")]
    assert [(r.row, r.reason) for r in rejections] == [
        (4, Reason.WRONG_FIELD_COUNT),
        (5, Reason.WRONG_FIELD_COUNT),
    ]
    pairs = "sentence1,sentence2,label,\na,b,1,\nc,d,0\n".replace(",", tab)
    records, rejections, _ = read("pairs", write(f"p{name}", pairs))
    assert [record.content.label for record in records] == [1, 0] and rejections == []


def test_two_columns_of_one_name_are_refused(write, read):
    with pytest.raises(UserInputError, match="names two columns 'sentence1'"):
        read("pairs", write("p.csv", "sentence1,sentence1,sentence2,label\na,b,c,1\n"))
    with pytest.raises(UserInputError, match="names two columns alike"):
        read("jsonl", write("c.csv", "prompt,prompt,completion\na,b,c\n"))
    other = "sentence1,sentence2,label,genre,genre\na,b,1,x,y\n"  # not asked for
    assert len(read("pairs", write("q.csv", other))[0]) == 1


def test_quotes_are_part_of_a_stores_key(write, bpe):
    from sftcore.config import Recipe

    path = write("q.tsv", QUOTED)

    def key(**source):
        data = {"train": [{"format": "jsonl", "path": str(path)} | source]}
        values = {"model": {"path": "m"}, "data": data, "batch": {"samples_per_step": 1}}
        return store_fingerprint(Recipe.model_validate(values), bpe)

    assert len({key(), key(quotes="none"), key(quotes="csv"), key(columns={"id": None})}) == 4
