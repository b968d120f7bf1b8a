"""Other toolkits' decoders (tests/peers_decoders.py) and the `LuongDecoder`s made from them."""

from __future__ import annotations

from typing import Any

import peers_decoders as theirs
import pytest
import torch
from torch import Tensor, nn

from fused_attn import DecoderState, LuongDecoder, interop

N, T, S, V, H, E = 3, 5, 7, 9, 6, 4
LENGTHS = torch.tensor([S, 1, 4])
KEEP = torch.arange(S) < LENGTHS[:, None]


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


TOKENS = torch.randint(0, V, (N, T), generator=torch.Generator().manual_seed(5))


def same(*pairs: tuple[Any, Any]) -> None:
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


def converted(decoder: Any, **parts: Any) -> LuongDecoder:
    """The conversion, with weights of its own."""
    luong = interop.to_luong_decoder(decoder, **parts)
    ours = {parameter.data_ptr() for parameter in luong.parameters()}
    assert not ours & {parameter.data_ptr() for parameter in decoder.parameters()}
    assert luong.training == decoder.training
    return luong


# --- OpenNMT-py


def opennmt(
    rnn_type: str = "LSTM", layers: int = 2, attn_type: str | None = "general", **options: Any
) -> Any:
    torch.manual_seed(0)
    extra, embedded = options.pop("extra", ()), options.pop("embedded", 0.0)
    feeds = options.pop("feeds", True)
    embeddings = theirs.OpenNMTEmbeddings(V, H, embedded, extra)
    decoder = theirs.OpenNMTDecoder(
        rnn_type, layers, H, attn_type, embeddings, feeds=feeds, **options
    )
    name = "InputFeedRNNDecoder" if feeds else "StdRNNDecoder"
    return theirs.rename(decoder, name).double().eval()


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("attn_type", [None, "dot", "general"])
@pytest.mark.parametrize(
    ("feeds", "rnn_type", "layers"),
    [(True, "LSTM", 2), (True, "GRU", 1), (False, "LSTM", 1), (False, "GRU", 2)],
)
def test_opennmt(
    feeds: bool, rnn_type: str, layers: int, attn_type: str | None, bidirectional: bool
) -> None:
    decoder = opennmt(rnn_type, layers, attn_type, feeds=feeds, bidirectional=bidirectional)
    generator, memory = nn.Linear(H, V).double(), draw(N, S, H, seed=1)
    luong = converted(decoder, generator=generator)
    sizes = (2 * layers, N, H // 2) if bidirectional else (layers, N, H)
    final: Any = tuple(draw(*sizes, seed=2 + i) for i in range(2 if rnn_type == "LSTM" else 1))
    final = final if rnn_type == "LSTM" else final[0]
    decoder.init_state(final)
    outputs, weights = decoder(TOKENS[:, :, None], memory, LENGTHS)
    given = (None, None) if attn_type is None else (memory, LENGTHS)
    state = interop.initial_state(decoder, final)
    output, state = luong(TOKENS, *given, state, return_weights=True)
    same((output.attentional, outputs), (output.logits, generator(outputs)))
    same((state.hidden, decoder.state["hidden"]))
    if attn_type is not None:
        same((output.weights, weights))
    again, _ = decoder(TOKENS[:, :2, None], memory, LENGTHS)  # the state of both goes on
    same((luong(TOKENS[:, :2], *given, state)[0].attentional, again))


@pytest.mark.parametrize("swapped", [False, True])
def test_opennmt_sparsemax_tied_weights_and_swapped_attention(swapped: bool) -> None:
    decoder = opennmt(attn_func="sparsemax")
    linear = nn.Linear(H, V).double()
    linear.weight = decoder.embeddings.make_embedding[0][0].weight
    decoder.init_state((draw(2, N, H), draw(2, N, H)))
    outputs, weights = decoder(TOKENS[:, :, None], draw(N, S, H, seed=1), LENGTHS)
    if swapped:
        interop.swap(decoder)
    cast = theirs.rename(nn.Identity(), "Cast")
    generator = nn.Sequential(linear, cast, nn.LogSoftmax(dim=-1))
    luong = converted(decoder, generator=generator)
    assert luong.output_layer.weight is luong.embedding.weight
    assert luong.embedding.padding_idx == 1
    state = interop.initial_state(decoder, (draw(2, N, H), draw(2, N, H)))
    output, _ = luong(TOKENS, draw(N, S, H, seed=1), LENGTHS, state, return_weights=True)
    same((output.weights, weights), (output.logits.log_softmax(-1), generator(outputs)))
    assert converted(decoder).output_layer is None


@pytest.mark.parametrize("feeds", [False, True])
def test_opennmt_dropout(feeds: bool) -> None:
    luong = converted(opennmt(dropout=0.25, embedded=0.5, feeds=feeds).train())
    assert (luong.dropout, luong.input_dropout) == (0.25, 0.5)
    assert luong.recurrent.dropout == 0.25 and luong.training
    decoder = opennmt(dropout=0.25, feeds=feeds)
    decoder.dropout.p = 0.5
    luong = converted(decoder)
    assert (luong.dropout, luong.input_dropout) == (0.0, 0.0)
    with pytest.raises(ValueError, match=r"dropout is 0\.5 after and 0\.25 between the layers: c"):
        interop.to_luong_decoder(decoder.train())


def sparse(decoder: Any) -> dict[str, Any]:
    return {"generator": nn.Sequential(nn.Linear(H, V), nn.ReLU())}


OPENNMT: dict[str, tuple[dict[str, Any], Any, str]] = {
    "gate": ({"gated": True}, None, "it has context_gate"),
    "coverage": ({"coverage": True}, None, "it has coverage_attn"),
    "copy": ({"copies": True}, None, "it has copy_attn"),
    "mlp": ({"attn_type": "mlp"}, None, "it has attn_type='mlp', whose output layer has no tanh"),
    "features": ({"extra": ["feature"]}, None, r"its embeddings have features \(1\)"),
    "positions": ({"extra": ["position"]}, None, "its embeddings have position_encoding"),
    "generator": ({}, sparse, "generator must be a linear layer and a log-softmax, got Linear, R"),
    "embedding": ({}, lambda _: {"embedding": nn.Embedding(V, H)}, "embedding must be None"),
    "attention": (
        *({}, lambda decoder: setattr(decoder, "attn", odd())),
        r"its attention is not known \(Odd\)",
    ),
}


def odd() -> nn.Module:
    layer = theirs.rename(nn.Identity(), "Odd")
    layer.attn_type = "general"
    return layer


def test_opennmt_refuses_other_cells() -> None:
    with pytest.raises(
        ValueError, match="the StdRNNDecoder cannot be converted: it has rnn_type RNN"
    ):
        interop.to_luong_decoder(opennmt("RNN", feeds=False))


@pytest.mark.parametrize("name", OPENNMT)
def test_opennmt_refused(name: str) -> None:
    options, change, reason = OPENNMT[name]
    decoder = opennmt(**options)
    parts = (change and change(decoder)) or {}
    with pytest.raises(ValueError, match=f"the InputFeedRNNDecoder cannot be converted: {reason}"):
        interop.to_luong_decoder(decoder, **parts)


# --- JoeyNMT


def joeynmt(rnn_type: str = "gru", layers: int = 2, **options: Any) -> Any:
    torch.manual_seed(0)
    attention, memory = options.pop("attention", "bahdanau"), options.pop("memory", 8)
    decoder = theirs.JoeyDecoder(rnn_type, E, H, memory, attention, layers, V, **options)
    return theirs.rename(decoder, "RecurrentDecoder").double().eval()


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("feeds", [False, True])
@pytest.mark.parametrize("attention", ["bahdanau", "luong"])
@pytest.mark.parametrize(("rnn_type", "layers"), [("gru", 1), ("gru", 2), ("lstm", 2)])
def test_joeynmt(rnn_type: str, layers: int, attention: str, feeds: bool, old: bool) -> None:
    decoder = joeynmt(rnn_type, layers, attention=attention, feeds=feeds, old=old)
    embedding = theirs.JoeyEmbeddings(E, V, scale=feeds).double()
    luong = converted(decoder, embedding=embedding)
    memory, final = draw(N, S, 8, seed=1), draw(N, 8, seed=2)
    hidden = decoder.init_hidden(final, "bridge")
    logits, after, weights, states = decoder(embedding(TOKENS), memory, KEEP[:, None], hidden)
    state = interop.initial_state(decoder, final)
    output, state = luong(TOKENS, memory, LENGTHS, state, return_weights=True)
    same((output.logits, logits), (output.attentional, states), (output.weights, weights))
    same((state.hidden, after if isinstance(after, tuple) else (after,)))
    without = converted(decoder)
    start = interop.initial_state(decoder, final)
    same((without(embedding(TOKENS), memory, LENGTHS, start)[0].logits, logits))


@pytest.mark.parametrize(("option", "memory"), [("zero", 8), ("last", H), ("last", 2 * H)])
def test_joeynmt_starts(option: str, memory: int) -> None:
    for rnn_type in ("gru", "lstm"):
        decoder = joeynmt(rnn_type, init_hidden=option, memory=memory)
        final = draw(N, memory)
        hidden = decoder.init_hidden(final, option)
        expected = hidden if rnn_type == "lstm" else (hidden,)
        same((interop.initial_state(decoder, final).hidden, expected))


def test_joeynmt_tied_weights() -> None:
    torch.manual_seed(0)
    decoder = theirs.JoeyDecoder("gru", H, H, 8, "luong", 1, V)
    decoder = theirs.rename(decoder, "RecurrentDecoder").double()
    embedding = theirs.JoeyEmbeddings(H, V, scale=False).double()
    decoder.output_layer.weight = embedding.lut.weight
    luong = converted(decoder, embedding=embedding)
    assert luong.output_layer.weight is luong.embedding.weight
    embedding.scale = True
    luong = converted(decoder, embedding=embedding)
    same((luong.embedding.weight, luong.output_layer.weight * H**0.5))


def test_joeynmt_dropout() -> None:
    rates = {"dropout": 0.1, "emb_dropout": 0.2, "hidden_dropout": 0.3}
    luong = converted(joeynmt(**rates))
    assert (luong.dropout, luong.input_dropout) == (0.0, 0.0)
    reason = (
        r"it has hidden_dropout \(0\.3\), dropout between the recurrent layers only \(0\.1\), "
        r"emb_dropout of the fed states \(0\.2\): call decoder\.eval\(\) to convert it"
    )
    with pytest.raises(ValueError, match=reason):
        interop.to_luong_decoder(joeynmt(**rates).train())
    luong = converted(joeynmt(emb_dropout=0.2, feeds=False).train())
    assert (luong.dropout, luong.input_dropout) == (0.0, 0.2)


def test_joeynmt_refused() -> None:
    with pytest.raises(ValueError, match="cannot be converted: its activation is not tanh"):
        interop.to_luong_decoder(joeynmt(activation=nn.ReLU))
    with pytest.raises(ValueError, match="generator must be None, because the decoder has its own"):
        interop.to_luong_decoder(joeynmt(), generator=nn.Linear(H, V))


# --- fairseq


def fairseq(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"symbols": V, "width": E, "hidden": H, "out": H, "layers": 2, "units": H}
    decoder = theirs.FairseqDecoder(**sizes | options)
    return theirs.rename(decoder, "LSTMDecoder").double().eval()


FAIRSEQ: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_layer": {"layers": 1},
    "bridged": {"units": 8},
    "narrow": {"out": 3},
    "tied": {"tied": True, "out": E},
    "tied_without_projection": {"tied": True, "width": H},
    "without_attention": {"attention": False},
    "language_model": {"attention": False, "units": 0},
}


