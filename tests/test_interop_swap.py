"""`swap` on existing models; conversion of weights to `LuongAttention` and back."""

from __future__ import annotations

from typing import Any

import peers
import pytest
import torch
from torch import Tensor, nn

from fused_attn import LuongAttention, interop

B, T, S = 3, 5, 7
LENGTHS = torch.tensor([S, 1, 4])


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


KEEP = (torch.arange(S) < LENGTHS[:, None])[:, None]

# By name: the layer as in a user's model, a call of it, and the adapter that replaces it.
LAYERS: dict[str, tuple[Any, Any, str]] = {
    **{
        f"onmt_{kind}": (
            lambda kind=kind: peers.named(
                "GlobalAttention", peers.OpenNMT, 6, False, kind, "softmax"
            ),
            lambda layer: layer(draw(B, T, 6), draw(B, S, 6, seed=1), LENGTHS),
            "OpenNMTGlobalAttention",
        )
        for kind in ("dot", "general", "mlp")
    },
    "onmt_coverage": (
        lambda: peers.named("GlobalAttention", peers.OpenNMT, 6, True, "general", "softmax"),
        lambda layer: layer(draw(B, T, 6), draw(B, S, 6, seed=1), LENGTHS, draw(B, S).abs()),
        "OpenNMTGlobalAttention",
    ),
    "eole": (
        lambda: peers.named("GlobalAttention", peers.Eole, 6, False, "general", "softmax"),
        lambda layer: layer(draw(B, 6), enc_out=draw(B, S, 6, seed=1), src_pad_mask=~KEEP),
        "EoleGlobalAttention",
    ),
    "onmt2": (
        lambda: peers.named("GlobalAttention", peers.OpenNMT2, 6, False, "general", "softmax"),
        lambda layer: layer(
            draw(B, T, 6), memory_bank=draw(B, S, 6, seed=1), memory_lengths=LENGTHS
        ),
        "OpenNMT2GlobalAttention",
    ),
    "joey_bahdanau": (
        lambda: peers.named("BahdanauAttention", peers.JoeyBahdanau, 5, 8, 6),
        lambda layer: (
            layer.compute_proj_keys(draw(B, S, 8)),
            layer(draw(B, 1, 6), KEEP, draw(B, S, 8)),
        )[1],
        "JoeyBahdanauAttention",
    ),
    "joey_luong": (
        lambda: peers.named("LuongAttention", peers.JoeyLuong, 6, 8),
        lambda layer: (
            layer.compute_proj_keys(draw(B, S, 8)),
            layer(draw(B, 1, 6), KEEP, draw(B, S, 8)),
        )[1],
        "JoeyLuongAttention",
    ),
    **{
        name: (
            lambda bias=bias: peers.named("AttentionLayer", peers.Fairseq, 6, 8, 5, bias),
            lambda layer: layer(draw(B, 6), draw(S, B, 8), torch.arange(S)[:, None] >= LENGTHS),
            "FairseqAttentionLayer",
        )
        for name, bias in (("fairseq", False), ("fairseq_bias", True))
    },
    "gnmt": (
        lambda: peers.named("BahdanauAttention", peers.GNMT, 6, 8, 5, True, True),
        lambda layer: (
            layer.set_mask(LENGTHS, draw(B, S, 8)),
            layer(draw(B, T, 6), draw(B, S, 8)),
        )[1],
        "GNMTBahdanauAttention",
    ),
    **{
        f"tutorial_{method}": (
            lambda method=method: peers.named("Attn", peers.Tutorial, method, 6),
            lambda layer: layer(draw(1, B, 6), draw(S, B, 6, seed=1)),
            "TutorialAttn",
        )
        for method in ("dot", "general", "concat")
    },
    "speechbrain": (
        lambda: peers.named("ContentBasedAttention", peers.SpeechBrain, 8, 6, 5, 4, 0.5, None),
        lambda layer: (layer.reset(), layer(draw(B, S, 8), LENGTHS, draw(B, 6)))[1],
        "ContentBasedAttention",
    ),
    "speechbrain_location": (
        lambda: peers.named("LocationAwareAttention", peers.SpeechBrain, 8, 6, 5, 4, 0.5, (3, 2)),
        lambda layer: (layer.reset(), layer(draw(B, S, 8), LENGTHS, draw(B, 6)))[1],
        "LocationAwareAttention",
    ),
}


