// CPU kernels in place of what XLA:CPU computes in many passes: separable convolutions with their batch statistics,
// depthwise convolutions, the gradients of both, and the terms of a cell. NHWC, float32. ops/kernels.py compiles it.
//
// All work is split by image. Sums over a batch are taken in the order of its images, whatever the number of threads.

#include "terms.h"

namespace prdarts {

// --- depthwise -------------------------------------------------------------------------------------------------------

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
                       {dx->typed_data() + b * g.pixels() * g.channels});
      }
    });
  });
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

// --- statistics of a batch -------------------------------------------------------------------------------------------

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

ffi::Error NormSums(ffi::ThreadPool pool, Array dy, Array z, Array mean, Array scale, Out mean_dy, Out mean_cross) {
  const auto dims = z.dimensions();
  norm_sums(pool, dy.typed_data(), z.typed_data(), mean.typed_data(), scale.typed_data(), dims[0], dims[1] * dims[2],
            dims[3], mean_dy->typed_data(), mean_cross->typed_data());
  return ffi::Error::Success();
}

// --- separable convolutions ------------------------------------------------------------------------------------------

ffi::Error SeparableForward(ffi::ThreadPool pool, Array x, Array in_mean, Array in_scale, Array depthwise,
                            Array pointwise, int64_t stride, int64_t dilation, Out z, Out mean, Out variance) {
  const Shape g(x.dimensions(), depthwise.dimensions()[0], stride, dilation);
  return unit_forward(pool, g, z->dimensions()[3], x.typed_data(), {in_mean.typed_data(), in_scale.typed_data()},
                      {depthwise.typed_data(), pointwise.typed_data()}, z->typed_data(), mean->typed_data(),
                      variance->typed_data());
}

template <bool kWeights>
ffi::Error separable_backward(ffi::ThreadPool& pool, const Array& x, const Array& in_mean, const Array& in_scale,
                              const Array& depthwise, const Array& pointwise, const Array& dy, const Norm& norm,
                              int64_t stride, int64_t dilation, float* dx, float* ddepthwise, float* dpointwise) {
  const Shape g(x.dimensions(), depthwise.dimensions()[0], stride, dilation);
  return unit_backward<kWeights>(pool, g, pointwise.dimensions()[1], x.typed_data(),
                                 {in_mean.typed_data(), in_scale.typed_data()},
                                 {depthwise.typed_data(), pointwise.typed_data()}, dy.typed_data(), norm, {dx},
                                 ddepthwise, dpointwise);
}

ffi::Error SeparableBackward(ffi::ThreadPool pool, Array x, Array in_mean, Array in_scale, Array depthwise,
                             Array pointwise, Array dy, Array z, Array mean, Array scale, Array mean_dy,
                             Array mean_cross, int64_t stride, int64_t dilation, Out dx, Out ddepthwise,
                             Out dpointwise) {
  const Norm norm{z.typed_data(), mean.typed_data(), scale.typed_data(), mean_dy.typed_data(), mean_cross.typed_data()};
  return separable_backward<true>(pool, x, in_mean, in_scale, depthwise, pointwise, dy, norm, stride, dilation,
                                  dx->typed_data(), ddepthwise->typed_data(), dpointwise->typed_data());
}

ffi::Error SeparableInputGradient(ffi::ThreadPool pool, Array x, Array in_mean, Array in_scale, Array depthwise,
                                  Array pointwise, Array dy, Array z, Array mean, Array scale, Array mean_dy,
                                  Array mean_cross, int64_t stride, int64_t dilation, Out dx) {
  const Norm norm{z.typed_data(), mean.typed_data(), scale.typed_data(), mean_dy.typed_data(), mean_cross.typed_data()};
  return separable_backward<false>(pool, x, in_mean, in_scale, depthwise, pointwise, dy, norm, stride, dilation,
                                   dx->typed_data(), nullptr, nullptr);
}

// --- terms of a cell -------------------------------------------------------------------------------------------------
// What is changed in place is an argument and a result. A term whose operation is not of this form is left alone.

ffi::Error not_fitting() { return ffi::Error::InvalidArgument("units that do not fit the nodes of the cell"); }
ffi::Error not_in_place() { return ffi::Error::Internal("an array that is changed in place was copied"); }

