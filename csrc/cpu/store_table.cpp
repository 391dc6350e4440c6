// store_find, store_upsert_ and store_erase_ on the CPU: lookups are cache misses, so many are kept under way at once
// (generic/store_lookup.inl.h). A batch that writes is first sorted by the part of its homes (counting sort, stable),
// so that every thread owns whole parts and meets them in cache.
#include <algorithm>
#include <cstring>
#include <vector>

#include "common/arena.h"
#include "common/checks.h"
#include "common/store_table.h"
#include "common/tasks.h"
#include "cpu/select.h"
#include "cpu/store_lookup.h"
#include "cpu/store_table_host.h"

namespace mk::cpu {
namespace {

using namespace mk::store;

constexpr int64_t kGroup = 32;       // keys whose buckets are under way
constexpr int64_t kFound = 2048;     // keys of a task of a search
constexpr int64_t kTextGroup = 128;  // byte keys that are found, then compared

struct ByteKeys {
  const int64_t* spans;  // [entries, 2]: begin << 24 | length, and the second half of the hash; null: int64 keys
  int64_t entries, bytes;
  const uint8_t *arena, *data;
  const int64_t *offsets, *second;

  static constexpr int kLengthBits = 24;
  const uint8_t* key(int64_t i) const { return data + offsets[i]; }
  int64_t length(int64_t i) const { return offsets[i + 1] - offsets[i]; }
  const uint8_t* stored(int64_t row) const { return arena + (spans[2 * row] >> kLengthBits); }
  bool same(int64_t i, int64_t row) const {
    if (!spans) return true;
    const int64_t n = length(i), other = row - kPending;
    if (other >= 0)
      return second[i] == second[other] && n == length(other) && !std::memcmp(key(i), key(other), size_t(n));
    if (row >= entries || second[i] != spans[2 * row + 1]) return false;
    const int64_t begin = spans[2 * row] >> kLengthBits, held = spans[2 * row] & ((int64_t(1) << kLengthBits) - 1);
    return held == n && begin >= 0 && begin + n <= bytes && !std::memcmp(key(i), arena + begin, size_t(n));
  }
};

ByteKeys byte_keys(const char* op, int64_t n, const TensorView& spans, const TensorView& arena, const TensorView& data,
                   const TensorView& offsets, const TensorView& second) {
  if (!spans.defined()) return {};
  check_rank(op, "spans", spans, 2);
  check_output(op, "spans", spans, {spans.size(0), 2}, DType::int64);
  check_rank(op, "arena", arena, 1);
  check_rank(op, "data", data, 1);
  check_rank(op, "offsets", offsets, 1);
  MK_CHECK(offsets.size(0) > n && offsets.dtype() == DType::int64, op, "offsets", "int64, one more than keys",
           describe(offsets));
  check_rank(op, "second", second, 1);
  MK_CHECK(second.size(0) >= n && second.dtype() == DType::int64, op, "second", "int64, one for each key",
           describe(second));
  static const int64_t none[2] = {0, 0};  // an empty tensor may have no memory
  return {spans.size(0) ? spans.data<const int64_t>() : none,
          spans.size(0),
          arena.size(0),
          arena.data<const uint8_t>(),
          data.data<const uint8_t>(),
          offsets.data<const int64_t>(),
          second.data<const int64_t>()};
}

const uint64_t* keys_of(const char* op, const TensorView& keys) {
  check_rank(op, "keys", keys, 1);
  check_output(op, "keys", keys, {keys.size(0)}, DType::int64);
  return keys.data<const uint64_t>();
}

// Entries of byte keys: the place by 64 bits first, then its span, then its bytes, a group of keys at a time.
void find_bytes(const Table& table, const uint64_t* keys, const ByteKeys& text, int64_t* rows, int64_t begin,
                int64_t end) {
  const auto find_ints = select(store_lookup_levels).find;
  for (int64_t first = begin; first < end; first += kTextGroup) {
    const int64_t count = std::min(kTextGroup, end - first);
    find_ints(table, keys, rows, first, first + count);
    for (int64_t i = first; i < first + count; i++)
      if (rows[i] >= 0 && rows[i] < text.entries) __builtin_prefetch(text.spans + 2 * rows[i]);
    for (int64_t i = first; i < first + count; i++)
      if (rows[i] >= 0 && rows[i] < text.entries) __builtin_prefetch(text.stored(rows[i]));
    for (int64_t i = first; i < first + count; i++) {
      if (rows[i] < 0 || text.same(i, rows[i])) continue;
      const auto same = [&](int64_t row) { return text.same(i, row); };  // another key with the same 64 bits
      const Place place = table.find(keys[i], home_of(keys[i], table.buckets), true, same);
      rows[i] = place.bucket < 0 ? -1 : row_at(table.at(place.bucket), place.place);
    }
  }
}

void find(const TensorView& rows, const TensorView& table_view, const TensorView& keys_view, const TensorView& spans,
          const TensorView& arena, const TensorView& data, const TensorView& offsets, const TensorView& second) {
  const char* op = "store_find";
  const Table table = store_table_of(op, "table", table_view);
  const uint64_t* keys = keys_of(op, keys_view);
  const int64_t n = keys_view.size(0);
  check_output(op, "rows", rows, {n}, DType::int64);
  const ByteKeys text = byte_keys(op, n, spans, arena, data, offsets, second);
  int64_t* out = rows.data<int64_t>();
  const auto find_ints = select(store_lookup_levels).find;
  pybind11::gil_scoped_release nogil;
  run_tasks((n + kFound - 1) / kFound, double(n) * 100, 0, [&](int64_t task, char*) {
    const int64_t begin = task * kFound, end = std::min(n, begin + kFound);
    if (text.spans)
      find_bytes(table, keys, text, out, begin, end);
    else
      find_ints(table, keys, out, begin, end);
  });
}

struct Item {
  uint64_t key;
  int64_t i;  // place in the batch
};

// A slice of the batch, sorted by runs of parts.
struct Runs {
  Item* items;
  std::vector<int64_t> begin;  // of each run, and the end
  int64_t buckets;             // of a run
  int64_t count() const { return int64_t(begin.size()) - 1; }
  bool holds(int64_t run, int64_t bucket) const { return bucket / buckets == run; }
};

Runs sort_by_part(const Table& table, const uint64_t* keys, int64_t from, int64_t to, Scratch& scratch) {
  const int64_t parts = (table.buckets + kPart - 1) / kPart, n = to - from;
  int shift = 0;  // 2^shift parts a run: runs that stay in a core's cache, none of few keys
  while (parts >> shift > 1 && (parts >> shift > 256 || n / (parts >> shift) < 256)) shift++;
  const int64_t runs = (parts + (int64_t(1) << shift) - 1) >> shift;
  Runs out{scratch.take<Item>(n), std::vector<int64_t>(size_t(runs) + 1, 0), kPart << shift};
  out.begin[size_t(runs)] = n;
  if (runs == 1) {
    for (int64_t i = from; i < to; i++) out.items[i - from] = {keys[i], i};
    return out;
  }
  const int64_t slices = std::min<int64_t>(num_threads(), std::max<int64_t>(1, n / 4096));
  const int64_t each = (n + slices - 1) / slices;
  uint16_t* run = scratch.take<uint16_t>(n);  // up to 257 of them
  std::vector<int64_t> counts(size_t(slices * runs), 0);
  parallel_for(slices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; s++)
      for (int64_t i = s * each; i < std::min(n, (s + 1) * each); i++) {
        run[i] = uint16_t(home_of(keys[from + i], table.buckets) / kPart >> shift);
        counts[size_t(s * runs + run[i])]++;
      }
  });
  int64_t total = 0;
  for (int64_t r = 0; r < runs; r++) {
    out.begin[size_t(r)] = total;
    for (int64_t s = 0; s < slices; s++) {
      const int64_t count = counts[size_t(s * runs + r)];
      counts[size_t(s * runs + r)] = total;
      total += count;
    }
  }
  parallel_for(slices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; s++)
      for (int64_t i = s * each; i < std::min(n, (s + 1) * each); i++)
        out.items[counts[size_t(s * runs + run[i])]++] = {keys[from + i], from + i};
  });
  return out;
}

