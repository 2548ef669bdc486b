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
  if (dtype == Dtype::bf16 && table.dot_bf16 != nullptr) return in_vectors(table, Element::bf16_pair, 1, rows);
  if (table.tiles_bf16 == nullptr) return in_vectors(table, Element::f32, 1, rows);
  if (rows > kVectorRows) return on_tiles(Element::bf16_tile, bf16_terms(dtype), rows);
  return dtype == Dtype::bf16 ? in_vectors(table, Element::int8_step, kInt8Terms, rows)
                              : in_vectors(table, Element::f32, 1, rows);
}

namespace {

constexpr const char* kFma = "fp32 FMA";

std::string kernel_name(const Choice& c) {
  const std::string terms = c.terms == 1 ? "" : ", each activation in " + std::to_string(c.terms) + " terms";
  switch (c.element) {
    case Element::f32:
      return kFma;
    case Element::bf16_pair:
      return "products of bf16 vectors";
    case Element::int8_step:
      return "products of bytes" + terms;
    case Element::bf16_tile:
      return "bf16 tiles" + terms;
    case Element::int8_tile:
      return "int8 tiles";
  }
  return "";
}

constexpr const char* kNoBf16 = "this level has no products of bf16";

// Why activations are multiplied like this: what choose() and the comments above say, also where tiles are emulated.
std::string reason(const KernelTable& table, Dtype dtype, Compute compute, const Choice& c) {
  if (c.element == Element::bf16_pair) return "one instruction does twice the products of fp32 FMA";
  if (on_tiles(c.element)) {
    const std::string many = "more rows: tiles take 16 at once";
    return c.terms == 1 ? many : many + ", and " + std::to_string(c.terms) + " terms hold every bit";
  }
  if (table.tiles_bf16 == nullptr) {
    if (compute == Compute::int8) return "asked for, and this level has no tiles";
    return dtype == Dtype::bf16 ? kNoBf16 : "bf16 or bytes would lose bits, and this level has no tiles";
  }
  const std::string few = "few rows: reading the weight takes longest, tiles would be slower";
  return c.element == Element::f32 ? few + " and bytes less exact" : few;
}

// One line for each run of row numbers that use the same kernel.
void describe(const KernelTable& table, const std::string& job, Dtype dtype, Compute compute, std::vector<Job>& jobs) {
  constexpr int64_t kLast = 64;  // choices change at fewer rows only
  for (int64_t first = 1, last; first <= kLast; first = last + 1) {
    const Choice choice = choose(table, dtype, compute, first);
    const std::string kernel = kernel_name(choice);
    for (last = first; last < kLast && kernel_name(choose(table, dtype, compute, last + 1)) == kernel;) ++last;
    const std::string from = std::to_string(first);
    const std::string rows = last == kLast  ? from + (first == 1 ? " row or more" : " rows or more")
                             : last > first ? from + " to " + std::to_string(last) + " rows"
                                            : from + " rows";
    jobs.push_back({job + ", " + rows, kernel, reason(table, dtype, compute, choice)});
  }
}

// What quantize() computes: see stats.h, quadratic.h, feedback.h, factor_tiles.h and refine_scales.cpp, whose comments
// derive the bounds.
void describe_on_tiles(std::vector<Job>& jobs) {
  const std::string tiles = "bf16 tiles";
  jobs.push_back({"second moments, bf16", tiles, "fp32 holds each product of two bf16 exactly"});
  jobs.push_back({"second moments, fp16", tiles + ", each activation in 2 terms", "2 terms hold every bit"});
  jobs.push_back({"second moments, fp32 or weighted", tiles + ", each activation in 3 terms",
                  "3 terms hold every bit; at most 2^-24 of a product is left out"});
  jobs.push_back({"ranking and fit of scales, clips", tiles, "rounding to bf16 moves a loss by about 0.4 %"});
  const std::string many = std::to_string(kSplitChannels) + " channels or more", two = ", each factor in 2 terms";
  const char* enough = "over so many channels, 2 terms are about as exact as fp32";
  jobs.push_back({"losses, " + many, tiles + two, enough});
  jobs.push_back({"losses, fewer channels", kFma, "fp32 has few sums, and 2 terms would be less exact"});
  jobs.push_back({"error feedback, " + many, tiles + two, enough});
  const std::string three = tiles + ", each factor in 3 terms";
  const char* needed = "the precision of fp32 is needed, and 3 terms have it";
  jobs.push_back({"error feedback, fewer channels", three, needed});
  jobs.push_back({"factors of second moments", three, needed});
}

void describe_in_vectors(bool bf16, std::vector<Job>& jobs) {
  const std::string one = bf16 ? "products of bf16 vectors" : kFma;
  const auto why = [&](const char* with_bf16) { return bf16 ? with_bf16 : kNoBf16; };
  const char* lost = why("bf16 would lose bits, and several terms are no faster");
  jobs.push_back({"second moments, bf16", one, why("fp32 holds each product of two bf16 exactly")});
  jobs.push_back({"second moments, fp16", kFma, lost});
  jobs.push_back({"second moments, fp32 or weighted", kFma, lost});
  jobs.push_back({"ranking and fit of scales, clips", one, why("rounding to bf16 moves a loss by about 0.4 %")});
  jobs.push_back({"losses, error feedback", kFma, "these need the precision of fp32"});
}

}  // namespace

std::vector<Job> describe_choices(const KernelTable& table) {
  std::vector<Job> jobs;
  describe(table, "bf16 activations", Dtype::bf16, Compute::automatic, jobs);
  describe(table, "fp16 activations", Dtype::f16, Compute::automatic, jobs);
  describe(table, "fp32 activations", Dtype::f32, Compute::automatic, jobs);
  describe(table, "compute_dtype=\"int8\"", Dtype::bf16, Compute::int8, jobs);
  if (on_tiles(table.bf16_products))
    describe_on_tiles(jobs);
  else
    describe_in_vectors(table.bf16_products != nullptr, jobs);
  return jobs;
}

}  // namespace awq
