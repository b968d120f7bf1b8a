"""Layers to wrap, each with a plain-torch twin that calls the same submodules, and the wrappers.

A case is one of our layers, a formula whose submodules and parameters have the same names, and a
function that calls either. A wrapper is applied to both; then their results and all gradients must
agree.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import peers
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, weight_norm

from fused_attn import LuongAttention, interop

B, T, S, D, E = 3, 2, 7, 6, 6
LENGTHS = torch.tensor([S, 1, 4])


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def leaf(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """An input that requires a gradient, which backward hooks need."""
    return draw(*shape, seed=seed, dtype=dtype).requires_grad_()


class Position(nn.Module):
    """p_t = S sigmoid(v . tanh(W h_t)), with the parameters of `PredictedPosition`."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.v, self.proj = ours.v, ours.proj

    def forward(self, query: Tensor, lengths: Tensor) -> Tensor:
        return lengths[:, None] * torch.sigmoid(torch.tanh(self.proj(query)) @ self.v)


class Formula(nn.Module):
    """`LuongAttention` in plain torch: calls the same submodules; softmax over (B, T, S)."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        layer = LuongAttention(D, E, **options)
        self.options = {"score": "general"} | options
        for name, part in layer.named_children():
            setattr(self, name, Position(part) if name == "position" else part)
        for name, parameter in layer.named_parameters(recurse=False):
            setattr(self, name, parameter)
        self.history: Any
        self.position: Any
        self.query_proj: Any

    def forward(self, query: Any, memory: Any, lengths: Any, before: Any = None) -> Any:
        keep = peers.below(lengths, S)[:, None]
        scores = self.scored(query, memory, keep, before) * getattr(self, "scale", 1.0)
        gaussian = torch.ones_like(scores)
        if self.options.get("local") == "predictive":
            centers = self.position(query, lengths)
            distance = torch.arange(S) - centers[..., None]
            keep = keep & (distance.detach().abs() <= self.options["window"])
            gaussian = torch.exp(-0.5 * (distance / (self.options["window"] / 2)) ** 2)
        kind = self.options.get("normalizer", "softmax")
        weights = getattr(peers, kind)(scores, keep) * gaussian
        context = weights @ memory
        if "output_dim" in self.options:
            context = torch.tanh(self.output_proj(torch.cat((context, query), -1)))
        return context, weights

    def scored(self, query: Any, memory: Any, keep: Any, before: Any) -> Tensor:
        score = self.options["score"]
        if score == "dot":
            return query @ memory.mT
        projected = self.query_proj(query)
        if score == "location":
            return projected[..., :S]
        if score == "general":
            return projected @ memory.mT
        keys = self.memory_proj(memory)[:, None]
        if before is not None:
            flat = before.masked_fill(~keep, 0.0).reshape(B * T, S)
            term = self.history.coverage_proj(flat[..., None])
            term = term + self.history.conv_proj(self.history.conv(flat[:, None]).mT)
            keys = keys + term.reshape(B, T, S, -1)
        v = self.v
        if self.options.get("weight_norm"):
            v = self.g * v / v.square().sum().sqrt()
        return torch.tanh(projected[:, :, None] + keys) @ v


class Case(NamedTuple):
    ours: Callable[[], nn.Module]
    formula: Callable[[], nn.Module]
    call: Callable[[Any, torch.dtype], Any]  # calls either of them with inputs of a dtype


def _luong(**options: Any) -> Case:
    def call(layer: Any, dtype: torch.dtype) -> Any:
        inputs = (leaf(B, T, D, dtype=dtype), leaf(B, S, E, seed=1, dtype=dtype), LENGTHS)
        if not options.get("coverage"):
            return layer(*inputs)
        before = leaf(B, T, S, seed=2, dtype=dtype).abs()
        if isinstance(layer, Formula):
            return layer(*inputs, before)
        return layer(*inputs, coverage=before, previous_weights=before)

    return Case(lambda: LuongAttention(D, E, **options), lambda: Formula(**options), call)


def _opennmt(ours: Any, peer: Any, kind: str, normalizer: str = "softmax") -> Case:
    def call(layer: Any, dtype: torch.dtype) -> Any:
        masks = (torch.arange(S) >= LENGTHS[:, None])[:, None]
        rest = (masks if "Eole" in type(layer).__name__ else LENGTHS, leaf(B, S, dtype=dtype).abs())
        return layer(leaf(B, T, D, dtype=dtype), leaf(B, S, E, seed=1, dtype=dtype), *rest)

    options = (D, True, kind, normalizer)
    return Case(lambda: ours(*options), lambda: peer(*options), call)


def _joey(ours: Any, peer: Any, own_keys: bool) -> Case:
    def call(layer: Any, dtype: torch.dtype) -> Any:
        values = leaf(B, S, E, seed=1, dtype=dtype)
        layer.compute_proj_keys(2 * values if own_keys else values)
        mask = peers.below(LENGTHS, S)
        assert mask is not None
        return layer(leaf(B, 1, 5, dtype=dtype), mask[:, None], values)

    return Case(ours, peer, call)


def _fairseq(layer: Any, dtype: torch.dtype) -> Any:
    ignored = (torch.arange(S) >= LENGTHS[:, None]).T
    return layer(leaf(B, D, dtype=dtype), leaf(S, B, E, seed=1, dtype=dtype), ignored)


def _gnmt(layer: Any, dtype: torch.dtype) -> Any:
    keys = leaf(S, B, E, seed=1, dtype=dtype)
    layer.set_mask(LENGTHS, keys)
    return layer(leaf(T, B, D, dtype=dtype), keys)


def _tutorial(layer: Any, dtype: torch.dtype) -> Any:
    return layer(leaf(1, B, D, dtype=dtype), leaf(S, B, D, seed=1, dtype=dtype))


def _speechbrain(layer: Any, dtype: torch.dtype) -> Any:
    layer.reset()
    memory = leaf(B, S, E, seed=1, dtype=dtype)
    steps = [layer(memory, LENGTHS, query) for query in leaf(2, B, D, dtype=dtype)]
    return tuple(torch.stack(parts) for parts in zip(*steps, strict=True))


def _tfa(layer: Any, dtype: torch.dtype) -> Any:
    layer.setup_memory(leaf(B, S, E, seed=1, dtype=dtype), LENGTHS)
    return layer([leaf(B, 5, dtype=dtype), None])[0]


def _built(kind: Any, *arguments: Any) -> nn.Module:
    """A TensorFlow or Keras adapter whose widths have been set by a first call."""
    layer: Any = kind(*arguments)
    if isinstance(layer, interop.KerasAdditiveAttention):
        layer.build(D)
    elif not isinstance(layer, interop.KerasAttention):
        with torch.no_grad():
            _tfa(layer, torch.float32)
    return layer


def _keras(layer: Any, dtype: torch.dtype) -> Any:
    inputs = [leaf(B, T, D), leaf(B, S, D, seed=1), leaf(B, S, D, seed=2)]
    return layer([x.to(dtype) for x in inputs], return_attention_scores=True)


CASES = {
    "dot": _luong(score="dot", scale="learned", output_dim=4),
    "general": _luong(bias=True, scale="learned", output_dim=4),
    "sparsemax": _luong(normalizer="sparsemax"),
    "concat": _luong(score="concat", bias=True, scale="learned", weight_norm=True, attn_dim=5),
    "layer_norm": _luong(score="concat", layer_norm=True, bias=True),
    "history": _luong(score="concat", coverage=True, conv_channels=2, conv_width=3),
    "location": _luong(score="location", bias=True, max_source=9, scale="learned"),
    "predictive": _luong(local="predictive", window=2.5),
    "onmt_dot": _opennmt(interop.OpenNMTGlobalAttention, peers.OpenNMT, "dot"),
    "onmt_general": _opennmt(interop.OpenNMTGlobalAttention, peers.OpenNMT, "general"),
    "onmt_mlp": _opennmt(interop.OpenNMTGlobalAttention, peers.OpenNMT, "mlp"),
    "onmt_sparsemax": _opennmt(interop.OpenNMTGlobalAttention, peers.OpenNMT, "mlp", "sparsemax"),
    "onmt2": _opennmt(interop.OpenNMT2GlobalAttention, peers.OpenNMT2, "mlp"),
    "eole": _opennmt(interop.EoleGlobalAttention, peers.Eole, "mlp"),
    "joey_bahdanau": _joey(
        lambda: interop.JoeyBahdanauAttention(4, E, 5), lambda: peers.JoeyBahdanau(4, E, 5), False
    ),
    "joey_luong": _joey(
        lambda: interop.JoeyLuongAttention(5, E), lambda: peers.JoeyLuong(5, E), False
    ),
    "joey_keys": _joey(
        lambda: interop.JoeyLuongAttention(5, E), lambda: peers.JoeyLuong(5, E), True
    ),
    "fairseq": Case(
        lambda: interop.FairseqAttentionLayer(D, E, 4, True),
        lambda: peers.Fairseq(D, E, 4, True),
        _fairseq,
    ),
    "gnmt": Case(
        lambda: interop.GNMTBahdanauAttention(D, E, 5, True),
        lambda: peers.GNMT(D, E, 5, True, False),
        _gnmt,
    ),
    **{
        f"tutorial_{method}": Case(
            partial(interop.TutorialAttn, method, D),
            partial(peers.Tutorial, method, D),
            _tutorial,
        )
        for method in ("general", "concat")
    },
    "content": Case(
        lambda: interop.ContentBasedAttention(E, D, 5, 4, 0.7),
        lambda: peers.SpeechBrain(E, D, 5, 4, 0.7, None),
        _speechbrain,
    ),
    "aware": Case(
        lambda: interop.LocationAwareAttention(E, D, 5, 4, 2, 1, 0.7),
        lambda: peers.SpeechBrain(E, D, 5, 4, 0.7, (2, 1)),
        _speechbrain,
    ),
    "tfa_luong": Case(
        lambda: _built(interop.TFALuongAttention, 5, None, None, True),
        lambda: peers.TFALuong(5, E, True),
        _tfa,
    ),
    "tfa_bahdanau": Case(
        lambda: _built(interop.TFABahdanauAttention, 5, None, None, True),
        lambda: peers.TFABahdanau(5, E, 5, True),
        _tfa,
    ),
    "keras_dot": Case(
        lambda: _built(interop.KerasAttention, True), lambda: peers.Keras("dot", D), _keras
    ),
    "keras_concat": Case(
        lambda: _built(interop.KerasAttention, True, "concat"),
        lambda: peers.Keras("concat", D),
        _keras,
    ),
    "keras_additive": Case(
        lambda: _built(interop.KerasAdditiveAttention), lambda: peers.Keras("additive", D), _keras
    ),
}


def pair(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """A layer and its formula, with the same weights."""
    torch.manual_seed(0)
    case = CASES[name]
    formula, ours = case.formula().to(dtype), case.ours().to(dtype)
    with torch.no_grad():
        for seed, parameter in enumerate(formula.parameters()):
            parameter.copy_(0.4 * draw(*parameter.shape, seed=20 + seed))
    ours.load_state_dict(formula.state_dict(), strict=True)
    return ours, formula


def parts_of(name: str, kind: type[nn.Module] = nn.Module) -> list[str]:
    """Paths of all submodules that directly hold parameters."""
    return [
        path
        for path, part in CASES[name].ours().named_modules()
        if path and isinstance(part, kind) and any(True for _ in part.parameters(recurse=False))
    ]


def parameters_of(name: str) -> list[str]:
    return [path for path, _ in CASES[name].ours().named_parameters()]


def owner(layer: nn.Module, path: str) -> tuple[Any, str]:
    parent, _, name = path.rpartition(".")
    return layer.get_submodule(parent), name


class Lora(nn.Module):
    """A minimal version of peft's wrapper of a Linear: a module without the Linear's attributes."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base
        weight = base.weight
        self.down = nn.Parameter(0.2 * draw(weight.shape[1], 2, seed=5).to(weight))
        self.up = nn.Parameter(draw(2, weight.shape[0], seed=6).to(weight))

    def forward(self, states: Tensor) -> Tensor:
        return self.base(states) + states @ self.down @ self.up


