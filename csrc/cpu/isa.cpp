#include "isa.h"

#include <cstdlib>
#include <mutex>
#include <stdexcept>

namespace fused_attn {

extern "C" {
const KernelTable* fused_attn_kernels_generic();
#ifdef FUSED_ATTN_HAVE_AVX2
const KernelTable* fused_attn_kernels_avx2();
#endif
#ifdef FUSED_ATTN_HAVE_AVX512
const KernelTable* fused_attn_kernels_avx512();
#endif
#ifdef FUSED_ATTN_HAVE_AVX512_BF16
const KernelTable* fused_attn_kernels_avx512_bf16();
#endif
}

namespace {

struct Isa {
  std::string name;
  bool supported;
  const KernelTable* (*table)();
};

// Best first. __builtin_cpu_supports also checks that the system saves the registers.
std::vector<Isa> built_isas() {
  std::vector<Isa> isas;
#ifdef FUSED_ATTN_HAVE_AVX512
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#ifdef FUSED_ATTN_HAVE_AVX512_BF16
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  isas.push_back({"avx512_bf16", bf16, fused_attn_kernels_avx512_bf16});
#endif
  isas.push_back({"avx512", avx512, fused_attn_kernels_avx512});
#endif
#ifdef FUSED_ATTN_HAVE_AVX2
  isas.push_back({"avx2",
                  __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c"),
                  fused_attn_kernels_avx2});
#endif
  const bool always = true;
  isas.push_back({"generic", always, fused_attn_kernels_generic});
  return isas;
}

const std::vector<Isa>& all() {
  static const std::vector<Isa> isas = built_isas();
  return isas;
}

const Isa& find(const std::string& name, const char* source) {
  std::string possible;
  for (const Isa& isa : all()) {
    if (!isa.supported) continue;
    if (isa.name == name) return isa;
    possible += (possible.empty() ? "" : ", ") + isa.name;
  }
  throw std::invalid_argument(std::string(source) + " must be one of " + possible +
                              " on this machine, got '" + name + "'");
}

std::mutex choice_mutex;
const Isa* choice = nullptr;

const Isa& chosen() {
  std::lock_guard<std::mutex> lock(choice_mutex);
  if (!choice) {
    const char* forced = std::getenv("FUSED_ATTN_CPU_ISA");
    if (forced && *forced) choice = &find(forced, "the environment variable FUSED_ATTN_CPU_ISA");
    for (const Isa& isa : all())
      if (!choice && isa.supported) choice = &isa;
  }
  return *choice;
}

}  // namespace

std::vector<std::string> cpu_isas_supported() {
  std::vector<std::string> names;
  for (const Isa& isa : all())
    if (isa.supported) names.push_back(isa.name);
  return names;
}

const std::string& cpu_isa() { return chosen().name; }

void set_cpu_isa(const std::string& name) {
  const Isa& isa = find(name, "name");
  std::lock_guard<std::mutex> lock(choice_mutex);
  choice = &isa;
}

const KernelTable& kernels() { return *chosen().table(); }

}  // namespace fused_attn
