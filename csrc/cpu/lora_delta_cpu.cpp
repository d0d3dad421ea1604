// The low-rank term and its gradients, fused over row tiles of x and dy. Dropout's mask is regenerated from the seed for
// each tile and never stored; no pass over y or dx beyond the one that writes it.
#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

#include "host.h"
#include "lora_delta.h"
#include "ops.h"

namespace adaptlora {
namespace {

// A matrix in float32 whose rows are contiguous and padded with zeros to a multiple of kPad.
struct Packed {
  at::Tensor storage;
  int64_t stride;
  const float* data() const { return storage.const_data_ptr<float>(); }
};

int64_t padded_stride(int64_t length) {
  const int64_t padded = round_up(length, kPad);
  return padded % 1024 == 0 ? padded + kPad : padded;  // rows 4 KiB apart would compete for the same cache sets
}

Packed pack(const at::Tensor& rows) {
  const int64_t length = rows.size(1), stride = padded_stride(length);
  if (rows.scalar_type() == at::kFloat && rows.stride(1) == 1 && length % kPad == 0 && rows.stride(0) % 1024 != 0) {
    return {rows, rows.stride(0)};
  }
  at::Tensor storage = at::empty({rows.size(0), stride}, at::kFloat);
  if (stride > length) storage.narrow(1, length, stride - length).zero_();
  storage.narrow(1, 0, length).copy_(rows);
  return {storage, stride};
}

// Buffers of one thread: a tile of x or dy, its dropout mask, and the rows of S and dS that belong to it.
struct Workspace {
  alignas(64) float tile[kTileRows * kTileStride];
  alignas(64) uint32_t mask[kTileRows * kTileStride];
  alignas(64) float S[kTileRows * kMaxRank];
  alignas(64) float dS[kTileRows * kMaxRank];
};

void check_adapter(const char* op, const at::Tensor& x, int64_t N, const Adapter& adapter) {
  const auto& [A, B, rank_scale, scaling, dropout_p, threshold, seed] = adapter;
  TORCH_CHECK(x.dim() == 2 && x.size(0) >= 1 && x.size(1) >= 1, op, ": x must have shape (M, K), M, K >= 1, got ",
              x.sizes());
  const int64_t K = x.size(1);
  TORCH_CHECK(A.dim() == 2 && A.size(1) == K && A.size(0) >= 1 && A.size(0) <= kMaxRank, op,
              ": A must have shape (R, K) with 1 <= R <= ", kMaxRank, " and K=", K, ", got ", A.sizes());
  const int64_t R = A.size(0);
  TORCH_CHECK(B.dim() == 2 && B.size(0) == N && B.size(1) == R, op, ": B must have shape (N, R) = (", N, ", ", R,
              "), got ", B.sizes());
  for (const auto& [name, t] : {std::pair("x", x), {"A", A}, {"B", B}}) {
    TORCH_CHECK(is_supported(t), op, ": ", name, " must be a dense float32, bfloat16 or float16 CPU tensor, got ",
                t.scalar_type(), " on ", t.device());
  }
  if (rank_scale.has_value()) {
    TORCH_CHECK(is_supported(*rank_scale) && rank_scale->dim() == 1 && rank_scale->size(0) == R, op,
                ": rank_scale must be float32, bfloat16 or float16 of shape (R,) = (", R, ",) on the CPU, got ",
                rank_scale->scalar_type(), " ", rank_scale->sizes());
  }
}

// scaling · E, one factor for each rank.
at::Tensor rank_factors(const Adapter& adapter) {
  const auto& rank_scale = adapter.rank_scale;
  return rank_scale.has_value() ? rank_scale->to(at::kFloat).mul(adapter.scaling).contiguous()
                                : at::full({adapter.A.size(0)}, adapter.scaling, at::kFloat);
}

// Parallel work below this many multiply-adds per thread costs more to start than it saves.
constexpr int64_t kMinWork = 1 << 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sums the (R, stride) partial results of n_chunks chunks into a contiguous (R, length) tensor, in chunk order.
at::Tensor add_chunks(const at::Tensor& parts, int64_t n_chunks, int64_t R, int64_t length) {
  at::Tensor out = at::empty({R, length}, at::kFloat);
  const float* in = parts.const_data_ptr<float>();
  float* sums = out.mutable_data_ptr<float>();
  const int64_t stride = padded_stride(length);
  const Kernels& kernel = kernels();
  at::parallel_for(0, R, ceil_div(kMinWork, n_chunks * length), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      kernel.add_parts(in + r * stride, n_chunks, R * stride, length, sums + r * length);
    }
  });
  return out;
}

}  // namespace

