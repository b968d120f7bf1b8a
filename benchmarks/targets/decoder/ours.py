"""Our side of each row: the only module here that calls the native decoder."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks.targets.decoder.problem import Problem
from fused_attn import LuongDecoder
from fused_attn.decoder_parts import DecoderState
from fused_attn.seq2seq.config import SearchConfig
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.search.hypothesis import Hypothesis
from fused_attn.seq2seq.search.packed import PackedModels
from fused_attn.seq2seq.search.search import search
from fused_attn.seq2seq.vocabulary import BOS, EOS


def steps(problem: Problem, compute: str) -> Callable[[], Tensor]:
    """All steps of a problem in one call: its symbols (B, T), or the last hidden state (B, H)."""
    decoder, memory = decoder_of(problem, compute), problem.memory
    state = DecoderState((problem.hidden, problem.cell))
    if not problem.chooses:
        return lambda: decoder(problem.embedded, memory, state=state)[1].hidden[0][0]
    count = problem.sizes.steps
    return lambda: decoder.greedy(memory, state=state, bos=BOS, eos=EOS, max_length=count).symbols


def decoder_of(problem: Problem, compute: str) -> LuongDecoder:
    """The decoder of a problem; without an output layer where no symbols are chosen."""
    model, sizes = problem.model, problem.sizes
    decoder = LuongDecoder(
        sizes.embedding, sizes.hidden,
        embedding=model.target_embedding if problem.chooses else None,
        attention=model.decoder.attention,
        input_feeding=not problem.chooses,
        vocab_size=sizes.symbols if problem.chooses else None,
        compute=compute,
    )  # fmt: skip
    cell, layer = decoder.recurrent.layers[0], model.decoder.stack.layers[0]
    cell.load_state_dict({name.removesuffix("_l0"): p for name, p in layer.named_parameters()})
    if decoder.output_layer is not None:
        decoder.output_layer.load_state_dict(model.output.state_dict())
    return decoder.eval().requires_grad_(False)


def searched(
    model: Seq2Seq, source: Tensor, lengths: Tensor, config: SearchConfig
) -> Callable[[], list[list[Hypothesis]]]:
    """A search for the targets of a batch, encoder included, with products in float32."""
    models = PackedModels([model])
    return lambda: search(model, source, lengths, config, packed=models)
