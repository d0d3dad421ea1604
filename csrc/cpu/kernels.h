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
//   compose     up to 4 ranks x kComposeVectors vectors: with fewer ranks it waits for memory, whatever the block
constexpr bool kManyRegisters = kLanes == 16;
constexpr int kShrinkRows = 4;
constexpr int kShrinkRanks = kManyRegisters ? 4 : 3;
constexpr int kAccumulateRanks = 4;
constexpr int accumulate_vectors(int ranks) {
  return kManyRegisters ? (ranks <= 2 ? 8 : 4) : (ranks <= 2 ? 6 : 12 / ranks);  // a tile's columns are whole blocks
}
constexpr int kExpandRows = kManyRegisters ? 4 : 2;
constexpr int kExpandVectors = kManyRegisters ? 4 : 6;
constexpr int kComposeVectors = accumulate_vectors(kAccumulateRanks);

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// ---- load_tile, drop_tile

// Calls body(first), a pointer to element (row, col) of its own dtype.
template <class Body>
ADAPTLORA_INLINE void with_elements(const MatrixView& x, int64_t row, int64_t col, const Body& body) {
  const int64_t at = row * x.row_stride + col * x.col_stride;
  switch (x.dtype) {
    case Dtype::f32: body(static_cast<const float*>(x.data) + at); break;
    case Dtype::bf16: body(static_cast<const bf16*>(x.data) + at); break;
    case Dtype::f16: body(static_cast<const f16*>(x.data) + at); break;
  }
}

// The first n of the kLanes elements, or all of them.
template <class T>
ADAPTLORA_INLINE vf load_up_to(const T* p, int64_t n) {
  return n < kLanes ? load_partial(p, n) : load(p);
}

template <class T>
ADAPTLORA_INLINE void store_up_to(T* p, vf v, int64_t n) {
  n < kLanes ? store_partial(p, v, n) : store(p, v);
}

// What a block does before it works on its row, or its column: nothing.
constexpr auto kNothingAhead = [](int64_t) ADAPTLORA_INLINE_LAMBDA {};

void clear_padding(int64_t rows, int64_t cols, float* tile) {
  const int64_t padded = round_up(cols, kPad);
  if (padded == cols) return;
  for (int64_t m = 0; m < rows; ++m) memset(tile + m * kTileStride + cols, 0, (padded - cols) * sizeof(float));
}

void load_tile(const MatrixView& x, int64_t row, int64_t col, int64_t rows, int64_t cols, float* tile) {
  with_elements(x, row, col, [&](const auto* first) {
    if (x.col_stride == 1) {
      for (int64_t m = 0; m < rows; ++m) {
        const auto* in = first + m * x.row_stride;
        float* out = tile + m * kTileStride;
        for (int64_t c = 0; c < cols; c += kLanes) store(out + c, load_up_to(in + c, cols - c));
      }
    } else {
      for (int64_t c = 0; c < cols; ++c) {
        for (int64_t m = 0; m < rows; ++m) {
          tile[m * kTileStride + c] = load_one(first + m * x.row_stride + c * x.col_stride);
        }
      }
    }
  });
  clear_padding(rows, cols, tile);
}

template <bool kKeepMask>
void drop_tile_as(const Dropout& dropout, const MatrixView& x, int64_t row, int64_t col, int64_t rows, int64_t cols,
                  uint32_t* mask, float* tile) {
  with_elements(x, row, col, [&](const auto* first) {
    for_mask(dropout, row, col, rows, cols, [&](int64_t m, int64_t c, vi keep) ADAPTLORA_INLINE_LAMBDA {
      const vf in = load_up_to(first + m * x.row_stride + c, cols - c);
      store(tile + m * kTileStride + c, masked(in, keep));
      if (kKeepMask) store_raw(mask + m * kTileStride + c, keep);
    });
  });
}

