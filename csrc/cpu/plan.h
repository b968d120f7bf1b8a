// How a call is cut into tasks: a function of the shape alone, never of the number of threads or
// the instruction set, so that the same input gives the same bits on any number of threads.
#pragma once

#include <cstdint>

namespace fused_attn {

// Up to this many queries memory rows are read as one stream, in chunks that fit the first-level
// cache; bfloat16 is not multiplied in pairs then (pairs.h).
constexpr int64_t kFewQueries = 8;

struct Plan {
  int64_t t_block;       // queries in a query tile
  int64_t t_blocks;      // query tiles: tasks of the forward, a loop in each task of the backward
  int64_t chunk;         // memory rows that stay in the cache between their two uses
  int64_t segment_rows;  // memory rows of a task, a multiple of chunk
  int64_t segments;      // tasks along S; their partial results are merged in order
};

// The buffers that the tasks of a call share. All but `scores` have a piece for each task, laid out
// by sizes.h. `A` stands for the arithmetic type, float or double.
struct Shared {
  void* partial = nullptr;       // forward, segments > 1: laid out by `Partial`
  void* scores = nullptr;        // A (B, T, S) when weights are wanted and their dtype is not A
  void* grad_query = nullptr;    // backward: laid out by `Sums`, like the next two
  void* grad_v = nullptr;        // concat
  void* grad_centers = nullptr;  // with centers
};

// Bytes of a thread's scratch, and of each task's piece of a shared buffer. 0 if a task leaves
// nothing there, or writes the result itself.
struct ForwardSizes {
  int64_t scratch, partial;
};
struct BackwardSizes {
  int64_t scratch, grad_query, grad_v, grad_centers;
};

struct AttentionParams;

// Entry points of one instruction set. Scratch is private to the thread that runs a task.
struct KernelTable {
  ForwardSizes (*forward_sizes)(const AttentionParams&, const Plan&);
  void (*forward_task)(const AttentionParams&, const Plan&, const Shared&, int64_t, void*);
  void (*forward_merge)(const AttentionParams&, const Plan&, const Shared&, int64_t);
  BackwardSizes (*backward_sizes)(const AttentionParams&, const Plan&);
  void (*backward_task)(const AttentionParams&, const Plan&, const Shared&, int64_t, void*);
  void (*backward_merge)(const AttentionParams&, const Plan&, const Shared&, int64_t);
  void (*backward_merge_v)(const AttentionParams&, const Plan&, const Shared&);
  int64_t (*multiply_adds)();
};

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

}  // namespace fused_attn
