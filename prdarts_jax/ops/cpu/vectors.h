// Vectors of float, and images in a scratch memory whose borders are zero and whose channels fill whole vectors.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <vector>

namespace prdarts {

// 512-bit registers hold the 25 sums of a 5x5 kernel at once; elsewhere sums are taken a few rows of the kernel at a
// time.
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
inline Vec where_above(Vec x, Vec bound, Vec v) { return x > bound ? v : Vec{}; }

// Memory that begins where a cache line does: a vector that lies on two lines takes two loads.
class Buffer {
 public:
  explicit Buffer(int64_t size = 0) { grow(size); }
  void grow(int64_t size) {
    if (size <= size_) return;
    memory_.assign(size + kLine, 0.0f);
    size_ = size;
    const auto address = reinterpret_cast<uintptr_t>(memory_.data()) / sizeof(float);
    data_ = memory_.data() + (kLine - address % kLine) % kLine;
  }
  float* data() { return data_; }
  const float* data() const { return data_; }
  float operator[](int64_t i) const { return data_[i]; }

 private:
  static constexpr int64_t kLine = 64 / sizeof(float);
  std::vector<float> memory_;
  float* data_ = nullptr;
  int64_t size_ = 0;
};

// A buffer of a thread that grows and is never given back; one a use.
template <int kUse>
float* scratch(int64_t size) {
  thread_local Buffer buffer;
  buffer.grow(size);
  return buffer.data();
}

// An image with a border of zeros, as planes of one vector a pixel: neighbours lie at distances known to the compiler.
struct Planes {
  float* data;
  int64_t rows, columns, channels;  // channels: whole vectors

  int64_t plane() const { return rows * columns * kLanes; }
  float* at(int64_t plane_of, int64_t row, int64_t column) const {
    return data + plane_of * plane() + (row * columns + column) * kLanes;
  }
  void clear() const { std::memset(data, 0, 4 * rows * columns * channels); }
};

// What is done to an image on the way: relu((x - mean) scale) by channel; nothing where there are none.
struct Prologue {
  const float *mean = nullptr, *scale = nullptr;
};

// Pixel (i, j) of an image [height, width, channels] becomes pixel (border + step i, border + step j).
inline void fill(const Planes& to, const float* image, int64_t height, int64_t width, int64_t channels, int64_t border,
                 int64_t step, const Prologue& prologue = {}) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t n = channels - c;
    const bool changes = prologue.mean != nullptr;
    const Vec mean = changes ? load(prologue.mean + c, n) : Vec{};
    const Vec scale = changes ? load(prologue.scale + c, n) : Vec{};
    for (int64_t i = 0; i < height; ++i) {
      const float* from = image + i * width * channels + c;
      float* pixel = to.at(c / kLanes, border + i * step, border);
      for (int64_t j = 0; j < width; ++j) {
        const Vec v = load(from + j * channels, n);
        store(pixel + j * step * kLanes, changes ? relu((v - mean) * scale) : v);
      }
    }
  }
}

}  // namespace prdarts
