// Compiled once per instruction set, like kernels.cpp: what the native decoder computes with.
#include "../decoder/kernels.h"
#include "cells.h"
#include "decoder_attention.h"
#include "logits.h"
#include "products.h"

#ifndef FUSED_ATTN_ISA
#error "FUSED_ATTN_ISA must name the instruction set"
#endif

namespace fused_attn {

#define FA_JOIN(a, b) a##b
#define FA_ENTRY(isa) FA_JOIN(fused_attn_decoder_kernels_, isa)

extern "C" __attribute__((visibility("hidden"))) const DecoderKernels* FA_ENTRY(FUSED_ATTN_ISA)() {
  static const DecoderKernels table = {
      convert,       product,     lstm_cell, gru_cell,     tanh_all,    add_all, dot_scores,
      concat_scores, softmax_row, bell_row,  weighted_sum, log_sum_exp, argmax,  top};
  return &table;
}

}  // namespace fused_attn
