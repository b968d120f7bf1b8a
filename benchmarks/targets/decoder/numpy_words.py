"""The rival of the word rows: the arithmetic of g2p_en's model in NumPy, with random weights.

g2p_en 2.1 (github.com/Kyubyong/g2p) is not installed here. Its model is a GRU encoder and a GRU
decoder without attention: embeddings and states of 256, 29 graphemes, 74 phonemes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

WIDTH, GRAPHEMES, PHONEMES = 256, 29, 74
Array = NDArray[np.float32]


class NumpyG2P:
    """The model, with parameters drawn once."""

    def __init__(self, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)

        def draw(*shape: int) -> Array:
            return generator.uniform(-0.06, 0.06, shape).astype(np.float32)

        self.source, self.target = draw(GRAPHEMES, WIDTH), draw(PHONEMES, WIDTH)
        gates = 3 * WIDTH
        self.encoder = (draw(gates, WIDTH), draw(gates, WIDTH), draw(gates), draw(gates))
        self.decoder = (draw(gates, WIDTH), draw(gates, WIDTH), draw(gates), draw(gates))
        self.output = draw(PHONEMES, WIDTH), draw(PHONEMES)

    def predict(self, graphemes: list[int], steps: int) -> list[int]:
        """Read the graphemes, 0..28, and take ``steps`` greedy steps."""
        state = np.zeros((1, WIDTH), np.float32)
        for x in self.source[graphemes]:
            state = gru_cell(x[None], state, *self.encoder)
        weight, bias = self.output
        found, symbol = [], 2
        for _ in range(steps):
            state = gru_cell(self.target[[symbol]], state, *self.decoder)
            symbol = int((state @ weight.T + bias).argmax())
            found.append(symbol)
        return found


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def gru_cell(x: Array, state: Array, w_ih: Array, w_hh: Array, b_ih: Array, b_hh: Array) -> Array:
    """A step of a GRU whose gates are reset, update, new. x, state: (1, width)."""
    from_input = x @ w_ih.T + b_ih
    from_state = state @ w_hh.T + b_hh
    width = state.shape[1]
    both = _sigmoid(from_input[:, : 2 * width] + from_state[:, : 2 * width])
    reset, update = both[:, :width], both[:, width:]
    new = np.tanh(from_input[:, 2 * width :] + reset * from_state[:, 2 * width :])
    return (1 - update) * new + update * state


def words_call(lengths: list[tuple[int, int]]) -> Callable[[], object]:
    """Words of (graphemes, phonemes) one after another. The end symbol is one more on each side."""
    model = NumpyG2P()
    words = [([3 + n % 26 for n in range(source)] + [2], target + 1) for source, target in lengths]
    return lambda: [model.predict(graphemes, steps) for graphemes, steps in words]
