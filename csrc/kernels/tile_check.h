// Whether tile registers compute what their plain form does (amx-tiles-inl.h).
#pragma once

#include "kernels/kernels.h"

namespace awq {

// Runs both forms on small products of integers, which are exact: groups of whole tiles, of part of one and of a single
// step, one half of rows and two, decoded on the way and before. Takes some ten microseconds on real tiles.
bool tiles_agree(const KernelTable& table, const KernelTable& other);

}  // namespace awq
