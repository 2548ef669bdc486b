// What copies.cpp and products.cpp need of each other.
#pragma once

#include <cstdint>

namespace awq::cuda {

// Whether bytes begin .. end of shared memory are what a copy has still to bring, or what a product has still to read.
bool being_copied(int64_t begin, int64_t end);
bool read_by_products(int64_t begin, int64_t end);

void begin_copies();
void end_copies();

}  // namespace awq::cuda
