// Stands in for the CUDA compiler: runs a kernel's very source on the CPU, one block at a time,
// each CUDA thread on a stack of its own (a fiber), switched where threads wait for one another.
//
// What a GPU would let pass, or hang on, is an error here: a warp that does not meet at the same
// collective operation, a barrier that not all threads reach, a misaligned wide load. Shared memory
// starts as NaN, and like the workspace it ends at a page that must not be touched. The order in
// which blocks and warps run, and how far one gets while others stand still, come from a seed.
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
#include <list>
#include <memory>
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

constexpr size_t kStack = 64 << 10;

struct Fiber {
  Index thread;
  ucontext_t start;
  jmp_buf resume;
  bool started = false, done = false;
  const uint64_t* awaited = nullptr;  // runs on when this is no longer `seen`
  uint64_t seen = 0;
  std::unique_ptr<char[]> stack{new char[kStack]};

  bool can_run() const { return !done && !(awaited && *awaited == seen); }
};

struct Block {
  Block(unsigned index, unsigned threads, size_t shared_bytes)
      : fibers(threads), warps(threads / 32), shared(shared_bytes) {
    this->index.x = index;
    for (unsigned i = 0; i < threads; ++i) fibers[i].thread.x = i;
  }
  Index index;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Guarded shared;
  int at_barrier = 0;
  uint64_t barrier_generation = 0;
  int or_so_far = 0, or_result = 0;
};

// All state of what runs; the calls of one thread at a time.
struct Machine {
  Fiber* current = nullptr;
  Block* block = nullptr;
  Index block_size;
  std::function<void()> kernel;
  jmp_buf scheduler;
  std::string error;

  void fail(const std::string& what) {
    error = what + " (block " + std::to_string(block->index.x) + ", thread " +
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
    Warp& warp = block->warps[current->thread.x / 32];
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
    Block& here = *block;
    here.or_so_far |= value;
    if (++here.at_barrier == int(here.fibers.size())) {
      here.at_barrier = 0;
      here.or_result = here.or_so_far;
      here.or_so_far = 0;
      ++here.barrier_generation;
    } else {
      wait(&here.barrier_generation);
    }
    return here.or_result;
  }

  // Runs a thread until it waits or is done.
  void run(Block& its_block, Fiber& fiber) {
    block = &its_block;
    current = &fiber;
    fiber.awaited = nullptr;
    if (_setjmp(scheduler)) {
      if (!error.empty()) throw std::runtime_error(error);
      return;
    }
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, &Machine::enter, 0);
    setcontext(&fiber.start);
  }

  static void enter();
};

inline Machine machine;

inline void Machine::enter() {
  machine.kernel();
  machine.current->done = true;
  _longjmp(machine.scheduler, 1);
}

// Runs the threads of a block that can; returns whether there were any. If `random` is given it
// leaves out some warps, and now and then some lanes of a warp.
inline bool advance(Block& block, std::mt19937_64* random) {
  bool moved = false;
  for (size_t warp = 0; warp < block.warps.size(); ++warp) {
    const uint64_t drawn = random ? (*random)() : 0;
    const auto lanes = drawn % 8 == 1 ? uint32_t(drawn >> 32) : drawn % 4 == 2 ? 0 : 0xffffffffu;
    for (size_t lane = 0; lane < 32; ++lane) {
      Fiber& fiber = block.fibers[warp * 32 + lane];
      if (!(lanes >> lane & 1) || !fiber.can_run()) continue;
      moved = true;
      machine.run(block, fiber);
    }
  }
  return moved;
}

inline bool is_done(const Block& block) {
  return std::all_of(block.fibers.begin(), block.fibers.end(), [](auto& f) { return f.done; });
}

// Runs the blocks one after the other; or, for a seed other than 0, in an order that comes from it,
// three at a time, of which now these threads run and now those.
inline void launch(unsigned blocks, unsigned threads, size_t shared_bytes, uint64_t seed,
                   std::function<void()> kernel) {
  machine.block_size.x = threads;
  machine.kernel = std::move(kernel);
  machine.error.clear();
  std::vector<unsigned> sequence(blocks);
  for (unsigned i = 0; i < blocks; ++i) sequence[i] = i;
  std::mt19937_64 random(seed);
  if (seed != 0) std::shuffle(sequence.begin(), sequence.end(), random);
  std::list<Block> running;
  for (auto next = sequence.begin(); next != sequence.end() || !running.empty();) {
    while (next != sequence.end() && running.size() < (seed != 0 ? 3 : 1))
      running.emplace_back(*next++, threads, shared_bytes);
    bool moved = false;
    for (Block& block : running) moved |= advance(block, seed != 0 ? &random : nullptr);
    for (Block& block : running) moved = moved || advance(block, nullptr);
    if (!moved) throw std::runtime_error("threads wait for one another for ever");
    running.remove_if(is_done);
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
#define blockIdx (on_host::machine.block->index)
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

inline float* shared_memory() {
  return reinterpret_cast<float*>(on_host::machine.block->shared.data);
}

}  // namespace
}  // namespace fused_attn
