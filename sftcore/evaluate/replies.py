"""What a held-out chat or completion is compared with: the reply that training would train, to the token.

In: records, a `Prompter`. Out: `Reply`s; the records that can be scored, the others in the ledger.
Invariant: what can't be scored is left out before anything is decoded, with file, row and reason; a record
that is kept has a prompt and a reply.
Trade-off: a reply is right only where it is the reference, white space around it aside: exact, cheap and
blind to paraphrases; one that needs more tokens than are decoded can't be right, and is counted.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from sftcore.data.ledger import Ledger, Rejection, printable
from sftcore.data.prompts import Prompter, Refusal
from sftcore.data.records import Record
from sftcore.tasks.kinds.content import Reply as Reply

log = logging.getLogger("sftcore.evaluating")


def replies_of(records: Sequence[Record], prompter: Prompter) -> list[Reply | Refusal | None]:
    """The reply of each chat and completion, or why there is none; None for other records."""
    found: list[Reply | Refusal | None] = [record.content.why_no_reply() for record in records]
    asked = [i for i, record in enumerate(records) if record.content.is_verbatim and found[i] is None]
    for i, ids in zip(asked, prompter.reply_ids_batch([records[i] for i in asked]), strict=True):
        if isinstance(ids, Refusal):
            found[i] = ids
            continue
        text = str(prompter.codec.tokenizer.decode(ids, skip_special_tokens=True)).strip()
        found[i] = Reply(text=text, num_tokens=len(ids) - 1, stop_id=ids[-1])
    return found


def reject_unscorable(
    records: Sequence[Record], prompter: Prompter, ledger: Ledger, *, max_new_tokens: int
) -> list[Record]:
    """The records that can be scored; chats and completions that can't go to the ledger."""
    kept, num_long, num_replies = [], 0, 0
    for record, reply in zip(records, replies_of(records, prompter), strict=True):
        if isinstance(reply, Refusal):
            ledger.reject(_rejection(record, reply))
            continue
        kept.append(record)
        num_replies += reply is not None
        num_long += reply is not None and reply.num_tokens > max_new_tokens
    if len(kept) < len(records):
        left_out = len(records) - len(kept)
        log.warning("%d of %d held-out items can't be scored and are left out", left_out, len(records))
    if num_long:
        text = "%d of %d right replies are longer than evaluate.max_new_tokens (%d): these can't be matched"
        log.warning(text, num_long, num_replies, max_new_tokens)
    return kept


def _rejection(record: Record, refusal: Refusal) -> Rejection:
    return Rejection(
        file=record.file,
        row=record.row,
        reason=refusal.reason,
        excerpt=printable(record.id),
        detail=printable(refusal.detail),
    )
