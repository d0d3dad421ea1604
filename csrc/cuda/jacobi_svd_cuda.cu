// One-sided Jacobi SVD of a batch of small float32 matrices, a block a matrix, a warp a pair of columns.
#include "../linalg/jacobi_svd.h"
#include "block.cuh"

namespace adaptlora::cuda {
namespace {

constexpr int kThreads = 1024;

// G and V lie in shared memory, after `work`, where both fit; then G alone; else in the workspace, 2 R² numbers a matrix.
__global__ void __launch_bounds__(kThreads)
    jacobi_svd_kernel(linalg::JacobiSvd<float> batch, long long stride, int* info, float* workspace, int in_shared) {
  extern __shared__ float shared[];
  const long long matrix = blockIdx.x, size = static_cast<long long>(batch.R) * batch.R;
  linalg::JacobiSvd<float> m = batch;
  m.a += matrix * stride;
  m.ut += matrix * size;
  m.s += matrix * m.R;
  m.vh += matrix * size;
  m.work = shared;
  m.G = in_shared > 0 ? shared + m.R : workspace + 2 * matrix * size;
  m.V = in_shared > 1 ? shared + m.R + size : workspace + (2 * matrix + 1) * size;
  Block block;
  const int result = linalg::jacobi_svd(block, m);
  if (threadIdx.x == 0) info[matrix] = result;
}

}  // namespace
}  // namespace adaptlora::cuda

// How a matrix is launched where a block may have `limit` bytes of shared memory: threads and bytes. Returns how many of the
// algorithm's two matrices lie in it; with 2, no workspace is needed.
extern "C" int adaptlora_jacobi_svd_plan(int R, int limit, int* threads, int* bytes) {
  using namespace adaptlora::cuda;
  const int size = R * R * static_cast<int>(sizeof(float)), work = R * static_cast<int>(sizeof(float));
  const int fit = (limit - work) / size, matrices = fit < 0 ? 0 : fit > 2 ? 2 : fit;
  const int pairs = (R + 1) / 2;
  *threads = pairs * kWarp < kThreads ? pairs * kWarp : kThreads;
  *bytes = work + matrices * size;
  return matrices;
}

// a (b, R, R) with these strides in elements; ut, vh (b, R, R), s (b, R), info (b) and workspace contiguous; 1 <= R. A cudaError_t.
extern "C" int adaptlora_jacobi_svd_f32(const float* a, long long stride_b, long long stride_row, long long stride_col,
                                        long long b, int R, float* ut, float* s, float* vh, int* info, float* workspace,
                                        int limit, void* stream) {
  using adaptlora::cuda::jacobi_svd_kernel;
  int threads, bytes;
  const int matrices = adaptlora_jacobi_svd_plan(R, limit, &threads, &bytes);
  const cudaError_t error =
      cudaFuncSetAttribute(jacobi_svd_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const adaptlora::linalg::JacobiSvd<float> batch{R, a, stride_row, stride_col, ut, s, vh, nullptr, nullptr, nullptr};
  jacobi_svd_kernel<<<static_cast<unsigned>(b), threads, bytes, static_cast<cudaStream_t>(stream)>>>(
      batch, stride_b, info, workspace, matrices);
  return cudaGetLastError();
}

#define ADAPTLORA_TEXT_OF(...) #__VA_ARGS__
#define ADAPTLORA_TEXT(...) ADAPTLORA_TEXT_OF(__VA_ARGS__)

// The architectures in this library, as nvcc lists them: "800,900".
extern "C" const char* adaptlora_cuda_architectures() { return ADAPTLORA_TEXT(__CUDA_ARCH_LIST__); }

extern "C" const char* adaptlora_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
