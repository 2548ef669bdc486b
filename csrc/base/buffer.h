// Memory: uninitialized scratch on cache-line boundaries (std::vector would first write zeros over hundreds of
// megabytes), and large pages.
#pragma once

#include <cstddef>
#include <cstdint>

namespace awq {

// `bytes` on a cache-line boundary, in large pages where they are worth it: to clear a fresh page of 4 KiB costs about
// as much as to fill it, and a matrix of 8192 x 8192 has 65,000 of them. Throws std::bad_alloc. Released by
// free_buffer.
void* allocate_buffer(int64_t bytes);
void free_buffer(void* data);

template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) : data_(static_cast<T*>(allocate_buffer(size * static_cast<int64_t>(sizeof(T))))) {}
  Buffer(Buffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Buffer& operator=(Buffer&& other) noexcept {
    T* mine = data_;
    data_ = other.data_;
    other.data_ = mine;
    return *this;
  }
  ~Buffer() { free_buffer(data_); }

  T* get() { return data_; }
  const T* get() const { return data_; }

 private:
  T* data_ = nullptr;
};

// A buffer for the duration of a call. Up to a limit (kMostKept) the thread keeps the memory for the next call: fresh
// pages from the system at every call cost a sixth of a product of 16 rows. Only one at a time for each Tag.
template <class Tag, class T>
class Scratch {
 public:
  explicit Scratch(int64_t size) {
    if (size * static_cast<int64_t>(sizeof(T)) > kMostKept) {
      own_ = Buffer<T>(size);
      data_ = own_.get();
      return;
    }
    if (size > kept_size_) {
      kept_ = Buffer<T>(size);
      kept_size_ = size;
    }
    data_ = kept_.get();
  }

  T* get() { return data_; }
  const T* get() const { return data_; }

 private:
  static constexpr int64_t kMostKept = 16 << 20;
  static inline thread_local Buffer<T> kept_;
  static inline thread_local int64_t kept_size_ = 0;
  Buffer<T> own_;
  T* data_;
};

// Memory for data that is streamed often, in large pages where the system has them: a product with one row then spends
// no time on address translation, which would be a tenth of it. It begins on a page boundary, so only a few bytes at
// its end lie outside large pages. Null if it is smaller than one page, or there is no memory. Released by free_large.
void* allocate_large(int64_t bytes);
void free_large(void* data);

}  // namespace awq