struct Nothing {
  bool operator()(const Item&, int64_t) const { return true; }
};

// step(item, result, leave) for every item, runs by several threads, and after(item, result) when the run is done;
// step once more at the end, in order, where one of them answered false. The results lie in the order of the items:
// threads that write to the places of a batch at random take its cache lines from each other.
template <class Step, class After = Nothing>
void in_parts(const Table& table, const Runs& runs, int64_t* results, const Step& step, const After& after = {}) {
  std::vector<std::vector<int64_t>> later(size_t(runs.count()));
  run_tasks(runs.count(), double(runs.begin.back()) * 100, 0, [&](int64_t r, char*) {
    const int64_t end = runs.begin[size_t(r) + 1];
    for (int64_t k = runs.begin[size_t(r)]; k < end; k++) {
      if (k + kGroup / 2 < end) __builtin_prefetch(table.at(home_of(runs.items[k + kGroup / 2].key, table.buckets)), 1);
      if (!step(runs.items[k], results[k], false)) later[size_t(r)].push_back(k);
    }
    for (int64_t k = runs.begin[size_t(r)]; k < end; k++)
      if (!after(runs.items[k], results[k])) later[size_t(r)].push_back(k);
  });
  std::vector<int64_t> all;
  for (const auto& some : later) all.insert(all.end(), some.begin(), some.end());
  std::sort(all.begin(), all.end(), [&](int64_t a, int64_t b) { return runs.items[a].i < runs.items[b].i; });
  for (const int64_t k : all) step(runs.items[k], results[k], true);
}

