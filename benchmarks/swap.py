"""A model with another toolkit's attention, before and after `fused_attn.interop.swap(model)`.

The model is a typical one: embedding, bidirectional LSTM, decoder LSTM, vocabulary, and between
them a `GlobalAttention` with OpenNMT-py's constructor, parameters and forward, in plain tensor
operations. Outputs and gradients are compared first. A time is printed only if they agree.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.common.measure import Call, medians
from benchmarks.common.table import WITHHELD, duration, render
from fused_attn import interop

KINDS = ("dot", "general", "mlp")
SIZES = {"vocab": 2000, "dim": 512, "batch": 32, "source": 60, "target": 40}


class GlobalAttention(nn.Module):
    """The eager layer, from the formulas in the documentation of OpenNMT-py 3."""

    def __init__(self, dim: int, attn_type: str) -> None:
        super().__init__()
        self.dim, self.attn_type, self.attn_func = dim, attn_type, "softmax"
        if attn_type == "general":
            self.linear_in = nn.Linear(dim, dim, bias=False)
        elif attn_type == "mlp":
            self.linear_context = nn.Linear(dim, dim, bias=False)
            self.linear_query = nn.Linear(dim, dim)
            self.v = nn.Linear(dim, 1, bias=False)
        self.linear_out = nn.Linear(2 * dim, dim, bias=attn_type == "mlp")

    def forward(
        self,
        src: Tensor,
        enc_out: Tensor,
        src_len: Tensor | None = None,
        coverage: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert coverage is None
        if self.attn_type == "mlp":
            keys = self.linear_context(enc_out)
            hidden = torch.tanh(self.linear_query(src)[:, :, None] + keys[:, None])
            scores = self.v(hidden).squeeze(-1)
        else:
            query = self.linear_in(src) if self.attn_type == "general" else src
            scores = torch.bmm(query, enc_out.mT)
        if src_len is not None:
            padding = torch.arange(enc_out.shape[1], device=src.device) >= src_len[:, None]
            scores = scores.masked_fill(padding[:, None], -torch.inf)
        weights = torch.softmax(scores, dim=-1)
        context = torch.bmm(weights, enc_out)
        state = self.linear_out(torch.cat((context, src), dim=-1))
        return state if self.attn_type == "mlp" else torch.tanh(state), weights


class Translator(nn.Module):
    """A recurrent encoder and decoder without input feeding."""

    def __init__(self, vocab: int, dim: int, attn_type: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim)
        self.encoder = nn.LSTM(dim, dim // 2, batch_first=True, bidirectional=True)
        self.decoder = nn.LSTM(dim, dim, batch_first=True)
        self.attn = GlobalAttention(dim, attn_type)
        self.generator = nn.Linear(dim, vocab)

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        memory, _ = self.encoder(self.embedding(source))
        states, _ = self.decoder(self.embedding(target))
        attentional, _ = self.attn(states, memory, lengths)
        return self.generator(attentional)


def draw(sizes: dict[str, int]) -> tuple[Tensor, Tensor, Tensor]:
    batch, source, target = sizes["batch"], sizes["source"], sizes["target"]
    words = partial(torch.randint, sizes["vocab"])
    lengths = torch.randint(source // 2, source + 1, (batch,))
    return words((batch, source)), lengths, words((batch, target))


def training_step(model: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    model.zero_grad(set_to_none=True)
    logits = model(*inputs)
    nn.functional.cross_entropy(logits.flatten(0, 1), inputs[2].flatten()).backward()
    return logits.detach()


def differences(one: nn.Module, other: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[float, ...]:
    """The largest difference of the logits and of any gradient, relative to the largest value."""
    logits = [training_step(model, inputs) for model in (one, other)]
    pairs = [logits, *zip(*([p.grad for p in m.parameters()] for m in (one, other)), strict=True)]
    parts = [float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in pairs]
    return parts[0], max(parts[1:])


def attention_step(
    model: Translator, operands: tuple[Tensor, Tensor], lengths: Tensor, seed: Tensor
) -> None:
    leaves = [*operands, *model.attn.parameters()]
    torch.autograd.grad(model.attn(*operands, lengths)[0], leaves, seed)


def measure(kind: str, sizes: dict[str, int], seconds: float) -> tuple[list[str], bool]:
    """A row of the table, and whether the two models agree."""
    torch.manual_seed(0)
    eager = Translator(sizes["vocab"], sizes["dim"], kind)
    fused = copy.deepcopy(eager)
    interop.swap(fused)
    inputs = draw(sizes)
    found = differences(eager, fused, inputs)
    cells = [kind, *(f"{part:.0e}" for part in found)]
    if max(found) > 1e-4:
        return [*cells, *[WITHHELD] * 4], False
    shape = (sizes["batch"], sizes["target"], sizes["dim"])
    query, seed = torch.randn(shape).requires_grad_(), torch.randn(shape)
    memory = torch.randn(sizes["batch"], sizes["source"], sizes["dim"]).requires_grad_()
    calls: dict[str, Call] = {}
    for name, model in (("eager", eager), ("fused", fused)):
        calls[f"{name} layer"] = partial(attention_step, model, (query, memory), inputs[1], seed)
        calls[f"{name} model"] = partial(training_step, model, inputs)
    times = medians(calls, seconds)
    for what in ("layer", "model"):
        before, after = times[f"eager {what}"], times[f"fused {what}"]
        cells += [f"{duration(before)} -> {duration(after)}", f"{before / after:.2f}x"]
    return cells, True


def main(arguments: Sequence[str] = (), sizes: dict[str, int] = SIZES) -> int:
    """Print the table. Returns 1 if a swapped model computes something else."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks swap", description=summary)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each row (default: 5)")
    options = parser.parse_args(arguments)
    header = ["attn_type", "logits differ by", "gradients by", "attention layer", "", "model", ""]
    results = [measure(kind, sizes, options.seconds) for kind in KINDS]
    print(
        f"A step of training before -> after swap, float32, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}\n"
        + ", ".join(f"{name} {size}" for name, size in sizes.items())
        + "\n\n"
        + render(header, [row for row, _ in results])
    )
    return 0 if all(agrees for _, agrees in results) else 1
