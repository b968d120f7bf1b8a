"""What writing a file may touch: a regular file is replaced, anything else is only written to."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fused_attn.cli import main
from fused_attn.seq2seq.inference.files import Group, predict_file
from fused_attn.seq2seq.inference.predictor import load
from fused_attn.seq2seq.outputs import (
    TEMPORARY_PREFIX,
    remove_unfinished,
    write_atomically,
    writing,
)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def predicts(tmp_path: Path) -> Callable[[Path], None]:
    """Write the output of two lines to a file, as `fused-attn predict --output` does."""
    source = tmp_path / "source.txt"
    source.write_text("one\ntwo\n")

    def upper(lines: list[bytes], before: int) -> str:
        return "".join(f"{line.decode().upper()}\n" for line in lines)

    def write(path: Path) -> None:
        predict_file(source, path, upper, Group())

    return write


WRITERS = {
    "bytes": lambda tmp_path: lambda path: write_atomically(path, b"ONE\nTWO\n"),
    "predict": predicts,
}
WRITTEN = b"ONE\nTWO\n"


@pytest.fixture(params=WRITERS)
def write(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> object:
    return WRITERS[request.param](tmp_path_factory.mktemp("source"))


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_new_files_have_the_mode_that_the_umask_allows(
    tmp_path: Path, umask: Callable[[int], int], write: Callable[[Path], None], mask: int
) -> None:
    umask(mask)
    write(tmp_path / "new")
    assert mode(tmp_path / "new") == 0o666 & ~mask
    assert os.listdir(tmp_path) == ["new"]


@pytest.mark.parametrize("before", [0o600, 0o640, 0o664, 0o755])
def test_an_existing_file_keeps_its_mode(
    tmp_path: Path, umask: Callable[[int], int], write: Callable[[Path], None], before: int
) -> None:
    umask(0o077)
    file = tmp_path / "private"
    file.write_text("old")
    file.chmod(before)
    number = file.stat().st_ino
    write(file)
    assert (file.read_bytes(), mode(file)) == (WRITTEN, before)
    assert file.stat().st_ino != number  # it was replaced in one step


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
def test_an_existing_file_keeps_its_owner(tmp_path: Path, write: Callable[[Path], None]) -> None:
    file = tmp_path / "theirs"
    file.write_text("old")
    os.chown(file, 12345, 54321)
    write(file)
    assert (file.stat().st_uid, file.stat().st_gid) == (12345, 54321)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("exists", [False, True])
def test_a_link_stays_a_link(
    tmp_path: Path, write: Callable[[Path], None], exists: bool, relative: bool
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here").mkdir()
    target = tmp_path / "elsewhere" / "file"
    if exists:
        target.write_text("old")
    first, second = tmp_path / "here" / "first", tmp_path / "here" / "second"
    second.symlink_to(Path("../elsewhere/file") if relative else target)
    first.symlink_to("second" if relative else second)
    write(first)
    assert first.is_symlink() and second.is_symlink()
    assert target.read_bytes() == WRITTEN and not target.is_symlink()
    assert sorted(os.listdir(tmp_path / "here")) == ["first", "second"]
    assert os.listdir(tmp_path / "elsewhere") == ["file"]


def test_links_in_a_circle_and_directories_are_errors(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path, number in ((loop, errno.ELOOP), (tmp_path, errno.EISDIR)):
        with pytest.raises(Exception, match=os.strerror(number)) as caught:
            write(path)
        assert str(path) in str(caught.value) and "->" not in str(caught.value)
    assert os.listdir(tmp_path) == ["loop"]


def test_a_fifo_is_written_to(tmp_path: Path, write: Callable[[Path], None]) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(fifo.read_bytes()))
    reader.start()
    write(fifo)
    reader.join()
    assert read == [WRITTEN]
    assert fifo.is_fifo() and os.listdir(tmp_path) == ["fifo"]


def test_a_device_is_written_to(tmp_path: Path, write: Callable[[Path], None]) -> None:
    link = tmp_path / "null"
    link.symlink_to("/dev/null")
    before = set(os.listdir("/dev"))
    for path in (Path("/dev/null"), link):
        write(path)
    assert Path("/dev/null").is_char_device() and link.is_symlink()
    assert set(os.listdir("/dev")) == before


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
@pytest.mark.parametrize("where", ["pipe", "file"])
def test_standard_output_is_written_to(tmp_path: Path, name: str, where: str) -> None:
    code = """
