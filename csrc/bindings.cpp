// fastcov._native: raw pointers, strides and codes in, nothing of torch. fastcov/kernels checks the
// arguments and keeps the tensors alive; the lock of the interpreter is released while kernels run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/rank_k.h"
#include "cpu/workspace.h"
#ifdef FASTCOV_WITH_CUDA
#include "cuda/bindings.h"
#endif

namespace py = pybind11;

namespace {

using fastcov::cpu::Dtype;
using fastcov::cpu::Problem;
using fastcov::cpu::Skinny;
using fastcov::cpu::Variant;

const Variant& supported(const std::string& name) {
  int count = 0;
  const Variant* const all = fastcov::cpu::variants(&count);
  for (int i = 0; i < count; ++i) {
    if (name != all[i].name) continue;
    if (!all[i].supported()) {
      throw std::runtime_error("This processor cannot run the variant '" + name + "'.");
    }
    return all[i];
  }
  throw std::runtime_error("There is no variant '" + name + "' in this build.");
}

std::vector<std::pair<std::string, bool>> variants() {
  int count = 0;
  const Variant* const all = fastcov::cpu::variants(&count);
  std::vector<std::pair<std::string, bool>> found;
  for (int i = 0; i < count; ++i) found.emplace_back(all[i].name, all[i].supported());
  return found;
}

void rank_k(const std::string& name, std::uintptr_t x, int x_dtype, std::int64_t x_column_stride,
            std::uintptr_t offsets, std::int64_t rows, std::int64_t d, std::uintptr_t c,
            int c_dtype, std::int64_t c_row_stride, std::int64_t c_column_stride, double alpha,
            int threads) {
  const Variant& variant = supported(name);
  const Problem problem{reinterpret_cast<const void*>(x),
                        static_cast<Dtype>(x_dtype),
                        x_column_stride,
                        reinterpret_cast<const std::int64_t*>(offsets),
                        rows,
                        d,
                        reinterpret_cast<void*>(c),
                        static_cast<Dtype>(c_dtype),
                        c_row_stride,
                        c_column_stride,
                        alpha,
                        threads < 1 ? 1 : threads};
  const py::gil_scoped_release released;
  variant.run(problem);
}

void skinny(const std::string& name, std::uintptr_t x, std::int64_t x_stride, std::int64_t m,
            std::uintptr_t w, std::int64_t w_stride, std::int64_t n, std::int64_t k,
            std::uintptr_t y, bool across, int threads) {
  const Variant& variant = supported(name);
  if (variant.skinny == nullptr || m > variant.skinny_most) {
    throw std::runtime_error("The variant '" + name + "' has no product of " + std::to_string(m) +
                             " rows.");
  }
  const Skinny problem{reinterpret_cast<const float*>(x),
                       x_stride,
                       m,
                       reinterpret_cast<const float*>(w),
                       w_stride,
                       n,
                       k,
                       reinterpret_cast<float*>(y),
                       across,
                       threads < 1 ? 1 : threads};
  const py::gil_scoped_release released;
  variant.skinny(problem);
}

std::vector<std::pair<std::string, int>> skinny_most() {
  int count = 0;
  const Variant* const all = fastcov::cpu::variants(&count);
  std::vector<std::pair<std::string, int>> found;
  for (int i = 0; i < count; ++i) {
    if (all[i].skinny != nullptr && all[i].supported())
      found.emplace_back(all[i].name, all[i].skinny_most);
  }
  return found;
}

double peak(const std::string& name, int dtype, int threads, double seconds) {
  const Variant& variant = supported(name);
  const py::gil_scoped_release released;
  return variant.peak(static_cast<Dtype>(dtype), threads < 1 ? 1 : threads, seconds);
}

py::dict build() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = std::string("gcc ") + __VERSION__;
#endif
#ifdef FASTCOV_OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#ifdef FASTCOV_WITH_CUDA
  info["cuda"] = FASTCOV_CUDA_VERSION;
  info["cuda_archs"] = FASTCOV_CUDA_BUILT_FOR;
#else
  info["cuda"] = py::none();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Kernels of fastcov over raw pointers; use them through fastcov.kernels.";
  m.def("build", &build, "What this module was built with.");
  m.def("cpu_variants", &variants, "(name, whether this processor can run it), the fastest first.");
  m.def("cpu_rank_k", &rank_k, py::arg("variant"), py::arg("x"), py::arg("x_dtype"),
        py::arg("x_column_stride"), py::arg("offsets"), py::arg("rows"), py::arg("d"), py::arg("c"),
        py::arg("c_dtype"), py::arg("c_row_stride"), py::arg("c_column_stride"), py::arg("alpha"),
        py::arg("threads"),
        "Lower triangle of c (d, d) += alpha * X^T X over the rows of x at these offsets.");
  m.def("cpu_skinny", &skinny, py::arg("variant"), py::arg("x"), py::arg("x_stride"), py::arg("m"),
        py::arg("w"), py::arg("w_stride"), py::arg("n"), py::arg("k"), py::arg("y"),
        py::arg("across"), py::arg("threads"),
        "y (m, n) = x W^T, or y (m, k) = x W where across, for a matrix W (n, k) of float32.");
  m.def("cpu_skinny_most", &skinny_most,
        "(name, how many rows it takes) of the variants that have such products here, the fastest "
        "first.");
  m.def("cpu_is_intel", &fastcov::cpu::is_intel, "Whether Intel made this processor.");
  m.def("cpu_peak", &peak, py::arg("variant"), py::arg("dtype"), py::arg("threads"),
        py::arg("seconds"), "GFLOP/s of multiply-adds on registers alone.");
  // A call holds the lock for as long as it computes.
  m.def("cpu_workspace", &fastcov::cpu::kept_workspace, py::call_guard<py::gil_scoped_release>(),
        "Bytes that are kept between calls for packed keys.");
  m.def("cpu_release_workspace", &fastcov::cpu::release_workspace, "Gives them back.");
#ifdef FASTCOV_WITH_CUDA
  fastcov::bind_cuda(m);
#endif
}
