"""A plain decoder in float64, one cell and one sentence at a time, to compare `LuongDecoder` with.

It reads the parameters of a `LuongDecoder` by name and shares no code with it: cells are those of
torch (`nn.LSTMCell` and so on), and the formulas of attention are written out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_attn import LuongDecoder

CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}


class Oracle:
    """The decoder ``decoder`` with the memory of one sentence, (length, E)."""

    def __init__(self, decoder: LuongDecoder, memory: Tensor) -> None:
        self.decoder, self.memory = decoder, memory
        self.weights: dict[str, Tensor] = {
            name: tensor.detach().double() for name, tensor in decoder.state_dict().items()
        }
        self.cells: list[Any] = []
        for number, layer in enumerate(decoder.recurrent.layers):
            cell = CELLS[decoder.recurrent.cell](layer.input_size, layer.hidden_size, layer.bias)
            names = [name for name, _ in cell.named_parameters()]
            state = {n: self.weights[f"recurrent.layers.{number}.{n}"] for n in names}
            cell.double().load_state_dict(state)
            self.cells.append(cell)
        layers, hidden = len(self.cells), decoder.hidden
        self.hidden = [torch.zeros(layers, hidden).double() for _ in range(self.count)]
        self.fed = torch.zeros(decoder.output_dim).double()
        self.coverage = torch.zeros(len(memory)).double()
        self.step = 0

    @property
    def count(self) -> int:
        return 2 if self.decoder.recurrent.cell == "lstm" else 1

    def advance(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """One step from an embedded symbol (I,): h~, the weights, and the logits."""
        if self.decoder.input_feeding:
            x = torch.cat([x, self.fed])
        with torch.no_grad():
            for number, cell in enumerate(self.cells):
                before = [tensor[number][None] for tensor in self.hidden]
                after = cell(x[None], tuple(before) if self.count == 2 else before[0])
                after = after if self.count == 2 else (after,)
                for tensor, new in zip(self.hidden, after, strict=True):
                    tensor[number] = new[0]
                h = after[0][0]
                x = h + x if self.decoder.recurrent.residual and h.shape == x.shape else h
        attentional, weights = self.attend(x)
        self.fed, self.step = attentional, self.step + 1
        self.coverage = self.coverage + weights
        return attentional, weights, self.logits(attentional)

    def logits(self, attentional: Tensor) -> Tensor | None:
        named = self.weights
        if "output_layer.weight" not in named:
            return None
        if "output_proj.weight" in named:
            attentional = named["output_proj.weight"] @ attentional
        return named["output_layer.weight"] @ attentional + named.get("output_layer.bias", 0.0)

    def attend(self, h: Tensor) -> tuple[Tensor, Tensor]:
        attention, length = self.decoder.attention, len(self.memory)
        if attention is None:
            return h, torch.zeros(length).double()
        named = {
            name.removeprefix("attention."): tensor
            for name, tensor in self.weights.items()
            if name.startswith("attention.")
        }
        bias = named.get("query_proj.bias", 0.0)
        factor = named.get("scale", attention.scale)
        if attention.score == "dot":
            scores = self.memory @ h
        elif attention.score == "general":
            scores = self.memory @ (named["query_proj.weight"] @ h + bias)
        elif attention.score == "location":
            scores = (named["query_proj.weight"] @ h + bias)[:length]
        else:
            inner = self.memory @ named["memory_proj.weight"].T + named["query_proj.weight"] @ h
            inner = inner + bias
            if "history.coverage_proj.weight" in named:
                column = named["history.coverage_proj.weight"][:, 0]
                inner = inner + self.coverage[:, None] * column
            v = named["v"] * (named["g"] / named["v"].norm() if "g" in named else 1.0)
            scores = torch.tanh(inner) @ v
        weights = self.normalised(scores * factor, h, named)
        context = weights @ self.memory
        if attention.output_dim is None:
            return context, weights
        both = named["output_proj.weight"] @ torch.cat([context, h])
        return torch.tanh(both + named.get("output_proj.bias", 0.0)), weights

    def normalised(self, scores: Tensor, h: Tensor, named: dict[str, Tensor]) -> Tensor:
        """The softmax within the window; zeros if there is no position in it."""
        attention, places = self.decoder.attention, torch.arange(len(scores)).double()
        assert attention is not None
        if attention.local is None:
            return torch.softmax(scores, 0)
        if attention.local == "monotonic":
            center = torch.tensor(float(self.step)).double()
        else:
            inner = named["position.v"] @ torch.tanh(named["position.proj.weight"] @ h)
            center = len(scores) * torch.sigmoid(inner)
        inside = (places - center).abs() <= attention.window
        if not inside.any():
            return torch.zeros_like(scores)
        weights = torch.softmax(scores.masked_fill(~inside, -torch.inf), 0)
        if attention.local == "predictive":
            sigma = attention.window / 2
            weights = weights * torch.exp(-((places - center) ** 2) / (2 * sigma**2))
        return weights


def decode(
    decoder: LuongDecoder, embedded: Tensor, memory: Tensor, lengths: Tensor
) -> dict[str, Tensor]:
    """All steps of all rows: attentional, logits, weights (padded with 0), and hidden tensors."""
    rows, steps, _ = embedded.shape
    found: dict[str, list[Tensor]] = {"attentional": [], "weights": [], "logits": [], "hidden": []}
    for row in range(rows):
        oracle = Oracle(decoder, memory[row, : int(lengths[row])])
        results = [oracle.advance(embedded[row, t]) for t in range(steps)]
        found["attentional"].append(torch.stack([result[0] for result in results]))
        short = torch.stack([result[1] for result in results])
        padding = memory.shape[1] - short.shape[1]
        found["weights"].append(nn.functional.pad(short, (0, padding)))
        if decoder.output_layer is not None:
            found["logits"].append(torch.stack([result[2] for result in results]))
        found["hidden"].append(torch.stack(oracle.hidden))
    together = {name: torch.stack(rows) for name, rows in found.items() if rows}
    together["hidden"] = together["hidden"].permute(1, 2, 0, 3)  # (tensors, layers, N, hidden)
    return together