@pytest.mark.parametrize("name", FAIRSEQ)
def test_fairseq(name: str) -> None:
    decoder = fairseq(**FAIRSEQ[name])
    luong, units = converted(decoder), decoder.encoder_output_units
    layers = len(decoder.layers)
    final = (draw(layers, N, units or H, seed=2), draw(layers, N, units or H, seed=3))
    memory = draw(N, S, units, seed=1)
    found = decoder(TOKENS, memory.transpose(0, 1), ~KEEP.T, decoder.start(final))
    given = (None, None) if decoder.attention is None else (memory, LENGTHS)
    state = interop.initial_state(decoder, final)
    output, state = luong(TOKENS, *given, state, return_weights=True)
    same((output.logits, found.logits), (output.attentional, found.states))
    same((state.hidden, found.hidden))
    if decoder.attention is not None:
        same((output.weights, found.weights))
    tied = luong.output_layer.weight is luong.embedding.weight
    assert tied == decoder.share_input_output_embed
    assert luong.input_feeding == (units != 0)


def test_fairseq_dropout() -> None:
    luong = converted(fairseq(dropout_in=0.1, dropout_out=0.2).train())
    assert (luong.input_dropout, luong.dropout) == (0.1, 0.2)
    narrow = fairseq(dropout_out=0.2, out=3)
    assert converted(narrow).dropout == 0.0
    with pytest.raises(ValueError, match=r"it has dropout_out \(0\.2\) after additional_fc: call"):
        interop.to_luong_decoder(narrow.train())
    kept = fairseq()
    kept.dropout_in_module.apply_during_inference = True
    with pytest.raises(ValueError, match="it has retain_dropout"):
        interop.to_luong_decoder(kept)


