"""Wrapped layers outside of `forward`: other methods, sharding, conversions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
import torch.distributed as dist
import wrapped
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode
from wrapped import CASES, LENGTHS, B, D, E, S, T, assert_trains_alike, draw, parts_of

from fused_attn import LuongAttention, interop

LAYERS = ["dot", "general", "concat", "location", "predictive"]
METHODS = ("compute_proj_keys", "setup_memory", "prepare_memory", "scores")


def computed(layer: nn.Module, how: str) -> None:
    """Make all parameters computed, by hooks as in the old weight_norm and pruning."""
    for path in [path for path, _ in layer.named_parameters()]:
        if how == "pruned" or layer.get_parameter(path).dim():
            getattr(wrapped, how)(layer, path)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("how", ["pruned", "weight_normed"])
@pytest.mark.parametrize("name", LAYERS)
def test_methods_beside_forward_compute_their_parameters(name: str, how: str) -> None:
    """Two training steps that call only prepare_memory and scores."""
    ours, formula = wrapped.pair(name)
    query, memory, seed = draw(B, T, D), draw(B, S, E, seed=1), draw(B, T, S, seed=3)
    for layer in (ours, formula):
        computed(layer, how)
    found: dict[Any, list[Tensor]] = {ours: [], formula: []}
    for _ in range(2):
        scores, log = ours.scores(query, ours.prepare_memory(memory, LENGTHS))
        for hook in formula._forward_pre_hooks.values():
            hook(formula, ())
        wanted = formula.scored(query, memory, None, None) * getattr(formula, "scale", 1.0)
        counted = scores.isfinite()
        assert log.isfinite().all() and counted.any()
        for layer, result in ((ours, scores), (formula, wanted)):
            layer.zero_grad()
            (result[counted] * seed[counted]).sum().backward()
            found[layer].append(result[counted].detach())
            with torch.no_grad():
                for _, parameter in sorted(layer.named_parameters()):
                    if parameter.grad is not None:
                        found[layer].append(parameter.grad.clone())
                        parameter -= 0.1 * parameter.grad
    torch.testing.assert_close(found[ours], found[formula])


def test_adapters_methods_compute_their_parameters() -> None:
    mask = torch.arange(D) % 2 == 0
    tutorial: Any = interop.TutorialAttn("concat", D).double()
    prune.custom_from_mask(tutorial, "v", mask)
    tfa: Any = wrapped._built(interop.TFABahdanauAttention, D).double()
    prune.custom_from_mask(tfa, "attention_v", mask)
    states, hidden = draw(S, B, D), draw(1, B, D, seed=1)
    for _ in range(2):
        context, weights = tutorial.attend(hidden, states)
        energy = torch.tanh(tutorial.attn(torch.cat((hidden.expand_as(states), states), 2)))
        wanted = torch.softmax(energy @ (tutorial.v_orig * mask), 0).T[:, None]
        torch.testing.assert_close(weights, wanted)
        context.square().sum().backward()
        tfa.setup_memory(draw(B, S, E), LENGTHS)
        context, weights = tfa.attend(draw(B, 5))
        keys = tfa.memory_layer(draw(B, S, E))
        asked = tfa.query_layer(draw(B, 5))[:, None]
        found = peers.additive(asked, keys, tfa.attention_v_orig * mask)
        torch.testing.assert_close(weights, peers.softmax(found[:, 0], peers.below(LENGTHS, S)))
        context.square().sum().backward()
        with torch.no_grad():
            tutorial.v_orig -= tutorial.v_orig.grad
            tfa.attention_v_orig -= tfa.attention_v_orig.grad


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    where: Path = tmp_path_factory.mktemp("rendezvous") / "file"
    dist.init_process_group("gloo", init_method=f"file://{where}", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def sharded(name: str, layer: nn.Module, where: str, mesh: DeviceMesh) -> None:
    """Shard the submodules (inner ones first), the layer, or both; fully_shard refuses scalars."""
    if where != "whole":
        for path in sorted(parts_of(name), key=lambda path: -path.count(".")):
            fully_shard(layer.get_submodule(path), mesh=mesh)
    if where != "parts":
        numbers = {parameter for parameter in layer.parameters() if not parameter.dim()}
        fully_shard(layer, mesh=mesh, ignored_params=numbers)
        for method in METHODS:
            if hasattr(layer, method):
                register_fsdp_forward_method(layer, method)


# The warning is about results that are views; nothing writes to them here.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
@pytest.mark.parametrize("where", ["parts", "whole", "both"])
@pytest.mark.parametrize("name", CASES)
def test_fully_shard(name: str, where: str, mesh: DeviceMesh) -> None:
    assert_trains_alike(name, lambda layer: sharded(name, layer, where, mesh), lambda _: None)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
@pytest.mark.parametrize("name", ["concat", "general"])
def test_fully_shard_beside_forward(name: str, mesh: DeviceMesh) -> None:
    """The error says what to do, and doing that is enough."""
    query, memory = draw(B, T, D), draw(B, S, E, seed=1)
    ours, plain = wrapped.pair(name)[0], wrapped.pair(name)[0]
    numbers = {parameter for parameter in ours.parameters() if not parameter.dim()}
    fully_shard(ours, mesh=mesh, ignored_params=numbers)
    with pytest.raises(RuntimeError, match=r"register_fsdp_forward_method\(layer, 'scores'\)"):
        ours.scores(query, memory)
    if name == "concat":
        with pytest.raises(RuntimeError, match="prepare_memory found sharded parameters"):
            ours.prepare_memory(memory)
    for method in ("prepare_memory", "scores"):
        register_fsdp_forward_method(ours, method)
    results = []
    for layer in (ours, plain):
        prepared = layer.prepare_memory(memory.requires_grad_(), LENGTHS)
        context, _ = layer(query, prepared)
        torch.testing.assert_close(layer.scores(query, prepared), plain.scores(query, prepared))
        context.square().sum().backward()
        grads = {path: wrapped.whole(p.grad) for path, p in layer.named_parameters()}
        results.append((context.detach(), grads))
    torch.testing.assert_close(*results)


WRAPPERS: dict[str, tuple[Callable[[Any], object], str]] = {
    "hooks": (
        lambda layer: layer.linear_q.register_forward_hook(lambda *_: None),
        r"linear_q has hooks \(_forward_hooks\)",
    ),
    "parametrized": (
        lambda layer: wrapped.parametrized(layer, "linear_k.weight"),
        "linear_k is parametrized",
    ),
    "own": (lambda layer: wrapped.parametrized(layer, "linear_att"), "the layer is parametrized"),
    "pruned": (
        lambda layer: wrapped.pruned(layer, "linear_att"),
        r"the layer has hooks \(_forward_pre_hooks\)",
    ),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_conversions_refuse_weights_that_are_computed(kind: str) -> None:
    """Computed weights may be those of the previous step, and writing to them would be lost."""
    wrap, reason = WRAPPERS[kind]
    layer = interop.GNMTBahdanauAttention(D, E, 5)
    luong = interop.to_luong(layer)
    wrap(layer)
    with pytest.raises(ValueError, match=f"layer must have plain parameters, but {reason}"):
        interop.to_luong(layer)
    with pytest.raises(ValueError, match=f"layer must have plain parameters, but {reason}"):
        interop.load_luong(layer, luong)
    wrapped.pruned(luong, "v")
    with pytest.raises(
        ValueError, match="luong must have plain parameters, but the layer has hooks"
    ):
        interop.load_luong(interop.GNMTBahdanauAttention(D, E, 5), luong)


def test_load_kernels_refuses_weights_that_are_computed() -> None:
    layer: Any = wrapped._built(interop.TFALuongAttention, 5)
    wrapped.parametrized(layer, "memory_layer.weight")
    with pytest.raises(ValueError, match="cannot write the weights: memory_layer is parametrized"):
        layer.load_kernels([torch.ones(E, 5)])


def test_swap_leaves_a_forward_that_was_replaced() -> None:
    model = nn.ModuleDict({"attn": peers.named("Attn", peers.Tutorial, "general", D)})
    model["attn"].forward = peers.Tutorial.forward.__get__(model["attn"])
    report = interop.swap(model)
    assert not report.swapped
    assert report.refused == (("attn", "it has hooks (forward), which would be lost"),)


@pytest.mark.parametrize("name", ["joey_luong", "tfa_luong"])
def test_wrapped_after_the_memory_was_set(name: str) -> None:
    """Then the keys are projected by the first query."""
    ours, formula = wrapped.pair(name)
    CASES[name].call(ours, torch.float64)
    for layer in (ours, formula):
        wrapped.lora(layer, "key_layer" if name == "joey_luong" else "memory_layer")
    query = draw(B, 5, seed=4)
    if name == "joey_luong":
        values, mask = draw(B, S, E, seed=1), peers.below(LENGTHS, S)
        assert mask is not None
        got = ours(query[:, None], mask[:, None], values)
        formula.compute_proj_keys(values)
        expected = formula(query[:, None], mask[:, None], values)
    else:
        formula.setup_memory(draw(B, S, E, seed=1), LENGTHS)
        got, expected = ours([query, None]), formula([query, None])
    torch.testing.assert_close(got, expected)


def test_a_plain_location_layer_costs_the_rows_of_its_source() -> None:
    """The cost depends on S, not on max_source, even if a FLOP counter hooks every module."""
    layer = LuongAttention(D, E, score="location", max_source=1000)
    counter = FlopCounterMode(display=False)
    with counter:
        layer(torch.randn(1, 1, D), torch.randn(1, 2, E))
    assert counter.get_total_flops() < 2 * D * 1000
