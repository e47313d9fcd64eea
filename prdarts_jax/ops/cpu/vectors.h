// Vectors of float, and images in a scratch memory whose borders are zero and whose channels fill whole vectors.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <vector>

namespace prdarts {

// 512-bit registers hold the 25 sums of a 5x5 kernel at once; elsewhere sums are taken a few rows of the kernel at a time.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kSums = 26;  // accumulators that stay in registers
#else
constexpr int kLanes = 8;
constexpr int kSums = 12;
#endif
typedef float Vec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

constexpr int64_t padded(int64_t channels) { return (channels + kLanes - 1) / kLanes * kLanes; }

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }

// The first n lanes; the others are 0 or are left alone. A copy of n floats would be a call in the innermost loops.
inline Vec load(const float* p, int64_t n) {
  if (n >= kLanes) return load(p);
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
  Vec v = {};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}
inline void store(float* p, Vec v, int64_t n) {
  if (n >= kLanes) {
    store(p, v);
    return;
  }
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#else
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
#endif
}

// NaN stays NaN: a run that meets one has to stop, not to go on with zeros.
inline Vec relu(Vec v) { return v < 0.0f ? Vec{} : v; }
inline Vec where_positive(Vec x, Vec v) { return x > 0.0f ? v : Vec{}; }

// A buffer of a thread that grows and is never given back; one a use.
template <int kUse>
float* scratch(int64_t size) {
  thread_local std::vector<float> buffer;
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
  return buffer.data();
}

// An image with a border of zeros: rows x columns pixels of `channels` floats (whole vectors).
struct Padded {
  float* data;
  int64_t rows, columns, channels;

  float* at(int64_t row, int64_t column) const { return data + (row * columns + column) * channels; }
  void clear() const { std::memset(data, 0, 4 * rows * columns * channels); }
};

template <bool kRelu>
void fill(const Padded& to, const float* image, int64_t height, int64_t width, int64_t channels, int64_t border_h,
          int64_t border_w, int64_t step) {
  for (int64_t i = 0; i < height; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      const float* from = image + (i * width + j) * channels;
      float* pixel = to.at(border_h + i * step, border_w + j * step);
      for (int64_t c = 0; c < channels; c += kLanes) {
        Vec v = load(from + c, channels - c);
        store(pixel + c, kRelu ? relu(v) : v);
      }
    }
  }
}

}  // namespace prdarts
