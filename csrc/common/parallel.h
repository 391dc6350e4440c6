// Threads are torch's own, through the address of its C shim torch_parallel_for: no pool of ours, no -fopenmp, nothing
// linked.
//
//   parallel_for(n, grain, body(begin, end))   independent items; serial at or below `grain` items
//   team(size, body(rank, size, barrier))      a persistent loop: every rank runs at the same time and may wait for the
//   others
//
// Both are serial in a forked child (torch's pool does not survive fork) and inside another parallel region. An
// exception in a body is carried to the caller. Results must not depend on how items are dealt out: split sums at fixed
// places, not at `begin`.
//
// How a team agrees. A barrier deadlocks unless all ranks really run at once, and torch only promises that all items
// are run. So `size` items are dealt out with grain 1, and who receives a share votes: more than one share (fewer
// threads than ranks) votes SOLO; exactly one share checks in and waits until all `size` have checked in (TEAM) or
// somebody votes SOLO, also after kTeamPatience, which covers a pool that runs the shares one after the other. One
// compare-and-swap decides, so all ranks agree. After SOLO every share returns and the caller runs body(0, 1) alone:
// hence a body must give the same result for every size.
#pragma once
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <stdexcept>

namespace mk {

using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
using TorchParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context);
using TorchNumThreads = int32_t (*)(uint32_t* out);

struct Threads {
  TorchParallelFor parallel_for = nullptr;
  TorchNumThreads num_threads = nullptr;
  pid_t home = 0;
};
inline Threads& threads() {
  static Threads instance;
  return instance;
}
inline bool serial_only() { return !threads().parallel_for || getpid() != threads().home; }

inline int num_threads() {
  uint32_t n = 1;
  if (serial_only() || !threads().num_threads || threads().num_threads(&n) != 0) return 1;
  return int(n);
}

// The first exception of several threads, kept for the caller.
class FirstError {
 public:
  void keep() {
    if (!taken_.exchange(true)) error_ = std::current_exception();
  }
  bool any() const { return taken_.load(std::memory_order_relaxed); }
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  std::atomic<bool> taken_{false};
  std::exception_ptr error_;
};

template <class Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
  if (n <= 0) return;
  if (n <= grain || n == 1 || serial_only()) return body(int64_t(0), n);
  struct Context {
    const Body& body;
    FirstError error;
  } context{body, {}};
  auto call = [](int64_t begin, int64_t end, void* c) {
    auto& context = *static_cast<Context*>(c);
    try {
      context.body(begin, end);
    } catch (...) {
      context.error.keep();
    }
  };
  const int32_t failed = threads().parallel_for(0, n, grain < 1 ? 1 : grain, call, &context);
  context.error.rethrow();
  if (failed) throw std::runtime_error("memkernels: torch_parallel_for failed");
}

// Fewest items a task should have so that waking a thread (about 5 us) stays small beside its work.
inline int64_t grain_for(int64_t bytes_per_item) {
  constexpr int64_t kBytes = 32768;
  return bytes_per_item >= kBytes ? 1 : kBytes / (bytes_per_item < 1 ? 1 : bytes_per_item);
}

inline void spin_wait(unsigned& rounds) {
  if (++rounds < 4096) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  } else {
    sched_yield();  // somebody else needs the core
  }
}

struct TeamBroken {};  // thrown through a barrier when another rank has failed

class Barrier {
 public:
  explicit Barrier(int size, const FirstError* error = nullptr) : size_(size), error_(error) {}
  void wait() {
    if (size_ == 1) return;
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (unsigned rounds = 0; phase_.load(std::memory_order_acquire) == phase; spin_wait(rounds))
      if (error_ && error_->any()) throw TeamBroken();
  }

 private:
  const int size_;
  const FirstError* error_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
};

constexpr std::chrono::milliseconds kTeamPatience{20};

// One team's vote and its barrier.
class TeamState {
  enum : int { kOpen, kTeam, kSolo };

 public:
  explicit TeamState(int n) : size(n), barrier(n, &error) {}
  const int size;
  FirstError error;
  Barrier barrier;
  std::atomic<int> decision{kOpen}, present{0};

  bool agree(bool one_share) {
    if (!one_share) decide(kSolo);
    if (one_share && present.fetch_add(1) + 1 == size) decide(kTeam);
    const auto deadline = std::chrono::steady_clock::now() + kTeamPatience;
    for (unsigned rounds = 0; decision.load(std::memory_order_acquire) == kOpen; spin_wait(rounds))
      if (rounds % 256 == 255 && std::chrono::steady_clock::now() > deadline) decide(kSolo);
    return is_team();
  }
  bool is_team() const { return decision.load(std::memory_order_acquire) == kTeam; }

 private:
  void decide(int verdict) {
    int open = kOpen;
    decision.compare_exchange_strong(open, verdict);
  }
};

template <class Body>
void team(int size, const Body& body) {
  if (size > 1) size = std::min(size, num_threads());
  if (size > 1) {
    struct Context {
      const Body& body;
      TeamState state;
    } context{body, TeamState(size)};
    auto call = [](int64_t begin, int64_t end, void* c) {
      auto& [body, state] = *static_cast<Context*>(c);
      if (!state.agree(end - begin == 1)) return;
      try {
        body(int(begin), state.size, state.barrier);
      } catch (const TeamBroken&) {
      } catch (...) {
        state.error.keep();
      }
    };
    const int32_t failed = threads().parallel_for(0, size, 1, call, &context);
    context.state.error.rethrow();
    if (failed) throw std::runtime_error("memkernels: torch_parallel_for failed");
    if (context.state.is_team()) return;
  }
  Barrier none(1);
  body(0, 1, none);
}

}  // namespace mk
