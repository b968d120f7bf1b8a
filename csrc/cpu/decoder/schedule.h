// How a call of the native decoder uses its threads: blocks of sentences beside one another, or one
// block that they share.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "buffers.h"
#include "interruption.h"
#include "kernels.h"
#include "model.h"
#include "team.h"

namespace fused_attn {

// What the thread of a block works with.
struct Worker {
  Arena& arena;
  Interruption& interruption;
  Team& team;
};

struct Schedule {
  std::vector<const Model*> models;
  int64_t beams = 1;  // rows of each sentence
  int threads = 1;
  Check check = nullptr;
};

// Runs body(block, worker) for blocks of sentences, which are numbers of `lengths`, longest first.
void for_each_block(const Schedule& schedule, const std::vector<int64_t>& lengths,
                    const DecoderKernels& kernels,
                    const std::function<void(const std::vector<int64_t>&, Worker&)>& body);

}  // namespace fused_attn
