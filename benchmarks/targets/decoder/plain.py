"""The rival that people write: a loop over `nn.LSTMCell`, eager attention and an output layer."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn

from benchmarks.targets.decoder.problem import Problem
from fused_attn.seq2seq.model.seq2seq import Seq2Seq

State = tuple[Tensor, Tensor, Tensor]  # hidden, cell, h~ of the step before, each (B, width)


class PlainDecoder(nn.Module):
    """One step of an attentional decoder in plain torch, with the parameters of ``model``.

    squash: whether h~ is the tanh of the attention layer; AttnLSTM leaves it out.
    """

    def __init__(self, model: Seq2Seq, squash: bool = True) -> None:
        super().__init__()
        attention, layer = model.decoder.attention, model.decoder.stack.layers[0]
        assert attention is not None and isinstance(layer, nn.LSTM)
        self.embedding = model.target_embedding
        self.cell = nn.LSTMCell(layer.input_size, layer.hidden_size)
        for name, parameter in self.cell.named_parameters():
            parameter.data = getattr(layer, f"{name}_l0").data
        self.query_proj, self.attention_layer = attention.query_proj, attention.output_proj
        self.additive = attention.score == "concat"
        if self.additive:
            self.memory_proj, self.v = attention.memory_proj, attention.v
        self.output = model.output
        self.squash = squash

    def keys(self, memory: Tensor) -> Tensor:
        """What the scores are computed from, (B, S, width): once for all steps."""
        return self.memory_proj(memory) if self.additive else memory

    def advance(self, x: Tensor, state: State, memory: Tensor, keys: Tensor) -> State:
        """The state after an input x (B, width)."""
        hidden, cell = self.cell(x, state[:2])
        query = self.query_proj(hidden)
        if self.additive:
            scores = torch.tanh(keys + query[:, None]) @ self.v
        else:
            scores = torch.bmm(keys, query[..., None])[..., 0]
        weights = torch.softmax(scores, dim=-1)
        context = torch.bmm(weights[:, None], memory)[:, 0]
        attentional = self.attention_layer(torch.cat((context, hidden), dim=-1))
        return hidden, cell, torch.tanh(attentional) if self.squash else attentional

    def forward(
        self, symbols: Tensor, state: State, memory: Tensor, keys: Tensor
    ) -> tuple[Tensor, State]:
        """Feed symbols (B,). Returns the logits (B, V) and the next state."""
        state = self.advance(self.embedding(symbols), state, memory, keys)
        return self.output(state[2]), state

    def feed(self, x: Tensor, state: State, memory: Tensor, keys: Tensor) -> State:
        """Feed x (B, embedding) beside h~ of the step before."""
        return self.advance(torch.cat((x, state[2]), dim=-1), state, memory, keys)


def start(problem: Problem) -> State:
    return problem.hidden[0], problem.cell[0], torch.zeros_like(problem.hidden[0])


def loop(problem: Problem, compiled: bool = False) -> Callable[[], Tensor]:
    """All steps of a problem: the symbols chosen, int64 (B, T), or the last hidden state (B, H)."""
    decoder = PlainDecoder(problem.model)
    if not problem.chooses:
        return lambda: _fed(decoder, problem)
    step = torch.compile(decoder, dynamic=False) if compiled else decoder
    first, memory = problem.first(), problem.memory

    def run() -> Tensor:
        symbols, state, found = first, start(problem), []
        keys = decoder.keys(memory)
        for _ in range(problem.sizes.steps):
            logits, state = step(symbols, state, memory, keys)
            symbols = logits.argmax(dim=-1)
            found.append(symbols)
        return torch.stack(found, dim=1)

    return run


def _fed(decoder: PlainDecoder, problem: Problem) -> Tensor:
    state, keys = start(problem), decoder.keys(problem.memory)
    for t in range(problem.sizes.steps):
        state = decoder.feed(problem.embedded[:, t], state, problem.memory, keys)
    return state[0]


def _double(problem: Problem, squash: bool) -> tuple[PlainDecoder, Problem]:
    wide = Problem(
        problem.sizes,
        deepcopy(problem.model).double(),
        *(t.double() for t in (problem.memory, problem.hidden, problem.cell, problem.embedded)),
    )
    return PlainDecoder(wide.model, squash), wide


@torch.no_grad()
def oracle_logits(problem: Problem, symbols: Tensor) -> Tensor:
    """Logits in float64, (B, T, V), if the symbols (B, T) are chosen one after another."""
    decoder, wide = _double(problem, squash=True)
    state, keys, found = start(wide), decoder.keys(wide.memory), []
    for given in (problem.first(), *symbols[:, :-1].unbind(1)):
        logits, state = decoder(given, state, wide.memory, keys)
        found.append(logits)
    return torch.stack(found, dim=1)


@torch.no_grad()
def oracle_hidden(problem: Problem, squash: bool) -> Tensor:
    """The last hidden state in float64, (B, H), of a problem with given inputs."""
    return _fed(*_double(problem, squash))
