// weighted_bag, host side: checks, the places sorted by row, the split into tasks, the Python binding.
#include "cpu/weighted_bag.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

#include "common/checks.h"
#include "common/pages.h"
#include "common/tasks.h"
#include "cpu/select.h"

namespace mk::cpu {
namespace {

constexpr const char* kOp = "weighted_bag";
constexpr int64_t kTask = 1024;  // places of a task

DType wide(DType dtype) { return dtype == DType::float64 ? dtype : DType::float32; }

BagArgs arguments(const InputView& table, const InputView& index, const InputView& weight) {
  check_rank(kOp, "table", table, 2), check_rank(kOp, "index", index, 2);
  check_float(kOp, "table", table);
  BagArgs a{};
  a.rows = table.size(0), a.width = table.size(1), a.bags = index.size(0), a.places = index.size(1);
  check_tensor(kOp, "index", index, {a.bags, a.places}, DType::int64);
  check_tensor(kOp, "weight", weight, {a.bags, a.places}, table.dtype());
  check_inner(kOp, "table", table), check_inner(kOp, "index", index), check_inner(kOp, "weight", weight);
  a.table = table.data(), a.table_k = table.stride(0);
  a.index = index.data<const int64_t>(), a.index_b = index.stride(0);
  a.weight = weight.data(), a.weight_b = weight.stride(0);
  a.chunks = std::max<int64_t>(1, (a.places + kBagChunk - 1) / kBagChunk);
  return a;
}

void check_index(const BagArgs& a) {
  std::atomic<bool> found{false};
  int64_t wrong = 0;
  parallel_for(a.bags, grain_for(a.places), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) {
      const int64_t* index = a.index + b * a.index_b;
      bool bad = false;
      for (int64_t j = 0; j < a.places; j++) bad |= uint64_t(index[j] + 1) > uint64_t(a.rows);
      for (int64_t j = 0; bad && j < a.places; j++)
        if (uint64_t(index[j] + 1) > uint64_t(a.rows) && !found.exchange(true)) wrong = index[j];
    }
  });
  if (!found) return;
  std::ostringstream text;
  text << kOp << ": index: expected -1 or rows 0 to K-1=" << a.rows - 1 << ", got " << wrong;
  throw std::out_of_range(text.str());  // IndexError in Python
}

double work(const BagArgs& a) { return 2.0 * double(a.bags * a.places) * double(a.width + 8); }

void forward(const TensorView& out, const InputView& table, const InputView& index, const InputView& weight) {
  BagArgs a = arguments(table, index, weight);
  const DType dtype = table.dtype();
  check_output(kOp, "out", out, {a.bags, a.width}, dtype);
  a.out = out.data();
  const auto& kernels = select(weighted_bag_levels);
  const int type = int(dtype);
  const int64_t size = item_size(wide(dtype));
  pybind11::gil_scoped_release nogil;
  check_index(a);
  const int64_t pieces = a.bags * a.chunks, bytes = kBagChunk * (int64_t(sizeof(void*)) + size) + a.width * size;
  Scratch scratch;
  if (a.chunks > 1) a.sums = scratch.take<char>(pieces * a.width * size);
  const int64_t step = std::max<int64_t>(1, a.chunks > 1 ? 1 : kTask / std::max<int64_t>(1, a.places));
  run_tasks((pieces + step - 1) / step, work(a) + double(a.bags * a.width), bytes, [&](int64_t task, void* memory) {
    kernels.forward[type](a, task * step, std::min((task + 1) * step, pieces), memory);
  });
  if (a.chunks > 1)
    parallel_for(a.bags, grain_for(a.chunks * a.width * size), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; b++) kernels.join[type](a, b);
    });
}

// The places that are there, by row and, of one row, in their own order: a stable radix sort. Returns their number.
int64_t sort_places(const BagArgs& a, BagPlace* places, BagPlace* other, BagPlace** sorted) {
  constexpr int kBits = 11;
  constexpr int64_t kDigits = int64_t(1) << kBits;
  int passes = 0;
  while (passes * kBits < 63 && (a.rows - 1) >> passes * kBits > 0) passes++;
  int64_t count = 0;
  std::vector<int64_t> counts(size_t(passes * kDigits), 0);
  for (int64_t b = 0; b < a.bags; b++)
    for (int64_t j = 0; j < a.places; j++) {
      const int64_t row = a.index[b * a.index_b + j];
      if (row < 0) continue;
      places[count++] = {row, b * a.places + j};
      for (int p = 0; p < passes; p++) counts[size_t(p * kDigits + (row >> p * kBits) % kDigits)]++;
    }
  for (int p = 0; p < passes; p++) {
    int64_t* start = counts.data() + p * kDigits;
    for (int64_t d = 0, sum = 0; d < kDigits; d++) sum += std::exchange(start[d], sum);
    for (int64_t i = 0; i < count; i++) other[start[(places[i].row >> p * kBits) % kDigits]++] = places[i];
    std::swap(places, other);
  }
  *sorted = places;
  return count;
}

