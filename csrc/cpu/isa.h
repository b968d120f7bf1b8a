// The choice of the instruction set, made once. Compiled without instruction-set flags, so that
// asking never executes an instruction the processor lacks.
#pragma once

#include <string>
#include <vector>

#include "decoder/kernels.h"
#include "plan.h"

namespace fused_attn {

// Instruction sets that this build contains and this processor can run, best first. Asks Linux for
// the tiles of AMX, for the whole process.
std::vector<std::string> cpu_isas_supported();

// Those of them that have attention kernels of their own; the others differ in the decoder only.
std::vector<std::string> attention_isas_supported();

// The one in use: FUSED_ATTN_CPU_ISA if set, else the best. Throws std::invalid_argument, which
// names the possible values, if the variable names one that cannot run.
const std::string& cpu_isa();

// Switches to another; for tests. Throws like cpu_isa.
void set_cpu_isa(const std::string& name);

// Entry points of the one in use.
const KernelTable& kernels();
const DecoderKernels& decoder_kernels();

}  // namespace fused_attn
