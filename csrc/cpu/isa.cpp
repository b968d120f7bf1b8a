#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fused_attn {

#define FA_DECLARE_DECODER(isa) const DecoderKernels* fused_attn_decoder_kernels_##isa();
#define FA_DECLARE(isa)                          \
  const KernelTable* fused_attn_kernels_##isa(); \
  FA_DECLARE_DECODER(isa)

extern "C" {
FA_DECLARE(generic)
#ifdef FUSED_ATTN_HAVE_AVX2
FA_DECLARE(avx2)
#endif
#ifdef FUSED_ATTN_HAVE_AVX2_VNNI
FA_DECLARE_DECODER(avx2_vnni)
#endif
#ifdef FUSED_ATTN_HAVE_AVX512
FA_DECLARE(avx512)
FA_DECLARE_DECODER(avx512_vnni)
#endif
#ifdef FUSED_ATTN_HAVE_AVX512_BF16
FA_DECLARE(avx512_bf16)
#endif
#ifdef FUSED_ATTN_HAVE_AVX512_AMX
FA_DECLARE_DECODER(avx512_amx)
#endif
}

namespace {

struct Isa {
  std::string name;
  bool supported;
  const KernelTable* (*attention)();
  const DecoderKernels* (*decoder)();
  bool own_attention;
};

#if defined(__x86_64__)
bool has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

// Whether the processor has AMX for bfloat16 and int8, and Linux lets this process use the tiles.
// Linux gives them to a process that asks, with all its threads.
bool has_amx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  constexpr unsigned kAll = kBFloat16 | kTile | kInt8;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// Best first. __builtin_cpu_supports also checks that the system saves the registers.
std::vector<Isa> built_isas() {
  std::vector<Isa> isas;
  const auto add = [&](const char* name, bool supported, auto attention, auto decoder,
                       bool own_attention = true) {
    isas.push_back({name, supported, attention, decoder, own_attention});
  };
#ifdef FUSED_ATTN_HAVE_AVX512
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
#ifdef FUSED_ATTN_HAVE_AVX512_BF16
  const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
#ifdef FUSED_ATTN_HAVE_AVX512_AMX
  add("avx512_amx", bf16 && has_amx(), fused_attn_kernels_avx512_bf16,
      fused_attn_decoder_kernels_avx512_amx, false);
#endif
  add("avx512_bf16", bf16, fused_attn_kernels_avx512_bf16, fused_attn_decoder_kernels_avx512_bf16);
#endif
  add("avx512_vnni", vnni, fused_attn_kernels_avx512, fused_attn_decoder_kernels_avx512_vnni,
      false);
  add("avx512", avx512, fused_attn_kernels_avx512, fused_attn_decoder_kernels_avx512);
#endif
#ifdef FUSED_ATTN_HAVE_AVX2
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
#ifdef FUSED_ATTN_HAVE_AVX2_VNNI
  add("avx2_vnni", avx2 && has_avx_vnni(), fused_attn_kernels_avx2,
      fused_attn_decoder_kernels_avx2_vnni, false);
#endif
  add("avx2", avx2, fused_attn_kernels_avx2, fused_attn_decoder_kernels_avx2);
#endif
  const bool always = true;
  add("generic", always, fused_attn_kernels_generic, fused_attn_decoder_kernels_generic);
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
std::atomic<const Isa*> choice{nullptr};

const Isa& chosen() {
  if (const Isa* known = choice) return *known;  // a fork may have copied a locked mutex
  std::lock_guard<std::mutex> lock(choice_mutex);
  if (!choice) {
    const char* forced = std::getenv("FUSED_ATTN_CPU_ISA");
    if (forced && *forced) choice = &find(forced, "the environment variable FUSED_ATTN_CPU_ISA");
    for (const Isa& isa : all())
      if (!choice && isa.supported) choice = &isa;
  }
  return *choice.load();
}

}  // namespace

std::vector<std::string> cpu_isas_supported() {
  std::vector<std::string> names;
  for (const Isa& isa : all())
    if (isa.supported) names.push_back(isa.name);
  return names;
}

std::vector<std::string> attention_isas_supported() {
  std::vector<std::string> names;
  for (const Isa& isa : all())
    if (isa.supported && isa.own_attention) names.push_back(isa.name);
  return names;
}

const std::string& cpu_isa() { return chosen().name; }

void set_cpu_isa(const std::string& name) {
  const Isa& isa = find(name, "name");
  std::lock_guard<std::mutex> lock(choice_mutex);
  choice = &isa;
}

const KernelTable& kernels() { return *chosen().attention(); }
const DecoderKernels& decoder_kernels() { return *chosen().decoder(); }

}  // namespace fused_attn
