"""Chips that the launch table is asked about where there is no GPU."""

from __future__ import annotations

from fused_attn.kernels.launch import Chip

H100 = Chip(multiprocessors=132, shared_memory=232448)  # and H200
