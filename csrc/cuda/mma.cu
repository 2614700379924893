// The mma.sync kernel, compiled and launched.
#include "launch.h"
#include "mma_kernel.h"
#include "route.h"

namespace fastcov::cuda {
namespace {

template <class Key, int kKeyBytes>
__global__ void __launch_bounds__(Mma<kKeyBytes>::kThreads, 1)
    mma_kernel(const __grid_constant__ MmaArguments<Mma<kKeyBytes>> arguments) {
  MmaKernel<Key, kKeyBytes>(arguments).run();
}

template <class Key, int kKeyBytes>
cudaError_t launch(const Update& update, int processors, cudaStream_t stream) {
  using L = Mma<kKeyBytes>;
  const auto kernel = mma_kernel<Key, kKeyBytes>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kSharedBytes);
  if (error != cudaSuccess) return error;
  const MmaArguments<L> arguments = mma_arguments<L>(update, processors);
  kernel<<<arguments.schedule.workers(), L::kThreads, L::kSharedBytes, stream>>>(arguments);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_mma(const Update& update, int processors, cudaStream_t stream) {
  switch (update.dtype) {
    case Dtype::kBFloat16:
      return launch<BFloat16, 2>(update, processors, stream);
    case Dtype::kFloat16:
      return launch<Float16, 2>(update, processors, stream);
    case Dtype::kFloat32:
      return launch<Tf32, 4>(update, processors, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t probe_mma() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, mma_kernel<BFloat16, 2>);
}

}  // namespace fastcov::cuda