// What is worked on at a time: whole rows (slot -1), or a part of the places of a row that has many.
struct Unit {
  int64_t begin, end, slot;
};
struct LongRow {
  int64_t begin, slot, slots;
};

// The sorted places cut into units; which of them are joined.
void cut(const BagPlace* sorted, int64_t count, std::vector<Unit>& units, std::vector<LongRow>& rows) {
  int64_t slots = 0, done = 0;
  const auto whole = [&](int64_t end) {
    for (int64_t next; done < end; done = next) {
      next = std::min(done + kTask, end);
      while (next < end && sorted[next].row == sorted[next - 1].row) next++;
      units.push_back({done, next, -1});
    }
  };
  const auto less = [](const BagPlace& place, int64_t row) { return place.row < row; };
  // A row of more than kBagRun places has one at a multiple of kBagRun.
  for (int64_t i = 0; i < count; i = (std::max(i + 1, done) + kBagRun - 1) / kBagRun * kBagRun) {
    const int64_t row = sorted[i].row;
    const int64_t begin = std::lower_bound(sorted, sorted + count, row, less) - sorted;
    const int64_t end = std::lower_bound(sorted, sorted + count, row + 1, less) - sorted;
    if (end - begin <= kBagRun) continue;
    whole(begin);
    rows.push_back({begin, slots, (end - begin + kBagRun - 1) / kBagRun});
    for (; done < end; done = std::min(done + kBagRun, end))
      units.push_back({done, std::min(done + kBagRun, end), slots++});
  }
  whole(count);
}

void gradients(BagArgs& a, int type, int64_t size, int64_t item) {
  const auto& kernels = select(weighted_bag_levels);
  const int64_t total = a.bags * a.places;
  Scratch scratch;
  BagPlace *places = scratch.take<BagPlace>(total), *other = scratch.take<BagPlace>(total), *sorted;
  const int64_t count = sort_places(a, places, other, &sorted);
  a.sorted = sorted;
  if (a.dweight && count < total) std::memset(a.dweight, 0, size_t(total * item));
  std::vector<Unit> units;
  std::vector<LongRow> rows;
  cut(sorted, count, units, rows);
  const int64_t slots = rows.empty() ? 0 : rows.back().slot + rows.back().slots;
  char* sums = scratch.take<char>(slots * a.width * size);
  const int64_t row_bytes = a.width * item;
  const bool clear = a.dtable && !clear_pages(a.dtable, a.rows * row_bytes);
  if (clear) prefer_huge_pages(a.dtable, a.rows * row_bytes);
  // The rows that nobody names, before the row of a place.
  const auto clear_before = [&](int64_t place) {
    const int64_t from = place ? sorted[place - 1].row + 1 : 0, to = place < count ? sorted[place].row : a.rows;
    if (from < to) stream_zeros(static_cast<char*>(a.dtable) + from * row_bytes, size_t((to - from) * row_bytes));
  };
  const double moved = 2 * work(a) + (clear ? double(a.rows * a.width) : 0.0);
  run_tasks(int64_t(units.size()) + clear, moved, a.width * size, [&](int64_t task, void* memory) {
    if (task == int64_t(units.size())) return clear_before(count);
    const Unit unit = units[size_t(task)];
    if (unit.slot >= 0) return kernels.backward_run[type](a, unit.begin, unit.end, sums + unit.slot * a.width * size);
    for (int64_t i = unit.begin; clear && i < unit.end; i++) clear_before(i);
    kernels.backward[type](a, unit.begin, unit.end, memory);
  });
  if (!a.dtable) return;
  for (const LongRow& row : rows) {
    if (clear) clear_before(row.begin);
    kernels.backward_join[type](a, sorted[row.begin].row, sums + row.slot * a.width * size, row.slots);
  }
}

void backward(const TensorView& dtable, const TensorView& dweight, const InputView& dout, const InputView& table,
              const InputView& index, const InputView& weight) {
  BagArgs a = arguments(table, index, weight);
  const DType dtype = table.dtype();
  check_tensor(kOp, "dout", dout, {a.bags, a.width}, dtype);
  check_inner(kOp, "dout", dout);
  a.dout = dout.data(), a.dout_b = dout.stride(0);
  if (dtable.defined()) {
    check_output(kOp, "dtable", dtable, {a.rows, a.width}, dtype);
    a.dtable = dtable.data();
  }
  if (dweight.defined()) {
    check_output(kOp, "dweight", dweight, {a.bags, a.places}, dtype);
    a.dweight = dweight.data();
  }
  pybind11::gil_scoped_release nogil;
  check_index(a);
  gradients(a, int(dtype), item_size(wide(dtype)), item_size(dtype));
}

}  // namespace

void bind_weighted_bag(pybind11::module_& m) {
  m.def("weighted_bag", &forward);
  m.def("weighted_bag_backward", &backward);
}

}  // namespace mk::cpu
