// The low-rank terms and their gradients, fused over row tiles of x and dy. Dropout's mask is regenerated from the seed for
// each tile and never stored; no pass over y or dx beyond the one that writes it.
#include "lora_delta.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "host.h"

namespace adaptlora {
namespace {

// A matrix in float32 whose rows are contiguous and padded with zeros to a multiple of kPad.
struct Packed {
  at::Tensor storage;
  int64_t stride = 0;
  const float* data = nullptr;
};

// Rows 4 KiB apart would compete for the same cache sets.
bool rows_collide(int64_t stride) { return stride % 1024 == 0; }

int64_t padded_stride(int64_t length) {
  const int64_t padded = round_up(length, kPad);
  return rows_collide(padded) ? padded + kPad : padded;
}

// `matrix`, or with `transposed` its transpose. Views are not made where the memory will do as it is: each costs as much as
// a hundred multiply-adds of a whole cache line.
Packed pack(const at::Tensor& matrix, bool transposed = false) {
  const int64_t row = transposed ? 1 : 0, column = 1 - row;
  const int64_t length = matrix.size(column), row_stride = matrix.stride(row);
  const bool lies_well = matrix.scalar_type() == at::kFloat && matrix.stride(column) == 1 && length % kPad == 0;
  if (lies_well && !rows_collide(row_stride)) return {matrix, row_stride, matrix.const_data_ptr<float>()};
  const int64_t stride = padded_stride(length);
  at::Tensor storage = at::empty({matrix.size(row), stride}, at::kFloat);
  if (stride > length) storage.narrow(1, length, stride - length).zero_();
  storage.narrow(1, 0, length).copy_(transposed ? matrix.t() : matrix);
  return {storage, stride, storage.const_data_ptr<float>()};
}

Packed pack_bias(const std::optional<at::Tensor>& bias) {
  if (!bias.has_value()) return {};
  const bool lies_well = bias->scalar_type() == at::kFloat && bias->stride(0) == 1 && bias->size(0) % kPad == 0;
  return lies_well ? Packed{*bias, 0, bias->const_data_ptr<float>()} : pack(bias->unsqueeze(0));
}

// Buffers of one thread: a tile of x or dy, its dropout mask, and the rows of S ∘ e or dS that belong to it.
struct Workspace {
  alignas(64) float tile[kTileRows * kTileStride];
  alignas(64) uint32_t mask[kTileRows * kTileStride];
  std::vector<float> S;

  explicit Workspace(int64_t total_rank) : S(kTileRows * total_rank) {}
};

// A matrix that is walked in tiles. Without dropout the kernels read float32 as it lies, if it lies well.
class TileSource {
 public:
  explicit TileSource(const at::Tensor& t)
      : view_(matrix_view(t)),
        direct_(view_.dtype == Dtype::f32 && view_.col_stride == 1 && t.size(1) % kPad == 0 &&
                !rows_collide(view_.row_stride)) {}

  Rows plain(int64_t row, int64_t col, int64_t rows, int64_t cols, Workspace& ws) const {
    if (direct_) return {static_cast<const float*>(view_.data) + row * view_.row_stride + col, view_.row_stride};
    kernels().load_tile(view_, row, col, rows, cols, ws.tile);
    return {ws.tile, kTileStride};
  }

  // Asks for the tile to be brought into the cache.
  void prefetch(int64_t row, int64_t col, int64_t rows, int64_t cols) const {
    if (!direct_) return;
    constexpr int64_t kLine = 16;
    const float* first = static_cast<const float*>(view_.data) + row * view_.row_stride + col;
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t c = 0; c < cols; c += kLine) __builtin_prefetch(first + m * view_.row_stride + c);
    }
  }

  // With the mask in ws.mask if keep_mask.
  Rows dropped(const Dropout& dropout, int64_t row, int64_t col, int64_t rows, int64_t cols, bool keep_mask,
               Workspace& ws) const {
    kernels().drop_tile(dropout, view_, row, col, rows, cols, keep_mask, ws.mask, ws.tile);
    return {ws.tile, kTileStride};
  }

 private:
  MatrixView view_;
  bool direct_;
};

