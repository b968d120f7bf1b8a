"""The tasks of the toolkit by name."""

from __future__ import annotations

from typing import Any

from fused_attn.seq2seq.tasks.base import Task
from fused_attn.seq2seq.tasks.chat import Chat
from fused_attn.seq2seq.tasks.g2p import G2P
from fused_attn.seq2seq.tasks.reverse import Reverse
from fused_attn.seq2seq.tasks.scan import Scan
from fused_attn.seq2seq.tasks.text import Pairs, Translate

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        G2P,
        Scan,
        Reverse,
        Pairs,
        Translate,
        Chat,
    )
}


def make_task(values: dict[str, Any]) -> Task:
    """Return the task described by ``values``, as from `Task.to_json`.

    Raises KeyError, TypeError or ValueError if ``values`` does not describe a task.
    """
    name = values["name"]
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known tasks: {', '.join(TASKS)}")
    kind = TASKS[name]
    return kind(kind.config_of(values))
