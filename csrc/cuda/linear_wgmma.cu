// y = x W^T for many rows of activations, on the tensor cores of Hopper.
//
// A block computes 64 or 128 rows by 128 outputs (four tiles). Its last warp asks the copy engine for stages of 64
// channels, which pass through a ring of buffers in shared memory: x as boxes of a tensor map, swizzled as products
// read them and with zeros for what does not exist, and the codes of each tile. Two warpgroups multiply:
// y^T = W x^T, so that codes are decoded in registers, as A, and x is B. Warpgroup h has outputs 16 h .. 16 h + 15 of
// all four tiles, a tile a warp: 64 outputs by all rows are the largest product whose sums, of the group and of all,
// fit in registers, and the more rows a product has, the less often is a code decoded.
//
// A unit is two products, 32 channels of one group. While a product runs, the codes of the next are decoded: one
// product a commit, as ptxas would otherwise let each wait for the one before. When a group ends, its sums, in fp32,
// are multiplied by its scale, which the other warpgroup's products cover. Channels behind the last are multiplied by x
// = 0.
#include "cuda/linear_wgmma.h"

#include <cstdlib>
#include <cstring>

#include "cuda/hopper.h"
#include "cuda/linear_gemm.h"

namespace awq::cuda {
namespace {

constexpr int kStageChannels = 64, kStageSteps = 16, kUnitSteps = 8, kBlockTiles = 4, kRing = 4;
constexpr int kMultiplyWarps = 8, kBlockThreads = (kMultiplyWarps + 1) * kWarp;

// The rows of x are 128 bytes long, as are steps of 8 bits. A box must begin at a multiple of 1024, which all sizes
// here are.
template <int kBits, int kRows>
struct Stage {
  uint8_t x[kRows * 2 * kStageChannels];
  uint8_t codes[kBlockTiles][kStageSteps * 16 * kBits];
};

template <int kBits, int kRows>
struct Shared {
  Stage<kBits, kRows> stages[kRing];
  Barrier full[kRing];   // a stage has come
  Barrier empty[kRing];  // all warps have multiplied it

  // Shared memory need not begin at a multiple of 1024.
  static constexpr int64_t bytes() { return int64_t{sizeof(Shared)} + 1024 - 16; }
  static __device__ Shared& here() {
    unsigned char* begin = shared_memory();
    return *reinterpret_cast<Shared*>(begin + (0 - shared_address(begin)) % 1024);
  }
};

// What a lane reads of a tile. It has half `half` of the outputs, 2 pair and 2 pair + 1 of these in rows g and g + 8 of
// A. Of 4 bits pair is g. Of 8 bits, whose steps are 128 bytes, swizzled, it is 0, 1, 4, 5 for g = 0 .. 3: then half a
// warp, which reads these of two steps at a time, finds them in different banks.
template <int kBits>
struct Lane {
  int half, pair;
  uint32_t places[4];  // of its words in a unit: two for each product
  uint32_t bytes;      // of them that it takes
  LaneWords<4> words[2];

  __device__ explicit Lane(int half_of_tile) : half(half_of_tile) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
    pair = kBits == 4 ? g : (g & 1) | (g & 2) << 1 | (g & 4) >> 1;
    bytes = t % 2 == 0 ? 0x6240 : 0x7351;
    for (int i = 0; i < 4; ++i) {
      const int step = 2 * i + t / 2, piece = (4 * half + pair / 2) ^ step;  // of 16 bytes, of 8 bits
      places[i] = static_cast<uint32_t>(step * 16 * kBits + (kBits == 4 ? 8 * pair : 16 * piece + 8 * (pair % 2)));
    }
  }

  __device__ void load(const uint8_t* unit, int product) {
#pragma unroll
    for (int v = 0; v < 2; ++v) words[v] = load_words<4>(unit + places[2 * product + v], 0);
  }

  // The fragment of A of 16 channels. Its columns 2t, 2t + 1 are channels of step t / 2, columns 2t + 8, 2t + 9 of step
  // 2 + t / 2, the even bytes of words or the odd ones: x is read from memory, in the order of its channels, so a lane
  // cannot choose them as in tiles.h.
  template <bool kHalf>
  __device__ void decode(const uint32_t (&zero)[2], uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t word = pick_bytes(words[0].w[i], words[1].w[i], bytes);
      if constexpr (kBits == 4) word >>= 4 * half;
      a[i] = Decoder<kBits, kHalf>::pair(word, zero[i]);
      a[2 + i] = Decoder<kBits, kHalf>::pair(word >> 8, zero[i]);
    }
  }
};

// Scales and zeros of a lane's two outputs.
template <int kBits>
struct LaneGroup {
  uint32_t scales, zeros;