void check_adapter(const Where& where, int64_t K, int64_t N, const Adapter& adapter, bool rank_zero) {
  const auto& [A, B, rank_scale, scaling, seed] = adapter;
  const int64_t least = rank_zero ? 0 : 1;
  TORCH_CHECK(A.dim() == 2 && A.size(1) == K && A.size(0) >= least && A.size(0) <= kMaxRank, where,
              ": A must have shape (R, K) with ", least, " <= R <= ", kMaxRank, " and K=", K, ", got ", A.sizes());
  const int64_t R = A.size(0);
  TORCH_CHECK(B.dim() == 2 && B.size(0) == N && B.size(1) == R, where, ": B must have shape (N, R) = (", N, ", ", R,
              "), got ", B.sizes());
  const std::pair<const char*, const at::Tensor*> operands[] = {{"A", &A}, {"B", &B}};
  for (const auto& [name, t] : operands) {
    TORCH_CHECK(is_supported(*t), where, ": ", name, " must be a dense float32, bfloat16 or float16 CPU tensor, got ",
                t->scalar_type(), " on ", t->device());
  }
  if (rank_scale.has_value()) {
    TORCH_CHECK(is_supported(*rank_scale) && rank_scale->dim() == 1 && rank_scale->size(0) == R, where,
                ": rank_scale must be float32, bfloat16 or float16 of shape (R,) = (", R, ",) on the CPU, got ",
                rank_scale->scalar_type(), " ", rank_scale->sizes());
  }
}

// scaling · E, one factor for each rank.
std::vector<float> rank_factors(const Adapter& adapter) {
  std::vector<float> factors(adapter.A.size(0), static_cast<float>(adapter.scaling));
  if (adapter.rank_scale.has_value()) {
    const at::Tensor scaled = adapter.rank_scale->to(at::kFloat).mul(adapter.scaling).contiguous();
    std::copy_n(scaled.const_data_ptr<float>(), factors.size(), factors.begin());
  }
  return factors;
}

// Parallel work below this many multiply-adds per thread costs more to start than it saves.
constexpr int64_t kMinWork = 1 << 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t total_rank(const Group& group) {
  int64_t total = 0;
  for (const Adapter& adapter : group.modules) total += adapter.A.size(0);
  return total;
}

// Tiles whose products are added one to the other before their sum goes to that of the chunk: 256 rows. The error of n terms
// added in a row grows as √n; with runs it is that of a run and of the few sums of runs.
constexpr int64_t kRunTiles = 16;

// Partial sums of an (R, length) gradient: one (R, stride) part for each chunk of rows of x, and where chunks are longer than
// a run a second one for the run.
class Parts {
 public:
  Parts() = default;
  Parts(int64_t n_chunks, bool runs, int64_t R, int64_t length)
      : n_chunks_(n_chunks), R_(R), length_(length), stride_(padded_stride(length)), runs_(runs) {
    storage_ = at::empty({(runs ? 2 : 1) * n_chunks * R * stride_}, at::kFloat);
    data_ = storage_.mutable_data_ptr<float>();
  }

  int64_t stride() const { return stride_; }
  // Where the products of the next tile are added.
  float* run(int64_t c) const { return part(runs_ ? n_chunks_ + c : c); }
  void clear(int64_t c) const {
    std::fill_n(part(c), size(), 0.0f);
    if (runs_) std::fill_n(run(c), size(), 0.0f);
  }
  // The run goes to the sum of the chunk; the next one starts from 0.
  void end_run(int64_t c) const {
    if (!runs_) return;
    float* sum = part(c);
    float* last = run(c);
    for (int64_t i = 0; i < size(); ++i) {
      sum[i] += last[i];
      last[i] = 0;
    }
  }

  // The sum over the chunks, in their order, times factors[r] (1 if there are none): contiguous (R, length).
  at::Tensor sum(const std::vector<float>& factors = {}) const {
    at::Tensor out = at::empty({R_, length_}, at::kFloat);
    float* sums = out.mutable_data_ptr<float>();
    const Kernels& kernel = kernels();
    at::parallel_for(0, R_, ceil_div(kMinWork, n_chunks_ * length_), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        kernel.add_parts(data_ + r * stride_, n_chunks_, R_ * stride_, length_, factors.empty() ? 1.0f : factors[r],
                         sums + r * length_);
      }
    });
    return out;
  }

 private:
  int64_t size() const { return R_ * stride_; }
  float* part(int64_t i) const { return data_ + i * size(); }

  int64_t n_chunks_ = 0, R_ = 0, length_ = 0, stride_ = 0;
  bool runs_ = false;
  at::Tensor storage_;
  float* data_ = nullptr;
};

