// One step of a product with packed weights, for each kind of weights and each set of instructions.
//
// A step multiplies a group of inputs: a word of four bytes for each of the 64 outputs of a panel.
// A struct here has the vectors of a step (`Weights`, from memory; `Row`, one row's word in every
// lane), the sums that `add` adds to, and `finish`, which makes floats of the sums. Where the rows
// must first be rewritten, `prepare` does it, and kRowBytes is what a step of it takes.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../decoder/kernels.h"
#include "convert.h"
#include "parts.h"

namespace fused_attn {
namespace {

typedef VecOf<float>::ints Ints;

FA_INLINE int32_t word_at(const void* p) {
  int32_t word;
  memcpy(&word, p, sizeof word);
  return word;
}
FA_INLINE Ints load_words(const void* p) { return (Ints)load(static_cast<const float*>(p)); }
FA_INLINE Ints splat_word(int32_t word) { return word - Ints{}; }

// Keeps the compiler from making one multiply-add of a product and a sum: results that must be
// equal for all instruction sets are rounded twice, as without that instruction.
FA_INLINE Vec<float> rounded(Vec<float> x) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(x));
#elif defined(__x86_64__)
  __asm__("" : "+x"(x));
#else
  __asm__("" : "+m"(x));
#endif
  return x;
}

FA_INLINE Vec<float> multiply_add(Vec<float> x, Vec<float> y, Vec<float> sum) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)sum);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)sum);
#else
  return sum + x * y;
#endif
}

// What `finish` needs for integers; unused otherwise.
struct Scales {
  const float* outputs = nullptr;  // of the first output of a tile
  const int32_t* sums = nullptr;
  const float* rows = nullptr;
};

// What most steps have.
struct PlainStep {
  static constexpr int kRowBytes = 4;
  static constexpr bool kPrepares = false;
  static constexpr bool kWhole = false;  // a block has all inputs
  static constexpr bool kFolds = false;  // `fold` after every kSteps steps, see BFloat16TileStep

  static int64_t steps(const PackedMatrix& matrix) {
    const int64_t group = compute_group(matrix.compute);
    return (matrix.inputs + group - 1) / group;
  }
};

struct FloatStep : PlainStep {
  typedef Vec<float> Sum;
  typedef Vec<float> Weights;
  typedef Vec<float> Row;
  // In a block; the sums of blocks are added one by one. The weights of a block fit a first-level
  // cache of the processors that have these registers.
  static constexpr int64_t kSteps = kVectorBytes == 64 ? 256 : 128;
  static constexpr int kMostRows = 6;

  FA_INLINE_METHOD static Weights weights(const char* p) {
    return load(reinterpret_cast<const float*>(p));
  }
  FA_INLINE_METHOD static Row row(const char* p) {
    return splat(*reinterpret_cast<const float*>(p));
  }
  FA_INLINE_METHOD static Sum add(Sum sum, Weights w, Row x) { return multiply_add(x, w, sum); }
  FA_INLINE_METHOD static Vec<float> finish(Sum sum, const Scales&, int, int) { return sum; }
};

// The elements of a pair, the low and the high half of each word, widened.
struct WidePair {
  Vec<float> first, second;
};
FA_INLINE WidePair widened(Ints words) {
  return {(Vec<float>)((Bits)words << 16), (Vec<float>)((Bits)words & 0xffff0000u)};
}

#if defined(__AVX512BF16__)
struct BFloat16Step : PlainStep {
  typedef Vec<float> Sum;
  typedef __m512bh Weights;
  typedef __m512bh Row;
  static constexpr int64_t kSteps = 128;
  static constexpr int kMostRows = 6;

  FA_INLINE_METHOD static Weights weights(const char* p) { return (__m512bh)load_words(p); }
  FA_INLINE_METHOD static Row row(const char* p) { return (__m512bh)splat_word(word_at(p)); }
  FA_INLINE_METHOD static Sum add(Sum sum, Weights w, Row x) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, x, w);
  }
  FA_INLINE_METHOD static Vec<float> finish(Sum sum, const Scales&, int, int) { return sum; }
};
#else
struct BFloat16Step : PlainStep {
  typedef Vec<float> Sum;
  typedef WidePair Weights;
  typedef WidePair Row;
  static constexpr int64_t kSteps = 128;
  static constexpr int kMostRows = 4;
  static constexpr int kRowBytes = 8;
  static constexpr bool kPrepares = true;

