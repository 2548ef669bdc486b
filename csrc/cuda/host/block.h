// What the parts of the emulated GPU need of each other; kernels do not include this.
#pragma once

#include <cstdint>

namespace awq::cuda {

// Ends the process, naming the block that runs.
[[noreturn]] void fail(const char* what);

// Lets the other threads run until met(of).
void wait_for(bool (*met)(const void*), const void* of);

// Lets the other threads run first, those too that now can go on.
void give_way();

// Bytes of shared memory that the block asked for.
int64_t shared_size();

// Whether AWQ_EMULATED_COPIES says that copies are done when they are asked for.
bool early_copies();

// Of hopper.cpp, called before and after each block; the second fails where something was begun and not waited for.
void begin_block();
void end_block(int threads);
// Called when no thread can go on: does one copy that a thread waits for. Returns false where there is none.
bool finish_copy();

}  // namespace awq::cuda
