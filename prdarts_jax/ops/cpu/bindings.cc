// What XLA sees of the kernels. Apart from them: decoding calls takes the compiler as long as all loops together.
#include "kernels.h"

using prdarts::Array;
using prdarts::Ints;
using prdarts::Span;
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
    POOL.Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>() WINDOW
        .Ret<Array>().Ret<Array>().Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(prdarts_separable_backward, prdarts::SeparableBackward,
                              POOL.Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>()
                                  .Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>()
                                  WINDOW.Ret<Array>().Ret<Array>().Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(prdarts_separable_input_gradient, prdarts::SeparableInputGradient,
                              POOL.Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>()
                                  .Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>()
                                  WINDOW.Ret<Array>());

#define UNITS \
  .Attr<Span>("units").Attr<Span>("strides").Attr<Span>("dilations").Attr<Span>("pools") \
  .Attr<int64_t>("pool_stride").Attr<int64_t>("pool_norm").Attr<float>("eps")
XLA_FFI_DEFINE_HANDLER_SYMBOL(prdarts_term_forward, prdarts::TermForward,
                              POOL.Arg<Array>().Arg<Array>().Arg<Array>().Arg<Ints>().Arg<Array>().RemainingArgs() UNITS
                                  .Ret<Array>().Ret<Array>());
#define TERM_BACKWARD \
  POOL.Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Ints>().Arg<Array>() \
      .RemainingArgs() UNITS.Ret<Array>().Ret<Array>().Ret<Array>().RemainingRets()
XLA_FFI_DEFINE_HANDLER_SYMBOL(prdarts_term_backward, prdarts::TermBackward<true>, TERM_BACKWARD);
XLA_FFI_DEFINE_HANDLER_SYMBOL(prdarts_term_input_gradient, prdarts::TermBackward<false>, TERM_BACKWARD);
XLA_FFI_DEFINE_HANDLER_SYMBOL(prdarts_unwritten, prdarts::Unwritten, ffi::Ffi::Bind().Arg<Array>().Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(prdarts_add_to_row, prdarts::AddToRow,
                              POOL.Arg<Array>().Arg<Array>().Arg<Ints>().Arg<Array>().Ret<Array>());