  __device__ void read(const Weight& w, int tile, int group, const Lane<kBits>& lane) {
    const int64_t at = static_cast<int64_t>(tile) * w.groups + group;
    const int output = 16 * lane.half + 2 * lane.pair;
    scales = *reinterpret_cast<const uint32_t*>(w.scales + at * 32 + output);
    zeros = *reinterpret_cast<const uint16_t*>(w.zeros + at * 4 * kBits + (kBits == 4 ? 2 * lane.pair : output));
    if constexpr (kBits == 4) zeros = zeros >> (4 * lane.half);
  }
  template <bool kHalf>
  __device__ void zero(uint32_t (&out)[2]) const {
    for (int i = 0; i < 2; ++i) out[i] = Decoder<kBits, kHalf>::negative(zeros >> (8 * i) & (kBits == 4 ? 15 : 255));
  }
  __device__ void scale(const Weight& w, float (&out)[2]) const {
    for (int i = 0; i < 2; ++i) out[i] = value_of(static_cast<uint16_t>(scales >> (16 * i)), w.scale_type);
  }
};

// What is copied: x, and codes of 8 bits as rows of a step. Codes of 4 bits are copied as they lie.
struct Maps {
  TensorMap x, codes;
};

// Asks for all stages, one after another, each as soon as its buffer is free. By one thread.
template <int kBits, int kRows>
__device__ inline void fill(Shared<kBits, kRows>& shared, const Weight& w, const Maps& maps) {
  const int rounds = (w.steps + kStageSteps - 1) / kStageSteps;
  const int first_tile = static_cast<int>(blockIdx.x) * kBlockTiles;
  const int tiles = w.tiles - first_tile < kBlockTiles ? w.tiles - first_tile : kBlockTiles;
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    const int i = round % kRing, first_step = round * kStageSteps;
    const int steps = w.steps - first_step < kStageSteps ? w.steps - first_step : kStageSteps;
    if (round >= kRing) wait_barrier(&shared.empty[i], (round / kRing - 1) % 2);
    Stage<kBits, kRows>& stage = shared.stages[i];
    const int tile_bytes = kBits == 4 ? steps * 16 * kBits : static_cast<int>(sizeof(stage.codes[0]));
    arrive_expecting(&shared.full[i], static_cast<int>(sizeof(stage.x)) + tiles * tile_bytes);
    copy_box(stage.x, maps.x, round * kStageChannels, static_cast<int>(blockIdx.y) * kRows, &shared.full[i]);
    for (int v = 0; v < tiles; ++v) {
      const int64_t step = int64_t{first_tile + v} * w.steps + first_step;
      if constexpr (kBits == 4)
        copy_bytes(stage.codes[v], w.codes + step * (16 * kBits), tile_bytes, &shared.full[i]);
      else
        copy_box(stage.codes[v], maps.codes, 0, static_cast<int>(step), &shared.full[i]);
    }
  }
}

// Adds a group's sums to the totals.
template <int kEights>
__device__ inline void end_group(float (&total)[kEights][4], float (&part)[kEights][4], const float (&scale)[2]) {
  wait_products<0>(part);
#pragma unroll
  for (int r = 0; r < kEights; ++r)
#pragma unroll
    for (int i = 0; i < 4; ++i) total[r][i] = fma_rn(scale[i / 2], part[r][i], total[r][i]);
}

// Starts a product with 16 channels of x.
template <bool kHalf, int kEights>
__device__ inline void multiply(float (&part)[kEights][4], const uint32_t (&a)[4], uint64_t x, bool add) {
  fence_products();
  if constexpr (kHalf)
    multiply_f16(part, a, x, add);
  else
    multiply_bf16(part, a, x, add);
  commit_products();
}

// A unit in a ring of so many stages.
template <uint32_t kCount>
struct Place {
  uint32_t stage = 0, parity = 0, odd = 0;

  __device__ void next() {
    odd ^= 1;
    if (odd != 0) return;
    stage = (stage + 1) % kCount;
    if (stage == 0) parity ^= 1;
  }
};

template <int kBits, bool kHalf, int kRows>
__device__ inline void multiply_all(Shared<kBits, kRows>& shared, const Weight& w, const LinearRows& rows) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, tile_here = warp % kBlockTiles;
  const int tile = static_cast<int>(blockIdx.x) * kBlockTiles + tile_here;
  const uint64_t x_begin = swizzled_matrix(shared_address(shared.stages[0].x));
  float total[kRows / 8][4] = {}, part[kRows / 8][4] = {};
  uint32_t a[2][4], zero[2];  // fragments of the two products of a unit
  float scale[2];
  Place<kRing> place;
  Lane<kBits> lane(warp / kBlockTiles);
  const auto load = [&](int product) {
    lane.load(shared.stages[place.stage].codes[tile_here] + place.odd * (kUnitSteps * 16 * kBits), product);
  };
  // The first fragment of the unit at `place`.
  const auto begin_unit = [&] {
    if (place.odd == 0) wait_barrier(&shared.full[place.stage], static_cast<int>(place.parity));
    load(0);
    wait_products<1>();
    lane.template decode<kHalf>(zero, a[0]);
  };

  LaneGroup<kBits> next = {};  // of the group that begins next
  if (tile < w.tiles) next.read(w, tile, 0, lane);
  next.template zero<kHalf>(zero);
  begin_unit();