at::Tensor lora_expand_into(const char* op, const at::Tensor& y, bool add, const std::optional<at::Tensor>& bias,
                            const at::Tensor& x, const Adapter& adapter) {
  const int64_t M = y.size(0), N = y.size(1);
  check_adapter(op, x, N, adapter);
  const int64_t K = x.size(1), R = adapter.A.size(0);
  const auto dropout = dropout_of(op, adapter.dropout_p, adapter.threshold, adapter.seed);
  // Applied to S and dS, which are small, instead of to every kept element of x and dx.
  const auto kept_scale = static_cast<float>(1 / (1 - adapter.dropout_p));

  const Packed packed_A = pack(adapter.A), packed_B = pack(adapter.B.t());
  const Packed packed_bias = bias.has_value() ? pack(bias->unsqueeze(0)) : Packed{};
  const float* bias_data = bias.has_value() ? packed_bias.data() : nullptr;
  const at::Tensor e = rank_factors(adapter);
  const float* e_data = e.const_data_ptr<float>();

  at::Tensor S = at::empty({M, R}, at::kFloat);
  auto* y_data = static_cast<char*>(y.mutable_data_ptr());
  float* S_data = S.mutable_data_ptr<float>();
  const MatrixView x_view = matrix_view(x);
  const int64_t y_row_bytes = y.stride(0) * y.element_size();
  const Kernels& kernel = kernels();

  const auto run_tile = [&](int64_t m0, Workspace& ws) {
    const int64_t rows = std::min(kTileRows, M - m0);
    std::memset(ws.S, 0, sizeof(ws.S));
    for (int64_t k0 = 0; k0 < K; k0 += kTileCols) {
      const int64_t cols = std::min(kTileCols, K - k0);
      if (dropout) kernel.dropout_mask(*dropout, m0, k0, rows, cols, ws.mask);
      kernel.load_tile(x_view, m0, k0, rows, cols, dropout ? ws.mask : nullptr, ws.tile);
      kernel.shrink(ws.tile, rows, cols, packed_A.data() + k0, packed_A.stride, R, ws.S);
    }
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t r = 0; r < R; ++r) {
        const float s = ws.S[m * kMaxRank + r] * kept_scale;
        S_data[(m0 + m) * R + r] = s;
        ws.S[m * kMaxRank + r] = s * e_data[r];
      }
    }
    kernel.expand(ws.S, rows, N, packed_B.data(), packed_B.stride, R, bias_data, nullptr, y_data + m0 * y_row_bytes,
                  x_view.dtype, y.stride(0), add);
  };
  const int64_t grain = ceil_div(kMinWork, kTileRows * R * (K + N));
  at::parallel_for(0, ceil_div(M, kTileRows), grain, [&](int64_t begin, int64_t end) {
    Workspace ws;
    for (int64_t t = begin; t < end; ++t) run_tile(t * kTileRows, ws);
  });

  return S;
}

