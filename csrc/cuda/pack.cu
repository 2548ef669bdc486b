// Layouts of codes: rows, packed rows and tiles (base/layout.h), bit for bit.
#include "base/layout.h"
#include "cuda/awq_cuda.h"
#include "cuda/warp.h"

namespace awq::cuda {
namespace {

struct Rows {
  const uint8_t* from;
  uint8_t* to;
  int64_t n;
  int64_t k;
};

__global__ void __launch_bounds__(kItemThreads) pack(Rows r) {
  const int64_t i = thread_item(), bytes = (r.k + 1) / 2;
  if (i >= r.n * bytes) return;
  const int64_t channel = i % bytes * 2;
  const uint8_t* codes = r.from + i / bytes * r.k + channel;
  const unsigned high = channel + 1 < r.k ? codes[1] : 0u;
  r.to[i] = static_cast<uint8_t>(codes[0] | high << 4);
}

__global__ void __launch_bounds__(kItemThreads) unpack(Rows r) {
  const int64_t i = thread_item();
  if (i >= r.n * r.k) return;
  const int64_t channel = i % r.k;
  r.to[i] = r.from[i / r.k * ((r.k + 1) / 2) + channel / 2] >> (channel % 2 * 4) & 15;
}

struct Tiling {
  const uint8_t* from;
  uint8_t* to;
  int64_t n;
  int64_t k;
  int64_t group;
  int64_t group_steps;
  int64_t steps;
};

// The code of an output and a channel, in rows of `kBits`; 0 for those that are not there.
template <int kBits>
__device__ unsigned row_code(const Tiling& t, int64_t output, int64_t channel) {
  if (output >= t.n) return 0;
  if (kBits == 8) return t.from[output * t.k + channel];
  return t.from[output * ((t.k + 1) / 2) + channel / 2] >> (channel % 2 * 4) & 15;
}

// A thread for each word of 32 bits.
template <int kBits>
__global__ void __launch_bounds__(kItemThreads) tile(Tiling t) {
  constexpr int kWords = 4 * kBits;  // of a step
  const int64_t i = thread_item(), tiles = (t.n + 31) / 32;
  if (i >= tiles * t.steps * kWords) return;
  const int64_t step = i / kWords % t.steps, output = i / kWords / t.steps * 32 + i % kWords;
  const int64_t group = step / t.group_steps, inside = (step - group * t.group_steps) * 4;
  uint32_t word = 0;
  for (int c = 0; c < 4; ++c) {
    const int64_t channel = group * t.group + inside + c;
    if (inside + c >= t.group || channel >= t.k) break;
    uint32_t code = row_code<kBits>(t, output, channel);
    if (kBits == 4) code |= row_code<kBits>(t, output + 16, channel) << 4;
    word |= code << (8 * (c == 1 ? 2 : c == 2 ? 1 : c));  // bytes are channels 0, 2, 1, 3
  }
  reinterpret_cast<uint32_t*>(t.to)[i] = word;
}

template <int kBits>
__device__ unsigned tile_code(const Tiling& t, int64_t output, int64_t channel) {
  const int64_t group = channel / t.group, inside = channel % t.group, c = inside % 4;
  const int64_t step = (output / 32 * t.steps + group * t.group_steps + inside / 4) * (16 * kBits);
  const int64_t word = kBits == 4 ? output % 16 : output % 32, byte = c == 1 ? 2 : c == 2 ? 1 : c;
  const unsigned code = t.from[step + 4 * word + byte];
  return kBits == 8 ? code : code >> (output % 32 / 16 * 4) & 15;
}

// A thread for each byte of the rows.
template <int kBits>
__global__ void __launch_bounds__(kItemThreads) untile(Tiling t) {
  const int64_t i = thread_item(), bytes = kBits == 8 ? t.k : (t.k + 1) / 2;
  if (i >= t.n * bytes) return;
  const int64_t output = i / bytes, channel = i % bytes * (8 / kBits);
  unsigned byte = tile_code<kBits>(t, output, channel);
  if (kBits == 4 && channel + 1 < t.k) byte |= tile_code<kBits>(t, output, channel + 1) << 4;
  t.to[i] = static_cast<uint8_t>(byte);
}

Tiling make_tiling(const void* from, int64_t n, int64_t k, int64_t group, void* to) {
  return {static_cast<const uint8_t*>(from),
          static_cast<uint8_t*>(to),
          n,
          k,
          group,
          ceil_div(group, 4),
          step_count(k, group)};
}

}  // namespace
}  // namespace awq::cuda

using namespace awq::cuda;

int64_t awq_cuda_pack(void* stream, const void* codes, int64_t n, int64_t k, void* packed) {
  const Rows r{static_cast<const uint8_t*>(codes), static_cast<uint8_t*>(packed), n, k};
  return launch_items(stream, n * awq::packed_bytes(k), pack, r);
}

int64_t awq_cuda_unpack(void* stream, const void* packed, int64_t n, int64_t k, void* codes) {
  const Rows r{static_cast<const uint8_t*>(packed), static_cast<uint8_t*>(codes), n, k};
  return launch_items(stream, n * k, unpack, r);
}

int64_t awq_cuda_tile(void* stream, const void* rows, int64_t n, int64_t k, int64_t group, int64_t bits, void* tiles) {
  const Tiling t = make_tiling(rows, n, k, group, tiles);
  return launch_items(stream, awq::tile_count(n) * t.steps * 4 * bits, bits == 4 ? tile<4> : tile<8>, t);
}

int64_t awq_cuda_untile(void* stream, const void* tiles, int64_t n, int64_t k, int64_t group, int64_t bits,
                        void* rows) {
  const Tiling t = make_tiling(tiles, n, k, group, rows);
  return launch_items(stream, n * awq::row_bytes(k, static_cast<int>(bits)), bits == 4 ? untile<4> : untile<8>, t);
}
