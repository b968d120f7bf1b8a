"""Whether the kernels run in Triton's interpreter, which takes tensors on the CPU too."""

from __future__ import annotations

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
