"""Decode sources with trained models: greedy search, sampling or beam search."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_attn.seq2seq.config import SearchConfig
from fused_attn.seq2seq.devices import LOOK_EVERY, moved
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.search.beam import beam_search
from fused_attn.seq2seq.search.constraints import LengthBound, constrain, limits_of
from fused_attn.seq2seq.search.ensemble import Ensemble
from fused_attn.seq2seq.search.hypothesis import (
    Hypothesis,
    coverage_penalty,
    length_penalty,
    not_numbers,
)
from fused_attn.seq2seq.search.packed import PackedModels
from fused_attn.seq2seq.vocabulary import BOS, EOS, PAD


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
    graphs: bool = True,
    packed: PackedModels | None = None,
) -> list[list[Hypothesis]]:
    """Return the best hypotheses of each source, at most ``config.most``, best first.

    models: one, or an ensemble with the same vocabularies; in evaluation mode, on one device.
    source: int64 (B, S), padded at the end. source_lengths: int64 (B,), 1..S, on any device.
    prefix: int64 (B, P), what each target must begin with, padded at the end.
    bound: bounds the target lengths if ``config.max_length`` is None.
    return_weights: whether hypotheses have alignment weights, float32 (T, S).
    graphs: whether steps on a GPU may replay a captured graph; see `Ensemble`.
    packed: the same models, packed: then everything runs in one native call. None uses torch.

    Raises `InputError` if the probabilities of the models are nan.
    """
    members = [models] if isinstance(models, Seq2Seq) else list(models)
    on_host = limits_of(source_lengths.cpu(), config, bound)
    if packed is not None:
        return packed.search(source, source_lengths.cpu(), on_host, config, prefix, return_weights)
    extremes = (int(on_host.min()), int(on_host.max())) if len(on_host) else (0, 0)
    lengths, limits = (moved(each, source.device) for each in (source_lengths, on_host))
    rest = (source, lengths, limits, extremes, config, prefix, return_weights)
    penalised = config.coverage_penalty > 0
    with Ensemble(
        members,
        source,
        source_lengths,
        config.beam,
        return_weights=return_weights or penalised,
        graphs=graphs,
    ) as ensemble:
        if config.beam > 1:
            return beam_search(ensemble, *rest)
        found = _decode(ensemble, *rest)
    return [[hypothesis] for hypothesis in found]


def _decode(
    ensemble: Ensemble,
    source: Tensor,
    lengths: Tensor,
    limits: Tensor,
    extremes: tuple[int, int],
    config: SearchConfig,
    prefix: Tensor | None,
    return_weights: bool,
) -> list[Hypothesis]:
    """Decode each row symbol by symbol, taking the most probable symbol or a sampled one.

    The arguments and the errors are those of `beam_search`.
    """
    shortest, longest = extremes
    look_every = LOOK_EVERY.get(source.device.type, 1)
    generator = _generator(config, source.device)
    rows = torch.arange(len(source), device=source.device)  # batch indices of unfinished rows
    symbols = torch.full_like(lengths, BOS)
    done = torch.zeros_like(symbols, dtype=torch.bool)
    tokens = source.new_zeros(len(source), 0)
    total = torch.zeros(len(source), device=source.device)
    gains = total.new_zeros(len(source), 0)  # log probability of each symbol
    steps: list[Tensor] = []
    found: dict[int, Hypothesis] = {}
    while len(rows):
        log_probs, weights = ensemble.step(symbols)
        allowed = constrain(log_probs, tokens, limits, config, prefix, shortest)
        if look_every > 1 and config.sample:  # multinomial needs valid weights in done rows, too
            allowed = allowed.masked_fill(done[:, None], 0.0)
        symbols = _draw(allowed, config, generator) if config.sample else allowed.argmax(dim=-1)
        gained = allowed.gather(1, symbols[:, None])[:, 0]
        if look_every > 1:
            symbols, gained = symbols.masked_fill(done, PAD), gained.masked_fill(done, 0.0)
        total = total + gained
        gains = torch.cat((gains, gained[:, None]), dim=1)
        tokens = torch.cat((tokens, symbols[:, None]), dim=1)
        if weights is not None:
            steps.append(weights)
        done = done | (symbols == EOS)
        if tokens.shape[1] % look_every:
            continue
        ended = done.nonzero()[:, 0]
        if not len(ended):
            # At its limit every target ends, and done rows are looked for every few steps.
            if tokens.shape[1] > longest + look_every:
                raise not_numbers()
            continue
        aligned = torch.stack([step[ended] for step in steps], dim=1) if steps else None
        chosen = (tokens[ended], total[ended], gains[ended], lengths[rows[ended]], aligned)
        hypotheses = _hypotheses(*chosen, config, return_weights)
        found |= zip(rows[ended].tolist(), hypotheses, strict=True)
        left = (~done).nonzero()[:, 0]
        rows, symbols, done, limits = rows[left], symbols[left], done[left], limits[left]
        tokens, total, gains = tokens[left], total[left], gains[left]
        prefix = None if prefix is None else prefix[left]
        steps = [step[left] for step in steps]
        if len(left):
            ensemble.keep(left)
    return [found[row] for row in range(len(source))]


def _hypotheses(
    tokens: Tensor,
    total: Tensor,
    gains: Tensor,
    lengths: Tensor,
    aligned: Tensor | None,
    config: SearchConfig,
    return_weights: bool,
) -> list[Hypothesis]:
    """The hypotheses of M finished rows; raises `InputError` if a probability is not finite.

    tokens: int64 (M, t), each row with an EOS, and padding after it.
    total: (M,), log probabilities. gains: (M, t), log probability of each symbol.
    lengths: int64 (M,), of the sources. aligned: weights (M, t, S) or None.
    """
    total, gains, lengths = total.cpu(), gains.cpu(), lengths.cpu()
    aligned = None if aligned is None else aligned.cpu()
    if not bool(total.isfinite().all()):
        raise not_numbers()
    found = []
    for i, symbols in enumerate(tokens.tolist()):
        length, size = symbols.index(EOS) + 1, int(lengths[i])
        rows = None if aligned is None else aligned[i, :length]
        weights = None
        if return_weights:
            weights = torch.zeros(0, size) if rows is None else rows[:-1, :size].float()
        score = _score(total[i : i + 1], length, rows, lengths[i], config)
        own = gains[i, : length - 1].tolist()
        found.append(Hypothesis(symbols[: length - 1], float(total[i]), score, weights, own))
    return found


def _score(
    total: Tensor, length: int, aligned: Tensor | None, source: Tensor, config: SearchConfig
) -> float:
    score = total / length_penalty(float(length), config)
    if aligned is not None and config.coverage_penalty:
        score = score + coverage_penalty(aligned.sum(dim=0)[None], source[None], config)
    return float(score)


def _generator(config: SearchConfig, device: torch.device) -> torch.Generator | None:
    """The generator of the draws, None for torch's own."""
    return None if config.seed is None else torch.Generator(device).manual_seed(config.seed)


def _draw(log_probs: Tensor, config: SearchConfig, generator: torch.Generator | None) -> Tensor:
    """Sample a symbol for each row of (N, V), with temperature, top-k and top-p; int64 (N,)."""
    # Of nan, or of nothing but -inf, any symbol is drawn. The total then shows what is wrong.
    tempered = torch.log_softmax(log_probs / config.temperature, dim=-1).nan_to_num(nan=0.0)
    ranked, order = tempered.sort(dim=-1, descending=True)
    keep = torch.ones_like(ranked, dtype=torch.bool)
    if config.top_k:
        keep[:, config.top_k :] = False
    # Keep a symbol if those ranked before it have less than p together. The first is always kept.
    before = ranked.exp().cumsum(dim=-1) - ranked.exp()
    keep &= before < config.top_p
    weights = ranked.exp().masked_fill(~keep, 0.0)
    return order.gather(1, torch.multinomial(weights, 1, generator=generator))[:, 0]