void drop_tile(const Dropout& dropout, const MatrixView& x, int64_t row, int64_t col, int64_t rows, int64_t cols,
               bool keep_mask, uint32_t* mask, float* tile) {
  if (x.col_stride != 1) {
    dropout_mask(dropout, row, col, rows, cols, mask);
    load_tile(x, row, col, rows, cols, tile);
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t c = m * kTileStride; c < m * kTileStride + cols; c += kLanes) {
        store(tile + c, masked(load(tile + c), mask + c));
      }
    }
    return;
  }
  (keep_mask ? drop_tile_as<true> : drop_tile_as<false>)(dropout, x, row, col, rows, cols, mask, tile);
  clear_padding(rows, cols, tile);
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

// acc += the products of up to kLanes columns, of which n exist.
template <int kRows, int kRanks>
ADAPTLORA_INLINE void shrink_columns(const float* x, int64_t stride_x, const float* F, int64_t stride_f, int64_t n,
                                     vf (&acc)[kRows * kRanks]) {
  vf f[kRanks];
  ADAPTLORA_UNROLL
  for (int r = 0; r < kRanks; ++r) f[r] = load_up_to(F + r * stride_f, n);
  ADAPTLORA_UNROLL
  for (int m = 0; m < kRows; ++m) {
    const vf xm = load_up_to(x + m * stride_x, n);
    ADAPTLORA_UNROLL
    for (int r = 0; r < kRanks; ++r) acc[m * kRanks + r] += xm * f[r];
  }
}

// S[m, r] += sum_c x[m, c] F[r, c]; element (m, r) of S lies at m * S_m + r * S_r.
template <int kRows, int kRanks, class Ahead>
ADAPTLORA_INLINE void shrink_block(const float* x, int64_t stride_x, int64_t cols, const float* F, int64_t stride_f,
                                   float* S, int64_t S_m, int64_t S_r, const Ahead& ahead) {
  vf acc[kRows * kRanks] = {};
  int64_t c = 0;
  for (; c + kLanes <= cols; c += kLanes) {
    ahead(c);
    shrink_columns<kRows, kRanks>(x + c, stride_x, F + c, stride_f, kLanes, acc);
  }
  if (c < cols) shrink_columns<kRows, kRanks>(x + c, stride_x, F + c, stride_f, cols - c, acc);
  float sums[kRows * kRanks] = {};
  add_lane_sums(acc, sums);
  for (int m = 0; m < kRows; ++m) {
    for (int r = 0; r < kRanks; ++r) S[m * S_m + r * S_r] += sums[m * kRanks + r];
  }
}

void shrink(const Rows& x, int64_t rows, int64_t cols, const float* F, int64_t stride_f, int64_t R, const RankRows& S) {
  const int64_t padded = round_up(cols, kLanes);
  for_rank_blocks<kShrinkRanks>(R, [&]<int kRanks>(int64_t r) {
    const float* f = F + r * stride_f;
    int64_t m = 0;
    for (; m + kShrinkRows <= rows; m += kShrinkRows) {
      shrink_block<kShrinkRows, kRanks>(x.data + m * x.stride, x.stride, padded, f, stride_f, S.data + m * S.stride + r,
                                        S.stride, 1, kNothingAhead);
    }
    for (; m < rows; ++m) {
      shrink_block<1, kRanks>(x.data + m * x.stride, x.stride, padded, f, stride_f, S.data + m * S.stride + r, S.stride,
                              1, kNothingAhead);
    }
  });
}

// ---- accumulate

