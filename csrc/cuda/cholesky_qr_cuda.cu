// The triangular factor of a batch of float64 Gram matrices and its inverse, a block a matrix, a warp a row.
#include "../linalg/cholesky_qr.h"
#include "block.cuh"

namespace adaptlora::cuda {
namespace {

constexpr int kThreads = 512;

// The matrix that is eliminated lies in shared memory, after `work`, where it fits; else in the workspace, l² a matrix.
__global__ void __launch_bounds__(kThreads)
    cholesky_inverse_kernel(linalg::CholeskyInverse<double> batch, double* condition, double* workspace, bool in_shared) {
  extern __shared__ double shared[];
  const long long matrix = blockIdx.x, size = static_cast<long long>(batch.l) * batch.l;
  linalg::CholeskyInverse<double> m = batch;
  m.gram += matrix * size;
  m.r += matrix * size;
  m.rit += matrix * size;
  m.work = shared;
  m.a = in_shared ? shared + 2 * m.l : workspace + matrix * size;
  Block block;
  const double result = linalg::cholesky_inverse(block, m);
  if (threadIdx.x == 0) condition[matrix] = result;
}

}  // namespace
}  // namespace adaptlora::cuda

// As adaptlora_jacobi_svd_plan; returns whether the one matrix of the algorithm lies in shared memory.
extern "C" int adaptlora_cholesky_inverse_plan(int l, int limit, int* threads, int* bytes) {
  using namespace adaptlora::cuda;
  const int work = 2 * l * static_cast<int>(sizeof(double)), size = l * l * static_cast<int>(sizeof(double));
  const bool fits = work + size <= limit;
  *threads = l * kWarp < kThreads ? l * kWarp : kThreads;
  *bytes = work + (fits ? size : 0);
  return fits;
}

// gram, r, rit and workspace (b, l, l) and condition (b), contiguous; 1 <= l. A cudaError_t.
extern "C" int adaptlora_cholesky_inverse_f64(const double* gram, long long b, int l, double* r, double* rit,
                                              double* condition, double* workspace, int limit, void* stream) {
  using adaptlora::cuda::cholesky_inverse_kernel;
  int threads, bytes;
  const int fits = adaptlora_cholesky_inverse_plan(l, limit, &threads, &bytes);
  const cudaError_t error =
      cudaFuncSetAttribute(cholesky_inverse_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const adaptlora::linalg::CholeskyInverse<double> batch{l, gram, r, rit, nullptr, nullptr};
  cholesky_inverse_kernel<<<static_cast<unsigned>(b), threads, bytes, static_cast<cudaStream_t>(stream)>>>(
      batch, condition, workspace, fits);
  return cudaGetLastError();
}
