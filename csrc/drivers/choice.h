// Which product computes y = x W^T: by the level of kernels, the type of the activations, and how many rows there are.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "drivers/activations.h"
#include "drivers/linear.h"
#include "kernels/kernels.h"

namespace awq {

// How a product is computed depends on its number of rows:
//
//   stream   the weight is read once, from one end to the other, and decoded on the way for all rows at once
//   decode   blocks of rows take turns on a part of the weight that stays in the cache; each decodes it
//   panel    such a part is decoded once, into a panel that all blocks of rows read
enum class Way { stream, decode, panel };

struct Choice {
  Element element;
  int terms;  // rows of elements that make a row of activations: see activations.h
  Way way;
  int64_t block_rows;  // of elements, at most
};

Choice choose(const KernelTable& table, Dtype dtype, Compute compute, int64_t rows);

// For a person: what each job uses on this level, and why, in a few words.
struct Job {
  std::string job, kernel, reason;
};
std::vector<Job> describe_choices(const KernelTable& table);

}  // namespace awq
