#include "kernels/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "kernels/tile_check.h"

namespace awq {
namespace {

struct Level {
  Isa isa;
  const char* name;
  const KernelTable* table;
  bool (*runs)(const Machine&);
  bool (*fast)(const Machine&);  // whether it may be chosen by default
  const char* reason;            // for a person: why it is the default where it is
};

bool always(const Machine&) { return true; }

#if defined(__x86_64__)
bool never(const Machine&) { return false; }
bool has_vnni(const Machine& m) { return m.processor.avx512_vnni; }

// Tile registers count only where they compute what their plain form does. No processor that was at hand when they were
// written has them, and some virtual machines lose what they hold.
bool runs_amx(const Machine& m) { return m.processor.amx && m.tiles_agree(kAmxKernels, kAmxEmulatedKernels); }
#endif

// In rising order: the last that runs and is fast here is the default. Whether an instruction exists says nothing about
// its speed: a product of bf16 vectors is issued twice a cycle on AMD's Zen 5 and once in two on Zen 4, but once in
// five cycles on Intel's Sapphire and Emerald Rapids, slower than fp32 FMA. Those have tile registers instead.
constexpr Level kLevels[] = {
    {Isa::scalar, "scalar", &kScalarKernels, always, always, "every processor has it"},
#if defined(__x86_64__)
    {Isa::amx_plain, "amx_plain", &kAmxPlainKernels, always, never, ""},
    {Isa::avx2, "avx2", &kAvx2Kernels, [](const Machine& m) { return m.processor.avx2; }, always,
     "this processor has no AVX-512"},
    {Isa::avx512, "avx512", &kAvx512Kernels, [](const Machine& m) { return m.processor.avx512; }, always,
     "this processor has no products of bytes (VNNI)"},
    {Isa::amx_emulated, "amx_emulated", &kAmxEmulatedKernels, has_vnni, never, ""},
    {Isa::avx512_vnni, "avx512_vnni", &kAvx512VnniKernels, has_vnni, always,
     "no AMX here, and no products of bf16 that are known to be fast"},
    {Isa::avx512_bf16, "avx512_bf16", &kAvx512Bf16Kernels, [](const Machine& m) { return m.processor.avx512_bf16; },
     [](const Machine& m) { return m.processor.vendor == "AuthenticAMD"; }, "AMD's products of bf16 vectors are fast"},
    {Isa::amx, "amx", &kAmxKernels, runs_amx, always,
     "tile registers do the most products a cycle; products of bf16 vectors are slow where they exist"},
#elif defined(__aarch64__)
    {Isa::neon, "neon", &kNeonKernels, always, always, "every aarch64 processor has it"},
#endif
};

// Those that run, the least first.
std::vector<const Level*> levels_on(const Machine& machine) {
  std::vector<const Level*> levels;
  for (const Level& level : kLevels)
    if (level.runs(machine)) levels.push_back(&level);
  return levels;
}

const Level& fastest(const std::vector<const Level*>& levels, const Machine& machine) {
  const Level* best = levels.front();
  for (const Level* level : levels)
    if (level->fast(machine)) best = level;
  return *best;
}

const Machine& this_machine() {
  static const Machine machine{processor(), tiles_agree};
  return machine;
}

// Asked once: the check of the tiles takes a while.
const std::vector<const Level*>& levels_here() {
  static const std::vector<const Level*> levels = levels_on(this_machine());
  return levels;
}

std::string choices() {
  std::string text;
  for (Isa isa : available_isas()) text += (text.empty() ? "" : ", ") + std::string(isa_name(isa));
  return text;
}

const Level& find_level(const std::string& name, const char* source) {
  for (const Level* level : levels_here())
    if (name == level->name) return *level;
  throw std::invalid_argument(std::string(source) + ": expected one of " + choices() + " on this processor, got '" +
                              name + "'");
}

const Level& first_level() {
  const char* name = std::getenv("AWQ_EXT_ISA");
  if (name != nullptr && *name != '\0') return find_level(name, "environment variable AWQ_EXT_ISA");
  return fastest(levels_here(), this_machine());
}

std::atomic<const Level*> chosen{nullptr};

const Level& current_level() {
  const Level* level = chosen.load(std::memory_order_acquire);
  if (level == nullptr) {
    level = &first_level();
    chosen.store(level, std::memory_order_release);
  }
  return *level;
}

}  // namespace

const char* isa_name(Isa isa) {
  for (const Level& level : kLevels)
    if (level.isa == isa) return level.name;
  return "unavailable";
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
  for (const Level* level : levels_here()) isas.push_back(level->isa);
  return isas;
}

DefaultIsa default_isa(const Machine& machine) {
  const Level& level = fastest(levels_on(machine), machine);
  return {level.isa, level.reason};
}

DefaultIsa default_isa() {
  const Level& level = fastest(levels_here(), this_machine());
  return {level.isa, level.reason};
}

Isa current_isa() { return current_level().isa; }
void set_isa(const std::string& name) { chosen.store(&find_level(name, "set_isa: argument 'name'")); }
const KernelTable& kernels() { return *current_level().table; }

}  // namespace awq
