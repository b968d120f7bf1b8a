"""Runs that start from a narrower model: the wider one computes the same and can learn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fused_attn.cli import main
from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.checkpoints.find import checkpoints
from fused_attn.seq2seq.config import ModelConfig
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.model.widen import can_grow, grown

SHAPE = ModelConfig(hidden=6, embedding=5, layers=2, dropout=0.0)
TWO_WAY = [
    {},
    {"cell": "gru", "score": "concat", "bridge": "mean"},
    {"score": "concat", "attn_dim": 3, "coverage": True},
    {"cell": "rnn", "score": "dot", "input_feeding": True},
    {"score": "location", "max_source": 7, "encoder_layers": 3},
    {"score": "none", "tie": "output"},
    {"embedding": 6, "tie": "output"},  # the wider one has a projection to the embedding
    {"score": "concat", "local": "predictive", "window": 2, "residual": True},
    {"input_feeding": True, "local": "monotonic", "window": 2, "reverse_source": True},
]
ONE_WAY = [
    {"bridge": "last", "residual": True},
    {"share": True, "score": "concat", "variational": True},
]
CASES = [*TWO_WAY, *({"bidirectional": False, **options} for options in ONE_WAY)]

Inputs = tuple[Tensor, Tensor, Tensor]


def made(config: ModelConfig, seed: int) -> Seq2Seq:
    torch.manual_seed(seed)
    return Seq2Seq(config, 11, 13, backend="eager").double()


def pair(options: dict[str, object], wide: int) -> tuple[Seq2Seq, Seq2Seq]:
    """A model, and a wider one grown from it."""
    narrow = made(replace(SHAPE, **options), 1)
    wider = made(replace(narrow.config, hidden=wide), 2)
    assert can_grow(narrow.config, wider.config)
    args = narrow.config, narrow.state_dict(), wider.config, wider.state_dict()
    wider.load_state_dict(grown(*args))
    return narrow, wider


@pytest.fixture
def inputs() -> Inputs:
    """Sources, their lengths, and targets."""
    torch.manual_seed(3)
    lengths = torch.tensor([7, 1, 4, 7])
    source = torch.randint(4, 11, (4, 7)).masked_fill(torch.arange(7) >= lengths[:, None], 0)
    return source, lengths, torch.randint(4, 13, (4, 6))


@pytest.mark.parametrize("wide", [7, 12, 17])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_it_computes_the_same(options: dict[str, object], wide: int, inputs: Inputs) -> None:
    narrow, wider = pair(options, wide)
    assert wider.encoder.stack.hidden == wide
    for model in (narrow, wider):
        model.eval()
    expected, weights = narrow(*inputs, return_weights=True)
    found, others = wider(*inputs, return_weights=True)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    if weights is not None:
        torch.testing.assert_close(others, weights, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_the_new_columns_learn(options: dict[str, object], inputs: Inputs) -> None:
    """The first step changes weights that start at 0, the second step those before them."""
    narrow, wider = pair(options, 9)
    before = {name: tensor.clone() for name, tensor in wider.state_dict().items()}
    optimizer = torch.optim.SGD(wider.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        wider.loss(*inputs).backward()
        optimizer.step()
    old = narrow.state_dict()
    for name, tensor in wider.state_dict().items():
        if (
            name not in old
            or tensor.shape == old[name].shape
            or (options.get("local") and "position" in name)
        ):
            continue  # a predicted position is rounded to its window, so no gradient reaches it
        assert not torch.equal(tensor[-1:], before[name][-1:]), name
        assert not torch.equal(tensor[..., -1], before[name][..., -1]), name


def test_what_cannot_grow() -> None:
    wide = replace(SHAPE, hidden=8)
    assert can_grow(SHAPE, replace(wide, dropout=0.4, variational=True))
    assert not can_grow(wide, SHAPE)
    assert not can_grow(SHAPE, SHAPE)
    for options in ({"layers": 3}, {"embedding": 7}, {"cell": "gru"}, {"encoder_hidden": 6}):
        assert not can_grow(SHAPE, replace(wide, **options)), options
    split = {"encoder_hidden": 4}  # would not grow with the rest
    assert not can_grow(replace(SHAPE, **split), replace(wide, **split))
    # Another width would add or remove a residual connection, or the projection of a tied output.
    for residual in ({"embedding": 6}, {"embedding": 8}, {"embedding": 12}, {"embedding": 16}):
        changed = {"residual": True, **residual}
        assert not can_grow(replace(SHAPE, **changed), replace(wide, **changed)), residual
        assert can_grow(replace(SHAPE, **residual), replace(wide, **residual))
    tied = {"tie": "output", "embedding": 8}
    assert not can_grow(replace(SHAPE, **tied), replace(wide, **tied))
    unprojected = {"score": "dot", "bidirectional": False}
    assert not can_grow(replace(SHAPE, **unprojected), replace(wide, **unprojected))


def test_a_training_begins_with_a_narrower_model(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "pairs.tsv"
    data.write_text("".join(f"{a} {b}\t{b} {a}\n" for a in "abcde" for b in "fghij"))
    common = ["train", "pairs", "--train", str(data), "--dev", str(data), "--threads", "1"]
    first, second = tmp_path / "first", tmp_path / "second"
    learn = ["--hidden", "16", "--batch-size", "5", "--epochs", "40", "--lr", "0.01"]
    assert main([*common, "--output", str(first), *learn]) == 0
    on = ["--start-from", str(first), "--hidden", "24", "--max-steps", "1", "--lr", "1e-5"]
    assert main([*common, "--output", str(second), *on]) == 0
    assert files.load_metadata(checkpoints(second)[0])["model"]["hidden"] == 24
    capfd.readouterr()
    for run in (first, second):
        assert main(["predict", str(run), "c h", "e f"]) == 0
        assert capfd.readouterr().out == "h c\nf e\n"


def test_a_damaged_narrower_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    common = ["train", "reverse", "--numbers", "5", "--pairs", "50", "--longest", "3"]
    common += ["--test-longest", "4", "--max-steps", "1", "--threads", "1"]
    run = tmp_path / "run"
    assert main([*common, "--output", str(run), "--hidden", "8"]) == 0
    path = checkpoints(run)[-1]
    meta = files.load_metadata(path)
    parameters = files.load_tensors(path, files.MODEL)
    odd = parameters | {"output.weight": parameters["output.weight"][:, :-1]}
    few = {name: tensor for name, tensor in parameters.items() if name != "output.weight"}
    for name, tensors in (("odd", odd), ("few", few)):
        files.save(tmp_path / name, meta, tensors, None)
        output = tmp_path / f"from-{name}"
        on = ["--start-from", str(tmp_path / name), "--hidden", "12"]
        capfd.readouterr()
        assert main([*common, "--output", str(output), *on]) == 2
        assert f"the checkpoint {tmp_path / name} is damaged" in capfd.readouterr().err
        assert not output.exists()