def model(layer: nn.Module) -> nn.Module:
    holder = nn.Module()
    holder.decoder = nn.Module()
    holder.decoder.attn = layer
    holder.embedding = nn.Embedding(3, 4)
    return holder


@pytest.mark.parametrize("name", LAYERS)
def test_swapped_in_place(name: str) -> None:
    """Output, parameter objects and training mode do not change, and the report is right."""
    make, call, adapter = LAYERS[name]
    held = model(make().eval())
    before, parameters = call(held.decoder.attn), list(held.parameters())
    state = {name: tensor.clone() for name, tensor in held.state_dict().items()}
    report = interop.swap(held)
    (row,) = report.swapped
    assert (row.path, row.adapter) == ("decoder.attn", adapter) and not report.refused
    assert str(report) == f"decoder.attn: {row.peer} -> {adapter}"
    assert type(held.decoder.attn) is getattr(interop, adapter)
    assert not held.decoder.attn.training
    assert {id(p) for p in held.parameters()} == {id(p) for p in parameters}
    assert held.state_dict().keys() == state.keys()
    torch.testing.assert_close(call(held.decoder.attn), before)
    assert not interop.swap(held).swapped  # a second swap finds nothing to replace


def test_an_optimizer_goes_on() -> None:
    make, call, _ = LAYERS["onmt_general"]
    held = model(make())
    optimizer = torch.optim.SGD(held.parameters(), lr=0.1)
    interop.swap(held)
    before = held.decoder.attn.linear_in.weight.detach().clone()
    call(held.decoder.attn)[0].square().sum().backward()
    optimizer.step()
    assert not torch.equal(held.decoder.attn.linear_in.weight, before)


def test_a_shared_layer_stays_shared() -> None:
    layer = LAYERS["fairseq"][0]()
    held = nn.ModuleList([model(layer), model(layer)])
    report = interop.swap(held)
    assert held[0].decoder.attn is held[1].decoder.attn
    assert [row.path for row in report.swapped] == ["0.decoder.attn", "1.decoder.attn"]


