"""Names that options may have, without torch: the command line reads them before it needs it."""

from __future__ import annotations

SCORES = ("dot", "general", "concat")  # of the fused operators
LAYER_SCORES = (*SCORES, "location")  # of `LuongAttention`; location is composed of ATen operators
LOCALS = ("monotonic", "predictive")  # kinds of local attention
