// Conversion of rows to the tiles that int4_linear reads, and back.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include "adapters/bindings.h"
#include "adapters/checks.h"
#include "base/buffer.h"
#include "base/layout.h"
#include "drivers/tiles.h"

namespace awq {
namespace {

using at::Tensor;

// Sizes of both directions between rows and tiles.
struct TileSizes {
  int64_t n, k, length, steps;

  TileSizes(const char* name, int64_t out_features, int64_t in_features, int64_t group_size)
      : n(out_features), k(in_features) {
    AWQ_CHECK(n >= 0, name, "out_features", "a number of outputs", n);
    AWQ_CHECK(k > 0, name, "in_features", "a positive number", k);
    check_group_size(name, group_size);
    length = group_length(k, group_size);
    steps = step_count(k, length);
  }
};

Tensor empty_large(at::IntArrayRef shape) {
  const int64_t bytes = c10::multiply_integers(shape);
  void* data = allocate_large(bytes);
  return data == nullptr ? at::empty(shape, at::kByte) : at::from_blob(data, shape, free_large, at::kByte);
}

Tensor py_tile_int4(const Tensor& packed, int64_t in_features, int64_t group_size) {
  constexpr const char* kName = "tile_int4";
  const TileSizes sizes(kName, 0, in_features, group_size);
  check_shape(kName, "packed", packed, {-1, packed_bytes(in_features)});
  check_dtype(kName, "packed", packed, at::kByte);
  const Tensor p = packed.contiguous(), tiles = empty_large({tile_count(p.size(0)), sizes.steps, kStepBytes});
  py::gil_scoped_release release;
  tile_codes(p.const_data_ptr<uint8_t>(), p.size(0), sizes.k, sizes.length, tiles.mutable_data_ptr<uint8_t>(),
             at::get_num_threads());
  return tiles;
}

Tensor py_untile_int4(const Tensor& tiles, int64_t out_features, int64_t in_features, int64_t group_size) {
  constexpr const char* kName = "untile_int4";
  const TileSizes sizes(kName, out_features, in_features, group_size);
  check_shape(kName, "tiles", tiles, {tile_count(sizes.n), sizes.steps, kStepBytes});
  check_dtype(kName, "tiles", tiles, at::kByte);
  const Tensor t = tiles.contiguous(), packed = at::empty({sizes.n, packed_bytes(sizes.k)}, at::kByte);
  py::gil_scoped_release release;
  untile_codes(t.const_data_ptr<uint8_t>(), sizes.n, sizes.k, sizes.length, packed.mutable_data_ptr<uint8_t>(),
               at::get_num_threads());
  return packed;
}

}  // namespace

void bind_tiles(py::module_& m) {
  m.def("tile_int4", &py_tile_int4, py::arg("packed"), py::arg("in_features"), py::arg("group_size"),
        "Packed rows uint8 [N, ceil(K / 2)] -> the tiles that int4_linear reads, uint8 [T, S, 64].");
  m.def("untile_int4", &py_untile_int4, py::arg("tiles"), py::arg("out_features"), py::arg("in_features"),
        py::arg("group_size"), "Inverse of tile_int4: uint8 [T, S, 64] -> uint8 [N, ceil(K / 2)].");
}

}  // namespace awq
