"""Every submodule and parameter of the layer and of every adapter, wrapped in the usual ways.

Results, gradients and two training steps are compared with a plain-torch formula that calls the
same submodules. Submodules are enumerated, so that new ones are tested automatically.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import wrapped
from torch import Tensor, nn
from wrapped import CASES, assert_trains_alike, pair, parameters_of, parts_of, train

PARTS = [(name, path) for name in CASES for path in parts_of(name)]
LINEARS = [(name, path) for name in CASES for path in parts_of(name, nn.Linear)]
PARAMETERS = [(name, path) for name in CASES for path in parameters_of(name)]


@pytest.mark.parametrize("name", CASES)
def test_formulas_are_right_unwrapped(name: str) -> None:
    assert_trains_alike(name)


def test_every_adapter_is_here() -> None:
    from fused_attn import interop

    adapters = {
        kind
        for kind in vars(interop).values()
        if isinstance(kind, type) and issubclass(kind, nn.Module)
    }
    assert adapters == {type(case.ours()) for case in CASES.values()} - {wrapped.LuongAttention}


@pytest.mark.parametrize(("name", "path"), LINEARS)
def test_lora(name: str, path: str) -> None:
    assert_trains_alike(name, lambda layer: wrapped.lora(layer, path))
    ours, _ = pair(name)
    wrapped.lora(ours, path)
    train(ours, CASES[name].call, 1)
    adapter = ours.get_submodule(path)
    assert adapter.down.grad.any() and adapter.up.grad.any()


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")  # still used
@pytest.mark.parametrize("how", ["parametrized", "pruned", "weight_normed"])
@pytest.mark.parametrize(("name", "path"), PARAMETERS)
def test_computed_parameters(name: str, path: str, how: str) -> None:
    if how == "weight_normed" and not pair(name)[0].get_parameter(path).dim():
        pytest.skip("weight_norm does not support scalars")
    assert_trains_alike(name, lambda layer: getattr(wrapped, how)(layer, path))


# SpeechBrain's convolution gets detached weights, in the original too.
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize(("name", "path"), PARTS)
def test_hooks_see_the_call_and_change_it(name: str, path: str) -> None:
    seen: list[str] = []

    def hook(layer: nn.Module) -> None:
        part = layer.get_submodule(path)
        part.register_forward_pre_hook(lambda *_: seen.append("before"))
        part.register_forward_hook(lambda _, args, output: output * 0.9)
        part.register_forward_hook(lambda *_: seen.append("after"))
        part.register_full_backward_pre_hook(lambda *_: seen.append("backward before"))
        part.register_full_backward_hook(lambda *_: seen.append("backward"))

    assert_trains_alike(name, hook)
    seen.clear()
    ours, formula = pair(name)
    for layer in (ours, formula):
        hook(layer)
        train(layer, CASES[name].call, 1)
    half = len(seen) // 2
    assert sorted(seen[:half]) == sorted(seen[half:])
    assert set(seen) == {"before", "after", "backward before", "backward"}


@pytest.mark.parametrize("name", CASES)
def test_a_hook_of_every_module_sees_the_parts(name: str) -> None:
    ours, formula = pair(name)
    calls: dict[str, list[str]] = {}
    for key, layer in (("ours", ours), ("formula", formula)):
        paths = {part: path for path, part in layer.named_modules()}
        seen = calls[key] = []

        def record(part: nn.Module, *_: Any, paths: Any = paths, seen: Any = seen) -> None:
            seen.append(paths[part])

        handle = nn.modules.module.register_module_forward_hook(record)
        try:
            CASES[name].call(layer, torch.float64)
        finally:
            handle.remove()
    parts = parts_of(name)
    ours_seen, formula_seen = ([p for p in calls[key] if p in parts] for key in calls)
    assert set(ours_seen) >= set(formula_seen)


@pytest.mark.parametrize(("name", "path"), LINEARS)
def test_a_forward_that_was_replaced_is_called(name: str, path: str) -> None:
    """Replaced on the instance, as accelerate does."""

    def replace(layer: nn.Module) -> None:
        part: Any = layer.get_submodule(path)
        before = part.forward
        part.forward = lambda states: before(states) * 0.7

    assert_trains_alike(name, replace)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")  # deprecated, in use
@pytest.mark.parametrize("name", [name for name in dict(LINEARS) if name != "layer_norm"])
def test_dynamic_quantisation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without padding: quantised layers use the range of their input, which padding changes."""
    monkeypatch.setattr(wrapped, "LENGTHS", torch.tensor([wrapped.S] * wrapped.B))
    results: list[tuple[Tensor, ...]] = []
    for layer in pair(name, torch.float32):
        quantised = torch.ao.quantization.quantize_dynamic(layer.eval(), {nn.Linear})
        kinds = {type(part).__module__ for part in quantised.modules()}
        assert any("quantized.dynamic" in kind for kind in kinds)
        with torch.no_grad():
            found = CASES[name].call(quantised, torch.float32)
        results.append(found if isinstance(found, tuple) else (found,))
    torch.testing.assert_close(*results)
    exact = CASES[name].call(pair(name, torch.float32)[0], torch.float32)
    exact = exact if isinstance(exact, tuple) else (exact,)
    assert not all(torch.equal(x, y) for x, y in zip(results[0], exact, strict=True))


HAVE_MASKS = [name for name in CASES if not name.startswith(("tutorial", "keras"))]
MASKED = [(name, path) for name in HAVE_MASKS for path in ["", *parts_of(name, nn.Linear)]]


@pytest.mark.parametrize(("name", "path"), MASKED)
def test_padding_is_not_read_by_what_is_wrapped(
    name: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in the padding of the memory reaches no result and no gradient of a parameter."""
    outside = (torch.arange(wrapped.S) >= wrapped.LENGTHS[:, None])[..., None]

    def leaf(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        states = wrapped.draw(*shape, seed=seed, dtype=dtype)
        if len(shape) == 3 and seed == 1:
            is_time_first = shape[0] == wrapped.S
            hidden = outside.transpose(0, 1) if is_time_first else outside
            states = states.masked_fill(hidden, torch.nan)
        return states.requires_grad_()

    monkeypatch.setattr(wrapped, "leaf", leaf)
    ours, _ = pair(name)
    if path:
        wrapped.lora(ours, path)
    for step in train(ours, CASES[name].call):
        assert all(x.isfinite().all() for x in step.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_autocast(name: str, dtype: torch.dtype) -> None:
    """As in the originals, results have the autocast dtype, and mixed dtypes are no error."""
    ours, _ = pair(name, torch.float32)
    with torch.no_grad():
        exact = CASES[name].call(ours, torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        found = CASES[name].call(ours, torch.float32)
    exact, found = (x if isinstance(x, tuple) else (x,) for x in (exact, found))
    assert all(x.dtype == dtype for x in found)
    assert all((x - y).norm() < 0.05 * y.norm() for x, y in zip(found, exact, strict=True))
    sum(x.float().square().sum() for x in found).backward()
    if path := next(iter(parts_of(name, nn.Linear)), None):
        wrapped.lora(ours, path)
        with torch.autocast("cpu", dtype=dtype):
            again = CASES[name].call(ours, torch.float32)
        again = again if isinstance(again, tuple) else (again,)
        assert all(x.dtype == dtype for x in again)
