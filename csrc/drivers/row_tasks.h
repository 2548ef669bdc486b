// Weight rows split into tasks, each of which holds panels of rows (as many as a tile is high or wide) side by side.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "base/layout.h"
#include "base/parallel.h"

namespace awq {

// Calls work(mine, first, end) for weight rows first .. end until all `rows` are done. mine: a thread's own, made by
// make(panels), which is what a task holds at most. As many tasks for every thread, all of about the same size and of
// at most `most` panels.
template <class Make, class Work>
void for_row_tasks(int64_t rows, int64_t panel_rows, int64_t most, int threads, const Make& make, const Work& work) {
  const int64_t panels = ceil_div(rows, panel_rows);
  const int64_t tasks = std::min(panels, round_up(ceil_div(panels, most), threads));
  std::vector<decltype(make(panels))> of_thread;
  for (int64_t t = 0; t < threads; ++t) of_thread.push_back(make(ceil_div(panels, tasks)));
  parallel_for(tasks, threads, [&](int64_t task, int thread) {
    const int64_t first = task * panels / tasks * panel_rows, end = (task + 1) * panels / tasks * panel_rows;
    work(of_thread[static_cast<size_t>(thread)], first, std::min(end, rows));
  });
}

}  // namespace awq
