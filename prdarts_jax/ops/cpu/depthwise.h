// Depthwise convolution of one image: its loops (loops.cc) and their kernels.
#pragma once

#include "vectors.h"

namespace prdarts {

// The loops of a geometry, and those of its input gradient (the gradient, S apart, meets the flipped kernel).
struct Loops {
  void (*convolve)(const Planes& image, const float* kernel, int64_t row, int64_t width, float* y);
  void (*correlate)(const Planes& image, const Planes& dy, int64_t border, int64_t step, int64_t height, int64_t width,
                    float* sums);
  void (*transpose)(const Planes& image, const float* kernel, int64_t row, int64_t width, float* y);
};

// Those that are compiled; all null for another geometry.
Loops loops_of(int64_t k, int64_t s, int64_t d);

// kernel [K * K][channels] -> [K * K][whole vectors], flipped if asked for.
inline void lay_out(const float* kernel, int64_t taps, int64_t channels, bool flip, float* to) {
  const int64_t wide = padded(channels);
  std::memset(to, 0, 4 * taps * wide);
  for (int64_t t = 0; t < taps; ++t) {
    std::memcpy(to + (flip ? taps - 1 - t : t) * wide, kernel + t * channels, 4 * channels);
  }
}

}  // namespace prdarts
