// Stands in for the CUDA compiler: runs a kernel's very source on the CPU, one block at a time,
// each CUDA thread on a stack of its own (a fiber), switched where threads wait for one another.
//
// What a GPU would let pass, or hang on, is an error here: a warp that does not meet at the same
// collective operation, a barrier that not all threads reach, a misaligned wide load. Shared memory
// starts as NaN, and like the workspace it ends at a page that must not be touched. The order in
// which blocks and threads run comes from a seed.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace on_host {

struct Index {
  unsigned x;
};

// Memory that ends where a page begins which nobody may touch, filled with NaN of any type.
class Guarded {
 public:
  explicit Guarded(size_t bytes) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), rounded = (bytes + 15) / 16 * 16;
    size_ = (rounded + page - 1) / page * page + page;
    whole_ = static_cast<char*>(
        mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (whole_ == MAP_FAILED) throw std::runtime_error("no memory");
    mprotect(whole_ + size_ - page, page, PROT_NONE);
    data = whole_ + size_ - page - rounded;
    bytes_ = rounded;
    poison();
  }
  ~Guarded() { munmap(whole_, size_); }
  Guarded(const Guarded&) = delete;
  void poison() { memset(data, 0xff, bytes_); }
  char* data;

 private:
  char* whole_;
  size_t size_, bytes_;
};

enum class Meeting : int { none, shuffle, ballot, reduce };

struct Warp {
  int arrived = 0;
  uint64_t generation = 0;
  Meeting meeting = Meeting::none;
  uint32_t given[32], results[32];
};

struct Fiber {
  Index thread;
  ucontext_t start;
  jmp_buf resume;
  bool started = false, done = false;
  const uint64_t* awaited = nullptr;  // runs on when this is no longer `seen`
  uint64_t seen = 0;
  std::vector<char> stack = std::vector<char>(64 << 10);
};

// All state of the block that runs; the calls of one thread at a time.
struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Fiber* current = nullptr;
  Index block_index, block_size;
  char* shared = nullptr;
  std::function<void()> kernel;
  jmp_buf scheduler;
  std::string error;
  int at_barrier = 0;
  uint64_t barrier_generation = 0;
  int or_so_far = 0, or_result = 0;

  void fail(const std::string& what) {
    error = what + " (block " + std::to_string(block_index.x) + ", thread " +
            std::to_string(current->thread.x) + ")";
    _longjmp(scheduler, 1);
  }

  void wait(const uint64_t* generation) {
    current->awaited = generation;
    current->seen = *generation;
    if (!_setjmp(current->resume)) _longjmp(scheduler, 1);
  }

  // Hands in a value; afterwards `results` of the warp holds those of all its lanes.
  const uint32_t* meet(Meeting meeting, unsigned mask, uint32_t value) {
    Warp& warp = warps[current->thread.x / 32];
    if (mask != 0xffffffffu) fail("a collective operation of less than a warp");
    if (warp.arrived == 0) warp.meeting = meeting;
    if (warp.meeting != meeting) fail("lanes of a warp meet at different operations");
    warp.given[current->thread.x % 32] = value;
    if (++warp.arrived == 32) {
      memcpy(warp.results, warp.given, sizeof warp.results);
      warp.arrived = 0;
      ++warp.generation;
    } else {
      wait(&warp.generation);
    }
    return warp.results;
  }

  int barrier(int value) {
    or_so_far |= value;
    if (++at_barrier == int(fibers.size())) {
      at_barrier = 0;
      or_result = or_so_far;
      or_so_far = 0;
      ++barrier_generation;
    } else {
      wait(&barrier_generation);
    }
    return or_result;
  }

  static void enter();
  void run_block(unsigned index, const std::vector<int>& order);
};

inline Machine machine;

inline void Machine::enter() {
  machine.kernel();
  machine.current->done = true;
  _longjmp(machine.scheduler, 1);
}

