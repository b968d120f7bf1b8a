// Threads that share the products of one block: each takes some of the columns.
//
// A block of few rows is bound by reading its weights, so one more thread is one more cache and one
// more path to memory. The thread that runs the block leads: it gives helpers their columns, does
// its own, and then takes their results. It never depends on a helper: one that is late, because
// another process has its core, is left behind, the leader computes those columns too, and goes on
// without that helper until it is back. So helpers work on copies of the rows, into memory of their
// own. Which thread computes a column does not change a bit of it.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "../float_mode.h"
#include "kernels.h"

namespace fused_attn {

inline void spin_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Waits for a moment: spins at first, later lets other threads run. For helpers.
inline void spin_or_yield(int64_t spins) {
  constexpr int kSpins = 2000;  // 0.1 ms on Intel since Skylake, less elsewhere
  spins < kSpins ? spin_pause() : std::this_thread::yield();
}

class Team {
 public:
  using Owners = std::vector<std::shared_ptr<const void>>;
  using Duration = std::chrono::steady_clock::duration;

  // A helper is left behind when it has taken twice as long as the leader's own share, and this
  // much longer.
  static constexpr Duration kPatience = std::chrono::microseconds(100);

  // Up to `helpers` threads will call `help`. `owners` keep the matrices alive, for a helper
  // that is still at work when the leader has gone.
  explicit Team(const DecoderKernels& kernels, int helpers = 0, Owners owners = {},
                Duration patience = kPatience);

  // DecoderKernels::product, for the leader. `start` is at `out`, or belongs to an owner.
  void product(const PackedMatrix& matrix, const ConvertedRows& x, int64_t rows, const float* start,
               int64_t start_stride, float* out, int64_t stride);

  // Helper number `number` works until `dismiss` was called.
  void help(int number);
  void dismiss() { is_dismissed_.store(true, std::memory_order_release); }

  int64_t shares_taken() const { return taken_; }  // results of helpers that were used
  int64_t shares_redone() const { return redone_; }

  // Weights that are worth a helper: handing a share over costs about 2 us.
  static constexpr int64_t kShareBytes = 64 << 10;

 private:
  using Clock = std::chrono::steady_clock;

  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  class Buffer {
   public:
    char* reserve(int64_t bytes);

   private:
    std::unique_ptr<char, Free> data_;
    int64_t size_ = 0;
  };

  // Some columns of a product.
  struct Share {
    PackedMatrix matrix;
    ConvertedRows x;
    int64_t rows = 0;
    const float* start = nullptr;
    int64_t start_stride = 0;
    float* out = nullptr;
    int64_t stride = 0;
  };

  // A helper, and the share that it works on. `done` is the number of the last finished share; a
  // helper is free while that is the last one posted.
  struct alignas(64) Helper {
    static constexpr uint64_t kAbsent = ~uint64_t(0);
    alignas(64) std::atomic<uint64_t> posted{0};
    alignas(64) std::atomic<uint64_t> done{kAbsent};
    Share share;
    Buffer results;
    size_t input = 0;  // the place in inputs_ of the rows that it reads
    // Exponential backoff: a late helper may have no core.
    int64_t backoff = 0;  // products to skip after it was late
    int64_t skips = 0;    // of them, those still to come
    bool is_free() const {
      return done.load(std::memory_order_acquire) == posted.load(std::memory_order_relaxed);
    }
    bool is_at_work() const {
      return done.load(std::memory_order_acquire) != kAbsent && !is_free();
    }
  };

  void run(const Share& share) const;
  size_t free_input() const;
  ConvertedRows copy_rows(const PackedMatrix& matrix, const ConvertedRows& x, int64_t rows,
                          char* to) const;
  void post(Helper& helper, Share share, size_t input);
  void collect(Helper& helper, const Share& share, Clock::time_point deadline);

  static bool takes_part(Helper& helper);

  const DecoderKernels& kernels_;
  const FloatMode mode_ = FloatMode::of_thread();  // of the leader
  const Owners owners_;
  const Duration patience_;
  std::vector<Helper> helpers_;
  std::vector<Buffer> inputs_;  // one more than helpers, so that one is free
  std::vector<Helper*> free_;   // helpers of the present product
  std::vector<Share> shares_;
  std::atomic<bool> is_dismissed_{false};
  int64_t taken_ = 0, redone_ = 0;
};

}  // namespace fused_attn