  FA_INLINE_METHOD static Weights weights(const char* p) { return widened(load_words(p)); }
  FA_INLINE_METHOD static Row row(const char* p) {
    const float* pair = reinterpret_cast<const float*>(p);
    return {splat(pair[0]), splat(pair[1])};
  }
  FA_INLINE_METHOD static Sum add(Sum sum, const Weights& w, const Row& x) {
    return multiply_add(x.second, w.second, multiply_add(x.first, w.first, sum));
  }
  FA_INLINE_METHOD static Vec<float> finish(Sum sum, const Scales&, int, int) { return sum; }
  FA_INLINE_METHOD static void prepare(const char* from, int64_t steps, char* to) {
    for (int64_t i = 0; i < 2 * steps; ++i) {
      uint16_t bits;
      memcpy(&bits, from + 2 * i, sizeof bits);
      const float wide = as_float(uint32_t(bits) << 16);
      memcpy(to + 4 * i, &wide, sizeof wide);
    }
  }
};
#endif

#if defined(__AMX_BF16__)
// The arithmetic of AMX on vectors, with the same bits: the first and the second elements of 16
// pairs are summed apart, their sum is added to the total, and subnormals count as zeros. Few rows
// are multiplied faster this way, for a tile takes as long for one row as for sixteen.
struct BFloat16TileStep : PlainStep {
  struct Sum {
    Vec<float> first, second, total;
  };
  typedef WidePair Weights;
  typedef WidePair Row;
  static constexpr int64_t kSteps = 16;
  static constexpr int kMostRows = 2;
  static constexpr bool kWhole = true;
  static constexpr bool kFolds = true;

  // With the padding, for the tiles add its zeros too, which makes 0 of -0.
  static int64_t steps(const PackedMatrix& matrix) { return matrix.padded_inputs / 2; }
  FA_INLINE_METHOD static Weights weights(const char* p) { return widened(load_words(p)); }
  FA_INLINE_METHOD static Row row(const char* p) { return widened(splat_word(word_at(p))); }
  FA_INLINE_METHOD static Sum add(const Sum& sum, const Weights& w, const Row& x) {
    return {multiply_add(x.first, w.first, sum.first), multiply_add(x.second, w.second, sum.second),
            sum.total};
  }
  FA_INLINE_METHOD static void fold(Sum& sum) {
    sum = {Vec<float>{}, Vec<float>{}, sum.total + (sum.first + sum.second)};
  }
  FA_INLINE_METHOD static Vec<float> finish(const Sum& sum, const Scales&, int, int) {
    return sum.total;
  }
};
#endif

// start + float(sum) * (scale of the row * scale of the output), rounded after each operation.
FA_INLINE Vec<float> scaled(Ints sum, const Scales& scales, int row, int column) {
  const Vec<float> scale = load(scales.outputs + column) * scales.rows[row];
  return rounded(__builtin_convertvector(sum, Vec<float>) * rounded(scale));
}

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
// The instruction multiplies unsigned by signed bytes: 128 is added to the rows' integers, and 128
// times the sum of the weights subtracted in the end. Sums may wrap around on the way.
struct IntegerStep : PlainStep {
  typedef Ints Sum;
  typedef Ints Weights;
  typedef Ints Row;
  static constexpr int64_t kSteps = 512;
  static constexpr bool kWhole = true;
  static constexpr int kMostRows = 6;
  static constexpr bool kPrepares = true;

