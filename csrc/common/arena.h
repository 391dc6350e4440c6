// Scratch memory of a thread, reused from call to call so that no kernel call allocates in the steady state.
//
//   Scratch scratch;                          everything taken through it is given back when it goes out of scope
//   (nests) float* row = scratch.take<float>(n);      64-byte aligned, uninitialised, room for whole vectors past the
//   end
//
// Kernel files of one ISA receive pointers and never include this header: it belongs to the host side.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

namespace mk {

class Arena {
 public:
  static Arena& mine() {
    static thread_local Arena arena;
    return arena;
  }
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() { release(); }

  struct Mark {
    size_t block, used;
  };
  Mark mark() const { return {current_, blocks_.empty() ? 0 : blocks_[current_].used}; }

  void* take(size_t bytes) {
    bytes = (bytes + kSlack + kAlign - 1) / kAlign * kAlign;
    while (current_ < blocks_.size() && blocks_[current_].used + bytes > blocks_[current_].size) {
      if (current_ + 1 == blocks_.size()) break;
      blocks_[++current_].used = 0;
    }
    if (blocks_.empty() || blocks_[current_].used + bytes > blocks_[current_].size) grow(bytes);
    Block& block = blocks_[current_];
    void* out = block.data + block.used;
    block.used += bytes;
    return out;
  }

  void rewind(Mark mark) {
    if (blocks_.empty()) return;
    current_ = mark.block;
    blocks_[current_].used = mark.used;
    if (mark.block || mark.used) return;
    size_t total = 0;
    for (const Block& block : blocks_) total += block.size;
    // Idle: one rare huge call must not hold its memory for ever, and several blocks become one next time.
    if (total > kKeep || blocks_.size() > 1) {
      release();
      if (total <= kKeep) grow(total);
      if (!blocks_.empty()) blocks_[0].used = 0;
    }
  }

 private:
  struct Block {
    char* data;
    size_t size, used;
  };
  static constexpr size_t kAlign = 64, kSlack = 64, kFirst = size_t(1) << 16, kKeep = size_t(64) << 20;
  static constexpr size_t kMostAhead = size_t(4) << 20;  // twice a large block would soon be more than is kept

  void grow(size_t bytes) {
    size_t size = blocks_.empty() ? kFirst : std::min(2 * blocks_.back().size, kMostAhead);
    if (size < bytes) size = (bytes + 4095) / 4096 * 4096;
    void* data = std::aligned_alloc(kAlign, size);
    if (!data) throw std::bad_alloc();
    blocks_.push_back({static_cast<char*>(data), size, 0});
    current_ = blocks_.size() - 1;
  }
  void release() {
    for (const Block& block : blocks_) std::free(block.data);
    blocks_.clear();
    current_ = 0;
  }

  std::vector<Block> blocks_;
  size_t current_ = 0;
};

class Scratch {
 public:
  Scratch() : arena_(Arena::mine()), mark_(arena_.mark()) {}
  ~Scratch() { arena_.rewind(mark_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(arena_.take(size_t(count) * sizeof(T)));
  }

 private:
  Arena& arena_;
  Arena::Mark mark_;
};

}  // namespace mk
