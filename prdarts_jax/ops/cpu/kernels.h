// The kernels, as XLA calls them: arguments, attributes, results.
#pragma once

#include "xla/ffi/api/ffi.h"

namespace prdarts {

namespace ffi = xla::ffi;
using Array = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;
using Span = ffi::Span<const int64_t>;
using Out = ffi::Result<Array>;

ffi::Error DepthwiseForward(ffi::ThreadPool pool, Array x, Array kernel, int64_t stride, int64_t dilation, Out y);
ffi::Error DepthwiseInputGradient(ffi::ThreadPool pool, Array dy, Array kernel, int64_t stride, int64_t dilation,
                                  Out dx);
ffi::Error DepthwiseKernelGradient(ffi::ThreadPool pool, Array x, Array dy, int64_t stride, int64_t dilation, Out dw);
ffi::Error BatchMoments(ffi::ThreadPool pool, Array z, Out mean, Out variance);
ffi::Error Inner(ffi::ThreadPool pool, Array a, Array b, Out sum);
ffi::Error NormSums(ffi::ThreadPool pool, Array dy, Array z, Array mean, Array scale, Out mean_dy, Out mean_cross);
ffi::Error SeparableForward(ffi::ThreadPool pool, Array x, Array in_mean, Array in_scale, Array depthwise,
                            Array pointwise, int64_t stride, int64_t dilation, Out z, Out mean, Out variance);
ffi::Error SeparableBackward(ffi::ThreadPool pool, Array x, Array in_mean, Array in_scale, Array depthwise,
                             Array pointwise, Array dy, Array z, Array mean, Array scale, Array mean_dy,
                             Array mean_cross, int64_t stride, int64_t dilation, Out dx, Out ddepthwise,
                             Out dpointwise);
ffi::Error SeparableInputGradient(ffi::ThreadPool pool, Array x, Array in_mean, Array in_scale, Array depthwise,
                                  Array pointwise, Array dy, Array z, Array mean, Array scale, Array mean_dy,
                                  Array mean_cross, int64_t stride, int64_t dilation, Out dx);
ffi::Error TermForward(ffi::ThreadPool pool, Array nodes, Array work, Array sources, Ints slot_of, Array value,
                       ffi::RemainingArgs weights, Span units, Span strides, Span dilations, Span pools,
                       int64_t pool_stride, int64_t pool_norm, float eps, Out nodes_after,
                       Out work_after);
template <bool kWeights>
ffi::Error TermBackward(ffi::ThreadPool pool, Array cts, Array work, Array ct_nodes, Array sources, Ints slot_of,
                        Array value, ffi::RemainingArgs weights, Span units, Span strides, Span dilations, Span pools,
                        int64_t pool_stride, int64_t pool_norm, float eps, Out cts_after, Out work_after, Out dvalue,
                        ffi::RemainingRets gradients);
ffi::Error Unwritten(Array, Out);
ffi::Error AddToRow(ffi::ThreadPool pool, Array rows, Array y, Ints index, Array value, Out after);

}  // namespace prdarts
