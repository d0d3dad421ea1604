#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

#include "host.h"
#include "ops.h"

namespace adaptlora {
namespace {

struct RowCopy {
  const char* src;  // null: zeros
  char* dst;
  int64_t length, stride, element_size;
};

template <int kBytes>
void copy_elements(const RowCopy& row) {
  for (int64_t i = 0; i < row.length; ++i) memcpy(row.dst + i * kBytes, row.src + i * row.stride * kBytes, kBytes);
}

void copy_row(const RowCopy& row) {
  if (row.length == 0) return;  // where there may be no memory at all
  if (row.src == nullptr) {
    memset(row.dst, 0, row.length * row.element_size);
  } else if (row.stride == 1) {
    memcpy(row.dst, row.src, row.length * row.element_size);
  } else {
    switch (row.element_size) {
      case 1: copy_elements<1>(row); break;
      case 2: copy_elements<2>(row); break;
      case 4: copy_elements<4>(row); break;
      case 8: copy_elements<8>(row); break;
    }
  }
}

}  // namespace

std::vector<at::Tensor> rank_gather_cpu(const std::vector<at::Tensor>& sources, const at::Tensor& rows,
                                        const std::vector<int64_t>& counts) {
  const PlainDispatch plain;
  TORCH_CHECK(counts.size() == sources.size(), "rank_gather: counts must be as long as sources, ", sources.size(),
              ", got ", counts.size());
  TORCH_CHECK(rows.device().is_cpu() && rows.scalar_type() == at::kLong && rows.dim() == 1,
              "rank_gather: rows must be 1-d int64 on the CPU, got ", rows.scalar_type(), " of shape ", rows.sizes(),
              " on ", rows.device());
  int64_t total = 0;
  for (size_t i = 0; i < sources.size(); ++i) {
    const at::Tensor& source = sources[i];
    TORCH_CHECK(source.device().is_cpu() && source.layout() == at::kStrided && source.dim() == 2 &&
                    !source.is_complex(),
                "rank_gather: sources[", i, "] must be a 2-d real strided CPU tensor, got ", source.scalar_type(),
                " of shape ", source.sizes(), " on ", source.device());
    TORCH_CHECK(counts[i] >= 0, "rank_gather: counts[", i, "] must be at least 0, got ", counts[i]);
    total += counts[i];
  }
  TORCH_CHECK(rows.size(0) == total, "rank_gather: rows must have sum(counts) = ", total, " elements, got ",
              rows.size(0));

  const at::Tensor flat = rows.contiguous();
  const int64_t* row = flat.const_data_ptr<int64_t>();
  std::vector<at::Tensor> outs;
  std::vector<RowCopy> copies;
  copies.reserve(total);
  int64_t bytes = 0;
  for (size_t i = 0; i < sources.size(); ++i) {
    const at::Tensor& source = sources[i];
    const int64_t R = source.size(0), length = source.size(1), size = source.element_size();
    outs.push_back(at::empty({counts[i], length}, source.options()));
    const auto* first = static_cast<const char*>(source.const_data_ptr());
    auto* out = static_cast<char*>(outs.back().mutable_data_ptr());
    for (int64_t j = 0; j < counts[i]; ++j, ++row) {
      TORCH_CHECK(*row >= -1 && *row < R, "rank_gather: rows of sources[", i, "] must be from -1 to ", R - 1, ", got ",
                  *row);
      const char* src = *row < 0 ? nullptr : first + *row * source.stride(0) * size;
      copies.push_back({src, out + j * length * size, length, source.stride(1), size});
    }
    bytes += outs.back().nbytes();
  }

  // Rows per thread below which starting another thread costs more than it saves.
  const int64_t grain = std::max<int64_t>(1, total * 131072 / std::max<int64_t>(1, bytes));
  at::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) copy_row(copies[i]);
  });
  return outs;
}

}  // namespace adaptlora
