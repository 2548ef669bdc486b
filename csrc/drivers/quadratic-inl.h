// The body of quadratic_losses. Rows are made, packed and multiplied in slabs, so that memory stays bounded.
#pragma once

#include <algorithm>

#include "base/layout.h"
#include "base/parallel.h"
#include "drivers/quadratic.h"

namespace awq {

template <class MakeRow>
void quadratic_losses(const MomentPanels& g, int64_t count, int threads, const MakeRow& make_row, double* losses) {
  constexpr int64_t kSlabFloats = 4 << 20;  // 16 MiB of rows, and as much for their panels
  constexpr int64_t kPanelsPerTask = 18;    // with a block of k about a quarter of a second-level cache (of its 2 MiB
                                            // where there are tile registers)
  const int64_t mr = g.shape().rows, stride = g.row_stride(), blocks = g.block_count();
  const int64_t panel_bytes = row_panel_bytes(g);
  const int64_t slab_panels =
      std::min(ceil_div(count, mr), round_up(std::max<int64_t>(1, kSlabFloats / (stride * mr)), kPanelsPerTask));
  Buffer<float> rows(slab_panels * mr * stride);
  Buffer<char> panels(slab_panels * panel_bytes);
  Buffer<double> parts(blocks * slab_panels * mr);  // one sum per block of k: added in a fixed order afterwards

  for (int64_t first = 0; first < count; first += slab_panels * mr) {
    const int64_t used = std::min(slab_panels, ceil_div(count - first, mr));
    parallel_for(used, threads, [&](int64_t p, int thread) {
      float* panel_rows = rows.get() + p * mr * stride;
      for (int64_t r = 0; r < mr; ++r) {
        const int64_t index = first + p * mr + r;
        if (index < count)
          make_row(index, panel_rows + r * stride, thread);
        else
          std::fill_n(panel_rows + r * stride, stride, 0.0f);
      }
      pack_row_panel(g, panel_rows, panels.get() + p * panel_bytes);
    });
    std::fill_n(parts.get(), blocks * used * mr, 0.0);
    const int64_t bundles = ceil_div(used, kPanelsPerTask);
    parallel_for(blocks * bundles, threads, [&](int64_t task, int) {  // the longest blocks come first
      const ProductTask product_task(g.table(), g.precision());
      const int64_t block = task / bundles, p = task % bundles * kPanelsPerTask;
      g.add_block(block, panels.get() + p * panel_bytes, rows.get() + p * mr * stride,
                  std::min(kPanelsPerTask, used - p), parts.get() + (block * used + p) * mr);
    });
    for (int64_t r = 0; r < std::min(used * mr, count - first); ++r) {
      double sum = 0.0;
      for (int64_t block = 0; block < blocks; ++block) sum += parts.get()[block * used * mr + r];
      losses[first + r] = sum;
    }
  }
}

}  // namespace awq
