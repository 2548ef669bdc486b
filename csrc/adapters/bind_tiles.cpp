// Conversion of rows to the tiles that quant_linear reads, and back.
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
  int bits;

  TileSizes(const char* name, int64_t out_features, int64_t in_features, int64_t group_size, int64_t width)
      : n(out_features), k(in_features), bits(tile_bits(name, width)) {
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

Tensor py_tile_codes(const Tensor& rows, int64_t in_features, int64_t group_size, int64_t bits) {
  constexpr const char* kName = "tile_codes";
  const TileSizes sizes(kName, 0, in_features, group_size, bits);
  check_shape(kName, "rows", rows, {-1, row_bytes(in_features, sizes.bits)});
  check_dtype(kName, "rows", rows, at::kByte);
  const Tensor r = rows.contiguous();
  const Tensor tiles = empty_large({tile_count(r.size(0)), sizes.steps, step_bytes(sizes.bits)});
  py::gil_scoped_release release;
  tile_codes(r.const_data_ptr<uint8_t>(), r.size(0), sizes.k, sizes.length, sizes.bits,
             tiles.mutable_data_ptr<uint8_t>(), at::get_num_threads());
  return tiles;
}

Tensor py_untile_codes(const Tensor& tiles, int64_t out_features, int64_t in_features, int64_t group_size,
                       int64_t bits) {
  constexpr const char* kName = "untile_codes";
  const TileSizes sizes(kName, out_features, in_features, group_size, bits);
  check_shape(kName, "tiles", tiles, {tile_count(sizes.n), sizes.steps, step_bytes(sizes.bits)});
  check_dtype(kName, "tiles", tiles, at::kByte);
  const Tensor t = tiles.contiguous(), rows = at::empty({sizes.n, row_bytes(sizes.k, sizes.bits)}, at::kByte);
  py::gil_scoped_release release;
  untile_codes(t.const_data_ptr<uint8_t>(), sizes.n, sizes.k, sizes.length, sizes.bits,
               rows.mutable_data_ptr<uint8_t>(), at::get_num_threads());
  return rows;
}

}  // namespace

void bind_tiles(py::module_& m) {
  m.def("tile_codes", &py_tile_codes, py::arg("rows"), py::arg("in_features"), py::arg("group_size"), py::arg("bits"),
        "Rows of codes, packed uint8 [N, ceil(K / 2)] for 4 bits, uint8 [N, K] for 8 -> the tiles that quant_linear "
        "reads, uint8 [T, S, 16 bits].");
  m.def("untile_codes", &py_untile_codes, py::arg("tiles"), py::arg("out_features"), py::arg("in_features"),
        py::arg("group_size"), py::arg("bits"), "Inverse of tile_codes.");
}

}  // namespace awq
