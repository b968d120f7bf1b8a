"""Build a parallel corpus from the help pages of LibreOffice, which exist in many languages.

The pages come from Debian packages (MPL-2.0):

    apt-get download libreoffice-help-en-us libreoffice-help-fr
    for package in libreoffice-help-*.deb; do dpkg-deb --extract "$package" help; done
    python examples/libreoffice_help.py help fr corpus
    fused-attn train translate --train corpus/train.tsv --dev corpus/dev.tsv \
        --test corpus/test.tsv --output runs/en-fr --skip-bad --hidden 256 --embedding 128 \
        --no-input-feeding --vocabulary 4000 --epochs 8 --lr 3e-3 --batch-tokens 4000
    fused-attn evaluate runs/en-fr --beam 5

A paragraph has the same id in all languages. Pairs with equal sides are skipped, as they are not
translated. One translation of each English paragraph is kept. A hash of the English text assigns
each paragraph to the training, development or test set, so every run gives the same split.
"""

from __future__ import annotations

import argparse
import hashlib
from html.parser import HTMLParser
from pathlib import Path

ENGLISH = "en-US"
BLOCKS = {"p", "h1", "h2", "h3", "h4", "h5", "h6"}

HELD = 1_000  # pairs in each of the development and test sets


class Paragraphs(HTMLParser):
    """Collects the texts of headings and paragraphs by id."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: dict[str, str] = {}
        self._id: str | None = None
        self._text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in BLOCKS:
            self._close()
            self._id = dict(attrs).get("id")

    def handle_endtag(self, tag: str) -> None:
        if tag in BLOCKS:
            self._close()

    def handle_data(self, data: str) -> None:
        if self._id is not None:
            self._text.append(data)

    def _close(self) -> None:
        text = " ".join("".join(self._text).split())
        if self._id is not None and text:
            self.found.setdefault(self._id, text)
        self._id, self._text = None, []


def paragraphs(page: Path) -> dict[str, str]:
    """Return the paragraphs of a page by id."""
    parser = Paragraphs()
    parser.feed(page.read_text(encoding="utf-8"))
    parser.close()
    return parser.found


def corpus(root: Path, language: str) -> dict[str, str]:
    """Return the English paragraphs below ``root`` with their translations."""
    pairs: dict[str, str] = {}
    for page in sorted((root / ENGLISH).rglob("*.html")):
        other = root / language / page.relative_to(root / ENGLISH)
        if not other.exists():
            continue
        english, translated = paragraphs(page), paragraphs(other)
        for name, source in english.items():
            target = translated.get(name)
            if target is not None and target != source:
                pairs.setdefault(source, target)
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="where the packages were extracted")
    parser.add_argument("language", help="fr, de, ko ...")
    parser.add_argument("output", type=Path, help="directory for train.tsv, dev.tsv and test.tsv")
    args = parser.parse_args()
    root = args.root / "usr/share/libreoffice/help"
    for directory in (root / ENGLISH, root / args.language):
        if not directory.is_dir():
            parser.error(f"{directory} is missing: extract the packages first")
    pairs = corpus(root, args.language)
    order = sorted(pairs, key=lambda source: hashlib.sha256(source.encode()).digest())
    args.output.mkdir(parents=True, exist_ok=True)
    parts = {"test": order[:HELD], "dev": order[HELD : 2 * HELD], "train": order[2 * HELD :]}
    for name, sources in parts.items():
        lines = "".join(f"{source}\t{pairs[source]}\n" for source in sources)
        (args.output / f"{name}.tsv").write_text(lines, encoding="utf-8")
        print(f"{args.output / name}.tsv: {len(sources):,} pairs")


if __name__ == "__main__":
    main()