// The results of items, in the order of the batch; true: all are -1.
bool in_order(const Runs& runs, const int64_t* results, int64_t from, int64_t* out) {
  const int64_t n = runs.begin.back();
  if (std::all_of(results, results + n, [](int64_t result) { return result == -1; })) {
    std::fill(out + from, out + from + n, -1);
    return true;
  }
  for (int64_t k = 0; k < n; k++) out[runs.items[k].i] = results[k];
  return false;
}

bool consecutive(const int64_t* rows, int64_t n) {
  bool so = true;
  for (int64_t i = 1; i < n; i++) so &= rows[i] == rows[0] + i;
  return so;
}

// The place of a key, kept in its item in place of the key: of a new one until it has its row, of an erased one until
// what passed it by has come back.
constexpr uint64_t kNoPlace = ~uint64_t(0);
uint64_t code(Place place) { return place.bucket < 0 ? kNoPlace : uint64_t(place.bucket) * 8 + uint64_t(place.place); }
Place place_of(uint64_t code) { return {int64_t(code / 8), int(code % 8)}; }

struct Upsert {
  Table table;
  const uint64_t* keys;
  ByteKeys text;
  const int64_t* rows;
  int64_t *now, *old, rank;  // rank: new keys so far
  // Slices of byte keys whose rows are given at the end of the batch. The bytes of a new key are in the batch alone,
  // and only a pending row says where: equal keys of later slices are told by it.
  struct Waiting {
    std::vector<Item> items;
    Runs runs;
  };
  std::vector<Waiting> waiting = {};

  // One slice of the batch. Which new key gets which row is known at its end; until then element i has row
  // `first` + i - from: the one it gets if all keys are new, where rows follow each other, else a pending one.
  template <Mode mode, bool kInts>
  void slice(int64_t from, int64_t to, int64_t n) {
    Scratch scratch;
    const Runs runs = sort_by_part(table, keys, from, to, scratch);
    int64_t* found = scratch.take<int64_t>(to - from);
    const bool guessed = mode == Mode::assign && kInts && consecutive(rows + rank, to - from);
    const int64_t first = guessed ? rows[rank] : kPending + from;
    in_parts(table, runs, found, [&](Item& item, int64_t& before, bool leave) {
      const int64_t at = item.i - from, row = mode == Mode::assign ? first + at : rows[item.i];
      const auto same = [&](int64_t other) { return kInts || text.same(item.i, other); };
      const Upserted done = upsert(table, item.key, row, mode, leave, same);
      if (done.place.bucket == kOutside) return false;
      // The row of an earlier element with this key, or one that just looks so: then that element has found it too.
      const bool twice = guessed && done.old >= first && done.old < row && keys[done.old - first + from] == item.key;
      before = twice ? done.old - first + from + kPending : done.old;
      item.key = code(done.place);
      return true;
    });
    const bool all_new = in_order(runs, found, from, old);
    if (guessed && all_new) {
      std::copy_n(rows + rank, to - from, now + from);
      rank += to - from;
      return;
    }
    for (int64_t i = from; i < to; i++) now[i] = row_now<mode>(i);
    if (mode != Mode::assign) return;
    if (kInts || (from == 0 && to == n)) return give_rows(runs);
    waiting.push_back({std::vector<Item>(runs.items, runs.items + (to - from)), runs});
  }

