#include "driver.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "isa.h"
#include "plan.h"

namespace fused_attn {
namespace {

constexpr int64_t kTasks = 64;              // enough for any usual machine to share out evenly
constexpr int64_t kChunkBytes = 128 << 10;  // of memory rows: half of a small second-level cache
constexpr int64_t kStepBytes = 32 << 10;    // for few queries: a first-level cache
constexpr int64_t kThreadedWork = 1 << 18;  // multiply-adds below which a thread costs more
constexpr int64_t kKeptScratch = 16 << 20;  // a thread keeps scratch up to this size between calls

int64_t arithmetic_bytes(const AttentionParams& p) { return p.dtype == DType::f64 ? 8 : 4; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A segment is long enough that its partial results, (T, width), stay small beside its rows.
void cut_segments(const AttentionParams& p, int64_t tasks_before, int64_t rows_per_query,
                  Plan& plan) {
  const int64_t wanted = ceil_div(kTasks, std::max<int64_t>(tasks_before, 1));
  const int64_t rows = std::max(ceil_div(p.S, wanted), rows_per_query * p.T);
  plan.segment_rows = round_up(std::max(rows, plan.chunk), plan.chunk);
  plan.segments = std::max<int64_t>(ceil_div(p.S, plan.segment_rows), 1);
}

int64_t chunk_rows(const AttentionParams& p, int64_t bytes) {
  const int64_t row = std::max(p.E, p.K) * arithmetic_bytes(p);
  const int64_t rows = std::clamp<int64_t>(bytes / row / 4 * 4, 8, 256);
  return std::min(rows, round_up(std::max<int64_t>(p.S, 1), 4));
}

Plan forward_plan(const AttentionParams& p) {
  Plan plan{};
  plan.t_block = std::clamp<int64_t>(p.T, 1, p.score == Score::dot ? 64 : 128);
  plan.t_blocks = ceil_div(p.T, plan.t_block);
  plan.chunk = chunk_rows(p, p.T <= 8 ? kStepBytes : kChunkBytes);
  cut_segments(p, p.B * plan.t_blocks, 4, plan);
  return plan;
}

Plan backward_plan(const AttentionParams& p) {
  Plan plan{};
  plan.t_block = std::clamp<int64_t>(p.T, 1, 64);
  plan.t_blocks = ceil_div(p.T, plan.t_block);
  plan.chunk = chunk_rows(p, p.T <= 8 ? kStepBytes : kChunkBytes / 2);
  cut_segments(p, p.B, 2, plan);
  return plan;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<void, Free>;

Buffer allocate(int64_t bytes) {
  Buffer buffer(std::aligned_alloc(64, size_t(round_up(std::max<int64_t>(bytes, 64), 64))));
  if (!buffer) throw std::bad_alloc();
  return buffer;
}

// A thread's scratch outlives the call: a fresh mapping would be zeroed by the system each time.
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
  if (threads <= 1 || n <= 1) {
    work([&](void* scratch) {
      for (int64_t i = 0; i < n && !failed; ++i) body(i, scratch);
    });
  } else {
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(int(std::min<int64_t>(threads, n)))
    work([&](void* scratch) {
      for (int64_t i = next++; i < n && !failed; i = next++) body(i, scratch);
    });
  }
  if (failed) throw std::bad_alloc();
}

int threads_for(const AttentionParams& p) {
  const int64_t per_pair = p.score == Score::concat ? 4 * p.K + p.E : 2 * p.E;
  const double work = double(p.B) * double(p.T) * double(p.S) * double(per_pair);
  return work < double(kThreadedWork) ? 1 : p.threads;
}

}  // namespace

void cpu_forward(const AttentionParams& p) {
  const KernelTable& table = kernels();
  const Plan plan = forward_plan(p);
  const int threads = threads_for(p);
  const int64_t size = arithmetic_bytes(p), lanes = table.vector_bytes / size;
  const int64_t tasks = p.B * plan.t_blocks * plan.segments, queries = p.B * p.T;
  Shared shared;
  Buffer partial, scores;
  if (plan.segments > 1) {
    partial = allocate(tasks * plan.t_block * (round_up(p.E, lanes) + 2) * size);
    shared.partial = partial.get();
  }
  if (p.weights && (p.dtype == DType::bf16 || p.dtype == DType::f16)) {
    scores = allocate(queries * p.S * size);
    shared.scores = scores.get();
  }
  for_each(tasks, threads, table.forward_scratch(p, plan), [&](int64_t task, void* scratch) {
    table.forward_task(p, plan, shared, task, scratch);
  });
  if (plan.segments > 1)
    for_each(queries, threads, 0,
             [&](int64_t row, void*) { table.forward_merge(p, plan, shared, row); });
}

void cpu_backward(const AttentionParams& p) {
  const KernelTable& table = kernels();
  const Plan plan = backward_plan(p);
  const int threads = threads_for(p);
  const int64_t size = arithmetic_bytes(p), lanes = table.vector_bytes / size;
  const bool concat = p.score == Score::concat;
  const int64_t width = round_up(p.K, concat ? 2 * lanes : lanes);
  const int64_t tasks = p.B * plan.segments, queries = p.B * p.T;
  Shared shared;
  const Buffer grad_query = allocate(tasks * p.T * width * size);
  const Buffer grad_v = allocate(concat ? tasks * width * size : 0);
  shared.grad_query = grad_query.get();
  shared.grad_v = grad_v.get();
  for_each(tasks, threads, table.backward_scratch(p, plan), [&](int64_t task, void* scratch) {
    table.backward_task(p, plan, shared, task, scratch);
  });
  for_each(queries, threads, 0,
           [&](int64_t row, void*) { table.backward_merge(p, plan, shared, row); });
  if (concat) table.backward_merge_v(p, plan, shared);
}

int64_t multiply_adds(int64_t rounds, int threads) {
  const KernelTable& table = kernels();
  std::atomic<int64_t> done{0};
  for_each(rounds, threads, 0, [&](int64_t, void*) { done += table.multiply_adds(); });
  return done;
}

}  // namespace fused_attn
