#include "base/buffer.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>

namespace awq {

void* allocate_large(int64_t bytes) {
  constexpr int64_t kLargePage = 2 << 20;
  void* data = nullptr;
  if (bytes < kLargePage || posix_memalign(&data, kLargePage, static_cast<size_t>(bytes)) != 0) return nullptr;
#if defined(__linux__)
  // Only advice: the memory works as well where the system refuses.
  (void)madvise(data, static_cast<size_t>(bytes / kLargePage * kLargePage), MADV_HUGEPAGE);
#endif
  return data;
}

void free_large(void* data) { std::free(data); }

}  // namespace awq
