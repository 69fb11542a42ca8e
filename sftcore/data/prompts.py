"""From `Record`s to `Sample`s: the text that a model sees, and which of its tokens are trained.

In: records, a tokenizer, the recipe's template and lengths. Out: `Sample`s, or `Rejection`s.
Invariant: the ids before a sample's first trained token equal `prompt_ids` of the same record, which is what
inference feeds; answer and stop token are trained, whatever the pad token is, and never cut.
Trade-off: over-long prompts under `overlength: trim_prompt` lose characters at the left of their longest
text; finding the smallest cut re-encodes such a sample about 12 times.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftcore.amounts import counted
from sftcore.data.chat import ChatRefused, ChatRenderer, last_answer_only, without_system
from sftcore.data.ledger import DETAIL_CHARACTERS, Alteration, Change, Ledger, Reason, Rejection, printable
from sftcore.data.records import Record
from sftcore.data.rows import ignore
from sftcore.data.seam import Draft, Encoded, alters_answer, encode_classified, encode_drafts, encode_joined
from sftcore.data.special import SpecialTokens
from sftcore.data.tokens import Codec, Tokenizer, codec_of
from sftcore.data.trimming import cut_left
from sftcore.data.wording import PromptOptions, load_template, question_patterns
from sftcore.errors import Problem, UserInputError
from sftcore.tasks.kinds.chat import Chat
from sftcore.tasks.kinds.content import Content, Form, Pieces, Refusal
from sftcore.tasks.kinds.pair import label_answers, pair_in
from sftcore.tasks.template import Template

__all__ = ["PromptOptions", "Prompter", "Refusal", "Sample", "Template", "load_template", "question_patterns"]

BATCH_RECORDS = 1024  # encoded together; EntityQuestions: 0.3 MB of text
SYSTEM_CHANGES = {"merge": Change.SYSTEM_MERGED, "drop": Change.SYSTEM_DROPPED}  # by `data.system`


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """One training sample; T tokens.

    Args:
        id: of its record.
        input_ids: (T,) int32.
        labels: (T,) int32; `labels[i]` is the target of position i, after the shift; -100 where untrained, so
            always at the end; a class stands at the last position, with nothing else trained.
        num_trained: targets that are not -100; at least 1.
        file: path of the file that the record stands in.
        row: its 1-based row there.
        extra: further columns by name, which go into its pack's `Batch.extra`.
    """

    id: str
    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    num_trained: int
    file: str = ""
    row: int = 0
    extra: Mapping[str, NDArray[Any]] = field(default_factory=dict)


class Prompter:
    """Turns records into prompts and samples.

    Args:
        options: of the recipe.
        tokenizer: a fast tokenizer.
        patterns: question pattern with {subject} per relation, for facts without a question of their own.

    Raises:
        UserInputError: the tokenizer has no eos token; a record that is a chat meets a tokenizer without chat
            template, or with one that can't be trained on.
    """

    def __init__(
        self, options: PromptOptions, tokenizer: Tokenizer, patterns: Mapping[str, str] | None = None
    ) -> None:
        self.options = options
        self.codec = codec_of(tokenizer)
        self.patterns = question_patterns(options.relations) if patterns is None else patterns
        self._chat: ChatRenderer | None = None
        self._special = SpecialTokens(self.codec, options.own_tokens)
        self._special_in_chats: SpecialTokens | None = None

    @cached_property
    def form(self) -> Form:
        """How contents become text."""
        return self.options.form(self.patterns, lambda turns: self._talk(Chat(messages=turns)))

    def prompt_text(self, record: Record) -> str:
        """The prompt as text, without the tokenizer's own prefix.

        Raises:
            UserInputError: the template refuses the record (training would have rejected it).
        """
        pieces = self._pieces(record)
        return "\n".join(pieces) if self.options.joins_texts else "".join(pieces[:-1])

    def _pieces(self, record: Record) -> Pieces:
        pieces = record.content.pieces(self.form)
        if isinstance(pieces, Refusal):
            where = f"{record.file}:{record.row}"
            raise UserInputError(Problem(what=f"no prompt can be made: {pieces.detail}", where=where))
        return pieces

    def prompt_ids(self, record: Record) -> list[int]:
        """Exactly what inference feeds."""
        return self.prompt_ids_batch([record])[0]

    def prompt_ids_batch(self, records: Sequence[Record]) -> list[list[int]]:
        """`prompt_ids` of each record, encoded in one batch."""
        if self.options.joins_texts:
            return self.codec.encode_joined([(a, b) for a, b in map(self._pieces, records)])
        encoded = self.codec.encode([self.prompt_text(record) for record in records])
        return [
            self.codec.with_prefix(ids) if record.content.is_bare else ids
            for record, ids in zip(records, encoded, strict=True)
        ]

    def answer_text(self, record: Record) -> str:
        """The completion that is trained after the prompt; not for chats, which have several."""
        assert record.content.is_bare
        return self._pieces(record)[-1]

    def reply_ids_batch(self, records: Sequence[Record]) -> list[list[int] | Refusal]:
        """What is trained last in each record, stop token included, cut nowhere; or why nothing is."""
        encoded = self._encode([record.content for record in records])
        return [
            sample if isinstance(sample, Refusal) else self._closed(sample.ids[slice(*sample.trained[-1])])
            for sample in encoded
        ]

    def _closed(self, ids: list[int]) -> list[int]:
        """An answer's ids without the white space that a template may mark as trained after its end."""
        last = max(
            (i for i, token in enumerate(ids) if token in self.codec.special_ids), default=len(ids) - 1
        )
        return ids[: last + 1]

    def label_ids_batch(
        self, records: Sequence[Record], *, stops: bool = True
    ) -> list[tuple[list[int], list[int]]]:
        """What would be trained after each pair's prompt for label 0 and for label 1, stop token included.

        Where a rationale follows, the label's line alone.

        Args:
            stops: whether the model has learnt to stop after a label; else the label is compared alone.
        """
        drafts = [
            Draft(pieces=(self.prompt_text(record), answer), is_bare=True)
            for record in records
            for answer in label_answers(pair_in(record.content), self.form, stops=stops)
        ]
        answers = [
            encoded.ids[encoded.num_prompt :] for encoded in encode_drafts(self.codec, drafts) if encoded
        ]
        if self.options.matching.rationale == "after" or not stops:
            answers = [ids[:-1] for ids in answers]  # no stop token: the text goes on
        return list(zip(answers[::2], answers[1::2], strict=True))

    def sample(self, record: Record, ledger: Ledger | None = None) -> Sample | Rejection:
        """One record's sample; alterations go to the ledger, the rejection is returned."""
        return self.sample_batch([record], ledger)[0]

    def samples(self, records: Iterable[Record], ledger: Ledger) -> Iterator[Sample]:
        """Samples in the order of the records; rejections go to the ledger."""
        records = iter(records)
        while batch := list(islice(records, BATCH_RECORDS)):
            for result in self.sample_batch(batch, ledger):
                if isinstance(result, Rejection):
                    ledger.reject(result)
                else:
                    yield result

    def sample_batch(
        self, records: Sequence[Record], ledger: Ledger | None = None
    ) -> list[Sample | Rejection]:
        """`sample` of each record, encoded in one batch."""
        results = self.encode_batch([record.content for record in records])
        return [self._noted(record, result, ledger) for record, result in zip(records, results, strict=True)]

    def encode_batch(self, contents: Sequence[Content]) -> list[Encoded | Refusal]:
        """Ids and labels of each content, or why there are none; over-long ones cut or refused."""
        encoded = self._encode(contents)
        fitted = [self._fitted(content, e) for content, e in zip(contents, encoded, strict=True)]
        for i in self._special.rows(contents):
            if isinstance(sample := fitted[i], Encoded):
                fitted[i] = replace(sample, changes=(*sample.changes, Change.SPECIAL_IN_TEXT))
        for i, content in enumerate(contents):
            markers = self._markers_in(content)
            changes = (*self._asked_changes(content), *((Change.MARKER_IN_TEXT,) if markers else ()))
            if changes and isinstance(sample := fitted[i], Encoded):
                fitted[i] = replace(sample, changes=(*sample.changes, *changes), markers=markers)
        return fitted

    def _markers_in(self, content: Content) -> tuple[str, ...]:
        """The template's plain markers of turns that stand in a chat's contents."""
        said = content.turns_said()
        return (
            tuple(mark for mark in self._renderer().markers if any(mark in t for t in said)) if said else ()
        )

    def _asked_changes(self, content: Content) -> Iterator[Change]:
        """What the recipe asks to be changed in chats, where this is one."""
        change = SYSTEM_CHANGES.get(self.options.system)
        if change is not None and content.has_system:
            yield change
        if self.options.train_answers == "last" and content.num_trained_turns > 1:
            yield Change.EARLIER_UNTRAINED

    def _encode(self, contents: Sequence[Content]) -> list[Encoded | Refusal]:
        drafts = [self._not_endless(self._draft(content)) for content in contents]
        usable = [d for d in drafts if isinstance(d, Draft)]
        encoded = iter(self._encoder()(self.codec, usable))
        nothing = Refusal(reason=Reason.NO_TOKENS, detail="prompt or answer has no tokens")
        return [self._seen(d, next(encoded)) or nothing if isinstance(d, Draft) else d for d in drafts]

    def _seen(self, draft: Draft, encoded: Encoded | None) -> Encoded | None:
        """`encoded`, noted where the tokenizer makes another text of an answer."""
        if encoded is None or encoded.label is not None or not alters_answer(self.codec, draft, encoded):
            return encoded
        return replace(encoded, changes=(*encoded.changes, Change.ANSWER_NORMALISED))

    def _encoder(self) -> Callable[[Codec, Sequence[Draft]], list[Encoded | None]]:
        if self.options.joins_texts:
            return encode_joined
        return encode_classified if self.options.classifies else encode_drafts

    def _not_endless(self, draft: Draft | Refusal) -> Draft | Refusal:
        """Refuse a text that can't fit whatever its tokens are: 50 MB would be encoded for minutes."""
        if isinstance(draft, Refusal):
            return draft
        num_characters = sum(map(len, draft.pieces))
        if num_characters <= self.options.max_length or (longest := self.codec.longest_token) is None:
            return draft
        if num_characters <= longest * self.options.max_length:
            return draft
        detail = f"{num_characters} characters, more than {self.options.max_length} tokens can hold"
        return Refusal(reason=Reason.OVERLENGTH, detail=detail)

    def _draft(self, content: Content) -> Draft | Refusal:
        refusal = content.why_untrained(self.form)
        pieces = content.pieces(self.form) if refusal is None else refusal
        if isinstance(pieces, Refusal):
            return pieces
        label = content.gold if self.options.classifies else None
        return Draft(pieces=pieces, is_bare=content.is_bare, label=label)

    def _talk(self, chat: Chat) -> Pieces | Refusal:
        """A chat's pieces as its template writes them."""
        renderer = self._renderer()
        if (
            self._special_in_chats is None
        ):  # a token of the recipe's own is forged where the template writes it
            own = set(self.options.own_tokens) - renderer.own_tokens - set(self.codec.named_special)
            self._special_in_chats = SpecialTokens(self.codec, own, renderer.own_added)
        if found := self._special_in_chats.find_in_chat(chat):
            detail = f"{found[0]!r} in a turn of role {found[1]}"
            return Refusal(reason=Reason.SPECIAL_TOKEN, detail=detail)
        try:
            if self.options.system != "keep":
                chat = without_system(chat, self.options.system)
            if self.options.train_answers == "last":
                chat = last_answer_only(chat)
            return renderer.pieces(chat)
        except ChatRefused as error:
            return Refusal(reason=Reason.REFUSED_BY_TEMPLATE, detail=str(error))

    def _renderer(self) -> ChatRenderer:
        if self._chat is None:
            self._chat = ChatRenderer(self.codec, self.options.today)
        return self._chat

    def _fitted(self, content: Content, encoded: Encoded | Refusal) -> Encoded | Refusal:
        """`encoded`, cut to `max_length` if the recipe says so, or a refusal."""
        if isinstance(encoded, Refusal):
            if encoded.reason is not Reason.OVERLENGTH:
                return encoded
            detail = encoded.detail
        elif len(encoded.ids) <= self.options.max_length:
            return encoded
        else:
            detail = f"{counted(len(encoded.ids), 'token')}, {self.options.max_length} fit"
        if self.options.overlength == "trim_prompt":
            trimmed = self._trimmed(content)
            if trimmed is not None:
                return replace(trimmed, changes=(*trimmed.changes, Change.PROMPT_TRIMMED))
            detail += "; answer, markers and stop token alone are too long"
        return Refusal(reason=Reason.OVERLENGTH, detail=detail)

    def _trimmed(self, content: Content) -> Encoded | None:
        """The sample after the smallest cut of prompt characters that makes it fit, or None."""
        content = content.completed(self.form)
        texts = content.cuttable()

        def encode(num_characters: int) -> Encoded | Refusal:
            return self._encode([content.with_cuttable(cut_left(texts, num_characters))])[0]

        def fits(num_characters: int) -> bool:
            result = encode(num_characters)
            return isinstance(result, Encoded) and len(result.ids) <= self.options.max_length

        most = sum(len(text) - 1 for text in texts if text)
        result = encode(bisect_left(range(most), True, key=fits))
        return result if isinstance(result, Encoded) and len(result.ids) <= self.options.max_length else None

    def _noted(self, record: Record, result: Encoded | Refusal, ledger: Ledger | None) -> Sample | Rejection:
        if isinstance(result, Refusal):
            return Rejection(
                file=record.file,
                row=record.row,
                reason=result.reason,
                excerpt=printable(record.id),
                detail=printable(result.detail, DETAIL_CHARACTERS),
            )
        note = ledger.alter if ledger else ignore
        for change in result.changes:
            detail = ", ".join(result.markers) if change is Change.MARKER_IN_TEXT else ""
            note(Alteration(file=record.file, row=record.row, change=change, detail=detail))
        return Sample(
            id=record.id,
            input_ids=np.array(result.ids, np.int32),
            labels=np.array(result.labels, np.int32),
            num_trained=result.num_trained,
            file=record.file,
            row=record.row,
        )
