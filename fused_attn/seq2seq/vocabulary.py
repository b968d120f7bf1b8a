"""Symbols and their ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

PAD, BOS, EOS = 0, 1, 2
_SPECIAL = 3
# A vocabulary that contains this symbol maps every unknown symbol to it.
UNKNOWN = "<unk>"


class UnknownSymbolError(ValueError):
    """``symbol`` is not in the vocabulary."""

    def __init__(self, symbol: str) -> None:
        super().__init__(f"unknown symbol {symbol!r}")
        self.symbol = symbol


class Vocabulary:
    """An ordered set of symbols with ids from 3 on; 0 is `PAD`, 1 is `BOS` and 2 is `EOS`.

    Raises ValueError if a symbol occurs twice.
    """

    def __init__(self, symbols: Iterable[str]) -> None:
        self.symbols = tuple(symbols)
        self._numbers = {symbol: i for i, symbol in enumerate(self.symbols, start=_SPECIAL)}
        if len(self._numbers) != len(self.symbols):
            raise ValueError("symbols must be distinct")

    def __len__(self) -> int:
        """Return the number of ids, the three special ones included."""
        return len(self.symbols) + _SPECIAL

    def __contains__(self, symbol: object) -> bool:
        return symbol in self._numbers

    def __repr__(self) -> str:
        shown = " ".join(self.symbols[:8]) + (" ..." if len(self.symbols) > 8 else "")
        return f"Vocabulary({len(self.symbols)} symbols: {shown})"

    def encode(self, symbols: Iterable[str]) -> list[int]:
        """Return the ids of ``symbols``.

        Raises `UnknownSymbolError` for an unknown symbol, unless the vocabulary contains `UNKNOWN`.
        """
        unknown = self._numbers.get(UNKNOWN)
        if unknown is not None:
            return [self._numbers.get(symbol, unknown) for symbol in symbols]
        try:
            return [self._numbers[symbol] for symbol in symbols]
        except KeyError as error:
            raise UnknownSymbolError(error.args[0]) from None

    def decode(self, numbers: Sequence[int]) -> tuple[str, ...]:
        """Return the symbols with the ids ``numbers``; special ids are dropped."""
        return tuple(self.symbols[n - _SPECIAL] for n in numbers if n >= _SPECIAL)
