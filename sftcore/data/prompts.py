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
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from sftcore.amounts import counted
from sftcore.data.chat import SYSTEM_ROLES, ChatRefused, ChatRenderer, last_answer_only, without_system
from sftcore.data.contents import Chat, Completion, Content, Fact, Pair
from sftcore.data.ledger import DETAIL_CHARACTERS, Alteration, Change, Ledger, Reason, Rejection, printable
from sftcore.data.rationales import Order, compose_answer
from sftcore.data.records import Record
from sftcore.data.rows import ignore
from sftcore.data.seam import Draft, Encoded, alters_answer, encode_classified, encode_drafts, encode_joined
from sftcore.data.special import SpecialTokens
from sftcore.data.tokens import Codec, Tokenizer, codec_of
from sftcore.data.trimming import cut_left, prompt_texts, with_prompt_texts
from sftcore.data.wording import (
    PromptOptions,
    Template,
    fact_texts,
    language_of,
    load_template,
    question_patterns,
    with_question,
)
from sftcore.errors import Problem, UserInputError

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
    """

    id: str
    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    num_trained: int
    file: str = ""
    row: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a record can't become a sample (`reason` is one of `PROMPTING`)."""

    reason: Reason
    detail: str


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

    def prompt_text(self, record: Record) -> str:
        """The prompt as text, without the tokenizer's own prefix.

        Raises:
            UserInputError: the template refuses the record (training would have rejected it).
        """
        if isinstance(pair := record.content, Pair):
            return f"{pair.a}\n{pair.b}" if self.options.joins_texts else self._texts(pair)[0]
        draft = self._draft(record.content)
        if isinstance(draft, Refusal):
            where = f"{record.file}:{record.row}"
            raise UserInputError(Problem(what=f"no prompt can be made: {draft.detail}", where=where))
        return "".join(draft.pieces[:-1])

    def prompt_ids(self, record: Record) -> list[int]:
        """Exactly what inference feeds."""
        return self.prompt_ids_batch([record])[0]

    def prompt_ids_batch(self, records: Sequence[Record]) -> list[list[int]]:
        """`prompt_ids` of each record, encoded in one batch."""
        if self.options.joins_texts:
            pairs = [record.content for record in records if isinstance(record.content, Pair)]
            return self.codec.encode_joined([(pair.a, pair.b) for pair in pairs])
        encoded = self.codec.encode([self.prompt_text(record) for record in records])
        return [
            ids if isinstance(record.content, Chat) else self.codec.with_prefix(ids)
            for record, ids in zip(records, encoded, strict=True)
        ]

    def answer_text(self, record: Record) -> str:
        """The completion that is trained after the prompt; not for chats, which have several."""
        assert not isinstance(record.content, Chat)
        return self._texts(record.content)[1]

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

    def label_ids(self, record: Record) -> tuple[list[int], list[int]]:
        """What would be trained after a pair's prompt for label 0 and for label 1, stop token included."""
        return self.label_ids_batch([record])[0]

    def label_ids_batch(
        self, records: Sequence[Record], *, stops: bool = True
    ) -> list[tuple[list[int], list[int]]]:
        """`label_ids` of each pair; where a rationale follows, the label's line alone.

        Args:
            stops: whether the model has learnt to stop after a label; else the label is compared alone.
        """
        drafts = [draft for record in records for draft in self._label_drafts(record, stops=stops)]
        answers = [
            encoded.ids[encoded.num_prompt :] for encoded in encode_drafts(self.codec, drafts) if encoded
        ]
        if self.options.matching.rationale == "after" or not stops:
            answers = [ids[:-1] for ids in answers]  # no stop token: the text goes on
        return list(zip(answers[::2], answers[1::2], strict=True))

    def _label_drafts(self, record: Record, *, stops: bool) -> list[Draft]:
        pair = record.content
        assert isinstance(pair, Pair)
        prompt = self.prompt_text(record)
        template, language = self._template_of(pair)
        words = self.label_words(language)
        is_nested = words[0].startswith(words[1]) or words[1].startswith(words[0])  # the shorter always wins
        ends_line = self.options.matching.rationale == "after" or (is_nested and not stops)
        words = (f"{words[0]}\n", f"{words[1]}\n") if ends_line else words
        nothing = dict.fromkeys(("a", "b", "label_0", "label_1"), "")  # completions hold the label only
        answers = [template.fill(nothing | {"label": word})[1] for word in words]
        return [Draft(pieces=(prompt, answer), is_bare=True) for answer in answers]

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
            if isinstance(content, Chat) and isinstance(sample := fitted[i], Encoded):
                markers = self._markers_in(content)
                changes = (*sample.changes, *self._asked_changes(content))
                changes += (Change.MARKER_IN_TEXT,) if markers else ()
                fitted[i] = replace(sample, changes=changes, markers=markers)
        return fitted

    def _markers_in(self, chat: Chat) -> tuple[str, ...]:
        """The template's plain markers of turns that stand in a chat's contents."""
        said = [turn.content for turn in chat.messages]
        return tuple(mark for mark in self._renderer().markers if any(mark in text for text in said))

    def _asked_changes(self, chat: Chat) -> Iterator[Change]:
        """What the recipe asks to be changed in chats, where this one is."""
        change = SYSTEM_CHANGES.get(self.options.system)
        if change is not None and any(turn.role in SYSTEM_ROLES for turn in chat.messages):
            yield change
        if self.options.train_answers == "last" and len(chat.answers) > 1:
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
        if isinstance(content, Chat):
            return self._chat_draft(content)
        if isinstance(content, Fact):
            content = with_question(content, self.patterns)
            if content.question is None and "question" in self.options.templates["any"].placeholders:
                detail = f"no question, and no pattern for relation {content.relation!r}"
                return Refusal(reason=Reason.UNKNOWN_RELATION, detail=detail)
        if isinstance(content, Pair):
            return self._pair_draft(content)
        return Draft(pieces=self._texts(content), is_bare=True)

    def _chat_draft(self, chat: Chat) -> Draft | Refusal:
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
            return Draft(pieces=renderer.pieces(chat), is_bare=False)
        except ChatRefused as error:
            return Refusal(reason=Reason.REFUSED_BY_TEMPLATE, detail=str(error))

    def _pair_draft(self, pair: Pair) -> Draft | Refusal:
        is_explained = self.options.matching.rationale != "none"
        if is_explained and pair.rationale is None:
            return Refusal(reason=Reason.NO_RATIONALE, detail="the pair has no rationale")
        pieces = (pair.a, pair.b) if self.options.joins_texts else self._texts(pair)
        return Draft(pieces=pieces, is_bare=True, label=pair.label if self.options.classifies else None)

    def _renderer(self) -> ChatRenderer:
        if self._chat is None:
            self._chat = ChatRenderer(self.codec, self.options.today)
        return self._chat

    def _texts(self, content: Fact | Pair | Completion) -> tuple[str, str]:
        """Prompt and completion of a record that isn't a chat."""
        match content:
            case Completion():
                return content.prompt, content.completion
            case Fact():
                return fact_texts(content, self.options.templates["any"])
            case Pair():
                examples = [Pair(**example.model_dump()) for example in self.options.matching.examples]
                shown = [self._pair_texts(example, content) for example in examples]
                prompt, completion = self._pair_texts(content, content)
                return "".join(f"{p}{c}\n\n" for p, c in shown) + prompt, completion

    def _pair_texts(self, pair: Pair, asked: Pair) -> tuple[str, str]:
        """Prompt and completion of a pair in the language of the pair that is asked about."""
        template, language = self._template_of(asked)
        different, same = words = self.label_words(language)
        order: Order = self.options.matching.rationale if pair.rationale else "none"
        answer = compose_answer(words[pair.label], pair.rationale, order=order, language=language)
        values = {"a": pair.a, "b": pair.b, "label_0": different, "label_1": same}
        return template.fill(values | {"label": answer})

    def _template_of(self, pair: Pair) -> tuple[Template, str]:
        language = language_of(pair, self.options.matching.language)
        templates = self.options.templates
        return templates["any"] if "any" in templates else templates[language], language

    def label_words(self, language: str) -> tuple[str, str]:
        """Text of label 0 and of label 1 in "zh" or "en"."""
        labels = self.options.matching.labels
        return labels.zh if language == "zh" else labels.en

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
        if isinstance(content, Fact):
            content = with_question(content, self.patterns)
        texts = prompt_texts(content)

        def encode(num_characters: int) -> Encoded | Refusal:
            return self._encode([with_prompt_texts(content, cut_left(texts, num_characters))])[0]

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
