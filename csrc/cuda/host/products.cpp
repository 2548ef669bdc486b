// Products of a warpgroup; see host/hopper.h.
//
// A warp's share of D, 16 rows, needs that warp's share of A only, so each warp does its own when it waits.
#include <cstring>
#include <utility>
#include <vector>

#include "cuda/hopper.h"
#include "cuda/host/block.h"
#include "cuda/host/hopper_parts.h"

namespace awq::cuda {
namespace {

// Where B lies, of a descriptor (PTX manual, "Matrix Descriptor Format" and "Strides"), its channels contiguous.
struct Matrix {
  int64_t begin, next_channels, next_columns;  // next_channels: bytes from eight channels to the next
  int row;                                     // bytes of a column that are together: 16, 32, 64 or 128

  explicit Matrix(uint64_t descriptor) {
    const auto field = [&](int bit) { return static_cast<int64_t>(descriptor >> bit & 0x3fff) * 16; };
    begin = field(0);
    next_channels = field(16);
    next_columns = field(32);
    constexpr int kRows[4] = {16, 128, 64, 32};
    row = kRows[descriptor >> 62];
    if ((descriptor >> 49 & 7) != 0) fail("a descriptor with a base offset, which is not emulated");
    if ((descriptor & 0x3ff1'c000'c000'c000) != 0) fail("a descriptor with bits that mean nothing");
  }

  // The address of a number, where pieces of 16 bytes are exchanged among `row` bytes by the bits above 128 bytes.
  int64_t at(int column, int channel) const {
    const int64_t inside = column % 8 * row + (row == 16 ? channel / 8 * next_channels + channel % 8 * 2 : channel * 2);
    const int64_t plain = begin + column / 8 * next_columns + inside;
    return plain ^ ((plain >> 3) & (row - 16));
  }
  // The first address and the one behind the last, whole rows of 128 bytes.
  int64_t first() const { return begin / 128 * 128; }
  int64_t last(int eights) const {
    return (begin + (eights - 1) * next_columns + 8 * row + (row == 16 ? next_channels : 0) + 127) / 128 * 128;
  }
};

struct Product {
  float* d;
  int eights;
  const uint32_t* a;
  uint64_t b;
  bool add;
  float (*value)(uint16_t);
  uint32_t taken[4];  // of a, when the product is done
};

struct Lane {
  std::vector<Product> open;                                                 // not committed yet
  std::vector<std::vector<Product>> commits;                                 // the oldest first
  bool fenced = false;                                                       // since it last could touch registers
  std::vector<std::pair<const uint32_t*, std::vector<uint32_t>>> fragments;  // of A: what they were at the fence
  std::vector<std::pair<uint64_t, int>> history;                             // descriptors and columns
};

constexpr int kMostThreads = 1024;
Lane lanes[kMostThreads];
bool used = false;  // by this block
int64_t started = 0;

Lane& mine() {
  used = true;
  return lanes[current_thread.x];
}

// B [16][columns], of one product.
void read_matrix(const Product& product, float (&b)[16][256]) {
  const Matrix matrix(product.b);
  for (int column = 0; column < 8 * product.eights; ++column)
    for (int channel = 0; channel < 16; ++channel) {
      const int64_t at = matrix.at(column, channel) - kSharedBegin;
      if (at < 0 || at + 2 > shared_size()) fail("a product reads outside the block's shared memory");
      uint16_t bits;
      std::memcpy(&bits, shared_memory() + at, 2);
      b[channel][column] = product.value(bits);
    }
}

// The warp's share of product i of its oldest commit.
void multiply(Lane* warp, size_t i) {
  static float a[16][16], b[16][256], sums[16][256];
  const Product& first = warp[0].commits.front()[i];
  read_matrix(first, b);
  for (int lane = 0; lane < kWarp; ++lane) {
    const Product& product = warp[lane].commits.front()[i];
    if (product.b != first.b || product.add != first.add) fail("lanes of a warp multiply different matrices");
    for (int r = 0; r < 4; ++r)
      for (int j = 0; j < 2; ++j)
        a[lane / 4 + r % 2 * 8][lane % 4 * 2 + r / 2 * 8 + j] =
            product.value(static_cast<uint16_t>(product.taken[r] >> (16 * j)));
  }
  const int columns = 8 * first.eights;
  std::memset(sums, 0, sizeof(sums));
  for (int row = 0; row < 16; ++row)
    for (int channel = 0; channel < 16; ++channel)
      for (int column = 0; column < columns; ++column) sums[row][column] += a[row][channel] * b[channel][column];
  for (int lane = 0; lane < kWarp; ++lane) {
    float* d = warp[lane].commits.front()[i].d;
    for (int j = 0; j < columns / 2; ++j) {
      const float sum = sums[lane / 4 + j % 4 / 2 * 8][j / 4 * 8 + lane % 4 * 2 + j % 2];
      d[j] = first.add ? d[j] + sum : sum;
    }
  }
}

// The oldest commit of all lanes of the warp.
void finish_commit(Lane* warp) {
  for (int lane = 1; lane < kWarp; ++lane)
    if (warp[lane].commits.size() != warp[0].commits.size() ||
        warp[lane].commits.front().size() != warp[0].commits.front().size())
      fail("lanes of a warp have started different products");
  for (size_t i = 0; i < warp[0].commits.front().size(); ++i) multiply(warp, i);
  for (int lane = 0; lane < kWarp; ++lane) warp[lane].commits.erase(warp[lane].commits.begin());
}

bool reads(const std::vector<Product>& products, int64_t begin, int64_t end) {
  for (const Product& product : products) {
    const Matrix matrix(product.b);
    if (matrix.first() < end && begin < matrix.last(product.eights)) return true;
  }
  return false;
}

}  // namespace

bool read_by_products(int64_t begin, int64_t end) {
  if (!used) return false;
  begin += kSharedBegin;
  end += kSharedBegin;
  for (const Lane& lane : lanes) {
    if (reads(lane.open, begin, end)) return true;
    for (const auto& commit : lane.commits)
      if (reads(commit, begin, end)) return true;
  }
  return false;
}

void begin_block() {
  begin_copies();
  if (!used) return;
  for (Lane& lane : lanes) lane = {};
  used = false;
}

void end_block(int threads) {
  end_copies();
  for (int i = 0; i < threads; ++i) {
    if (!lanes[i].open.empty() || !lanes[i].commits.empty()) fail("products that nobody waited for");
    if (lanes[i].history != lanes[i / kGroupThreads * kGroupThreads].history)
      fail("threads of a warpgroup multiplied different matrices");
  }
}

void fence_products() {
  Lane& lane = mine();
  lane.fenced = true;
  for (auto& [a, values] : lane.fragments) values.assign(a, a + 4);
  exchange(&lane.fenced, sizeof(bool));
}

void start_product(float* d, int eights, const uint32_t* a, uint64_t b, bool add, float (*value)(uint16_t)) {
  Lane& lane = mine();
  if (eights < 1 || eights > 32) fail("a product of less than 8 or more than 256 columns");
  if ((current_thread.x / kGroupThreads + 1) * kGroupThreads > size_of_block.x) fail("a product of half a warpgroup");
  if (!lane.fenced) fail("a product without fence_products() since registers could change");
  bool seen = false;
  for (const auto& [known, values] : lane.fragments) {
    if (known != a) continue;
    seen = true;
    if (std::memcmp(values.data(), a, 16) != 0) fail("a fragment was changed after fence_products()");
  }
  if (!seen) lane.fragments.push_back({a, {a, a + 4}});
  const Matrix matrix(b);
  if (being_copied(matrix.first() - kSharedBegin, matrix.last(eights) - kSharedBegin))
    fail("a product reads what is still being copied");
  lane.history.push_back({b, eights});
  lane.open.push_back({d, eights, a, b, add, value, {}});
  ++started;
}

void commit_products() {
  Lane& lane = mine();
  lane.commits.push_back(std::move(lane.open));
  lane.open.clear();
}

void wait_products_open(int open) {
  Lane& lane = mine();
  lane.fenced = false;
  const size_t most = static_cast<size_t>(open);
  for (size_t i = 0; i + most < lane.commits.size(); ++i)
    for (Product& product : lane.commits[i]) std::memcpy(product.taken, product.a, sizeof(product.taken));
  exchange(&lane.fenced, sizeof(bool));
  // The lane that comes first does it for all, which have taken their fragments.
  Lane* warp = lanes + current_thread.x / kWarp * kWarp;
  while (lane.commits.size() > most) finish_commit(warp);
}

}  // namespace awq::cuda

// For tests: how many a thread has ever started, counted once for each thread.
extern "C" __attribute__((visibility("default"))) int64_t awq_emulated_products() { return awq::cuda::started; }