  // New keys of a run by one thread. One that left its run lies in a bucket that another thread may be writing to, and
  // comes at the end.
  void give_rows(const Runs& runs) {
    const auto give = [&](const Item& item) {
      const Place place = place_of(item.key);
      set_row(table.at(place.bucket), place.place, now[item.i]);
    };
    std::vector<std::vector<Item>> left(size_t(runs.count()));
    run_tasks(runs.count(), double(runs.begin.back()) * 50, 0, [&](int64_t r, char*) {
      for (int64_t k = runs.begin[size_t(r)]; k < runs.begin[size_t(r) + 1]; k++) {
        const Item& item = runs.items[k];
        if (item.key == kNoPlace) continue;
        if (runs.holds(r, place_of(item.key).bucket))
          give(item);
        else
          left[size_t(r)].push_back(item);
      }
    });
    for (const auto& some : left)
      for (const Item& item : some) give(item);
  }

  template <Mode mode>
  int64_t row_now(int64_t i) {
    if (old[i] == -2) return -1;
    if (old[i] == -1) return rows[mode == Mode::assign ? rank++ : i];
    if (mode == Mode::assign && old[i] >= kPending) old[i] = now[old[i] - kPending];  // a key of this batch
    return mode == Mode::replace ? rows[i] : old[i];
  }

  template <Mode mode, bool kInts>
  void all(int64_t n) {
    for (int64_t from = 0; from < n; from += kSlice) slice<mode, kInts>(from, std::min(n, from + kSlice), n);
    for (Waiting& one : waiting) {
      one.runs.items = one.items.data();
      give_rows(one.runs);
    }
  }
};

Mode mode_of(const std::string& name) {
  if (name == "replace") return Mode::replace;
  if (name == "keep") return Mode::keep;
  if (name == "assign") return Mode::assign;
  MK_CHECK(name == "insert", "store_upsert_", "mode", "'replace', 'keep', 'assign' or 'insert'", name);
  return Mode::insert;
}

void upsert_batch(const TensorView& now_view, const TensorView& old_view, const TensorView& table_view,
                  const TensorView& keys_view, const TensorView& rows_view, const std::string& mode,
                  const TensorView& spans, const TensorView& arena, const TensorView& data, const TensorView& offsets,
                  const TensorView& second) {
  const char* op = "store_upsert_";
  const int64_t n = keys_view.size(0);
  check_output(op, "now", now_view, {n}, DType::int64);
  check_output(op, "old", old_view, {n}, DType::int64);
  check_rank(op, "rows", rows_view, 1);
  MK_CHECK(rows_view.size(0) >= n, op, "rows", std::to_string(n) + " rows", describe(rows_view));
  check_output(op, "rows", rows_view, {rows_view.size(0)}, DType::int64);
  const Mode chosen = mode_of(mode);
  MK_CHECK(!spans.defined() || chosen == Mode::assign, op, "mode", "'assign' where byte keys are given", mode);
  Upsert work{store_table_of(op, "table", table_view),
              keys_of(op, keys_view),
              byte_keys(op, n, spans, arena, data, offsets, second),
              rows_view.data<const int64_t>(),
              now_view.data<int64_t>(),
              old_view.data<int64_t>(),
              0};
  pybind11::gil_scoped_release nogil;
  switch (chosen) {
    case Mode::replace:
      return work.all<Mode::replace, true>(n);
    case Mode::keep:
      return work.all<Mode::keep, true>(n);
    case Mode::assign:
      return work.text.spans ? work.all<Mode::assign, false>(n) : work.all<Mode::assign, true>(n);
    case Mode::insert:
      return work.all<Mode::insert, true>(n);
  }
}

