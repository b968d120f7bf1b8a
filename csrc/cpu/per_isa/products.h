// Products of rows with packed weights; see DecoderKernels and PackedMatrix.
#pragma once

#include "../decoder/kernels.h"
#include "convert.h"

namespace fused_attn {
namespace {

void convert(Compute compute, const float* x, int64_t stride, int64_t rows, int64_t inputs,
             void* out, float* scales) {
  const int64_t padded = padded_inputs(compute, inputs);
  for (int64_t row = 0; row < rows; ++row, x += stride) {
    if (compute == Compute::bf16) {
      BFloat16* to = static_cast<BFloat16*>(out) + row * padded;
      for (int64_t i = 0; i < padded; ++i) narrow(i < inputs ? x[i] : 0.0f, to[i]);
      continue;
    }
    int8_t* to = static_cast<int8_t*>(out) + row * padded;
    float largest = 0.0f;
    for (int64_t i = 0; i < inputs; ++i) {
      const float size = __builtin_fabsf(x[i]);
      largest = size <= largest ? largest : size;  // a NaN stays
      if (!(size <= 3.4028234e38f)) largest = __builtin_nanf("");
    }
    const bool ok = largest <= 3.4028234e38f;
    scales[row] = ok ? largest / 127.0f : __builtin_nanf("");
    const float inverse = ok && largest > 0.0f ? 127.0f / largest : 0.0f;
    for (int64_t i = 0; i < padded; ++i)
      to[i] = ok && i < inputs ? int8_t(__builtin_rintf(x[i] * inverse)) : int8_t(0);
  }
}

void product(const PackedMatrix& matrix, const ConvertedRows& x, int64_t rows, const float* start,
             int64_t start_stride, float* out, int64_t stride) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t o = 0; o < matrix.outputs; ++o) {
      const int64_t group = compute_group(matrix.compute);
      const int64_t first = o / kPanel * matrix.padded_inputs * kPanel + o % kPanel * group;
      float sum = 0.0f;
      int32_t integers = 0;
      for (int64_t i = 0; i < matrix.inputs; ++i) {
        const int64_t at = first + i / group * group * kPanel + i % group, to = row * x.stride + i;
        if (matrix.compute == Compute::f32)
          sum +=
              static_cast<const float*>(matrix.panels)[at] * static_cast<const float*>(x.data)[to];
        else if (matrix.compute == Compute::bf16)
          sum += widen(static_cast<const BFloat16*>(matrix.panels)[at]) *
                 widen(static_cast<const BFloat16*>(x.data)[to]);
        else
          integers += int32_t(static_cast<const int8_t*>(matrix.panels)[at]) *
                      int32_t(static_cast<const int8_t*>(x.data)[to]);
      }
      if (matrix.compute == Compute::i8) {
        sum = float(integers) * (x.scales[row] * matrix.scales[o]);
        __asm__("" : "+m"(sum));  // keeps the product from becoming a part of a multiply-add
      }
      const float before = start ? start[row * start_stride + o] : 0.0f;
      out[row * stride + o] = before + sum;
    }
}

}  // namespace
}  // namespace fused_attn
