#include "team.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <utility>

#include "../plan.h"

namespace fused_attn {
namespace {

// The panels [first, end) of a matrix.
PackedMatrix part_of(const PackedMatrix& matrix, int64_t first, int64_t end) {
  const int64_t column = first * kPanel;
  PackedMatrix part = matrix;
  part.outputs = std::min(matrix.outputs, end * kPanel) - column;
  part.panels = static_cast<const char*>(matrix.panels) +
                column * matrix.padded_inputs * compute_bytes(matrix.compute);
  if (matrix.scales) part.scales = matrix.scales + column;
  if (matrix.sums) part.sums = matrix.sums + column;
  return part;
}

}  // namespace

char* Team::Buffer::reserve(int64_t bytes) {
  if (bytes <= size_) return data_.get();
  const int64_t size = round_up(bytes + bytes / 2, 64);
  data_.reset(static_cast<char*>(std::aligned_alloc(64, size_t(size))));
  size_ = data_ ? size : 0;
  if (!data_) throw std::bad_alloc();
  return data_.get();
}

Team::Team(const DecoderKernels& kernels, int helpers, Owners owners, Duration patience)
    : kernels_(kernels),
      owners_(std::move(owners)),
      patience_(patience),
      helpers_(size_t(helpers)),
      inputs_(size_t(helpers) + 1) {
  free_.reserve(helpers_.size());
  shares_.reserve(helpers_.size() + 1);
}

void Team::run(const Share& share) const {
  kernels_.product(share.matrix, share.x, share.rows, share.start, share.start_stride, share.out,
                   share.stride);
}

// A place for rows that no helper reads any more; there is always one.
size_t Team::free_input() const {
  const auto is_read = [&](size_t input) {
    return std::any_of(helpers_.begin(), helpers_.end(), [&](const Helper& helper) {
      return helper.input == input && helper.is_at_work();
    });
  };
  size_t input = 0;
  while (is_read(input)) ++input;
  return input;
}

ConvertedRows Team::copy_rows(const PackedMatrix& matrix, const ConvertedRows& x, int64_t rows,
                              char* to) const {
  const bool is_float = matrix.compute == Compute::f32;
  const int64_t width = is_float ? matrix.inputs : matrix.padded_inputs;
  const int64_t size = compute_bytes(matrix.compute), bytes = width * size;
  for (int64_t row = 0; row < rows; ++row)
    std::memcpy(to + row * bytes, static_cast<const char*>(x.data) + row * x.stride * size,
                size_t(bytes));
  if (!x.scales) return {to, width, nullptr};
  auto* scales = reinterpret_cast<float*>(to + round_up(rows * bytes, 64));
  std::memcpy(scales, x.scales, size_t(rows) * sizeof(float));
  return {to, width, scales};
}

// Gives a helper a share whose rows are at `input`. Its results go to memory of the helper.
void Team::post(Helper& helper, Share share, size_t input) {
  const int64_t columns = share.matrix.outputs;
  auto* results = reinterpret_cast<float*>(
      helper.results.reserve(share.rows * columns * int64_t(sizeof(float))));
  if (share.start && share.start_stride) {  // else it is a vector of the model, or null
    for (int64_t row = 0; row < share.rows; ++row)
      std::memcpy(results + row * columns, share.start + row * share.start_stride,
                  size_t(columns) * sizeof(float));
    share.start = results;
    share.start_stride = columns;
  }
  share.out = results;
  share.stride = columns;
  helper.share = share;
  helper.input = input;
  helper.posted.store(helper.posted.load(std::memory_order_relaxed) + 1, std::memory_order_release);
}

// Takes the results of a helper, or computes them if it is not done by the deadline.
void Team::collect(Helper& helper, const Share& share, Clock::time_point deadline) {
  constexpr int64_t kLeast = 4, kMost = 1024;  // products that a late helper skips
  for (int turn = 1; !helper.is_free(); ++turn) {
    spin_pause();  // never yields: the core may come back after the deadline
    if (turn % 32 == 0 && Clock::now() > deadline) {
      ++redone_;
      helper.backoff = std::clamp(2 * helper.backoff, kLeast, kMost);
      helper.skips = helper.backoff;
      return run(share);
    }
  }
  ++taken_;
  helper.backoff /= 2;
  const int64_t columns = share.matrix.outputs;
  for (int64_t row = 0; row < share.rows; ++row)
    std::memcpy(share.out + row * share.stride, helper.share.out + row * columns,
                size_t(columns) * sizeof(float));
}

bool Team::takes_part(Helper& helper) {
  if (!helper.is_free()) return false;
  if (helper.skips == 0) return true;
  --helper.skips;
  return false;
}

void Team::product(const PackedMatrix& matrix, const ConvertedRows& x, int64_t rows,
                   const float* start, int64_t start_stride, float* out, int64_t stride) {
  const int64_t panels = matrix.panel_count();
  const int64_t most = std::min(panels, matrix.bytes() / kShareBytes);
  free_.clear();
  for (Helper& helper : helpers_)
    if (int64_t(free_.size()) + 1 < most && takes_part(helper)) free_.push_back(&helper);
  if (free_.empty() || rows <= 0)
    return kernels_.product(matrix, x, rows, start, start_stride, out, stride);

  const size_t input = free_input();
  const int64_t row_bytes = matrix.padded_inputs * compute_bytes(matrix.compute);
  const int64_t data = round_up(rows * row_bytes, 64), scales = rows * int64_t(sizeof(float));
  const ConvertedRows copy = copy_rows(matrix, x, rows, inputs_[input].reserve(data + scales));
  const int64_t parts = int64_t(free_.size()) + 1;
  shares_.clear();
  for (int64_t part = 0; part < parts; ++part) {
    // The first share is that of the leader, who begins last: it is the smallest.
    const int64_t first = part * panels / parts, column = first * kPanel;
    shares_.push_back({part_of(matrix, first, (part + 1) * panels / parts), x, rows,
                       start ? start + column : nullptr, start_stride, out + column, stride});
    if (part == 0) continue;
    Share theirs = shares_.back();
    theirs.x = copy;
    post(*free_[size_t(part) - 1], theirs, input);
  }
  const auto begin = Clock::now();
  run(shares_[0]);
  const auto end = Clock::now();
  for (size_t i = 0; i < free_.size(); ++i)
    collect(*free_[i], shares_[i + 1], end + (end - begin) + patience_);
}

void Team::help(int number) {
  const WithFloatMode as_the_leader(mode_);
  Helper& helper = helpers_[size_t(number)];
  uint64_t last = 0;
  helper.done.store(last, std::memory_order_release);
  for (int64_t idle = 0; !is_dismissed_.load(std::memory_order_acquire); ++idle) {
    const uint64_t posted = helper.posted.load(std::memory_order_acquire);
    if (posted == last) {
      spin_or_yield(idle);
      continue;
    }
    run(helper.share);
    helper.done.store(last = posted, std::memory_order_release);
    idle = 0;
  }
}

}  // namespace fused_attn
