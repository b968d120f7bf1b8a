"""`python -m benchmarks cpu` and `decoder` refuse options, and machines, that make no sense."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from benchmarks_package import imported

from fused_attn import backends


@pytest.fixture(scope="module")
def targets() -> Iterator[SimpleNamespace]:
    with imported() as loaded:
        yield loaded.targets


@pytest.mark.parametrize(
    ("target", "arguments", "message"),
    [
        ("cpu", ["--rows", "dto"], "no row has 'dto' in its label"),
        ("cpu", ["--threads", "0"], "argument --threads: invalid"),
        ("cpu", ["--seconds", "long"], "argument --seconds: invalid"),
        ("decoder", ["--rows", "genral"], "no row has 'genral' in its label"),
        ("decoder", ["--words", "nowhere.txt"], "nowhere.txt is not a file"),
        ("decoder", ["--seconds", "long"], "argument --seconds: invalid"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    targets: SimpleNamespace,
    target: str,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(backends, "unavailable_reasons", lambda name: [])
    with pytest.raises(SystemExit) as stopped:
        getattr(targets, target).command.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("target", ["cpu", "decoder"])
def test_without_the_backend_it_says_why(
    targets: SimpleNamespace,
    target: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(backends, "unavailable_reasons", lambda name: [f"no {name}"])
    assert getattr(targets, target).command.main(["--seconds", "0"]) == 2
    captured = capsys.readouterr()
    assert not captured.out and captured.err == "the cpu backend is not usable: no cpu\n"
