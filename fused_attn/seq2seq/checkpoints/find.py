"""Checkpoints by name: a path, the directory of a run, or a bundled model."""

from __future__ import annotations

from pathlib import Path

from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.metrics import cost

CHECKPOINTS = "checkpoints"  # the directory of a run that holds them


def checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoints of a run, the latest last."""
    # By step, and of one step the end of the epoch last: it follows a stop while being judged.
    return sorted((directory / CHECKPOINTS).glob("step-*"))


# The bundled models, each a checkpoint without the state of its training.
SHIPPED = Path(__file__).resolve().parents[2] / "models"


def find_checkpoint(model: str | Path) -> Path:
    """Return the checkpoint that ``model`` names.

    That is the path itself, or the best checkpoint of a run, or its last one, or a bundled model.
    Raises `InputError` if there is none.
    """
    model = Path(model)
    if (model / files.METADATA).exists():
        return model
    found = checkpoints(model)
    shipped = SHIPPED / model
    if not model.exists() and (shipped / files.METADATA).exists():
        return shipped
    if not found:
        raise InputError(f"no checkpoint at {model}: {_what_is_there(model)}")
    return best_checkpoint(found) or found[-1]


def last_checkpoint(directory: Path) -> Path:
    """Return the checkpoint of a run to resume from; raises `InputError` if there is none."""
    found = checkpoints(directory)
    if not found:
        raise InputError(f"nothing to resume in {directory}: {_what_is_there(directory)}")
    return found[-1]


def _what_is_there(path: Path) -> str:
    if not path.exists():
        return "there is no such directory"
    return "it holds no checkpoint" if path.is_dir() else "it is not a directory"


def best_checkpoint(found: list[Path]) -> Path | None:
    """Return the checkpoint with the best measures, the first before the others."""
    costs: dict[Path, tuple[float, ...]] = {}
    for path in found:
        if dev := files.load_metadata(path).get("dev"):
            costs[path] = tuple(cost(name, value) for name, value in dev.items())
    return min(costs, key=lambda path: costs[path], default=None)