def test_fairseq_refused() -> None:
    decoder = fairseq(residuals=True, adaptive=True)
    reasons = "it has residuals, which .*; it has adaptive_softmax_cutoff, an output layer in parts"
    with pytest.raises(ValueError, match=f"the LSTMDecoder cannot be converted: {reasons}"):
        interop.to_luong_decoder(decoder)
    with pytest.raises(ValueError, match=r"embedding must be None.*; generator must be None"):
        interop.to_luong_decoder(fairseq(), embedding=nn.Embedding(2, 2), generator=nn.Linear(2, 2))


# --- all of them


def test_what_is_no_known_decoder() -> None:
    names = "InputFeedRNNDecoder, StdRNNDecoder, RecurrentDecoder, LSTMDecoder"
    with pytest.raises(TypeError, match=f"decoder must be one of {names}, got Linear"):
        interop.to_luong_decoder(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=f"decoder must be one of {names}, got Linear"):
        interop.initial_state(nn.Linear(2, 2), draw(N, H))
    with pytest.raises(TypeError, match=r"encoder_final must be a Tensor .*, got NoneType"):
        interop.initial_state(joeynmt("gru", 1), None)
    other = theirs.rename(nn.Linear(2, 2), "LSTMDecoder")
    with pytest.raises(
        TypeError, match=r"is not the LSTMDecoder of a known toolkit: .*embed_tokens"
    ):
        interop.to_luong_decoder(other)


