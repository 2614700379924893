// A multiprocessor on the CPU, for tests: the threads of one or more blocks as fibers, which run in
// a random order and stop wherever the device's would wait. If nothing can run any more, that is a
// deadlock, and an error. Whatever is asynchronous on the device happens late, at a random time or
// when it is waited for, so that a missing wait shows.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulated {

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error(what); }

inline void check(bool holds, const char* what) {
  if (!holds) fail(what);
}

// Options of a run.
struct Mode {
  unsigned seed = 0;
  bool late = true;       // wgmma and cp.async read and write when waited for, else at once
  bool truncate = false;  // accumulate as the tensor cores do, towards zero
};

// An mbarrier, as the PTX ISA describes it: a phase ends when no arrival and no byte is pending.
struct Barrier {
  int count = 0;
  int pending = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;

  void settle() {
    if (pending == 0 && bytes == 0) {
      phase ^= 1;
      pending = count;
    }
  }
  void arrive() {
    check(pending > 0, "a barrier got more arrivals than it was made for");
    --pending;
    settle();
  }
};

// A rendezvous of a fixed number of threads.
struct Meeting {
  int size = 0;
  int arrived = 0;
  uint64_t times = 0;
};

struct Warp {
  Meeting meeting;
  uint64_t words[32][8] = {};  // what lanes show each other
};

struct Block {
  static constexpr uint32_t kBase = 0x410;  // aligned to 16 bytes and no more
  int ended = 0;                            // threads
  std::vector<uint8_t> shared;
  std::map<uint32_t, Barrier> barriers;
  std::vector<Warp> warps;
  std::vector<Meeting> warpgroups;
  Meeting meeting;

  uint8_t* at(uint32_t address, uint32_t bytes) {
    check(address >= kBase && address - kBase + bytes <= shared.size(),
          "an address is outside of shared memory");
    return shared.data() + (address - kBase);
  }
  Barrier& barrier(uint32_t address) {
    const auto found = barriers.find(address);
    check(found != barriers.end(), "a barrier is used that was not initialised");
    return found->second;
  }
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  int block = 0;
  int thread = 0;
  bool done = false;
  int unfenced = 0;                                           // ordinary stores, no proxy fence yet
  std::function<bool()> ready;                                // what it waits for
  std::vector<std::function<void()>> open;                    // asynchronous work, not committed
  std::vector<std::vector<std::function<void()>>> committed;  // groups, oldest first
};

class Machine {
 public:
  Machine(int blocks, int cluster, int threads, int shared_bytes, Mode mode)
      : mode_(mode), random_(mode.seed), cluster_(cluster), clusters_(blocks / cluster) {
    for (Meeting& meeting : clusters_) meeting.size = cluster * threads;
    for (int index = 0; index < blocks; ++index) {
      blocks_.emplace_back();
      Block& block = blocks_.back();
      block.shared.assign(shared_bytes, 0xFF);  // NaN in every format
      block.meeting.size = threads;
      block.warps.resize(threads / 32);
      for (Warp& warp : block.warps) warp.meeting.size = 32;
      block.warpgroups.resize(threads / 128);
      for (Meeting& meeting : block.warpgroups) meeting.size = 128;
      for (int thread = 0; thread < threads; ++thread) {
        fibers_.emplace_back();
        fibers_.back().block = index;
        fibers_.back().thread = thread;
      }
    }
  }

  // Runs `kernel` in every thread until all have returned.
  void run(const std::function<void()>& kernel) {
    kernel_ = &kernel;
    running_ = this;
    for (Fiber& fiber : fibers_) start(fiber);
    std::vector<int> order(fibers_.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
    size_t left = fibers_.size();
    while (left > 0) {
      std::shuffle(order.begin(), order.end(), random_);
      bool moved = false;
      for (const int i : order) {
        Fiber& fiber = fibers_[i];
        if (fiber.done || (fiber.ready && !fiber.ready())) continue;
        fiber.ready = nullptr;
        current_ = &fiber;
        swapcontext(&scheduler_, &fiber.context);
        if (!failure_.empty()) fail(failure_);
        if (fiber.done) {
          --left;
          ++blocks_[fiber.block].ended;
        }
        moved = true;
      }
      // Some of what TMA was asked for comes in, in any order; all that is left if nobody can run.
      while (!arriving_.empty() && (!moved || random_() % 2 == 0)) {
        std::swap(arriving_[random_() % arriving_.size()], arriving_.back());
        const auto event = arriving_.back();
        arriving_.pop_back();
        event();
        moved = true;
      }
      check(moved, "deadlock: every thread waits");
    }
    check(arriving_.empty(), "a block ended before its copies had arrived");
  }

  static Machine& now() { return *running_; }
  Fiber& self() { return *current_; }
  int rank() const { return current_->block % cluster_; }
  // A block of the current thread's cluster, with its barriers and memory. It must not have ended.
  Block& peer(int rank) {
    check(rank >= 0 && rank < cluster_, "there is no such block in the cluster");
    Block& block = blocks_[current_->block - this->rank() + rank];
    check(block.ended < block.meeting.size, "a block is used that has ended");
    return block;
  }
  Block& own() { return blocks_[current_->block]; }
  Warp& warp() { return own().warps[current_->thread / 32]; }
  Meeting& cluster() { return clusters_[current_->block / cluster_]; }
  const Mode& mode() const { return mode_; }

  void wait_until(std::function<bool()> ready) {
    if (ready()) return;
    current_->ready = std::move(ready);
    swapcontext(&current_->context, &scheduler_);
  }

  void meet(Meeting& meeting) {
    const uint64_t time = meeting.times;
    if (++meeting.arrived == meeting.size) {
      meeting.arrived = 0;
      ++meeting.times;
    } else {
      wait_until([&meeting, time] { return meeting.times != time; });
    }
  }

  // Something that happens at some later time by itself.
  void later(std::function<void()> event) { arriving_.push_back(std::move(event)); }

  // Work of the current thread that is done at the latest when its group is waited for.
  void defer(std::function<void()> work) {
    if (mode_.late) {
      current_->open.push_back(std::move(work));
    } else {
      work();
    }
  }
  void commit() {
    current_->committed.push_back(std::move(current_->open));
    current_->open.clear();
  }
  void finish_all_but(size_t left) {
    auto& groups = current_->committed;
    while (groups.size() > left) {
      for (const auto& work : groups.front()) work();
      groups.erase(groups.begin());
    }
  }

  bool warp_is_fenced() const {
    for (const Fiber& fiber : fibers_) {
      const bool near =
          fiber.block == current_->block && fiber.thread / 32 == current_->thread / 32;
      if (near && fiber.unfenced > 0) return false;
    }
    return true;
  }

 private:
  static void enter() {
    Machine& machine = *running_;
    try {
      (*machine.kernel_)();
    } catch (const std::exception& error) {
      machine.failure_ = error.what();
    }
    machine.current_->done = true;
    swapcontext(&machine.current_->context, &machine.scheduler_);
  }

  void start(Fiber& fiber) {
    constexpr size_t kStack = 64 << 10;
    fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }

  inline static Machine* running_ = nullptr;
  Mode mode_;
  std::mt19937 random_;
  int cluster_;
  std::vector<Meeting> clusters_;
  std::vector<Block> blocks_;
  std::vector<Fiber> fibers_;
  std::vector<std::function<void()>> arriving_;
  ucontext_t scheduler_;
  Fiber* current_ = nullptr;
  const std::function<void()>* kernel_ = nullptr;
  std::string failure_;
};

}  // namespace emulated
