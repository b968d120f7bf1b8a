// Compiled once per instruction set. Its only exported symbol is the table of entry points.
#include "backward.h"
#include "backward_merge.h"
#include "forward.h"
#include "peak.h"

#ifndef FUSED_ATTN_ISA
#error "FUSED_ATTN_ISA must name the instruction set"
#endif

namespace fused_attn {
namespace {

// Calls f with a null pointer to the storage type, which carries the type.
template <class F>
FA_INLINE auto with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f64:
      return f(static_cast<double*>(nullptr));
    case DType::bf16:
      return f(static_cast<BFloat16*>(nullptr));
    case DType::f16:
      return f(static_cast<Float16*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}
template <class P>
struct Pointee;
template <class X>
struct Pointee<X*> {
  typedef X type;
};
#define FA_TYPE typename Pointee<decltype(tag)>::type

// In a debug build: checks the guards that the task's carver set, found by carving once more.
template <class Task>
FA_INLINE void check_scratch(const AttentionParams& p, const Plan& plan, const Shared& shared,
                             void* scratch) {
  if (kGuardBytes == 0) return;
  Carver carver(scratch, Carver::check);
  Task task(p, plan, shared, carver);
}

ForwardSizes forward_sizes(const AttentionParams& p, const Plan& plan) {
  return with_type(p.dtype, [&](auto tag) {
    Carver carver(nullptr);
    ForwardTask<FA_TYPE> task(p, plan, Shared{}, carver);
    const bool is_split = plan.segments > 1 && !p.scores_only;
    return ForwardSizes{carver.used(), is_split ? Partial<FA_TYPE>(p, plan).bytes() : 0};
  });
}

void forward_task(const AttentionParams& p, const Plan& plan, const Shared& shared, int64_t index,
                  void* scratch) {
  with_type(p.dtype, [&](auto tag) {
    Carver carver(scratch);
    ForwardTask<FA_TYPE>(p, plan, shared, carver).run(index);
    check_scratch<ForwardTask<FA_TYPE>>(p, plan, shared, scratch);
  });
}

void forward_merge(const AttentionParams& p, const Plan& plan, const Shared& shared, int64_t row) {
  with_type(p.dtype, [&](auto tag) { ForwardTask<FA_TYPE>::merge(p, plan, shared, row); });
}

BackwardSizes backward_sizes(const AttentionParams& p, const Plan& plan) {
  return with_type(p.dtype, [&](auto tag) {
    Carver carver(nullptr);
    BackwardTask<FA_TYPE> task(p, plan, Shared{}, carver);
    const Sums<FA_TYPE>& sums = task.sums;
    // The loop of concat sums the gradients of all operands, wanted or not.
    const bool queries = !sums.query_in_place && (p.grad_query || sums.concat);
    return BackwardSizes{carver.used(), queries ? sums.query_bytes() : 0,
                         sums.concat ? sums.v_bytes() : 0,
                         p.grad_centers && !sums.centers_in_place ? sums.center_bytes() : 0};
  });
}

void backward_task(const AttentionParams& p, const Plan& plan, const Shared& shared, int64_t index,
                   void* scratch) {
  with_type(p.dtype, [&](auto tag) {
    Carver carver(scratch);
    BackwardTask<FA_TYPE>(p, plan, shared, carver).run(index);
    check_scratch<BackwardTask<FA_TYPE>>(p, plan, shared, scratch);
  });
}

void backward_merge(const AttentionParams& p, const Plan& plan, const Shared& shared, int64_t row) {
  with_type(p.dtype, [&](auto tag) { merge_query<FA_TYPE>(p, plan, shared, row); });
}

void backward_merge_v(const AttentionParams& p, const Plan& plan, const Shared& shared) {
  with_type(p.dtype, [&](auto tag) { merge_v<FA_TYPE>(p, plan, shared); });
}

}  // namespace

#define FA_JOIN(a, b) a##b
#define FA_ENTRY(isa) FA_JOIN(fused_attn_kernels_, isa)

extern "C" __attribute__((visibility("hidden"))) const KernelTable* FA_ENTRY(FUSED_ATTN_ISA)() {
  static const KernelTable table = {forward_sizes, forward_task,   forward_merge,    backward_sizes,
                                    backward_task, backward_merge, backward_merge_v, multiply_adds};
  return &table;
}

}  // namespace fused_attn
