// The product of a warp; see device.h.
#include <cstring>

#include "cuda/device.h"

namespace awq::cuda {

// Lane l = 4 g + t. Of A [16][16] it holds rows g (a0, a2) and g + 8 (a1, a3), columns 2t, 2t + 1 (a0, a1) and 2t + 8,
// 2t + 9 (a2, a3); of B [16][8] column g, rows 2t, 2t + 1 (b0) and 2t + 8, 2t + 9 (b1); of C [16][8] rows g (c0, c1)
// and g + 8 (c2, c3), columns 2t and 2t + 1.
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float (*value)(uint16_t)) {
  struct Fragments {
    uint32_t a[4], b[2];
  } mine;
  static_assert(sizeof(Fragments) <= kLaneBytes);
  std::memcpy(mine.a, a, sizeof(mine.a));
  std::memcpy(mine.b, b, sizeof(mine.b));
  const unsigned char* lanes = exchange(&mine, sizeof(mine));
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  for (int k = 0; k < 16; ++k) {
    const int holder = k % 8 / 2, half = k / 8, shift = k % 2 * 16;
    const auto of_a = lane_value<Fragments>(lanes, 4 * g + holder);
    for (int i = 0; i < 2; ++i) {
      const auto of_b = lane_value<Fragments>(lanes, 4 * (2 * t + i) + holder);
      const float y = value(static_cast<uint16_t>(of_b.b[half] >> shift));
      c[i] += value(static_cast<uint16_t>(of_a.a[2 * half] >> shift)) * y;
      c[2 + i] += value(static_cast<uint16_t>(of_a.a[2 * half + 1] >> shift)) * y;
    }
  }
}

}  // namespace awq::cuda
