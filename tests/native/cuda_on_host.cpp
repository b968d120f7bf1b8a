// csrc/cuda as a shared library that computes on the CPU; tests/test_cuda_kernels.py calls it.
#include "cuda_on_host.h"

// After it, because it stands for what the CUDA compiler declares by itself.
#include "cuda/counters.h"
#include "cuda/dispatch.h"

using namespace fused_attn;

namespace {

thread_local std::string message;

Kernel kernel_for(const AttentionParams& p, const Plan& plan) {
  if (p.dtype == DType::f32) return find_kernel<F32>(p.score, plan);
  if (p.dtype == DType::bf16) return find_kernel<BF16>(p.score, plan);
  return find_kernel<F16>(p.score, plan);
}

Plan plan_of(const AttentionParams& p, int multiprocessors, int splits) {
  Plan plan = plan_decode(p, multiprocessors);
  if (splits > 0) plan.splits = splits;
  return plan;
}

}  // namespace

extern "C" {

size_t size_of_params() { return sizeof(AttentionParams); }

// (elements, queries, rows, warps, query tiles, splits, shared floats)
void plan_call(const AttentionParams* p, int multiprocessors, int64_t* fields) {
  const Plan plan = plan_of(*p, multiprocessors, 0);
  const int64_t found[] = {plan.elements,    plan.queries, plan.rows,         plan.warps,
                           plan.query_tiles, plan.splits,  plan.shared_floats};
  std::copy(std::begin(found), std::end(found), fields);
}

// Runs the call, with as many splits as asked for or (0) as planned. Returns null, or what failed.
const char* run_call(const AttentionParams* given, int multiprocessors, int splits, uint64_t seed) {
  AttentionParams p = *given;
  const Plan plan = plan_of(p, multiprocessors, splits);
  on_host::Guarded workspace(size_t(workspace_floats(p, plan)) * sizeof(float));
  p.workspace = reinterpret_cast<float*>(workspace.data);
  std::vector<unsigned> counters(size_t(p.B * plan.query_tiles), 0);
  const Decode decode = prepare_decode(p, plan, counters.data());
  const Kernel kernel = kernel_for(p, plan);
  try {
    on_host::launch(unsigned(p.B * plan.query_tiles * plan.splits), unsigned(plan.warps * kLanes),
                    size_t(plan.shared_floats) * sizeof(float), seed, [&] { kernel(decode); });
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  for (unsigned counter : counters) {
    if (counter != 0) return "a counter is not 0 again";
  }
  return nullptr;
}

// Memory of the caller's that ends at a page which must not be touched.
void* guarded_alloc(size_t bytes) { return new on_host::Guarded(bytes); }
void* guarded_data(void* guarded) { return static_cast<on_host::Guarded*>(guarded)->data; }
void guarded_free(void* guarded) { delete static_cast<on_host::Guarded*>(guarded); }

void* new_counters(int slots, int captured) { return new CounterSlots(slots, captured); }
void delete_counters(void* counters) { delete static_cast<CounterSlots*>(counters); }
int64_t take_counters(void* counters, uint64_t stream, bool capturing, int64_t count) {
  return static_cast<CounterSlots*>(counters)->take(stream, capturing, count);
}

}  // extern "C"
