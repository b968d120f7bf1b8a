#include "schedule.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <utility>

#include "../parallel.h"
#include "helpers.h"

namespace fused_attn {
namespace {

// Rows of a block: enough that reading the weights costs less than multiplying with them.
constexpr int64_t kBlockRows = 128;
// Threads share a block if it has at most this many rows for each of them, and in all. With more
// rows, multiplying takes longer than reading, and separate blocks are faster: they also run in
// parallel what is not a product.
constexpr int64_t kSharedRows = 8, kMostSharedRows = 32;

// The arena of this thread, reset when a task ends. A task within another, which a signal handler
// may run, has an arena of its own.
class ThreadArena {
 public:
  ThreadArena() : is_inner_(kept().is_used) { kept().is_used = true; }
  ~ThreadArena() {
    if (is_inner_) return;
    kept().arena.reset();
    kept().is_used = false;
  }
  Arena& arena() { return is_inner_ ? own_ : kept().arena; }

 private:
  struct Kept {
    Arena arena;
    bool is_used = false;
  };
  static Kept& kept() {
    thread_local Kept of_thread;
    return of_thread;
  }

  const bool is_inner_;
  Arena own_;
};

// Sentences by length, longest first.
std::vector<int64_t> longest_first(const std::vector<int64_t>& lengths) {
  std::vector<int64_t> order(lengths.size());
  std::iota(order.begin(), order.end(), int64_t(0));
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
  return order;
}

// The sentences cut into blocks, at least one for each thread if there are enough.
std::vector<std::vector<int64_t>> blocks_of(const std::vector<int64_t>& order, int64_t beams,
                                            int threads) {
  const int64_t count = int64_t(order.size());
  const int64_t shared = (count + threads - 1) / std::max(threads, 1);
  const int64_t size = std::max<int64_t>(1, std::min(shared, kBlockRows / beams));
  std::vector<std::vector<int64_t>> blocks;
  for (int64_t first = 0; first < count; first += size)
    blocks.emplace_back(order.begin() + first, order.begin() + std::min(first + size, count));
  return blocks;
}

// Threads that share a block of these rows; 1 if they are better apart. A fork has no helpers:
// their threads, and perhaps a locked mutex, are those of its parent.
int team_of(const Schedule& schedule, int64_t rows) {
  if (schedule.threads <= 1 || rows > kMostSharedRows || is_forked()) return 1;
  int64_t shares = 1;
  for (const Model* model : schedule.models)
    shares = std::max(shares, model->largest_bytes / Team::kShareBytes);
  if (shares == 1) return 1;
  const int64_t size = std::min<int64_t>({schedule.threads, shares, Cores::of_thread().count()});
  return rows <= kSharedRows * size ? int(size) : 1;
}

}  // namespace

void for_each_block(const Schedule& schedule, const std::vector<int64_t>& lengths,
                    const DecoderKernels& kernels,
                    const std::function<void(const std::vector<int64_t>&, Worker&)>& body) {
  const std::vector<int64_t> order = longest_first(lengths);
  if (order.empty()) return;
  Interruption interruption(schedule.check);
  const auto run = [&](const std::vector<int64_t>& block, Team& team) {
    ThreadArena arena;
    Worker worker{arena.arena(), interruption, team};
    body(block, worker);
  };
  const int together = team_of(schedule, int64_t(order.size()) * schedule.beams);
  if (together > 1) {
    Team::Owners owners;
    for (const Model* model : schedule.models) owners.push_back(model->owner);
    const auto team = std::make_shared<Team>(kernels, together - 1, std::move(owners));
    const struct AtTheEnd {
      Team& team;
      ~AtTheEnd() { team.dismiss(); }
    } at_the_end{*team};
    Helpers::of_process().send(together - 1, team);
    return run(order, *team);
  }
  const auto blocks = blocks_of(order, schedule.beams, schedule.threads);
  parallel_for(int64_t(blocks.size()), schedule.threads, [&](int64_t index) {
    Team alone(kernels);
    run(blocks[index], alone);
  });
}

}  // namespace fused_attn
