// The kernels of isa.h, written once; each kernels_<isa>.cpp compiles them for its instruction set.
#pragma once

#include "isa.h"
#include "philox.h"
#include "simd.h"

namespace adaptlora::ADAPTLORA_ISA_NAMESPACE {
namespace {

// Register blocks, with 16 or 12 accumulators where there are 32 or 16 vector registers:
//   shrink      kShrinkRows rows x up to kShrinkRanks ranks
//   accumulate  up to 4 ranks x accumulate_vectors(ranks) vectors
//   expand      kExpandRows rows x kExpandVectors vectors
constexpr bool kManyRegisters = kLanes == 16;
constexpr int kShrinkRows = 4;
constexpr int kShrinkRanks = kManyRegisters ? 4 : 3;
constexpr int kAccumulateRanks = 4;
constexpr int accumulate_vectors(int ranks) { return (kManyRegisters ? 16 : 12) / (ranks < 2 ? 2 : ranks); }
constexpr int kExpandRows = kManyRegisters ? 4 : 2;
constexpr int kExpandVectors = kManyRegisters ? 4 : 6;

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// ---- load_tile

template <class T>
void load_contiguous(const T* x, int64_t row_stride, int64_t rows, int64_t cols, const uint32_t* mask, float* tile) {
  const int64_t whole = cols / kLanes * kLanes;
  for (int64_t m = 0; m < rows; ++m) {
    const T* in = x + m * row_stride;
    float* out = tile + m * kTileStride;
    if (mask == nullptr) {
      for (int64_t c = 0; c < whole; c += kLanes) store(out + c, load(in + c));
      if (whole < cols) store(out + whole, load_partial(in + whole, cols - whole));
    } else {
      const uint32_t* keep = mask + m * kTileStride;
      for (int64_t c = 0; c < whole; c += kLanes) store(out + c, masked(load(in + c), keep + c));
      if (whole < cols) store(out + whole, masked(load_partial(in + whole, cols - whole), keep + whole));
    }
  }
}

template <class T>
void load_strided(const T* x, int64_t row_stride, int64_t col_stride, int64_t rows, int64_t cols, const uint32_t* mask,
                  float* tile) {
  for (int64_t c = 0; c < cols; ++c) {
    for (int64_t m = 0; m < rows; ++m) {
      const bool keep = mask == nullptr || mask[m * kTileStride + c] != 0;
      tile[m * kTileStride + c] = keep ? load_one(x + m * row_stride + c * col_stride) : 0.0f;
    }
  }
}

template <class T>
void load_tile_as(const MatrixView& x, int64_t row, int64_t col, int64_t rows, int64_t cols, const uint32_t* mask,
                  float* tile) {
  const T* first = static_cast<const T*>(x.data) + row * x.row_stride + col * x.col_stride;
  if (x.col_stride == 1) {
    load_contiguous(first, x.row_stride, rows, cols, mask, tile);
  } else {
    load_strided(first, x.row_stride, x.col_stride, rows, cols, mask, tile);
  }
}

void load_tile(const MatrixView& x, int64_t row, int64_t col, int64_t rows, int64_t cols, const uint32_t* mask,
               float* tile) {
  switch (x.dtype) {
    case Dtype::f32: load_tile_as<float>(x, row, col, rows, cols, mask, tile); break;
    case Dtype::bf16: load_tile_as<bf16>(x, row, col, rows, cols, mask, tile); break;
    case Dtype::f16: load_tile_as<f16>(x, row, col, rows, cols, mask, tile); break;
  }
  const int64_t padded = round_up(cols, kPad);
  if (padded == cols) return;
  for (int64_t m = 0; m < rows; ++m) memset(tile + m * kTileStride + cols, 0, (padded - cols) * sizeof(float));
}

// Calls body<n>(r) for the ranks [r, r + n): as few blocks of at most kMost (<= 4) as there can be, and as equal.
template <int kMost, class Body>
ADAPTLORA_INLINE void for_rank_blocks(int64_t R, const Body& body) {
  int64_t r = 0;
  for (int64_t blocks = (R + kMost - 1) / kMost; blocks > 0; --blocks) {
    const int64_t n = (R - r + blocks - 1) / blocks;
    switch (n) {
      case 1: body.template operator()<1>(r); break;
      case 2: body.template operator()<2>(r); break;
      case 3: body.template operator()<3>(r); break;
      default:
        if constexpr (kMost == 4) body.template operator()<4>(r);
    }
    r += n;
  }
}

// ---- shrink

template <int kRows, int kRanks>
ADAPTLORA_INLINE void shrink_block(const float* x, int64_t stride_x, int64_t cols, const float* F, int64_t stride_f,
                                   float* S, int64_t stride_s) {
  vf acc[kRows * kRanks] = {};
  for (int64_t c = 0; c < cols; c += kLanes) {
    vf f[kRanks];
    ADAPTLORA_UNROLL
    for (int r = 0; r < kRanks; ++r) f[r] = load(F + r * stride_f + c);
    ADAPTLORA_UNROLL
    for (int m = 0; m < kRows; ++m) {
      const vf xm = load(x + m * stride_x + c);
      ADAPTLORA_UNROLL
      for (int r = 0; r < kRanks; ++r) acc[m * kRanks + r] += xm * f[r];
    }
  }
  float sums[kRows * kRanks];
  for (int m = 0; m < kRows; ++m) memcpy(sums + m * kRanks, S + m * stride_s, kRanks * sizeof(float));
  add_lane_sums(acc, sums);
  for (int m = 0; m < kRows; ++m) memcpy(S + m * stride_s, sums + m * kRanks, kRanks * sizeof(float));
}

void shrink(const Rows& x, int64_t rows, int64_t cols, const float* F, int64_t stride_f, int64_t R, const RankRows& S) {
  const int64_t padded = round_up(cols, kLanes);
  for_rank_blocks<kShrinkRanks>(R, [&]<int kRanks>(int64_t r) {
    const float* f = F + r * stride_f;
    int64_t m = 0;
    for (; m + kShrinkRows <= rows; m += kShrinkRows) {
      shrink_block<kShrinkRows, kRanks>(x.data + m * x.stride, x.stride, padded, f, stride_f, S.data + m * S.stride + r,
                                        S.stride);
    }
    for (; m < rows; ++m) {
      shrink_block<1, kRanks>(x.data + m * x.stride, x.stride, padded, f, stride_f, S.data + m * S.stride + r,
                              S.stride);
    }
  });
}

// ---- accumulate

template <int kRanks, int kVectors>
ADAPTLORA_INLINE void accumulate_block(const float* S, int64_t stride_s, const float* x, int64_t stride_x, int64_t rows,
                                       float* out, int64_t stride_out) {
  vf acc[kRanks][kVectors];
  ADAPTLORA_UNROLL
  for (int r = 0; r < kRanks; ++r) {
    ADAPTLORA_UNROLL
    for (int v = 0; v < kVectors; ++v) acc[r][v] = load(out + r * stride_out + v * kLanes);
  }
  for (int64_t m = 0; m < rows; ++m) {
    vf xm[kVectors];
    ADAPTLORA_UNROLL
    for (int v = 0; v < kVectors; ++v) xm[v] = load(x + m * stride_x + v * kLanes);
    ADAPTLORA_UNROLL
    for (int r = 0; r < kRanks; ++r) {
      const float s = S[m * stride_s + r];
      ADAPTLORA_UNROLL
      for (int v = 0; v < kVectors; ++v) acc[r][v] += s * xm[v];
    }
  }
  ADAPTLORA_UNROLL
  for (int r = 0; r < kRanks; ++r) {
    ADAPTLORA_UNROLL
    for (int v = 0; v < kVectors; ++v) store(out + r * stride_out + v * kLanes, acc[r][v]);
  }
}

void accumulate(const RankRows& S, const Rows& x, int64_t rows, int64_t cols, int64_t R, float* out,
                int64_t stride_out) {
  for_rank_blocks<kAccumulateRanks>(R, [&]<int kRanks>(int64_t r) {
    constexpr int kVectors = accumulate_vectors(kRanks);
    const float* s = S.data + r;
    float* out_r = out + r * stride_out;
    int64_t c = 0;
    for (; c + kVectors * kLanes <= cols; c += kVectors * kLanes) {
      accumulate_block<kRanks, kVectors>(s, S.stride, x.data + c, x.stride, rows, out_r + c, stride_out);
    }
    for (; c < cols; c += kLanes) {
      accumulate_block<kRanks, 1>(s, S.stride, x.data + c, x.stride, rows, out_r + c, stride_out);
    }
  });
}

// ---- expand

struct ExpandInput {
  RankRows S;
  const float* F;
  int64_t stride_f, R;
  const float* bias;
  const uint32_t* mask;
  bool add;
};

// kRows x (kVectors * kLanes) elements of y at (m0, c); with kVectors = 1 only n of the columns exist if n < kLanes.
template <int kRows, int kVectors, class T>
ADAPTLORA_INLINE void expand_block(const ExpandInput& in, int64_t m0, int64_t c, T* y, int64_t stride_y, int64_t n) {
  vf acc[kRows][kVectors] = {};
  const float* S = in.S.data + m0 * in.S.stride;
  const float* F = in.F + c;
  for (int64_t r = 0; r < in.R; ++r) {
    vf f[kVectors];
    ADAPTLORA_UNROLL
    for (int v = 0; v < kVectors; ++v) f[v] = load(F + r * in.stride_f + v * kLanes);
    ADAPTLORA_UNROLL
    for (int m = 0; m < kRows; ++m) {
      const float s = S[m * in.S.stride + r];
      ADAPTLORA_UNROLL
      for (int v = 0; v < kVectors; ++v) acc[m][v] += s * f[v];
    }
  }
  ADAPTLORA_UNROLL
  for (int m = 0; m < kRows; ++m) {
    ADAPTLORA_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const int64_t cv = c + v * kLanes;
      if (in.mask != nullptr) acc[m][v] = masked(acc[m][v], in.mask + (m0 + m) * kTileStride + cv);
      if (in.bias != nullptr) acc[m][v] += load(in.bias + cv);
      T* out = y + (m0 + m) * stride_y + cv;
      if (kVectors == 1 && n < kLanes) {
        if (in.add) acc[m][v] += load_partial(out, n);
        store_partial(out, acc[m][v], n);
      } else {
        if (in.add) acc[m][v] += load(out);
        store(out, acc[m][v]);
      }
    }
  }
}

// A strip of kVectors * kLanes columns; every row of x uses its part of F while that is in the first-level cache.
template <int kVectors, class T>
ADAPTLORA_INLINE void expand_strip(const ExpandInput& in, int64_t rows, int64_t c, T* y, int64_t stride_y, int64_t n) {
  int64_t m = 0;
  for (; m + kExpandRows <= rows; m += kExpandRows) expand_block<kExpandRows, kVectors>(in, m, c, y, stride_y, n);
  for (; m < rows; ++m) expand_block<1, kVectors>(in, m, c, y, stride_y, n);
}

template <class T>
void expand_as(const ExpandInput& in, int64_t rows, int64_t cols, T* y, int64_t stride_y) {
  constexpr int64_t kStep = kExpandVectors * kLanes;
  int64_t c = 0;
  for (; c + kStep <= cols; c += kStep) expand_strip<kExpandVectors>(in, rows, c, y, stride_y, kStep);
  for (; c < cols; c += kLanes) expand_strip<1>(in, rows, c, y, stride_y, cols - c);
}

void expand(const RankRows& S, int64_t rows, int64_t cols, const float* F, int64_t stride_f, int64_t R, const float* bias,
            const uint32_t* mask, void* y, Dtype dtype, int64_t stride_y, bool add) {
  const ExpandInput in = {S, F, stride_f, R, bias, mask, add};
  switch (dtype) {
    case Dtype::f32: expand_as(in, rows, cols, static_cast<float*>(y), stride_y); break;
    case Dtype::bf16: expand_as(in, rows, cols, static_cast<bf16*>(y), stride_y); break;
    case Dtype::f16: expand_as(in, rows, cols, static_cast<f16*>(y), stride_y); break;
  }
}

// ---- add_parts

void add_parts(const float* parts, int64_t n_parts, int64_t stride, int64_t n, float factor, float* out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    vf sum = {};
    if (n - i < kLanes) {
      for (int64_t j = 0; j < n_parts; ++j) sum += load_partial(parts + j * stride + i, n - i);
      store_partial(out + i, sum * factor, n - i);
    } else {
      for (int64_t j = 0; j < n_parts; ++j) sum += load(parts + j * stride + i);
      store(out + i, sum * factor);
    }
  }
}

