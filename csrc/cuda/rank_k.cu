// The entry points of rank_k.h: look at the device, choose a kernel, launch it.
#include "launch.h"
#include "rank_k.h"
#include "route.h"

namespace fastcov::cuda {
namespace {

// Tiles and steps are counted in int.
constexpr int64_t kLargestWidth = int64_t{1} << 21;
constexpr int64_t kMostRows = int64_t{1} << 34;

cudaError_t is_hopper(int device, bool* hopper) {
  int major = 0;
  int minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  }
  *hopper = error == cudaSuccess && major == 9 && minor == 0 && wgmma_was_built();
  return error;
}

cudaError_t update_on_device(const Update& u) {
  bool hopper = false;
  int processors = 0;
  cudaError_t error = is_hopper(u.device, &hopper);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, u.device);
  if (error != cudaSuccess) return error;
  const auto stream = static_cast<cudaStream_t>(u.stream);
  if (choose_route(u, hopper) == Route::kMma) return launch_mma(u, processors, stream);
  if (!hopper || !wgmma_takes(u)) return cudaErrorNotSupported;
  return launch_wgmma(u, processors, stream);
}

}  // namespace

int rank_k_update(const Update& u) {
  if (u.d > kLargestWidth || u.n > kMostRows || u.count > kMostRows) return cudaErrorInvalidValue;
  if (u.d == 0 || u.n == 0 || (u.rows != nullptr && u.count == 0)) return cudaSuccess;
  // This library's runtime is its own and has its own current device. The caller's guard restores
  // the one that the thread had.
  const cudaError_t error = cudaSetDevice(u.device);
  return error != cudaSuccess ? error : update_on_device(u);
}

int find_route(const Update& u, Route* route) {
  cudaError_t error = cudaSetDevice(u.device);
  bool hopper = false;
  if (error == cudaSuccess) error = is_hopper(u.device, &hopper);
  *route = choose_route(u, hopper);
  return error;
}

int check_device(int device) {
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = probe_mma();
  if (error != cudaSuccess) cudaGetLastError();  // reported here; later calls start clean
  return error;
}

const char* error_name(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }
const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace fastcov::cuda
