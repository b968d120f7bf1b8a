"""Beam search over all sentences and beams at once, on the device, without copying the memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from fused_attn.seq2seq.config import SearchConfig
from fused_attn.seq2seq.devices import LOOK_EVERY
from fused_attn.seq2seq.search.constraints import constrain
from fused_attn.seq2seq.search.ensemble import Ensemble
from fused_attn.seq2seq.search.hypothesis import (
    Hypothesis,
    coverage_penalty,
    length_penalty,
    not_numbers,
)
from fused_attn.seq2seq.vocabulary import BOS, EOS, PAD

Fields = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


@dataclass
class _Pool:
    """K hypotheses for each of B sentences; an empty slot has the score -inf."""

    score: Tensor  # (B, K): log probability of live hypotheses; with penalties if finished
    log_prob: Tensor  # (B, K)
    tokens: Tensor  # int64 (B, K, t)
    totals: Tensor  # (B, K, t), log probability up to and including each token
    coverage: Tensor | None  # (B, K, S), sum of the weights
    weights: Tensor | None  # (B, K, t, S)

    def rows(self, sentences: Tensor) -> _Pool:
        """The hypotheses of ``sentences``, int64 (M,)."""
        return self._each(lambda tensor: tensor[sentences])

    def best(self, size: int) -> _Pool:
        """The ``size`` best hypotheses of each sentence, best first."""
        return self.chosen(self.score.topk(size, dim=1).indices)

    def chosen(self, slots: Tensor) -> _Pool:
        """The hypotheses in ``slots``, int64 (B, M)."""
        batch = torch.arange(len(slots), device=slots.device)[:, None]
        return self._each(lambda tensor: tensor[batch, slots])

    def alive(self, slots: Tensor, log_prob: Tensor) -> _Pool:
        """The hypotheses in ``slots``, int64 (B, M), live with log probabilities (B, M)."""
        batch = torch.arange(len(slots), device=slots.device)[:, None]
        rest = (self.tokens, self.totals, self.coverage, self.weights)
        fields = [None if field is None else field[batch, slots] for field in rest]
        return _Pool(*cast(Fields, [log_prob, log_prob, *fields]))

    def on_host(self) -> _Pool:
        """The pool on the CPU."""
        return self._each(Tensor.cpu)

    def padded(self) -> _Pool:
        """The pool with room for one more symbol."""
        pool = self._each(lambda tensor: tensor)
        pool.tokens = torch.nn.functional.pad(pool.tokens, (0, 1), value=PAD)
        pool.totals = torch.nn.functional.pad(pool.totals, (0, 1))
        if pool.weights is not None:
            pool.weights = torch.nn.functional.pad(pool.weights, (0, 0, 0, 1))
        return pool

    def joined(self, other: _Pool) -> _Pool:
        """The hypotheses of both pools, K1 + K2 for each sentence."""
        pairs = zip(self._fields(), other._fields(), strict=True)
        joined = [None if x is None or y is None else torch.cat((x, y), 1) for x, y in pairs]
        return _Pool(*cast(Fields, joined))

    def _fields(self) -> Fields:
        return self.score, self.log_prob, self.tokens, self.totals, self.coverage, self.weights

    def _each(self, change: Callable[[Tensor], Tensor]) -> _Pool:
        changed = [None if field is None else change(field) for field in self._fields()]
        return _Pool(*cast(Fields, changed))


def beam_search(
    ensemble: Ensemble,
    source: Tensor,
    lengths: Tensor,
    limits: Tensor,
    extremes: tuple[int, int],
    config: SearchConfig,
    prefix: Tensor | None,
    return_weights: bool,
) -> list[list[Hypothesis]]:
    """Run `search.search` with ``config.beam`` > 1.

    ensemble: has ``config.beam`` rows per sentence, and weights if anything here needs them.
    source: int64 (B, S). lengths: int64 (B,), of the sources.
    limits: int64 (B,), largest target length of each sentence. extremes: the smallest and the
        largest of them.

    Each sentence has K = ``config.beam`` live hypotheses. A step extends all of them by one symbol
    and ranks the extensions. Those among the first K that end with EOS are finished; the first K
    others stay alive. A sentence is done, and leaves the batch, when K hypotheses are finished or
    when no live one can still enter the n best. The bound for that: a log probability never
    increases, the length penalty of the longest target helps most, and coverage never helps.

    Raises `InputError` if the probabilities of a sentence are nan, or none of its targets ends.
    """
    shortest, longest = extremes
    alive, ended = _begin(source, ensemble, config, return_weights)
    rows = torch.arange(len(source), device=source.device)
    symbols = torch.full((len(source) * config.beam,), BOS, device=source.device)
    found: dict[int, list[Hypothesis]] = {}
    look_every = LOOK_EVERY.get(source.device.type, 1)
    is_open = torch.ones_like(rows, dtype=torch.bool)  # sentences that are not done
    row_limits, row_prefix = _of_rows(limits, prefix, config.beam)
    # At its limit every target ends, and done sentences are looked for every few steps.
    for step in range(1, longest + look_every + 2):
        log_probs, weights = ensemble.step(symbols)
        allowed = constrain(
            log_probs, alive.tokens.flatten(0, 1), row_limits, config, row_prefix, shortest
        )
        extended, parents = _extend(alive, allowed, weights)
        ended = _take_ended(ended, extended, lengths, config, is_open)
        alive, order = _keep_alive(extended, parents, config.beam)
        ensemble.reorder(order)
        symbols = alive.tokens[:, :, -1].flatten()
        is_open = is_open & _is_open(alive, ended, limits, config)
        if step % look_every or bool(is_open.all()):
            continue
        finished = (~is_open).nonzero()[:, 0]
        results = _results(alive, ended, finished, lengths, config, return_weights)
        found |= zip(rows[finished].tolist(), results, strict=True)
        left = is_open.nonzero()[:, 0]
        if not len(left):
            return [found[row] for row in range(len(source))]
        rows, is_open, limits, lengths = rows[left], is_open[left], limits[left], lengths[left]
        prefix = None if prefix is None else prefix[left]
        row_limits, row_prefix = _of_rows(limits, prefix, config.beam)
        alive, ended = alive.rows(left), ended.rows(left)
        symbols = symbols.view(-1, config.beam)[left].flatten()
        ensemble.keep(left)
    raise not_numbers()


def _begin(
    source: Tensor, ensemble: Ensemble, config: SearchConfig, return_weights: bool
) -> tuple[_Pool, _Pool]:
    """The initial pools: each sentence has one live, empty hypothesis and no finished one."""
    with_coverage = config.coverage_penalty > 0 and ensemble.has_attention
    with_weights = return_weights and ensemble.has_attention
    batch, length = source.shape
    nothing = torch.full((batch, config.beam), -torch.inf, device=source.device)
    first = nothing.clone()
    first[:, 0] = 0.0
    shape = (batch, config.beam)
    rest = (
        source.new_zeros(*shape, 0),
        nothing.new_zeros(*shape, 0),
        nothing.new_zeros(*shape, length) if with_coverage else None,
        nothing.new_zeros(*shape, 0, length) if with_weights else None,
    )
    return _Pool(first, first, *rest), _Pool(nothing, nothing, *rest)


def _of_rows(limits: Tensor, prefix: Tensor | None, beam: int) -> tuple[Tensor, Tensor | None]:
    """Repeat the limits and prefixes of the sentences for each beam."""
    each = None if prefix is None else prefix.repeat_interleave(beam, dim=0)
    return limits.repeat_interleave(beam), each


def _extend(alive: _Pool, log_probs: Tensor, weights: Tensor | None) -> tuple[_Pool, Tensor]:
    """The 2 K most probable one-symbol extensions of each sentence, and the beam each extends.

    2 K suffice to have K that do not end: at most K of them, one per beam, end with EOS.
    """
    batch, beam, _ = alive.tokens.shape
    size = log_probs.shape[1]
    totals = (alive.log_prob[:, :, None] + log_probs.view(batch, beam, size)).flatten(1)
    best, index = totals.topk(min(2 * beam, totals.shape[1]), dim=1)
    parents, symbols = index // size, index % size
    extended = alive.alive(parents, best).padded()
    extended.tokens[:, :, -1] = symbols
    extended.totals[:, :, -1] = best
    if weights is not None:
        sentences = torch.arange(batch, device=parents.device)[:, None]
        step = weights.view(batch, beam, -1)[sentences, parents]
        if extended.coverage is not None:
            extended.coverage = extended.coverage + step
        if extended.weights is not None:
            extended.weights[:, :, -1] = step
    return extended, parents


def _take_ended(
    ended: _Pool, extended: _Pool, lengths: Tensor, config: SearchConfig, is_open: Tensor
) -> _Pool:
    """The best finished hypotheses, including those that end now; done sentences do not change."""
    length = extended.tokens.shape[2]
    score = extended.log_prob / length_penalty(float(length), config)
    if extended.coverage is not None:
        each = lengths.repeat_interleave(score.shape[1])
        penalty = coverage_penalty(extended.coverage.flatten(0, 1), each, config)
        score = score + penalty.view_as(score)
    fresh = replace(extended)
    ends = (extended.tokens[:, :, -1] == EOS) & is_open[:, None]
    ends[:, config.beam :] = False
    fresh.score = score.masked_fill(~ends, -torch.inf)
    return ended.padded().joined(fresh).best(config.beam)


def _keep_alive(extended: _Pool, parents: Tensor, beam: int) -> tuple[_Pool, Tensor]:
    """The K most probable extensions that do not end, and the rows that they extend.

    parents: the beam that each extension extends. rows: int64 (B * K,), of the ensemble.
    """
    score = extended.log_prob.masked_fill(extended.tokens[:, :, -1] == EOS, -torch.inf)
    log_prob, slots = score.topk(beam, dim=1)
    offsets = torch.arange(len(slots), device=slots.device)[:, None] * beam
    return extended.alive(slots, log_prob), (offsets + parents.gather(1, slots)).flatten()


def _is_open(alive: _Pool, ended: _Pool, limits: Tensor, config: SearchConfig) -> Tensor:
    """Bool (B,): whether fewer than K hypotheses are finished and a live one can enter the n best.

    A sentence with a probability of nan is not open, because nan is not above anything.
    """
    longest = (limits + 1).to(alive.log_prob.dtype)
    bound = alive.log_prob.amax(dim=1) / length_penalty(longest, config)
    return (ended.score[:, -1] == -torch.inf) & (ended.score[:, config.most - 1] < bound)


def _results(
    alive: _Pool,
    ended: _Pool,
    finished: Tensor,
    lengths: Tensor,
    config: SearchConfig,
    return_weights: bool,
) -> list[list[Hypothesis]]:
    """The best hypotheses of the done sentences ``finished``, int64 (M,)."""
    if bool(alive.log_prob[finished].isnan().any()):
        raise not_numbers()
    pool = ended.rows(finished).on_host()
    return [
        _hypotheses(pool, row, length, config, return_weights)
        for row, length in enumerate(lengths[finished].tolist())
    ]


def _hypotheses(
    ended: _Pool, row: int, length: int, config: SearchConfig, return_weights: bool
) -> list[Hypothesis]:
    """The best hypotheses of a done sentence, at most ``config.most``.

    Raises `InputError` if there are none, or if their probabilities are nan.
    """
    found: list[Hypothesis] = []
    mass = 0.0
    for slot in range(config.most):
        score = float(ended.score[row, slot])
        if score == -torch.inf or (config.nbest_mass is not None and mass >= config.nbest_mass):
            break
        if score != score:
            raise not_numbers()
        tokens = [token for token in ended.tokens[row, slot].tolist() if token not in (PAD, EOS)]
        weights = None
        if return_weights:
            weights = torch.zeros(0, length)
            if ended.weights is not None:
                weights = ended.weights[row, slot, : len(tokens), :length].float()
        totals = [0.0, *ended.totals[row, slot, : len(tokens)].tolist()]
        token_log_probs = [after - before for before, after in pairwise(totals)]
        log_prob = float(ended.log_prob[row, slot])
        mass += math.exp(log_prob)
        found.append(Hypothesis(tokens, log_prob, score, weights, token_log_probs))
    if not found:
        raise not_numbers()
    return found
