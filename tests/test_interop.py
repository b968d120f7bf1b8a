"""Every adapter against the original's documented formula: results, gradients, masks, padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peers
import pytest
import torch
from torch import Tensor, nn

from fused_attn import interop

B, T, S = 3, 5, 7
LENGTHS = torch.tensor([S, 1, 4])
EMPTY = torch.tensor([S, 0, 4])


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def run(layer: nn.Module, call: Callable[[Any], Any], inputs: list[Tensor]) -> list[Tensor]:
    """Results, and gradients of inputs and parameters for a loss on all results."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    results = call(layer)(*leaves)
    results = list(results) if isinstance(results, tuple) else [results]
    loss = sum((r * draw(*r.shape, seed=9 + i)).sum() for i, r in enumerate(results))
    wanted = [*leaves, *layer.parameters()]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return [*results, *grads]


def assert_same(
    adapter: Any, peer: nn.Module, call: Callable[[Any], Any], inputs: list[Tensor]
) -> None:
    """Check that the adapter, with the original's state_dict, gives the same in a public call."""
    adapter = adapter.to(torch.float64)
    adapter.load_state_dict(peer.state_dict(), strict=True)
    names = [name for name, _ in peer.named_parameters()]
    assert [name for name, _ in adapter.named_parameters()] == names
    for got, expected in zip(run(adapter, call, inputs), run(peer, call, inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def spoil(memory: Tensor, lengths: Tensor, value: float = torch.nan) -> Tensor:
    """Set the padding of a batch-first memory to NaN."""
    outside = torch.arange(memory.shape[1]) >= lengths[:, None]
    return memory.masked_fill(outside[..., None], value)


@pytest.mark.parametrize("steps", [None, 1, T])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("coverage", [False, True])
@pytest.mark.parametrize("kind", ["dot", "general", "mlp"])
@pytest.mark.parametrize("toolkit", ["onmt", "onmt2", "eole"])
def test_opennmt(toolkit: str, kind: str, coverage: bool, masked: bool, steps: int | None) -> None:
    base, adapter = {
        "onmt": (peers.OpenNMT, interop.OpenNMTGlobalAttention),
        "onmt2": (peers.OpenNMT2, interop.OpenNMT2GlobalAttention),
        "eole": (peers.Eole, interop.EoleGlobalAttention),
    }[toolkit]
    peer = peers.named("GlobalAttention", base, 6, coverage, kind, "softmax")
    query = draw(B, 6) if steps is None else draw(B, steps, 6)
    masks = (torch.arange(S) >= LENGTHS[:, None])[:, None] if toolkit == "eole" else LENGTHS
    rest = (masks if masked else None, draw(B, S, seed=3).abs() if coverage else None)
    inputs = [query, draw(B, S, 6, seed=1)]

    def call(layer: Any) -> Any:
        return lambda q, m: layer(q, m, *rest)

    assert_same(adapter(6, coverage, kind), peer, call, inputs)


@pytest.mark.parametrize("kind", ["dot", "general", "mlp"])
def test_opennmt_sparsemax_and_empty_rows(kind: str) -> None:
    layer = interop.OpenNMTGlobalAttention(6, attn_type=kind, attn_func="sparsemax").double()
    memory = spoil(3 * draw(B, S, 6), EMPTY)
    state, weights = layer(3 * draw(B, T, 6, seed=1), memory, EMPTY)
    assert state.isfinite().all() and not weights[1].any()
    torch.testing.assert_close(weights[[0, 2]].sum(-1), torch.ones(2, T).double())
    assert (weights[0] == 0).any()
    step, alone = layer(3 * draw(B, T, 6, seed=1)[:, 2], memory, EMPTY)
    torch.testing.assert_close((step, alone), (state[:, 2], weights[:, 2]))


def test_opennmt_leaves_the_callers_memory_alone() -> None:
    layer = interop.OpenNMTGlobalAttention(6, coverage=True).double()
    memory = draw(B, S, 6)
    before = memory.clone()
    layer(draw(B, 6), memory, LENGTHS, draw(B, S).abs())
    assert torch.equal(memory, before)
    with pytest.raises(
        ValueError, match="coverage must be None unless the layer has coverage=True"
    ):
        interop.OpenNMTGlobalAttention(6)(torch.ones(B, 6), torch.ones(B, S, 6), None, memory)


@pytest.mark.parametrize("kind", ["bahdanau", "luong"])
def test_joeynmt(kind: str) -> None:
    if kind == "bahdanau":
        peer = peers.named("BahdanauAttention", peers.JoeyBahdanau, 5, 8, 6)
        adapter: Any = interop.JoeyBahdanauAttention(5, 8, 6)
    else:
        peer = peers.named("LuongAttention", peers.JoeyLuong, 6, 8)
        adapter = interop.JoeyLuongAttention(6, 8)
    keep = (torch.arange(S) < LENGTHS[:, None])[:, None]

    def call(layer: Any) -> Any:
        def forward(query: Tensor, values: Tensor) -> Any:
            layer.compute_proj_keys(values)
            return layer(query, keep, values)

        return forward

    assert_same(adapter, peer, call, [draw(B, 1, 6), draw(B, S, 8, seed=1)])
    none = torch.zeros(B, 1, S, dtype=torch.bool)
    context, weights = adapter(draw(B, 1, 6), none, draw(B, S, 8, seed=1))
    assert not context.any() and not weights.any()
    with pytest.raises(ValueError, match=r"query must have shape \(3, 1, 6\), got \(3, 2, 6\)"):
        adapter(draw(B, 2, 6), keep, draw(B, S, 8))
    with pytest.raises(ValueError, match="compute_proj_keys must be called before forward"):
        type(adapter)(6, 8, *(() if kind == "luong" else (6,))).double()(
            draw(B, 1, 6), keep, draw(B, S, 8)
        )


def test_joeynmt_luong_with_keys_of_their_own() -> None:
    peer, adapter = peers.named("LuongAttention", peers.JoeyLuong, 6, 8), interop.JoeyLuongAttention
    layer = adapter(6, 8).double()
    layer.load_state_dict(peer.state_dict())
    keys, keep = draw(B, S, 8, seed=4), (torch.arange(S) < LENGTHS[:, None])[:, None]
    for each in (peer, layer):
        each.compute_proj_keys(keys)
    operands = (draw(B, 1, 6), keep, draw(B, S, 8, seed=1))
    torch.testing.assert_close(layer(*operands), peer(*operands))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_fairseq(masked: bool, bias: bool) -> None:
    peer = peers.named("AttentionLayer", peers.Fairseq, 6, 8, 5, bias)
    padding = (torch.arange(S)[:, None] >= LENGTHS) if masked else None

    def call(layer: Any) -> Any:
        return lambda query, memory: layer(query, memory, padding)

    inputs = [draw(B, 6), draw(S, B, 8, seed=1)]
    assert_same(interop.FairseqAttentionLayer(6, 8, 5, bias), peer, call, inputs)


def test_fairseq_never_reads_padding() -> None:
    layer = interop.FairseqAttentionLayer(6, 8, 5).double()
    memory = spoil(draw(B, S, 8), EMPTY).transpose(0, 1)
    state, weights = layer(draw(B, 6), memory, torch.arange(S)[:, None] >= EMPTY)
    assert state.isfinite().all() and not weights[:, 1].any()


@pytest.mark.parametrize("steps", [None, T])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_gnmt(normalize: bool, batch_first: bool, masked: bool, steps: int | None) -> None:
    options = (6, 8, 5, normalize, batch_first)
    peer = peers.named("BahdanauAttention", peers.GNMT, *options)
    query = draw(B, 6) if steps is None else draw(B, steps, 6)
    memory = draw(B, S, 8, seed=1)
    if not batch_first:
        memory = memory.transpose(0, 1).contiguous()
        query = query if steps is None else query.transpose(0, 1).contiguous()

    def call(layer: Any) -> Any:
        if masked:
            layer.set_mask(LENGTHS, memory)
        return layer

    assert_same(interop.GNMTBahdanauAttention(*options), peer, call, [query, memory])


def test_gnmt_padding_and_empty_rows() -> None:
    layer = interop.GNMTBahdanauAttention(6, 8, 5, normalize=True, batch_first=True).double()
    memory = spoil(draw(B, S, 8), EMPTY)
    layer.set_mask(EMPTY, memory)
    assert layer.mask[1].all() and not layer.mask[0].any()
    context, weights = layer(draw(B, T, 6), memory)
    assert context.isfinite().all() and not context[1].any() and not weights[1].any()


@pytest.mark.parametrize("method", ["dot", "general", "concat"])
def test_the_tutorial(method: str) -> None:
    peer = peers.named("Attn", peers.Tutorial, method, 6)
    inputs = [draw(1, B, 6), draw(S, B, 6, seed=1)]
    adapter = interop.TutorialAttn(method, 6)
    assert_same(adapter, peer, lambda layer: layer, inputs)
    memory = spoil(inputs[1].transpose(0, 1), LENGTHS).transpose(0, 1)
    context, weights = adapter.attend(inputs[0], memory, LENGTHS)
    assert weights.shape == (B, 1, S) and context.shape == (B, 1, 6)
    clean = spoil(inputs[1].transpose(0, 1), LENGTHS, 0.0)
    torch.testing.assert_close(context, weights @ clean)
    with pytest.raises(ValueError, match="method must be 'dot', 'general' or 'concat', got 'cos'"):
        interop.TutorialAttn("cos", 6)


@pytest.mark.parametrize("conv", [None, (3, 2)])
def test_speechbrain(conv: tuple[int, int] | None) -> None:
    """Three decoder steps: the state that a step stores is used by the next."""
    name = "LocationAwareAttention" if conv else "ContentBasedAttention"
    peer = peers.named(name, peers.SpeechBrain, 8, 6, 5, 4, 0.7, conv)
    extra = conv or ()
    adapter = getattr(interop, name)(8, 6, 5, 4, *extra, scaling=0.7)

    def call(layer: Any) -> Any:
        def forward(memory: Tensor, queries: Tensor) -> tuple[Tensor, ...]:
            layer.reset()
            steps = [layer(memory, LENGTHS, query) for query in queries]
            return tuple(torch.stack(parts) for parts in zip(*steps, strict=True))

        return forward

    assert_same(adapter, peer, call, [draw(B, S, 8), draw(3, B, 6, seed=1)])
    adapter.reset()
    output, weights = adapter(spoil(draw(B, S, 8), EMPTY), EMPTY.double(), draw(B, 6))
    assert output.isfinite().all() and not weights[1].any()


@pytest.mark.parametrize("kind", ["lengths", "mask", "none"])
@pytest.mark.parametrize("scale", [False, True])
def test_tfa_luong(scale: bool, kind: str) -> None:
    """score = g q . (memory K), where K is the kernel (E, units) of a Dense layer."""
    kernel, g = draw(8, 6, seed=2), torch.tensor(1.7).double()
    keep = torch.arange(S) < LENGTHS[:, None]
    layer = interop.TFALuongAttention(6, scale=scale).double()
    layer.load_kernels([kernel, g] if scale else [kernel])
    memory, query = draw(B, S, 8), draw(B, 6, seed=1)
    masks = {"lengths": (LENGTHS, None), "mask": (None, keep), "none": (None, None)}[kind]
    layer.setup_memory(memory if kind == "none" else spoil(memory, LENGTHS), *masks)
    scores = torch.einsum("bu,bsu->bs", query, memory @ kernel) * (g if scale else 1.0)
    weights = peers.softmax(scores, None if kind == "none" else keep)
    got, state = layer([query, None])
    assert got is state
    torch.testing.assert_close(got, weights)
    context, _ = layer.attend(query)
    torch.testing.assert_close(context, torch.einsum("bs,bse->be", weights, memory))


@pytest.mark.parametrize("normalize", [False, True])
def test_tfa_bahdanau(normalize: bool) -> None:
    units = 5
    v, g, b = draw(units), torch.tensor(0.8).double(), draw(units, seed=2)
    queries, keys = draw(6, units, seed=3), draw(8, units, seed=4)
    layer = interop.TFABahdanauAttention(units, normalize=normalize).double()
    layer.load_kernels([v, g, b, queries, keys] if normalize else [v, queries, keys])
    memory, query = draw(B, S, 8), draw(B, 6, seed=1)
    layer.setup_memory(spoil(memory, LENGTHS), LENGTHS)
    vector = g * v / v.norm() if normalize else v
    hidden = (query @ queries + (b if normalize else 0.0))[:, None]
    scores = peers.additive(hidden, memory @ keys, vector)[:, 0]
    weights = peers.softmax(scores, torch.arange(S) < LENGTHS[:, None])
    torch.testing.assert_close(layer([query, None])[0], weights)


def test_tfa_widths_come_with_the_tensors() -> None:
    memory = torch.randn(B, S, 8)
    for kind in (interop.TFALuongAttention, interop.TFABahdanauAttention):
        layer = kind(6, memory, LENGTHS)
        alignments, _ = layer([torch.randn(B, 6), None])
        assert layer.memory_layer.weight.shape == (6, 8) and alignments.shape == (B, S)
    with pytest.raises(ValueError, match="setup_memory must be called before"):
        interop.TFALuongAttention(6)([torch.randn(B, 6), None])
    with pytest.raises(ValueError, match="must be None if memory_mask is given, got both"):
        layer.setup_memory(memory, LENGTHS, torch.ones(B, S) > 0)
    with pytest.raises(ValueError, match="got 2 arrays"):
        interop.TFALuongAttention(6).load_kernels([torch.ones(8, 6), torch.ones(())])
    with pytest.raises(ValueError, match=r"must have shape \(input width, 6\), got \(8, 5\)"):
        interop.TFALuongAttention(6).load_kernels([torch.ones(8, 5)])


@pytest.mark.parametrize("own_key", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["dot", "scaled", "concat", "scaled_concat", "additive", "plain"])
def test_keras(kind: str, causal: bool, masked: bool, own_key: bool) -> None:
    query, value = draw(B, T, 6), draw(B, S, 6, seed=1)
    key = draw(B, S, 6, seed=2) if own_key else value
    layer: Any
    if kind in ("additive", "plain"):
        layer = interop.KerasAdditiveAttention(use_scale=kind == "additive").double()
        layer.build(6)
        v = layer.scale if kind == "additive" else torch.ones(6).double()
        scores = peers.additive(query, key, v)
    else:
        mode = "concat" if "concat" in kind else "dot"
        layer = interop.KerasAttention("scaled" in kind, mode).double()
        for parameter in layer.parameters():
            nn.init.constant_(parameter, 1.3)
        scale = 1.3 if "scaled" in kind else 1.0
        if mode == "dot":
            scores = scale * query @ key.mT
        else:
            scores = 1.3 * peers.additive(scale * query, scale * key, torch.ones(6).double())
    keep = torch.ones(B, 1, S, dtype=torch.bool)
    query_mask = torch.arange(T) < torch.tensor([T, 2, 3])[:, None]
    value_mask = torch.arange(S) < LENGTHS[:, None]
    if masked:
        keep = keep & value_mask[:, None]
    if causal:
        keep = keep & (torch.arange(T)[:, None] >= torch.arange(S))
    weights = peers.softmax(scores, keep)
    context = weights @ value
    if masked:
        context = context * query_mask[..., None]
    inputs = [query, value, key] if own_key else [query, value]
    if masked:
        inputs[1:] = [spoil(x, LENGTHS) for x in inputs[1:]]
    mask = [query_mask, value_mask] if masked else None
    rest = {"use_causal_mask": causal, "return_attention_scores": True}
    torch.testing.assert_close(layer(inputs, mask, **rest), (context, weights))
    assert isinstance(layer(inputs, mask, use_causal_mask=causal), Tensor)


def test_keras_dropout_is_seeded_and_only_in_training() -> None:
    operands = [draw(B, T, 6), draw(B, S, 6, seed=1)]
    plain, weights = interop.KerasAttention()(operands, return_attention_scores=True)
    layers = [interop.KerasAttention(dropout=0.4, seed=3) for _ in range(2)]
    found = [layer(operands, training=True, return_attention_scores=True) for layer in layers]
    torch.testing.assert_close(found[0], found[1])
    context, dropped = found[0]
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], weights[kept] / 0.6)
    assert 0.4 < kept.double().mean() < 0.8
    torch.testing.assert_close(context, dropped @ operands[1])
    torch.testing.assert_close(layers[0].eval()(operands), plain)
    with pytest.raises(ValueError, match="inputs must be a list"):
        interop.KerasAttention()(operands[0])
    with pytest.raises(ValueError, match="score_mode must be 'dot' or 'concat', got 'cos'"):
        interop.KerasAttention(score_mode="cos")
