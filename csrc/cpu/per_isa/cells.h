// The pointwise part of recurrent cells; see DecoderKernels.
#pragma once

#include "parts.h"

namespace fused_attn {
namespace {

void lstm_cell(float* gates, int64_t gate_stride, int64_t rows, int64_t hidden, float* c,
               int64_t c_stride, float* h, int64_t h_stride) {
  for (int64_t row = 0; row < rows; ++row, gates += gate_stride, c += c_stride, h += h_stride)
    for_each_vector(hidden, [&](int64_t i, int64_t n) {
      const float* gate = gates + i;
      const Ratio input = sigmoid(load_part(gate, n));
      const Ratio forget = sigmoid(load_part(gate + hidden, n));
      const Ratio candidate = tanh_ratio(load_part(gate + 2 * hidden, n));
      const Ratio output = sigmoid(load_part(gate + 3 * hidden, n));
      const Vec<float> state = forget.value() * load_part(c + i, n) + (input * candidate).value();
      store_part(c + i, state, n);
      store_part(h + i, (output * tanh_ratio(state)).value(), n);
    });
}

void gru_cell(const float* from_input, const float* from_state, int64_t gate_stride, int64_t rows,
              int64_t hidden, float* h, int64_t h_stride) {
  for (int64_t row = 0; row < rows;
       ++row, from_input += gate_stride, from_state += gate_stride, h += h_stride)
    for_each_vector(hidden, [&](int64_t i, int64_t n) {
      const float *x = from_input + i, *y = from_state + i;
      const Vec<float> reset = sigmoid(load_part(x, n) + load_part(y, n)).value();
      const Vec<float> update =
          sigmoid(load_part(x + hidden, n) + load_part(y + hidden, n)).value();
      const Vec<float> candidate =
          tanh_ratio(load_part(x + 2 * hidden, n) + reset * load_part(y + 2 * hidden, n)).value();
      const Vec<float> state = load_part(h + i, n);
      store_part(h + i, candidate + update * (state - candidate), n);
    });
}

void tanh_all(const float* x, int64_t n, float* out) {
  for_each_vector(n, [&](int64_t i, int64_t part) {
    store_part(out + i, tanh_ratio(load_part(x + i, part)).value(), part);
  });
}

void add_all(const float* x, const float* y, int64_t n, float* out) {
  for_each_vector(n, [&](int64_t i, int64_t part) {
    store_part(out + i, load_part(x + i, part) + load_part(y + i, part), part);
  });
}

}  // namespace
}  // namespace fused_attn
