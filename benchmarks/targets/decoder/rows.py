"""The rows of `python -m benchmarks decoder` as data: what is decoded, and the targets."""

from __future__ import annotations

from dataclasses import dataclass

SHORT = {"float32": "fp32", "bfloat16": "bf16", "int8": "int8"}
ONE_THREAD, TWO_THREADS = "one thread", "two threads"  # our side, in `Result.beside`
# Names of the sides that a row may have, in the order of the columns.
OURS, LOOP, COMPILED, ATTN_LSTM, TORCH, G2P = (
    "ours",
    "LSTMCell loop",
    "compiled loop",
    "AttnLSTM",
    "torch path",
    "g2p_en's model",
)


@dataclass(frozen=True)
class Sizes:
    """Of a decoder with one LSTM layer; the concat score is as wide as the state."""

    embedding: int = 512
    hidden: int = 512
    memory: int = 1024
    source: int = 25
    symbols: int = 8000
    steps: int = 25


@dataclass(frozen=True)
class Target:
    """A limit for a figure of our side. ``kind`` is one of:

    "floors": at most ``value`` times the floor. "peak": at least this share of the floor's peak,
    for a row whose floor is given by multiply-adds. "speedup": at least this many times as fast as
    the side ``rival``. "seconds": at most. "rate": at least, in words a second. "threads": two
    threads at least this many times as fast as one. "busy": at most this many times the time on a
    quiet machine.
    """

    kind: str
    value: float
    rival: str = ""

    @property
    def is_most(self) -> bool:
        """Whether the target is an upper limit."""
        return self.kind in ("floors", "seconds", "busy")

    def met(self, value: float) -> bool:
        return value <= self.value if self.is_most else value >= self.value


@dataclass(frozen=True)
class StepRow:
    """Steps of a decoder from a finished memory; the figure is seconds per step of all rows.

    score: "general", with embedding, output layer and choice of a symbol, or "concat", with input
    feeding and given inputs, without an output layer, as AttnLSTM does it.
    """

    score: str
    batch: int
    targets: dict[str, tuple[Target, ...]]  # by type of the products
    rivals: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"{'concat, fed' if self.score == 'concat' else 'general'}, B={self.batch}"


@dataclass(frozen=True)
class SearchRow:
    """Beam search of a translator, encoder included; seconds per call."""

    batch: int
    beam: int
    target: Target

    @property
    def label(self) -> str:
        return f"beam {self.beam}, B={self.batch}"


@dataclass(frozen=True)
class WordRow:
    """The bundled pronunciation model: one word at a time, or all words in batches."""

    batched: bool
    beam: int
    targets: tuple[Target, ...]

    @property
    def label(self) -> str:
        search = "greedy" if self.beam == 1 else f"beam {self.beam}"
        return f"words in batches, {search}" if self.batched else f"a word, {search}"


def _floors(value: float) -> Target:
    return Target("floors", value)


def _faster(value: float, rival: str = LOOP) -> Target:
    return Target("speedup", value, rival)


STEP_ROWS = (
    StepRow(
        "general", 1,
        {"float32": (_floors(1.4), _faster(1.8)), "bfloat16": (_floors(1.6), _faster(7)),
         "int8": (_floors(2), _faster(15))},
        (LOOP, COMPILED, TORCH),
    ),
    StepRow(
        "general", 32,
        {"float32": (_faster(2),), "bfloat16": (_faster(3.5),), "int8": (_faster(6),)},
        (LOOP, COMPILED, TORCH),
    ),
    StepRow(
        "general", 256,
        {"float32": (Target("peak", 0.75),), "bfloat16": (), "int8": ()},
        (LOOP, TORCH),
    ),
    StepRow(
        "concat", 1,
        {"float32": (_faster(1.7, ATTN_LSTM),), "bfloat16": (_faster(3, ATTN_LSTM),),
         "int8": (_faster(5, ATTN_LSTM),)},
        (ATTN_LSTM, LOOP),
    ),
    StepRow(
        "concat", 32,
        {"float32": (_faster(2.5, ATTN_LSTM),), "bfloat16": (), "int8": ()},
        (ATTN_LSTM, LOOP),
    ),
)  # fmt: skip
SEARCH_ROWS = (
    SearchRow(1, 5, _faster(8, TORCH)),
    SearchRow(32, 5, _faster(3, TORCH)),
)
WORD_ROWS = (
    WordRow(False, 1, (Target("seconds", 1e-3), _floors(2.5))),
    WordRow(True, 1, (Target("rate", 2500),)),
    WordRow(True, 5, (Target("rate", 700),)),
)
THREAD_BATCHES = (1, 2, 8, 32)  # of the general rows, in float32
THREADS_TARGET = Target("threads", 1.8)
BUSY_BATCHES = (1, 32)
BUSY_TARGET = Target("busy", 2.5)
