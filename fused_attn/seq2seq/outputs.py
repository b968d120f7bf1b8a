"""Writing files: complete or not at all, and only where a file may be replaced.

A path may name a regular file or no file yet: its contents appear in one step. It may also name a
device, a FIFO or an open file descriptor (``/dev/stdout``): those are written to and never
replaced. A symbolic link stays a link: the file that it points to is written.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

# Files and directories that are being written have names that start with this and the number of the
# process that writes them.
TEMPORARY_PREFIX = ".writing-"

_ATTEMPTS = 100  # names to try for a temporary file
# The directory does not allow a new file, or the file is a mount point: it is written in place.
_NOT_REPLACEABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV),
    *(errno.ENOENT, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL),
)
_MOST_LINKS = 40  # as in Linux
_OPEN_FILES = re.compile(r"/dev/fd|/proc/(\d+|self|thread-self)(/task/\d+)?/fd")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file atomically, replacing an older one; see `writing`. Raises OSError."""
    with writing(path) as file:
        file.write(data)


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file. At the end of the context ``path`` has the contents written to it.

    A regular file is replaced in one step and keeps its mode, and its owner where that is
    possible; a new file has the mode that the umask allows. If an exception is raised, the file is
    as before. A device, a FIFO, a socket or an open file descriptor is written to directly, and so
    is a file whose directory cannot be written.

    Raises OSError with ``path`` as its file name.
    """
    try:
        place, descriptor = _followed(path)
        if descriptor is not None:
            with _duplicate(descriptor) as file:
                yield file
        elif (before := _status(place)) is not None and not stat.S_ISREG(before.st_mode):
            with place.open("wb") as file:  # a directory raises IsADirectoryError here
                yield file
        else:
            yield from _replacing(place, before)
    except OSError as error:
        raise named(error, path) from None


def named(error: OSError, path: Path) -> OSError:
    """Return an error of the same kind whose file is ``path``, not a temporary name."""
    if error.errno is None:
        return error
    return OSError(error.errno, error.strerror, str(path))


def _replacing(place: Path, before: os.stat_result | None) -> Iterator[BinaryIO]:
    """Yield a temporary file that then takes the place of a regular file, or of none."""
    if before is not None and not os.access(place, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    try:
        temporary, file = _new_file(place.parent)
    except OSError as error:
        if error.errno not in _NOT_REPLACEABLE:
            raise
        with place.open("wb") as file:
            yield file
        return
    try:
        with file:
            if before is not None:
                _give_mode(file.fileno(), before)
            yield file
            file.flush()
            os.fsync(file.fileno())
        try:
            temporary.replace(place)
        except OSError as error:
            if before is None or error.errno not in _NOT_REPLACEABLE:
                raise
            with temporary.open("rb") as source, place.open("wb") as file:
                shutil.copyfileobj(source, file)
            temporary.unlink()
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _followed(path: Path) -> tuple[Path, int | None]:
    """Follow symbolic links to the file to write, or to the number of an open file descriptor."""
    place = path
    for _ in range(_MOST_LINKS):
        parent = Path(os.path.realpath(place.parent))
        place = parent / place.name
        if open_files := _OPEN_FILES.fullmatch(str(parent)):
            process = open_files[1]
            if process in (None, "self", "thread-self", str(os.getpid())) and (
                place.name.isdecimal()
            ):
                return place, int(place.name)
        # A link in /proc need not be the path of a file: the system follows it.
        if place.is_relative_to("/proc") or not place.is_symlink():
            return place, None
        place = parent / os.readlink(place)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def _status(place: Path) -> os.stat_result | None:
    try:
        return place.stat()
    except FileNotFoundError:
        return None


@contextmanager
def _duplicate(descriptor: int) -> Iterator[BinaryIO]:
    """Yield a file that shares the position of an open one: what was printed before stays."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    with os.fdopen(os.dup(descriptor), "wb") as file:
        yield file


def _new_file(directory: Path) -> tuple[Path, BinaryIO]:
    """Create an empty file of our own, with the mode that the umask allows."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    for _ in range(_ATTEMPTS):
        path = directory / _fresh_name()
        with suppress(FileExistsError):
            return path, os.fdopen(os.open(path, flags, 0o666), "wb")
    raise FileExistsError(errno.EEXIST, "no free name for a temporary file")


def _give_mode(descriptor: int, before: os.stat_result) -> None:
    """Give a new file the mode of an older one, and its owner and group where possible."""
    with suppress(OSError):
        os.fchown(descriptor, before.st_uid, before.st_gid)
    with suppress(OSError):  # some file systems have no modes
        os.fchmod(descriptor, stat.S_IMODE(before.st_mode))


def new_directory(parent: Path) -> Path:
    """Create an empty directory of our own, with the mode that the umask allows; raises OSError."""
    for _ in range(_ATTEMPTS):
        path = parent / _fresh_name()
        with suppress(FileExistsError):
            path.mkdir()
            return path
    raise FileExistsError(errno.EEXIST, "no free name for a temporary directory", str(parent))


def scratch_directory(path: Path) -> Path:
    """Create a directory for parts of the file to be written to ``path``; raises OSError.

    It is beside the file that ``path`` stands for: on its file system, which other processes share.
    If that is not a regular file, or its directory cannot be written, it is in the system's
    temporary directory.
    """
    place, descriptor = _followed(path)
    before = _status(place)
    if descriptor is None and (before is None or stat.S_ISREG(before.st_mode)):
        try:
            return new_directory(place.parent)
        except OSError as error:
            if before is None or error.errno not in _NOT_REPLACEABLE:
                raise named(error, path) from None
    return Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX))


def _fresh_name() -> str:
    return f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(8)}"


def remove_unfinished(directory: Path) -> None:
    """Remove files and directories that killed processes left unfinished in ``directory``.

    What another living process of this machine writes stays: the output of a prediction, perhaps.
    """
    for path in directory.glob(f"{TEMPORARY_PREFIX}*"):
        if _is_being_written(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def _is_being_written(name: str) -> bool:
    """Whether the process in the name of a temporary file lives, and is not this one."""
    number, _, _ = name.removeprefix(TEMPORARY_PREFIX).partition("-")
    if not number.isdecimal() or int(number) == os.getpid():
        return False
    try:
        os.kill(int(number), 0)
    except PermissionError:  # of another user
        return True
    except (OSError, OverflowError):
        return False
    return int(number) > 0


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and sync it to disk; raises OSError."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Sync the entries of a directory to disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
