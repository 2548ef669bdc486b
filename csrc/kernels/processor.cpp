#include "kernels/processor.h"

#if defined(__x86_64__)
#include <cpuid.h>

#include <cstdint>
#include <cstring>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace awq {
namespace {

#if defined(__x86_64__)

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;

  Registers(unsigned leaf, unsigned part) { __get_cpuid_count(leaf, part, &eax, &ebx, &ecx, &edx); }
};

// What the operating system saves of a thread's registers.
uint64_t saved_registers() {
  if ((Registers(1, 0).ecx >> 27 & 1) == 0) return 0;  // OSXSAVE
  uint32_t low, high;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

// Linux gives a process the 8 KiB of tile data in every thread's state only when asked.
bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_amx() {
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBf16 | kTile | kInt8;
  constexpr uint64_t kState = 3u << 17;  // tile configuration and tile data
  return (Registers(7, 0).edx & kAll) == kAll && (saved_registers() & kState) == kState && may_use_tiles();
}

Processor ask() {
  Processor p;
  const Registers first(0, 0), version(1, 0);
  char vendor[13] = {};
  std::memcpy(vendor, &first.ebx, 4);
  std::memcpy(vendor + 4, &first.edx, 4);
  std::memcpy(vendor + 8, &first.ecx, 4);
  p.vendor = vendor;
  const unsigned family = version.eax >> 8 & 15, model = version.eax >> 4 & 15;
  p.family = static_cast<int>(family == 15 ? family + (version.eax >> 20 & 255) : family);
  p.model = static_cast<int>(model | (version.eax >> 16 & 15) << 4);
  // __builtin_cpu_supports also asks whether the operating system saves the wide registers.
  p.avx2 = __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0;
  p.avx512 = __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
             __builtin_cpu_supports("avx512dq") != 0 && __builtin_cpu_supports("avx512vl") != 0;
  p.avx512_vnni = p.avx512 && __builtin_cpu_supports("avx512vnni") != 0;
  p.avx512_bf16 = p.avx512_vnni && __builtin_cpu_supports("avx512bf16") != 0;
  p.amx = p.avx512_vnni && has_amx();
  return p;
}

#else

Processor ask() { return {}; }

#endif

}  // namespace

const Processor& processor() {
  static const Processor found = ask();
  return found;
}

}  // namespace awq