std::optional<Dropout> dropout_of(const Group& group, const Adapter& adapter) {
  if (group.dropout_p == 0) return std::nullopt;
  return make_dropout(*adapter.seed, group.threshold);
}

// What is applied to S and dS, which are small, instead of to every kept element of x and dx.
float kept_scale(const Group& group) { return static_cast<float>(1 / (1 - group.dropout_p)); }

// One module of the forward, with R >= 1.
struct ForwardModule {
  int64_t R, first_column, N;
  Packed A, B, bias;
  std::vector<float> e;
  std::optional<Dropout> dropout;
  char* y;
  int64_t stride_y, row_bytes;
};

}  // namespace

Group group_of_one(const char* op, const at::Tensor& A, const at::Tensor& B,
                   const std::optional<at::Tensor>& rank_scale, double scaling, double dropout_p, int64_t threshold,
                   const std::optional<at::Tensor>& seed) {
  const auto number = seed.has_value() ? std::optional(seed_value(op, *seed)) : std::nullopt;
  return {op, false, {{A, B, rank_scale, scaling, number}}, dropout_p, threshold};
}

void check_tokens(const Where& where, const at::Tensor& x) {
  TORCH_CHECK(x.dim() == 2 && x.size(0) >= 1 && x.size(1) >= 1, where, ": x must have shape (M, K), M, K >= 1, got ",
              x.sizes());
  TORCH_CHECK(is_supported(x), where, ": x must be a dense float32, bfloat16 or float16 CPU tensor, got ",
              x.scalar_type(), " on ", x.device());
}

void check_dropout(const Group& group) {
  TORCH_CHECK(group.dropout_p >= 0 && group.dropout_p < 1, group.op, ": dropout_p must be in [0, 1), got ",
              group.dropout_p);
  if (group.dropout_p == 0) return;
  check_threshold(group.op, group.threshold);
  for (size_t i = 0; i < group.modules.size(); ++i) {
    TORCH_CHECK(group.modules[i].seed.has_value(), group.where(i), ": seed must be given when dropout_p > 0, got None");
  }
}

at::Tensor lora_expand_into(const std::vector<at::Tensor>& ys, bool add, const OptionalTensors& biases,
                            const at::Tensor& x, const Group& group) {
  check_dropout(group);
  for (size_t i = 0; i < ys.size(); ++i) {
    check_tokens(group.where(i), x);
    check_adapter(group.where(i), x.size(1), ys[i].size(1), group.modules[i], group.grouped);
  }
  const int64_t M = x.size(0), K = x.size(1), R_all = total_rank(group);
  std::vector<ForwardModule> modules;
  modules.reserve(ys.size());
  int64_t first_column = 0, N_all = 0;
  for (size_t i = 0; i < ys.size(); ++i) {
    const Adapter& adapter = group.modules[i];
    const at::Tensor& y = ys[i];
    modules.push_back({adapter.A.size(0), first_column, y.size(1), pack(adapter.A), pack(adapter.B, true),
                       pack_bias(biases[i]), rank_factors(adapter),
                       dropout_of(group, adapter), static_cast<char*>(y.mutable_data_ptr()), y.stride(0),
                       y.stride(0) * static_cast<int64_t>(y.element_size())});
    first_column += adapter.A.size(0);
    N_all += y.size(1);
  }

  at::Tensor S = at::empty({M, R_all}, at::kFloat);
  float* S_data = S.mutable_data_ptr<float>();
  const TileSource x_tiles(x);
  const Dtype dtype = dtype_of(x);
  const float kept = kept_scale(group);
  const Kernels& kernel = kernels();

  const auto run_tile = [&](int64_t m0, Workspace& ws) {
    const int64_t rows = std::min(kTileRows, M - m0);
    std::fill(ws.S.begin(), ws.S.end(), 0.0f);
    for (int64_t k0 = 0; k0 < K; k0 += kTileCols) {
      const int64_t cols = std::min(kTileCols, K - k0);
      std::optional<Rows> shared;  // without dropout all modules see the same x
      for (const ForwardModule& module : modules) {
        if (module.R == 0) continue;
        if (module.dropout) {
          shared = x_tiles.dropped(*module.dropout, m0, k0, rows, cols, false, ws);
        } else if (!shared) {
          shared = x_tiles.plain(m0, k0, rows, cols, ws);
        }
        kernel.shrink(*shared, rows, cols, module.A.data + k0, module.A.stride, module.R,
                      {ws.S.data() + module.first_column, R_all});
      }
    }
    for (const ForwardModule& module : modules) {
      for (int64_t m = 0; m < rows; ++m) {
        float* scaled = ws.S.data() + m * R_all + module.first_column;
        float* out = S_data + (m0 + m) * R_all + module.first_column;
        for (int64_t r = 0; r < module.R; ++r) {
          out[r] = scaled[r] * kept;
          scaled[r] = out[r] * module.e[r];
        }
      }
      const RankRows scaled = {ws.S.data() + module.first_column, R_all};
      kernel.expand(scaled, rows, module.N, module.B.data, module.B.stride, module.R, module.bias.data, nullptr,
                    module.y + m0 * module.row_bytes, dtype, module.stride_y, add);
    }
  };
  const int64_t grain = ceil_div(kMinWork, kTileRows * (R_all * K + N_all));
  at::parallel_for(0, ceil_div(M, kTileRows), grain, [&](int64_t begin, int64_t end) {
    Workspace ws(R_all);
    for (int64_t t = begin; t < end; ++t) run_tile(t * kTileRows, ws);
  });
  return S;
}

