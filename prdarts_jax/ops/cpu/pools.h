// 3x3 pools with padding 1, forward and backward, and the statistics of what comes out.
#pragma once

#include <limits>

#include "images.h"
#include "separable.h"
#include "statistics.h"

namespace prdarts {

enum class Pool { kNone, kAverage, kMaximum };

// Real pixels in the windows around pixel `centre` of a line of `size`.
inline int64_t window_size(int64_t centre, int64_t size) {
  return std::min(centre + 1, size - 1) - std::max<int64_t>(centre - 1, 0) + 1;
}

// The line before `row` of the window of output (i, j), of one vector of channels.
inline const float* window_line(const Shape& g, const Planes& image, int64_t plane, int64_t i, int64_t j, int p) {
  return image.at(plane, i * g.s + p, j * g.s);
}

// z [out_height, out_width, channels] of one framed image. NaN stays NaN.
inline void pool_image(const Shape& g, Pool kind, const Planes& image, float* z) {
  for (int64_t c = 0; c < g.channels; c += kLanes) {
    for (int64_t i = 0; i < g.out_height(); ++i) {
      for (int64_t j = 0; j < g.out_width(); ++j) {
        Vec v = load(window_line(g, image, c / kLanes, i, j, 0));
        for (int p = 0; p < 3; ++p) {
          const float* line = window_line(g, image, c / kLanes, i, j, p);
#pragma GCC unroll 3
          for (int q = p == 0; q < 3; ++q) {
            const Vec w = load(line + q * kLanes);
            if (kind == Pool::kAverage) {
              v += w;
            } else {
              v = w > v || w != w ? w : v;
            }
          }
        }
        if (kind == Pool::kAverage) {
          v *= 1.0f / static_cast<float>(window_size(i * g.s, g.height) * window_size(j * g.s, g.width));
        }
        store(z + (i * g.out_width() + j) * g.channels + c, v, g.channels - c);
      }
    }
  }
}

// Adds the gradients dz [pixels of the rows first .. first + count) [whole vectors] to the framed gradient: an average
// gives each pixel of a window its share, a maximum all of it to the first of the largest.
inline void spread(const Shape& g, Pool kind, const Planes& image, int64_t first, int64_t count, const float* dz,
                   const Planes& gradient) {
  for (int64_t c = 0; c < g.wide(); c += kLanes) {
    for (int64_t i = first; i < first + count; ++i) {
      for (int64_t j = 0; j < g.out_width(); ++j) {
        Vec d = load(dz + ((i - first) * g.out_width() + j) * g.wide() + c);
        if (kind == Pool::kAverage) {
          d *= 1.0f / static_cast<float>(window_size(i * g.s, g.height) * window_size(j * g.s, g.width));
        }
        Vec taps[9];
        if (kind == Pool::kMaximum) {
          Vec best = load(window_line(g, image, c / kLanes, i, j, 0)), where = {};
#pragma GCC unroll 9
          for (int t = 1; t < 9; ++t) {
            const Vec w = load(window_line(g, image, c / kLanes, i, j, t / 3) + t % 3 * kLanes);
            const auto better = w > best;
            best = better ? w : best;
            where = better ? Vec{} + static_cast<float>(t) : where;
          }
#pragma GCC unroll 9
          for (int t = 0; t < 9; ++t) taps[t] = where == static_cast<float>(t) ? d : Vec{};
        } else {
          for (int t = 0; t < 9; ++t) taps[t] = d;
        }
#pragma GCC unroll 9
        for (int t = 0; t < 9; ++t) {
          float* to = gradient.at(c / kLanes, i * g.s + t / 3, j * g.s) + t % 3 * kLanes;
          store(to, load(to) + taps[t]);
        }
      }
    }
  }
}

inline Planes framed(const Shape& g, Pool kind, float* memory) {
  const Planes image = g.frame(memory);
  std::fill_n(memory, g.frame_size(), kind == Pool::kMaximum ? -std::numeric_limits<float>::infinity() : 0.0f);
  return image;
}

// z of all images, and its mean and biased variance over the batch.
inline void pool_forward(ffi::ThreadPool& pool, const Shape& g, Pool kind, const float* x, float* z, float* mean,
                         float* variance) {
  const int64_t parts = parts_of(g.batch), channels = g.channels;
  Buffer moments(2 * g.batch * channels);
  float *means = moments.data(), *squares = means + g.batch * channels;
  for_parts(pool, parts, [&](int64_t part) {
    const Planes image = framed(g, kind, scratch<kImage>(g.frame_size()));
    const Range range = images_of(part, parts, g.batch);
    for (int64_t b = range.first; b < range.last; ++b) {
      fill(image, x + b * g.pixels() * channels, g.height, g.width, channels, 1, 1);
      float* to = z + b * g.out_pixels() * channels;
      pool_image(g, kind, image, to);
      image_moments(to, g.out_pixels(), channels, means + b * channels, squares + b * channels);
    }
  });
  batch_moments(means, squares, g.batch, g.out_pixels(), channels, mean, variance);
}

// The cotangent of x from that of the normalised z.
inline void pool_backward(ffi::ThreadPool& pool, const Shape& g, Pool kind, const float* x, const float* dy,
                          const Norm& norm, const Sink& dx) {
  const int64_t parts = parts_of(g.batch), channels = g.channels;
  for_parts(pool, parts, [&](int64_t part) {
    const Planes image = framed(g, kind, scratch<kImage>(g.frame_size()));
    const Planes gradient = g.frame(scratch<kGradient>(g.frame_size()));
    float* slopes = scratch<kSlopes>(g.block() * g.out_width() * g.wide());
    const Range range = images_of(part, parts, g.batch);
    for (int64_t b = range.first; b < range.last; ++b) {
      if (kind == Pool::kMaximum) fill(image, x + b * g.pixels() * channels, g.height, g.width, channels, 1, 1);
      gradient.clear();
      for (int64_t i = 0; i < g.out_height(); i += g.block()) {
        const int64_t count = std::min(g.block(), g.out_height() - i);
        const int64_t at = (b * g.out_pixels() + i * g.out_width()) * channels;
        norm_gradient(norm, norm.z + at, dy + at, count * g.out_width(), channels, slopes);
        spread(g, kind, image, i, count, slopes, gradient);
      }
      const Sink to = dx.at(b * g.pixels() * channels);
      for (int64_t i = 0; i < g.height; ++i) {
        for (int64_t c = 0; c < channels; c += kLanes) {
          const float* line = gradient.at(c / kLanes, i + 1, 1);
          for (int64_t j = 0; j < g.width; ++j) {
            to.put((i * g.width + j) * channels + c, load(line + j * kLanes), channels - c);
          }
        }
      }
    }
  });
}

}  // namespace prdarts
