"""Attention layers of other toolkits, with their constructors and calls, on our operators.

`swap(model)` replaces them in a model that exists, weights and all. `to_luong` and `load_luong`
carry weights to a `LuongAttention` and back. docs/interop.md has the list, the one-line swaps and
every difference.
"""

from __future__ import annotations

from fused_attn.interop.convert import load_luong, swap_output_order, to_luong
from fused_attn.interop.fairseq import FairseqAttentionLayer
from fused_attn.interop.gnmt import GNMTBahdanauAttention
from fused_attn.interop.joeynmt import JoeyBahdanauAttention, JoeyLuongAttention
from fused_attn.interop.keras import KerasAdditiveAttention, KerasAttention
from fused_attn.interop.opennmt import (
    EoleGlobalAttention,
    OpenNMT2GlobalAttention,
    OpenNMTGlobalAttention,
)
from fused_attn.interop.speechbrain import ContentBasedAttention, LocationAwareAttention
from fused_attn.interop.swap import Report, Swapped, swap
from fused_attn.interop.tensorflow import TFABahdanauAttention, TFALuongAttention
from fused_attn.interop.tutorial import TutorialAttn

__all__ = [
    "ContentBasedAttention",
    "EoleGlobalAttention",
    "FairseqAttentionLayer",
    "GNMTBahdanauAttention",
    "JoeyBahdanauAttention",
    "JoeyLuongAttention",
    "KerasAdditiveAttention",
    "KerasAttention",
    "LocationAwareAttention",
    "OpenNMT2GlobalAttention",
    "OpenNMTGlobalAttention",
    "Report",
    "Swapped",
    "TFABahdanauAttention",
    "TFALuongAttention",
    "TutorialAttn",
    "load_luong",
    "swap",
    "swap_output_order",
    "to_luong",
]