import sys
from pathlib import Path
from fused_attn.seq2seq.outputs import write_atomically
print("before")
write_atomically(Path(sys.argv[1]), b"written\\n")
print("after")
"""
    if name == "link":
        (tmp_path / "link").symlink_to("/dev/stdout")
        name = str(tmp_path / "link")
    file = tmp_path / "printed"
    file.write_text("log\n")
    with file.open("ab") as appended:
        done = subprocess.run(
            [sys.executable, "-c", code, name],
            stdout=subprocess.PIPE if where == "pipe" else appended,
            check=True,
        )
    printed = done.stdout.decode() if where == "pipe" else file.read_text().removeprefix("log\n")
    assert printed == "before\nwritten\nafter\n"
    assert Path("/dev/stdout").is_symlink()


def test_a_file_that_cannot_be_replaced_is_written_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    """As a file that is mounted by itself, or one in a directory that is not ours."""
    file = tmp_path / "mounted"
    for number in (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM):
        file.write_text("old")
        inode = file.stat().st_ino

        def refuse(*_: object, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", refuse)
            patch.setattr(Path, "replace", refuse)
            write(file)
        assert (file.read_bytes(), file.stat().st_ino) == (WRITTEN, inode)
        assert os.listdir(tmp_path) == ["mounted"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write any directory")
def test_a_file_in_a_directory_of_others_is_written_in_place(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    (tmp_path / "theirs").mkdir()
    file = tmp_path / "theirs" / "file"
    file.write_text("old")
    (tmp_path / "theirs").chmod(0o555)
    try:
        write(file)
    finally:
        (tmp_path / "theirs").chmod(0o755)
    assert file.read_bytes() == WRITTEN


@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk_names_the_file_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None], exists: bool
) -> None:
    file = tmp_path / "output"
    if exists:
        file.write_text("old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Exception, match="No space left") as caught:
        write(file)
    assert str(caught.value).rstrip("'").endswith((str(file), "No space left on device"))
    assert str(file) in str(caught.value) and TEMPORARY_PREFIX not in str(caught.value)
    assert os.listdir(tmp_path) == (["output"] if exists else [])
    assert not exists or file.read_text() == "old"


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, SystemExit])
def test_an_interruption_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    file = tmp_path / "output"
    file.write_text("old")
    with pytest.raises(error), writing(file) as written:
        written.write(b"half")
        raise error
    assert os.listdir(tmp_path) == ["output"] and file.read_text() == "old"

    def interrupted(lines: list[bytes], before: int) -> str:
        raise error

    source = tmp_path / "source"
    source.write_text("a\n")
    with pytest.raises(error):
        predict_file(source, file, interrupted, Group())
    assert sorted(os.listdir(tmp_path)) == ["output", "source"] and file.read_text() == "old"


def test_names_beside_the_output_are_left_alone(tmp_path: Path) -> None:
    source, output = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_text("hello\n")
    for name in ("out.txt.parts", "out.txt.part", ".writing-mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("mine")
    before = {path.name for path in tmp_path.iterdir()}
    assert main(["predict", "g2p", "--input", str(source), "--output", str(output)]) == 0
    assert output.read_text().split() == ["HH", "EH", "L", "OW"]
    assert {path.name for path in tmp_path.iterdir()} == {*before, "out.txt"}
    assert all((tmp_path / name / "precious").read_text() == "mine" for name in before - {"in.txt"})


def test_explain_writes_to_what_is_no_file(tmp_path: Path) -> None:
    link, page = tmp_path / "link.html", tmp_path / "page.html"
    page.write_text("private")
    page.chmod(0o600)
    link.symlink_to(page)
    assert main(["explain", "g2p", "hello", "--output", str(link)]) == 0
    assert link.is_symlink() and mode(page) == 0o600 and "<html" in page.read_text()
    assert main(["explain", "g2p", "hello", "--output", "/dev/null"]) == 0
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("ending", [".pharaoh", ".png"])
def test_alignments_are_written_through_a_link(tmp_path: Path, ending: str) -> None:
    link, file = tmp_path / f"link{ending}", tmp_path / "file"
    link.symlink_to("file")
    assert main(["predict", "g2p", "hello", "--alignments", str(link)]) == 0
    assert link.is_symlink() and file.stat().st_size > 10
    assert sorted(os.listdir(tmp_path)) == sorted(["file", link.name])


def test_export_never_writes_into_what_exists(
    tmp_path: Path, umask: Callable[[int], int], capsys: pytest.CaptureFixture[str]
) -> None:
    umask(0o027)
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    before = sorted(os.listdir(tmp_path))
    for name in ("dangling", "file", "empty", "empty/"):
        assert main(["export", "g2p", "--output", f"{tmp_path}/{name}"]) == 2
        assert "already exists" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == before
    assert main(["export", "g2p", "--output", f"{tmp_path}/new/model/"]) == 0
    model = tmp_path / "new" / "model"
    assert mode(model) == mode(model.parent) == 0o750
    assert {mode(path) for path in model.iterdir()} == {0o640}


def test_a_full_disk_leaves_nothing_of_an_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert main(["export", "g2p", "--output", f"{tmp_path}/new/deep/model"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{tmp_path}/new/deep/model: No space left" in error
    with pytest.raises(OSError, match="No space left") as caught:
        load("g2p").save(tmp_path / "new" / "model")
    assert caught.value.filename == f"{tmp_path}/new/model"
    assert os.listdir(tmp_path) == []


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / f"{TEMPORARY_PREFIX}file").touch()
    (tmp_path / f"{TEMPORARY_PREFIX}directory").mkdir()
    (tmp_path / f"{TEMPORARY_PREFIX}directory" / "part").touch()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "precious").touch()
    (tmp_path / f"{TEMPORARY_PREFIX}link").symlink_to(tmp_path / "kept")
    remove_unfinished(tmp_path)
    assert os.listdir(tmp_path) == ["kept"] and os.listdir(tmp_path / "kept") == ["precious"]
    remove_unfinished(tmp_path / "none")


def test_what_a_living_process_writes_stays(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from fused_attn.seq2seq.outputs import new_directory, writing
new_directory(Path(sys.argv[1]))
with writing(Path(sys.argv[1], "output")) as file:
    print("writing", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        before = sorted(os.listdir(tmp_path))
        assert len(before) == 2
        for name in (f"{TEMPORARY_PREFIX}{os.getpid()}-1", f"{TEMPORARY_PREFIX}0-1"):
            (tmp_path / name).touch()
        remove_unfinished(tmp_path)
        assert sorted(os.listdir(tmp_path)) == before
        process.kill()
    remove_unfinished(tmp_path)
    assert os.listdir(tmp_path) == []
