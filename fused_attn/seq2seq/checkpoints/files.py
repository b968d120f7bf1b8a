"""Checkpoint files: a directory of safetensors and JSON, created only once complete.

A checkpoint is written under a temporary name in the same parent directory, synced to disk and then
renamed. A full disk or a kill at any moment leaves earlier checkpoints intact.

Its metadata has the SHA-256 digests of all parts. Loading verifies them, so that a file that was
changed, cut short or taken from another checkpoint is noticed. Checkpoints of earlier versions have
no digests.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fused_attn.seq2seq.checkpoints.compress import widened
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.outputs import (
    new_directory,
    sync_directory,
    write_atomically,
    write_synced,
)
from fused_attn.seq2seq.outputs import remove_unfinished as remove_unfinished

FORMAT_VERSION = 2

METADATA = "checkpoint.json"
MODEL = "model.safetensors"
TRAINING = "training.safetensors"

DIGESTS = "digests"  # key in the metadata: SHA-256 of each file by its name

# The dtypes that parameters may have. An int8 matrix is float32 once it is read.
_PARAMETERS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class DamagedError(InputError):
    """The contents of a checkpoint are missing, or are not consistent."""


def save(
    directory: Path,
    meta: Mapping[str, Any],
    model: Mapping[str, Tensor],
    training: Mapping[str, Tensor] | None,
) -> None:
    """Write the checkpoint ``directory``, which must not exist, atomically.

    meta: JSON values; the format version and the digests are added.
    model: the parameters.
    training: optimizer and random generator state to resume from; None for an exported model.

    Raises OSError if it cannot be written; neither a part of it nor a new parent directory is left
    then.
    """
    created = _make_parents(directory.parent)
    try:
        temporary = new_directory(directory.parent)
        try:
            _write(temporary, meta, model, training)
            temporary.rename(directory)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except BaseException:
        with suppress(OSError):  # not empty: another process uses it
            for parent in created:
                parent.rmdir()
        raise
    sync_directory(directory.parent)


def _make_parents(parent: Path) -> list[Path]:
    """Create a directory and its parents; returns those that did not exist, the innermost first."""
    created = [path for path in (parent, *parent.parents) if not path.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    return created


def _write(
    directory: Path,
    meta: Mapping[str, Any],
    model: Mapping[str, Tensor],
    training: Mapping[str, Tensor] | None,
) -> None:
    digests = {}
    for name, tensors in ((MODEL, model), (TRAINING, training)):
        if tensors is not None:
            data = safetensors.torch.save(_contiguous(tensors))
            digests[name] = hashlib.sha256(data).hexdigest()
            write_synced(directory / name, data)
    rest = {key: value for key, value in meta.items() if key != DIGESTS}
    # As it will be read: JSON has only strings as keys, which decides their order in the digest.
    document = json.loads(json.dumps({"format_version": FORMAT_VERSION, **rest}))
    digests[METADATA] = _digest(document)
    write_synced(directory / METADATA, json.dumps({**document, DIGESTS: digests}).encode())
    sync_directory(directory)


def _digest(document: Mapping[str, Any]) -> str:
    """The digest of metadata without digests, which does not depend on white space or order."""
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def remove(directory: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that no partial checkpoint is ever visible.

    If it is a symbolic link, only the link is removed.
    """
    if directory.is_symlink():
        directory.unlink()
        return
    doomed = new_directory(directory.parent)
    directory.rename(doomed)  # replaces the empty directory
    shutil.rmtree(doomed)


def load_metadata(directory: Path) -> dict[str, Any]:
    """Return the metadata of a checkpoint.

    Raises `InputError` if it is missing or damaged, or has another format version.
    """
    with _readable(directory):
        text = _read(directory / METADATA).decode()
        document = json.loads(text, parse_constant=_finite, parse_float=_finite)
        version = document["format_version"]
        if version != FORMAT_VERSION:
            raise InputError(
                f"the checkpoint {directory} has format version {str(version)[:20]}; "
                f"this version of fused-attn reads format version {FORMAT_VERSION}"
            )
        digests = document.get(DIGESTS)
        if digests is not None:
            rest = {key: value for key, value in document.items() if key != DIGESTS}
            _check(directory, METADATA, digests, _digest(rest))
    return dict(document)