// ---- rank vectors

ADAPTLORA_INLINE int64_t lanes_left(int64_t n, int64_t i) { return n - i < kLanes ? n - i : kLanes; }

template <class T>
float sum_of_squares_as(const T* v, int64_t n, int64_t stride) {
  vf acc[4] = {};
  int64_t i = 0;
  if (stride == 1) {
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
      ADAPTLORA_UNROLL
      for (int j = 0; j < 4; ++j) {
        const vf a = load(v + i + j * kLanes);
        acc[j] += a * a;
      }
    }
  }
  for (; i < n; i += kLanes) {
    const vf a = gather(v + i * stride, stride, lanes_left(n, i));
    acc[0] += a * a;
  }
  const vf total[1] = {(acc[0] + acc[1]) + (acc[2] + acc[3])};
  float sums[1] = {};
  add_lane_sums(total, sums);
  return sums[0];
}

float sum_of_squares(const VectorView& v) {
  switch (v.dtype) {
    case Dtype::f32: return sum_of_squares_as(static_cast<const float*>(v.data), v.length, v.stride);
    case Dtype::bf16: return sum_of_squares_as(static_cast<const bf16*>(v.data), v.length, v.stride);
    case Dtype::f16: return sum_of_squares_as(static_cast<const f16*>(v.data), v.length, v.stride);
  }
  __builtin_unreachable();
}

