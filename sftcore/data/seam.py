"""From pieces of text, untrained and trained in turn, to ids and shifted labels.

In: `Draft`s. Out: `Encoded`: ids, and which of them are trained.
Invariant: the ids before each trained piece are those that inference feeds at that place; the last label is
-100; each trained piece has a token before it and at least one of its own.
Trade-off: the text up to each border is encoded by itself to see that the border falls between tokens. Where
the tokenizer never looks across a space between two words (`Codec.last_cut`), only what follows the last such
space is encoded again; in chats, what follows the last added token (400 turns cost twice one encoding); else
all of the prompt is.

One sample, prompt "Q: why? A:" and answer " so" (· marks -100):

    input_ids   Q   :   why   ?   A   :   so   <eos>
    trained     .   .   .     .   .   .   x    x
    labels      ·   ·   ·     ·   ·   so  eos  ·
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from sftcore.data.ledger import Change
from sftcore.data.tokens import Codec

Ids = NDArray[np.int32]
UNTRAINED = -100  # torch's cross-entropy skips this target by default


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
        trained: (start, end) of each trained stretch of ids, in turn; the first starts after place 0.
        label: the class to be predicted at the last position, where that is trained instead.
        changes: what was done on the way, for the ledger.
        markers: plain texts in the turns of a chat by which its template tells turns apart.
    """

    ids: list[int]
    trained: tuple[tuple[int, int], ...] = ()
    label: int | None = None
    changes: tuple[Change, ...] = ()
    markers: tuple[str, ...] = ()

    @property
    def num_prompt(self) -> int:
        """Ids before the first trained one: what inference feeds."""
        return self.trained[0][0] if self.trained else len(self.ids)

    @property
    def num_trained(self) -> int:
        """Positions with a target; at least 1."""
        return sum(end - start for start, end in self.trained) if self.label is None else 1

    @property
    def labels(self) -> list[int]:
        """T targets, as in `flat_labels`."""
        return flat_labels([self], flat_ids([self])).tolist()


def flat_ids(samples: Sequence[Encoded]) -> Ids:
    """All ids, end to end."""
    flat = array("i")
    for sample in samples:
        flat.fromlist(sample.ids)
    return np.frombuffer(flat, np.int32) if flat else np.empty(0, np.int32)


def flat_labels(samples: Sequence[Encoded], ids: Ids) -> Ids:
    """The targets that go with `flat_ids`: what is to be predicted at each position, -100 where nothing is.

    They are shifted: the last target of a sample is -100, or the class.
    """
    labels = np.full(len(ids), UNTRAINED, np.int32)
    before = 0
    for sample in samples:
        for start, end in sample.trained:
            labels[before + start - 1 : before + end - 1] = ids[before + start : before + end]
        before += len(sample.ids)
        if sample.label is not None:
            labels[before - 1] = sample.label
    return labels


def encode_drafts(codec: Codec, drafts: Sequence[Draft]) -> list[Encoded | None]:
    """Encode drafts, all texts in one batch; None where a piece yields no tokens.

    Where the ids of the text up to a border are a prefix of the ids of the whole, the whole is taken. Where a
    token straddles a border ("A: " + "Paris": " Paris" is one token), each piece is encoded by itself.
    """
    drafts = [_ended_once(codec, draft) for draft in drafts]
    stretches = [_stretches(codec, draft) for draft in drafts]
    encoded = iter(codec.encode([text for group in stretches for pair in group for text in pair]))
    whole = [_join([(next(encoded), next(encoded)) for _ in group]) for group in stretches]
    torn = [i for i, found in enumerate(whole) if found is None or _gets_spaces(codec, drafts[i])]
    firsts = iter(codec.encode([drafts[i].pieces[0] for i in torn]))
    rest = [piece for i in torn for piece in drafts[i].pieces[1:]]
    exact = [drafts[i].is_bare for i in torn for _ in drafts[i].pieces[1:]]
    others = iter(codec.encode_continued(rest, exact) if torn else [])
    apart = {i: _chained([next(firsts), *(next(others) for _ in drafts[i].pieces[1:])]) for i in torn}
    return [
        _finish(codec, draft, *(apart.get(i) or found or ([], [])), is_apart=i in apart)
        for i, (draft, found) in enumerate(zip(drafts, whole, strict=True))
    ]


def alters_answer(codec: Codec, draft: Draft, encoded: Encoded) -> bool:
    """Whether the ids of an answer stand for another text than the row's: the tokenizer normalises."""
    decode = codec.tokenizer.decode
    for answer, (start, end) in zip(draft.pieces[1::2], encoded.trained, strict=False):
        if not codec.may_alter(answer):
            continue
        found = str(decode(encoded.ids[start:end], clean_up_tokenization_spaces=False))
        ended = found.removesuffix(codec.stop_text) if draft.is_bare else found
        if not {found, ended} & {answer, answer.removeprefix(" ")}:  # some decoders take off the first space
            return True
    return False


