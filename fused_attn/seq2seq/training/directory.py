"""The directory of a run: who owns it, and whether a run can start in it.

DIR/run.lock                            the lock of the process that trains, see `owned`
DIR/steps.csv, DIR/epochs.csv           logs, see `logs`
DIR/teacher.safetensors                 the soft targets of the teachers, with --teacher
DIR/pairs/                              the encoded pairs, if they are kept on disk
DIR/checkpoints/step-0000465            the start of the run, or the step where it was stopped
DIR/checkpoints/step-0000926-epoch-02   the end of an epoch, with its development metrics
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fused_attn.seq2seq.checkpoints.find import CHECKPOINTS
from fused_attn.seq2seq.data.examples import FILES
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.outputs import TEMPORARY_PREFIX
from fused_attn.seq2seq.training.distillation import FILE as SOFT_TARGETS
from fused_attn.seq2seq.training.processes import from_launcher

LOCK, PAIRS = "run.lock", "pairs"

# What file systems without locks answer.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def owned(directory: Path) -> Iterator[None]:
    """Own the run in ``directory``, which is created if it does not exist, while the block runs.

    The lock belongs to the open file ``DIR/run.lock``, which holds the number of the process and
    the name of its machine. The system drops the lock when the process ends, however it ends. The
    file is removed at the end of the block, and the directory too if it was created here and is
    empty. On a file system without locks nothing is locked.

    Raises `InputError` if another process, or another thread of this one, owns the run; OSError if
    the directory or the file cannot be written.
    """
    if from_launcher("RANK") or (directory.exists() and not directory.is_dir()):
        yield  # the first of several processes owns the run; the caller refuses a file
        return
    created = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK
    descriptor, owner = _locked(path), os.getpid()
    try:
        yield
    finally:
        if os.getpid() == owner:  # not a fork of it that leaves the block, too
            with suppress(OSError):
                path.unlink()
        os.close(descriptor)
        if created and os.getpid() == owner:
            with suppress(OSError):  # it is not empty: the run has begun
                directory.rmdir()


def _locked(path: Path) -> int:
    """Return the descriptor of the locked file, which holds the number of this process."""
    while True:
        descriptor = _opened(path)
        try:
            _lock(path, descriptor)
            # The owner before may have removed the file after it was opened here.
            if _is_still(path, descriptor):
                os.ftruncate(descriptor, 0)
                owner = f"process {os.getpid()} on {socket.gethostname()}\n"
                os.pwrite(descriptor, owner.encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _opened(path: Path) -> int:
    """Open or create the file of a lock. It is written to, so that it must not be a link."""
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
        raise InputError(
            f"{path} must be a regular file, the lock of the run, or not exist: remove it"
        )
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def _lock(path: Path, descriptor: int) -> None:
    """Lock an open file; raises `InputError` with the owner if another one has it locked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = " ".join(os.read(descriptor, 1000).decode(errors="replace").split())
        raise InputError(
            f"{path.parent} is in use by {owner or 'another process'}: wait until it ends, or "
            "stop it"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether a path still names the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def is_new(directory: Path) -> bool:
    """Whether a run may start in a directory.

    It may if the directory does not exist, is empty, or has only what a start leaves that was
    killed before it wrote the first checkpoint.
    """
    if not directory.exists():
        return True
    return directory.is_dir() and all(map(_is_left_over, directory.iterdir()))


def clear(directory: Path) -> None:
    """Remove all but the lock from a directory in which a run may start; raises OSError."""
    for path in directory.iterdir():
        if path.name == LOCK:
            continue
        shutil.rmtree(path) if _is_directory(path) else path.unlink()


def _is_left_over(path: Path) -> bool:
    if path.name in (LOCK, SOFT_TARGETS) or path.name.startswith(TEMPORARY_PREFIX):
        return True
    if path.name == CHECKPOINTS and _is_directory(path):
        return all(entry.name.startswith(TEMPORARY_PREFIX) for entry in path.iterdir())
    if path.name == PAIRS and _is_directory(path):
        return {entry.name for entry in path.iterdir()} <= FILES
    return False


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
