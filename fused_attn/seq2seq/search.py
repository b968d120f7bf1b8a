"""Finding the targets of sources with trained models: greedy, by drawing, or with a beam."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_attn.seq2seq.beam import beam_search
from fused_attn.seq2seq.config import SearchConfig
from fused_attn.seq2seq.constraints import LengthBound, constrain, limits_of
from fused_attn.seq2seq.ensemble import Ensemble
from fused_attn.seq2seq.hypothesis import Hypothesis, coverage_penalty, length_penalty
from fused_attn.seq2seq.model import Seq2Seq
from fused_attn.seq2seq.vocabulary import BOS, EOS


@torch.inference_mode()
def search(
    models: Seq2Seq | Sequence[Seq2Seq],
    source: Tensor,
    source_lengths: Tensor,
    config: SearchConfig = SearchConfig(),  # noqa: B008, it is frozen
    *,
    prefix: Tensor | None = None,
    bound: LengthBound = LengthBound(),  # noqa: B008
    return_weights: bool = False,
) -> list[list[Hypothesis]]:
    """Find the ``config.nbest`` best targets of each source, the best first.

    models: one, or an ensemble with the same vocabularies; in evaluation mode, all on one device.
    source: int64 (B, S), padded at the end. source_lengths: int64 (B,), 1..S.
    prefix: int64 (B, P), padded at the end: what each target begins with.
    bound: of the targets' lengths, if ``config.max_length`` is None.
    """
    members = [models] if isinstance(models, Seq2Seq) else list(models)
    limits = limits_of(source_lengths, config, bound)
    if config.beam > 1:
        return beam_search(members, source, source_lengths, limits, config, prefix, return_weights)
    found = _walk(members, source, source_lengths, limits, config, prefix, return_weights)
    return [[hypothesis] for hypothesis in found]


def _walk(
    models: Sequence[Seq2Seq],
    source: Tensor,
    lengths: Tensor,
    limits: Tensor,
    config: SearchConfig,
    prefix: Tensor | None,
    return_weights: bool,
) -> list[Hypothesis]:
    """One symbol after the other for each row: the likeliest, or a drawn one."""
    ensemble = Ensemble(models, source, lengths)
    wanted = (return_weights or config.coverage_penalty > 0) and ensemble.has_attention
    generator = None
    if config.seed is not None:
        generator = torch.Generator(source.device).manual_seed(config.seed)
    rows = torch.arange(len(source), device=source.device)  # of the batch, still under way
    symbols = torch.full_like(lengths, BOS)
    tokens = source.new_zeros(len(source), 0)
    total = torch.zeros(len(source), device=source.device)
    steps: list[Tensor] = []
    found: dict[int, Hypothesis] = {}
    while len(rows):
        log_probs, weights = ensemble.step(symbols, wanted)
        at = (tokens, limits[rows], config, None if prefix is None else prefix[rows])
        allowed = constrain(log_probs, *at)
        symbols = _draw(allowed, config, generator) if config.sample else allowed.argmax(dim=-1)
        total = total + log_probs.gather(1, symbols[:, None])[:, 0]
        tokens = torch.cat((tokens, symbols[:, None]), dim=1)
        if weights is not None:
            steps.append(weights)
        ended = symbols == EOS
        for i in ended.nonzero()[:, 0].tolist():
            row = int(rows[i])
            aligned = torch.stack([step[i] for step in steps]) if steps else None
            score = _score(total[i : i + 1], tokens.shape[1], aligned, lengths[row], config)
            alignment = None
            if return_weights:
                size = int(lengths[row])
                alignment = torch.zeros(0, size)
                if aligned is not None:
                    alignment = aligned[:-1, :size].float().cpu()
            found[row] = Hypothesis(tokens[i, :-1].tolist(), float(total[i]), score, alignment)
        remaining = (~ended).nonzero()[:, 0]
        if len(remaining) < len(rows):
            rows, symbols = rows[remaining], symbols[remaining]
            tokens, total = tokens[remaining], total[remaining]
            steps = [step[remaining] for step in steps]
            ensemble.keep(remaining)
    return [found[row] for row in range(len(source))]


def _score(
    total: Tensor, length: int, aligned: Tensor | None, source: Tensor, config: SearchConfig
) -> float:
    score = total / length_penalty(float(length), config)
    if aligned is not None and config.coverage_penalty:
        score = score + coverage_penalty(aligned.sum(dim=0)[None], source[None], config)
    return float(score)


def _draw(log_probs: Tensor, config: SearchConfig, generator: torch.Generator | None) -> Tensor:
    """Draw a symbol for each row from (N, V), after temperature, top-k and top-p."""
    tempered = torch.log_softmax(log_probs / config.temperature, dim=-1)
    ranked, order = tempered.sort(dim=-1, descending=True)
    keep = torch.ones_like(ranked, dtype=torch.bool)
    if config.top_k:
        keep[:, config.top_k :] = False
    # A symbol stays while those before it do not reach p; the first always does.
    before = ranked.exp().cumsum(dim=-1) - ranked.exp()
    keep &= before < config.top_p
    weights = ranked.exp().masked_fill(~keep, 0.0)
    return order.gather(1, torch.multinomial(weights, 1, generator=generator))[:, 0]
