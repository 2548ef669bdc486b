// The processor this runs on, and what of it programs may use.
#pragma once

#include <string>

namespace awq {

struct Processor {
  std::string vendor;  // "GenuineIntel", "AuthenticAMD", ... as CPUID says it; empty where there is no CPUID
  int family = 0, model = 0;
  bool avx2 = false;         // with FMA
  bool avx512 = false;       // F, BW, DQ, VL
  bool avx512_vnni = false;  // products of bytes
  bool avx512_bf16 = false;
  bool amx = false;  // tiles, bf16 and int8, and the system lets this process use them
};

// Asked once. The system is asked for the tile registers here; where it refuses, the processor counts as one without.
const Processor& processor();

}  // namespace awq
