// Small products of matrices: pixels times channels.
#pragma once

#include <algorithm>
#include <type_traits>

#include "vectors.h"

namespace prdarts {

// Sums of a tile that stay in registers: kTile pixels times at most kTileVectors vectors.
#if defined(__AVX512F__)
constexpr int kTile = 8, kTileVectors = 3;
#else
constexpr int kTile = 4, kTileVectors = 2;
#endif

// Of so many vectors that are left, those of the next tile: four are 2 + 2, not 3 + 1.
inline int64_t next_vectors(int64_t left) {
  if (kTileVectors == 2 || left == 4) return std::min<int64_t>(left, 2);
  return std::min<int64_t>(left, kTileVectors);
}

// f(width, c) for the tiles of n floats, with the width in vectors as a constant.
template <typename F>
void for_tiles(int64_t n, F f) {
  for (int64_t c = 0; c < n;) {
    const int64_t vectors = next_vectors((n - c + kLanes - 1) / kLanes);
    if (vectors == 3) {
      f(std::integral_constant<int, kTileVectors>{}, c);
    } else if (vectors == 2) {
      f(std::integral_constant<int, 2>{}, c);
    } else {
      f(std::integral_constant<int, 1>{}, c);
    }
    c += vectors * kLanes;
  }
}

// Where a product goes: rows `row` floats apart, vectors of a row `vector` floats apart, n floats of a row.
struct Result {
  float* data;
  int64_t row, vector, n;

  Result from(int64_t m, int64_t c) const { return {data + m * row + c / kLanes * vector, row, vector, n - c}; }
};

// out[m, :] = sum_k a[m, k] b[k, :] for kRows rows m and kVectors vectors.
template <int kRows, int kVectors>
inline void product_tile(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, const Result& out) {
  Vec sums[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec line[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) line[v] = load(b + k * ldb + v * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const float factor = a[m * lda + k];
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) sums[m][v] += factor * line[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) store(out.data + m * out.row + v * out.vector, sums[m][v], out.n - v * kLanes);
  }
}

template <int kVectors>
void product_columns(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t rows, int64_t depth,
                     const Result& out) {
  int64_t m = 0;
  for (; m + kTile <= rows; m += kTile) {
    product_tile<kTile, kVectors>(a + m * lda, lda, b, ldb, depth, out.from(m, 0));
  }
  for (; m < rows; ++m) product_tile<1, kVectors>(a + m * lda, lda, b, ldb, depth, out.from(m, 0));
}

// out[rows, n] = a[rows, depth] b[depth, n]; the rows of b are whole vectors.
inline void product(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t rows, int64_t depth,
                    const Result& out) {
  for_tiles(out.n, [&](auto vectors, int64_t c) {
    product_columns<vectors.value>(a, lda, b + c, ldb, rows, depth, out.from(0, c));
  });
}

// sums[k, 0:n] += sum_m a[m, k] b[m, 0:n] for kRows k's.
template <int kRows, int kVectors>
inline void outer_tile(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t rows, float* sums,
                       int64_t lds) {
  Vec acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int k = 0; k < kRows; ++k) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) acc[k][v] = load(sums + k * lds + v * kLanes);
  }
  for (int64_t m = 0; m < rows; ++m) {
    Vec line[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) line[v] = load(b + m * ldb + v * kLanes);
#pragma GCC unroll 8
    for (int k = 0; k < kRows; ++k) {
      const float factor = a[m * lda + k];
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) acc[k][v] += factor * line[v];
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < kRows; ++k) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) store(sums + k * lds + v * kLanes, acc[k][v]);
  }
}

// sums[depth, n] += a[rows, depth]^T b[rows, n]; depth and n are those of whole vectors, what fills them up is zero.
inline void outer(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t rows, int64_t depth, float* sums,
                  int64_t lds) {
  for (int64_t k = 0; k < depth; k += kTile) {
    for_tiles(lds, [&](auto vectors, int64_t c) {
      outer_tile<kTile, vectors.value>(a + k, lda, b + c, ldb, rows, sums + k * lds + c, lds);
    });
  }
}

// m [rows][columns] -> its transpose [columns][whole vectors of rows], or itself in whole vectors.
inline void lay_out_matrix(const float* m, int64_t rows, int64_t columns, bool transpose, float* to) {
  const int64_t lines = transpose ? columns : rows, wide = padded(transpose ? rows : columns);
  std::memset(to, 0, 4 * lines * wide);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[transpose ? j * wide + i : i * wide + j] = m[i * columns + j];
  }
}

}  // namespace prdarts
