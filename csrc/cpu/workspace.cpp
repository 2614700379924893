#include "workspace.h"

#include <cstdlib>
#include <mutex>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastcov::cpu {
namespace {

constexpr std::size_t kAlignment = std::size_t{2} << 20;  // a huge page
constexpr std::size_t kPage = 4096;

// Never destroyed: threads may still compute while the process ends.
std::mutex& mutex() {
  static std::mutex* const one = new std::mutex;
  return *one;
}
void* kept = nullptr;
std::size_t kept_bytes = 0;

void* allocate(std::size_t bytes) {
  void* data = nullptr;
  if (posix_memalign(&data, kAlignment, bytes) != 0) throw std::bad_alloc();
#ifdef __linux__
  madvise(data, bytes, MADV_HUGEPAGE);  // a hint; without it the pages are small
#endif
  return data;
}

}  // namespace

std::size_t kept_workspace() {
  const std::lock_guard<std::mutex> lock(mutex());
  return kept_bytes;
}

void release_workspace() {
  const std::unique_lock<std::mutex> lock(mutex(), std::try_to_lock);
  if (!lock.owns_lock()) return;
  std::free(kept);
  kept = nullptr;
  kept_bytes = 0;
}

Workspace::Workspace(std::size_t bytes) : data_(nullptr), kept_(false) {
  bytes = (bytes + kPage - 1) / kPage * kPage;
  if (!mutex().try_lock()) {
    data_ = allocate(bytes);
    return;
  }
  if (kept_bytes < bytes) {
    std::free(kept);
    kept = nullptr;
    kept_bytes = 0;
    try {
      kept = allocate(bytes);
    } catch (...) {
      mutex().unlock();
      throw;
    }
    kept_bytes = bytes;
  }
  data_ = kept;
  kept_ = true;
}

Workspace::~Workspace() {
  if (kept_) {
    mutex().unlock();
  } else {
    std::free(data_);
  }
}

}  // namespace fastcov::cpu
