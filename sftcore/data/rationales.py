"""A label with the reason for it, as one text: put together for training, taken apart after generation.

In: a label's word, a rationale, their order; or what a model wrote. Out: the answer's text; or the label.
Invariant: the label of a composed answer is found again, whatever the rationale says; a text without a
conclusion in the form that was trained has no label (it is unparsable, never guessed at).
Trade-off: only the last line that starts with the marker counts as a conclusion, so a rationale may name both
label words; a model that writes the bare word at the end of its sentence is counted as unparsable.

    before   A asks when, B asks how much.          after   different
             Conclusion: different                          Reason: A asks when, B asks how much.
"""

from __future__ import annotations

from typing import Literal

Order = Literal["none", "before", "after"]
CONCLUSION = {"zh": "结论：", "en": "Conclusion: "}
REASON = {"zh": "理由：", "en": "Reason: "}


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
