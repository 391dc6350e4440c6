// store_gather and store_scatter_ on the CPU: rows of bytes in chunks (generic/store_lookup.inl.h). Of equal rows in a
// scatter the last one stays: a thread owns stretches of 2 MB of rows and takes the batch in order.
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/caches.h"
#include "common/checks.h"
#include "common/tasks.h"
#include "cpu/select.h"
#include "cpu/store_lookup.h"

namespace mk::cpu {
namespace {

// Of the rows of a scatter, for each thread: one that other work slows down takes fewer.
constexpr int64_t kOwners = 2;
constexpr int64_t kTask = int64_t(1) << 18;  // bytes of a task

struct Chunks : StoreChunks {
  std::vector<StoreChunk> held;  // what `all` points to, also after a move
  int64_t width = 0, end = 0;    // all rows from 0 to `end` are there

  // A row that none of the chunks holds, or -1.
  int64_t missing(const int64_t* rows, int64_t n) const {
    int64_t most = -1;
    for (int64_t i = 0; i < n; i++) most = std::max(most, rows[i]);
    if (most < end) return -1;
    for (int64_t i = 0; i < n; i++)
      if (rows[i] >= 0 && !at(rows[i])) return rows[i];
    return -1;
  }
};

Chunks chunks_of(const char* op, const std::vector<TensorView>& views, const std::vector<int64_t>& firsts,
                 size_t count) {
  Chunks out;
  MK_CHECK(firsts.size() == count, op, "firsts", std::to_string(count) + " numbers", std::to_string(firsts.size()));
  for (size_t c = 0; c < count; c++) {
    const TensorView& view = views[c];
    check_rank(op, "chunks", view, 2);
    check_inner(op, "chunks", view);
    if (!c) out.width = view.size(1);
    MK_CHECK(view.size(1) == out.width, op, "chunks", "rows of one size", describe(view));
    MK_CHECK(!c || firsts[c] >= firsts[c - 1] + out.held[c - 1].rows, op, "firsts", "increasing rows", firsts[c]);
    if (firsts[c] == out.end) out.end += view.size(0);
    out.held.push_back({view.data<char>(), firsts[c], view.size(0), view.stride(0)});
  }
  out.all = out.held.data(), out.count = int64_t(count);
  if (count && firsts[0] == 0) {
    int shift = 62;
    if (count > 1)
      for (shift = 0; int64_t(1) << shift < firsts[1]; shift++) {
      }
    for (size_t c = 0; c < count; c++)
      if (firsts[c] != int64_t(c) << shift) return out;
    out.shift = shift;
  }
  return out;
}

// Every row is some whole cache lines.
bool whole_lines(const Chunks& chunks) {
  bool whole = chunks.width % 64 == 0;
  for (const StoreChunk& chunk : chunks.held)
    whole = whole && chunk.stride % 64 == 0 && reinterpret_cast<uintptr_t>(chunk.data) % 64 == 0;
  return whole;
}

bool increasing(const int64_t* rows, int64_t n) {
  bool so = true;
  for (int64_t i = 0; i < n; i++) so &= rows[i] > (i ? rows[i - 1] : -1);
  return so;
}

int64_t rows_of_task(int64_t width) { return std::max<int64_t>(64, kTask / std::max<int64_t>(1, width)); }

[[noreturn]] void no_such_row(const char* op, int64_t row) {
  throw pybind11::index_error(std::string(op) + ": rows: expected rows that a chunk holds, got " + std::to_string(row));
}

void gather(const TensorView& out, const std::vector<TensorView>& chunks_and_default,
            const std::vector<int64_t>& firsts, const TensorView& rows_view) {
  const char* op = "store_gather";
  MK_CHECK(!chunks_and_default.empty(), op, "chunks", "the default at the end", "nothing");
  const Chunks chunks = chunks_of(op, chunks_and_default, firsts, chunks_and_default.size() - 1);
  const TensorView& fallback = chunks_and_default.back();
  const int64_t n = rows_view.numel();
  check_output(op, "rows", rows_view, {n}, DType::int64);
  check_rank(op, "out", out, 2);
  const int64_t width = out.size(1);
  MK_CHECK(out.size(0) == n, op, "out", "a row for each of rows", describe(out));
  MK_CHECK(fallback.ndim() == 2 && fallback.size(1) == width && fallback.size(0) > 0, op, "default", "[1, bytes]",
           describe(fallback));
  MK_CHECK(!chunks.count || chunks.width == width, op, "chunks", "rows as wide as the default", chunks.width);
  const int64_t* rows = rows_view.data<const int64_t>();
  char* to = out.data<char>();
  const char* absent = fallback.data<const char>();
  const bool past_caches = n * width >= kPastCaches && width % 64 == 0 && reinterpret_cast<uintptr_t>(to) % 64 == 0;
  const StoreGather work{chunks, rows, absent, to, width, past_caches};
  const auto copy = select(store_lookup_levels).gather;
  std::atomic<int64_t> wrong{-1};  // a row that no chunk holds
  {
    pybind11::gil_scoped_release nogil;
    prefer_huge_pages(to, n * width);
    const int64_t each = rows_of_task(width);
    run_tasks_apart((n + each - 1) / each, double(n * width) * 4, 0, [&](int64_t task, char*) {
      const int64_t found = copy(work, task * each, std::min(n, (task + 1) * each));
      if (found >= 0) wrong = found;
    });
  }
  if (wrong >= 0) no_such_row(op, wrong);
}

void scatter(const std::vector<TensorView>& chunk_views, const std::vector<int64_t>& firsts,
             const TensorView& rows_view, const TensorView& values) {
  const char* op = "store_scatter_";
  const Chunks chunks = chunks_of(op, chunk_views, firsts, chunk_views.size());
  const int64_t n = rows_view.numel();
  check_output(op, "rows", rows_view, {n}, DType::int64);
  check_rank(op, "values", values, 2);
  check_inner(op, "values", values);
  const int64_t width = values.size(1);
  MK_CHECK(values.size(0) >= n && (!chunks.count || chunks.width == width), op, "values", "a row for each of rows",
           describe(values));
  int stretch = 0;  // 2^stretch rows: about 2 MB, a page of which two threads should not touch the first byte together
  while (width << stretch < (int64_t(1) << 21)) stretch++;
  const bool apart = increasing(rows_view.data<const int64_t>(), n);  // no row twice: any thread may write it
  int64_t owners = 1;
  while (!apart && n * width >= 65536 && owners < kOwners * num_threads()) owners *= 2;
  const StoreScatter work{chunks,
                          rows_view.data<const int64_t>(),
                          values.data<const char>(),
                          values.stride(0),
                          width,
                          stretch,
                          owners,
                          n * width >= kPastCaches && whole_lines(chunks)};
  const auto write = select(store_lookup_levels).scatter;
  if (const int64_t row = chunks.missing(work.rows, n); row >= 0) no_such_row(op, row);
  pybind11::gil_scoped_release nogil;
  if (!apart)
    return run_tasks(owners, double(n * width) * 4, 0, [&](int64_t owner, char*) { write(work, owner, 0, n); });
  const int64_t each = rows_of_task(width);
  run_tasks_apart((n + each - 1) / each, double(n * width) * 4, 0,
                  [&](int64_t task, char*) { write(work, 0, task * each, std::min(n, (task + 1) * each)); });
}

}  // namespace

void bind_store_rows(pybind11::module_& m) {
  m.def("store_gather", &gather);
  m.def("store_scatter_", &scatter);
}

}  // namespace mk::cpu
