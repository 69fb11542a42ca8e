"""From pieces of text, untrained and trained in turn, to ids and shifted labels.

In: `Draft`s. Out: `Encoded`: ids, and for each position the id to predict there, or -100.
Invariant: the ids before each trained piece are those that inference feeds at that place; the last label is
-100; each trained piece has a token before it and at least one of its own.
Trade-off: the text up to each border is encoded by itself to see that the border falls between tokens. Where
the tokenizer never looks across a space between two words (`Codec.last_cut`), only what follows the last such
space is encoded again; else all of the prompt is.

One sample, prompt "Q: why? A:" and answer " so" (· marks -100):

    input_ids   Q   :   why   ?   A   :   so   <eos>
    trained     .   .   .     .   .   .   x    x
    labels      ·   ·   ·     ·   ·   so  eos  ·
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from sftcore.data.ledger import Change
from sftcore.data.tokens import Codec

IGNORED = -100  # torch's cross-entropy skips this target by default


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A sample's text.

    Args:
        pieces: untrained, trained, untrained, trained, ...; ends with a trained one; none is empty.
        is_bare: the tokenizer's own prefix (bos) and the stop token are still to be added; a chat template
            writes both itself.
        label: class of the first piece, where that is predicted instead of text.
    """

    pieces: tuple[str, ...]
    is_bare: bool
    label: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A sample's ids.

    Args:
        ids: T ids.
        labels: T targets after the shift: `labels[i]` is to be predicted at position i; -100 where untrained;
            at the last position a class, if that is predicted instead of text.
        num_prompt: ids before the first trained one: what inference feeds.
        num_trained: targets that are not -100; at least 1.
        changes: what was done on the way, for the ledger.
    """

    ids: list[int]
    labels: list[int]
    num_prompt: int
    num_trained: int
    changes: tuple[Change, ...]


def encode_drafts(codec: Codec, drafts: Sequence[Draft]) -> list[Encoded | None]:
    """Encode drafts, all texts in one batch; None where a piece yields no tokens.

    Where the ids of the text up to a border are a prefix of the ids of the whole, the whole is taken. Where a
    token straddles a border ("A: " + "Paris": " Paris" is one token), each piece is encoded by itself.
    """
    stretches = [_stretches(codec, draft.pieces) for draft in drafts]
    encoded = iter(codec.encode([text for group in stretches for pair in group for text in pair]))
    results = [_cut(_prefix_ids([(next(encoded), next(encoded)) for _ in group])) for group in stretches]
    torn = [i for i, pieces in enumerate(results) if pieces is None]
    encoded = iter(codec.encode([piece for i in torn for piece in drafts[i].pieces]))
    for i in torn:
        results[i] = [next(encoded) for _ in drafts[i].pieces]
    apart = frozenset(torn)
    return [_finish(codec, drafts[i], pieces or [], i in apart) for i, pieces in enumerate(results)]


def encode_classified(codec: Codec, drafts: Sequence[Draft]) -> list[Encoded | None]:
    """Encode the first piece of each draft alone; its last position is to predict the draft's class.

    input_ids   Text   1   :   ...   Meaning   :
    labels      ·      ·   ·   ·     ·         1
    """
    prompts = codec.encode([draft.pieces[0] for draft in drafts])
    return [
        _classified(codec.with_prefix(ids), draft.label) if ids else None
        for ids, draft in zip(prompts, drafts, strict=True)
    ]


def encode_joined(codec: Codec, drafts: Sequence[Draft]) -> list[Encoded | None]:
    """Encode both pieces of each draft as the tokenizer joins two texts; the last position has the class."""
    joined = codec.encode_joined([(draft.pieces[0], draft.pieces[1]) for draft in drafts])
    return [_classified(ids, draft.label) for ids, draft in zip(joined, drafts, strict=True)]


def _classified(ids: list[int], label: int | None) -> Encoded:
    assert label is not None
    labels = [*[IGNORED] * (len(ids) - 1), label]
    return Encoded(ids=ids, labels=labels, num_prompt=len(ids), num_trained=1, changes=())


def _stretches(codec: Codec, pieces: Sequence[str]) -> list[tuple[str, str]]:
    """For each border: what is new before its last cut, and what lies between that cut and the border.

    pieces       |Name it. Where is |it?| Here.|      cuts stand before " Where", " is" (a word on both sides)
    first        Name it. Where        + " is "
    second       ""                    + " is it?"    (the last border: all from the cut before)
    """
    text, found, cut = "".join(pieces), [], 0
    for border in accumulate(map(len, pieces)):
        next_cut = codec.last_cut(text, cut, border) if border < len(text) else cut
        found.append((text[cut:next_cut], text[next_cut:border]))
        cut = next_cut
    return found


def _prefix_ids(stretches: list[tuple[list[int], list[int]]]) -> list[list[int]]:
    """Ids of the text up to each border.

    >>> _prefix_ids([([1, 2], [3]), ([], [3, 4])])
    [[1, 2, 3], [1, 2, 3, 4]]
    """
    prefixes: list[list[int]] = []
    before: list[int] = []
    for new, rest in stretches:
        before = before + new
        prefixes.append(before + rest)
    return prefixes


def _cut(prefixes: list[list[int]]) -> list[list[int]] | None:
    """The whole's ids cut at each border, or None where a border does not fall between tokens.

    >>> _cut([[1, 2], [1, 2, 3], [1, 2, 3, 4]])
    [[1, 2], [3], [4]]
    >>> _cut([[1, 9], [1, 2, 3]]) is None
    True
    """
    whole = prefixes[-1]
    if any(whole[: len(ids)] != ids for ids in prefixes):
        return None
    borders = [0, *(len(ids) for ids in prefixes)]
    return [whole[start:end] for start, end in zip(borders, borders[1:], strict=False)]


def _finish(codec: Codec, draft: Draft, pieces: list[list[int]], is_apart: bool) -> Encoded | None:
    changes = [Change.SEAM_APART] if is_apart else []
    if not all(pieces[1::2]):
        return None
    if draft.is_bare:
        changes += list(_add_own_tokens(codec, pieces))
    if not pieces[0]:
        return None
    ids = [i for piece in pieces for i in piece]
    targets: list[int] = []
    for number, piece in enumerate(pieces):
        targets += piece if number % 2 else [IGNORED] * len(piece)
    return Encoded(
        ids=ids,
        labels=[*targets[1:], IGNORED],
        num_prompt=len(pieces[0]),
        num_trained=sum(map(len, pieces[1::2])),
        changes=tuple(changes),
    )


def _add_own_tokens(codec: Codec, pieces: list[list[int]]) -> Iterator[Change]:
    """Put the prefix before the first piece and the stop token after the last, in place, once each."""
    if codec.prefix and codec.starts_with_prefix(pieces[0]):
        yield Change.BOS_IN_TEXT
    pieces[0] = codec.with_prefix(pieces[0])
    if pieces[-1][-1] == codec.stop_id:
        yield Change.STOP_IN_TEXT
    else:
        pieces[-1] = [*pieces[-1], codec.stop_id]
