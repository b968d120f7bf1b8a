"""Checkpoint files: a directory of safetensors and JSON, created only once complete.

A checkpoint is written under a temporary name in the same parent directory, synced to disk and then
renamed. A full disk or a kill at any moment leaves earlier checkpoints intact.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from fused_attn.seq2seq.checkpoints.compress import widened
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.outputs import (
    TEMPORARY_PREFIX,
    sync_directory,
    write_atomically,
    write_synced,
)

FORMAT_VERSION = 2

METADATA = "checkpoint.json"
MODEL = "model.safetensors"
TRAINING = "training.safetensors"


def save(
    directory: Path,
    meta: Mapping[str, Any],
    model: Mapping[str, Tensor],
    training: Mapping[str, Tensor] | None,
) -> None:
    """Write the checkpoint ``directory``, which must not exist, atomically.

    meta: JSON values; the format version is added.
    model: the parameters.
    training: optimizer and random generator state to resume from; None for an exported model.

    Raises OSError if it cannot be written; no part of it is left then.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=directory.parent))
    try:
        write_synced(temporary / MODEL, safetensors.torch.save(_contiguous(model)))
        if training is not None:
            write_synced(temporary / TRAINING, safetensors.torch.save(_contiguous(training)))
        document = {"format_version": FORMAT_VERSION, **meta}
        write_synced(temporary / METADATA, json.dumps(document).encode())
        temporary.chmod(0o755)  # mkdtemp creates it readable by its owner only
        sync_directory(temporary)
        temporary.rename(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(directory.parent)


def remove(directory: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that no partial checkpoint is ever visible."""
    doomed = directory.with_name(TEMPORARY_PREFIX + directory.name)
    directory.rename(doomed)
    shutil.rmtree(doomed)


def remove_unfinished(parent: Path) -> None:
    """Remove half-written and half-removed checkpoints that killed processes left in ``parent``."""
    for path in parent.glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def load_metadata(directory: Path) -> dict[str, Any]:
    """Return the metadata of a checkpoint.

    Raises `InputError` if it is missing or damaged, or has another format version.
    """
    with _readable(directory):
        document = json.loads((directory / METADATA).read_text(encoding="utf-8"))
        version = document["format_version"]
    if version != FORMAT_VERSION:
        raise InputError(
            f"the checkpoint {directory} has format version {version}; "
            f"this version of fused-attn reads format version {FORMAT_VERSION}"
        )
    return dict(document)


def load_tensors(directory: Path, name: str) -> dict[str, Tensor]:
    """Return the tensors of the file ``name``, `MODEL` or `TRAINING`; raises `InputError`.

    Matrices stored in int8 are converted to float32.
    """
    with _readable(directory):
        tensors = widened(safetensors.torch.load((directory / name).read_bytes()))
    # They are views of one buffer at any offset. Clones have the usual alignment.
    return {name: tensor.clone() for name, tensor in tensors.items()}


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file of tensors atomically, replacing an older one; raises OSError."""
    write_atomically(path, safetensors.torch.save(_contiguous(tensors)))


def map_tensors(directory: Path, name: str) -> dict[str, Tensor]:
    """Memory-map the tensors of a file. Pages are read on demand. Raises `InputError`."""
    with _readable(directory):
        (directory / name).stat()  # its error names the file; safetensors' error does not
        return safetensors.torch.load_file(directory / name)


@contextmanager
def _readable(directory: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        what = "there is no such directory"
        if directory.is_dir():
            what = f"{Path(error.filename).name} is missing"
        raise InputError(f"no checkpoint at {directory}: {what}") from None
    except OSError as error:
        raise InputError(f"cannot read the checkpoint {directory}: {error.strerror}") from None
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise damaged(directory, error) from None


def damaged(directory: Path, error: Exception) -> InputError:
    """Return the `InputError` to raise for a checkpoint whose contents are not consistent."""
    reason = " ".join(str(error).split())
    if isinstance(error, KeyError):  # its text is only the key
        reason = f"{reason} is missing"
    return InputError(f"the checkpoint {directory} is damaged: {reason}")


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give each tensor memory of its own: safetensors cannot store shared memory."""
    copies: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().contiguous()
        address = own.untyped_storage().data_ptr()
        copies[name] = own.clone() if address in taken else own
        taken.add(address)
    return copies
