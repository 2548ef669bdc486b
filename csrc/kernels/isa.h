// Which set of kernels runs.
//
// The processor is asked once, at first use; from then on the choice is one pointer. A call through a table costs
// nothing beside the loops behind it, every level can be tested in one process (set_isa), and the build needs no
// -march. The alternative, target_clones, would leave the choice to the loader, where tests cannot change it. The
// environment variable AWQ_EXT_ISA names a level to use instead, e.g. to reproduce another machine's floats.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "kernels/processor.h"

namespace awq {

enum class Isa { scalar, amx_plain, avx2, avx512, amx_emulated, avx512_vnni, avx512_bf16, amx, neon };

const char* isa_name(Isa isa);
// Levels that this build has and this processor runs, the least first.
std::vector<Isa> available_isas();

// All that decides which levels run and which is fastest. Tests make up machines that are not at hand.
struct Machine {
  Processor processor;
  bool (*tiles_agree)(const KernelTable& table, const KernelTable& other);  // tile_check.h; asked where there is AMX
};
struct DefaultIsa {
  Isa isa;
  const char* reason;  // in a few words
};
// The level that is fastest on a machine, by its vendor and instructions: isa.cpp has the reasons.
DefaultIsa default_isa(const Machine& machine);
// On this one.
DefaultIsa default_isa();

// The level in use. The first call reads AWQ_EXT_ISA; std::invalid_argument if that is not an available level.
Isa current_isa();
// Throws std::invalid_argument, naming the choices, if the level is unknown or not available here.
void set_isa(const std::string& name);
// The kernels of current_isa().
const KernelTable& kernels();

}  // namespace awq
