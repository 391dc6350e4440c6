// Which sequence a row works on at each line of a run. Sequences of unequal lengths are dealt to a few rows, longest
// first, each to the row that is free earliest: the lines then hold about as many places as there are tokens.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "common/caches.h"
#include "common/pages.h"
#include "cpu/recurrent_host.h"

namespace mk::cpu {
namespace {

struct Dealt {
  std::vector<std::vector<int32_t>> rows;  // sequences of a row, in their order; the fullest row first
  std::vector<int64_t> loads;
};

// `order`: sequences that have steps, longest first.
Dealt deal(const std::vector<int32_t>& order, const Lengths& lengths, int64_t rows) {
  using Free = std::pair<int64_t, int64_t>;  // load, row
  std::vector<Free> heap;
  Dealt dealt{std::vector<std::vector<int32_t>>(rows), std::vector<int64_t>(rows, 0)};
  for (int64_t r = 0; r < rows; r++) heap.push_back({0, r});
  for (int32_t b : order) {
    std::pop_heap(heap.begin(), heap.end(), std::greater<Free>());
    auto& [load, row] = heap.back();
    dealt.rows[row].push_back(b);
    dealt.loads[row] = load += lengths[b];
    std::push_heap(heap.begin(), heap.end(), std::greater<Free>());
  }
  std::vector<int64_t> by_load(rows);
  std::iota(by_load.begin(), by_load.end(), 0);
  std::stable_sort(by_load.begin(), by_load.end(),
                   [&](int64_t i, int64_t j) { return dealt.loads[i] > dealt.loads[j]; });
  Dealt sorted;
  for (int64_t r : by_load) sorted.rows.push_back(std::move(dealt.rows[r])), sorted.loads.push_back(dealt.loads[r]);
  return sorted;
}

// What a line of so many rows costs, in rows of a full tile: the weights are read again for every tile of rows, which
// takes as long as two thirds of its work, and a line waits for all ranks.
int64_t line_cost(int64_t rows, int64_t row_tile) {
  constexpr int64_t kWait = 2;
  const int64_t tiles = tiles_of(rows, row_tile);
  return std::max(rows, 2 * tiles * row_tile / 3) + kWait;
}

// Fewer rows than the longest sequence needs leave no place empty, more make shorter runs of lines that are not full.
Dealt best_deal(const std::vector<int32_t>& order, const Lengths& lengths, int64_t row_tile) {
  constexpr int64_t kTries = 4;
  int64_t tokens = 0;
  for (int32_t b : order) tokens += lengths[b];
  const int64_t longest = lengths[order[0]], most = int64_t(order.size());
  const int64_t enough = std::min(most, (tokens + longest - 1) / longest);
  const auto cost = [&](const Dealt& dealt) {
    return dealt.loads[0] * line_cost(int64_t(dealt.rows.size()), row_tile);
  };
  Dealt best = deal(order, lengths, enough);
  for (int64_t rows = std::max<int64_t>(1, enough - kTries); rows <= std::min(most, enough + kTries); rows++) {
    Dealt other = deal(order, lengths, rows);
    if (cost(other) < cost(best)) best = std::move(other);
  }
  return best;
}

void fill_slots(RecurrentRows& rows, const Dealt& dealt, const Lengths& lengths, bool reverse, Scratch& scratch) {
  rows.rows = int64_t(dealt.rows.size()), rows.lines = dealt.loads[0];
  Slot* slots = scratch.take<Slot>(rows.lines * rows.rows);
  int32_t* alive = scratch.take<int32_t>(rows.lines);
  for (int64_t r = 0; r < rows.rows; r++) {
    Slot* at = slots + r;
    for (int32_t b : dealt.rows[r])
      for (int64_t t = 0; t < lengths[b]; t++, at += rows.rows) *at = {int32_t(reverse ? lengths[b] - 1 - t : t), b};
    for (int64_t l = dealt.loads[r]; l < rows.lines; l++, at += rows.rows) *at = {-1, -1};
    for (int64_t l = r + 1 < rows.rows ? dealt.loads[r + 1] : 0; l < dealt.loads[r]; l++) alive[l] = int32_t(r + 1);
  }
  rows.slots = slots, rows.alive = alive, rows.reverse = false;
}

void find_events(RecurrentRows& rows, Scratch& scratch) {
  uint8_t* events = scratch.take<uint8_t>(rows.lines);
  for (int64_t l = 0; l < rows.lines; l++) {
    uint8_t found = (l == rows.first() ? kEnters : 0) | (l == rows.last() ? kLeaves : 0);
    for (int64_t r = 0; r < rows.alive_at(l); r++) {
      if (rows.resets(rows.slot(l, r)) || rows.starts(l, r)) found |= kEnters;
      if (rows.ends(l, r)) found |= kLeaves;
    }
    events[l] = found;
  }
  rows.events = events;
}

}  // namespace

Lengths lengths_of(const char* op, const TensorView& lengths, int64_t T, int64_t B) {
  if (!lengths.defined()) return Lengths(size_t(B), T);
  check_tensor(op, "lengths", lengths, {B}, DType::int64);
  Lengths out(static_cast<size_t>(B));
  for (int64_t b = 0; b < B; b++) {
    out[b] = lengths.data<int64_t>()[b * lengths.stride(0)];
    MK_CHECK(out[b] >= 0 && out[b] <= T, op, "lengths", "values in 0..T=" + std::to_string(T), out[b]);
  }
  return out;
}

void plan_rows(RecurrentRows& rows, const Lengths& lengths, bool reverse, int64_t row_tile, Scratch& scratch) {
  rows.lines = rows.T, rows.rows = rows.B, rows.reverse = reverse;
  std::vector<int32_t> order;
  bool even = true;
  for (int64_t b = 0; b < rows.B; b++) {
    even = even && lengths[b] == rows.T;
    if (lengths[b] > 0) order.push_back(int32_t(b));
  }
  if (order.empty()) {
    rows.lines = rows.rows = 0;
    return;
  }
  if (!even) {
    std::stable_sort(order.begin(), order.end(), [&](int32_t i, int32_t j) { return lengths[i] > lengths[j]; });
    fill_slots(rows, best_deal(order, lengths, row_tile), lengths, reverse, scratch);
  }
  if (rows.reset || rows.slots) find_events(rows, scratch);
}

Span ended_steps(const RecurrentRows& rows, const Lengths& lengths, int rank, int size) {
  const auto before = [&](int64_t t) {  // places past the ends in the steps before
    int64_t places = 0;
    for (int64_t b = 0; b < rows.B; b++) places += std::max<int64_t>(0, t - lengths[b]);
    return places;
  };
  const int64_t all = before(rows.T);
  const auto step_at = [&](int64_t places) {
    int64_t low = 0, high = rows.T;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (before(middle) < places)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  };
  return {rank ? step_at(all * rank / size) : 0, rank + 1 < size ? step_at(all * (rank + 1) / size) : rows.T};
}

void zero_past_ends(void* data, const RecurrentRows& rows, const Lengths& lengths, int64_t bytes, Span steps) {
  if (!data || (!rows.slots && rows.lines == rows.T)) return;
  const bool large = rows.T * rows.B * bytes >= kPastCaches;
  for (int64_t t = steps.begin; t < steps.end; t++)
    for (int64_t b = 0; b < rows.B; b++) {
      if (t < lengths[b]) continue;
      char* const place = static_cast<char*>(data) + (t * rows.B + b) * bytes;
      if (large)
        stream_zeros(place, size_t(bytes));
      else
        std::memset(place, 0, size_t(bytes));
    }
}

}  // namespace mk::cpu
