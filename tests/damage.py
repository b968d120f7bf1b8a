"""Damage to every file of a checkpoint, and what using the damaged checkpoint does.

Run as a script it tries many mutations and prints each outcome that is not allowed: anything but
success or `InputError`, more than a few seconds, or memory beyond a limit. A crash ends it, and the
last line names the mutation.
"""

from __future__ import annotations

import base64
import copy
import io
import json
import random
import resource
import shutil
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.checkpoints.average import averaged
from fused_attn.seq2seq.checkpoints.export import save_model
from fused_attn.seq2seq.checkpoints.find import best_checkpoint, find_checkpoint
from fused_attn.seq2seq.checkpoints.recipe import Recipe
from fused_attn.seq2seq.config import ModelConfig, TrainingConfig
from fused_attn.seq2seq.data.examples import Examples
from fused_attn.seq2seq.data.tokenizers import Subwords, learn_subwords
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.inference.predictor import Predictor, load
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.tasks.text import Pairs, PairsConfig
from fused_attn.seq2seq.training.trainer import Trainer
from fused_attn.seq2seq.vocabulary import UNKNOWN, Vocabulary

MODEL = ModelConfig(hidden=6, embedding=5, score="concat", coverage=True, input_feeding=True)
RECIPE = TrainingConfig(batch_size=4)
SYMBOLS = ["a", "b", "c", "d"]
MEMORY = 512 << 20  # bytes that a checkpoint of some kilobytes may take
SECONDS = 5.0  # a quarter of a second on an idle machine


def _examples() -> Examples:
    pairs = [[3 + i % 4, 3 + i % 3] for i in range(24)]
    return Examples.of(pairs, pairs)


def _size() -> int:
    return len(Vocabulary(SYMBOLS))


def make_trainer() -> Trainer:
    return Trainer(Seq2Seq(MODEL, _size(), _size()), _examples(), RECIPE)


def make_checkpoint(directory: Path) -> Path:
    """Write a checkpoint of a run that has made a few steps."""
    torch.manual_seed(0)
    trainer = make_trainer()
    trainer.run_epoch(lambda _: None, lambda: trainer.position.step == 2)
    position, tensors = trainer.state()
    meta = {
        **Recipe(MODEL, RECIPE, Pairs(PairsConfig(train="secret.tsv"))).to_json(),
        "source": SYMBOLS, "target": SYMBOLS, "training_pairs": "0", "position": position,
        "target_bound": {"ratio": 1.0, "longest": 2}, "longest_source": 2,
        "dev": {"lines wrong": 0.5}, "start_from": None, "teacher": [],
    }  # fmt: skip
    files.save(directory, meta, trainer.model.state_dict(), tensors)
    return directory


