// CPU kernels in place of what XLA:CPU computes in many passes: separable convolutions with their batch statistics, depthwise
// convolutions, and the gradients of both. NHWC, float32. ops/native.py compiles this file and says what each kernel computes.
//
// All work is split by image. Sums over a batch are taken in the order of its images, whatever the number of threads.

#include <algorithm>
#include <cmath>

#include "depthwise.h"
#include "products.h"
#include "threads.h"

namespace prdarts {

using Array = ffi::Buffer<ffi::F32>;
using Out = ffi::Result<Array>;

// The geometry of a depthwise convolution of images [batch, height, width, channels].
struct Shape {
  int64_t batch, height, width, channels;
  int64_t k, s, d;

  Shape(ffi::Span<const int64_t> image, int64_t kernel, int64_t stride, int64_t dilation)
      : batch(image[0]), height(image[1]), width(image[2]), channels(image[3]), k(kernel), s(stride), d(dilation) {}
  int64_t border() const { return d * (k - 1) / 2; }
  int64_t out_height() const { return (height + s - 1) / s; }
  int64_t out_width() const { return (width + s - 1) / s; }
  int64_t wide() const { return padded(channels); }
  int64_t pixels() const { return height * width; }
  int64_t out_pixels() const { return out_height() * out_width(); }
  int64_t taps() const { return k * k; }
  Planes frame(float* data) const { return {data, height + 2 * border(), width + 2 * border(), wide()}; }
  int64_t frame_size() const { return (height + 2 * border()) * (width + 2 * border()) * wide(); }
  // Rows of the output that are computed together: enough pixels for the products, few enough for the first cache.
  int64_t block() const { return std::max<int64_t>(1, 64 / out_width()); }
};

enum Use { kImage, kGradient, kRows, kSlopes };

// f(loops) for a geometry that is compiled.
template <typename F>
ffi::Error with_loops(const Shape& g, F f) {
  const Loops loops = loops_of(g.k, g.s, g.d);
  if (loops.convolve == nullptr) return ffi::Error::InvalidArgument("no kernel for this size, stride and dilation");
  f(loops);
  return ffi::Error::Success();
}

// out[i] = sum over the parts of what each has at i.
void sum_parts(const Buffer& parts, int64_t count, int64_t size, float* total) {
  std::memcpy(total, parts.data(), 4 * size);
  for (int64_t part = 1; part < count; ++part) {
    const float* from = parts.data() + part * size;
    for (int64_t i = 0; i < size; ++i) total[i] += from[i];
  }
}

// --- depthwise ---------------------------------------------------------------------------------------------------------

ffi::Error DepthwiseForward(ffi::ThreadPool pool, Array x, Array kernel, int64_t stride, int64_t dilation, Out y) {
  const Shape g(x.dimensions(), kernel.dimensions()[0], stride, dilation);
  Buffer taps(g.taps() * g.wide());
  lay_out(kernel.typed_data(), g.taps(), g.channels, false, taps.data());
  const int64_t parts = parts_of(g.batch);
  return with_loops(g, [&](const Loops& loops) {
    for_parts(pool, parts, [&](int64_t part) {
      const Planes image = g.frame(scratch<kImage>(g.frame_size()));
      float* row = scratch<kRows>(g.out_width() * g.wide());
      image.clear();
      const Range range = images_of(part, parts, g.batch);
      for (int64_t b = range.first; b < range.last; ++b) {
        fill(image, x.typed_data() + b * g.pixels() * g.channels, g.height, g.width, g.channels, g.border(),
                    1);
        float* to = y->typed_data() + b * g.out_pixels() * g.channels;
        const bool whole = g.channels == g.wide();
        for (int64_t i = 0; i < g.out_height(); ++i) {
          float* line = to + i * g.out_width() * g.channels;
          loops.convolve(image, taps.data(), i * g.s, g.out_width(), whole ? line : row);
          if (whole) continue;
          for (int64_t j = 0; j < g.out_width(); ++j) {
            std::memcpy(line + j * g.channels, row + j * g.wide(), 4 * g.channels);
          }
        }
      }
    });
  });
}

// Writes dx [height, width, channels] of one image from the framed gradient; where x <= bound a ReLU lets nothing through.
void input_gradient(const Shape& g, const Loops& loops, const Planes& dy, const float* flipped, const float* x,
                    const float* bound, float* dx) {
  float* row = scratch<kRows>(g.width * g.wide());
  for (int64_t i = 0; i < g.height; ++i) {
    loops.transpose(dy, flipped, i, g.width, row);
    for (int64_t j = 0; j < g.width; ++j) {
      const int64_t at = (i * g.width + j) * g.channels;
      for (int64_t c = 0; c < g.channels; c += kLanes) {
        Vec v = load(row + j * g.wide() + c);
        if (x != nullptr) {
          v = where_above(load(x + at + c, g.channels - c), load(bound + c, g.channels - c), v);
        }
        store(dx + at + c, v, g.channels - c);
      }
    }
  }
}

// The size of the input is that of dx.
ffi::Error DepthwiseInputGradient(ffi::ThreadPool pool, Array dy, Array kernel, int64_t stride, int64_t dilation,
                                  Out dx) {
  const Shape g(dx->dimensions(), kernel.dimensions()[0], stride, dilation);
  Buffer flipped(g.taps() * g.wide());
  lay_out(kernel.typed_data(), g.taps(), g.channels, true, flipped.data());
  const int64_t parts = parts_of(g.batch);
  return with_loops(g, [&](const Loops& loops) {
    for_parts(pool, parts, [&](int64_t part) {
      const Planes frame = g.frame(scratch<kGradient>(g.frame_size()));
      frame.clear();
      const Range range = images_of(part, parts, g.batch);
      for (int64_t b = range.first; b < range.last; ++b) {
        fill(frame, dy.typed_data() + b * g.out_pixels() * g.channels, g.out_height(), g.out_width(),
                    g.channels, g.border(), g.s);
        input_gradient(g, loops, frame, flipped.data(), nullptr, nullptr,
                       dx->typed_data() + b * g.pixels() * g.channels);
      }
    });
  });
}

void drop_lanes(const Buffer& wide, const Shape& g, float* kernel) {
  for (int64_t t = 0; t < g.taps(); ++t) std::memcpy(kernel + t * g.channels, wide.data() + t * g.wide(), 4 * g.channels);
}

ffi::Error DepthwiseKernelGradient(ffi::ThreadPool pool, Array x, Array dy, int64_t stride, int64_t dilation, Out dw) {
  const Shape g(x.dimensions(), dw->dimensions()[0], stride, dilation);
  const int64_t parts = parts_of(g.batch), size_dw = g.taps() * g.wide();
  Buffer partial(parts * size_dw), total(size_dw);
  return with_loops(g, [&](const Loops& loops) {
    for_parts(pool, parts, [&](int64_t part) {
      const Planes image = g.frame(scratch<kImage>(g.frame_size()));
      image.clear();
      const Planes gradient = {scratch<kGradient>(g.out_pixels() * g.wide()), g.out_height(), g.out_width(), g.wide()};
      const Range range = images_of(part, parts, g.batch);
      for (int64_t b = range.first; b < range.last; ++b) {
        fill(image, x.typed_data() + b * g.pixels() * g.channels, g.height, g.width, g.channels, g.border(),
                    1);
        fill(gradient, dy.typed_data() + b * g.out_pixels() * g.channels, g.out_height(), g.out_width(),
                    g.channels, 0, 1);
        loops.correlate(image, gradient, 0, 1, g.out_height(), g.out_width(), partial.data() + part * size_dw);
      }
    });
    sum_parts(partial, parts, size_dw, total.data());
    drop_lanes(total, g, dw->typed_data());
  });
}

// --- statistics of a batch ---------------------------------------------------------------------------------------------

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
void image_moments(const float* z, int64_t pixels, int64_t channels, float* mean, float* squares) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t n = channels - c;
    const auto at = [&](int64_t i) { return load(z + i * channels + c, n); };
    const Vec m = sum_over(pixels, at) / static_cast<float>(pixels);
    store(mean + c, m, n);
    store(squares + c, sum_over(pixels, [&](int64_t i) { return (at(i) - m) * (at(i) - m); }), n);
  }
}

