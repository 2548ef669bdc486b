// y = x W^T for many rows of activations, on the tensor cores of Hopper.
//
// A block computes 64 or 128 rows by 128 outputs (four tiles). Its last warpgroup asks the copy engine for stages of 64
// channels, which pass through a ring of buffers in shared memory: x as boxes of a tensor map, swizzled as products
// read them and with zeros for what does not exist, and the codes of each tile. Two warpgroups multiply:
// y^T = W x^T, so that codes are decoded in registers, as A, and x is B. Warpgroup h has outputs 16 h .. 16 h + 15 of
// all four tiles, a tile a warp: 64 outputs by all rows are the largest product whose sums, of the group and of all,
// fit in registers, and the more rows a product has, the less often is a code decoded.
//
// A batch is the products of one stage, or of half a stage where groups end there. While a batch is multiplied, the
// next one is decoded. Only then are its sums waited for, and multiplied by the group's scale, in fp32, if the group
// ends; the products of the other warpgroup go on meanwhile. Channels behind the last are multiplied by x = 0.
//
// Few blocks would leave most of a GPU idle: then several blocks take parts of the channels (linear_parts.h).
#include "cuda/linear_wgmma.h"

#include "cuda/linear_gemm.h"
#include "cuda/linear_parts.h"
#include "cuda/wgmma_parts.h"

namespace awq::cuda {
namespace {

// What is copied: x, and codes of 8 bits as rows of a step. Codes of 4 bits are copied as they lie.
struct Maps {
  TensorMap x, codes;
};

// The part of a row of channels that a block multiplies: stages first .. end - 1.
struct Range {
  int first, end;