class GlobalAttention(nn.Module):
    """A class with a known name but without the original's interface."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(3, 3)

    def forward(self, src: Any, enc_out: Any, src_len: Any = None, coverage: Any = None) -> Any:
        return src


def test_what_only_has_the_name_is_left() -> None:
    held = model(GlobalAttention())
    report = interop.swap(held)
    assert not report.swapped and isinstance(held.decoder.attn, GlobalAttention)
    ((path, reason),) = report.refused
    assert path == "decoder.attn" and "its submodules differ" in reason
    assert "decoder.attn: not replaced, not the OpenNMT-py GlobalAttention" in str(report)


def test_a_layer_with_another_shape_is_left() -> None:
    layer = LAYERS["onmt_general"][0]()
    layer.extra = nn.Linear(2, 2)
    report = interop.swap(model(layer))
    assert "its parameters differ" in report.refused[0][1]


def test_a_layer_with_hooks_is_left() -> None:
    layer = LAYERS["fairseq"][0]()
    layer.register_forward_hook(lambda *_: None)
    held = model(layer)
    report = interop.swap(held)
    assert held.decoder.attn is layer and "_forward_hooks" in report.refused[0][1]


def test_nothing_to_swap() -> None:
    assert str(interop.swap(nn.Linear(2, 2))) == "no known attention layer found"


def attended(luong: LuongAttention, name: str) -> tuple[Tensor, Tensor]:
    """The comparable results (such as weights) of the call in LAYERS."""
    if name.startswith("onmt"):
        return luong(draw(B, T, 6), draw(B, S, 6, seed=1), LENGTHS)
    if name.startswith("joey"):
        return luong(draw(B, 1, 6), draw(B, S, 8), memory_mask=KEEP)
    if name.startswith("fairseq"):
        return luong(draw(B, 6), draw(S, B, 8).transpose(0, 1), LENGTHS)
    if name == "gnmt":
        return luong(draw(B, T, 6), draw(B, S, 8), LENGTHS)
    if name.startswith("tutorial"):
        return luong(draw(1, B, 6).transpose(0, 1), draw(S, B, 6, seed=1).transpose(0, 1))
    if name == "speechbrain_location":
        uniform = KEEP[:, 0] / LENGTHS[:, None].double()
        return luong(draw(B, 6), draw(B, S, 8), LENGTHS, previous_weights=uniform)
    return luong(draw(B, 6), draw(B, S, 8), LENGTHS)


CONVERTED = [name for name in LAYERS if name not in ("onmt_coverage", "onmt2", "eole")]


@pytest.mark.parametrize("name", CONVERTED)
def test_weights_to_luong_and_back(name: str) -> None:
    make, call, _ = LAYERS[name]
    held = model(make())
    before = call(held.decoder.attn)
    interop.swap(held)
    layer = held.decoder.attn
    luong = interop.to_luong(layer)
    output, weights = attended(luong, name)
    expected = before if isinstance(before, Tensor) else before[1]
    torch.testing.assert_close(weights, expected.T if name.startswith("fairseq") else expected)
    if luong.output_dim is not None or name in ("gnmt", "joey_bahdanau", "joey_luong"):
        torch.testing.assert_close(output, before[0])
    # Loading back into a layer with other weights gives the same function again.
    with torch.no_grad():
        for parameter in luong.parameters():
            parameter.mul_(1.1)
    interop.load_luong(layer, luong)
    again = interop.to_luong(layer)
    torch.testing.assert_close(attended(again, name), attended(luong, name))


def test_weights_of_tensorflow_to_luong() -> None:
    for kind in (interop.TFALuongAttention, interop.TFABahdanauAttention):
        option = "scale" if kind is interop.TFALuongAttention else "normalize"
        layer = kind(6, **{option: True}).double()
        with pytest.raises(ValueError, match="has not been given a memory yet"):
            interop.to_luong(layer)
        layer.setup_memory(draw(B, S, 8), LENGTHS)
        alignments, _ = layer([draw(B, 6), None])
        with torch.no_grad():
            layer.attention_g.mul_(1.5)
        alignments, _ = layer([draw(B, 6), None])
        luong = interop.to_luong(layer)
        torch.testing.assert_close(luong(draw(B, 6), draw(B, S, 8), LENGTHS)[1], alignments)


def test_output_orders() -> None:
    query, context, weight = draw(B, 3), draw(B, 4), draw(5, 7)
    expected = torch.cat((query, context), -1) @ weight.T
    turned = interop.swap_output_order(weight, 3)
    torch.testing.assert_close(torch.cat((context, query), -1) @ turned.T, expected)
    assert torch.equal(interop.swap_output_order(turned, 4), weight)
    with pytest.raises(ValueError, match=r"first must be between 0 and .* has shape \(5, 7\), got"):
        interop.swap_output_order(weight, 7)


def test_what_does_not_go_together() -> None:
    layer = interop.JoeyLuongAttention(6, 8)
    before = layer.key_layer.weight.clone()
    with pytest.raises(ValueError, match="luong must have memory_dim=8 to match the layer, got 9"):
        interop.load_luong(layer, LuongAttention(6, 9))
    assert torch.equal(layer.key_layer.weight, before)
    with pytest.raises(TypeError, match=r"layer must be one of OpenNMTGlobal.* got Linear"):
        interop.to_luong(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"only parameters .*, got output_proj\.weight"):
        interop.load_luong(layer, LuongAttention(6, 8, output_dim=3))
    assert torch.equal(layer.key_layer.weight, before)
