// Runs the CUDA kernels of csrc/cuda on the CPU, thread by thread, on the arrays in a folder.
//
//   emulate_cuda FOLDER name=value ...
//
// FOLDER holds x.bin, c.bin and, where `mask` or `rows` says so, mask.bin and rows.bin; c.bin is
// replaced by the result. Prints the kernel that ran. tests/fastcov/kernels/test_cuda.py calls it.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <map>
#include <string>

#define FASTCOV_EMULATED
#include "mma_kernel.h"
#include "route.h"
#include "wgmma_kernel.h"

namespace fastcov::cuda {
namespace {

using emulated::Machine;
using emulated::Mode;

// A file in memory that ends at a page nobody may touch: reading beyond it stops the program.
struct Guarded {
  explicit Guarded(const std::string& path, size_t shift = 0) {
    std::ifstream file(path, std::ios::binary);
    emulated::check(file.good(), "a file is missing");
    const std::string content((std::istreambuf_iterator<char>(file)), {});
    bytes = content.size();
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t pages = (bytes + shift + 15 + page) / page + 1;
    auto* memory = static_cast<char*>(
        mmap(nullptr, pages * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    char* end = memory + (pages - 1) * page;
    mprotect(end, page, PROT_NONE);
    // `shift` bytes after a multiple of 16.
    data = end - (bytes + shift + 15) / 16 * 16 + shift;
    std::copy(content.begin(), content.end(), data);
  }
  char* data;
  size_t bytes;
};

template <class Key, int kCluster>
void run_wgmma(const Update& u, int processors, Mode mode) {
  using L = Wgmma<kCluster>;
  const WgmmaArguments<L> arguments = wgmma_arguments<L>(u, processors);
  const device::TensorMap map = {
      static_cast<const uint8_t*>(u.x), u.d, u.n, u.x_row_stride * 2, L::kChunk, L::kBoxRows};
  device::grid_blocks = kCluster * arguments.schedule.workers();
  Machine machine(device::grid_blocks, kCluster, L::kThreads, L::kSharedBytes, mode);
  machine.run([&] { WgmmaKernel<Key, kCluster>(arguments, &map).run(); });
}

template <class Key, int kKeyBytes>
void run_mma(const Update& u, int processors, Mode mode) {
  using L = Mma<kKeyBytes>;
  const MmaArguments<L> arguments = mma_arguments<L>(u, processors);
  device::grid_blocks = arguments.schedule.workers();
  Machine machine(device::grid_blocks, 1, L::kThreads, L::kSharedBytes, mode);
  machine.run([&] { MmaKernel<Key, kKeyBytes>(arguments).run(); });
}

void run(const Update& u, Route route, int cluster, int processors, Mode mode) {
  const bool half = u.dtype == Dtype::kFloat16;
  if (route == Route::kWgmma && cluster == 1) {
    half ? run_wgmma<Float16, 1>(u, processors, mode) : run_wgmma<BFloat16, 1>(u, processors, mode);
  } else if (route == Route::kWgmma) {
    half ? run_wgmma<Float16, 2>(u, processors, mode) : run_wgmma<BFloat16, 2>(u, processors, mode);
  } else if (u.dtype == Dtype::kFloat32) {
    run_mma<Tf32, 4>(u, processors, mode);
  } else {
    half ? run_mma<Float16, 2>(u, processors, mode) : run_mma<BFloat16, 2>(u, processors, mode);
  }
}

int emulate(const std::string& folder, std::map<std::string, std::string> options) {
  const auto number = [&options](const char* name) {
    emulated::check(options.count(name) == 1, name);
    return std::stoll(options[name]);
  };
  const Guarded x(folder + "/x.bin", static_cast<size_t>(number("shift")));
  const Guarded c(folder + "/c.bin");
  Update u = {};
  u.c = reinterpret_cast<float*>(c.data);
  u.c_row_stride = number("c_row_stride");
  u.c_col_stride = number("c_col_stride");
  u.x = x.data;
  u.dtype = static_cast<Dtype>(number("dtype"));
  u.n = number("n");
  u.d = number("d");
  u.x_row_stride = number("x_row_stride");
  u.x_col_stride = number("x_col_stride");
  u.alpha = std::stof(options.at("alpha"));
  u.route = static_cast<Route>(number("route"));
  if (number("mask") != 0) {
    u.mask = reinterpret_cast<const uint8_t*>(Guarded(folder + "/mask.bin").data);
  }
  if (number("rows") != 0) {
    const Guarded rows(folder + "/rows.bin");
    u.rows = reinterpret_cast<const int64_t*>(rows.data);
    u.count = static_cast<int64_t>(rows.bytes / 8);
  }
  const int processors = static_cast<int>(number("processors"));
  std::vector<int> turns(turns_needed(processors), 0);
  u.turns = turns.data();
  u.turns_count = number("divide") != 0 ? static_cast<int64_t>(turns.size()) : 0;
  const Mode mode = {static_cast<unsigned>(number("seed")), number("late") != 0,
                     number("truncate") != 0};
  const Route route = choose_route(u, number("hopper") != 0);
  run(u, route, static_cast<int>(number("cluster")), processors, mode);
  std::ofstream(folder + "/c.bin", std::ios::binary)
      .write(c.data, static_cast<std::streamsize>(c.bytes));
  std::printf("%s\n", route == Route::kWgmma ? "wgmma" : "mma");
  return 0;
}

}  // namespace
}  // namespace fastcov::cuda

int main(int argc, char** argv) {
  std::map<std::string, std::string> options;
  for (int i = 2; i < argc; ++i) {
    const std::string word = argv[i];
    options[word.substr(0, word.find('='))] = word.substr(word.find('=') + 1);
  }
  try {
    return fastcov::cuda::emulate(argv[1], options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