// out[r, c] += sum_m S[m, r] x[m, c]; element (m, r) of S lies at m * S_m + r * S_r. Of the columns `cols` exist.
template <int kRanks, int kVectors, class Ahead>
ADAPTLORA_INLINE void accumulate_block(const float* S, int64_t S_m, int64_t S_r, const float* x, int64_t stride_x,
                                       int64_t rows, float* out, int64_t stride_out, int64_t cols, const Ahead& ahead) {
  vf acc[kRanks][kVectors];
  ADAPTLORA_UNROLL
  for (int r = 0; r < kRanks; ++r) {
    ADAPTLORA_UNROLL
    for (int v = 0; v < kVectors; ++v) acc[r][v] = load_up_to(out + r * stride_out + v * kLanes, cols - v * kLanes);
  }
  for (int64_t m = 0; m < rows; ++m) {
    ahead(m);
    vf xm[kVectors];
    ADAPTLORA_UNROLL
    for (int v = 0; v < kVectors; ++v) xm[v] = load_up_to(x + m * stride_x + v * kLanes, cols - v * kLanes);
    ADAPTLORA_UNROLL
    for (int r = 0; r < kRanks; ++r) {
      const float s = S[m * S_m + r * S_r];
      ADAPTLORA_UNROLL
      for (int v = 0; v < kVectors; ++v) acc[r][v] += s * xm[v];
    }
  }
  ADAPTLORA_UNROLL
  for (int r = 0; r < kRanks; ++r) {
    ADAPTLORA_UNROLL
    for (int v = 0; v < kVectors; ++v) store_up_to(out + r * stride_out + v * kLanes, acc[r][v], cols - v * kLanes);
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
      accumulate_block<kRanks, kVectors>(s, S.stride, 1, x.data + c, x.stride, rows, out_r + c, stride_out,
                                         kVectors * kLanes, kNothingAhead);
    }
    for (; c < cols; c += kLanes) {
      accumulate_block<kRanks, 1>(s, S.stride, 1, x.data + c, x.stride, rows, out_r + c, stride_out, kLanes,
                                  kNothingAhead);
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

// kRows rows of the columns [begin, end): consecutive lines of y, which the processor then fetches ahead.
template <int kRows, class T>
ADAPTLORA_INLINE void expand_rows(const ExpandInput& in, int64_t m, int64_t begin, int64_t end, T* y,
                                  int64_t stride_y) {
  constexpr int64_t kStep = kExpandVectors * kLanes;
  int64_t c = begin;
  for (; c + kStep <= end; c += kStep) expand_block<kRows, kExpandVectors>(in, m, c, y, stride_y, kStep);
  for (; c < end; c += kLanes) expand_block<kRows, 1>(in, m, c, y, stride_y, end - c);
}

template <class T>
void expand_as(const ExpandInput& in, int64_t rows, int64_t cols, T* y, int64_t stride_y) {
  // Columns whose part of F stays in the first-level cache from one row to the next: 16 KB.
  constexpr int64_t kStep = kExpandVectors * kLanes;
  const int64_t chunk = round_up(4096 / (in.R > 0 ? in.R : 1), kStep);
  for (int64_t c = 0; c < cols; c += chunk) {
    const int64_t end = c + chunk < cols ? c + chunk : cols;
    int64_t m = 0;
    for (; m + kExpandRows <= rows; m += kExpandRows) expand_rows<kExpandRows>(in, m, c, end, y, stride_y);
    for (; m < rows; ++m) expand_rows<1>(in, m, c, end, y, stride_y);
  }
}

void expand(const RankRows& S, int64_t rows, int64_t cols, const float* F, int64_t stride_f, int64_t R,
            const float* bias, const uint32_t* mask, void* y, Dtype dtype, int64_t stride_y, bool add) {
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

// ---- compose, compose_backward
//
// Both read an outer factor once, from memory, and would wait for it: each block of ranks fetches its share of what comes
// next, so that reads are spread over the arithmetic. A processor has some 24 lines under way; more at once, and it waits.
// MiniLM's 72 outer factors (r_out 256, 42 MB), R = 16, one core of an AMD EPYC with AVX2: reading alone 2.8 ms, arithmetic alone
// 3.9 ms forward and 4.9 ms backward, which are the prediction; measured 6.0 and 7.4 ms, where torch.mm takes 8.3 and 9.2 ms.

constexpr int64_t kLine = 16;         // floats
constexpr int64_t kComposeCols = 384;
constexpr int64_t kComposeRows = 32;  // of the outer factor, between which a block of the result stays in registers

void compose(const Rows& S, const Rows& outer, int64_t r_out, int64_t cols, int64_t R, float* out, int64_t stride_out) {
  constexpr int64_t kStep = kComposeVectors * kLanes;
  for (int64_t r = 0; r < R; ++r) memset(out + r * stride_out, 0, cols * sizeof(float));
  for (int64_t o = 0; o < r_out; o += kComposeRows) {
    const int64_t rows = r_out - o < kComposeRows ? r_out - o : kComposeRows;
    const float* x = outer.data + o * outer.stride;
    int64_t c = 0;
    for (; c + kStep <= cols; c += kStep) {
      // Two blocks of columns on, or the first two of the next rows.
      const int64_t on = c + 2 * kStep;
      const bool in_these_rows = on < cols;
      const float* next = x + (in_these_rows ? on : kComposeRows * outer.stride + (on - cols) / kStep * kStep);
      const int64_t left = r_out - o - kComposeRows;
      const int64_t next_rows = in_these_rows ? rows : left < 0 ? 0 : left < kComposeRows ? left : kComposeRows;
      for_rank_blocks<kAccumulateRanks>(R, [&]<int kRanks>(int64_t r) {
        const int64_t begin = r * next_rows / R, end = (r + kRanks) * next_rows / R;
        const auto fetch = [&](int64_t m) ADAPTLORA_INLINE_LAMBDA {
          if (m < begin || m >= end) return;
          ADAPTLORA_UNROLL
          for (int64_t i = 0; i < kStep; i += kLine) __builtin_prefetch(next + m * outer.stride + i);
        };
        accumulate_block<kRanks, kComposeVectors>(S.data + r * S.stride + o, 1, S.stride, x + c, outer.stride, rows,
                                                  out + r * stride_out + c, stride_out, kStep, fetch);
      });
    }
    for (; c < cols; c += kLanes) {
      for_rank_blocks<kAccumulateRanks>(R, [&]<int kRanks>(int64_t r) {
        accumulate_block<kRanks, 1>(S.data + r * S.stride + o, 1, S.stride, x + c, outer.stride, rows,
                                    out + r * stride_out + c, stride_out, cols - c, kNothingAhead);
      });
    }
  }
}

void compose_backward(const Rows& F, const Rows& outer, int64_t rows, int64_t cols, int64_t R, float* out,
                      int64_t stride_out) {
  for (int64_t r = 0; r < R; ++r) memset(out + r * stride_out, 0, rows * sizeof(float));
  for (int64_t c = 0; c < cols; c += kComposeCols) {
    const int64_t width = cols - c < kComposeCols ? cols - c : kComposeCols;
    int64_t o = 0;
    for (; o + kShrinkRows <= rows; o += kShrinkRows) {
      const float* x = outer.data + o * outer.stride + c;
      const float* next = x + kShrinkRows * outer.stride;
      const int64_t left = rows - o - kShrinkRows, next_rows = left < kShrinkRows ? left : kShrinkRows;
      for_rank_blocks<kShrinkRanks>(R, [&]<int kRanks>(int64_t r) {
        const int64_t begin = r * next_rows / R, end = (r + kRanks) * next_rows / R;
        const auto fetch = [&](int64_t i) ADAPTLORA_INLINE_LAMBDA {
          for (int64_t m = begin; m < end; ++m) __builtin_prefetch(next + m * outer.stride + i);
        };
        shrink_block<kShrinkRows, kRanks>(x, outer.stride, width, F.data + r * F.stride + c, F.stride,
                                          out + r * stride_out + o, 1, stride_out, fetch);
      });
    }
    for (; o < rows; ++o) {
      for_rank_blocks<kShrinkRanks>(R, [&]<int kRanks>(int64_t r) {
        shrink_block<1, kRanks>(outer.data + o * outer.stride + c, outer.stride, width, F.data + r * F.stride + c,
                                F.stride, out + r * stride_out + o, 1, stride_out, kNothingAhead);
      });
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
  return {name,   dropout_mask, load_tile, drop_tile,        shrink,         accumulate,
          expand, add_parts,    compose,   compose_backward, sum_of_squares, scale_vector};
}

}  // namespace
}  // namespace adaptlora::ADAPTLORA_ISA_NAMESPACE
