// The only place that opens an OpenMP region.
//
// Work is split over outputs, never over a sum, so results do not depend on the number of threads. The number comes
// from the caller, who asks torch (at::get_num_threads): one setting governs both.
#pragma once

#include <omp.h>

#include <cstdint>

namespace awq {

// Calls body(index, thread) for every index in [0, count), in any order; thread < threads tells which scratch buffer to
// use. body must not throw: an exception cannot leave an OpenMP region.
template <class Body>
void parallel_for(int64_t count, int threads, const Body& body) {
  if (threads <= 1 || count <= 1 || omp_in_parallel()) {
    for (int64_t i = 0; i < count; ++i) body(i, 0);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < count; ++i) body(i, omp_get_thread_num());
}

}  // namespace awq
