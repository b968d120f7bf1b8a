"""The allowed names of some options.

This module does not import torch: the command line reads it before it needs torch.
"""

from __future__ import annotations

SCORES = ("dot", "general", "concat")  # of the fused operators
LAYER_SCORES = (*SCORES, "location")  # of `LuongAttention`; location is composed of ATen operators
LOCALS = ("monotonic", "predictive")  # kinds of local attention
# Types of the products of the native decoder.
COMPUTE = ("float32", "bfloat16", "int8")
