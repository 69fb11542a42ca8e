"""Task chat: conversations through the model's chat template, graded by the exact last reply.

In: `jsonl`. Out: see `task.Task`.
Invariant: all assistant turns are trained; the last is graded.
Trade-off: it has no templates of its own, the model's is the only one; what it decides of generated texts is
what task qa decides.
"""

from __future__ import annotations

from sftcore.settings import MatchingSettings
from sftcore.tasks.formats import examples
from sftcore.tasks.qa import answered_by as answered_by
from sftcore.tasks.qa import answers as answers
from sftcore.tasks.qa import architecture as architecture
from sftcore.tasks.qa import balances as balances
from sftcore.tasks.qa import faults as faults
from sftcore.tasks.qa import grading as grading
from sftcore.tasks.qa import more_scores as more_scores
from sftcore.tasks.qa import needs_reasons as needs_reasons
from sftcore.tasks.qa import sample_settings as sample_settings
from sftcore.tasks.qa import selects_by as selects_by
from sftcore.tasks.qa import with_examples as with_examples
from sftcore.tasks.task import Setting
from sftcore.tasks.template import Placeholders

formats = {"jsonl": examples}
placeholders: Placeholders | None = None
has_facts = False
talks = True


def templates(setting: Setting, settings: MatchingSettings) -> dict[str, Setting]:
    """None: the model's chat template is the only one."""
    return {}
