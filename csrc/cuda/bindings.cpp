#include "bindings.h"

#include <cstdint>
#include <string>

#include "rank_k.h"

namespace fastcov {
namespace {

namespace py = pybind11;
using cuda::Update;

// Pointers and the stream come as integers; fastcov/kernels/cuda.py checks what lies behind them.
Update make_update(int device, uintptr_t stream, uintptr_t c, int64_t c_row_stride,
                   int64_t c_col_stride, uintptr_t x, int dtype, int64_t n, int64_t d,
                   int64_t x_row_stride, int64_t x_col_stride, uintptr_t mask, uintptr_t rows,
                   int64_t count, float alpha, uintptr_t turns, int64_t turns_count, int route) {
  Update u;
  u.device = device;
  u.stream = reinterpret_cast<void*>(stream);
  u.c = reinterpret_cast<float*>(c);
  u.c_row_stride = c_row_stride;
  u.c_col_stride = c_col_stride;
  u.x = reinterpret_cast<const void*>(x);
  u.dtype = static_cast<cuda::Dtype>(dtype);
  u.n = n;
  u.d = d;
  u.x_row_stride = x_row_stride;
  u.x_col_stride = x_col_stride;
  u.mask = reinterpret_cast<const uint8_t*>(mask);
  u.rows = reinterpret_cast<const int64_t*>(rows);
  u.count = count;
  u.alpha = alpha;
  u.turns = reinterpret_cast<int*>(turns);
  u.turns_count = turns_count;
  u.route = static_cast<cuda::Route>(route);
  return u;
}

// Calls back(update) with the arguments that Python gives to cuda_rank_k and cuda_route.
template <class Back>
void bind_update(py::module_& m, const char* name, const char* doc, Back back) {
  m.def(
      name,
      [back](int device, uintptr_t stream, uintptr_t c, int64_t c_row_stride, int64_t c_col_stride,
             uintptr_t x, int dtype, int64_t n, int64_t d, int64_t x_row_stride,
             int64_t x_col_stride, uintptr_t mask, uintptr_t rows, int64_t count, float alpha,
             uintptr_t turns, int64_t turns_count, int route) {
        const Update update =
            make_update(device, stream, c, c_row_stride, c_col_stride, x, dtype, n, d, x_row_stride,
                        x_col_stride, mask, rows, count, alpha, turns, turns_count, route);
        return back(update);
      },
      doc, py::arg("device"), py::arg("stream"), py::arg("c"), py::arg("c_row_stride"),
      py::arg("c_col_stride"), py::arg("x"), py::arg("dtype"), py::arg("n"), py::arg("d"),
      py::arg("x_row_stride"), py::arg("x_col_stride"), py::arg("mask"), py::arg("rows"),
      py::arg("count"), py::arg("alpha"), py::arg("turns"), py::arg("turns_count"),
      py::arg("route"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace

void bind_cuda(py::module_& m) {
  bind_update(m, "cuda_rank_k", "Launches the update; returns a cudaError_t.",
              [](const Update& u) { return cuda::rank_k_update(u); });
  bind_update(m, "cuda_route", "The kernel these arguments take: 1 mma.sync, 2 wgmma, or -error.",
              [](const Update& u) {
                cuda::Route route = cuda::Route::kAuto;
                const int error = cuda::find_route(u, &route);
                return error != 0 ? -error : static_cast<int>(route);
              });
  m.def("cuda_check_device", &cuda::check_device,
        "Whether the device can run this build's kernels: a cudaError_t.", py::arg("device"),
        py::call_guard<py::gil_scoped_release>());
  m.def(
      "cuda_error",
      [](int error) {
        return std::string(cuda::error_name(error)) + ", " + cuda::error_text(error);
      },
      "The name and the text of a cudaError_t.", py::arg("error"));
}

}  // namespace fastcov
