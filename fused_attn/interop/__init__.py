"""Adapters: attention layers with the interfaces of other toolkits, on our operators.

`swap(model)` replaces the attention layers of an existing model and keeps their weights. `to_luong`
and `load_luong` convert weights to a `LuongAttention` and back. `to_luong_decoder` converts another
toolkit's decoder to a `LuongDecoder`, and `initial_state` returns the state with which it begins.
docs/interop.md lists the adapters, the one-line swaps and every difference.

In these modules "peer" means the other toolkit, or its layer.
"""

from __future__ import annotations

from fused_attn.interop.convert import load_luong, swap_output_order, to_luong
from fused_attn.interop.decoders import initial_state, to_luong_decoder
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
    "initial_state",
    "load_luong",
    "swap",
    "swap_output_order",
    "to_luong",
    "to_luong_decoder",
]
