"""The tasks that the toolkit has, by name."""

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
    """The task of `Task.to_json`; raises KeyError, TypeError or ValueError if it is none."""
    name = values["name"]
    if name not in TASKS:
        raise ValueError(f"its task is {name!r}, known are {', '.join(TASKS)}")
    kind = TASKS[name]
    return kind(kind.config_of(values))
