"""Containment: hand-checked cases for each decision, and the properties that hold for all names."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sftcore.errors import UserInputError
from sftcore.knowledge.containment import (
    ALIASES_PATH,
    HEADER,
    AliasTable,
    AnswerMatcher,
    is_unspaced,
    normalise,
)

ALIASES = AliasTable.load()


def contains_answer(text: str, answers: list[str], aliases: AliasTable | None = None) -> bool:
    return AnswerMatcher(answers, aliases).matches(text)


LABELLED = list(
    csv.DictReader(
        (Path(__file__).parent / "containment.tsv").read_text(encoding="utf-8").splitlines(),
        delimiter="\t",
        quoting=csv.QUOTE_NONE,
    )
)
TAILS = [".S.R.", "-Bissau", "n", "\u0301", " Hilton", ",000", " 000 ", "'s", " Inc Tower x"]
TAILS += [
    " 2",
    " & Body Works",
    ", Texas",
    ", Texas and Rome",
    " rainforest",
    "inforest",
    "++",
    "-5",
    " million",
]
TAILS += [" is fun", " ahead", " NOW", " City F.C.", "lion", "th", "km", "d"]
TEXTS = st.text(max_size=40)
LATIN = st.characters(categories=["Lu", "Ll"], max_codepoint=0x24F).filter(lambda c: normalise(c).isalpha())
LETTERS = st.text(LATIN, min_size=2, max_size=12)  # without ŉ and Ŀ, which hold an apostrophe and a dot

# text, gold answers, whether it is a hit; with the shipped aliases
GOLDEN = [
    # whole words
    ("He was born in Paris, France.", ["Paris"], True),
    ("PARIS", ["Paris"], True),
    ("He was a Parisian.", ["Paris"], False),
    ("He was a Roman.", ["Oman"], False),
    ("It is in Niger.", ["Nigeria"], False),
    ("It is in Nigeria.", ["Niger"], False),
    ("Anglo-French treaty", ["French"], True),
    ("France's oldest bridge", ["France"], True),
    ("_Paris_ and **Rome**", ["Paris"], True),
    ("Area51", ["Area"], False),
    ("", ["Paris"], False),
    ("first Parisian, then Paris", ["Paris"], True),
    # several gold answers
    ("The painter Cleanth Brooks", ["Robert Penn Warren", "Cleanth Brooks"], True),
    ("The painter John Brooks", ["Robert Penn Warren", "Cleanth Brooks"], False),
    # punctuation in and around names
    ("moved to St. Louis, Missouri", ["St. Louis"], True),
    ("built by Sun Shipbuilding & Drydock Co. in 1943", ["Sun Shipbuilding & Drydock Co."], True),
    ("made by Canon Inc in Japan", ["Canon Inc."], True),
    ("the band Sunn O))) from Seattle", ["Sunn O)))"], True),
    ("sung by “Weird Al” Yankovic", ['"Weird Al" Yankovic'], True),
    ("written by Eugene O’Neill", ["Eugene O'Neill"], True),
    ("the Austria–Hungary border", ["Austria-Hungary"], True),
    ("(Paris)", ["Paris"], True),
    ("“Paris”", ["Paris"], True),
    ("at Washington University in St.\xa0Louis", ["Washington University in St. Louis"], True),
    ("at Cairo  University", ["Cairo University"], True),
    ("released by A&M Records", ["A&M Records"], True),
    # Unicode forms
    ("born in Zu\u0308rich", ["Zürich"], True),
    ("born in ＰＡＲＩＳ", ["Paris"], True),
    ("the ﬁrst", ["first"], True),
    ("STRASSE", ["Straße"], True),
    # aliases, both ways
    ("It is in the USA.", ["United States of America"], True),
    ("It is in the United States of America.", ["USA"], True),
    ("a U.S. company", ["United States of America"], True),
    ("born in Bombay", ["Mumbai"], True),
    ("born in Mumbai", ["Bombay"], True),
    ("He plays goalie.", ["goaltender"], True),
    ("It is in Canada.", ["United States of America"], False),
    # a name in capitals that folds to an everyday word
    ("It is in the US.", ["United States of America"], True),
    ("He told us a story.", ["United States of America"], False),
    ("Come with us.", ["US"], False),
    ("He studied at MIT.", ["Massachusetts Institute of Technology"], True),
    ("Er kam mit dem Zug.", ["Massachusetts Institute of Technology"], False),
    ("made in the usa", ["United States of America"], True),
    ("released by Emi", ["EMI"], True),
    # initialisms that go on
    ("It was in the U.S.S.R. then.", ["United States of America"], False),
    ("It was in the U.S.S.R. then.", ["Soviet Union"], True),
    ("It ends in the U.S.", ["United States of America"], True),
    # near misses
    ("somewhere in South America", ["United States of America"], False),
    ("somewhere in South America and then in America", ["United States of America"], True),
    ("in New Mexico", ["Mexico"], False),
    ("in Papua New Guinea", ["Guinea"], False),
    ("in Guinea-Bissau", ["Guinea"], False),
    ("in Guinea", ["Guinea"], True),
    ("in Northern Ireland", ["Ireland"], False),
    ("in the Democratic Republic of Congo", ["Republic of the Congo"], False),
    ("born in Austria-Hungary", ["Hungary"], False),
    ("in the Republic of China", ["People's Republic of China"], False),
    ("in the People's Republic of China", ["People's Republic of China"], True),
    ("in the People's Republic of China", ["Taiwan"], False),
    ("그는 한국에서", ["South Korea"], True),
    ("그는 한국어를", ["South Korea"], False),
    ("in New Mexico", ["Mexico", "New Mexico"], True),
    # Chinese, Japanese, Thai: no word borders
    ("巴黎是法国的首都。", ["法国"], True),
    ("他出生在上海市。", ["上海"], True),
    ("他出生在上海市。", ["Shanghai"], True),
    ("他出生在南京。", ["上海"], False),
    ("東京都に住んでいる", ["Tokyo"], True),
    ("スターを見た", ["スター"], True),
    ("กรุงเทพมหานคร", ["Bangkok"], True),
    ("他住在Paris的郊区", ["Paris"], True),
    ("他是Parisian", ["Paris"], False),
    # Korean: particles follow, a border comes before
    ("그는 서울에서 태어났다", ["서울"], True),
    ("그는 남서울에서", ["서울"], False),
    ("그는 Paris에서 태어났다", ["Paris"], True),
    # accents, apostrophes, hyphens, numerals and dates in another form
    ("the walls of Xi'an and Xian", ["Xi'ān"], True),
    ("wind farms of Orsted", ["Ørsted"], True),
    ("lives in São Paulo", ["Sao Paulo"], True),
    ("born in Koeln", ["Köln"], True),
    ("the film Spiderman", ["Spider-Man"], True),
    ("the film Spider-Man", ["Spiderman"], True),
    ("died in World War 2", ["World War II"], True),
    ("died in World War Two", ["World War 2"], True),
    ("died in World War I", ["World War 2"], False),
    ("on May 5th, 1990", ["5 May 1990"], True),
    ("生于1990年5月5日", ["May 5, 1990"], True),
    ("on 15 May 1990", ["5 May 1990"], False),
    ("on 5 May 1990.", ["5 May 1991"], False),
    ("the capital Washington, D.C.", ["Washington, D.C."], True),
    ("written for .NET", [".NET"], True),
    # numbers of something else
    ("is 4km away", ["4"], True),
    ("the 4th", ["4"], False),
    ("at \u22125 degrees", ["5"], False),
    ("at \u22125 degrees", ["-5"], True),
    ("won 4-5", ["4", "5"], False),
    ("from 1914-1918", ["1914"], True),
    ("the S&P 500 index", ["500"], False),
    ("About 500 came", ["500"], True),
    ("in Lima 20 years ago", ["20"], True),
    ("5 million people", ["5"], False),
    # another place, firm or part
    ("in Paris, Texas", ["Paris"], False),
    ("in Paris, France", ["Paris"], True),
    ("in Houston, Texas", ["Houston"], True),
    ("in Mexico, Texas and Arizona", ["Mexico"], True),
    ("flew Air Canada", ["Canada"], False),
    ("lives in Toronto Canada", ["Canada"], True),
    ("plays for Bayern Munich", ["Munich"], False),
    ("a soap of Bath & Body Works", ["Bath"], False),
    ("Germany & France", ["Germany"], True),
    ("in Toy Story 2", ["Toy Story"], False),
    ("written in C++", ["C"], False),
    ("non-English words", ["English"], False),
    # everyday words
    ("TELL US NOW", ["US"], False),
    ("MADE IN THE US", ["US"], True),
    ("Reading is fun", ["Reading"], False),
    ("Reading is a town", ["Reading"], True),
    ("sat on a rock", ["Rock"], False),
    ("led a rock band", ["Rock"], True),
    # combining marks are letters: the Hindi "राम" (Ram) is not in "रामा" (Rama)
    ("रामा आया", ["राम"], False),
    ("राम आया", ["राम"], True),
]


@pytest.mark.parametrize(("text", "answers", "expected"), GOLDEN)
def test_golden_cases(text: str, answers: list[str], expected: bool) -> None:
    assert contains_answer(text, answers, ALIASES) is expected


def test_labelled_completions_are_judged_as_people_do() -> None:
    """Labelled by hand.

    Precision and recall of rows that the rules had not met: 0.87 and 0.98 of rows 336 to 586, 0.97 and 0.95
    of the 176 from "Café de Flore" on, 0.94 and 0.90 of the last 147, which seek what is hard.
    """
    found = [(int(row["hit"]), AnswerMatcher([row["answer"]], ALIASES)) for row in LABELLED]
    verdicts = [
        (hit, matcher.matches(row["completion"])) for (hit, matcher), row in zip(found, LABELLED, strict=True)
    ]
    hits = sum(hit and verdict for hit, verdict in verdicts)
    assert len(LABELLED) > 1000 and {hit for hit, _ in verdicts} == {0, 1}
    assert sum(any(map(is_unspaced, row["answer"])) for row in LABELLED) > 40, "Chinese, too"
    assert hits / sum(verdict for _, verdict in verdicts) > 0.98  # precision
    assert hits / sum(hit for hit, _ in verdicts) > 0.99  # recall


def test_everything_that_is_inside_a_text_is_found_anywhere() -> None:
    for text, answer in (("Wakefield Cathedral", "Wakefield"), ("New York", "York"), ("a nice day", "Nice")):
        assert not contains_answer(text, [answer])
        assert AnswerMatcher([answer], anywhere=True).matches(text)


def test_golden_cases_hold_both_outcomes_often() -> None:
    outcomes = [expected for _, _, expected in GOLDEN]
    assert outcomes.count(True) > 20 and outcomes.count(False) > 15


def test_without_a_table_there_are_no_aliases() -> None:
    assert not contains_answer("born in Bombay", ["Mumbai"])
    assert contains_answer("born in Bombay", ["Mumbai"], ALIASES)


@given(TEXTS)
def test_normalise_is_a_fixed_point(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


@given(st.sampled_from([*"'\"-()[]., "]), LETTERS, st.sampled_from([*"'\"-()[].,;:!? "]))
def test_a_name_is_found_between_any_punctuation(before: str, name: str, after: str) -> None:
    assume(not name.isupper())
    assert AnswerMatcher([name]).matches(f"so{before}{name}{after} so")


@given(LETTERS, LETTERS)
def test_a_name_is_not_found_inside_a_longer_word(name: str, more: str) -> None:
    word = name + more
    assume(normalise(name) not in normalise(word)[1:] and not word.isupper())
    assert not AnswerMatcher([name]).matches(f"1 {word} 1")


@given(TEXTS, st.lists(LETTERS, min_size=1, max_size=3), LETTERS)
def test_one_more_answer_never_undoes_a_hit(text: str, answers: list[str], more: str) -> None:
    text = f"{text} {answers[0].title()}"
    matched = AnswerMatcher(answers, ALIASES).matches(text)
    assume(matched)
    assert AnswerMatcher([*answers, more], ALIASES).matches(text)


@given(
    st.sampled_from([*GOLDEN, *((row["completion"], [row["answer"]], True) for row in LABELLED)]),
    st.integers(0, 60),
    TEXTS | st.sampled_from(TAILS),
)
def test_a_settled_text_matches_however_it_goes_on(case, cut: int, tail: str) -> None:
    text, answers, _ = case
    matcher = AnswerMatcher(answers, ALIASES)
    if matcher.is_settled(text[:cut]):
        assert matcher.matches(text[:cut] + tail)


@pytest.mark.parametrize("dot", "・･·•‧∙⋅")
def test_all_middle_dots_are_one(dot: str) -> None:
    name = f"列奥纳多{dot}达{dot}芬奇"
    assert contains_answer("作者是列奥纳多·达·芬奇。", [name]) and contains_answer(
        f"是{name}画的", ["列奥纳多・达・芬奇"]
    )
    assert not contains_answer("列奥纳多达芬奇", [f"达{dot}芬奇"])


@pytest.mark.parametrize(
    ("text", "answer", "settled"),
    [
        ("in Paris", "Paris", False),
        ("in Paris,", "Paris", False),
        ("in Paris, on", "Paris", True),
        ("in Guinea, on", "Guinea", False),  # as short as "Guinea-Bissau"
        ("in Guinea, on the coast", "Guinea", True),
        ("the U.S.S", "US", False),
        ("the U.S. is", "US", True),
        ("in Paris\ufffd\ufffd", "Paris", False),
        ("in Rome, on", "Paris", False),
    ],
)
def test_settled_by_hand(text: str, answer: str, settled: bool) -> None:
    assert AnswerMatcher([answer], ALIASES).is_settled(text) is settled


@pytest.mark.parametrize("answers", [[], ["Paris", "  "]])
def test_a_fact_without_answers_is_refused(answers: list[str]) -> None:
    with pytest.raises(UserInputError, match="at least one answer and no blank one"):
        AnswerMatcher(answers)


def test_all_faults_of_an_alias_file_come_in_one_message(tmp_path: Path) -> None:
    path = tmp_path / "aliases.tsv"
    path.write_text("name\nPeru\nSpain\tE\nItaly\tItalia|!France\nRome\tItalia\n", encoding="utf-8")
    with pytest.raises(UserInputError) as caught:
        AliasTable.load(path)
    message = str(caught.value)
    for part in (
        "aliases.tsv:1: wrong header",
        "aliases.tsv:2: name '' is shorter than 2",
        "aliases.tsv:3: name 'E' is shorter than 2",
        "aliases.tsv:4: near miss 'France' holds no name of its row",
        "aliases.tsv:5: 'italia' stands in an earlier line too",
    ):
        assert part in message
    assert len(caught.value.problems) == 5


def test_a_row_of_near_misses_alone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "aliases.tsv"
    path.write_text(f"{HEADER}\nMexico\t!New Mexico\n", encoding="utf-8")
    with pytest.raises(UserInputError, match="a canonical name and at least one alias"):
        AliasTable.load(path)


def test_every_name_of_a_row_finds_the_row() -> None:
    for row in set(ALIASES.rows.values()):
        for name in row.names:
            assert ALIASES.row_of(name) is row
            assert AnswerMatcher([row.names[0]], ALIASES).matches(f"It is {name}, they say.")


def test_the_shipped_table_is_the_default() -> None:
    assert AliasTable.load(ALIASES_PATH).rows.keys() == ALIASES.rows.keys()
