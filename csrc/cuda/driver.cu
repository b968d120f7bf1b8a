#include <cuda_runtime.h>

#include <map>
#include <memory>
#include <stdexcept>
#include <string>

#include "counters.h"
#include "driver.h"
#include "kernels.h"

namespace fused_attn {
namespace {

constexpr int kStreams = 128;               // with their own counters: torch has 65 in its pools
constexpr int kCapturedCounters = 1 << 17;  // 512 KiB
constexpr int64_t kMostPositions = 1 << 30;
constexpr int64_t kMostRows = INT32_MAX / kMostQueries;  // of the batch: blocks of a launch

// Zero when the module is loaded, on each device.
__device__ unsigned all_counters[kStreams * kCountersPerCall + kCapturedCounters];

void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error, which a later call would report as its own
  throw std::runtime_error(std::string(call) + " failed: " + cudaGetErrorString(error) + " (" +
                           cudaGetErrorName(error) + ")");
}

// Makes a device the current one for the lifetime of the object.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ == device) return;
    check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = true;
  }
  ~CurrentDevice() {
    if (changed_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

// While a stream captures, CUDA forbids calls that may allocate, such as the first use of a kernel,
// which loads it. Such calls are not part of the captured work here.
class AnyCallWhileCapturing {
 public:
  AnyCallWhileCapturing() {
    check(cudaThreadExchangeStreamCaptureMode(&mode_), "cudaThreadExchangeStreamCaptureMode");
  }
  ~AnyCallWhileCapturing() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

struct Device {
  int multiprocessors = 0;
  unsigned* counters = nullptr;
  CounterSlots slots{kStreams, kCapturedCounters};
};

// The cached facts about a device, which must be the current one.
Device& device_of(int number) {
  static std::mutex mutex;
  static std::map<int, std::unique_ptr<Device>> devices;
  const std::lock_guard<std::mutex> locked(mutex);
  std::unique_ptr<Device>& known = devices[number];
  if (!known) {
    auto device = std::make_unique<Device>();
    check(cudaDeviceGetAttribute(&device->multiprocessors, cudaDevAttrMultiProcessorCount, number),
          "cudaDeviceGetAttribute");
    void* counters = nullptr;
    check(cudaGetSymbolAddress(&counters, all_counters), "cudaGetSymbolAddress");
    device->counters = static_cast<unsigned*>(counters);
    known = std::move(device);
  }
  return *known;
}

// Counters for this call alone, 0 when its kernel starts.
unsigned* take_counters(Device& device, const AttentionParams& p, const Plan& plan) {
  const auto stream = static_cast<cudaStream_t>(p.stream);
  cudaStreamCaptureStatus status;
  check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  const int64_t count = p.B * plan.query_tiles;
  const bool capturing = status != cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  // Not on a capturing stream: asking for its number ends the capture with an error.
  if (!capturing) check(cudaStreamGetId(stream, &id), "cudaStreamGetId");
  const int64_t first = device.slots.take(id, capturing, count);
  if (first >= 0) return device.counters + first;
  auto* own = reinterpret_cast<unsigned*>(p.workspace + workspace_floats(p, plan) - count);
  check(cudaMemsetAsync(own, 0, size_t(count) * sizeof(unsigned), stream), "cudaMemsetAsync");
  return own;
}

const void* kernel_for(const AttentionParams& p, const Plan& plan) {
  if (p.dtype == DType::f32) return cuda_kernel_f32(p.score, plan);
  if (p.dtype == DType::bf16) return cuda_kernel_bf16(p.score, plan);
  if (p.dtype == DType::f16) return cuda_kernel_f16(p.score, plan);
  throw std::invalid_argument("the cuda backend has no kernel for float64");
}

void check_sizes(const AttentionParams& p) {
  if (p.B > kMostRows || p.T > kMostQueries || p.E > kLargestWidth || p.K > kLargestWidth ||
      p.S > kMostPositions)
    throw std::invalid_argument("too large for the cuda backend");
  if (p.score == Score::concat && !p.memory_exp.data)
    throw std::invalid_argument("the cuda backend needs the exponentials of a prepared memory");
}

bool is_empty(const AttentionParams& p) { return p.B == 0 || p.T == 0 || p.E == 0; }

}  // namespace

int cuda_toolkit() { return CUDART_VERSION; }

int64_t cuda_workspace(const AttentionParams& p) {
  check_sizes(p);
  if (is_empty(p)) return 0;
  const CurrentDevice current(p.device);
  const AnyCallWhileCapturing allowed;
  return workspace_floats(p, plan_decode(p, device_of(p.device).multiprocessors));
}

void cuda_forward(const AttentionParams& p) {
  check_sizes(p);
  if (is_empty(p)) return;
  const CurrentDevice current(p.device);
  const AnyCallWhileCapturing allowed;
  Device& device = device_of(p.device);
  const Plan plan = plan_decode(p, device.multiprocessors);
  const void* kernel = kernel_for(p, plan);
  unsigned* counters = plan.splits > 1 ? take_counters(device, p, plan) : nullptr;
  Decode decode = prepare_decode(p, plan, counters);
  void* arguments[] = {&decode};
  const dim3 blocks(unsigned(p.B * plan.query_tiles * plan.splits)),
      threads(unsigned(plan.warps) * 32);
  check(cudaLaunchKernel(kernel, blocks, threads, arguments,
                         size_t(plan.shared_floats) * sizeof(float),
                         static_cast<cudaStream_t>(p.stream)),
        "cudaLaunchKernel");
}

}  // namespace fused_attn