  FA_INLINE_METHOD static Weights weights(const char* p) { return load_words(p); }
  FA_INLINE_METHOD static Row row(const char* p) { return splat_word(word_at(p)); }
  FA_INLINE_METHOD static Sum add(Sum sum, Weights w, Row x) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
#else
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)x, (__m256i)w);
#endif
  }
  FA_INLINE_METHOD static Vec<float> finish(Sum sum, const Scales& scales, int row, int column) {
    const Bits surplus = (Bits)load_words(scales.sums + column) << 7;
    return scaled((Ints)((Bits)sum - surplus), scales, row, column);
  }
  FA_INLINE_METHOD static void prepare(const char* from, int64_t steps, char* to) {
    for (int64_t i = 0; i < steps; ++i) {
      const int32_t word = word_at(from + 4 * i) ^ int32_t(0x80808080u);
      memcpy(to + 4 * i, &word, sizeof word);
    }
  }
};
#elif defined(__SSE2__)
// Two 16-bit words for each step: inputs 0 and 2 of the group, and 1 and 3. A product of pairs is
// exact: at most 2 * 127 * 127. Rows are padded to whole groups of 16 steps.
struct IntegerStep : PlainStep {
  typedef Ints Sum;
  struct Pair {
    Ints even, odd;
  };
  typedef Pair Weights;
  typedef Pair Row;
  static constexpr int64_t kSteps = 512;
  static constexpr bool kWhole = true;
  static constexpr int kMostRows = 4;
  static constexpr int kRowBytes = 8;
  static constexpr bool kPrepares = true;

  FA_INLINE_METHOD static Weights weights(const char* p) {
    typedef int16_t Shorts __attribute__((vector_size(kVectorBytes)));
    typedef uint16_t ShortBits __attribute__((vector_size(kVectorBytes)));
    const Ints words = load_words(p);
    return {(Ints)((Shorts)((ShortBits)words << 8) >> 8), (Ints)((Shorts)words >> 8)};
  }
  FA_INLINE_METHOD static Row row(const char* p) {
    return {splat_word(word_at(p)), splat_word(word_at(p + 4))};
  }
  FA_INLINE_METHOD static Ints multiply(Ints w, Ints x) {
#if defined(__AVX512BW__)
    return (Ints)_mm512_madd_epi16((__m512i)w, (__m512i)x);
#elif defined(__AVX2__)
    return (Ints)_mm256_madd_epi16((__m256i)w, (__m256i)x);
#else
    return (Ints)_mm_madd_epi16((__m128i)w, (__m128i)x);
#endif
  }
  FA_INLINE_METHOD static Sum add(Sum sum, const Weights& w, const Row& x) {
    return sum + multiply(w.even, x.even) + multiply(w.odd, x.odd);
  }
  FA_INLINE_METHOD static Vec<float> finish(Sum sum, const Scales& scales, int row, int column) {
    return scaled(sum, scales, row, column);
  }
  FA_INLINE_METHOD static void prepare(const char* from, int64_t steps, char* to) {
    for (int64_t i = 0; i < steps; i += 4, from += 16, to += 32) {  // four groups at a time
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
      const __m128i even = _mm_srai_epi16(_mm_slli_epi16(bytes, 8), 8);
      const __m128i odd = _mm_srai_epi16(bytes, 8);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi32(even, odd));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16), _mm_unpackhi_epi32(even, odd));
    }
  }
};
#else
struct IntegerStep : PlainStep {
  typedef Ints Sum;
  typedef Ints Weights;
  typedef Ints Row;
  static constexpr int64_t kSteps = 512;
  static constexpr bool kWhole = true;
  static constexpr int kMostRows = 4;

  FA_INLINE_METHOD static Weights weights(const char* p) { return load_words(p); }
  FA_INLINE_METHOD static Row row(const char* p) { return splat_word(word_at(p)); }
  FA_INLINE_METHOD static Sum add(Sum sum, Weights w, Row x) {
    for (int i = 0; i < 4; ++i) {
      const Bits left = Bits{} + uint32_t(24 - 8 * i);
      sum += ((Ints)((Bits)w << left) >> 24) * ((Ints)((Bits)x << left) >> 24);
    }
    return sum;
  }
  FA_INLINE_METHOD static Vec<float> finish(Sum sum, const Scales& scales, int row, int column) {
    return scaled(sum, scales, row, column);
  }
};
#endif

}  // namespace
}  // namespace fused_attn
