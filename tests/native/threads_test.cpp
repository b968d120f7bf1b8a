// The threaded part of the CPU kernels under ThreadSanitizer: `make test-tsan`.
//
// Every call runs on one thread, on three, and beside other calls, and must leave the same bits;
// the sanitizer reports what happened to come out right.
//
// libgomp is not instrumented: its barriers are invisible to the sanitizer, and every region would
// be reported. So this program links no OpenMP runtime but brings the one function that GCC makes
// of `#pragma omp parallel`, on std::thread. driver.cpp is compiled as it is for the module; if it
// comes to need more of OpenMP, the linker says so here.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "attention_params.h"
#include "cpu/driver.h"
#include "cpu/isa.h"

extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; ++i) others.emplace_back(body, data);
  body(data);
  for (std::thread& other : others) other.join();
}

int check_teams();  // team_test.cpp

namespace {

using namespace fused_attn;

struct Shape {
  Score score;
  DType dtype;
  int64_t B, T, S, E, K;
  bool masked;  // lengths, a mask that differs between queries, and dropout
};

int64_t bytes_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// A tensor of its own, in the dtype of the call.
struct Buffer {
  std::vector<double> storage;
  Buffer(int64_t values, DType dtype) : storage(size_t(values * bytes_of(dtype) + 7) / 8 + 1) {}
  void* data() { return storage.data(); }
  bool operator==(const Buffer& other) const {
    return !std::memcmp(storage.data(), other.storage.data(), storage.size() * sizeof(double));
  }
};

Buffer random(int64_t values, DType dtype, std::mt19937& generator) {
  std::normal_distribution<float> normal(0.0f, 0.5f);
  Buffer buffer(values, dtype);
  for (int64_t i = 0; i < values; ++i) {
    const float value = normal(generator);
    if (dtype == DType::f64)
      static_cast<double*>(buffer.data())[i] = value;
    else if (dtype == DType::f32)
      static_cast<float*>(buffer.data())[i] = value;
    else {  // bfloat16: the upper half of a float
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      static_cast<uint16_t*>(buffer.data())[i] = uint16_t(bits >> 16);
    }
  }
  return buffer;
}

std::vector<uint8_t> coins(int64_t n, std::mt19937& generator) {
  std::vector<uint8_t> result(static_cast<size_t>(n));
  for (uint8_t& coin : result) coin = generator() % 4 != 0;
  return result;
}

// One call: its inputs, which calls at once may share, and its results.
struct Inputs {
  Shape shape;
  Buffer query, memory, memory_proj, v, grad_context, grad_weights;
  std::vector<int64_t> lengths;
  std::vector<uint8_t> mask, keep;

  Inputs(const Shape& s, std::mt19937 generator)
      : shape(s),
        query(random(s.B * s.T * s.K, s.dtype, generator)),
        memory(random(s.B * s.S * s.E, s.dtype, generator)),
        memory_proj(random(s.B * s.S * s.K, s.dtype, generator)),
        v(random(s.K, s.dtype, generator)),
        grad_context(random(s.B * s.T * s.E, s.dtype, generator)),
        grad_weights(random(s.B * s.T * s.S, s.dtype, generator)),
        mask(coins(s.B * s.T * s.S, generator)),
        keep(coins(s.B * s.T * s.S, generator)) {
    for (int64_t b = 0; b < s.B; ++b) lengths.push_back(s.S - b * s.S / (s.B + 1));
  }
};

using Results = std::vector<Buffer>;

Results attend(Inputs& in, int threads) {
  const Shape& s = in.shape;
  const DType statistics = s.dtype == DType::f64 ? DType::f64 : DType::f32;
  Results out;
  out.reserve(7);
  const auto result = [&](int64_t values, DType dtype) {
    out.emplace_back(values, dtype);
    return out.back().data();
  };
  AttentionParams p;
  p.score = s.score;
  p.dtype = s.dtype;
  p.B = s.B, p.T = s.T, p.S = s.S, p.E = s.E, p.K = s.K;
  p.threads = threads;
  p.query = {in.query.data(), s.T * s.K, s.K};
  p.memory = {in.memory.data(), s.S * s.E, s.E};
  if (s.score == Score::concat) {
    p.memory_proj = {in.memory_proj.data(), s.S * s.K, s.K};
    p.v = in.v.data();
  }
  if (s.masked) {
    p.lengths = in.lengths.data();
    p.mask = in.mask.data();
    p.mask_b = s.T * s.S, p.mask_t = s.S, p.mask_s = 1;
    p.keep = in.keep.data();
    p.keep_scale = 1.25;
  }
  p.context = result(s.B * s.T * s.E, s.dtype);
  p.weights = result(s.B * s.T * s.S, s.dtype);
  p.logsumexp = result(s.B * s.T, statistics);
  cpu_forward(p);
  p.grad_context = {in.grad_context.data(), s.T * s.E, s.E};
  p.grad_weights = {in.grad_weights.data(), s.T * s.S, s.S};
  p.grad_query = result(s.B * s.T * s.K, s.dtype);
  p.grad_memory = result(s.B * s.S * s.E, s.dtype);
  if (s.score == Score::concat) {
    p.grad_memory_proj = result(s.B * s.S * s.K, s.dtype);
    p.grad_v = result(s.K, s.dtype);
  }
  cpu_backward(p);
  return out;
}

int failures = 0;

void expect(bool right, const std::string& isa, const Shape& s, const char* what) {
  if (right) return;
  ++failures;
  std::printf("%s, %s score, dtype %d, T %d: %s\n", isa.c_str(),
              s.score == Score::dot ? "dot" : "concat", int(s.dtype), int(s.T), what);
}

// Sizes that make several tasks, and several segments to merge.
std::vector<Shape> shapes() {
  std::vector<Shape> result;
  for (Score score : {Score::dot, Score::concat})
    for (DType dtype : {DType::f32, DType::f64, DType::bf16})
      for (bool masked : {false, true}) {
        const int64_t narrow = score == Score::dot ? 33 : 20;
        result.push_back({score, dtype, 2, 1, 1500, 64, 64, masked});
        result.push_back({score, dtype, 2, 9, 700, 33, narrow, masked});
      }
  return result;
}

}  // namespace

int main() {
  const std::vector<Shape> all = shapes();
  for (const std::string& isa : attention_isas_supported()) {
    set_cpu_isa(isa);
    std::vector<Inputs> inputs;
    std::vector<Results> alone;
    for (const Shape& shape : all) {
      inputs.emplace_back(shape, std::mt19937(unsigned(inputs.size() + 1)));
      alone.push_back(attend(inputs.back(), 1));
      expect(alone.back() == attend(inputs.back(), 3), isa, shape, "three threads change bits");
    }
    // Four callers, each with a pool; two of them make the same call at the same time.
    std::vector<std::thread> callers;
    std::vector<std::vector<Results>> found(4);
    for (size_t caller = 0; caller < found.size(); ++caller)
      callers.emplace_back([&, caller] {
        for (size_t i = 0; i < all.size(); ++i)
          found[caller].push_back(attend(inputs[(i + caller / 2) % all.size()], 2));
      });
    for (std::thread& caller : callers) caller.join();
    for (size_t caller = 0; caller < found.size(); ++caller)
      for (size_t i = 0; i < all.size(); ++i) {
        const size_t call = (i + caller / 2) % all.size();
        expect(found[caller][i] == alone[call], isa, all[call], "calls at once change bits");
      }
    std::printf("%s: %zu calls\n", isa.c_str(), all.size());
  }
  return failures + check_teams() ? 1 : 0;
}
