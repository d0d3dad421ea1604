#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "host.h"
#include "ops.h"

namespace adaptlora {
namespace {

// What threads share out of an outer factor: whole register blocks, on every instruction set.
constexpr int64_t kStripCols = 192;
constexpr int64_t kStripRows = 4;

// One product with an outer factor, all operands rank-major: inner (R, r_out) or its gradient, eff (R, cols) or its gradient.
struct Side {
  at::Tensor inner, outer, eff;
};

int64_t strips_of(const at::Tensor& outer) { return (outer.size(1) + kStripCols - 1) / kStripCols; }

// The memory of its rows as the kernels take it: each row in one piece.
at::Tensor checked(const char* op, const char* name, const at::Tensor& rows, int64_t n, int64_t length) {
  TORCH_CHECK(rows.device().is_cpu() && rows.layout() == at::kStrided && rows.scalar_type() == at::kFloat &&
                  rows.dim() == 2 && rows.size(0) == n && rows.size(1) == length,
              op, ": ", name, " must be a float32 CPU tensor of rank vectors ", at::IntArrayRef({n, length}), ", got ",
              rows.scalar_type(), " ", rows.sizes(), " on ", rows.device());
  return rows.stride(1) == 1 ? rows : rows.contiguous();
}

Rows rows_of(const at::Tensor& t) { return {t.const_data_ptr<float>(), t.stride(0)}; }

// Strips per thread below which starting another thread costs more than it saves.
int64_t grain(int64_t products_per_strip) { return (1 << 19) / std::max<int64_t>(1, products_per_strip) + 1; }

}  // namespace

std::tuple<at::Tensor, at::Tensor> compose_cpu(const at::Tensor& A, const at::Tensor& B, const at::Tensor& outer_A,
                                               const at::Tensor& outer_B) {
  const PlainDispatch plain;
  for (const auto& [name, t] : {std::pair("A", A), {"B", B}, {"outer_A", outer_A}, {"outer_B", outer_B}}) {
    TORCH_CHECK(t.dim() == 2, "compose: ", name, " must have 2 dimensions, got ", t.sizes());
  }
  const int64_t R = A.size(0), r_out = A.size(1);
  const auto side = [&](const char* name, const at::Tensor& inner, const char* outer_name, const at::Tensor& outer) {
    return Side{checked("compose", name, inner, R, r_out),
                checked("compose", outer_name, outer, r_out, outer.size(1)),
                at::empty({R, outer.size(1)}, A.options())};
  };
  const Side sides[] = {side("A", A, "outer_A", outer_A), side("B", B.t(), "outer_B", outer_B)};
  const Kernels& kernel = kernels();
  // The strips of both sides as one list.
  const int64_t total = strips_of(outer_A) + strips_of(outer_B);
  at::parallel_for(0, total, grain(kStripCols * r_out * R), [&](int64_t begin, int64_t end) {
    for (const auto& [inner, outer, eff] : sides) {
      const int64_t cols = outer.size(1), strips = strips_of(outer);
      const int64_t first = std::max<int64_t>(begin, 0) * kStripCols, last = std::min(end * kStripCols, cols);
      if (first < last) {
        const Rows from = rows_of(outer);
        kernel.compose(rows_of(inner), {from.data + first, from.stride}, r_out, last - first, R,
                       eff.mutable_data_ptr<float>() + first, cols);
      }
      begin -= strips;
      end -= strips;
    }
  });
  return {sides[0].eff, sides[1].eff.t()};
}

std::tuple<std::optional<at::Tensor>, std::optional<at::Tensor>> compose_backward_cpu(
    const std::optional<at::Tensor>& dA_eff, const std::optional<at::Tensor>& dB_eff, const at::Tensor& outer_A,
    const at::Tensor& outer_B) {
  const PlainDispatch plain;
  const auto side = [](const char* name, const std::optional<at::Tensor>& d_eff, bool transposed,
                       const char* outer_name, const at::Tensor& outer) -> std::optional<Side> {
    if (!d_eff.has_value()) return std::nullopt;
    for (const auto& [given, t] : {std::pair(name, *d_eff), {outer_name, outer}}) {
      TORCH_CHECK(t.dim() == 2, "compose_backward: ", given, " must have 2 dimensions, got ", t.sizes());
    }
    const int64_t r_out = outer.size(0), cols = outer.size(1);
    const at::Tensor rows = transposed ? d_eff->t() : *d_eff;
    const int64_t R = rows.size(0);
    return Side{at::empty({R, r_out}, rows.options()), checked("compose_backward", outer_name, outer, r_out, cols),
                checked("compose_backward", name, rows, R, cols)};
  };
  const std::optional<Side> sides[] = {side("dA_eff", dA_eff, false, "outer_A", outer_A),
                                       side("dB_eff", dB_eff, true, "outer_B", outer_B)};
  // A strip is of rows of both outer factors.
  int64_t rows = 0, products = 0;
  for (const auto& s : sides) {
    if (!s) continue;
    rows = std::max(rows, s->outer.size(0));
    products += kStripRows * s->eff.numel();
  }
  const Kernels& kernel = kernels();
  at::parallel_for(0, (rows + kStripRows - 1) / kStripRows, grain(products), [&](int64_t begin, int64_t end) {
    for (const auto& s : sides) {
      if (!s) continue;
      const int64_t first = begin * kStripRows, last = std::min(end * kStripRows, s->outer.size(0));
      if (first >= last) continue;
      const Rows outer = rows_of(s->outer);
      kernel.compose_backward(rows_of(s->eff), {outer.data + first * outer.stride, outer.stride}, last - first,
                              s->eff.size(1), s->eff.size(0), s->inner.mutable_data_ptr<float>() + first,
                              s->inner.size(1));
    }
  });
  const auto inner = [](const std::optional<Side>& s) { return s ? std::optional(s->inner) : std::nullopt; };
  const auto dB = inner(sides[1]);
  return {inner(sides[0]), dB ? std::optional(dB->t()) : std::nullopt};
}

}  // namespace adaptlora
