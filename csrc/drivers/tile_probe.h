// Whether tile registers survive when the system takes the processor away from a thread. On some virtual machines they
// have come back as zeros (erratum SPR4 of Intel's Sapphire Rapids): products would then be wrong without a word.
#pragma once

#include "kernels/kernels.h"

namespace awq {

struct TileProbe {
  int holds;      // times that tiles were filled and looked at again some milliseconds later
  int preempted;  // of these, with another thread on the processor in between
  int damaged;    // with other contents than before
};

// Runs more spinning threads than there are processors, for about `milliseconds`. All zero on a level without tiles.
TileProbe probe_tiles(const KernelTable& table, int milliseconds);

}  // namespace awq
