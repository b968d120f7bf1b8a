"""Almost valid arguments: lengths out of range, other dtypes, NumPy numbers, fx proxies."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_attn
from fused_attn import LocalWindow, LuongAttention, interop

np = pytest.importorskip("numpy")
B, T, S, E = 2, 3, 5, 8
QUERY = torch.randn(B, T, E, generator=torch.Generator().manual_seed(0))
MEMORY = torch.randn(B, S, E, generator=torch.Generator().manual_seed(1))
EYE = torch.eye(E)
WINDOW = LocalWindow(torch.full((B, T), 2.0), 1.0)
LAYERS: dict[str, dict[str, Any]] = {
    "dot": {"score": "dot"},
    "output": {"score": "dot", "output_dim": 4},
    "general": {},
    "sparsemax": {"normalizer": "sparsemax"},
    "sparse_concat": {"score": "concat", "normalizer": "sparsemax"},
    "concat": {"score": "concat"},
    "layer_norm": {"score": "concat", "layer_norm": True},
    "history": {"score": "concat", "coverage": True},
    "location": {"score": "location", "max_source": 9},
    "monotonic": {"local": "monotonic"},
    "predictive": {"local": "predictive"},
    "dropout": {"dropout": 0.5},
}


def layer_of(name: str) -> LuongAttention:
    return LuongAttention(E, **LAYERS[name])


def call(layer: LuongAttention, query: Tensor, memory: Any, *rest: Any) -> Any:
    is_history = layer.history is not None
    extra = {"coverage": torch.zeros(B, T, S, dtype=query.dtype)} if is_history else {}
    return layer(query, memory, *rest, **extra)


def concat_scores(**rest: Any) -> Any:
    return fused_attn.concat_scores(QUERY, MEMORY, EYE, EYE, EYE[0], **rest)


# Everything that takes lengths, as a function of the lengths.
TAKES_LENGTHS: dict[str, Callable[[Tensor], Any]] = {
    "dot_attention": lambda n: fused_attn.dot_attention(QUERY, MEMORY, memory_lengths=n),
    "window": lambda n: fused_attn.dot_attention(QUERY, MEMORY, memory_lengths=n, window=WINDOW),
    "dropped": lambda n: fused_attn.dot_attention(QUERY, MEMORY, memory_lengths=n, dropout_p=0.5),
    "dot_scores": lambda n: fused_attn.dot_scores(QUERY, MEMORY, memory_lengths=n),
    "dot_window": lambda n: fused_attn.dot_scores(QUERY, MEMORY, memory_lengths=n, window=WINDOW),
    "general_scores": lambda n: fused_attn.general_scores(QUERY, MEMORY, EYE, memory_lengths=n),
    "concat_scores": lambda n: concat_scores(memory_lengths=n),
    "concat_window": lambda n: concat_scores(memory_lengths=n, window=WINDOW),
    "eager_scores": lambda n: concat_scores(memory_lengths=n, backend="eager"),
    **{f"{name} call": partial(call, layer_of(name), QUERY, MEMORY) for name in LAYERS},
    **{f"{name} scores": partial(layer_of(name).scores, QUERY, MEMORY) for name in LAYERS},
    **{f"{name} prepare": partial(layer_of(name).prepare_memory, MEMORY) for name in LAYERS},
    "onmt": lambda n: interop.OpenNMTGlobalAttention(E)(QUERY, MEMORY, n),
    "onmt_sparsemax": lambda n: interop.OpenNMTGlobalAttention(E, attn_func="sparsemax")(
        QUERY, MEMORY, n
    ),
    "speechbrain": lambda n: interop.ContentBasedAttention(E, E, 4, 4)(MEMORY, n, QUERY[:, 0]),
    "tfa": lambda n: interop.TFALuongAttention(E, MEMORY, n),
    "tfa_bahdanau": lambda n: interop.TFABahdanauAttention(E, MEMORY, n),
    "gnmt": lambda n: interop.GNMTBahdanauAttention(E, E, 4, batch_first=True).set_mask(n, MEMORY),
    "tutorial": lambda n: interop.TutorialAttn("dot", E).attend(
        QUERY[:, :1].transpose(0, 1), MEMORY.transpose(0, 1), n
    ),
}


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("bad", [S + 1, -1])
@pytest.mark.parametrize("name", TAKES_LENGTHS)
def test_lengths_outside_the_source_are_refused(name: str, bad: int, dtype: torch.dtype) -> None:
    message = rf"memory_lengths must lie in 0\.\.{S} .*, got {bad}"
    with pytest.raises(ValueError, match=message):
        TAKES_LENGTHS[name](torch.tensor([2, bad], dtype=dtype))
    TAKES_LENGTHS[name](torch.tensor([0, S], dtype=dtype))


def prepared_call(layer: LuongAttention, query: Tensor, memory: Tensor, lengths: Tensor) -> Any:
    return layer(query, layer.prepare_memory(memory, lengths))


SCORES: dict[str, Callable[..., Any]] = {
    "dot_scores": lambda q, m, n: fused_attn.dot_scores(q, m, memory_lengths=n),
    "general_scores": lambda q, m, n: fused_attn.general_scores(q, m, EYE, memory_lengths=n),
    "sparsemax": partial(prepared_call, layer_of("sparsemax")),
    "location": partial(prepared_call, layer_of("location")),
}


@pytest.mark.parametrize("name", SCORES)
def test_lengths_are_not_read_where_there_are_none(name: str) -> None:
    """Lengths have no values under compilers, fake tensors and transforms."""
    lengths = torch.tensor([S, 2])
    wanted = SCORES[name](QUERY, MEMORY, lengths)
    compiled = torch.compile(SCORES[name], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(QUERY, MEMORY, lengths), wanted)
    rows = torch.func.vmap(lambda q, m, n: SCORES[name](q[None], m[None], n[None]))
    found = rows(QUERY, MEMORY, lengths)
    torch.testing.assert_close([x.flatten(0, 1) for x in found], list(wanted))
    with FakeTensorMode(allow_non_fake_inputs=True):
        shapes = (torch.empty(B, T, E), torch.empty(B, S, E), torch.empty(B, dtype=torch.int64))
        fakes = SCORES[name](*shapes)
    assert [x.shape for x in fakes] == [x.shape for x in wanted]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "dot"])
def test_another_dtype_than_the_parameters(name: str, dtype: torch.dtype) -> None:
    layer = layer_of(name).eval()
    kind = str(dtype).removeprefix("torch.")
    message = rf"(query|memory) must have the dtype of the layer's parameters, float32, got {kind}"
    query, memory = QUERY.to(dtype), MEMORY.to(dtype)
    with pytest.raises(TypeError, match=message):
        call(layer, query, memory)
    if name != "output":
        with pytest.raises(TypeError, match=message):
            layer.scores(query, memory)
    if layer.score == "concat":
        with pytest.raises(TypeError, match=message):
            layer.prepare_memory(memory)
    prepared = layer.prepare_memory(MEMORY)
    layer.to(dtype)
    with pytest.raises(TypeError, match=rf"query must have the dtype .* {kind}, got float32"):
        call(layer, QUERY, prepared)


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_mixes_what_may_be_mixed(name: str) -> None:
    """float32 parameters with inputs of either dtype, or bfloat16 parameters."""
    layer = layer_of(name).eval()
    wanted = call(layer, QUERY, MEMORY)[0]
    narrow = layer_of(name).eval().bfloat16()
    narrow.load_state_dict(layer.state_dict())
    prepared = layer.prepare_memory(MEMORY)
    with torch.autocast("cpu"):
        _, log = layer.scores(QUERY, prepared)
        assert (log - layer.scores(QUERY, MEMORY)[1]).norm() < 0.05 * log.norm()
        found = [
            call(layer, QUERY, MEMORY)[0],
            call(layer, QUERY.bfloat16(), MEMORY)[0],
            call(layer, QUERY, prepared)[0],
            call(layer, QUERY, layer.prepare_memory(MEMORY))[0],
            call(narrow, QUERY, MEMORY)[0],
        ]
    for context in found:
        assert context.dtype == torch.bfloat16
        assert (context - wanted).norm() < 0.05 * wanted.norm()


def test_an_error_of_a_part_is_left_as_it_is() -> None:
    """Only an error about a wrong dtype gets another message."""
    layer = LuongAttention(E)

    def broken(*_: object) -> None:
        raise RuntimeError("hook failed")

    layer.query_proj.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="hook failed"):
        layer(QUERY, MEMORY)


@pytest.mark.parametrize("half", [np.float16(0.5), np.float32(0.5), np.float64(0.5), 0.5])
def test_numpys_numbers_are_numbers(half: Any) -> None:
    def same(run: Callable[[Any], Any]) -> None:
        torch.manual_seed(0)
        found = run(half)
        torch.manual_seed(0)
        torch.testing.assert_close(found, run(0.5))

    centers = torch.full((B, T), 2.0)
    same(lambda x: fused_attn.dot_attention(QUERY, MEMORY, scale=x))
    same(lambda x: fused_attn.general_attention(QUERY, MEMORY, EYE, scale=x))
    same(lambda x: fused_attn.dot_scores(QUERY, MEMORY, scale=x))
    same(lambda x: fused_attn.general_scores(QUERY, MEMORY, EYE, scale=x))
    same(lambda x: fused_attn.dot_attention(QUERY, MEMORY, dropout_p=x))
    same(lambda x: fused_attn.dot_attention(QUERY, MEMORY, window=LocalWindow(centers, x, True)))
    same(lambda x: LuongAttention(E, scale=x)(QUERY, MEMORY))
    same(lambda x: LuongAttention(E, dropout=x)(QUERY, MEMORY))
    same(lambda x: LuongAttention(E, local="predictive", window=x)(QUERY, MEMORY))
    same(lambda x: interop.KerasAttention(dropout=x)([QUERY, MEMORY], training=True))
    lengths = torch.tensor([S, 2])
    same(lambda x: interop.ContentBasedAttention(E, E, 4, 4, x)(MEMORY, lengths, QUERY[:, 0]))
    layer = LuongAttention(E, scale=half, dropout=half, local="monotonic", window=half)
    assert {type(x) for x in (layer.scale, layer.dropout, layer.window)} == {float}
    assert "scale=0.5" in repr(layer)


def test_numpys_integers_are_sizes() -> None:
    three, eight = np.int64(3), np.int32(8)
    layer = LuongAttention(
        *(eight, np.uint8(8), "concat"),
        **{"attn_dim": three, "output_dim": three, "conv_channels": np.int16(2)},
        **{"conv_width": three, "scale": np.int64(2), "dropout": np.int64(0)},
    )
    sizes = (layer.query_dim, layer.memory_dim, layer.attn_dim, layer.output_dim)
    assert sizes == (8, 8, 3, 3) and {type(size) for size in sizes} == {int}
    state, _ = layer(QUERY, MEMORY, previous_weights=torch.rand(B, T, S))
    assert state.shape == (B, T, 3) and layer.scale == 2.0
    location = LuongAttention(8, score="location", max_source=np.int64(9))
    assert type(location.max_source) is int
    local = LuongAttention(8, local="monotonic", window=np.int64(2))
    step = local(QUERY[:, 0], MEMORY, positions=np.int64(3))
    torch.testing.assert_close(step, local(QUERY[:, 0], MEMORY, positions=3))
    assert interop.TFALuongAttention(eight, MEMORY)([QUERY[:, 0], None])[0].shape == (B, S)


@pytest.mark.parametrize("value", [True, np.bool_(True), "1", None, torch.tensor(1.0), 1j])
def test_what_is_no_number(value: Any) -> None:
    with pytest.raises(TypeError, match="half_width must be a number, got"):
        window = LocalWindow(torch.full((B, T), 2.0), value)
        fused_attn.dot_attention(QUERY, MEMORY, window=window)
    with pytest.raises(TypeError, match="scale must be a number or 'learned', got"):
        LuongAttention(E, scale=value)
    with pytest.raises(TypeError, match="window must be a number, got"):
        LuongAttention(E, local="monotonic", window=value)
    if value is not True:  # True has always been accepted as 1
        with pytest.raises(TypeError, match=r"dropout_p must be a probability in 0\.\.1, got"):
            fused_attn.dot_attention(QUERY, MEMORY, dropout_p=value)
        with pytest.raises(TypeError, match=r"dropout must be a probability in 0\.\.1, got"):
            LuongAttention(E, dropout=value)
    for name in ("query_dim", "attn_dim", "output_dim"):
        if not (value is None and name != "query_dim"):
            with pytest.raises(ValueError, match=f"{name} must be a positive int, got"):
                LuongAttention(**({"query_dim": E, "score": "concat"} | {name: value}))


class Model(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.project = nn.Linear(E, E)
        self.attention = layer_of(name).eval()

    def forward(self, query: Tensor, memory: Tensor, lengths: Tensor) -> Tensor:
        context, weights = self.attention(self.project(query), memory, lengths)
        return torch.cat((context, weights), -1)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "history"])
def test_fx_makes_one_node_of_a_layer(name: str) -> None:
    model = Model(name)
    graph = torch.fx.symbolic_trace(model)
    targets = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert targets == ["project", "attention"]
    inputs = (QUERY, MEMORY, torch.tensor([S, 2]))
    torch.testing.assert_close(graph(*inputs), model(*inputs))
    graph(*inputs).sum().backward()
    assert model.project.weight.grad is not None
    with pytest.raises(TypeError, match=r"cannot trace into LuongAttention.*torch\.export\.export"):
        torch.fx.symbolic_trace(model.attention)


def test_fx_does_not_see_through_functions() -> None:
    functions: list[Any] = [
        lambda q, m: fused_attn.dot_attention(q, m),
        lambda q, m: fused_attn.dot_scores(q, m),
        lambda q, m: LuongAttention(E).prepare_memory(m),
    ]
    for function in functions:
        with pytest.raises(TypeError, match=r"got Proxy: use torch\.export, torch\.fx"):
            torch.fx.symbolic_trace(function)


def test_weights_of_scores_with_empty_rows() -> None:
    """The statements in the docstring of dot_scores."""
    masks = {"memory_lengths": torch.tensor([0, 3])}
    scores, log = fused_attn.dot_scores(QUERY, MEMORY, **masks)
    _, weights = fused_attn.dot_attention(QUERY, MEMORY, return_weights=True, **masks)
    found = (scores - log[..., None]).exp()
    assert found[0].isnan().all()
    torch.testing.assert_close(found.masked_fill(log[..., None].isneginf(), 0), weights)