  __device__ Range(const Weight& w, int length) : first(static_cast<int>(blockIdx.z) * length) {
    const int stages = (w.steps + kStageSteps - 1) / kStageSteps;
    end = first + length < stages ? first + length : stages;
  }
};

// Asks for all stages of the range, one after another, each as soon as its buffer is free. By one thread.
template <int kBits, int kRows>
__device__ inline void fill(Shared<kBits, kRows>& shared, const Weight& w, const Maps& maps, const Range& range) {
  const int first_tile = static_cast<int>(blockIdx.x) * kBlockTiles;
  const int tiles = w.tiles - first_tile < kBlockTiles ? w.tiles - first_tile : kBlockTiles;
#pragma unroll 1
  for (int round = 0; round < range.end - range.first; ++round) {
    const int i = round % kRing, first_step = (range.first + round) * kStageSteps;
    const int steps = w.steps - first_step < kStageSteps ? w.steps - first_step : kStageSteps;
    if (round >= kRing) wait_barrier(&shared.empty[i], (round / kRing - 1) % 2);
    Stage<kBits, kRows>& stage = shared.stages[i];
    const int tile_bytes = kBits == 4 ? steps * 16 * kBits : static_cast<int>(sizeof(stage.codes[0]));
    arrive_expecting(&shared.full[i], static_cast<int>(sizeof(stage.x)) + tiles * tile_bytes);
    copy_box(stage.x, maps.x, 4 * first_step, static_cast<int>(blockIdx.y) * kRows, &shared.full[i]);
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
__device__ inline void add_sums(float (&total)[kEights][4], const float (&part)[kEights][4], const float (&scale)[2]) {
#pragma unroll
  for (int r = 0; r < kEights; ++r)
#pragma unroll
    for (int i = 0; i < 4; ++i) total[r][i] = fma_rn(scale[i / 2], part[r][i], total[r][i]);
}

// Starts products with 16 channels of x each.
template <bool kHalf, int kEights, int kProducts>
__device__ inline void multiply(float (&part)[kEights][4], const uint32_t (&a)[kProducts][4], uint64_t x, bool add) {
  fence_products();
#pragma unroll
  for (int i = 0; i < kProducts; ++i) {
    if constexpr (kHalf)
      multiply_f16(part, a[i], x + 2 * i, add || i > 0);
    else
      multiply_bf16(part, a[i], x + 2 * i, add || i > 0);
  }
  commit_products();
}

// A batch in the ring.
template <int kBatches>
struct Place {
  uint32_t stage = 0, parity = 0, batch = 0;

  __device__ bool ends_stage() const { return batch == kBatches - 1; }
  __device__ void next() {
    if (++batch != kBatches) return;
    batch = 0;
    if (++stage != kRing) return;
    stage = 0;
    parity ^= 1;
  }
};

// What one warp multiplies. kProducts: of a batch, 2 or 4.
template <int kBits, bool kHalf, int kRows, int kProducts>
struct Multiplier {
  static constexpr int kBatches = kStageSteps / 4 / kProducts;
  using Fragments = uint32_t[kProducts][4];
  Shared<kBits, kRows>& shared;
  const Weight& w;
  const int tile_here, tile;
  const uint64_t x_begin;
  const int group_batches;
  int count, group, left;  // batches to multiply; the group that `next` is of, and what is left to decode of the last
  Place<kBatches> here, ahead;
  Lane<kBits> lane;
  LaneGroup<kBits> next;  // of the group behind
  uint32_t zero[2], scales;
  float total[kRows / 8][4] = {}, part[kRows / 8][4] = {};

  __device__ Multiplier(Shared<kBits, kRows>& ring, const Weight& weight, const Range& range, int warp)
      : shared(ring),
        w(weight),
        tile_here(warp % kBlockTiles),
        tile(static_cast<int>(blockIdx.x) * kBlockTiles + tile_here),
        x_begin(swizzled_matrix(shared_address(ring.stages[0].x))),
        group_batches(weight.groups == 1 ? 1 << 30 : weight.group_steps / (4 * kProducts)),
        lane(warp / kBlockTiles),
        next(weight, tile < weight.tiles ? tile : weight.tiles - 1, range.first * kBatches / group_batches, lane) {
    const int first = range.first * kBatches, batches = (w.steps + 4 * kProducts - 1) / (4 * kProducts);
    count = (range.end * kBatches < batches ? range.end * kBatches : batches) - first;
    group = first / group_batches;
    next.load();
    take_group();
    next.load();
    left = group_batches - first % group_batches;
  }

  // The batch that is decoded next begins the group that `next` was read from.
  __device__ void take_group() {
    next.template zero<kHalf>(zero);
    scales = next.scales;
    left = group_batches;
    if (++group < w.groups) next.next();
  }

  // The fragments of the batch at `ahead`, which is in the group that `zero` belongs to.
  __device__ void decode(Fragments& a) {
    if (ahead.batch == 0) wait_barrier(&shared.full[ahead.stage], static_cast<int>(ahead.parity));
    const uint8_t* codes = shared.stages[ahead.stage].codes[tile_here] + ahead.batch * (kProducts * 64 * kBits);
#pragma unroll
    for (int i = 0; i < kProducts; ++i) lane.template decode<kHalf>(codes, i, zero, a[i]);
    ahead.next();
    --left;
  }

  // Multiplies the batch at `here`, whose fragments are in a, and decodes the one behind it meanwhile.
  __device__ void step(Fragments& a, Fragments& behind, bool& add) {
    multiply<kHalf>(part, a, x_begin + here.stage * (sizeof(shared.stages[0]) / 16) + here.batch * (2 * kProducts),
                    add);
    const bool more = --count > 0, ends = left == 0;
    const uint32_t ended = scales;
    if (more) {
      if (ends) take_group();
      next.load();
      decode(behind);
    }
    wait_products<0>(part);
    if (here.ends_stage() && threadIdx.x % kWarp == 0) arrive(&shared.empty[here.stage]);
    here.next();
    add = !ends;
    if (more && !ends) return;
    float scale[2];
    for (int i = 0; i < 2; ++i) scale[i] = value_of(static_cast<uint16_t>(ended >> (16 * i)), w.scale_type);
    add_sums(total, part, scale);
  }

  __device__ void run() {
    Fragments even, odd;
    bool add = false;
    decode(even);
#pragma unroll 1
    while (true) {
      step(even, odd, add);
      if (count == 0) return;
      step(odd, even, add);
      if (count == 0) return;
    }
  }
};

// Multiplies the channels of the range. Sums of all channels go to y, those of a part to its place in `parts`.
template <int kBits, bool kHalf, int kRows, int kProducts>
__device__ inline void multiply_all(Shared<kBits, kRows>& shared, const Weight& w, const LinearRows& rows,
                                    const Range& range, float* parts) {
  Multiplier<kBits, kHalf, kRows, kProducts> warp(shared, w, range, static_cast<int>(threadIdx.x) / kWarp);
  warp.run();
  const float unit = Decoder<kBits, kHalf>::unit(warp.lane.half);
#pragma unroll
  for (int i = 0; i < kRows / 2; ++i) warp.total[i / 4][i % 4] *= unit;
  store_part<kHalf ? Type::f16 : Type::bf16>(w, rows,
                                             int64_t{warp.tile} * 32 + 16 * warp.lane.half + 2 * warp.lane.pair,
                                             static_cast<int64_t>(blockIdx.y) * kRows, warp.total, parts);
}

// Code that is not for sm_90a is empty, and its bound keeps it from being launched.
template <int kBits, bool kHalf, int kRows, int kProducts>
__global__ void __launch_bounds__(kHopper ? kBlockThreads : kWarp, 1)
    linear_wgmma(Weight w, LinearRows rows, const __grid_constant__ Maps maps, int length, float* parts) {
  if constexpr (kHopper) {
    auto& shared = Shared<kBits, kRows>::here();
    const Range range(w, length);
    if (threadIdx.x == 0) {
      for (int i = 0; i < kRing; ++i) {
        init_barrier(&shared.full[i], 1);
        init_barrier(&shared.empty[i], kMultiplyWarps);
      }
      fence_barriers();
    }
    sync_block();
    if (threadIdx.x < kMultiplyWarps * kWarp) {
      more_registers<kMultiplyRegisters>();
      multiply_all<kBits, kHalf, kRows, kProducts>(shared, w, rows, range, parts);
    } else {
      fewer_registers<kCopyRegisters>();
      if (threadIdx.x == kMultiplyWarps * kWarp) fill(shared, w, maps, range);
    }
  }
}

int64_t block_rows(int64_t rows) { return rows <= 64 ? 64 : 128; }

template <int kBits, bool kHalf, int kRows>
int64_t launch_rows(void* stream, const Weight& w, const LinearRows& rows, float* parts) {
  Maps maps{};
  int64_t error = make_tensor_map(maps.x, rows.x, rows.rows, rows.pitch, rows.pitch, kRows);
  if (kBits == 8 && error == 0)
    error = make_tensor_map(maps.codes, w.codes, int64_t{w.tiles} * w.steps, 64, 64, kStageSteps);
  if (error != 0) return error;
  const bool whole = w.groups == 1 || w.group_steps % kStageSteps == 0;
  const auto kernel = whole ? linear_wgmma<kBits, kHalf, kRows, 4> : linear_wgmma<kBits, kHalf, kRows, 2>;
  const int64_t stages = ceil_div(w.steps, kStageSteps);
  const int64_t length = parts == nullptr ? stages : ceil_div(stages, wgmma_parts(w, rows.rows));
  const Blocks blocks{ceil_div(w.tiles, kBlockTiles), ceil_div(rows.rows, kRows), ceil_div(stages, length)};
  error = launch(stream, blocks, kBlockThreads, Shared<kBits, kRows>::bytes(), kernel, w, rows, maps, length, parts);
  if (parts == nullptr || error != 0) return error;
  return launch_add_parts(stream, w.n, rows, parts, blocks.z, kHalf ? Type::f16 : Type::bf16);
}

template <int kBits, bool kHalf>
int64_t launch_bits(void* stream, const Weight& w, const LinearRows& rows, float* parts) {
  return block_rows(rows.rows) == 64 ? launch_rows<kBits, kHalf, 64>(stream, w, rows, parts)
                                     : launch_rows<kBits, kHalf, 128>(stream, w, rows, parts);
}

}  // namespace

bool wgmma_wanted(int64_t rows) {
  return rows > kWithoutWgmma && !wished("AWQ_EXT_CUDA_WGMMA", "0") &&
         has_hopper(linear_wgmma<4, false, 128, 4>, kBlockThreads);
}

bool wgmma_takes(const Weight& w) { return w.groups == 1 || w.group_steps % (kStageSteps / 2) == 0; }

int64_t wgmma_parts(const Weight& w, int64_t rows) {
  return parts_of(ceil_div(w.tiles, kBlockTiles) * ceil_div(rows, block_rows(rows)), ceil_div(w.steps, kStageSteps));
}

int64_t launch_wgmma(void* stream, const Weight& w, const LinearRows& rows, int bits, bool half, float* parts) {
  if (w.tiles == 0) return 0;  // a tensor map of nothing would be refused
  const auto run = bits == 4 ? (half ? launch_bits<4, true> : launch_bits<4, false>)
                             : (half ? launch_bits<8, true> : launch_bits<8, false>);
  return run(stream, w, rows, parts);
}

}  // namespace awq::cuda