// `work` has a row for each unit of the longest chain; `value` is one number, or one for each image. `sources` is empty where the nodes themselves are the sources.
ffi::Error TermForward(ffi::ThreadPool pool, Array nodes, Array work, Array sources, Ints slot_of, Array value,
                       ffi::RemainingArgs weights, Span units, Span strides, Span dilations, Span pools,
                       int64_t pool_stride, int64_t pool_norm, float eps, Out nodes_after,
                       Out work_after) {
  if (nodes.typed_data() != nodes_after->typed_data() || work.typed_data() != work_after->typed_data()) {
    return not_in_place();
  }
  const Operations all{units, strides, dilations, pools, pool_stride, pool_norm};
  const Slot slot(slot_of.typed_data());
  const Array& from = sources.element_count() ? sources : nodes;
  const int64_t batch = nodes.dimensions()[1];
  if (!fits(value, batch)) return not_fitting();
  const Factor factor(value);
  if (const Pool kind = all.pool(slot.op); kind != Pool::kNone) {
    pool_term_forward(pool, all.pool_shape(dimensions_of_row(from)), kind, pool_norm, factor, eps,
                      row_of(from, slot.source), work, row_of(nodes, slot.target));
    return ffi::Error::Success();
  }
  if (!all.has(slot.op)) return ffi::Error::Success();
  const Chain chain(all, slot, dimensions_of_row(from), weights);
  if (!chain.fits(from, work, nodes)) return not_fitting();
  return term_forward(pool, chain, factor, eps, row_of(from, slot.source), work, size_of_row(nodes), batch,
                      row_of(nodes, slot.target));
}

// `cts` are the cotangents of the sources, and, where `ct_nodes` is empty, of the nodes too. `weights` are followed by
// their gradients, if these are asked for.
template <bool kWeights>
ffi::Error TermBackward(ffi::ThreadPool pool, Array cts, Array work, Array ct_nodes, Array sources, Ints slot_of,
                        Array value, ffi::RemainingArgs weights, Span units, Span strides, Span dilations, Span pools,
                        int64_t pool_stride, int64_t pool_norm, float eps, Out cts_after, Out work_after, Out dvalue,
                        ffi::RemainingRets gradients) {
  if (cts.typed_data() != cts_after->typed_data() || work.typed_data() != work_after->typed_data()) {
    return not_in_place();
  }
  *dvalue->typed_data() = 0.0f;
  const Operations all{units, strides, dilations, pools, pool_stride, pool_norm};
  const Slot slot(slot_of.typed_data());
  const Array& from = ct_nodes.element_count() ? ct_nodes : cts;
  if (const Pool kind = all.pool(slot.op); kind != Pool::kNone) {
    *dvalue->typed_data() = pool_term_backward(
        pool, all.pool_shape(dimensions_of_row(sources)), kind, pool_norm, *value.typed_data(), eps,
        row_of(sources, slot.source), work, row_of(from, slot.target), row_of(cts, slot.source));
    return ffi::Error::Success();
  }
  if (!all.has(slot.op)) return ffi::Error::Success();
  const Chain chain(all, slot, dimensions_of_row(sources), weights);
  if (!chain.fits(sources, work, from)) return not_fitting();
  return term_backward<kWeights>(pool, chain, *value.typed_data(), eps, row_of(sources, slot.source), work,
                                 row_of(from, slot.target), size_of_row(cts), row_of(cts, slot.source), gradients,
                                 dvalue->typed_data());
}

template ffi::Error TermBackward<true>(ffi::ThreadPool, Array, Array, Array, Array, Ints, Array, ffi::RemainingArgs,
                                        Span, Span, Span, Span, int64_t, int64_t, float, Out, Out, Out,
                                        ffi::RemainingRets);
template ffi::Error TermBackward<false>(ffi::ThreadPool, Array, Array, Array, Array, Ints, Array,
                                        ffi::RemainingArgs, Span, Span, Span, Span, int64_t, int64_t, float, Out,
                                        Out, Out, ffi::RemainingRets);

// An array whose contents do not matter: its pages are not touched before somebody writes to them.
ffi::Error Unwritten(Array, Out) { return ffi::Error::Success(); }

// rows[index] += value * y; `value` is one number, or one for each image.
ffi::Error AddToRow(ffi::ThreadPool pool, Array rows, Array y, Ints index, Array value, Out after) {
  if (rows.typed_data() != after->typed_data()) return not_in_place();
  const int64_t batch = y.dimensions()[0];
  if (!fits(value, batch)) return not_fitting();
  add_images(pool, y.typed_data(), Factor(value), y.element_count(), batch, row_of(rows, *index.typed_data()));
  return ffi::Error::Success();
}

}  // namespace prdarts

