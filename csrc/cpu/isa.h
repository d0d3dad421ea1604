// What the host code and the per-ISA kernels share: plain structs, raw pointers and a table of functions.
//
// Nothing from ATen or the C++ library may be included here. The kernel files are compiled for AVX2 or AVX-512; an
// inline function or template of another library, compiled there, could be the copy the linker keeps for everybody.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ADAPTLORA_X86_KERNELS 1
#else
#define ADAPTLORA_X86_KERNELS 0
#endif

namespace adaptlora {

// A tile holds kTileRows rows and up to kTileCols columns of x or dy in float32: 25 KB, which a first-level cache holds.
// The columns are whole register blocks on every instruction set; the stride is not a power of two, so that the rows do
// not share cache sets.
constexpr int64_t kTileRows = 16;
constexpr int64_t kTileCols = 384;
constexpr int64_t kTileStride = kTileCols + 16;
constexpr int64_t kMaxRank = 256;
// Rows of packed factors are padded with zeros to a multiple of the widest vector.
constexpr int64_t kPad = 16;

enum class Dtype { f32, bf16, f16 };

// A strided (rows, cols) matrix; strides count elements.
struct MatrixView {
  const void* data;
  Dtype dtype;
  int64_t row_stride, col_stride;
};

// Element (m, k) is kept iff (philox bits >> 8) >= threshold.
struct Dropout {
  uint32_t key0, key1;
  int32_t threshold;
};

// One rank vector: `length` elements, `stride` apart.
struct VectorView {
  void* data;
  int64_t length, stride;
  Dtype dtype;
};

// Rows of float32 with unit column stride that the kernels read: a tile, or x and dy themselves where they are that.
// Columns are there, and zero, up to the next multiple of kPad where nothing else is said.
struct Rows {
  const float* data;
  int64_t stride;
};

// S or dS: rows of R numbers, `stride` apart.
struct RankRows {
  float* data;
  int64_t stride;
};

struct Kernels {
  const char* name;

  // mask[i, j] = keep(row + i, col + j) ? ~0 : 0 for rows x cols; col % 4 == 0; mask has the layout of a tile.
  void (*dropout_mask)(const Dropout&, int64_t row, int64_t col, int64_t rows, int64_t cols, uint32_t* mask);

  // tile = x[row : row + rows, col : col + cols] in float32, zero up to the next multiple of kPad columns.
  void (*load_tile)(const MatrixView& x, int64_t row, int64_t col, int64_t rows, int64_t cols, float* tile);

  // dropout_mask, and tile = mask ∘ what load_tile gives. Without keep_mask what mask holds afterwards is undefined.
  void (*drop_tile)(const Dropout&, const MatrixView& x, int64_t row, int64_t col, int64_t rows, int64_t cols,
                    bool keep_mask, uint32_t* mask, float* tile);

  // S[m, r] += sum_c x[m, c] F[r, c];  F (R, cols) has zero-padded rows.
  void (*shrink)(const Rows& x, int64_t rows, int64_t cols, const float* F, int64_t stride_f, int64_t R,
                 const RankRows& S);

  // out[r, c] += sum_m S[m, r] x[m, c];  out (R, cols) has padded rows.
  void (*accumulate)(const RankRows& S, const Rows& x, int64_t rows, int64_t cols, int64_t R, float* out,
                     int64_t stride_out);

  // y[m, c] = (add ? y[m, c] : 0) + bias[c] + mask ∘ sum_r S[m, r] F[r, c], rounded once;  bias and mask may be nullptr;
  // F and bias have padded rows; y has unit column stride.
  void (*expand)(const RankRows& S, int64_t rows, int64_t cols, const float* F, int64_t stride_f, int64_t R,
                 const float* bias, const uint32_t* mask, void* y, Dtype dtype, int64_t stride_y, bool add);

  // out[i] = factor * sum_j parts[j * stride + i]
  void (*add_parts)(const float* parts, int64_t n_parts, int64_t stride, int64_t n, float factor, float* out);

  // out[r, c] = sum_o S[r, o] outer[o, c];  S (R, r_out), outer (r_out, cols), out (R, cols): no row is padded.
  void (*compose)(const Rows& S, const Rows& outer, int64_t r_out, int64_t cols, int64_t R, float* out,
                  int64_t stride_out);

  // out[r, o] = sum_c F[r, c] outer[o, c];  F (R, cols), outer (rows, cols), out (R, rows): no row is padded.
  void (*compose_backward)(const Rows& F, const Rows& outer, int64_t rows, int64_t cols, int64_t R, float* out,
                           int64_t stride_out);

  float (*sum_of_squares)(const VectorView&);

  // dst = factor * src; same dtype and length, strides may differ; dst may be src.
  void (*scale_vector)(const VectorView& src, const VectorView& dst, float factor);
};

extern const Kernels kernels_default;
#if ADAPTLORA_X86_KERNELS
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

// The table for this machine, chosen once. The environment variable ADAPTLORA_ISA (default | avx2 | avx512) can
// choose a lower one; std::runtime_error if it names one that does not exist or that this machine cannot run.
const Kernels& kernels();

}  // namespace adaptlora
