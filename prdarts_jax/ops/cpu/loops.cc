// The loops of a depthwise convolution: rows of it, and the gradient of its kernel, for each geometry.
#include "depthwise.h"

namespace prdarts {
namespace {

// y[j] = sum_{p,q} image[row + D p, S j + D q] * kernel[p, q] for kPixels pixels from j on.
// kernel: [K * K][channels of the image]; y: pixels of as many floats.
template <int K, int S, int D, int kPixels>
inline void convolve_pixels(const Planes& image, const float* kernel, int64_t row, int64_t j, float* y) {
  const int64_t channels = image.channels;
  for (int64_t c = 0; c < channels; c += kLanes) {
    Vec sums[kPixels] = {};
    const float* corner = image.at(c / kLanes, row, S * j);
    for (int p = 0; p < K; ++p) {
      const float* line = corner + D * p * image.columns * kLanes;
#pragma GCC unroll 7
      for (int q = 0; q < K; ++q) {
        const Vec w = load(kernel + (p * K + q) * channels + c);
#pragma GCC unroll 8
        for (int t = 0; t < kPixels; ++t) sums[t] += w * load(line + (D * q + S * t) * kLanes);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < kPixels; ++t) store(y + t * channels + c, sums[t]);
  }
}

// One row of the output.
template <int K, int S, int D>
void convolve_row(const Planes& image, const float* kernel, int64_t row, int64_t width, float* y) {
  int64_t j = 0;
  for (; j + 8 <= width; j += 8) convolve_pixels<K, S, D, 8>(image, kernel, row, j, y + j * image.channels);
  for (; j + 4 <= width; j += 4) convolve_pixels<K, S, D, 4>(image, kernel, row, j, y + j * image.channels);
  for (; j < width; ++j) convolve_pixels<K, S, D, 1>(image, kernel, row, j, y + j * image.channels);
}

// sums[p, q] += sum_{i,j} image[S i + D p, S j + D q] * dy[i, j] for the rows [first, first + kRows) of the kernel.
// Pixel (i, j) of dy is pixel (border + step i, border + step j) of `dy`.
template <int K, int S, int D, int kRows>
void correlate_rows(const Planes& image, const Planes& dy, int64_t border, int64_t step, int64_t height, int64_t width,
                    int first, float* sums) {
  const int64_t channels = image.channels;
  for (int64_t c = 0; c < channels; c += kLanes) {
    Vec acc[kRows * K];
#pragma GCC unroll 32
    for (int t = 0; t < kRows * K; ++t) acc[t] = load(sums + (first * K + t) * channels + c);
    for (int64_t i = 0; i < height; ++i) {
      const float* gradient = dy.at(c / kLanes, border + i * step, border);
      const float* lines[kRows];
#pragma GCC unroll 7
      for (int p = 0; p < kRows; ++p) lines[p] = image.at(c / kLanes, S * i + D * (first + p), 0);
      for (int64_t j = 0; j < width; ++j) {
        const Vec g = load(gradient + j * step * kLanes);
#pragma GCC unroll 7
        for (int p = 0; p < kRows; ++p) {
#pragma GCC unroll 7
          for (int q = 0; q < K; ++q) acc[p * K + q] += g * load(lines[p] + (S * j + D * q) * kLanes);
        }
      }
    }
#pragma GCC unroll 32
    for (int t = 0; t < kRows * K; ++t) store(sums + (first * K + t) * channels + c, acc[t]);
  }
}

template <int K, int S, int D>
void correlate(const Planes& image, const Planes& dy, int64_t border, int64_t step, int64_t height, int64_t width,
               float* sums) {
  constexpr int kRows = kSums / K < K ? kSums / K : K;
  int first = 0;
  for (; first + kRows <= K; first += kRows) {
    correlate_rows<K, S, D, kRows>(image, dy, border, step, height, width, first, sums);
  }
  if constexpr (K % kRows != 0) {
    correlate_rows<K, S, D, K % kRows>(image, dy, border, step, height, width, first, sums);
  }
}

template <int K, int S, int D>
constexpr Loops loops() {
  return {convolve_row<K, S, D>, correlate<K, S, D>, convolve_row<K, 1, D>};
}

}  // namespace

Loops loops_of(int64_t k, int64_t s, int64_t d) {
  switch (100 * k + 10 * s + d) {
    case 111: return loops<1, 1, 1>();
    case 311: return loops<3, 1, 1>();
    case 312: return loops<3, 1, 2>();
    case 321: return loops<3, 2, 1>();
    case 322: return loops<3, 2, 2>();
    case 511: return loops<5, 1, 1>();
    case 512: return loops<5, 1, 2>();
    case 521: return loops<5, 2, 1>();
    case 522: return loops<5, 2, 2>();
    case 711: return loops<7, 1, 1>();
    case 721: return loops<7, 2, 1>();
  }
  return {};
}

}  // namespace prdarts
