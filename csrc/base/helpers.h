// Threads that help a loop when the machine is shared with other work. Unlike an OpenMP team they cost nothing while
// they wait, and a loop never waits for a helper that has not begun to work on it.
#pragma once

#include "base/parallel.h"

namespace awq {

// Runs a loop on the calling thread and on at most threads - 1 helpers, as many as come in time. Helpers are started
// when they are first needed and stay; two callers at once share them.
void run_with_helpers(const Loop& loop, int threads);

// Whether this thread is running the body of such a loop.
bool in_helped_loop();

// Whether this process was forked from one that had loaded this library.
bool is_forked_child();

}  // namespace awq
