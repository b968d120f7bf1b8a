"""``fused-attn aer``: the alignment error rate of alignment links."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from fused_attn.seq2seq.data.links import parse_pharaoh
from fused_attn.seq2seq.data.text_files import read_numbered
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.metrics import Link, alignment_error_rate


def run(args: Namespace) -> int:
    """Print the alignment error rate of a file of links."""
    found, gold = _read_links(args.found), _read_links(args.gold)
    if len(found) != len(gold):
        raise InputError(
            f"{args.found} has {len(found)} lines, but {args.gold} has {len(gold)}; expected one "
            "line per sentence in both"
        )
    try:
        rate = alignment_error_rate([sure for sure, _ in found], gold)
    except ValueError as error:
        raise InputError(str(error)) from None
    print(f"AER  {100 * rate:.2f} %")
    return 0


def _read_links(path: Path) -> list[tuple[set[Link], set[Link]]]:
    found = []
    for number, line in read_numbered(path):
        try:
            found.append(parse_pharaoh(line))
        except ValueError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
    return found
