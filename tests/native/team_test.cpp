// Teams of the native decoder under ThreadSanitizer, with the threads of Helpers. The kernels and
// the team are instrumented, so what a late helper reads and writes is seen.
#include "cpu/decoder/team.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/decoder/helpers.h"
#include "cpu/decoder/pack.h"
#include "cpu/isa.h"

namespace {

using namespace fused_attn;

thread_local bool is_leader = false;
std::atomic<const DecoderKernels*> plain{nullptr};

// Every third share of a helper takes longer than any leader waits.
void product_with_pauses(const PackedMatrix& matrix, const ConvertedRows& x, int64_t rows,
                         const float* start, int64_t start_stride, float* out, int64_t stride) {
  static std::atomic<int> shares{0};
  if (!is_leader && shares++ % 3 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(3));
  plain.load()->product(matrix, x, rows, start, start_stride, out, stride);
}

struct Counts {
  int64_t taken = 0, redone = 0, wrong = 0;
};

// Steps h = W h / 8 + h of a leader with helpers, whose rows and results change at each step.
Counts lead(int steps, int helpers, unsigned seed) {
  constexpr int64_t kWidth = 320, kRows = 3;
  is_leader = true;
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, 0.05f);
  std::vector<float> weights(size_t(kWidth * kWidth)), state(size_t(kRows * kWidth), 1.0f);
  for (float& weight : weights) weight = normal(generator);
  const auto packed =
      std::make_shared<PackedWeights>(Compute::f32, weights.data(), kWidth, kWidth, kWidth, 1);
  DecoderKernels kernels = decoder_kernels();
  kernels.product = product_with_pauses;
  const auto kept = std::make_shared<DecoderKernels>(kernels);
  const auto team = std::make_shared<Team>(*kept, helpers, Team::Owners{packed, kept});
  Helpers::of_process().send(helpers, team);
  Counts counts;
  for (int step = 0; step < steps; ++step) {
    std::vector<float> before = state, alone = state;
    decoder_kernels().product(packed->matrix(), {before.data(), kWidth, nullptr}, kRows,
                              alone.data(), kWidth, alone.data(), kWidth);
    team->product(packed->matrix(), {before.data(), kWidth, nullptr}, kRows, state.data(), kWidth,
                  state.data(), kWidth);
    counts.wrong += state != alone;
    for (float& value : state) value = value > 4.0f || value < -4.0f ? 1.0f : value;
    std::this_thread::sleep_for(std::chrono::microseconds(step % 5 * 200));
  }
  team->dismiss();
  counts.taken = team->shares_taken();
  counts.redone = team->shares_redone();
  return counts;
}

}  // namespace

// Two leaders at the same time, then one more: they share the helpers. Returns failures.
int check_teams() {
  int failures = 0;
  for (const std::string& isa : attention_isas_supported()) {
    set_cpu_isa(isa);
    plain = &decoder_kernels();
    std::vector<Counts> found(3);
    std::thread other([&] { found[0] = lead(150, 2, 1); });
    found[1] = lead(150, 2, 2);
    other.join();
    found[2] = lead(150, 2, 3);
    Counts sum;
    for (const Counts& counts : found) {
      sum.taken += counts.taken;
      sum.redone += counts.redone;
      sum.wrong += counts.wrong;
    }
    std::printf("%s: teams: %d shares taken, %d done again\n", isa.c_str(), int(sum.taken),
                int(sum.redone));
    failures += sum.wrong || !sum.taken || !sum.redone;
    if (sum.wrong) std::printf("%d products of a team are wrong\n", int(sum.wrong));
    if (!sum.taken) std::printf("no share of a helper was used\n");
    if (!sum.redone) std::printf("no helper was late\n");
  }
  return failures;
}
