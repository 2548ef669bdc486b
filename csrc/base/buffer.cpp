#include "base/buffer.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <new>

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

void* allocate_buffer(int64_t bytes) {
  constexpr int64_t kAlignment = 64, kLarge = 8 << 20;
  void* data = bytes < kLarge ? nullptr : allocate_large(bytes);
  if (data == nullptr && posix_memalign(&data, kAlignment, static_cast<size_t>(std::max(bytes, kAlignment))) != 0)
    throw std::bad_alloc();
  return data;
}

void free_buffer(void* data) { std::free(data); }

}  // namespace awq
