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

// Whether the matrix that is eliminated lies in shared memory on the current device: no workspace is needed then.
extern "C" int adaptlora_cholesky_inverse_in_shared(int l, int* fits) {
  int limit = 0;
  const cudaError_t error = adaptlora::cuda::shared_limit(&limit);
  *fits = (2LL * l + static_cast<long long>(l) * l) * static_cast<long long>(sizeof(double)) <= limit;
  return error;
}

// gram, r and rit (b, l, l) and condition (b), contiguous; 1 <= l. Asynchronous.
extern "C" int adaptlora_cholesky_inverse_f64(const double* gram, long long b, int l, double* r, double* rit,
                                              double* condition, double* workspace, void* stream) {
  using adaptlora::cuda::cholesky_inverse_kernel;
  using adaptlora::cuda::kWarp;
  int fits = 0;
  cudaError_t error = static_cast<cudaError_t>(adaptlora_cholesky_inverse_in_shared(l, &fits));
  if (error != cudaSuccess) return error;
  const int bytes = static_cast<int>(sizeof(double)) * (2 * l + (fits ? l * l : 0));
  error = cudaFuncSetAttribute(cholesky_inverse_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const int threads = l * kWarp < adaptlora::cuda::kThreads ? l * kWarp : adaptlora::cuda::kThreads;
  const adaptlora::linalg::CholeskyInverse<double> batch{l, gram, r, rit, nullptr, nullptr};
  cholesky_inverse_kernel<<<static_cast<unsigned>(b), threads, bytes, static_cast<cudaStream_t>(stream)>>>(
      batch, condition, workspace, fits);
  return cudaGetLastError();
}