def _read(path: Path) -> bytes:
    """Read a file. A FIFO would not end, and a device could be endless: they raise ValueError."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path.name} is not a regular file")
    return path.read_bytes()


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{METADATA} has the number {text}")
    return value


def _check(directory: Path, name: str, digests: Mapping[str, Any], found: str) -> None:
    """Raise ValueError unless a file has the digest that the metadata names."""
    if not isinstance(digests, dict):
        raise TypeError(f"{DIGESTS} must be a table")
    if name not in digests:
        raise ValueError(f"{name} does not belong to it: {METADATA} does not mention the file")
    if digests[name] != found:
        other = "" if name == METADATA else " or belongs to another checkpoint"
        raise ValueError(
            f"{name} was changed{other}: its SHA-256 digest differs from the one in {METADATA}"
        )


def load_tensors(
    directory: Path, name: str, meta: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """Return the tensors of the file ``name``, `MODEL` or `TRAINING`.

    meta: the metadata of the checkpoint, if it has been read already.

    Matrices stored in int8 are converted to float32. Raises `InputError` if the file is missing or
    damaged, or if a parameter is not of a floating dtype or not finite.
    """
    digests = (load_metadata(directory) if meta is None else meta).get(DIGESTS)
    with _readable(directory):
        data = _read(directory / name)
        if digests is not None:
            _check(directory, name, digests, hashlib.sha256(data).hexdigest())
        stored = safetensors.torch.load(data)
        tensors = widened(stored)
        if name == MODEL:
            check_parameters(tensors)
    # Stored tensors are views of one buffer at any offset. Clones have the usual alignment.
    return {
        key: tensor.clone() if tensor is stored[key] else tensor for key, tensor in tensors.items()
    }


def is_int8(directory: Path) -> bool:
    """Whether matrices of the checkpoint's model are stored in int8.

    Raises `InputError` if the file is missing or damaged.
    """
    with _readable(directory), safetensors.safe_open(directory / MODEL, "pt") as stored:
        return any(stored.get_slice(name).get_dtype() == "I8" for name in stored.keys())


def check_parameters(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError that names a parameter of another dtype than floats, or not finite."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _PARAMETERS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{name!r} must be of a floating dtype, got {kind}")
        # The largest and the smallest are nan if any element is.
        if tensor.numel() and not torch.stack(tensor.float().aminmax()).isfinite().all():
            raise ValueError(f"{name!r} has values that are not finite")


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file of tensors atomically, replacing an older one; raises OSError."""
    write_atomically(path, safetensors.torch.save(_contiguous(tensors)))


def map_tensors(directory: Path, name: str) -> dict[str, Tensor]:
    """Memory-map the tensors of a file. Pages are read on demand. Raises `InputError`."""
    with _readable(directory):
        (directory / name).stat()  # its error names the file; safetensors' error does not
        if not (directory / name).is_file():
            raise ValueError(f"{name} is not a regular file")
        return safetensors.torch.load_file(directory / name)


@contextmanager
def _readable(directory: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        what = "there is no such directory"
        if directory.is_dir():
            what = f"{Path(error.filename).name} is missing"
        raise DamagedError(f"no checkpoint at {directory}: {what}") from None
    except OSError as error:
        raise InputError(f"cannot read the checkpoint {directory}: {error.strerror}") from None
    except MemoryError:
        raise InputError(f"cannot read the checkpoint {directory}: not enough memory") from None
    except RecursionError:
        raise damaged(directory, ValueError(f"{METADATA} is nested too deeply")) from None
    except UNUSABLE as error:
        raise damaged(directory, error) from None


# What reading values of the wrong kind raises.
UNUSABLE = (
    *(SafetensorError, ValueError, KeyError, TypeError, AttributeError),
    *(IndexError, OverflowError, RecursionError, RuntimeError),
)


def damaged(directory: Path, error: Exception) -> DamagedError:
    """Return the error to raise for a checkpoint whose contents are not consistent."""
    reason = " ".join(str(error).split())[:_LONGEST_REASON] or type(error).__name__
    if isinstance(error, KeyError):  # its text is only the key
        reason = f"{reason} is missing"
    return DamagedError(f"the checkpoint {directory} is damaged: {reason}")


_LONGEST_REASON = 400  # characters: an error may quote what it could not read


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
