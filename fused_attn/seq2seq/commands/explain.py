"""``fused-attn explain``: a self-contained HTML page with the attention of a prediction."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from importlib import resources
from pathlib import Path

from fused_attn.seq2seq.commands.options import load_models, note, search_config, set_threads
from fused_attn.seq2seq.commands.streams import argument_bytes
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.inference.prediction import Prediction
from fused_attn.seq2seq.inference.records import read_line
from fused_attn.seq2seq.outputs import write_atomically


def run(args: Namespace) -> int:
    """Write a page for one source: its tokens, the best targets and their alignments."""
    set_threads(args.threads)
    path: Path = args.output
    if not path.parent.is_dir():
        raise InputError(f"--output: there is no directory {path.parent}")
    search = search_config(args)
    if args.beam is None and not search.sample:
        search = replace(search, beam=5, nbest=5)
    predictor = load_models(args)
    line = read_line(predictor, argument_bytes(args.text))
    if line.source is None:
        raise InputError(line.problem("TEXT"))
    for text in predictor.notes("TEXT", line.source):
        note(text)
    (found,) = predictor.decode([line.source], search, alignments=True)
    try:
        # A model may have symbols that UTF-8 cannot encode.
        write_atomically(path, page(found).encode("utf-8", "backslashreplace"))
    except BrokenPipeError:  # the reader of a FIFO or of standard output has gone
        raise
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
    print(f"{path}: {predictor.task.show(found.source)} -> {found.text}")
    return 0


def page(found: Prediction) -> str:
    """Return the HTML page for a prediction and its alternatives."""
    hypotheses = [_values(prediction) for prediction in found.alternatives]
    data = {"source": list(found.source), "hypotheses": hypotheses}
    template = resources.files("fused_attn.seq2seq.commands").joinpath("explain.html")
    # Inside a script element, "<" could end the element or start a comment.
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    return template.read_text(encoding="utf-8").replace("@DATA@", text)


def _values(prediction: Prediction) -> dict[str, object]:
    weights = prediction.alignment
    has_weights = weights is not None and weights.numel() > 0
    return {
        "target": list(prediction.tokens),
        "score": prediction.ranking_score,
        "log_prob": prediction.score,
        "weights": weights.tolist() if weights is not None and has_weights else None,
    }
