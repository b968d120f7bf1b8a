"""Parameters stored in float16 and int8."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.checkpoints.compress import narrowed, widened
from fused_attn.seq2seq.checkpoints.find import find_checkpoint
from fused_attn.seq2seq.checkpoints.load import load_model
from fused_attn.seq2seq.errors import InputError


def make_parameters() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(37, 17, generator=generator)
    matrix *= torch.logspace(-6, 3, 37)[:, None]  # rows of very different magnitudes
    matrix[5] = 0
    return {"matrix": matrix, "cube": matrix.view(37, 1, 17).clone(), "bias": matrix[1].clone()}


@pytest.mark.parametrize("name", ["matrix", "cube"])
def test_int8_is_within_half_a_step_of_each_row(name: str) -> None:
    parameters = make_parameters()
    stored = narrowed(parameters, "int8")
    assert stored[name].dtype == torch.int8
    found, given = (t[name].double().flatten(1) for t in (widened(stored), parameters))
    step = given.abs().amax(1, keepdim=True) / 127
    assert bool(((found - given).abs() <= 0.5001 * step).all())
    assert not found[5].any()
    assert widened(stored)[name].dtype == torch.float32


def test_what_is_no_matrix_stays_as_it_is() -> None:
    parameters = make_parameters()
    found = widened(narrowed(parameters, "int8"))
    assert list(found) == list(parameters)
    assert torch.equal(found["bias"], parameters["bias"])
    same = widened(narrowed(parameters, "float32"))
    assert all(torch.equal(same[name], tensor) for name, tensor in parameters.items())
    assert {t.dtype for t in narrowed(parameters, "float16").values()} == {torch.float16}


@pytest.mark.parametrize(
    ("change", "problem"), [("lost", "'{}' is missing"), ("short", "{} has shape .*, expected")]
)
def test_a_scale_that_does_not_fit_is_a_damaged_checkpoint(
    change: str, problem: str, tmp_path: Path
) -> None:
    path = find_checkpoint(Path("g2p"))
    meta = files.load_metadata(path)
    tensors = load_file(path / files.MODEL)
    scale = next(name for name in tensors if name.endswith(".int8-scale"))
    whole = tensors.pop(scale)
    if change == "short":
        tensors[scale] = whole[1:]
    kept = {key: value for key, value in meta.items() if key != "format_version"}
    files.save(tmp_path / "model", kept, tensors, None)
    with pytest.raises(InputError, match="is damaged: " + problem.format(scale)):
        load_model(tmp_path / "model", files.load_metadata(tmp_path / "model"))
