#include "drivers/choice.h"

#include "drivers/products.h"
#include "drivers/quadratic.h"

namespace awq {
namespace {

// Rows of activations up to which vectors beat tiles. Measured on Emerald Rapids (2 cores, 4096 x 4096, microseconds of
// a prototype and of the vector kernels): one row takes 503 by fp32 FMA, 403 by bytes, 566 by tiles, which take as long
// for sixteen rows; eight rows of bytes take 485.
constexpr int64_t kVectorRows = 2, kVectorRowsInt8 = 8;

// A row in three terms of eight bits differs from the row by at most 2^-24 of the largest activation of a run, as
// rounding to fp32 does at that activation. Two terms, 2^-16, would cost small activations beside a large one more than
// rounding them to bf16 does.
constexpr int kInt8Terms = 3;

// In terms of eight bits a bf16 takes one, a half two, a float three, exactly.
int bf16_terms(Dtype dtype) { return dtype == Dtype::bf16 ? 1 : dtype == Dtype::f16 ? 2 : 3; }

Choice on_tiles(Element element, int terms, int64_t rows) {
  return {element, terms, rows * terms <= kMostTileRows ? Way::stream : Way::panel, kMostTileRows};
}

// From 8 rows in a block on, decoding hides behind the products (0.97 of their peak rate in bf16, 0.9 in fp32), and a
// panel, which is larger than the codes, only costs. With 16 registers a block has 4 rows, and a panel wins above three
// such blocks.
Choice in_vectors(const KernelTable& table, Element element, int terms, int64_t rows) {
  // kBf16Rows: the activations and weights of a block fit the first-level cache; twelve rows were slower when measured.
  constexpr int64_t kBf16Rows = 9, kManyRows = 8, kPanelRows = 12;
  if (rows * terms <= table.dot_rows) return {element, terms, Way::stream, table.dot_rows};
  if (element == Element::bf16_pair) return {element, terms, Way::decode, kBf16Rows};
  if (element == Element::int8_step || table.dot_rows >= kManyRows || rows <= kPanelRows)
    return {element, terms, Way::decode, table.dot_rows};
  return {element, terms, Way::panel, table.tile_rows};
}

}  // namespace

Choice choose(const KernelTable& table, Dtype dtype, Compute compute, int64_t rows) {
  if (compute == Compute::int8) {
    const bool tiles = table.tiles_int8 != nullptr && rows > kVectorRowsInt8;
    return tiles ? on_tiles(Element::int8_tile, 1, rows) : in_vectors(table, Element::int8_step, 1, rows);
  }
  if (dtype == Dtype::bf16 && table.int4_dot_bf16 != nullptr) return in_vectors(table, Element::bf16_pair, 1, rows);
  if (table.tiles_bf16 == nullptr) return in_vectors(table, Element::f32, 1, rows);
  if (rows > kVectorRows) return on_tiles(Element::bf16_tile, bf16_terms(dtype), rows);
  return dtype == Dtype::bf16 ? in_vectors(table, Element::int8_step, kInt8Terms, rows)
                              : in_vectors(table, Element::f32, 1, rows);
}

namespace {

// What quantize() computes: see stats.cpp, quadratic.cpp and refine_scales.cpp.
void add_quantizing(const KernelTable& table, std::vector<Job>& jobs) {
  const Bf16Products* products = table.bf16_products;
  const bool tiles = on_tiles(products);
  const std::string one = tiles                 ? "bf16 tiles"
                          : products != nullptr ? "products of bf16 vectors"
                                                : "fp32 FMA",
                    fma = "fp32 FMA";
  const char *exact = products != nullptr ? "exact products, fp32 sums" : "no fast products of bf16 here",
             *none = products != nullptr ? "more than one term would be slower" : "no fast products of bf16 here";
  jobs.push_back({"second moments of bf16 activations", one, exact});
  jobs.push_back({"second moments of fp16 activations", tiles ? one + ", each activation in 2 terms" : fma,
                  tiles ? "four exact products, fp32 sums" : none});
  jobs.push_back({"second moments of fp32 activations, or of weighted rows",
                  tiles ? one + ", each activation in 3 terms" : fma, tiles ? "six exact products, fp32 sums" : none});
  jobs.push_back({"ranking of scales, fit of the groups' scales", one,
                  products != nullptr ? "factors rounded to bf16, fp32 sums" : "no fast products of bf16 here"});
  const std::string from = std::to_string(kSplitChannels);
  if (tiles)
    jobs.push_back({"losses, " + from + " channels or more", one + ", each factor in 2 terms",
                    "off by no more than fp32 sums may be"});
  jobs.push_back({tiles ? "losses, fewer channels; clips, error feedback" : "losses, clips, error feedback", fma,
                  tiles ? "few sums, or sums that go on one from the other, as exact as fp32" : "as exact as fp32"});
}

}  // namespace

std::vector<Job> describe_choices(const KernelTable& table) {
  std::vector<Job> jobs;
  const auto name = [](const Choice& c) -> std::string {
    switch (c.element) {
      case Element::f32:
        return "fp32 FMA";
      case Element::bf16_pair:
        return "products of bf16 vectors";
      case Element::int8_step:
        return c.terms == 1 ? "products of bytes" : "products of bytes, each activation in three terms";
      case Element::bf16_tile:
        return c.terms == 1 ? "bf16 tiles" : "bf16 tiles, each activation in " + std::to_string(c.terms) + " terms";
      case Element::int8_tile:
        return "int8 tiles";
    }
    return "";
  };
  const auto add = [&](const char* job, Dtype dtype, Compute compute, const char* few, const char* many) {
    constexpr int64_t kMost = 1 << 20;
    for (int64_t rows = 1; rows <= kMost;) {
      const std::string kernel = name(choose(table, dtype, compute, rows));
      int64_t end = rows;  // the last of these rows: choices change below a hundred rows only
      while (end < 100 && name(choose(table, dtype, compute, end + 1)) == kernel) ++end;
      const bool last = end == 100;
      const std::string from = std::to_string(rows),
                        range = last ? from + " rows or more" : from + " to " + std::to_string(end) + " rows";
      jobs.push_back({std::string(job) + ", " + range, kernel, last ? many : few});
      if (last) break;
      rows = end + 1;
    }
  };
  const bool tiles = table.tiles_bf16 != nullptr, pairs = table.int4_dot_bf16 != nullptr;
  const char* vectors = tiles ? "bound by memory: vectors start sooner than tiles" : "";
  const char* most = tiles   ? "tiles do the most products a cycle"
                     : pairs ? "the most products a cycle on this level"
                             : "this level has nothing faster that keeps the activations as they are";
  add("bf16 activations", Dtype::bf16, Compute::automatic, vectors, most);
  add("fp16 activations", Dtype::f16, Compute::automatic, vectors, tiles ? most : "no faster exact products of fp16");
  add("fp32 activations", Dtype::f32, Compute::automatic, vectors, tiles ? most : "no faster exact products of fp32");
  add("compute_dtype=\"int8\"", Dtype::bf16, Compute::int8, vectors, tiles ? most : "four products a lane");
  add_quantizing(table, jobs);
  return jobs;
}

}  // namespace awq
