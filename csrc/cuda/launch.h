// The launches of the kernels; one translation unit each, so that they compile side by side.
#pragma once

#include <cuda_runtime_api.h>

#include "rank_k.h"

namespace fastcov::cuda {

cudaError_t launch_mma(const Update& update, int processors, cudaStream_t stream);
cudaError_t launch_wgmma(const Update& update, int processors, cudaStream_t stream);

// Success if code of the mma.sync kernel exists for the current device.
cudaError_t probe_mma();

// Whether the wgmma kernel was compiled for sm_90a, the only target that has its instructions.
bool wgmma_was_built();

}  // namespace fastcov::cuda
