#include "driver.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "float_mode.h"
#include "guard.h"
#include "isa.h"
#include "parallel.h"
#include "plan.h"

namespace fused_attn {
namespace {

constexpr int64_t kTasks = 64;              // enough for an even load on any usual machine
constexpr int64_t kChunkBytes = 128 << 10;  // of memory rows: half of a small second-level cache
constexpr int64_t kStepBytes = 32 << 10;    // for few queries: a first-level cache
constexpr int64_t kThreadedWork = 1 << 18;  // multiply-adds below which threads do not pay
constexpr int64_t kKeptScratch = 16 << 20;  // a thread keeps scratch up to this size between calls

int64_t arithmetic_bytes(const AttentionParams& p) { return p.dtype == DType::f64 ? 8 : 4; }
int64_t stored_bytes(const AttentionParams& p) {
  return p.dtype == DType::f64 ? 8 : p.dtype == DType::f32 ? 4 : 2;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Segments are long enough that partial results, (T, width), stay small compared to their rows.
void cut_segments(const AttentionParams& p, int64_t tasks_before, int64_t rows_per_query,
                  Plan& plan) {
  const int64_t wanted = ceil_div(kTasks, std::max<int64_t>(tasks_before, 1));
  const int64_t rows = std::max(ceil_div(p.S, wanted), rows_per_query * p.T);
  plan.segment_rows = round_up(std::max(rows, plan.chunk), plan.chunk);
  plan.segments = std::max<int64_t>(ceil_div(p.S, plan.segment_rows), 1);
}

// 16-bit types are multiplied as they are stored where the processor can: twice the rows fit then.
int64_t chunk_element(const AttentionParams& p) {
  return p.score == Score::dot && p.T > kFewQueries ? stored_bytes(p) : arithmetic_bytes(p);
}

int64_t chunk_rows(const AttentionParams& p, int64_t bytes, int64_t element) {
  const int64_t row = std::max(p.E, p.K) * element;
  const int64_t rows = std::clamp<int64_t>(bytes / row / 4 * 4, 8, 256);
  return std::min(rows, round_up(std::max<int64_t>(p.S, 1), 4));
}

Plan forward_plan(const AttentionParams& p) {
  Plan plan{};
  plan.t_block = std::clamp<int64_t>(p.T, 1, 128);
  plan.t_blocks = ceil_div(p.T, plan.t_block);
  const int64_t element = chunk_element(p);
  plan.chunk = chunk_rows(p, p.T <= kFewQueries ? kStepBytes : kChunkBytes, element);
  cut_segments(p, p.B * plan.t_blocks, 4, plan);
  if (p.bounds) {  // each query has a task that reads its window only
    plan.t_block = plan.segments = 1;
    plan.t_blocks = p.T;
    plan.segment_rows = std::max<int64_t>(p.S, 1);
  }
  return plan;
}

Plan backward_plan(const AttentionParams& p) {
  Plan plan{};
  plan.t_block = std::clamp<int64_t>(p.T, 1, 64);
  plan.t_blocks = ceil_div(p.T, plan.t_block);
  const int64_t bytes = p.T <= kFewQueries ? kStepBytes : kChunkBytes / 2;
  plan.chunk = chunk_rows(p, bytes, chunk_element(p));
  cut_segments(p, p.B, 2, plan);
  return plan;
}

// Asks for 2 MiB pages for a large output that has not been touched yet. The system clears a page
// when it is first written, and a page fault for every 4 KiB of a gradient as large as the memory
// took four times as long as computing it.
void prefer_large_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / kPage * kPage;
  if (data && end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<void, Free>;

Buffer allocate(int64_t bytes) {
  Buffer buffer(std::aligned_alloc(64, size_t(round_up(std::max<int64_t>(bytes, 64), 64))));
  if (!buffer) throw std::bad_alloc();
  prefer_large_pages(buffer.get(), bytes);
  return buffer;
}

// A buffer with a piece of `bytes` for each task. Null if the pieces are empty.
class Pieces {
 public:
  Pieces(int64_t count, int64_t bytes) : count_(count), bytes_(bytes) {
    if (!bytes) return;
    buffer_ = allocate(count * bytes);
    for (int64_t i = 0; kGuardBytes && i < count; ++i) set_guard(at(i), guarded(), at(i + 1));
  }
  ~Pieces() {
    for (int64_t i = 0; kGuardBytes && bytes_ && i < count_; ++i)
      check_guard(at(i), guarded(), at(i + 1));
    if (kGuardBytes && bytes_) lift_guards(data(), count_ * bytes_);
  }
  Pieces(const Pieces&) = delete;
  Pieces& operator=(const Pieces&) = delete;
  void* data() const { return buffer_.get(); }

 private:
  char* at(int64_t i) const { return static_cast<char*>(data()) + i * bytes_; }
  int64_t guarded() const { return bytes_ - kGuardBytes; }

  Buffer buffer_;
  int64_t count_, bytes_;
};

// A thread's scratch outlives the call: the system would zero a fresh mapping each time.
struct Scratch {
  Buffer buffer;
  int64_t size = 0;
  void* reserve(int64_t bytes) {
    if (bytes > size) {
      buffer.reset();
      size = 0;
      buffer = allocate(bytes);
      size = bytes;
    }
    return buffer.get();
  }
  void trim() {
    if (kGuardBytes && buffer) lift_guards(buffer.get(), size);
    if (size <= kKeptScratch) return;
    buffer.reset();
    size = 0;
  }
};
thread_local Scratch thread_scratch;

// Runs body(i, scratch) for i in [0, n). Which thread runs a task does not change its result.
template <class Body>
void for_each(int64_t n, int threads, int64_t scratch_bytes, Body body) {
  std::atomic<bool> failed{false};
  const auto work = [&](auto&& loop) {
    void* scratch = nullptr;
    try {
      if (scratch_bytes) scratch = thread_scratch.reserve(scratch_bytes);
    } catch (const std::bad_alloc&) {  // must not leave a parallel region
      failed = true;
    }
    loop(scratch);
    thread_scratch.trim();
  };
  if (threads <= 1 || n <= 1 || is_forked()) {
    work([&](void* scratch) {
      for (int64_t i = 0; i < n && !failed; ++i) body(i, scratch);
    });
  } else {
    std::atomic<int64_t> next{0};
    const FloatMode mode = FloatMode::of_thread();
#pragma omp parallel num_threads(int(std::min<int64_t>(threads, n)))
    work([&](void* scratch) {
      const WithFloatMode same(mode);
      for (int64_t i = next++; i < n && !failed; i = next++) body(i, scratch);
    });
  }
  if (failed) throw std::bad_alloc();
}

int threads_for(const AttentionParams& p) {
  const int64_t per_pair = p.score == Score::concat ? 4 * p.K + p.E : 2 * p.E;
  double pairs = double(p.B) * double(p.T) * double(p.S);
  if (p.bounds) {
    pairs = 0;
    for (int64_t row = 0; row < p.B * p.T; ++row) {
      pairs += double(std::max<int64_t>(p.bounds[2 * row + 1] - p.bounds[2 * row], 0));
    }
  }
  const double work = pairs * double(per_pair);
  return work < double(kThreadedWork) ? 1 : p.threads;
}

}  // namespace

void cpu_forward(const AttentionParams& p) {
  const KernelTable& table = kernels();
  const Plan plan = forward_plan(p);
  const ForwardSizes sizes = table.forward_sizes(p, plan);
  const int threads = threads_for(p);
  const int64_t size = arithmetic_bytes(p);
  const int64_t tasks = p.B * plan.t_blocks * plan.segments, queries = p.B * p.T;
  prefer_large_pages(p.context, queries * p.E * stored_bytes(p));
  prefer_large_pages(p.weights, queries * p.S * stored_bytes(p));
  prefer_large_pages(p.raw_scores, queries * p.S * size);
  const bool is_short = p.dtype == DType::bf16 || p.dtype == DType::f16;
  const Pieces partial(tasks, sizes.partial);
  const Pieces scores(1, p.weights && is_short ? queries * p.S * size + kGuardBytes : 0);
  Shared shared;
  shared.partial = partial.data();
  shared.scores = scores.data();
  for_each(tasks, threads, sizes.scratch, [&](int64_t task, void* scratch) {
    table.forward_task(p, plan, shared, task, scratch);
  });
  if (sizes.partial)
    for_each(queries, threads, 0,
             [&](int64_t row, void*) { table.forward_merge(p, plan, shared, row); });
}

void cpu_backward(const AttentionParams& p) {
  const KernelTable& table = kernels();
  const Plan plan = backward_plan(p);
  const BackwardSizes sizes = table.backward_sizes(p, plan);
  const int threads = threads_for(p);
  const int64_t tasks = p.B * plan.segments, queries = p.B * p.T;
  prefer_large_pages(p.grad_query, queries * p.K * stored_bytes(p));
  const int64_t rows = p.memory.starts ? p.memory.starts[p.B] : p.B * p.S;
  prefer_large_pages(p.grad_memory, rows * p.E * stored_bytes(p));
  prefer_large_pages(p.grad_memory_proj, rows * p.K * stored_bytes(p));
  const Pieces grad_query(tasks, sizes.grad_query), grad_v(tasks, sizes.grad_v),
      grad_centers(tasks, sizes.grad_centers);
  Shared shared;
  shared.grad_query = sizes.grad_query ? grad_query.data() : p.grad_query;
  shared.grad_v = grad_v.data();
  shared.grad_centers = sizes.grad_centers ? grad_centers.data() : p.grad_centers;
  for_each(tasks, threads, sizes.scratch, [&](int64_t task, void* scratch) {
    table.backward_task(p, plan, shared, task, scratch);
  });
  if (sizes.grad_query || sizes.grad_centers)
    for_each(queries, threads, 0,
             [&](int64_t row, void*) { table.backward_merge(p, plan, shared, row); });
  if (p.grad_v) table.backward_merge_v(p, plan, shared);
}

int64_t multiply_adds(int64_t rounds, int threads) {
  const KernelTable& table = kernels();
  std::atomic<int64_t> done{0};
  for_each(rounds, threads, 0, [&](int64_t, void*) { done += table.multiply_adds(); });
  return done;
}

}  // namespace fused_attn
