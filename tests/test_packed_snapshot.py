"""Which changes of a module a `Snapshot` sees, and which parameters are packed at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fused_attn import packed

pytest.importorskip("fused_attn._C", exc_type=ImportError)


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(6, 5))
        self.second = nn.Parameter(torch.randn(6, 5))


def module_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), Part(), nn.GRU(7, 3))


def swap_names(module: nn.Sequential) -> None:
    """The same tensors in the same order, under other names."""
    part: Any = module[1]
    first, second = part.first, part.second
    del part.first, part.second
    part.second, part.first = first, second


def replace(value: Any) -> Callable[[nn.Sequential], None]:
    def change(module: nn.Sequential) -> None:
        module[0]._parameters["weight"] = value

    return change


class Noisy(Tensor):
    """A subclass that runs its own code where a tensor is asked for anything."""

    @classmethod
    def __torch_function__(cls, *arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt


WEIGHT = torch.ones(7, 5)
CHANGES: dict[str, Callable[[nn.Sequential], Any]] = {
    "swapped names": swap_names,
    "in place": lambda module: module[0].weight.data.mul_(2.0),
    "one element, in place": lambda module: module[1].first.detach()[3, 1].fill_(9.0),
    "new memory": lambda module: setattr(module[0].weight, "data", module[0].weight.data.clone()),
    "new parameter": lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.detach().clone())),
    "no parameter": replace(None),
    "hook": lambda module: module[0].register_forward_hook(print),
    "new part": lambda module: module.__setitem__(0, nn.Linear(5, 7)),
    "half": lambda module: module.half(),
    "another device": lambda module: module.to("meta"),
    "subclass": replace(WEIGHT.as_subclass(Noisy)),
    "sparse": replace(WEIGHT.to_sparse()),
    "string": replace("weight"),
    "array": replace(WEIGHT.numpy()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_seen(name: str) -> None:
    module = module_of()
    snapshot = packed.Snapshot(module)
    assert snapshot.is_current()
    CHANGES[name](module)
    assert not snapshot.is_current()


def test_what_changes_no_result_is_not_a_change() -> None:
    module = module_of()
    snapshot = packed.Snapshot(module)
    module.requires_grad_(False).eval().to("cpu")
    module[0](torch.randn(2, 5))
    assert snapshot.is_current()


def test_parameters_made_in_inference_mode_have_no_version() -> None:
    with torch.inference_mode():
        module = module_of()
        snapshot = packed.Snapshot(module)
        assert snapshot.is_current()
        module[0].weight.mul_(2.0)
        assert not snapshot.is_current()


@pytest.mark.parametrize("left", [0, 100])
def test_memory_that_was_taken_away_is_not_read(left: int) -> None:
    """Parameters that are views of one buffer, which is freed, as shards are."""
    module, buffer = module_of(), torch.randn(2 << 20)
    module[0].weight = nn.Parameter(buffer[-35:].view(7, 5))
    snapshot = packed.Snapshot(module)
    assert snapshot.is_current()
    buffer.untyped_storage().resize_(left)
    assert not snapshot.is_current()


ODD: dict[str, tuple[Any, str]] = {
    "sparse": (nn.Parameter(WEIGHT.to_sparse()), "0 has a weight that is not dense"),
    "negated": (torch.view_as_complex(torch.ones(7, 5, 2)).conj().imag, "is a lazy negation"),
    "mkldnn": (WEIGHT.to_mkldnn(), "0 has a weight that is not dense"),
    "array": (np.ones((7, 5), dtype="float32"), "0 has a ndarray as its weight"),
    "subclass": (WEIGHT.as_subclass(type("Other", (Tensor,), {})), "0 has a Other as its weight"),
}


@pytest.mark.parametrize("name", ODD)
def test_other_parameters_are_a_reason_not_to_pack(name: str) -> None:
    value, message = ODD[name]
    module = nn.Sequential(nn.Linear(5, 7), nn.GRU(7, 3))
    assert packed.module_reasons(module) == []
    module[0]._parameters["weight"] = value
    (reason,) = packed.module_reasons(module)
    assert message in reason