template <class T>
void scale_vector_as(const VectorView& src, const VectorView& dst, float factor) {
  const T* in = static_cast<const T*>(src.data);
  T* out = static_cast<T*>(dst.data);
  const int64_t n = src.length;
  int64_t i = 0;
  if (src.stride == 1 && dst.stride == 1) {
    for (; i + kLanes <= n; i += kLanes) store(out + i, load(in + i) * factor);
  }
  for (; i < n; i += kLanes) {
    const int64_t left = lanes_left(n, i);
    scatter(out + i * dst.stride, dst.stride, gather(in + i * src.stride, src.stride, left) * factor, left);
  }
}

void scale_vector(const VectorView& src, const VectorView& dst, float factor) {
  switch (src.dtype) {
    case Dtype::f32: scale_vector_as<float>(src, dst, factor); break;
    case Dtype::bf16: scale_vector_as<bf16>(src, dst, factor); break;
    case Dtype::f16: scale_vector_as<f16>(src, dst, factor); break;
  }
}

constexpr Kernels make_kernels(const char* name) {
  return {name, dropout_mask, load_tile, shrink, accumulate, expand, add_parts, sum_of_squares, scale_vector};
}

}  // namespace
}  // namespace adaptlora::ADAPTLORA_ISA_NAMESPACE
