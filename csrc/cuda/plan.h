// Every choice of a launch, as pure functions of the problem and the number of multiprocessors; and
// what the kernels are given. Nothing here needs CUDA.
#pragma once

#include <cstdint>

#include "attention_params.h"

namespace fused_attn {

constexpr int kMostQueries = 8;      // T
constexpr int kLargestWidth = 2048;  // of the memory and of the score
constexpr int kMostSplits = 128;
constexpr int kMostWarps = 8;
// Of the counters that find the last block of a row: a call needs one for each row and group.
constexpr int kCountersPerCall = 1024;
// Floats of shared memory in front of the operands: running maxima and sums of every warp, the
// results' of every query, and a few flags.
constexpr int kSharedHeader = 128;

// A kernel is compiled for a number of elements of a row that a lane holds (rows of up to 32 times
// as many) and for a number of queries that it attends with at once. Both are accumulators: their
// product is at most 64 registers.
constexpr int kElementClasses[] = {8, 16, 32, 64};
constexpr int queries_at_once(int elements) { return elements <= 16 ? 4 : elements <= 32 ? 2 : 1; }

// Rows in flight: 32 registers of memory in each lane, 4 KiB in a warp, but at most four rows.
constexpr int rows_at_once(int elements, int bytes) {
  const int registers = elements * bytes / 4;
  return registers >= 32 ? 1 : registers <= 8 ? 4 : 2;
}

// Blocks of 8 warps that one multiprocessor's registers are shared among: 128 or 255 a thread.
constexpr int blocks_per_multiprocessor(int elements, int queries) {
  return elements <= 32 && queries == 1 ? 2 : 1;
}

struct Plan {
  int elements, queries, rows, warps;
  int groups;  // of queries
  int splits;  // of the positions; blocks share out a row's length, not S
  int64_t shared_floats;
};

// What a kernel is given.
struct Decode {
  AttentionParams p;
  int groups, splits;
  bool wide_memory, wide_exp, wide_context;  // may be read or written 16 bytes at a time
  float* partials;     // (B, groups, splits) of partial_floats(), or null for one split
  float* scores;       // (B, T, S), or null where no weights are wanted
  unsigned* counters;  // (B, groups), 0 between launches, or null for one split
};

// Of one block: context, largest scores and sums; a multiple of 16 bytes.
constexpr int64_t partial_floats(int elements, int queries) {
  return queries * (elements * 32) + (2 * queries + 3) / 4 * 4;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The fewest splits that fill the machine almost as well as any number would.
inline int choose_splits(int64_t rows, int64_t most, int64_t slots) {
  if (rows > kCountersPerCall || rows * 5 >= slots * 4) return 1;
  double best = 0.0;
  for (int round = 0; round < 2; ++round) {
    for (int64_t n = 1; n <= most; ++n) {
      const int64_t blocks = rows * n;
      const double filled = double(blocks) / double(ceil_div(blocks, slots) * slots);
      if (round == 0 && filled > best) best = filled;
      if (round == 1 && filled >= 0.85 * best) return int(n);
    }
  }
  return 1;
}

inline Plan plan_decode(const AttentionParams& p, int multiprocessors) {
  const int bytes = p.dtype == DType::f32 ? 4 : 2;
  Plan plan = {};
  for (int elements : kElementClasses) {
    plan.elements = elements;
    if (p.E <= elements * 32) break;
  }
  plan.queries = p.T == 1 ? 1 : queries_at_once(plan.elements);
  plan.rows = rows_at_once(plan.elements, bytes);
  plan.groups = int(ceil_div(p.T, plan.queries));
  plan.warps = p.S <= 4 * plan.rows ? 4 : kMostWarps;
  const int64_t most = ceil_div(p.S, 2 * plan.warps * plan.rows);
  const int64_t slots =
      int64_t(multiprocessors) * blocks_per_multiprocessor(plan.elements, plan.queries);
  plan.splits = choose_splits(p.B * plan.groups, most < kMostSplits ? most : kMostSplits, slots);
  // The operands of the scores, and in their place the accumulators of half of the warps.
  const int64_t row = int64_t(plan.elements) * 32;
  int64_t operands = plan.queries * row;
  if (p.score == Score::concat) operands = (plan.queries + 1) * ceil_div(p.K, 256) * 256;
  const int64_t merged = plan.warps / 2 * plan.queries * row;
  plan.shared_floats = kSharedHeader + (operands > merged ? operands : merged);
  return plan;
}

// Floats of workspace: partial results, scores, and counters for a call that gets no others.
inline int64_t workspace_floats(const AttentionParams& p, const Plan& plan) {
  const int64_t rows = plan.splits > 1 ? p.B * plan.groups : 0;
  return rows * plan.splits * partial_floats(plan.elements, plan.queries) +
         (p.weights ? p.B * p.T * p.S : 0) + rows;
}

inline bool is_wide(const Rows& rows, int64_t width, int bytes) {
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.batch_stride * bytes % 16 == 0 &&
         rows.row_stride * bytes % 16 == 0 && width * bytes % 16 == 0;
}

inline Decode prepare_decode(const AttentionParams& p, const Plan& plan, unsigned* counters) {
  const int bytes = p.dtype == DType::f32 ? 4 : 2;
  const int exp_bytes = p.dtype == DType::bf16 ? 2 : 4;
  Decode d = {};
  d.p = p;
  d.groups = plan.groups;
  d.splits = plan.splits;
  d.wide_memory = is_wide(p.memory, p.E, bytes);
  d.wide_exp = is_wide(p.memory_exp, p.K, exp_bytes);
  d.wide_context = is_wide({p.context, 0, 0}, p.E, bytes);
  const int64_t blocks = plan.splits > 1 ? p.B * plan.groups * plan.splits : 0;
  d.partials = blocks ? p.workspace : nullptr;
  if (p.weights) d.scores = p.workspace + blocks * partial_floats(plan.elements, plan.queries);
  d.counters = blocks ? counters : nullptr;
  return d;
}

}  // namespace fused_attn
