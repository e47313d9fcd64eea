// The unit of a separable convolution: ReLU, depthwise, pointwise, and the statistics of what comes out.
//
// Its input is relu((x - mean) scale): what came out of another one is normalised on the way in, and never stored.
#pragma once

#include "images.h"
#include "products.h"
#include "statistics.h"

namespace prdarts {

// The weights of a unit: [k, k, channels] and [channels, out].
struct UnitWeights {
  const float *depthwise, *pointwise;
};

// z [batch, out_height, out_width, out], and its mean and biased variance over the batch.
inline ffi::Error unit_forward(ffi::ThreadPool& pool, const Shape& g, int64_t out, const float* x,
                               const Prologue& prologue, const UnitWeights& weights, float* z, float* mean,
                               float* variance) {
  const int64_t parts = parts_of(g.batch);
  Buffer taps(g.taps() * g.wide()), matrix(g.channels * padded(out)), moments(2 * g.batch * out);
  lay_out(weights.depthwise, g.taps(), g.channels, false, taps.data());
  lay_out_matrix(weights.pointwise, g.channels, out, false, matrix.data());
  float *means = moments.data(), *squares = means + g.batch * out;
  ffi::Error error = with_loops(g, [&](const Loops& loops) {
    for_parts(pool, parts, [&](int64_t part) {
      const Planes image = g.frame(scratch<kImage>(g.frame_size()));
      float* rows = scratch<kRows>(g.block() * g.out_width() * g.wide());
      image.clear();
      const Range range = images_of(part, parts, g.batch);
      for (int64_t b = range.first; b < range.last; ++b) {
        fill(image, x + b * g.pixels() * g.channels, g.height, g.width, g.channels, g.border(), 1, prologue);
        float* to = z + b * g.out_pixels() * out;
        for (int64_t i = 0; i < g.out_height(); i += g.block()) {
          const int64_t count = std::min(g.block(), g.out_height() - i);
          for (int64_t r = 0; r < count; ++r) {
            loops.convolve(image, taps.data(), (i + r) * g.s, g.out_width(), rows + r * g.out_width() * g.wide());
          }
          product(rows, g.wide(), matrix.data(), padded(out), count * g.out_width(), g.channels,
                  {to + i * g.out_width() * out, out, kLanes, out});
        }
        image_moments(to, g.out_pixels(), out, means + b * out, squares + b * out);
      }
    });
  });
  batch_moments(means, squares, g.batch, g.out_pixels(), out, mean, variance);
  return error;
}

// What the backward pass of a batch normalisation needs beside dy: z, and by channel mean, 1/sigma, mean(dy),
// mean(dy y).
struct Norm {
  const float *z, *mean, *scale, *mean_dy, *mean_cross;
};

// dz = scale (dy - mean(dy) - y mean(dy y)) of `pixels` pixels, in whole vectors.
inline void norm_gradient(const Norm& norm, const float* z, const float* dy, int64_t pixels, int64_t channels,
                          float* dz) {
  const int64_t wide = padded(channels);
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t n = channels - c;
    const Vec scale = load(norm.scale + c, n), mean = load(norm.mean + c, n);
    const Vec slope = scale * load(norm.mean_cross + c, n), offset = load(norm.mean_dy + c, n);
    for (int64_t i = 0; i < pixels; ++i) {
      const Vec centred = load(z + i * channels + c, n) - mean;
      store(dz + i * wide + c, scale * (load(dy + i * channels + c, n) - offset - centred * slope));
    }
  }
}

// The cotangent of what the input stands for, and, if kWeights, [k, k, channels] and [channels, out] of the weights.
template <bool kWeights>
ffi::Error unit_backward(ffi::ThreadPool& pool, const Shape& g, int64_t out, const float* x, const Prologue& prologue,
                         const UnitWeights& weights, const float* dy, const Norm& norm, const Sink& dx,
                         float* ddepthwise, float* dpointwise) {
  const int64_t wide_out = padded(out), parts = parts_of(g.batch);
  Buffer taps(g.taps() * g.wide()), flipped(g.taps() * g.wide()), transposed(out * g.wide());
  lay_out(weights.depthwise, g.taps(), g.channels, false, taps.data());
  lay_out(weights.depthwise, g.taps(), g.channels, true, flipped.data());
  lay_out_matrix(weights.pointwise, g.channels, out, true, transposed.data());
  const int64_t size_dw = g.taps() * g.wide(), size_pw = g.wide() * wide_out, size_all = size_dw + size_pw;
  Buffer partial(kWeights ? parts * size_all : 0);
  ffi::Error error = with_loops(g, [&](const Loops& loops) {
    for_parts(pool, parts, [&](int64_t part) {
      const Planes image = g.frame(scratch<kImage>(kWeights ? g.frame_size() : 0));
      const Planes gradient = g.frame(scratch<kGradient>(g.frame_size()));
      const int64_t pixels = g.block() * g.out_width();
      float* slopes = scratch<kSlopes>(pixels * wide_out);
      float* sums_dw = partial.data() + part * size_all;
      if (kWeights) image.clear();
      gradient.clear();
      const Range range = images_of(part, parts, g.batch);
      for (int64_t b = range.first; b < range.last; ++b) {
        const float* input = x + b * g.pixels() * g.channels;
        if (kWeights) fill(image, input, g.height, g.width, g.channels, g.border(), 1, prologue);
        for (int64_t i = 0; i < g.out_height(); i += g.block()) {
          const int64_t count = std::min(g.block(), g.out_height() - i);
          const int64_t at = (b * g.out_pixels() + i * g.out_width()) * out;
          norm_gradient(norm, norm.z + at, dy + at, count * g.out_width(), out, slopes);
          if (kWeights) {
            float* rows = scratch<kRows>(std::max(pixels, g.width) * g.wide());
            for (int64_t r = 0; r < count; ++r) {
              loops.convolve(image, taps.data(), (i + r) * g.s, g.out_width(), rows + r * g.out_width() * g.wide());
            }
            outer(rows, g.wide(), slopes, wide_out, count * g.out_width(), g.wide(), sums_dw + size_dw, wide_out);
          }
          for (int64_t r = 0; r < count; ++r) {
            product(slopes + r * g.out_width() * wide_out, wide_out, transposed.data(), g.wide(), g.out_width(), out,
                    {gradient.at(0, g.border() + (i + r) * g.s, g.border()), g.s * kLanes, gradient.plane(), g.wide()});
          }
        }
        if (kWeights) {
          loops.correlate(image, gradient, g.border(), g.s, g.out_height(), g.out_width(), sums_dw);
        }
        input_gradient(g, loops, gradient, flipped.data(), input, prologue.mean,
                       dx.at(b * g.pixels() * g.channels));
      }
    });
  });
  if (kWeights) {
    Buffer total(size_all);
    sum_parts(partial, parts, size_all, total.data());
    drop_lanes(total, g, ddepthwise);
    for (int64_t c = 0; c < g.channels; ++c) {
      std::memcpy(dpointwise + c * out, total.data() + size_dw + c * wide_out, 4 * out);
    }
  }
  return error;
}

}  // namespace prdarts