def make_subword_model(directory: Path) -> Path:
    """Write a model with a subword model in its metadata."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcd", k=draw.randint(2, 5))) for _ in range(200)]
    blob = learn_subwords(iter([" ".join(draw.choices(words, k=5)) for _ in range(300)]), 30)
    vocabulary = Vocabulary([UNKNOWN, *Subwords(blob).pieces])
    model = Seq2Seq(MODEL, len(vocabulary), len(vocabulary))
    task = Pairs(PairsConfig(tokens="subwords", subwords=blob))
    Predictor(model, vocabulary, vocabulary, task=task).save(directory)
    return directory


def use(path: Path, scratch: Path, trainer: Trainer) -> None:
    """Do with a checkpoint what the commands do; raises `InputError` for what it is checked for."""
    meta = files.load_metadata(path)
    best_checkpoint([path])
    found = find_checkpoint(path)
    problems: list[InputError] = []

    def attempt(action: Callable[[], object]) -> None:
        try:
            action()
        except InputError as error:
            problems.append(error)

    def predict() -> None:
        predictor = load(found)
        for search in ({}, {"beam": 2, "nbest": 2}):
            predictor("a b", max_length=4, **search)
        predictor.save(scratch / "saved")

    def resume() -> None:
        tensors = files.load_tensors(found, files.TRAINING)
        try:
            trainer.load_state(meta["position"], tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise files.damaged(found, error) from None
        trainer.run_epoch(lambda _: None, lambda: trainer.position.step % 2 == 1)

    attempt(predict)
    attempt(lambda: save_model(scratch / "exported", *averaged([found, found]), "float16"))
    if (path / files.TRAINING).exists():
        attempt(resume)
    if problems:
        raise problems[0]


DEEP: Any = []
for _ in range(900):
    DEEP = [DEEP]
VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 7, 100_000, 10**6, 2**31, 2**63, 10**30, 10**400, -(10**30)),
    *(0.5, -0.0, 1e-320, 1e308, "", "x", "\0", "\ud800", "é" * 99, "none", "../../etc/passwd"),
    *([], {}, [1], ["a", "a"], {"a": 1}, {"name": "g2p"}, DEEP, ["x"] * 1000),
]
TEXTS = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "[" * 6000,
    '{"a":' * 6000,
    "9" * 5000,
    '"\\ud800"',
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a document, except most entries of long lists."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for number in range(min(4, len(value))):
            yield from places(value[number], (*path, number))


def mutate_document(document: Any, draw: random.Random) -> tuple[str, bytes]:
    """Change a document of JSON; returns what was done, and its bytes."""
    document = copy.deepcopy(document)
    path = draw.choice([path for path in places(document) if path])
    parent = document
    for step in path[:-1]:
        parent = parent[step]
    kind = draw.choice(["value", "value", "value", "text", "delete", "rename", "repeat", "swap"])
    if kind == "value":
        parent[path[-1]] = draw.choice(VALUES)
    elif kind == "text":
        parent[path[-1]] = "@@"
        text = draw.choice(TEXTS)
        return f"{path} = {text[:20]}", json.dumps(document).replace('"@@"', text).encode()
    elif kind == "delete":
        del parent[path[-1]]
    elif kind == "rename" and isinstance(parent, dict):
        parent[draw.choice(["x", "", "hidden", "name"])] = parent.pop(path[-1])
    elif kind == "repeat" and isinstance(parent, list):
        parent.append(parent[path[-1]])
    else:
        other = draw.choice([path for path in places(document) if path])
        value = document
        for step in other:
            value = value[step]
        parent[path[-1]] = copy.deepcopy(value)
    return f"{kind} {path}", json.dumps(document).encode()


def _set(tensor: Tensor, value: float) -> Tensor:
    changed = tensor.clone().float()
    changed.view(-1)[:1] = value
    return changed


TENSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "nan": lambda t: _set(t, float("nan")),
    "inf": lambda t: _set(t, float("inf")),
    "huge": lambda t: _set(t, 3e38) * 0 + 3e38,
    "negative": lambda t: -t.float() - 1,
    "flat": torch.flatten,
    "transposed": lambda t: t.t().contiguous() if t.ndim == 2 else t[None],
    "longer": lambda t: torch.cat((t, t)) if t.ndim else t.repeat(3),
    "empty": lambda t: t.flatten()[:0],
    "one": lambda t: t.flatten()[0],
    "many": lambda t: t.flatten()[:1].repeat(100_000),
    **{
        str(dtype): lambda t, dtype=dtype: t.to(dtype)
        for dtype in (
            *(torch.int8, torch.int64, torch.bool, torch.uint8, torch.float64, torch.bfloat16),
            *(torch.complex64, torch.float16, torch.float8_e4m3fn),
        )
    },
}


def mutate_tensors(data: bytes, draw: random.Random) -> tuple[str, bytes]:
    """Change a file of tensors; returns what was done, and its bytes."""
    size = struct.unpack("<Q", data[:8])[0]
    kind = draw.choice(["tensor", "tensor", "tensor", "name", "header", "size"])
    if kind == "header":
        header = json.loads(data[8 : 8 + size])
        header.pop("__metadata__", None)
        name = draw.choice(sorted(header))
        part = draw.choice(["dtype", "shape", "data_offsets"])
        what, changed = mutate_document({part: header[name][part]}, draw)
        rest = json.dumps({key: value for key, value in header[name].items() if key != part})
        header[name] = "@@"
        parts = rest.encode()[:-1], changed[1:] if changed.startswith(b"{") else b"}"
        text = json.dumps(header).encode().replace(b'"@@"', b",".join(parts))
        return f"header of {name}: {what}", struct.pack("<Q", len(text)) + text + data[8 + size :]
    if kind == "size":
        other = draw.choice([0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1])
        return f"header of {other} B", struct.pack("<Q", other) + data[8:]
    tensors = safetensors.torch.load(data)
    name = draw.choice(sorted(tensors))
    if kind == "name":
        action = draw.choice(["delete", "rename", "add", "all"])
        if action == "all":
            tensors = {}
        elif action == "add":
            tensors["more" + draw.choice(["", ".int8-scale", "\0", "é"])] = torch.zeros(3)
        else:
            tensor = tensors.pop(name)
            if action == "rename":
                tensors[name + "x"] = tensor
        return f"{action} {name}", safetensors.torch.save(tensors)
    what = draw.choice(sorted(TENSORS))
    tensors[name] = TENSORS[what](tensors[name]).contiguous()
    return f"{name}: {what}", safetensors.torch.save(tensors)


def mutate_bytes(data: bytes, draw: random.Random) -> tuple[str, bytes]:
    """Damage any file as a bad disk or a bad copy does."""
    changed = bytearray(data)
    at = draw.randrange(len(changed))
    kind = draw.choice(["flip", "cut", "truncate", "insert", "zero"])
    if kind == "flip":
        changed[at] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del changed[at : at + draw.randrange(1, 9)]
    elif kind == "truncate":
        del changed[at:]
    elif kind == "insert":
        changed[at:at] = draw.randbytes(7)
    else:
        changed[at : at + 64] = bytes(len(changed[at : at + 64]))
    return f"{kind} at {at}", bytes(changed)


def mutate_subwords(document: Any, draw: random.Random) -> tuple[str, bytes]:
    """Damage the subword model within the metadata."""
    document = copy.deepcopy(document)
    blob = base64.b64decode(document["task"]["subwords"])
    what, changed = mutate_bytes(blob, draw)
    text = base64.b64encode(changed).decode()
    if draw.random() < 0.1:
        what, text = "not base64", draw.choice(["", "*", "é", "a", text[:-1]])
    document["task"]["subwords"] = text
    return f"subwords: {what}", json.dumps(document).encode()


def set_digests(directory: Path) -> None:
    """Give a checkpoint right digests, as somebody who means harm does."""
    try:
        document = json.loads((directory / files.METADATA).read_bytes())
        document.pop(files.DIGESTS, None)
        found = {
            path.name: files.hashlib.sha256(path.read_bytes()).hexdigest()
            for path in directory.iterdir()
            if path.name != files.METADATA
        }
        document[files.DIGESTS] = {**found, files.METADATA: files._digest(document)}
        (directory / files.METADATA).write_text(json.dumps(document))
    except (ValueError, TypeError, AttributeError, RecursionError):
        pass  # no document that could have digests


def mutate(whole: Path, damaged: Path, draw: random.Random) -> str:
    """Write a damaged copy of a checkpoint; returns what was done."""
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(whole, damaged)
    document = json.loads((damaged / files.METADATA).read_bytes())
    digests = draw.choice(["none", "none", "right"])
    del document[files.DIGESTS]
    (damaged / files.METADATA).write_text(json.dumps(document))
    file = draw.choice(sorted(damaged.iterdir()))
    if draw.random() < 0.2:
        what, data = mutate_bytes(file.read_bytes(), draw)
    elif file.name != files.METADATA:
        what, data = mutate_tensors(file.read_bytes(), draw)
    elif document["task"]["subwords"] is not None and draw.random() < 0.7:
        what, data = mutate_subwords(document, draw)
    else:
        what, data = mutate_document(document, draw)
    file.write_bytes(data)
    if digests == "right":
        set_digests(damaged)
    return f"{file.name}: {what}, digests: {digests}"


def _address_space() -> int:
    text = Path("/proc/self/statm").read_text()
    return int(text.split()[0]) * resource.getpagesize()


def main(directory: Path, count: int, seed: int) -> int:
    """Try ``count`` mutations; returns the number of outcomes that are not allowed."""
    draw = random.Random(seed)
    checkpoints = [make_checkpoint(directory / "run"), make_subword_model(directory / "subwords")]
    trainer = make_trainer()
    for whole in checkpoints:
        use(whole, directory / "before", trainer)
        shutil.rmtree(directory / "before")
    limit = _address_space() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    bad, outcomes = 0, {"used": 0, "refused": 0}
    for number in range(count):
        whole = checkpoints[number % 6 == 5]
        scratch = directory / f"scratch-{number}"
        what = mutate(whole, directory / "damaged", draw)
        print(f"\r{number}: {what}", end="", flush=True)
        started = time.monotonic()
        try:
            use(directory / "damaged", scratch, trainer)
            outcomes["used"] += 1
        except InputError as error:
            outcomes["refused"] += 1
            if "\n" in str(error) or len(str(error)) > 1000:
                bad += 1
                print(f"\nBAD: not one line: {str(error)[:300]!r}")
        except BaseException:
            bad += 1
            written = io.StringIO()
            traceback.print_exc(file=written)
            print(f"\nBAD: {written.getvalue()[-1500:]}")
        if (seconds := time.monotonic() - started) > SECONDS:
            bad += 1
            print(f"\nBAD: {seconds:.1f} s")
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"\n{count} mutations, {outcomes}, {bad} bad")
    return bad


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])) > 0)