inline void Machine::run_block(unsigned index, const std::vector<int>& order) {
  block_index.x = index;
  at_barrier = or_so_far = 0;
  error.clear();
  warps.assign(warps.size(), Warp());
  for (Fiber& fiber : fibers) {
    fiber.started = fiber.done = false;
    fiber.awaited = nullptr;
  }
  static size_t place, left;  // kept across the jumps
  static bool moved;
  static const std::vector<int>* places;
  places = &order;
  for (left = 1; left > 0;) {
    left = 0;
    moved = false;
    for (place = 0; place < fibers.size(); ++place) {
      current = &fibers[size_t((*places)[place])];
      if (current->done) continue;
      ++left;
      if (current->awaited && *current->awaited == current->seen) continue;
      current->awaited = nullptr;
      moved = true;
      if (_setjmp(scheduler)) {
        if (!error.empty()) throw std::runtime_error(error);
        continue;
      }
      if (current->started) _longjmp(current->resume, 1);
      current->started = true;
      getcontext(&current->start);
      current->start.uc_stack.ss_sp = current->stack.data();
      current->start.uc_stack.ss_size = current->stack.size();
      current->start.uc_link = nullptr;
      makecontext(&current->start, &Machine::enter, 0);
      setcontext(&current->start);
    }
    if (left > 0 && !moved) throw std::runtime_error("threads wait for one another for ever");
  }
}

// Runs the blocks in an order that comes from the seed; in their own for seed 0.
inline void launch(unsigned blocks, unsigned threads, size_t shared_bytes, uint64_t seed,
                   std::function<void()> kernel) {
  Guarded shared(shared_bytes);
  machine.fibers = std::vector<Fiber>(threads);
  machine.warps = std::vector<Warp>(threads / 32);
  machine.block_size.x = threads;
  machine.shared = shared.data;
  machine.kernel = std::move(kernel);
  std::vector<int> order(threads), sequence(blocks);
  for (unsigned i = 0; i < threads; ++i) machine.fibers[i].thread.x = unsigned(order[i] = int(i));
  for (unsigned i = 0; i < blocks; ++i) sequence[i] = int(i);
  std::mt19937_64 random(seed);
  if (seed != 0) std::shuffle(sequence.begin(), sequence.end(), random);
  for (int block : sequence) {
    if (seed != 0) std::shuffle(order.begin(), order.end(), random);
    shared.poison();
    machine.run_block(unsigned(block), order);
  }
}

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "the bits of one value");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace on_host

#define threadIdx (on_host::machine.current->thread)
#define blockIdx (on_host::machine.block_index)
#define blockDim (on_host::machine.block_size)

inline uint32_t __float_as_uint(float x) { return on_host::bits_as<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return on_host::bits_as<float>(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline void __threadfence() {}
inline void __syncthreads() { on_host::machine.barrier(0); }
inline int __syncthreads_or(int value) { return on_host::machine.barrier(value); }

inline float __shfl_sync(unsigned mask, float x, int lane) {
  const auto* all = on_host::machine.meet(on_host::Meeting::shuffle, mask, __float_as_uint(x));
  return __uint_as_float(all[lane % 32]);
}
inline float __shfl_xor_sync(unsigned mask, float x, int change) {
  return __shfl_sync(mask, x, int(threadIdx.x % 32) ^ change);
}
inline unsigned __ballot_sync(unsigned mask, bool x) {
  const auto* all = on_host::machine.meet(on_host::Meeting::ballot, mask, x);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= all[i] << i;
  return bits;
}
inline bool __any_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) != 0; }
inline bool __all_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) == 0xffffffffu; }
inline unsigned __reduce_or_sync(unsigned mask, unsigned x) {
  const auto* all = on_host::machine.meet(on_host::Meeting::reduce, mask, x);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= all[i];
  return bits;
}
inline unsigned atomicInc(unsigned* counter, unsigned last) {
  const unsigned old = *counter;
  *counter = old >= last ? 0 : old + 1;
  return old;
}
template <class X>
X __ldcg(const X* at) {
  if (reinterpret_cast<uintptr_t>(at) % sizeof(X)) on_host::machine.fail("a misaligned load");
  return *at;
}
template <class X>
X __ldg(const X* at) {
  return __ldcg(at);
}

namespace fused_attn {
namespace {

inline float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(float(fraction), -24);
  return sign * std::ldexp(float(fraction + 1024), exponent - 25);
}

inline uint16_t float_to_half(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (value != value) return 0x7fff;
  if (size >= 65520.0f) return uint16_t(sign | 0x7c00);
  const int exponent = std::max(size == 0.0f ? -14 : std::ilogb(size), -14);
  // In units of the last place, to nearest even; a carry moves on into the exponent.
  const int units = int(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return uint16_t(sign | ((exponent + 14) * 1024 + units));
}

inline float* shared_memory() { return reinterpret_cast<float*>(on_host::machine.shared); }

}  // namespace
}  // namespace fused_attn
