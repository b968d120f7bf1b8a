"""The model and the inputs of a step row, the work of a step, and the judgement of its results."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.targets.decoder.rows import Sizes
from fused_attn.seq2seq.config import ModelConfig
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.vocabulary import BOS, EOS

SOURCE_SYMBOLS = 100
# The largest allowed error, by type of the products. Of a chosen symbol: how far its logit lies
# below the largest one of the float64 model, in standard deviations of the logits. Of states: the
# largest difference from those of the float64 model, in their standard deviation.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1, "int8": 0.25}


@dataclass(frozen=True)
class Problem:
    """A model with random parameters, and the inputs of its decoder.

    memory: (B, S, E). hidden, cell: (1, B, H), the state before the first step. embedded:
    (B, T, embedding), the inputs of the steps where symbols are not chosen.
    """

    sizes: Sizes
    model: Seq2Seq
    memory: Tensor
    hidden: Tensor
    cell: Tensor
    embedded: Tensor

    @property
    def batch(self) -> int:
        return self.memory.shape[0]

    @property
    def chooses(self) -> bool:
        """Whether each step chooses a symbol and feeds it to the next one."""
        return not self.model.config.input_feeding

    def first(self) -> Tensor:
        """The symbols before the first step, int64 (B,)."""
        return torch.full((self.batch,), BOS)


def make_problem(sizes: Sizes, score: str, batch: int, seed: int = 0) -> Problem:
    """Draw a problem. The concat score goes with input feeding, and has no output layer to run."""
    torch.manual_seed(seed)
    config = ModelConfig(
        cell="lstm", hidden=sizes.hidden, encoder_hidden=sizes.memory // 2, score=score,
        embedding=sizes.embedding, attn_dim=sizes.hidden if score == "concat" else None,
        input_feeding=score == "concat", dropout=0.0,
    )  # fmt: skip
    model = Seq2Seq(config, SOURCE_SYMBOLS, sizes.symbols).eval().requires_grad_(False)
    model.output.bias[: EOS + 1] = -4.0  # a search never chooses them here, so no side may
    draw = torch.randn
    return Problem(
        sizes,
        model,
        draw(batch, sizes.source, sizes.memory),
        draw(1, batch, sizes.hidden).tanh(),
        draw(1, batch, sizes.hidden),
        draw(batch, sizes.steps, sizes.embedding),
    )


def weights_of_step(sizes: Sizes, score: str) -> int:
    """Elements of the matrices that a step reads, and multiply-adds of each of its rows.

    The products with the memory itself are left out, and for the concat score the projection of the
    memory, which is computed once a call.
    """
    hidden, fed = sizes.hidden, sizes.hidden if score == "concat" else 0
    cell = 4 * hidden * (sizes.embedding + fed + hidden)
    query = hidden * (hidden if score == "concat" else sizes.memory)
    combine = hidden * (sizes.memory + hidden)
    output = 0 if score == "concat" else sizes.symbols * hidden
    return cell + query + combine + output


@torch.no_grad()
def error_of_symbols(symbols: Tensor, logits: Tensor) -> float:
    """How far the chosen symbols lie below the best ones, in standard deviations of the logits.

    symbols: int64 (B, T). logits: float64 (B, T, V), of the model that was fed these symbols.
    """
    chosen = logits.take_along_dim(symbols[..., None], dim=-1)[..., 0]
    return float(((logits.amax(-1) - chosen) / logits.std(-1)).max())
