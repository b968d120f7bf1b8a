// Products that a team shares, with helpers that can be made slow.
#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <vector>

#include "cpu/decoder/pack.h"
#include "cpu/decoder/team.h"
#include "cpu/isa.h"
#include "decoder_checks.h"

namespace fused_attn {
namespace {

std::atomic<int> pause_ms{0};  // of a helper before a share
thread_local bool is_helper = false;

DecoderKernels kernels_with_pauses() {
  DecoderKernels kernels = decoder_kernels();
  kernels.product = [](const PackedMatrix& matrix, const ConvertedRows& x, int64_t rows,
                       const float* start, int64_t start_stride, float* out, int64_t stride) {
    if (is_helper && pause_ms) std::this_thread::sleep_for(std::chrono::milliseconds(pause_ms));
    decoder_kernels().product(matrix, x, rows, start, start_stride, out, stride);
  };
  return kernels;
}

// A team whose leader is the calling thread.
class TeamOfTest {
 public:
  TeamOfTest(int helpers, int present, int patience_ms)
      : kernels_(kernels_with_pauses()),
        team_(std::make_unique<Team>(kernels_, helpers, Team::Owners{},
                                     std::chrono::milliseconds(patience_ms))) {
    for (int number = 0; number < present; ++number)
      threads_.emplace_back([this, number] {
        is_helper = true;
        team_->help(number);
      });
  }
  ~TeamOfTest() { close(); }

  void close() {
    team_->dismiss();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
    owners_.clear();
  }

  void product(const py::object& weights, const py::handle& x, const py::object& start,
               const py::handle& out) {
    owners_.push_back(weights);
    owners_.push_back(start);
    run_product(py::cast<const PackedWeights&>(weights), x, start, out,
                [&](auto... arguments) { team_->product(arguments...); });
  }

  int64_t taken() const { return team_->shares_taken(); }
  int64_t redone() const { return team_->shares_redone(); }

 private:
  const DecoderKernels kernels_;
  std::unique_ptr<Team> team_;
  std::vector<std::thread> threads_;
  std::vector<py::object> owners_;  // what a late helper may still read
};

}  // namespace

void add_decoder_team_checks(py::module_& checks) {
  py::class_<TeamOfTest>(checks, "Team")
      .def(py::init<int, int, int>(), py::arg("helpers"), py::arg("present"),
           py::arg("patience_ms"))
      .def("product", &TeamOfTest::product, py::arg("weights"), py::arg("x"), py::arg("start"),
           py::arg("out"), "As the function `product`, by the team.")
      .def("close", &TeamOfTest::close)
      .def_property_readonly("taken", &TeamOfTest::taken, "Shares of helpers that were used.")
      .def_property_readonly("redone", &TeamOfTest::redone, "Shares that the leader did again.");
  checks.def(
      "pause_helpers", [](int ms) { pause_ms = ms; }, py::arg("ms"),
      "Milliseconds that helpers wait before each share.");
}

}  // namespace fused_attn
