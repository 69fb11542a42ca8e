"""The wordings of a relation with a subject put in.

In: `Relation`s (data/relations.py), a subject. Out: completion prompts for the probe.
Invariant: a prompt ends right before the object, without a space, so what a model writes next begins with
the answer (or its article).
Trade-off: prefixes are ordered clearest first, so a probe with fewer than 21 of them uses the best ones; its
recall is not that of a full one, and the probe's report says so.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from sftcore.data.relations import FORMAT, RELATIONS_PATH, SUBJECT, Relation, load_relations
from sftcore.errors import Problem, UserInputError

__all__ = [
    "RELATIONS_PATH",
    "Relation",
    "completion_prompts",
    "find_relation",
    "load_relations",
]
MAX_NEAREST = 3


def find_relation(relations: Mapping[str, Relation], relation_id: str, *, where: str = "") -> Relation:
    """The relation with this id.

    Args:
        where: who asks for it (file:row), for the error.

    Raises:
        UserInputError: the table lacks it; names the nearest ids and says how to add one.
    """
    if relation_id not in relations:
        nearest = difflib.get_close_matches(relation_id, relations, n=MAX_NEAREST, cutoff=0.3)
        raise UserInputError(
            Problem(
                what=f"no wording is known for the relation '{relation_id}'",
                where=where,
                allowed=f"{len(relations)} relations, nearest: {', '.join(nearest) or ', '.join(relations)}",
                remedy=f"describe it in a relations file of your own (data.relations): {FORMAT}",
            )
        )
    return relations[relation_id]


def completion_prompts(relation: Relation, subject: str, num_templates: int) -> tuple[str, ...]:
    """The first `num_templates` completion prefixes with the subject filled in.

    Raises:
        UserInputError: the relation has fewer than `num_templates`, or none is asked for.
    """
    available = len(relation.completions)
    if not 1 <= num_templates <= available:
        raise UserInputError(
            Problem(
                what=f"relation '{relation.id}' can't give {num_templates} completion templates",
                where="probe.templates",
                got=str(num_templates),
                allowed=f"1 to {available}",
                remedy="lower probe.templates, or write more prefixes for this relation",
            )
        )
    return tuple(prefix.replace(SUBJECT, subject) for prefix in relation.completions[:num_templates])