void erase(const TensorView& removed_view, const TensorView& table_view, const TensorView& keys_view,
           const TensorView& spans, const TensorView& arena, const TensorView& data, const TensorView& offsets,
           const TensorView& second) {
  const char* op = "store_erase_";
  const Table table = store_table_of(op, "table", table_view);
  const uint64_t* keys = keys_of(op, keys_view);
  const int64_t n = keys_view.size(0);
  check_output(op, "removed", removed_view, {n}, DType::int64);
  const ByteKeys text = byte_keys(op, n, spans, arena, data, offsets, second);
  int64_t* removed = removed_view.data<int64_t>();
  pybind11::gil_scoped_release nogil;
  for (int64_t from = 0; from < n; from += kSlice) {
    Scratch scratch;
    const Runs runs = sort_by_part(table, keys, from, std::min(n, from + kSlice), scratch);
    int64_t* found = scratch.take<int64_t>(runs.begin.back());
    const auto close = [&](const Item& item, int64_t row) { return row < 0 || table.close(place_of(item.key), false); };
    const auto take_out = [&](Item& item, int64_t& row, bool leave) {
      if (leave && row >= 0) return table.close(place_of(item.key), true);
      const int64_t home = home_of(item.key, table.buckets);
      const Place place = table.find(item.key, home, leave, [&](int64_t other) { return text.same(item.i, other); });
      row = place.bucket < 0 ? -1 : row_at(table.at(place.bucket), place.place);
      if (place.bucket < 0) return place.bucket == kAbsent;
      table.take_out(place, home);
      item.key = code(place);
      if (passed_of(table.at(place.bucket))) __builtin_prefetch(table.at(table.wrapped(place.bucket + 1)), 1);
      return leave ? table.close(place, true) : true;
    };
    in_parts(table, runs, found, take_out, close);
    in_order(runs, found, from, removed);
    std::memset(static_cast<void*>(runs.items), 0, size_t(runs.begin.back()) * sizeof(Item));  // what is erased is gone
  }
}

// Keys and rows in buckets [begin, end), a thread's share behind the one before it.
void items(const TensorView& keys_view, const TensorView& rows_view, const TensorView& count_view,
           const TensorView& table_view, int64_t begin, int64_t end) {
  const char* op = "store_items";
  const Table table = store_table_of(op, "table", table_view);
  MK_CHECK(0 <= begin && begin <= end && end <= table.buckets, op, "begin, end", table.buckets, end);
  check_output(op, "keys", keys_view, {(end - begin) * kPlaces}, DType::int64);
  check_output(op, "rows", rows_view, {(end - begin) * kPlaces}, DType::int64);
  check_output(op, "count", count_view, {1}, DType::int64);
  int64_t *keys = keys_view.data<int64_t>(), *rows = rows_view.data<int64_t>(), *count = count_view.data<int64_t>();
  pybind11::gil_scoped_release nogil;
  constexpr int64_t kEach = 4096;
  const int64_t shares = (end - begin + kEach - 1) / kEach;
  std::vector<int64_t> starts(size_t(shares) + 1, 0);
  const auto each_share = [&](const auto& body) {
    parallel_for(shares, 4, [&](int64_t from, int64_t to) {
      for (int64_t s = from; s < to; s++) body(s, begin + s * kEach, std::min(end, begin + (s + 1) * kEach));
    });
  };
  constexpr uint32_t kAll = (1u << kPlaces) - 1;
  each_share([&](int64_t s, int64_t from, int64_t to) {
    for (int64_t b = from; b < to; b++) starts[size_t(s) + 1] += __builtin_popcount(meta_of(table.at(b)) & kAll);
  });
  for (int64_t s = 0; s < shares; s++) starts[size_t(s) + 1] += starts[size_t(s)];
  *count = starts[size_t(shares)];
  each_share([&](int64_t s, int64_t from, int64_t to) {
    int64_t at = starts[size_t(s)];
    for (int64_t b = from; b < to; b++)
      for (uint32_t taken = meta_of(table.at(b)) & kAll; taken; taken &= taken - 1, at++) {
        const int place = lowest(taken);
        keys[at] = int64_t(table.at(b)[place]), rows[at] = row_at(table.at(b), place);
      }
  });
}

}  // namespace

void bind_store_table(pybind11::module_& m) {
  m.def("store_find", &find);
  m.def("store_upsert_", &upsert_batch);
  m.def("store_erase_", &erase);
  m.def("store_items", &items);
}

}  // namespace mk::cpu
