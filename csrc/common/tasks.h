// Tasks of unequal length, dealt out to the threads.
#pragma once
#include <algorithm>
#include <atomic>

#include "common/arena.h"
#include "common/parallel.h"

namespace mk {

// Tasks are taken one by one, so threads that other work slows down take fewer; who runs a task changes no bit of it.
template <class Body>
void run_tasks(int64_t tasks, double flops, int64_t scratch_bytes, const Body& body) {
  if (tasks == 0) return;
  std::atomic<int64_t> next{0};
  const int64_t workers = flops < 2e5 ? 1 : std::min<int64_t>(tasks, num_threads());
  parallel_for(workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; worker++) {
      Scratch scratch;
      char* memory = scratch.take<char>(scratch_bytes);
      for (int64_t task; (task = next.fetch_add(1)) < tasks;) body(task, memory);
    }
  });
}

// Tasks that write long neighbouring runs of fresh memory. Threads at work at the same time stay far apart: two that
// first touch one 2 MB page together both clear it, and one of the two copies is thrown away.
template <class Body>
void run_tasks_apart(int64_t tasks, double flops, int64_t scratch_bytes, const Body& body) {
  const int64_t lanes = num_threads(), each = (tasks + lanes - 1) / lanes;
  run_tasks(each * lanes, flops, scratch_bytes, [&](int64_t turn, char* memory) {
    const int64_t task = turn % lanes * each + turn / lanes;
    if (task < tasks) body(task, memory);
  });
}

}  // namespace mk
