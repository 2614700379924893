// The Python names of the CUDA kernels. Plain C++: the host's compiler takes it.
#pragma once

#include <pybind11/pybind11.h>

namespace fastcov {

// Adds cuda_rank_k, cuda_route, cuda_check_device and cuda_error to the module.
void bind_cuda(pybind11::module_& m);

}  // namespace fastcov