namespace {

// One module of the backward, with a dy and R >= 1.
struct BackwardModule {
  size_t index;
  int64_t R, N;
  const float* S;  // its first column
  TileSource dy;
  Packed A, B;
  std::vector<float> e;
  std::optional<Dropout> dropout;
  Wanted wanted;
  bool make_G, make_dS;
  int64_t first_dS;  // its columns among those of all dS
  Parts G, dA;
};

}  // namespace

DeltaGradients lora_delta_gradients(const OptionalTensors& dys, const std::optional<at::Tensor>& x,
                                    const std::optional<at::Tensor>& S, const Group& group, bool need_dx,
                                    const std::vector<Wanted>& wanted) {
  check_dropout(group);
  const size_t n_modules = group.modules.size();
  DeltaGradients out{at::Tensor(), OptionalTensors(n_modules), OptionalTensors(n_modules), OptionalTensors(n_modules)};
  const auto first = std::find_if(dys.begin(), dys.end(), [](const auto& dy) { return dy.has_value(); });
  if (first == dys.end()) return out;
  const auto first_index = static_cast<size_t>(first - dys.begin());
  if (x.has_value()) check_tokens(group.where(first_index), *x);
  const at::Tensor& first_A = group.modules[first_index].A;
  const at::Tensor& like = x.has_value() ? *x : **first;
  const int64_t M = like.dim() == 2 ? like.size(0) : 0;
  const int64_t K = x.has_value() ? x->size(1) : first_A.dim() == 2 ? first_A.size(1) : 0;
  const int64_t R_all = total_rank(group);
  bool any_dA = false;
  for (size_t i = 0; i < n_modules; ++i) {
    if (!dys[i].has_value()) continue;
    const Where where = group.where(i);
    const at::Tensor& dy = *dys[i];
    TORCH_CHECK(is_supported(dy) && dy.scalar_type() == like.scalar_type() && dy.dim() == 2 && dy.size(0) == M && M > 0,
                where, ": dy must be ", like.scalar_type(), " of shape (M, N) with M=", M, " > 0 rows on the CPU, got ",
                dy.scalar_type(), " ", dy.sizes());
    check_adapter(where, K, dy.size(1), group.modules[i], group.grouped);
    TORCH_CHECK(!wanted[i].dE || group.modules[i].rank_scale.has_value(), where,
                ": rank_scale must be given when need_dE, got None");
    TORCH_CHECK(!wanted[i].dA || x.has_value(), where, ": x must be given when need_dA, got None");
    TORCH_CHECK(!(wanted[i].dB || wanted[i].dE) || S.has_value(), where,
                ": S must be given when need_dB or need_dE, got None");
    any_dA = any_dA || wanted[i].dA;
  }
  TORCH_CHECK(!S.has_value() || (S->device().is_cpu() && S->scalar_type() == at::kFloat && S->dim() == 2 &&
                                 S->size(0) == M && S->size(1) == R_all),
              group.op, ": S must be float32 of shape (M, R) = (", M, ", ", R_all, ") on the CPU, got ",
              S->scalar_type(), " ", S->sizes());
  const at::Tensor S_rows = S.has_value() ? S->contiguous() : at::Tensor();

  std::vector<BackwardModule> modules;
  modules.reserve(n_modules);
  int64_t column = 0, dS_columns = 0, part_size = 0;
  for (size_t i = 0; i < n_modules; ++i) {
    const Adapter& adapter = group.modules[i];
    const int64_t R = adapter.A.size(0), first_column = column;
    column += R;
    if (!dys[i].has_value()) continue;
    if (R == 0) {
      if (wanted[i].dA) out.dAs[i] = at::empty_like(adapter.A);
      if (wanted[i].dB) out.dBs[i] = at::empty_like(adapter.B);
      if (wanted[i].dE) out.dEs[i] = at::empty_like(*adapter.rank_scale);
      continue;
    }
    const bool make_G = wanted[i].dB || wanted[i].dE, make_dS = need_dx || wanted[i].dA;
    if (!make_G && !make_dS) continue;
    const int64_t N = dys[i]->size(1);
    modules.push_back({i, R, N, make_G ? S_rows.const_data_ptr<float>() + first_column : nullptr, TileSource(*dys[i]),
                       need_dx ? pack(adapter.A) : Packed{}, make_dS ? pack(adapter.B, true) : Packed{},
                       rank_factors(adapter), dropout_of(group, adapter), wanted[i], make_G, make_dS, dS_columns,
                       {}, {}});
    dS_columns += make_dS ? R : 0;
    part_size += R * ((make_G ? padded_stride(N) : 0) + (wanted[i].dA ? padded_stride(K) : 0));
  }
  if (need_dx) out.dx = dS_columns ? at::empty({M, K}, like.options()) : at::zeros({M, K}, like.options());
  if (modules.empty()) return out;

  // One chunk of consecutive tiles per thread, each with partial sums of its own: the order of sums depends on the number
  // of threads and of rows, not on timing, on what else is asked for or on the other modules. At least two tiles a chunk,
  // and no more than 512 MiB of partial sums in all.
  const int64_t tiles = ceil_div(M, kTileRows);
  int64_t n_chunks = std::min<int64_t>(at::get_num_threads(), ceil_div(tiles, 2));
  if (part_size > 0) n_chunks = std::clamp<int64_t>((1 << 26) / part_size, 1, n_chunks);
  const int64_t tiles_per_chunk = ceil_div(tiles, n_chunks);
  const bool runs = tiles_per_chunk > kRunTiles;
  for (BackwardModule& module : modules) {
    if (module.make_G) module.G = Parts(n_chunks, runs, module.R, module.N);
    if (module.wanted.dA) module.dA = Parts(n_chunks, runs, module.R, K);
  }

  auto* dx_data = need_dx ? static_cast<char*>(out.dx.mutable_data_ptr()) : nullptr;
  const int64_t element_size = like.element_size(), S_stride = R_all;
  const std::optional<TileSource> x_tiles = any_dA ? std::optional<TileSource>(*x) : std::nullopt;
  const Dtype dtype = dtype_of(like);
  const float kept = kept_scale(group);
  const Kernels& kernel = kernels();

  const auto read_dy = [&](const BackwardModule& module, int64_t chunk, int64_t m0, int64_t rows, Workspace& ws) {
    const RankRows dS = {ws.S.data() + module.first_dS, dS_columns};
    for (int64_t n0 = 0; n0 < module.N; n0 += kTileCols) {
      const int64_t cols = std::min(kTileCols, module.N - n0);
      const Rows dy = module.dy.plain(m0, n0, rows, cols, ws);
      if (module.make_dS) kernel.shrink(dy, rows, cols, module.B.data + n0, module.B.stride, module.R, dS);
      if (module.make_G) {
        // The kernels do not write through S.
        const RankRows S_tile = {const_cast<float*>(module.S) + m0 * S_stride, S_stride};
        kernel.accumulate(S_tile, dy, rows, cols, module.R, module.G.run(chunk) + n0, module.G.stride());
      }
    }
    if (!module.make_dS) return;
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t r = 0; r < module.R; ++r) dS.data[m * dS.stride + r] *= module.e[r] * kept;
    }
  };
  const auto write_dx_and_dA = [&](int64_t chunk, int64_t m0, int64_t rows, Workspace& ws) {
    for (int64_t k0 = 0; k0 < K; k0 += kTileCols) {
      const int64_t cols = std::min(kTileCols, K - k0);
      bool add = false;
      for (const BackwardModule& module : modules) {
        if (!module.make_dS) continue;
        const RankRows dS = {ws.S.data() + module.first_dS, dS_columns};
        if (module.wanted.dA) {
          const Rows dropped = module.dropout
                                   ? x_tiles->dropped(*module.dropout, m0, k0, rows, cols, need_dx, ws)
                                   : x_tiles->plain(m0, k0, rows, cols, ws);
          kernel.accumulate(dS, dropped, rows, cols, module.R, module.dA.run(chunk) + k0, module.dA.stride());
        } else if (module.dropout) {
          kernel.dropout_mask(*module.dropout, m0, k0, rows, cols, ws.mask);
        }
        if (need_dx) {
          const uint32_t* mask = module.dropout ? ws.mask : nullptr;
          kernel.expand(dS, rows, cols, module.A.data + k0, module.A.stride, module.R, nullptr, mask,
                        dx_data + (m0 * K + k0) * element_size, dtype, K, add);
        }
        add = true;
      }
    }
  };
  at::parallel_for(0, n_chunks, 1, [&](int64_t begin, int64_t end) {
    Workspace ws(dS_columns);
    for (int64_t c = begin; c < end; ++c) {
      for (const BackwardModule& module : modules) {
        if (module.make_G) module.G.clear(c);
        if (module.wanted.dA) module.dA.clear(c);
      }
      const int64_t begin_tile = c * tiles_per_chunk, end_tile = std::min(tiles, begin_tile + tiles_per_chunk);
      for (int64_t t = begin_tile; t < end_tile; ++t) {
        const int64_t m0 = t * kTileRows, rows = std::min(kTileRows, M - m0);
        std::fill(ws.S.begin(), ws.S.end(), 0.0f);
        if (x_tiles) x_tiles->prefetch(m0, 0, rows, std::min(kTileCols, K));
        for (const BackwardModule& module : modules) read_dy(module, c, m0, rows, ws);
        if (dS_columns > 0) write_dx_and_dA(c, m0, rows, ws);
        if ((t + 1 - begin_tile) % kRunTiles != 0 && t + 1 != end_tile) continue;
        for (const BackwardModule& module : modules) {
          if (module.make_G) module.G.end_run(c);
          if (module.wanted.dA) module.dA.end_run(c);
        }
      }
    }
  });

  for (const BackwardModule& module : modules) {
    const Adapter& adapter = group.modules[module.index];
    if (module.wanted.dA) out.dAs[module.index] = module.dA.sum().to(adapter.A.scalar_type());
    if (module.wanted.dE) {
      const at::Tensor G = module.G.sum();
      out.dEs[module.index] = G.mul(adapter.B.t()).sum(1).mul_(adapter.scaling).to(adapter.rank_scale->scalar_type());
    }
    if (module.wanted.dB) out.dBs[module.index] = module.G.sum(module.e).to(adapter.B.scalar_type()).t();
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
  const at::Tensor S = lora_expand_into({rows}, true, {std::nullopt}, x,
                                        group_of_one(op, A, B, rank_scale, scaling, dropout_p, threshold, seed));
  if (!rows.is_same(y)) y.copy_(rows);
  return S;
}

Gradients lora_delta_backward_cpu(const at::Tensor& dy, const std::optional<at::Tensor>& x,
                                  const std::optional<at::Tensor>& S, const at::Tensor& A, const at::Tensor& B,
                                  const std::optional<at::Tensor>& rank_scale, double scaling, double dropout_p,
                                  int64_t threshold, const std::optional<at::Tensor>& seed, bool need_dx, bool need_dA,
                                  bool need_dB, bool need_dE) {
  const PlainDispatch plain;
  const Group group =
      group_of_one("lora_delta_backward", A, B, rank_scale, scaling, dropout_p, threshold, seed);
  auto [dx, dAs, dBs, dEs] = lora_delta_gradients({dy}, x, S, group, need_dx, {{need_dA, need_dB, need_dE}});
  return {need_dx ? std::optional(dx) : std::nullopt, dAs[0], dBs[0], dEs[0]};
}

}  // namespace adaptlora
