"""Checkpoints: a directory of safetensors and JSON that is either whole or not there.

A checkpoint is written under a temporary name beside its place, synchronised to the disk and only
then renamed. A full disk or a kill at any moment leaves the checkpoints before it as they were.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from fused_attn.seq2seq.checkpoints.compress import widened
from fused_attn.seq2seq.errors import InputError

FORMAT_VERSION = 2

METADATA = "checkpoint.json"
MODEL = "model.safetensors"
TRAINING = "training.safetensors"

_TEMPORARY_PREFIX = ".writing-"


def save(
    directory: Path,
    meta: Mapping[str, Any],
    model: Mapping[str, Tensor],
    training: Mapping[str, Tensor] | None,
) -> None:
    """Write the checkpoint ``directory``, which must not exist, in one step.

    meta: JSON values; the format version is added. model: the parameters. training: what else
    goes on from here, the state of the optimizer and of the random generator; None for a model
    that is only to be used.

    Raises OSError if it cannot be written; nothing is left of it then.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY_PREFIX, dir=directory.parent))
    try:
        _write(temporary / MODEL, safetensors.torch.save(_contiguous(model)))
        if training is not None:
            _write(temporary / TRAINING, safetensors.torch.save(_contiguous(training)))
        document = {"format_version": FORMAT_VERSION, **meta}
        _write(temporary / METADATA, json.dumps(document).encode())
        temporary.chmod(0o755)  # mkdtemp keeps others out
        _sync(temporary)
        temporary.rename(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(directory.parent)


def remove(directory: Path) -> None:
    """Remove a checkpoint; it stops being one before the first of its files goes."""
    doomed = directory.with_name(_TEMPORARY_PREFIX + directory.name)
    directory.rename(doomed)
    shutil.rmtree(doomed)


def remove_unfinished(parent: Path) -> None:
    """Remove what killed processes left in ``parent``, half written or half removed."""
    for path in parent.glob(f"{_TEMPORARY_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def load_metadata(directory: Path) -> dict[str, Any]:
    """Return the JSON of a checkpoint; raises `InputError` if it is none that we can read."""
    with _readable(directory):
        document = json.loads((directory / METADATA).read_text(encoding="utf-8"))
        version = document["format_version"]
    if version != FORMAT_VERSION:
        raise InputError(
            f"the checkpoint {directory} has format version {version}; "
            f"this version of fused-attn reads {FORMAT_VERSION}"
        )
    return dict(document)


def load_tensors(directory: Path, name: str) -> dict[str, Tensor]:
    """Return the tensors of the file `MODEL` or `TRAINING`; raises `InputError`.

    Those stored in int8 are float32 again.
    """
    with _readable(directory):
        tensors = widened(safetensors.torch.load((directory / name).read_bytes()))
    # Views of one buffer, at any offset; cloned, each is aligned as any other tensor.
    return {name: tensor.clone() for name, tensor in tensors.items()}


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file of tensors that is either whole or as it was before; raises OSError."""
    write_atomically(path, safetensors.torch.save(_contiguous(tensors)))


def map_tensors(directory: Path, name: str) -> dict[str, Tensor]:
    """Return the tensors of a file, which is read as they are used; raises `InputError`."""
    with _readable(directory):
        (directory / name).stat()  # whose error names the file
        return safetensors.torch.load_file(directory / name)


@contextmanager
def _readable(directory: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        what = f"{Path(error.filename).name} is missing" if directory.is_dir() else "no such place"
        raise InputError(f"no checkpoint at {directory}: {what}") from None
    except OSError as error:
        raise InputError(f"cannot read the checkpoint {directory}: {error.strerror}") from None
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise damaged(directory, error) from None


def damaged(directory: Path, error: Exception) -> InputError:
    """Return the error to raise for a checkpoint whose parts do not fit together."""
    reason = " ".join(str(error).split())
    if isinstance(error, KeyError):  # its text is the key alone
        reason = f"it lacks {reason}"
    return InputError(f"the checkpoint {directory} is damaged: {reason}")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is either whole or as it was before; raises OSError."""
    descriptor, name = tempfile.mkstemp(prefix=_TEMPORARY_PREFIX, dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        _write(temporary, data)
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, each with memory of its own: the format has no name for what is shared."""
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().contiguous()
        place = own.untyped_storage().data_ptr()
        found[name] = own.clone() if place in taken else own
        taken.add(place)
    return found


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
