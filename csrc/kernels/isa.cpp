#include "kernels/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace awq {
namespace {

struct Level {
  Isa isa;
  const char* name;
  const KernelTable* table;
  bool (*runs_here)();
};

#if defined(__x86_64__)
bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
         __builtin_cpu_supports("avx512dq") != 0 && __builtin_cpu_supports("avx512vl") != 0;
}
#endif

// __builtin_cpu_supports also asks whether the operating system saves the wide registers.
constexpr Level kLevels[] = {
    {Isa::scalar, "scalar", &kScalarKernels, [] { return true; }},
#if defined(__x86_64__)
    {Isa::avx2, "avx2", &kAvx2Kernels,
     [] { return __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0; }},
    {Isa::avx512, "avx512", &kAvx512Kernels, runs_avx512},
    {Isa::avx512_vnni, "avx512_vnni", &kAvx512VnniKernels,
     [] { return runs_avx512() && __builtin_cpu_supports("avx512vnni") != 0; }},
    // Every processor that has the products of bf16 has those of bytes too.
    {Isa::avx512_bf16, "avx512_bf16", &kAvx512Bf16Kernels,
     [] {
       return runs_avx512() && __builtin_cpu_supports("avx512vnni") != 0 && __builtin_cpu_supports("avx512bf16") != 0;
     }},
#elif defined(__aarch64__)
    {Isa::neon, "neon", &kNeonKernels, [] { return true; }},
#endif
};

std::string choices() {
  std::string text;
  for (Isa isa : available_isas()) text += (text.empty() ? "" : ", ") + std::string(isa_name(isa));
  return text;
}

const Level& find_level(const std::string& name, const char* source) {
  for (const Level& level : kLevels)
    if (name == level.name && level.runs_here()) return level;
  throw std::invalid_argument(std::string(source) + ": expected one of " + choices() + " on this processor, got '" +
                              name + "'");
}

const Level& default_level() {
  const char* name = std::getenv("AWQ_EXT_ISA");
  if (name != nullptr && *name != '\0') return find_level(name, "environment variable AWQ_EXT_ISA");
  const Level* best = &kLevels[0];
  for (const Level& level : kLevels)
    if (level.runs_here()) best = &level;
  return *best;
}

std::atomic<const Level*> chosen{nullptr};

const Level& current_level() {
  const Level* level = chosen.load(std::memory_order_acquire);
  if (level == nullptr) {
    level = &default_level();
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
  for (const Level& level : kLevels)
    if (level.runs_here()) isas.push_back(level.isa);
  return isas;
}

Isa current_isa() { return current_level().isa; }
void set_isa(const std::string& name) { chosen.store(&find_level(name, "set_isa: argument 'name'")); }
const KernelTable& kernels() { return *current_level().table; }

}  // namespace awq
