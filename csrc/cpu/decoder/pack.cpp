#include "pack.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fused_attn {
namespace {

constexpr int64_t kHugePage = int64_t(2) << 20;
constexpr int64_t kChunk = 8 * kHugePage;  // what is not used of it is never touched

// A block of weights: 64 outputs by 64 inputs, read once, and the 64 bytes of each output that are
// written together.
constexpr int64_t kBlock = 64;
struct Block {
  float rows[kPanel][kBlock];
  uint32_t words[kPanel][16];  // packed: a word is a group of inputs
};

struct Source {
  const float* weights;
  int64_t outputs, inputs, output_stride, input_stride;

  // Rows from `first` on, inputs from `begin` on; zeros outside of the matrix.
  void read(int64_t first, int64_t begin, Block& block) const {
    const int64_t rows = std::min(kPanel, outputs - first);
    const int64_t columns = std::min(kBlock, inputs - begin);
    if (rows < kPanel || columns < kBlock) std::memset(block.rows, 0, sizeof block.rows);
    const float* from = weights + first * output_stride + begin * input_stride;
    if (input_stride == 1) {
      for (int64_t o = 0; o < rows; ++o)
        std::memcpy(block.rows[o], from + o * output_stride, size_t(columns) * sizeof(float));
    } else {
      for (int64_t i = 0; i < columns; ++i)
        for (int64_t o = 0; o < rows; ++o)
          block.rows[o][i] = from[o * output_stride + i * input_stride];
    }
  }
};

int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// The bits of the largest |w| of each row of a panel. Integers compare like the magnitudes, and
// those of infinities and NaNs are the largest.
void find_largest(const Source& source, int64_t first, int32_t* largest, Block& block) {
  std::fill_n(largest, kPanel, 0);
  for (int64_t i = 0; i < source.inputs; i += kBlock) {
    source.read(first, i, block);
    for (int64_t o = 0; o < kPanel; ++o) {
      int32_t most = largest[o];
      for (int64_t j = 0; j < kBlock; ++j) {
        const int32_t size = bits_of(block.rows[o][j]) & 0x7fffffff;
        most = size > most ? size : most;
      }
      largest[o] = most;
    }
  }
}

struct Scaling {
  float scale = 0, before = 1, factor = 0;  // integer = nearest(weight * before * factor)

  explicit Scaling(int32_t largest_bits) {
    if (largest_bits >= 0x7f800000) {
      scale = std::numeric_limits<float>::quiet_NaN();
      return;
    }
    float largest;
    std::memcpy(&largest, &largest_bits, sizeof largest);
    scale = largest / 127.0f;
    if (largest == 0.0f) return;
    before = largest < 0x1p-64f ? 0x1p64f : 1.0f;  // so that the factor is finite
    factor = 127.0f / (largest * before);
  }
};

void pack_float(int64_t begin, Block& block) {
  for (int64_t o = 0; o < kPanel; ++o)
    std::memcpy(block.words[o], block.rows[o] + begin, sizeof block.words[o]);
}

void pack_bfloat16(int64_t begin, Block& block) {
  for (int64_t o = 0; o < kPanel; ++o) {
    uint16_t narrow[32];
    for (int64_t i = 0; i < 32; ++i) {
      const uint32_t bits = uint32_t(bits_of(block.rows[o][begin + i]));
      const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
      narrow[i] = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
    }
    std::memcpy(block.words[o], narrow, sizeof narrow);
  }
}

void pack_integers(const Scaling* scalings, int32_t* sums, Block& block) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  for (int64_t o = 0; o < kPanel; ++o) {
    const Scaling scaling = scalings[o];
    int8_t narrow[64] = {};
    int32_t sum = 0;
    if (scaling.factor != 0.0f)  // else a NaN could become any integer
      for (int64_t i = 0; i < 64; ++i) {
        const float shifted = block.rows[o][i] * scaling.before * scaling.factor + kShift;
        const int32_t integer = bits_of(shifted) - 0x4b400000;
        sum += integer;
        narrow[i] = int8_t(integer);
      }
    sums[o] += sum;
    std::memcpy(block.words[o], narrow, sizeof narrow);
  }
}

// words (outputs, groups) to a panel's (groups, outputs).
void write_words(const Block& block, uint32_t* to) {
  for (int64_t group = 0; group < 16; ++group)
    for (int64_t o = 0; o < kPanel; ++o) to[group * kPanel + o] = block.words[o][group];
}

}  // namespace

void WeightMemory::Free::operator()(char* memory) const { std::free(memory); }

char* WeightMemory::take(int64_t bytes) {
  bytes = (std::max<int64_t>(bytes, 1) + 63) / 64 * 64;
  if (used_ + bytes > size_) {
    const int64_t wanted = (std::max(bytes, kChunk) + kHugePage - 1) / kHugePage * kHugePage;
    std::unique_ptr<char, Free> chunk(
        static_cast<char*>(std::aligned_alloc(size_t(kHugePage), size_t(wanted))));
    if (!chunk) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    madvise(chunk.get(), size_t(wanted), MADV_HUGEPAGE);
#endif
    chunks_.push_back(std::move(chunk));
    used_ = 0;
    size_ = wanted;
  }
  char* piece = chunks_.back().get() + used_;
  used_ += bytes;
  return piece;
}

PackedWeights::PackedWeights(Compute compute, const float* weights, int64_t outputs, int64_t inputs,
                             int64_t output_stride, int64_t input_stride, WeightMemory* memory) {
  if (compute == Compute::i8 && inputs > kMostInputs) {
    throw std::invalid_argument("int8 weights have at most " + std::to_string(kMostInputs) +
                                " inputs, got " + std::to_string(inputs));
  }
  matrix_.compute = compute;
  matrix_.outputs = outputs;
  matrix_.inputs = inputs;
  matrix_.padded_inputs = padded_inputs(compute, inputs);
  const int64_t panels = matrix_.panel_count(), bytes = matrix_.bytes();
  const int64_t padded = compute == Compute::i8 ? panels * kPanel : 0;
  if (!memory) memory = (own_ = std::make_unique<WeightMemory>()).get();
  char* data = memory->take(bytes + padded * 8);
  matrix_.panels = data;
  float* scales = reinterpret_cast<float*>(data + bytes);
  int32_t* sums = reinterpret_cast<int32_t*>(scales + padded);
  if (padded) {
    std::fill_n(sums, padded, 0);
    matrix_.scales = scales;
    matrix_.sums = sums;
  }

  const Source source{weights, outputs, inputs, output_stride, input_stride};
  const int64_t step = 64 / compute_bytes(compute);
  auto* to = reinterpret_cast<uint32_t*>(data);
  Block block;
  for (int64_t panel = 0; panel < panels; ++panel) {
    std::vector<Scaling> scalings;
    if (compute == Compute::i8) {
      int32_t largest[kPanel];
      find_largest(source, panel * kPanel, largest, block);
      for (int64_t o = 0; o < kPanel; ++o) {
        scalings.emplace_back(largest[o]);
        scales[panel * kPanel + o] = scalings.back().scale;
      }
    }
    for (int64_t i = 0; i < matrix_.padded_inputs; i += step, to += 16 * kPanel) {
      if (i % kBlock == 0) source.read(panel * kPanel, i, block);
      if (compute == Compute::f32) pack_float(i % kBlock, block);
      if (compute == Compute::bf16) pack_bfloat16(i % kBlock, block);
      if (compute == Compute::i8) pack_integers(scalings.data(), sums + panel * kPanel, block);
      write_words(block, to);
    }
  }
}

}  // namespace fused_attn
