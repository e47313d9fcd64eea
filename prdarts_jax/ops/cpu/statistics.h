// Sums over the pixels of a batch: the moments of a batch normalisation, and the two means of its backward pass.
#pragma once

#include "threads.h"
#include "vectors.h"

namespace prdarts {

// f(i) summed over the pixels: four sums take turns, since one alone would wait for each addition to end.
template <typename F>
inline Vec sum_over(int64_t pixels, F f) {
  Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 <= pixels; i += 4) {
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) sums[t] += f(i + t);
  }
  for (; i < pixels; ++i) sums[0] += f(i);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Mean and sum of squared deviations of each channel of one image [pixels, channels].
inline void image_moments(const float* z, int64_t pixels, int64_t channels, float* mean, float* squares) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t n = channels - c;
    const auto at = [&](int64_t i) { return load(z + i * channels + c, n); };
    const Vec m = sum_over(pixels, at) / static_cast<float>(pixels);
    store(mean + c, m, n);
    store(squares + c, sum_over(pixels, [&](int64_t i) { return (at(i) - m) * (at(i) - m); }), n);
  }
}

// Mean and biased variance of the batch from those of its images (Chan's formula).
inline void batch_moments(const float* means, const float* squares, int64_t batch, int64_t pixels, int64_t channels,
                   float* mean, float* variance) {
  for (int64_t c = 0; c < channels; ++c) {
    double m = 0, within = 0, between = 0;
    for (int64_t b = 0; b < batch; ++b) {
      m += means[b * channels + c];
      within += squares[b * channels + c];
    }
    m /= batch;
    for (int64_t b = 0; b < batch; ++b) {
      const double off = means[b * channels + c] - m;
      between += off * off;
    }
    mean[c] = static_cast<float>(m);
    variance[c] = static_cast<float>((within / pixels + between) / batch);
  }
}

// means over the batch of dy and of dy * y, y = (z - mean) * scale, of images [pixels, channels].
inline void norm_sums(ffi::ThreadPool& pool, const float* dy, const float* z, const float* mean, const float* scale,
                      int64_t batch, int64_t pixels, int64_t channels, float* mean_dy, float* mean_cross) {
  const int64_t parts = parts_of(batch);
  Buffer sums(2 * batch * channels);
  for_parts(pool, parts, [&](int64_t part) {
    const Range range = images_of(part, parts, batch);
    for (int64_t b = range.first; b < range.last; ++b) {
      const float *g = dy + b * pixels * channels, *v = z + b * pixels * channels;
      for (int64_t c = 0; c < channels; c += kLanes) {
        const int64_t n = channels - c;
        const Vec m = load(mean + c, n), s = load(scale + c, n);
        const auto ct = [&](int64_t i) { return load(g + i * channels + c, n); };
        const auto cross = [&](int64_t i) { return ct(i) * (load(v + i * channels + c, n) - m); };
        const Vec first = sum_over(pixels, ct), second = sum_over(pixels, cross);
        store(sums.data() + 2 * b * channels + c, first, n);
        store(sums.data() + (2 * b + 1) * channels + c, second * s, n);
      }
    }
  });
  for (int64_t c = 0; c < channels; ++c) {
    double first = 0, second = 0;
    for (int64_t b = 0; b < batch; ++b) {
      first += sums[2 * b * channels + c];
      second += sums[(2 * b + 1) * channels + c];
    }
    mean_dy[c] = static_cast<float>(first / (batch * pixels));
    mean_cross[c] = static_cast<float>(second / (batch * pixels));
  }
}

}  // namespace prdarts