// Mean and biased variance of the batch from those of its images (Chan's formula).
void batch_moments(const float* means, const float* squares, int64_t batch, int64_t pixels, int64_t channels,
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

ffi::Error BatchMoments(ffi::ThreadPool pool, Array z, Out mean, Out variance) {
  const auto dims = z.dimensions();
  const int64_t batch = dims[0], pixels = dims[1] * dims[2], channels = dims[3], parts = parts_of(batch);
  Buffer moments(2 * batch * channels);
  float *means = moments.data(), *squares = means + batch * channels;
  for_parts(pool, parts, [&](int64_t part) {
    const Range range = images_of(part, parts, batch);
    for (int64_t b = range.first; b < range.last; ++b) {
      image_moments(z.typed_data() + b * pixels * channels, pixels, channels, means + b * channels,
                    squares + b * channels);
    }
  });
  batch_moments(means, squares, batch, pixels, channels, mean->typed_data(), variance->typed_data());
  return ffi::Error::Success();
}

// sum(a * b).
ffi::Error Inner(ffi::ThreadPool pool, Array a, Array b, Out sum) {
  const int64_t size = a.element_count(), parts = std::clamp<int64_t>(size / 4096, 1, kMaxParts);
  double sums[kMaxParts];
  for_parts(pool, parts, [&](int64_t part) {
    const Range range = images_of(part, parts, size);
    const int64_t count = range.last - range.first, vectors = count / kLanes;
    const float *x = a.typed_data() + range.first, *y = b.typed_data() + range.first;
    const Vec products = sum_over(vectors, [&](int64_t i) { return load(x + i * kLanes) * load(y + i * kLanes); });
    double total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += products[lane];
    for (int64_t i = vectors * kLanes; i < count; ++i) total += x[i] * y[i];
    sums[part] = total;
  });
  double total = 0;
  for (int64_t part = 0; part < parts; ++part) total += sums[part];
  *sum->typed_data() = static_cast<float>(total);
  return ffi::Error::Success();
}

// means over the batch of dy and of dy * y, y = (z - mean) * scale.
ffi::Error NormSums(ffi::ThreadPool pool, Array dy, Array z, Array mean, Array scale, Out mean_dy, Out mean_cross) {
  const auto dims = z.dimensions();
  const int64_t batch = dims[0], pixels = dims[1] * dims[2], channels = dims[3], parts = parts_of(batch);
  Buffer sums(2 * batch * channels);
  for_parts(pool, parts, [&](int64_t part) {
    const Range range = images_of(part, parts, batch);
    for (int64_t b = range.first; b < range.last; ++b) {
      const float *g = dy.typed_data() + b * pixels * channels, *v = z.typed_data() + b * pixels * channels;
      for (int64_t c = 0; c < channels; c += kLanes) {
        const int64_t n = channels - c;
        const Vec m = load(mean.typed_data() + c, n), s = load(scale.typed_data() + c, n);
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
    mean_dy->typed_data()[c] = static_cast<float>(first / (batch * pixels));
    mean_cross->typed_data()[c] = static_cast<float>(second / (batch * pixels));
  }
  return ffi::Error::Success();
}

// --- separable convolutions: ReLU, depthwise, pointwise, and the statistics of what comes out ---------------------------
// Their input is relu((x - in_mean) in_scale): what came out of another one is normalised on the way in, and never stored.

ffi::Error SeparableForward(ffi::ThreadPool pool, Array x, Array in_mean, Array in_scale, Array depthwise,
                            Array pointwise, int64_t stride, int64_t dilation, Out z, Out mean, Out variance) {
  const Shape g(x.dimensions(), depthwise.dimensions()[0], stride, dilation);
  const int64_t out = z->dimensions()[3], parts = parts_of(g.batch);
  Buffer taps(g.taps() * g.wide()), matrix(g.channels * padded(out)), moments(2 * g.batch * out);
  lay_out(depthwise.typed_data(), g.taps(), g.channels, false, taps.data());
  lay_out_matrix(pointwise.typed_data(), g.channels, out, false, matrix.data());
  float *means = moments.data(), *squares = means + g.batch * out;
  ffi::Error error = with_loops(g, [&](const Loops& loops) {
    for_parts(pool, parts, [&](int64_t part) {
      const Planes image = g.frame(scratch<kImage>(g.frame_size()));
      float* rows = scratch<kRows>(g.block() * g.out_width() * g.wide());
      image.clear();
      const Range range = images_of(part, parts, g.batch);
      for (int64_t b = range.first; b < range.last; ++b) {
        fill(image, x.typed_data() + b * g.pixels() * g.channels, g.height, g.width, g.channels, g.border(), 1,
             {in_mean.typed_data(), in_scale.typed_data()});
        float* to = z->typed_data() + b * g.out_pixels() * out;
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
  batch_moments(means, squares, g.batch, g.out_pixels(), out, mean->typed_data(), variance->typed_data());
  return error;
}

// What the backward pass of a batch normalisation needs beside dy: z, and per channel mean, 1/sigma, mean(dy), mean(dy y).
struct Norm {
  const float *z, *mean, *scale, *mean_dy, *mean_cross;
};

// dz = scale (dy - mean(dy) - y mean(dy y)) of `pixels` pixels, in whole vectors.
void norm_gradient(const Norm& norm, const float* z, const float* dy, int64_t pixels, int64_t channels, float* dz) {
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

template <bool kWeights>
ffi::Error separable_backward(ffi::ThreadPool& pool, Array& x, const Prologue& prologue, Array& depthwise,
                              Array& pointwise, Array& dy, const Norm& norm, int64_t stride, int64_t dilation, float* dx, float* ddepthwise,
                              float* dpointwise) {
  const Shape g(x.dimensions(), depthwise.dimensions()[0], stride, dilation);
  const int64_t out = pointwise.dimensions()[1], wide_out = padded(out), parts = parts_of(g.batch);
  Buffer taps(g.taps() * g.wide()), flipped(g.taps() * g.wide()), transposed(out * g.wide());
  lay_out(depthwise.typed_data(), g.taps(), g.channels, false, taps.data());
  lay_out(depthwise.typed_data(), g.taps(), g.channels, true, flipped.data());
  lay_out_matrix(pointwise.typed_data(), g.channels, out, true, transposed.data());
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
        const float* input = x.typed_data() + b * g.pixels() * g.channels;
        if (kWeights) {
          fill(image, input, g.height, g.width, g.channels, g.border(), 1, prologue);
        }
        for (int64_t i = 0; i < g.out_height(); i += g.block()) {
          const int64_t count = std::min(g.block(), g.out_height() - i);
          const int64_t at = (b * g.out_pixels() + i * g.out_width()) * out;
          norm_gradient(norm, norm.z + at, dy.typed_data() + at, count * g.out_width(), out, slopes);
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
        input_gradient(g, loops, gradient, flipped.data(), input, prologue.mean, dx + b * g.pixels() * g.channels);
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

ffi::Error SeparableBackward(ffi::ThreadPool pool, Array x, Array in_mean, Array in_scale, Array depthwise,
                             Array pointwise, Array dy, Array z,
                             Array mean, Array scale, Array mean_dy, Array mean_cross, int64_t stride,
                             int64_t dilation, Out dx, Out ddepthwise, Out dpointwise) {
  const Norm norm{z.typed_data(), mean.typed_data(), scale.typed_data(), mean_dy.typed_data(), mean_cross.typed_data()};
  const Prologue prologue{in_mean.typed_data(), in_scale.typed_data()};
  return separable_backward<true>(pool, x, prologue, depthwise, pointwise, dy, norm, stride, dilation, dx->typed_data(),
                                  ddepthwise->typed_data(), dpointwise->typed_data());
}

ffi::Error SeparableInputGradient(ffi::ThreadPool pool, Array x, Array in_mean, Array in_scale, Array depthwise,
                                  Array pointwise, Array dy, Array z,
                                  Array mean, Array scale, Array mean_dy, Array mean_cross, int64_t stride,
                                  int64_t dilation, Out dx) {
  const Norm norm{z.typed_data(), mean.typed_data(), scale.typed_data(), mean_dy.typed_data(), mean_cross.typed_data()};
  const Prologue prologue{in_mean.typed_data(), in_scale.typed_data()};
  return separable_backward<false>(pool, x, prologue, depthwise, pointwise, dy, norm, stride, dilation,
                                   dx->typed_data(), nullptr, nullptr);
}

}  // namespace prdarts

// --- what XLA sees -----------------------------------------------------------------------------------------------------

using prdarts::Array;
namespace ffi = xla::ffi;

#define WINDOW .Attr<int64_t>("stride").Attr<int64_t>("dilation")
#define POOL ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(prdarts_depthwise_forward, prdarts::DepthwiseForward,
                              POOL.Arg<Array>().Arg<Array>() WINDOW.Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(prdarts_depthwise_input_gradient, prdarts::DepthwiseInputGradient,
                              POOL.Arg<Array>().Arg<Array>() WINDOW.Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(prdarts_depthwise_kernel_gradient, prdarts::DepthwiseKernelGradient,
                              POOL.Arg<Array>().Arg<Array>() WINDOW.Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(prdarts_batch_moments, prdarts::BatchMoments,
                              POOL.Arg<Array>().Ret<Array>().Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(prdarts_inner, prdarts::Inner, POOL.Arg<Array>().Arg<Array>().Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    prdarts_norm_sums, prdarts::NormSums,
    POOL.Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Ret<Array>().Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    prdarts_separable_forward, prdarts::SeparableForward,
    POOL.Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>() WINDOW.Ret<Array>().Ret<Array>().Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(prdarts_separable_backward, prdarts::SeparableBackward,
                              POOL.Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>()
                                  .Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>() WINDOW.Ret<Array>().Ret<Array>().Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(prdarts_separable_input_gradient, prdarts::SeparableInputGradient,
                              POOL.Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>()
                                  .Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>() WINDOW.Ret<Array>());
