"""Input lines and what is predicted for them, as text, TSV or JSON Lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fused_attn.seq2seq.config import SearchConfig
from fused_attn.seq2seq.data.links import pharaoh
from fused_attn.seq2seq.data.tokenizers import SPACE
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.inference.alignments import hard_links, replace_unknown
from fused_attn.seq2seq.inference.prediction import Prediction, rounded
from fused_attn.seq2seq.inference.predictor import Predictor
from fused_attn.seq2seq.inference.sources import EncodedSource
from fused_attn.seq2seq.tasks.base import Task

_BYTE_ORDER_MARK = "\ufeff"
_NOT_UTF8 = "not UTF-8 text"
_NUL = "a NUL character, which text does not have"
# Where str.splitlines() splits.
_LINE_BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_ON_ONE_LINE = str.maketrans(dict.fromkeys(_LINE_BREAKS, " "))
_IN_A_FIELD = _ON_ONE_LINE | str.maketrans({"\t": " "})
# JSON allows these in strings, but not every reader of lines does.
_IN_JSON = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})


@dataclass(frozen=True)
class Line:
    """An input line.

    text: the line without its end. Bytes that are not UTF-8 are replaced by U+FFFD.
    source: what was read, None if the line is blank or cannot be read.
    error: why the line cannot be read.
    """

    text: str
    source: EncodedSource | None = None
    error: str | None = None

    def problem(self, name: str) -> str:
        """Say why the line cannot be read. name: what to call it."""
        if self.error == _NOT_UTF8:
            return f"{name} is {self.error}"
        return f"{name}: {self.error or 'the source is empty'}"


def read_line(predictor: Predictor, line: bytes) -> Line:
    """Read a line of UTF-8 text. Never raises `InputError`: the result has the reason."""
    line = line.rstrip(b"\r\n")
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return Line(line.decode(errors="replace"), error=_NOT_UTF8)
    text = text.removeprefix(_BYTE_ORDER_MARK)
    if "\0" in text:  # UTF-16 without a byte order mark, for example
        return Line(text, error=_NUL)
    if not text.strip():
        return Line(text)
    try:
        return Line(text, predictor.read_text(text))
    except InputError as error:
        return Line(text, error=str(error))


def answer(
    predictor: Predictor,
    lines: Sequence[Line],
    config: SearchConfig,
    *,
    alignments: bool = False,
) -> list[Prediction | None]:
    """Return the prediction for each line, None for a line without a source."""
    sources = [line.source for line in lines if line.source is not None]
    found = iter(predictor.decode(sources, config, alignments=alignments))
    return [None if line.source is None else next(found) for line in lines]


def with_unknown_replaced(found: Prediction, task: Task) -> Prediction:
    """Return a prediction with its unknown symbols replaced, see `replace_unknown`."""

    def replaced(each: Prediction) -> Prediction:
        tokens = replace_unknown(each.tokens, each.source, each.alignment)
        return replace(each, tokens=tokens, text=task.write(tokens), others=())

    return replace(replaced(found), others=tuple(map(replaced, found.others)))


def as_text(found: Prediction | None, count: int, scores: bool = False) -> list[str]:
    """Return the targets, one a line, padded with empty lines to ``count``.

    scores: whether the ranking score and a tab precede each target.
    """
    lines = []
    for each in () if found is None else found.alternatives:
        score = f"{each.ranking_score:.4f}\t" if scores else ""
        lines.append(score + each.text.translate(_ON_ONE_LINE))
    return lines + [""] * (count - len(lines))


def as_tsv(line: Line, found: Prediction | None, alignment: bool = False) -> list[str]:
    """Return a row for each target, or one row with empty fields if there is none.

    The fields: source, rank, target, log probability of the target, log probability of each symbol,
    the symbols and, with ``alignment``, the links in Pharaoh format. Log probabilities are in nats
    and have six decimals. Tabs and line breaks in a field become spaces; white space in a symbol
    becomes "▁", and so does an empty symbol, so that spaces separate the symbols.
    """
    source = line.text.translate(_IN_A_FIELD)
    rows = []
    for rank, each in enumerate(() if found is None else found.alternatives, start=1):
        fields = [
            source,
            str(rank),
            each.text.translate(_IN_A_FIELD),
            _number(each.score),
            " ".join(map(_number, each.token_scores)),
            " ".join(map(_symbol, each.tokens)),
        ]
        if alignment:
            fields.append("" if each.alignment is None else pharaoh(hard_links(each.alignment)))
        rows.append("\t".join(fields))
    return rows or [source + "\t" * (6 if alignment else 5)]


def as_json(line: Line, found: Prediction | None, alignment: bool = False) -> str:
    """Return a JSON object on one line: `Prediction.as_dict`.

    Without a target "targets" is empty; "error" says why if the line cannot be read.
    """
    record: dict[str, Any]
    if found is not None:
        record = found.as_dict(alignment)
    else:
        record = {"source": line.text, "source_tokens": [], "targets": []}
        if line.error is not None:
            record["error"] = line.error
    return json.dumps(record, ensure_ascii=False, allow_nan=False).translate(_IN_JSON)


def _number(value: float) -> str:
    found = rounded(value)
    return str(value) if found is None else f"{found:.6f}"


def _symbol(symbol: str) -> str:
    return "".join(SPACE if c.isspace() else c for c in symbol) or SPACE
