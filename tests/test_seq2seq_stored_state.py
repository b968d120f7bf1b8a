"""A stored state of training is checked before torch's optimizer sees it: that checks nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn.seq2seq.config import ModelConfig, TrainingConfig
from fused_attn.seq2seq.data.examples import Examples
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.training.trainer import Trainer

SIZE = 9
RECIPE = TrainingConfig(epochs=2, batch_size=4)
MATRIX, VECTOR = "output.weight", "output.bias"


def make() -> Trainer:
    torch.manual_seed(1)
    pairs = [[3 + i % 6, 3 + i % 5] for i in range(24)]
    model = Seq2Seq(ModelConfig(hidden=4, embedding=3), SIZE, SIZE)
    return Trainer(model, Examples.of(pairs, pairs), RECIPE)


@pytest.fixture(scope="module")
def state() -> tuple[dict[str, Any], dict[str, Tensor]]:
    trainer = make()
    trainer.run_epoch(lambda _: None, lambda: trainer.position.step == 3)
    return trainer.state()


def replaced(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Any, Any], None]:
    def mutate(position: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name].clone())

    return mutate


def at(name: str, value: object) -> Callable[[Any, Any], None]:
    return lambda position, _: position.update({name: value})


def with_value(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return change


DAMAGE = {
    **{
        f"{moment}, {kind}": (replaced(f"{moment}.{name}", change), f"{moment}.{name}")
        for moment in ("exp_avg", "exp_avg_sq")
        for name, kind, change in (
            (MATRIX, "shorter", lambda t: t[:1]),
            (MATRIX, "flat", torch.flatten),
            (VECTOR, "longer", lambda t: torch.cat((t, t))),
            (VECTOR, "empty", lambda t: t[:0]),
            (VECTOR, "one number", lambda t: t[0]),
            (MATRIX, "float16", Tensor.half),
            (MATRIX, "float64", Tensor.double),
            (MATRIX, "int64", Tensor.long),
            (VECTOR, "nan", with_value(math.nan)),
            (VECTOR, "inf", with_value(math.inf)),
        )
    },
    "exp_avg_sq, negative": (replaced(f"exp_avg_sq.{VECTOR}", with_value(-1)), "exp_avg_sq"),
    "steps": (replaced(f"step.{MATRIX}", lambda t: t.repeat(7)), f"step.{MATRIX}"),
    "no step": (replaced(f"step.{MATRIX}", lambda t: t[None][:0]), f"step.{MATRIX}"),
    "step of nan": (replaced(f"step.{MATRIX}", with_value(math.nan)), f"step.{MATRIX}"),
    "step below 0": (replaced(f"step.{MATRIX}", with_value(-2)), f"step.{MATRIX}"),
    "whole step": (replaced(f"step.{MATRIX}", Tensor.long), f"step.{MATRIX}"),
    "missing": (lambda _, tensors: tensors.pop(f"exp_avg_sq.{MATRIX}"), f"exp_avg_sq.{MATRIX}"),
    "no generator": (lambda _, tensors: tensors.pop("generator"), "generator"),
    "generator of floats": (replaced("generator", Tensor.float), "generator"),
    "flat generator": (replaced("generator", torch.flatten), "generator"),
    "short generator": (replaced("generator", lambda t: t[:, :100]), "generator"),
    "empty generator": (replaced("generator", lambda t: t[:0]), "generator"),
    **{
        f"position: {name} of {value!r}"[:60]: (at(name, value), name)
        for name in ("step", "epoch", "batch", "tokens", "waited", "plateaus", "sampling_from")
        for value in (-1, "3", 1.5, True, 2**70, [3], {"a": 1})
    },
    **{
        f"position: {name} of {value!r}": (at(name, value), name)
        for name in ("loss", "best")
        for value in ("nan", [], True)
    },
    "position: beyond the epoch": (at("batch", 7), "batch"),
    "position: no symbols": (at("tokens", 0), "tokens"),
    "position: unknown": (at("steps", 1), "steps"),
}


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return make()


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_does_not_fit_is_named(kind: str, state: Any, trainer: Trainer) -> None:
    position, tensors = dict(state[0]), dict(state[1])
    mutate, named = DAMAGE[kind]
    mutate(position, tensors)
    with pytest.raises((KeyError, TypeError, ValueError)) as caught:
        trainer.load_state(position, tensors)
    assert named in str(caught.value)
    assert trainer.position.step == 0


def test_the_state_itself_is_loaded(state: Any, trainer: Trainer) -> None:
    trainer.load_state(*state)
    again, tensors = trainer.state()
    assert again == state[0] and again["step"] == 3
    assert all(torch.equal(tensors[name], state[1][name]) for name in state[1])
    assert trainer.run_epoch(lambda _: None, lambda: False)
