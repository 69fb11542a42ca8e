"""Tasks: what a model is trained to do, one module each; `task` lists what each has to decide."""

from sftcore.tasks import chat, matching, qa
from sftcore.tasks.task import Task

TASKS: dict[str, Task] = {"qa": qa, "matching": matching, "chat": chat}
