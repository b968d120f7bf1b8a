"""The files of a whole run of the GPU check, for tests of what is made of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

RATES = {"copy": 4.3e12, "matrix": 790e12, "multiprocessors": 132, "clock": 1.98e9}


def written(gpu: SimpleNamespace, directory: Path) -> list[Any]:
    """Lines of all rows, as a whole run on an H200 leaves them; the first backend's is wrong."""
    rows = gpu.rows.all_rows()
    add = gpu.jsonl.append
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    rates = {"gpu": "NVIDIA H200", "rates": {str(dtype): RATES for dtype in kinds}}
    passed = {"outcome": "passed", "seconds": 1.0}
    add(directory / "kernels.jsonl", {"phase": "times", "item": "rates"} | passed | rates)
    for number, row in enumerate(rows):
        for side in row.sides():
            item = {"item": f"{row} | {side}"} | passed
            if side in row.backends:
                wrong = {"outcome": "failed", "error": "context exceeds its error budget"}
                first = wrong if number == 0 and side == "triton" else {}
                check = {"phase": "checks", "error_share": 0.25, "worst": "context"}
                add(directory / "kernels.jsonl", item | check | first)
            phase = "compilers" if side in gpu.rows.COMPILERS else "times"
            slow = 1 if side in row.backends else 3
            times = {"call": 4e-4, "kernel": slow * 1e-4, "graph": True, "peak_bytes": 3 << 20}
            add(directory / "kernels.jsonl", item | {"phase": phase} | times)
    for number in range(40):
        name = f"tests/test_backends.py::test_some[{'x' * 60}-{number}]"
        line = {
            "phase": "tests",
            "item": name,
            "outcome": "failed",
            "error": "y" * 200 + str(number),
        }
        add(directory / "contract.jsonl", line)
    crashed = {"phase": "cases", "item": "cuda dot", "outcome": "crashed", "log": "a\nthe end"}
    add(directory / "smoke.jsonl", crashed)
    for name in ("build", "smoke", "contract", "kernels"):
        run = {"stage": name, "items": 100, "done": 100, "seconds": 60.0}
        add(directory / "run.jsonl", run)
    return rows