Gradients lora_delta_gradients(const char* op, const at::Tensor& dy, const at::Tensor& x, const at::Tensor& S,
                               const Adapter& adapter, bool need_dx, bool need_dA, bool need_dB, bool need_dE) {
  TORCH_CHECK(is_supported(dy) && dy.scalar_type() == x.scalar_type() && dy.dim() == 2, op, ": dy must be ",
              x.scalar_type(), " of shape (M, N) on the CPU, got ", dy.scalar_type(), " ", dy.sizes());
  const int64_t M = dy.size(0), N = dy.size(1);
  check_adapter(op, x, N, adapter);
  const auto& [A, B, rank_scale, scaling, dropout_p, threshold, seed] = adapter;
  const int64_t K = x.size(1), R = A.size(0);
  TORCH_CHECK(x.size(0) == M, op, ": x must have as many rows as dy, M=", M, ", got ", x.sizes());
  TORCH_CHECK(S.device().is_cpu() && S.scalar_type() == at::kFloat && S.dim() == 2 && S.size(0) == M && S.size(1) == R,
              op, ": S must be float32 of shape (M, R) = (", M, ", ", R, ") on the CPU, got ", S.scalar_type(), " ",
              S.sizes());
  const auto dropout = dropout_of(op, dropout_p, threshold, seed);
  const auto kept_scale = static_cast<float>(1 / (1 - dropout_p));
  TORCH_CHECK(!need_dE || rank_scale.has_value(), op, ": rank_scale must be given when need_dE, got None");
  const bool make_G = need_dB || need_dE, make_dS = need_dx || need_dA;
  if (!make_G && !make_dS) return {};

  const Packed packed_A = need_dx ? pack(A) : Packed{};
  const Packed packed_B = make_dS ? pack(B.t()) : Packed{};
  const at::Tensor S_rows = S.contiguous(), e = rank_factors(adapter);
  const float* S_data = S_rows.const_data_ptr<float>();
  const float* e_data = e.const_data_ptr<float>();
  at::Tensor dx = need_dx ? at::empty({M, K}, x.options()) : at::Tensor();
  auto* dx_data = need_dx ? static_cast<char*>(dx.mutable_data_ptr()) : nullptr;
  const int64_t dx_row_bytes = K * x.element_size();
  const MatrixView x_view = matrix_view(x), dy_view = matrix_view(dy);
  const Kernels& kernel = kernels();

  // One chunk of consecutive tiles per thread, each with partial sums of its own: the result depends on the number of
  // threads, not on their timing. At least two tiles a chunk, and no more than 512 MiB of partial sums in all.
  const int64_t stride_G = padded_stride(N), stride_dA = padded_stride(K), tiles = ceil_div(M, kTileRows);
  const int64_t part_size = R * ((make_G ? stride_G : 0) + (need_dA ? stride_dA : 0));
  int64_t n_chunks = std::min<int64_t>(at::get_num_threads(), ceil_div(tiles, 2));
  n_chunks = std::min(n_chunks, ceil_div(M * (K + N) * R, kMinWork));
  if (part_size > 0) n_chunks = std::clamp<int64_t>((1 << 27) / part_size, 1, n_chunks);
  const int64_t tiles_per_chunk = ceil_div(tiles, n_chunks);
  const at::Tensor parts_G = at::empty({make_G ? n_chunks * R * stride_G : 0}, at::kFloat);
  const at::Tensor parts_dA = at::empty({need_dA ? n_chunks * R * stride_dA : 0}, at::kFloat);
  float* parts_G_data = parts_G.mutable_data_ptr<float>();
  float* parts_dA_data = parts_dA.mutable_data_ptr<float>();

  const auto run_tile = [&](int64_t m0, float* G, float* dA, Workspace& ws) {
    const int64_t rows = std::min(kTileRows, M - m0);
    for (int64_t m = 0; m < rows; ++m) {
      std::memcpy(ws.S + m * kMaxRank, S_data + (m0 + m) * R, R * sizeof(float));
    }
    std::memset(ws.dS, 0, sizeof(ws.dS));
    for (int64_t n0 = 0; n0 < N; n0 += kTileCols) {
      const int64_t cols = std::min(kTileCols, N - n0);
      kernel.load_tile(dy_view, m0, n0, rows, cols, nullptr, ws.tile);
      if (make_dS) kernel.shrink(ws.tile, rows, cols, packed_B.data() + n0, packed_B.stride, R, ws.dS);
      if (make_G) kernel.accumulate(ws.S, ws.tile, rows, cols, R, G + n0, stride_G);
    }
    if (!make_dS) return;
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t r = 0; r < R; ++r) ws.dS[m * kMaxRank + r] *= e_data[r] * kept_scale;
    }
    for (int64_t k0 = 0; k0 < K; k0 += kTileCols) {
      const int64_t cols = std::min(kTileCols, K - k0);
      const uint32_t* mask = dropout ? ws.mask : nullptr;
      if (dropout) kernel.dropout_mask(*dropout, m0, k0, rows, cols, ws.mask);
      if (need_dA) {
        kernel.load_tile(x_view, m0, k0, rows, cols, mask, ws.tile);
        kernel.accumulate(ws.dS, ws.tile, rows, cols, R, dA + k0, stride_dA);
      }
      if (need_dx) {
        kernel.expand(ws.dS, rows, cols, packed_A.data() + k0, packed_A.stride, R, nullptr, mask,
                      dx_data + m0 * dx_row_bytes + k0 * x.element_size(), x_view.dtype, K, false);
      }
    }
  };
  at::parallel_for(0, n_chunks, 1, [&](int64_t begin, int64_t end) {
    Workspace ws;
    for (int64_t c = begin; c < end; ++c) {
      float* G = make_G ? parts_G_data + c * R * stride_G : nullptr;
      float* dA = need_dA ? parts_dA_data + c * R * stride_dA : nullptr;
      if (make_G) std::memset(G, 0, R * stride_G * sizeof(float));
      if (need_dA) std::memset(dA, 0, R * stride_dA * sizeof(float));
      const int64_t last = std::min(tiles, (c + 1) * tiles_per_chunk);
      for (int64_t t = c * tiles_per_chunk; t < last; ++t) run_tile(t * kTileRows, G, dA, ws);
    }
  });

  Gradients out;
  auto& [out_dx, out_dA, out_dB, out_dE] = out;
  if (need_dx) out_dx = dx;
  if (need_dA) out_dA = add_chunks(parts_dA, n_chunks, R, K).to(A.scalar_type());
  if (make_G) {
    const at::Tensor G = add_chunks(parts_G, n_chunks, R, N);
    if (need_dE) out_dE = G.mul(B.t()).sum(1).mul_(scaling).to(rank_scale->scalar_type());
    if (need_dB) out_dB = G.mul_(e.unsqueeze(1)).to(B.scalar_type()).t();
  }
  return out;
}

