// Uninitialized scratch memory on cache-line boundaries. std::vector would first write zeros over hundreds of
// megabytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace awq {

template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size)
      : data_(static_cast<T*>(::operator new(static_cast<size_t>(size) * sizeof(T), std::align_val_t(kAlignment)))) {}
  Buffer(Buffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Buffer& operator=(Buffer&& other) noexcept {
    T* mine = data_;
    data_ = other.data_;
    other.data_ = mine;
    return *this;
  }
  ~Buffer() { ::operator delete(data_, std::align_val_t(kAlignment)); }

  T* get() { return data_; }
  const T* get() const { return data_; }

 private:
  static constexpr size_t kAlignment = 64;
  T* data_ = nullptr;
};

}  // namespace awq
