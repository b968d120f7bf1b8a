"""Heat maps of alignments."""

from __future__ import annotations

import errno
import os
import struct
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from fused_attn.seq2seq.commands.plots import (
    _CELL,
    alignment_figure,
    font_families,
    save_alignments,
)
from fused_attn.seq2seq.inference.prediction import Prediction


def make_prediction(source: str, target: str) -> Prediction:
    weights = torch.rand(len(target.split()), len(source)).softmax(dim=-1)
    return Prediction(tuple(source), tuple(target.split()), target, 0.0, alignment=weights)


HELLO = make_prediction("hello", "HH AH L OW")
PHONE = make_prediction("phone's", "F OW N Z")


def test_letters_and_phones_are_on_the_axes() -> None:
    figure = alignment_figure([HELLO, PHONE])
    assert len(figure.axes) == 2
    for axes, prediction in zip(figure.axes, (HELLO, PHONE), strict=True):
        assert [label.get_text() for label in axes.get_xticklabels()] == list(prediction.source)
        assert [label.get_text() for label in axes.get_yticklabels()] == list(prediction.tokens)
        (image,) = axes.get_images()
        assert prediction.alignment is not None
        assert torch.equal(torch.from_numpy(image.get_array().data), prediction.alignment)
        box = axes.get_window_extent()  # cells are squares of the same size in all maps
        assert box.width / len(prediction.source) == pytest.approx(_CELL * figure.dpi)
        assert box.height / len(prediction.tokens) == pytest.approx(_CELL * figure.dpi)


def test_a_longer_word_makes_a_larger_picture(tmp_path: Path) -> None:
    sizes = []
    for prediction in (HELLO, make_prediction("a" * 28, " ".join(["AH"] * 26))):
        save_alignments([prediction], tmp_path / "map.png")
        data = (tmp_path / "map.png").read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
        sizes.append(struct.unpack(">II", data[16:24]))
    assert sizes[0][0] > 200 and sizes[0][1] > 200
    assert sizes[1][0] > 2 * sizes[0][0] and sizes[1][1] > 2 * sizes[0][1]
    assert os.listdir(tmp_path) == ["map.png"]


def test_a_full_disk_leaves_the_picture_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "map.png"
    picture.write_bytes(b"before")

    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        save_alignments([HELLO], picture)
    assert os.listdir(tmp_path) == ["map.png"] and picture.read_bytes() == b"before"


def test_a_prediction_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="no alignment weights"):
        alignment_figure([Prediction(("a",), ("AH",), "AH", 0.0)])


def test_characters_of_any_script_have_a_font(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    """Other fonts of this machine fill in for matplotlib's, or a note says that none can."""
    weights = torch.rand(2, 3).softmax(dim=-1)
    known = Prediction(("été", "שלום", "ελλ"), ("ж", "▁a"), "", 0.0, alignment=weights)
    save_alignments([known], tmp_path / "a.png")
    assert capfd.readouterr().err == ""
    nowhere = "\U0010fffd"  # in a private use area
    save_alignments(
        [Prediction(("a", nowhere, "b"), ("c", "d"), "", 0.0, alignment=weights)],
        tmp_path / "b.png",
    )
    assert f"no font on this machine has the characters {nowhere}" in capfd.readouterr().err
    assert list(recwarn) == []
    families, missing = font_families("고양이")
    if missing:
        pytest.skip("this machine has no Korean font")
    assert len(families) > 1
    save_alignments(
        [Prediction(("고양이", "가", "b"), ("c", "d"), "", 0.0, alignment=weights)],
        tmp_path / "c.png",
    )
    assert capfd.readouterr().err == ""


def test_long_symbols_stand_upright() -> None:
    weights = torch.rand(2, 3).softmax(dim=-1)
    figure = alignment_figure(
        [Prediction(("the", "international", "cat"), ("a", "b"), "", 0.0, alignment=weights)]
    )
    figure.canvas.draw()
    labels = figure.axes[0].get_xticklabels()
    boxes = [label.get_window_extent() for label in labels]
    assert all(a.x1 <= b.x0 for a, b in pairwise(boxes))
    assert max(box.y1 for box in boxes) <= figure.bbox.height