at::Tensor lora_delta_cpu(const at::Tensor& y, const at::Tensor& x, const at::Tensor& A, const at::Tensor& B,
                          const std::optional<at::Tensor>& rank_scale, double scaling, double dropout_p,
                          int64_t threshold, const std::optional<at::Tensor>& seed) {
  const PlainDispatch plain;
  const char* op = "lora_delta_";
  TORCH_CHECK(is_supported(y) && y.scalar_type() == x.scalar_type() && y.dim() == 2 && y.size(0) >= 1 &&
                  y.size(1) >= 1 && x.dim() == 2 && x.size(0) == y.size(0),
              op, ": y must be ", x.scalar_type(), " of shape (M, N) on the CPU with the M of x, ", x.sizes(),
              ", and M, N >= 1, got ", y.scalar_type(), " ", y.sizes());
  TORCH_CHECK(at::has_internal_overlap(y) != at::MemOverlap::Yes, op,
              ": y must not have elements that share memory, got strides ", y.strides());
  const at::Tensor rows = y.stride(1) == 1 ? y : y.contiguous();
  const at::Tensor S = lora_expand_into(op, rows, true, std::nullopt, x,
                                        {A, B, rank_scale, scaling, dropout_p, threshold, seed});
  if (!rows.is_same(y)) y.copy_(rows);
  return S;
}

Gradients lora_delta_backward_cpu(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& S, const at::Tensor& A,
                                  const at::Tensor& B, const std::optional<at::Tensor>& rank_scale, double scaling,
                                  double dropout_p, int64_t threshold, const std::optional<at::Tensor>& seed,
                                  bool need_dx, bool need_dA, bool need_dB, bool need_dE) {
  const PlainDispatch plain;
  return lora_delta_gradients("lora_delta_backward", dy, x, S, {A, B, rank_scale, scaling, dropout_p, threshold, seed},
                              need_dx, need_dA, need_dB, need_dE);
}

}  // namespace adaptlora