def lora(layer: nn.Module, path: str) -> None:
    parent, name = owner(layer, path)
    setattr(parent, name, Lora(getattr(parent, name)))


class Squeezed(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return torch.tanh(weight) * 1.5


def parametrized(layer: nn.Module, path: str) -> None:
    parametrize.register_parametrization(*owner(layer, path), Squeezed())


def pruned(layer: nn.Module, path: str) -> None:
    parent, name = owner(layer, path)
    shape = getattr(parent, name).shape
    mask = torch.arange(max(1, shape.numel())).remainder(3).ne(1).reshape(shape)
    prune.custom_from_mask(parent, name, mask)


def weight_normed(layer: nn.Module, path: str) -> None:
    parent, name = owner(layer, path)
    weight_norm(parent, name, 0 if getattr(parent, name).dim() > 1 else -1)


def train(
    layer: Any, call: Callable[[Any, torch.dtype], Any], steps: int = 2
) -> list[dict[str, Tensor]]:
    """Results and gradients, by parameter name, of each step of gradient descent."""
    found: list[dict[str, Tensor]] = []
    for _ in range(steps):
        layer.zero_grad()
        results = call(layer, torch.float64)
        results = results if isinstance(results, tuple) else (results,)
        loss = sum((r * draw(*r.shape, seed=9 + i)).sum() for i, r in enumerate(results))
        assert isinstance(loss, Tensor)
        loss.backward()
        step = {f"result {i}": result.detach() for i, result in enumerate(results)}
        for name, parameter in layer.named_parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            step[name] = whole(grad.clone())
            with torch.no_grad():
                parameter -= 0.1 * grad
        found.append(step)
    return found


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_trains_alike(
    name: str,
    wrap: Callable[[nn.Module], object] | None = None,
    wrap_formula: Callable[[nn.Module], object] | None = None,
) -> None:
    """Wrap both, possibly in different ways, and compare two training steps."""
    ours, formula = pair(name)
    for layer, change in ((ours, wrap), (formula, wrap_formula or wrap)):
        if change is not None:
            change(layer)
    found, expected = train(ours, CASES[name].call), train(formula, CASES[name].call)
    torch.testing.assert_close(found, expected)
    assert all(x.isfinite().all() for step in found for x in step.values())
