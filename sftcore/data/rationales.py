"""A label with the reason for it, as one text: put together for training, taken apart after generation.

In: a label's word, a rationale, their order; or what a model wrote. Out: the answer's text; or the label, of
a teacher's reply with the reason.
Invariant: the label of a composed answer is found again, whatever the rationale says; a text without a
conclusion in the form that was trained has no label (it is unparsable, never guessed at).
Trade-off: only the last line that starts with the marker counts as a conclusion, so a rationale may name both
label words; a model that writes the bare word at the end of its sentence is counted as unparsable. A
teacher has not learnt our form, and its replies are paid for: `read_reply` takes what is plainly meant.

    before   A asks when, B asks how much.          after   different
             Conclusion: different                          Reason: A asks when, B asks how much.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

Order = Literal["none", "before", "after"]
CONCLUSION = {"zh": "结论：", "en": "Conclusion: "}
REASON = {"zh": "理由：", "en": "Reason: "}
DECORATION = " \t\r\n*_`\"'“”‘’「」『』《》〈〉【】<>()（）[]#"
MARKED = re.compile(r"(?<![a-z])(?:结论|結論|conclusion)[\s*_]*(?:是|为|為|is)?[\s*_]*[:：]", re.IGNORECASE)
MIN_REASONED_PAIRS = 100  # docs/methods.md M2: below, an arm with reasons is not run
THOUGHT_END = "</think>"  # of models that reason aloud first (DeepSeek-R1, Qwen3)


def compose_answer(word: str, rationale: str | None, *, order: Order, language: str) -> str:
    """The trained answer of a pair.

    >>> compose_answer("same", "Both ask\\nfor the price.", order="before", language="en")
    'Both ask for the price.\\nConclusion: same'
    """
    if order == "none":
        return word
    assert rationale is not None
    why = " ".join(rationale.split())
    if order == "before":
        return f"{why}\n{CONCLUSION[language]}{word}"
    return f"{word}\n{REASON[language]}{why}"


def parse_answer(text: str, words: tuple[str, str], *, order: Order, language: str) -> int | None:
    """The label of a generated answer, or None where there is none in the trained form.

    >>> parse_answer("Both differ.\\nConclusion: same", ("different", "same"), order="before", language="en")
    1
    """
    lines = text.strip().splitlines()
    marker = CONCLUSION[language].strip()
    match order:
        case "none":
            said = text.strip()
        case "after":
            said = lines[0].strip() if lines else ""
        case "before":
            marked = [line.strip() for line in lines if line.strip().startswith(marker)]
            said = marked[-1].removeprefix(marker).strip() if marked else ""
    return words.index(said) if said in words else None


def read_reply(text: str, words: Sequence[str]) -> tuple[int | None, str]:
    """The label and the reason before it of a teacher's reply: on one line or two, bold or in quotes.

    No label if its last conclusion is none, or if it concludes both ways.

    >>> read_reply("Both ask for the price. **Conclusion: Same.**", ("different", "same"))
    (1, 'Both ask for the price.')
    >>> read_reply("They look alike.\\nConclusion: same\\nNo. Conclusion: different", ("different", "same"))
    (None, 'They look alike.')
    """
    said = text.rpartition(THOUGHT_END)[2]
    found = [(mark.start(), _concluded(said[mark.end() :], words)) for mark in MARKED.finditer(said)]
    readable = [(start, label) for start, label in found if label is not None]
    if not readable:
        return None, ""
    reason = said[: readable[0][0]].rstrip(DECORATION)
    is_clear = found[-1][1] is not None and len({label for _, label in readable}) == 1
    return (readable[0][1] if is_clear else None), " ".join(reason.split())


def _concluded(rest: str, words: Sequence[str]) -> int | None:
    """The label whose word a line begins with, unless the other's is on it, too."""
    line = rest.lstrip(DECORATION).split("\n")[0].casefold()
    folded = [word.casefold() for word in words]
    begun = [word for word in folded if re.match(rf"{re.escape(word)}(?!\w)", line)]
    if not begun:
        return None
    said = max(begun, key=len)
    (other,) = set(folded) - {said}
    is_both = re.search(rf"(?<![a-z]){re.escape(other)}(?![a-z])", line[len(said) :])
    return None if is_both else folded.index(said)
