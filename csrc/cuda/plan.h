// Every choice of a launch, as pure functions of the problem and the number of multiprocessors, and
// the argument of the kernels. Nothing here needs CUDA.
#pragma once

#include <cstdint>

#include "attention_params.h"

namespace fused_attn {

// As in fused_attn/backends/cuda.py.
constexpr int kMostQueries = 8;      // T
constexpr int kLargestWidth = 2048;  // of the memory and of the score
constexpr int kMostSplits = 128;
constexpr int kMostWarps = 8;
// Of the counters that find the last block of a row: a call needs one for each row and query tile.
constexpr int kCountersPerCall = 1024;
// Floats of shared memory in front of the operands: running_max and running_sum of every warp, the
// final ones of every query, and a few flags.
constexpr int kSharedHeader = 128;

// A kernel is compiled for the number of elements of a row that a lane holds (for rows of up to 32
// times as many) and for the number of queries in a query tile. A lane accumulates elements x
// queries sums, in at most 64 registers.
constexpr int kElementClasses[] = {8, 16, 32, 64};
constexpr int queries_at_once(int elements) { return elements <= 16 ? 4 : elements <= 32 ? 2 : 1; }

// Rows in flight: 32 registers of memory in each lane, 4 KiB in a warp, and at most four rows.
constexpr int rows_at_once(int elements, int bytes) {
  const int registers = elements * bytes / 4;
  return registers >= 32 ? 1 : registers <= 8 ? 4 : 2;
}

// Blocks of 8 warps that share the registers of one multiprocessor: 128 or 255 for a thread.
constexpr int blocks_per_multiprocessor(int elements, int queries) {
  return elements <= 32 && queries == 1 ? 2 : 1;
}

struct Plan {
  int elements, queries, rows, warps;
  int query_tiles;
  int splits;  // of the positions; blocks divide a row's length, not S
  int64_t shared_floats;
};

// The argument of a kernel.
struct Decode {
  AttentionParams p;
  int query_tiles, splits;
  // Whether they may be read or written 16 bytes at a time.
  bool aligned_memory, aligned_exp, aligned_context;
  float* partials;     // (B, query_tiles, splits) of partial_floats(), or null for one split
  float* scores;       // (B, T, S), or null where no weights are wanted
  unsigned* counters;  // (B, query_tiles), 0 between launches, or null for one split
};

// The partial result of one block: context, running_max and running_sum; a multiple of 16 bytes.
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
  plan.query_tiles = int(ceil_div(p.T, plan.queries));
  plan.warps = p.S <= 4 * plan.rows ? 4 : kMostWarps;
  const int64_t most = ceil_div(p.S, 2 * plan.warps * plan.rows);
  const int64_t slots =
      int64_t(multiprocessors) * blocks_per_multiprocessor(plan.elements, plan.queries);
  plan.splits =
      choose_splits(p.B * plan.query_tiles, most < kMostSplits ? most : kMostSplits, slots);
  // The operands of the scores, and later in the same place the accumulators of half of the warps.
  const int64_t row = int64_t(plan.elements) * 32;
  int64_t operands = plan.queries * row;
  if (p.score == Score::concat) operands = (plan.queries + 1) * ceil_div(p.K, 256) * 256;
  const int64_t merged = plan.warps / 2 * plan.queries * row;
  plan.shared_floats = kSharedHeader + (operands > merged ? operands : merged);
  return plan;
}

// Floats of workspace: partial results, scores, and counters in case there are no others left.
inline int64_t workspace_floats(const AttentionParams& p, const Plan& plan) {
  const int64_t rows = plan.splits > 1 ? p.B * plan.query_tiles : 0;
  return rows * plan.splits * partial_floats(plan.elements, plan.queries) +
         (p.weights ? p.B * p.T * p.S : 0) + rows;
}

inline bool is_aligned(const Rows& rows, int64_t width, int bytes) {
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.batch_stride * bytes % 16 == 0 &&
         rows.row_stride * bytes % 16 == 0 && width * bytes % 16 == 0;
}

inline Decode prepare_decode(const AttentionParams& p, const Plan& plan, unsigned* counters) {
  const int bytes = p.dtype == DType::f32 ? 4 : 2;
  const int exp_bytes = p.dtype == DType::bf16 ? 2 : 4;
  Decode d = {};
  d.p = p;
  d.query_tiles = plan.query_tiles;
  d.splits = plan.splits;
  d.aligned_memory = is_aligned(p.memory, p.E, bytes);
  d.aligned_exp = is_aligned(p.memory_exp, p.K, exp_bytes);
  d.aligned_context = is_aligned({p.context, 0, 0}, p.E, bytes);
  const int64_t blocks = plan.splits > 1 ? p.B * plan.query_tiles * plan.splits : 0;
  d.partials = blocks ? p.workspace : nullptr;
  if (p.weights) d.scores = p.workspace + blocks * partial_floats(plan.elements, plan.queries);
  d.counters = blocks ? counters : nullptr;
  return d;
}

}  // namespace fused_attn
