// The wgmma kernel, compiled and launched.
#include <cuda.h>

#include "launch.h"
#include "route.h"
#include "wgmma_kernel.h"

namespace fastcov::cuda {
namespace {

constexpr int kCluster = 2;
using L = Wgmma<kCluster>;

// For other targets than sm_90a the kernel is empty, and `wgmma_was_built` keeps it from running.
template <class Key>
__global__ void __launch_bounds__(L::kThreads, 1)
    wgmma_kernel(const __grid_constant__ WgmmaArguments<L> arguments,
                 const __grid_constant__ CUtensorMap keys) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  WgmmaKernel<Key, kCluster>(arguments, &keys).run();
#endif
}

// The driver's function, asked for at run time: the library loads where there is no driver.
decltype(&cuTensorMapEncodeTiled) encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &found);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

bool encode(CUtensorMap* map, const Update& u) {
  const auto encode_tiled = encoder();
  if (encode_tiled == nullptr) return false;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(u.d), static_cast<cuuint64_t>(u.n)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(u.x_row_stride) * 2};  // bytes
  const cuuint32_t box[2] = {L::kChunk, L::kBoxRows};
  const cuuint32_t steps[2] = {1, 1};
  return encode_tiled(map,
                      u.dtype == Dtype::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                  : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                      2, const_cast<void*>(u.x), sizes, strides, box, steps,
                      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                      CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <class Key>
cudaError_t launch(const WgmmaArguments<L>& arguments, const CUtensorMap& map,
                   cudaStream_t stream) {
  const auto kernel = wgmma_kernel<Key>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kSharedBytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = kCluster;
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(arguments.schedule.workers() * kCluster));
  config.blockDim = dim3(L::kThreads);
  config.dynamicSmemBytes = L::kSharedBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments, map);
}

}  // namespace

cudaError_t launch_wgmma(const Update& update, int processors, cudaStream_t stream) {
  CUtensorMap map;
  if (!encode(&map, update)) return cudaErrorInvalidValue;
  const WgmmaArguments<L> arguments = wgmma_arguments<L>(update, processors);
  return update.dtype == Dtype::kBFloat16 ? launch<BFloat16>(arguments, map, stream)
                                          : launch<Float16>(arguments, map, stream);
}

bool wgmma_was_built() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, wgmma_kernel<BFloat16>);
  if (error != cudaSuccess) {
    cudaGetLastError();  // it is no error of the caller's
    return false;
  }
  return attributes.numRegs > 100;  // an empty kernel has a few, this one is capped at 168
}

}  // namespace fastcov::cuda