def _gets_spaces(codec: Codec, draft: Draft) -> bool:
    """Whether an answer would get a space that its text does not have, after an added token."""
    return draft.is_bare and codec.starts_again("".join(draft.pieces))


def _ended_once(codec: Codec, draft: Draft) -> Draft:
    """`draft` without what follows an answer's own stop token: white space, the token again."""
    stop, answer = codec.stop_text, draft.pieces[-1]
    if not draft.is_bare or stop not in answer:
        return draft
    end = len(answer.rstrip())
    while end and answer.startswith(stop, end - len(stop)):
        kept, end = end, len(answer[: end - len(stop)].rstrip())
        if not end:
            return draft
        answer = answer[:kept]
    return replace(draft, pieces=(*draft.pieces[:-1], answer))


def encode_classified(codec: Codec, drafts: Sequence[Draft]) -> list[Encoded | None]:
    """Encode the first piece of each draft alone; its last position is to predict the draft's class.

    input_ids   Text   1   :   ...   Meaning   :
    labels      ·      ·   ·   ·     ·         1
    """
    prompts = codec.encode([draft.pieces[0] for draft in drafts])
    return [
        Encoded(ids=codec.with_prefix(ids), label=draft.label) if ids else None
        for ids, draft in zip(prompts, drafts, strict=True)
    ]


def encode_joined(codec: Codec, drafts: Sequence[Draft]) -> list[Encoded | None]:
    """Encode both pieces of each draft as the tokenizer joins two texts; the last position has the class."""
    joined = codec.encode_joined([(draft.pieces[0], draft.pieces[1]) for draft in drafts])
    return [Encoded(ids=ids, label=draft.label) for ids, draft in zip(joined, drafts, strict=True)]


def _stretches(codec: Codec, draft: Draft) -> list[tuple[str, str]]:
    """For each border: what is new before its last cut, and what lies between that cut and the border.

    pieces       |Name it. Where is |it?| Here.|      cuts stand before " Where", " is" (a word on both sides)
    first        Name it. Where        + " is "
    second       ""                    + " is it?"    (the last border: all from the cut before)
    """
    text, found, cut = "".join(draft.pieces), [], 0
    find_cut = codec.last_cut if draft.is_bare else codec.last_added
    for border in accumulate(map(len, draft.pieces)):
        next_cut = find_cut(text, cut, border) if border < len(text) else cut
        found.append((text[cut:next_cut], text[next_cut:border]))
        cut = next_cut
    return found


def _join(stretches: list[tuple[list[int], list[int]]]) -> tuple[list[int], list[int]] | None:
    """Ids of the whole and the place of each border in them; None where one does not fall between tokens.

    >>> _join([([1, 2], [3]), ([], [3, 4])])
    ([1, 2, 3, 4], [3, 4])
    >>> _join([([], [1, 9]), ([], [1, 2, 3])]) is None
    True
    """
    ids: list[int] = []
    ends: list[tuple[int, list[int]]] = []
    for new, rest in stretches:
        ids += new
        ends.append((len(ids), rest))
    ids += rest
    borders = []
    for start, rest in ends[:-1]:
        end = start + len(rest)
        if ids[start:end] != rest:
            return None
        borders.append(end)
    return ids, [*borders, len(ids)]


def _chained(pieces: Iterable[list[int]]) -> tuple[list[int], list[int]]:
    """The pieces' ids end to end, and the place after each."""
    ids, borders = [], []
    for piece in pieces:
        ids += piece
        borders.append(len(ids))
    return ids, borders


def _finish(
    codec: Codec, draft: Draft, ids: list[int], borders: list[int], *, is_apart: bool
) -> Encoded | None:
    """Add the tokenizer's own tokens, once each; None where a trained piece is empty or nothing before it."""
    changes = [Change.SEAM_APART] if is_apart else []
    trained = list(zip(borders[::2], borders[1::2], strict=True))
    for start, end in trained:
        if start == end:
            return None
    if draft.is_bare:
        if (prefix := codec.prefix) and codec.starts_with_prefix(ids[: min(borders[0], len(prefix))]):
            changes.append(Change.BOS_IN_TEXT)
        elif prefix:
            ids = [*prefix, *ids]
            trained = [(start + len(prefix), end + len(prefix)) for start, end in trained]
        if ids[-1] == codec.stop_id:
            changes.append(Change.STOP_IN_TEXT)
        else:
            ids.append(codec.stop_id)
            trained[-1] = (trained[-1][0], len(ids))
    if trained[0][0] == 0:
        return None
    return Encoded(ids=ids, trained=tuple(trained), changes=tuple(changes))
