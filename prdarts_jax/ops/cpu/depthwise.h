// Depthwise convolution of one image: rows of it, and the gradient of its kernel.
#pragma once

#include "vectors.h"

namespace prdarts {

// y[j] = sum_{p,q} image[row + d p, s j + d q] * kernel[p, q] for the pixels j of one row of the output.
// kernel: [K * K][channels of the image]; y: pixels of `channels` floats.
template <int K, int kPixels>
inline void convolve_pixels(const Padded& image, const float* kernel, int64_t row, int64_t j, int64_t s, int64_t d,
                            float* y) {
  const int64_t channels = image.channels;
  for (int64_t c = 0; c < channels; c += kLanes) {
    Vec sums[kPixels] = {};
    for (int p = 0; p < K; ++p) {
      const float* line = image.at(row + d * p, s * j) + c;
#pragma GCC unroll 7
      for (int q = 0; q < K; ++q) {
        const Vec w = load(kernel + (p * K + q) * channels + c);
        const float* from = line + d * q * channels;
#pragma GCC unroll 8
        for (int t = 0; t < kPixels; ++t) sums[t] += w * load(from + t * s * channels);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < kPixels; ++t) store(y + t * channels + c, sums[t]);
  }
}

template <int K>
void convolve_row(const Padded& image, const float* kernel, int64_t row, int64_t width, int64_t s, int64_t d, float* y) {
  int64_t j = 0;
  for (; j + 8 <= width; j += 8) convolve_pixels<K, 8>(image, kernel, row, j, s, d, y + j * image.channels);
  for (; j + 4 <= width; j += 4) convolve_pixels<K, 4>(image, kernel, row, j, s, d, y + j * image.channels);
  for (; j < width; ++j) convolve_pixels<K, 1>(image, kernel, row, j, s, d, y + j * image.channels);
}

// sums[p, q] += sum_{i,j} image[s i + d p, s j + d q] * dy[i, j] for kernel rows [first, first + kRows).
// dy: an image whose pixel (i, j) lies at dy.at(border + i step, border + j step).
template <int K, int kRows>
void correlate_rows(const Padded& image, const Padded& dy, int64_t border, int64_t step, int64_t height, int64_t width,
                    int64_t s, int64_t d, int first, float* sums) {
  const int64_t channels = image.channels;
  for (int64_t c = 0; c < channels; c += kLanes) {
    Vec acc[kRows * K];
#pragma GCC unroll 32
    for (int t = 0; t < kRows * K; ++t) acc[t] = load(sums + (first * K + t) * channels + c);
    for (int64_t i = 0; i < height; ++i) {
      for (int64_t j = 0; j < width; ++j) {
        const Vec g = load(dy.at(border + i * step, border + j * step) + c);
        const float* corner = image.at(s * i + d * first, s * j) + c;
#pragma GCC unroll 7
        for (int p = 0; p < kRows; ++p) {
#pragma GCC unroll 7
          for (int q = 0; q < K; ++q) {
            acc[p * K + q] += g * load(corner + (d * p * image.columns + d * q) * channels);
          }
        }
      }
    }
#pragma GCC unroll 32
    for (int t = 0; t < kRows * K; ++t) store(sums + (first * K + t) * channels + c, acc[t]);
  }
}

template <int K>
void correlate(const Padded& image, const Padded& dy, int64_t border, int64_t step, int64_t height, int64_t width,
               int64_t s, int64_t d, float* sums) {
  constexpr int kRows = kSums / K < K ? kSums / K : K;
  int first = 0;
  for (; first + kRows <= K; first += kRows) {
    correlate_rows<K, kRows>(image, dy, border, step, height, width, s, d, first, sums);
  }
  if constexpr (K % kRows != 0) {
    correlate_rows<K, K % kRows>(image, dy, border, step, height, width, s, d, first, sums);
  }
}

// kernel [K * K][channels] -> [K * K][whole vectors], flipped if asked for.
inline void lay_out(const float* kernel, int64_t taps, int64_t channels, bool flip, float* to) {
  const int64_t wide = padded(channels);
  std::memset(to, 0, 4 * taps * wide);
  for (int64_t t = 0; t < taps; ++t) {
    std::memcpy(to + (flip ? taps - 1 - t : t) * wide, kernel + t * channels, 4 * channels);
  }
}

}  // namespace prdarts
