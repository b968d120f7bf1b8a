"""Find the checkpoint that a path, the directory of a run or a bundled model's name refers to."""

from __future__ import annotations

from pathlib import Path

from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.metrics import cost

CHECKPOINTS = "checkpoints"  # the subdirectory of a run with its checkpoints


def checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoints of a run, the latest last."""
    # Sorted by step. At the same step, the one with an epoch comes last: the other was written when
    # the run was stopped during the evaluation at the end of that epoch.
    return sorted(path for path in (directory / CHECKPOINTS).glob("step-*") if path.is_dir())


# The bundled models, each a checkpoint without training state.
SHIPPED = Path(__file__).resolve().parents[2] / "models"


def find_checkpoint(model: str | Path) -> Path:
    """Return the checkpoint that ``model`` names.

    model: a checkpoint; or the directory of a run, for its best checkpoint, or its last one if none
        has been evaluated; or the name of a bundled model. A path with a checkpoint takes
        precedence.

    Raises `InputError` if there is no checkpoint.
    """
    try:
        model = Path(model)
    except TypeError:
        kind = type(model).__name__
        raise InputError(f"expected the name or the path of a model, got {kind}") from None
    try:
        if (model / files.METADATA).exists():
            return model
    except OSError as error:
        raise InputError(f"no checkpoint at {str(model)[:60]}: {error.strerror}") from None
    found = checkpoints(model)
    shipped = SHIPPED / model
    if not found and (shipped / files.METADATA).exists():
        return shipped
    if not found:
        bundled = ", ".join(sorted(path.name for path in SHIPPED.iterdir()))
        raise InputError(f"no checkpoint at {model}: {_reason(model)} (bundled models: {bundled})")
    return best_checkpoint(found) or found[-1]


def last_checkpoint(directory: Path) -> Path:
    """Return the last checkpoint of a run, to resume from; raises `InputError` if there is none."""
    found = checkpoints(directory)
    if not found:
        raise InputError(f"nothing to resume in {directory}: {_reason(directory)}")
    return found[-1]


def _reason(path: Path) -> str:
    """Why there is no checkpoint."""
    if not path.exists():
        return "there is no such directory"
    return "it contains no checkpoint" if path.is_dir() else "it is not a directory"


def best_checkpoint(found: list[Path]) -> Path | None:
    """Return the checkpoint with the best metrics on the development set, None if none has any.

    The first metric decides, the next ones break ties.
    """
    costs: dict[Path, tuple[float, ...]] = {}
    for path in found:
        if dev := files.load_metadata(path).get("dev"):
            try:
                costs[path] = tuple(cost(name, float(value)) for name, value in dev.items())
            except files.UNUSABLE:
                reason = ValueError("dev must be a table of numbers")
                raise files.damaged(path, reason) from None
    return min(costs, key=lambda path: costs[path], default=None)