@pytest.mark.parametrize("make", [opennmt, joeynmt, fairseq])
def test_hooks_are_refused(make: Any) -> None:
    decoder = make()
    part = next(iter(decoder.children()))
    part.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"decoder must have plain parameters, but .* has hooks"):
        interop.to_luong_decoder(decoder)


@pytest.mark.parametrize("make", [opennmt, joeynmt, fairseq])
def test_greedy_search_and_gradients(make: Any) -> None:
    decoder = make()
    parts: dict[str, Any] = {"generator": nn.Linear(H, V).double()} if make is opennmt else {}
    if make is joeynmt:
        parts["embedding"] = theirs.JoeyEmbeddings(E, V, True).double()
    luong = converted(decoder, **parts)
    memory = draw(N, S, luong.attention.memory_dim, seed=1)
    found = luong.greedy(memory, LENGTHS, bos=2, eos=3, max_length=6)
    fed = torch.cat([torch.full((N, 1), 2), found.symbols[:, :-1]], dim=1)
    output, _ = luong.train()(fed, memory, LENGTHS)
    for row, length in enumerate(found.lengths.tolist()):
        best = output.logits[row, :length].argmax(-1)
        assert torch.equal(best, found.symbols[row, :length])
    output.logits.sum().backward()
    assert all(p.grad is not None for p in luong.parameters())


@pytest.mark.parametrize("make", [opennmt, joeynmt, fairseq])
def test_the_first_state_has_gradients(make: Any) -> None:
    decoder = make(**({"units": 8} if make is fairseq else {}))
    width = H if make is opennmt else 8
    final: Any = draw(N, 8) if make is joeynmt else (draw(2, N, width), draw(2, N, width))
    leaves = [part.requires_grad_() for part in (final if isinstance(final, tuple) else (final,))]
    state = interop.initial_state(decoder, final)
    assert type(state) is DecoderState
    sum(part.sum() for part in state.hidden).backward()
    assert all(leaf.grad is not None and leaf.grad.any() for leaf in leaves)
