"""Dropout: which share it keeps, and in which columns."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fused_attn.seq2seq.model.recurrent import Dropout, dropout


@pytest.mark.parametrize("variational", [False, True])
@pytest.mark.parametrize("is_packed", [False, True])
def test_dropout(variational: bool, is_packed: bool) -> None:
    """The mask is the same for all steps of a sequence or not, and the mean is preserved."""
    torch.manual_seed(0)
    layer = Dropout(0.5, variational)
    x, lengths = torch.ones(40, 9, 30), torch.randint(1, 10, (40,))
    if is_packed:
        packed = layer(pack_padded_sequence(x, lengths, True, enforce_sorted=False))
        y, _ = pad_packed_sequence(packed, True, total_length=9)
    else:
        y = layer(x)
    parts = [y[b, :length] for b, length in enumerate(lengths.tolist())]
    assert sum(float(p.sum()) for p in parts) / sum(p.numel() for p in parts) == pytest.approx(
        1.0, abs=0.1
    )
    assert all((part == part[:1]).all() for part in parts) == variational
    assert not torch.equal(parts[0][0], parts[1][0])
    assert torch.equal(layer.eval()(x), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("probability", [0.1, 0.4, 0.75])
def test_what_dropout_keeps(probability: float, dtype: torch.dtype) -> None:
    """The right share is kept and scaled, independently; the gradient has the same mask."""
    torch.manual_seed(1)
    x = torch.ones(401, 501, dtype=dtype, requires_grad=True)
    y = dropout(x, probability)
    scale = torch.tensor(1 / (1 - probability), dtype=dtype).item()
    assert set(y.unique().tolist()) == {0.0, scale}
    kept = (y > 0).flatten().double()
    spread = math.sqrt(probability * (1 - probability) / len(kept))
    assert abs(kept.mean().item() - (1 - probability)) < 4 * spread
    for apart in (1, 2, 3, 4, 501):  # one draw serves four elements
        together = (kept[apart:] * kept[:-apart]).mean().item()
        assert abs(together - (1 - probability) ** 2) < 5 * spread
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, y)
    torch.manual_seed(1)
    assert torch.equal(dropout(x, probability), y)
    assert not torch.equal(dropout(x, probability), y)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (0, 3), (3, 5, 1)])
def test_dropout_of_any_shape(shape: tuple[int, ...]) -> None:
    x = torch.randn(9, *shape).transpose(0, -1)
    for probability in (1e-9, 0.5, 1 - 1e-9):
        y = dropout(x, probability)
        assert y.shape == x.shape
        assert ((y == 0) | (y.sign() == x.sign())).all()


def test_the_ends_of_dropout() -> None:
    """Probabilities close to 0 and to 1, up to the resolution of 16 bits."""
    torch.manual_seed(0)
    x = torch.ones(10_000)
    assert (dropout(x, 1e-9) > 0).all()
    assert (dropout(x, 1 - 1e-9) > 0).sum() <= 5
