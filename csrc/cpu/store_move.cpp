// store_move_ on the CPU: the buckets of a table that is given up go into the larger one. Both lie in the order of the
// hashes, so the old one is read and the new one written front to back, and nothing is sorted or looked up.
//
// The new table is the one that store_upsert_ ("insert") with what store_items found would leave, byte for byte: keys
// of one part in the order of the old table, and after every kSlice keys those that left their part. A run of buckets
// at a time is read into blocks, which know the homes they hold; then every thread takes the keys of its own parts out
// of the blocks that have some, mostly those that were read from the same place of the old table.
#include <algorithm>
#include <cstring>
#include <vector>

#include "common/arena.h"
#include "common/tasks.h"
#include "cpu/kernels.h"
#include "cpu/store_table_host.h"

namespace mk::cpu {
namespace {

using namespace mk::store;

constexpr int64_t kBlock = 256, kTask = 8, kRun = 64;  // buckets of a block, blocks of a task, blocks of a run
constexpr int64_t kMost = kBlock * kPlaces;            // keys of a block
constexpr int64_t kAhead = 8;                          // buckets of the new table that are fetched ahead

struct Item {
  uint64_t key;
  int64_t row, home;
};

struct Block {
  Item* items;
  int64_t count, first, least, most;  // first: place of its first key in the run; least, most: homes
};

// What lies in old buckets [begin, end), of which only the bits `kept` of the last words are left.
void take(const Table& old, int64_t begin, int64_t end, uint64_t kept, int64_t buckets, Block& block) {
  int64_t count = 0;
  for (int64_t b = begin; b < end; b++) {
    uint64_t* bucket = old.at(b);
    for (int i = 0; i < kPlaces; i++) {  // a free place is written too, and written over: no branch to mispredict
      block.items[count].key = bucket[i];
      block.items[count].row = row_at(bucket, i);
      count += meta_of(bucket) >> i & 1;
    }
    for (int i = 0; i < kWords - 1; i++) bucket[i] = 0;
    bucket[kWords - 1] &= kept;
  }
  block.count = count, block.least = buckets, block.most = -1;
  for (int64_t i = 0; i < count; i++) {
    const int64_t home = block.items[i].home = home_of(block.items[i].key, buckets);
    block.least = std::min(block.least, home), block.most = std::max(block.most, home);
  }
}

class Move {
 public:
  Move(const Table& old, const Table& table) : old_(old), table_(table) {}

  int64_t all(int64_t begin, int64_t end) {
    const int64_t first = begin;
    kept_ = end < old_.buckets ? ~uint64_t(0) << (32 + kKindBits) : 0;  // keys that lie further on are still found
    Scratch scratch;
    const int64_t blocks = (std::min(end - begin, kRun * kBlock) + kBlock - 1) / kBlock;
    Item* items = scratch.take<Item>(blocks * kMost + 1);
    for (int64_t k = 0; k < blocks; k++) blocks_.push_back({items + k * kMost, 0, 0, 0, 0});
    for (; begin < end; begin += kRun * kBlock) run(begin, std::min(end, begin + kRun * kBlock));
    finish_slice();
    std::memset(static_cast<void*>(items), 0, size_t(blocks * kMost) * sizeof(Item));   // no keys stay
    if (!kept_) std::memset(old_.words, 0, size_t(first * kWords) * sizeof(uint64_t));  // counts of earlier moves
    return moved_;
  }

 private:
  void run(int64_t begin, int64_t end) {
    const int64_t blocks = (end - begin + kBlock - 1) / kBlock;
    run_tasks((blocks + kTask - 1) / kTask, double(end - begin) * 100, 0, [&](int64_t task, char*) {
      for (int64_t k = task * kTask; k < std::min(blocks, (task + 1) * kTask); k++)
        take(old_, begin + k * kBlock, std::min(end, begin + (k + 1) * kBlock), kept_, table_.buckets,
             blocks_[size_t(k)]);
    });
    count_ = blocks;
    share_out();
    int64_t total = 0;
    for (int64_t k = 0; k < blocks; k++) blocks_[size_t(k)].first = total, total += blocks_[size_t(k)].count;
    for (int64_t from = 0; from < total;) {
      const int64_t to = std::min(total, from + kSlice - in_slice_);
      insert(from, to);
      moved_ += to - from, in_slice_ += to - from, from = to;
      if (in_slice_ == kSlice) finish_slice();
    }
  }

  // Where the homes of each task begin: at the part of the first key in its first block. One that lies far from its
  // home makes the shares unequal, nothing worse.
  void share_out() {
    bounds_.assign(1, 0);
    for (int64_t k = kTask; k < count_; k += kTask) {
      const Block& block = blocks_[size_t(k)];
      const int64_t part = block.count ? block.items[0].home / kPart * kPart : 0;
      bounds_.push_back(std::max(bounds_.back(), part));
    }
    bounds_.push_back(table_.buckets);
  }

  // Keys [from, to) of the run, those of a part by one thread; ones that leave their part wait for the end of the
  // slice.
  void insert(int64_t from, int64_t to) {
    std::vector<std::vector<const Item*>> later(bounds_.size() - 1);
    run_tasks(int64_t(later.size()), double(to - from) * 100, 0, [&](int64_t task, char*) {
      const int64_t low = bounds_[size_t(task)], high = bounds_[size_t(task) + 1];
      for (int64_t k = 0; k < count_; k++) {
        const Block& block = blocks_[size_t(k)];
        if (block.most < low || block.least >= high) continue;
        const Item* end = block.items + std::min(block.count, to - block.first);
        for (const Item* item = block.items + std::max<int64_t>(0, from - block.first); item < end; item++) {
          __builtin_prefetch(table_.at(std::min(item->home + kAhead, table_.buckets - 1)), 1);
          if (item->home < low || item->home >= high) continue;
          if (table_.put(item->key, item->row, item->home, false).bucket == kOutside)
            later[size_t(task)].push_back(item);
        }
      }
    });
    std::vector<const Item*> all;
    for (const auto& some : later) all.insert(all.end(), some.begin(), some.end());
    std::sort(all.begin(), all.end());  // blocks lie in order
    for (const Item* item : all) later_.push_back(*item);
  }

  void finish_slice() {
    for (const Item& item : later_) table_.put(item.key, item.row, item.home, true);
    later_.clear();
    in_slice_ = 0;
  }

  const Table old_, table_;
  uint64_t kept_ = 0;
  std::vector<Block> blocks_;
  std::vector<int64_t> bounds_;
  std::vector<Item> later_;  // of this slice, in order
  int64_t count_ = 0, moved_ = 0, in_slice_ = 0;
};

void move(const TensorView& moved, const TensorView& old_view, const TensorView& table_view, int64_t begin,
          int64_t end) {
  const char* op = "store_move_";
  const Table old = store_table_of(op, "old", old_view), table = store_table_of(op, "table", table_view);
  MK_CHECK(old.words != table.words, op, "table", "another table than old", "the same");
  MK_CHECK(0 <= begin && begin <= end && end <= old.buckets, op, "begin, end", old.buckets, end);
  check_output(op, "moved", moved, {1}, DType::int64);
  pybind11::gil_scoped_release nogil;
  *moved.data<int64_t>() = Move(old, table).all(begin, end);
}

}  // namespace

void bind_store_move(pybind11::module_& m) { m.def("store_move_", &move); }

}  // namespace mk::cpu