#pragma unroll 1
  for (int group = 0; group < w.groups; ++group) {
    const int units = (steps_of(w, group) + kUnitSteps - 1) / kUnitSteps;
    next.scale(w, scale);
    if (group + 1 < w.groups && tile < w.tiles) next.read(w, tile, group + 1, lane);
#pragma unroll 1
    for (int unit = 0;;) {
      const uint64_t x = x_begin + place.stage * (sizeof(shared.stages[0]) / 16) + place.odd * 4;
      multiply<kHalf>(part, a[0], x, unit > 0);
      load(1);
      wait_products<1>();  // the last unit, and if that was in another stage, this has been multiplied
      if (place.odd == 0 && threadIdx.x % kWarp == 0 && group + unit > 0)
        arrive(&shared.empty[(place.stage + kRing - 1) % kRing]);
      lane.template decode<kHalf>(zero, a[1]);
      multiply<kHalf>(part, a[1], x + 2, true);
      place.next();
      if (++unit == units) break;
      begin_unit();
    }
    if (group + 1 < w.groups) {  // before the sums are waited for
      next.template zero<kHalf>(zero);
      begin_unit();
    }
    end_group(total, part, scale);
  }
  store_sums<kHalf>(w, rows, int64_t{tile} * 32 + 16 * lane.half + 2 * lane.pair,
                    static_cast<int64_t>(blockIdx.y) * kRows, total);
}

// Code that is not for sm_90a is empty, and its bound keeps it from being launched.
template <int kBits, bool kHalf, int kRows>
__global__ void __launch_bounds__(kHopper ? kBlockThreads : kWarp, 1)
    linear_wgmma(Weight w, LinearRows rows, const __grid_constant__ Maps maps) {
  if constexpr (kHopper) {
    auto& shared = Shared<kBits, kRows>::here();
    if (threadIdx.x == 0) {
      for (int i = 0; i < kRing; ++i) {
        init_barrier(&shared.full[i], 1);
        init_barrier(&shared.empty[i], kMultiplyWarps);
      }
      fence_barriers();
    }
    sync_block();
    if (threadIdx.x < kMultiplyWarps * kWarp)
      multiply_all<kBits, kHalf>(shared, w, rows);
    else if (threadIdx.x == kMultiplyWarps * kWarp)
      fill(shared, w, maps);
  }
}

template <int kBits, bool kHalf, int kRows>
int64_t launch_rows(void* stream, const Weight& w, const LinearRows& rows) {
  Maps maps{};
  int64_t error = make_tensor_map(maps.x, rows.x, rows.rows, rows.pitch, rows.pitch, kRows);
  if (kBits == 8 && error == 0)
    error = make_tensor_map(maps.codes, w.codes, int64_t{w.tiles} * w.steps, 64, 64, kStageSteps);
  if (error != 0) return error;
  return launch(stream, {ceil_div(w.tiles, kBlockTiles), ceil_div(rows.rows, kRows)}, kBlockThreads,
                Shared<kBits, kRows>::bytes(), linear_wgmma<kBits, kHalf, kRows>, w, rows, maps);
}

template <int kBits, bool kHalf>
int64_t launch_bits(void* stream, const Weight& w, const LinearRows& rows) {
  return rows.rows <= 64 ? launch_rows<kBits, kHalf, 64>(stream, w, rows)
                         : launch_rows<kBits, kHalf, 128>(stream, w, rows);
}

}  // namespace

bool wgmma_wanted(int64_t rows) {
  const char* wish = std::getenv("AWQ_EXT_CUDA_WGMMA");
  return rows > kSmallRows && wish != nullptr && std::strcmp(wish, "1") == 0 &&
         has_hopper(linear_wgmma<4, false, 128>, kBlockThreads);
}

bool wgmma_takes(const Weight& w) { return w.groups == 1 || w.group_steps % kUnitSteps == 0; }

int64_t launch_wgmma(void* stream, const Weight& w, const LinearRows& rows, int bits, bool half) {
  const auto run = bits == 4 ? (half ? launch_bits<4, true> : launch_bits<4, false>)
                             : (half ? launch_bits<8, true> : launch_bits<8, false>);
  return run(stream, w, rows);
}

}  // namespace awq::cuda
