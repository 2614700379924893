// Memory for packed panels, kept between calls.
#pragma once

#include <cstddef>

namespace fastcov::cpu {

// A block of at least `bytes`, aligned for vectors and huge pages. The block of the last call is
// kept and lent again, because fresh pages cost as much as packing does; a second caller at the
// same time gets memory of its own.
class Workspace {
 public:
  explicit Workspace(std::size_t bytes);  // throws std::bad_alloc
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
  bool kept_;
};

// How many bytes are kept for the next call.
std::size_t kept_workspace();

// Gives them back, unless a call is using them.
void release_workspace();

}  // namespace fastcov::cpu
