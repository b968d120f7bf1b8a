"""The rows of words through the bundled pronunciation model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.common import machine
from benchmarks.common.measure import medians
from benchmarks.targets.decoder.figures import Result
from benchmarks.targets.decoder.floors import (
    Floor,
    Work,
    floor_from,
    limit_calls,
    one_after_another,
)
from benchmarks.targets.decoder.numpy_words import words_call
from benchmarks.targets.decoder.rows import G2P, ONE_THREAD, OURS, TORCH, TWO_THREADS, WordRow
from fused_attn import seq2seq
from fused_attn.seq2seq.config import SearchConfig
from fused_attn.seq2seq.inference.predictor import Predictor
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.tasks import cmudict

SINGLE, CHUNK, SLOW = 200, 20, 5  # words one at a time, in each turn, in a turn of the torch path
BATCHED, SLOW_BATCHED = 2000, 250  # words in batches, and for the torch path
DIFFERENT = 0.02  # share of the words whose pronunciation may differ from the torch path's
PUBLISHED = Path(__file__).resolve().parents[4] / "shared/data/g2p/test_words.txt"


def word_list(path: Path | None, count: int) -> list[str]:
    """Words spread evenly over a file of one word a line, else over the CMU dictionary."""
    if path is not None and not path.exists():
        raise FileNotFoundError(path)
    path = path or PUBLISHED
    words = (
        path.read_text(encoding="utf-8").split()
        if path.exists()
        else cmudict.by_hash(cmudict.load_dictionary())
    )
    stride = max(1, len(words) // count)
    return words[::stride][:count]


@dataclass(frozen=True)
class Models:
    """The bundled model on both sides."""

    native: Predictor
    torch: Predictor

    @classmethod
    def load(cls) -> Models:
        return cls(seq2seq.load("g2p", device="cpu"), seq2seq.load("g2p", backend="eager"))

    @property
    def compute(self) -> str:
        """The type of our products."""
        found = self.native.compute
        assert found is not None, self.native.not_native_reasons()
        return found

    @property
    def seq2seq(self) -> Seq2Seq:
        return self.torch.models[0]


def work_of_word(model: Seq2Seq, source: float, target: float, compute: str) -> dict[str, Work]:
    """The products of a word of ``source`` letters and ``target`` phones, by the part of a search.

    A layer of the encoder reads its input matrix once and its recurrent matrix for each letter; the
    recurrent matrix of one direction may stay in a nearer cache meanwhile. The decoder reads all of
    its matrices for each phone and for the end.
    """
    recurrent = [p for name, p in _matrices(model.encoder) if "weight_hh" in name]
    inputs = [p for name, p in _matrices(model.encoder) if "weight_ih" in name]
    bridge = [p for _, p in _matrices(model.bridge)]
    steps = [p for part in (model.decoder, model.output) for _, p in _matrices(part)]
    inward, inner, between, each = (
        sum(p.numel() for p in group) for group in (inputs, recurrent, bridge, steps)
    )
    once = inward + between
    multiplied = round(inward * source + between * model.config.layers)
    turned, stepped = round(inner * source), round(each * (target + 1))
    return {
        "inputs and bridge": Work(once, once, multiplied, compute),
        "recurrence": Work(recurrent[0].numel(), turned, turned, compute),
        "decoder": Work(each, stepped, stepped, compute),
    }


def _matrices(part: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in part.named_parameters() if p.dim() == 2]


def floor_of_word(models: Models, lengths: Sequence[tuple[int, int]], threads: int) -> Floor:
    """The sum of the floors of all parts. lengths: letters and phones of each word."""
    source, target = (statistics.fmean(column) for column in zip(*lengths, strict=True))
    works = work_of_word(models.seq2seq, source, target, models.compute)
    limits = {name: limit_calls(work.held_bytes, threads) for name, work in works.items()}
    seconds = medians(
        {f"{name} {each}": call for name in limits for each, call in limits[name][0].items()}, 0.5
    )
    floors = [
        floor_from({each: seconds[f"{name} {each}"] for each in calls}, works[name], operations)
        for name, (calls, operations) in limits.items()
    ]
    return one_after_another(works.values(), floors)


def measure_words(row: WordRow, models: Models, words: list[str], budget_s: float) -> Result:
    config = SearchConfig(beam=row.beam)
    measured = _batched if row.batched else _single
    return measured(row, models, words, config, budget_s)


def _share_of_different(models: Models, words: list[str], config: SearchConfig) -> float:
    found, expected = (
        [prediction.tokens for prediction in predictor.predict(words, config)]
        for predictor in (models.native, models.torch)
    )
    return sum(a != b for a, b in zip(found, expected, strict=True)) / len(words)


def _single(
    row: WordRow, models: Models, words: list[str], config: SearchConfig, budget_s: float
) -> Result:
    words = words[:: max(1, len(words) // SINGLE)][:SINGLE]
    lengths = [
        (len(word), len(prediction.tokens))
        for word, prediction in zip(words, models.native.predict(words, config), strict=True)
    ]
    floor = floor_of_word(models, lengths, 1)
    judged = Result(
        row.label, models.compute, {}, row.targets, floor,
        errors={OURS: (_share_of_different(models, words, config), DIFFERENT)},
    )  # fmt: skip
    if judged.wrong:
        return judged
    numpy_call = words_call(lengths)
    counts = {OURS: 1, TWO_THREADS: 2} if machine.cores() > 1 else {OURS: 1}
    seconds: dict[str, list[float]] = {side: [] for side in (*counts, TORCH, G2P)}
    end = time.perf_counter() + budget_s
    while not seconds[OURS] or time.perf_counter() < end:
        for start in range(0, len(words), CHUNK):
            chunk = words[start : start + CHUNK]
            for side, threads in counts.items():
                with machine.using_threads(threads):
                    seconds[side] += [
                        _time(lambda w=w: models.native.predict(w, config)) for w in chunk
                    ]
            seconds[TORCH] += [
                _time(lambda w=w: models.torch.predict(w, config)) for w in chunk[:SLOW]
            ]
        seconds[G2P] += [_time(numpy_call) / len(words) for _ in range(3)]
    found = {side: statistics.median(times) for side, times in seconds.items()}
    beside = {ONE_THREAD: found[OURS]}
    if TWO_THREADS in found:
        beside[TWO_THREADS] = found.pop(TWO_THREADS)
    return replace(judged, seconds=found, beside=beside)


def _batched(
    row: WordRow, models: Models, words: list[str], config: SearchConfig, budget_s: float
) -> Result:
    few = words[:: max(1, len(words) // SLOW_BATCHED)][:SLOW_BATCHED]
    judged = Result(
        row.label, models.compute, {}, row.targets,
        errors={OURS: (_share_of_different(models, few, config), DIFFERENT)},
    )  # fmt: skip
    if judged.wrong:
        return judged
    calls: dict[str, Callable[[], Any]] = {
        OURS: lambda: models.native.predict(words, config),
        TORCH: lambda: models.torch.predict(few, config),
    }
    found = medians(calls, budget_s, 5)
    return replace(judged, seconds={OURS: found[OURS] / len(words), TORCH: found[TORCH] / len(few)})


def _time(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
