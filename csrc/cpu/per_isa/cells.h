// The pointwise part of recurrent cells; see DecoderKernels.
#pragma once

#include "parts.h"

namespace fused_attn {
namespace {

void lstm_cell(float* gates, int64_t gate_stride, int64_t rows, int64_t hidden, float* c,
               int64_t c_stride, float* h, int64_t h_stride) {
  for (int64_t row = 0; row < rows; ++row, gates += gate_stride, c += c_stride, h += h_stride)
    for_each_vector(hidden, [&](int64_t i, auto part) {
      const float* gate = gates + i;
      const Ratio input = sigmoid(load_part(gate, part));
      const Ratio forget = sigmoid(load_part(gate + hidden, part));
      const Ratio candidate = tanh_ratio(load_part(gate + 2 * hidden, part));
      const Ratio output = sigmoid(load_part(gate + 3 * hidden, part));
      const Vec<float> state =
          forget.value() * load_part(c + i, part) + (input * candidate).value();
      store_part(c + i, state, part);
      store_part(h + i, (output * tanh_ratio(state)).value(), part);
    });
}

void gru_cell(const float* from_input, const float* from_state, int64_t gate_stride, int64_t rows,
              int64_t hidden, float* h, int64_t h_stride) {
  for (int64_t row = 0; row < rows;
       ++row, from_input += gate_stride, from_state += gate_stride, h += h_stride)
    for_each_vector(hidden, [&](int64_t i, auto part) {
      const float *x = from_input + i, *y = from_state + i;
      const auto sum = [&](int64_t gate) {
        return load_part(x + gate * hidden, part) + load_part(y + gate * hidden, part);
      };
      const Vec<float> reset = sigmoid(sum(0)).value(), update = sigmoid(sum(1)).value();
      const Vec<float> candidate =
          tanh_ratio(load_part(x + 2 * hidden, part) + reset * load_part(y + 2 * hidden, part))
              .value();
      const Vec<float> state = load_part(h + i, part);
      store_part(h + i, candidate + update * (state - candidate), part);
    });
}

void tanh_all(const float* x, int64_t n, float* out) {
  for_each_vector(n, [&](int64_t i, auto part) {
    store_part(out + i, tanh_ratio(load_part(x + i, part)).value(), part);
  });
}

void add_all(const float* x, const float* y, int64_t n, float* out) {
  for_each_vector(n, [&](int64_t i, auto part) {
    store_part(out + i, load_part(x + i, part) + load_part(y + i, part), part);
  });
}

}  // namespace
}  // namespace fused_attn
