// The loops of the key-value store that wait for memory: looking keys up and copying rows from where they lie.
#pragma once
#include "common/store_table.h"
#include "cpu/kernels.h"

namespace mk::cpu {

// Rows of bytes in chunks.
struct StoreChunk {
  char* data;
  int64_t first, rows, stride;
};

struct StoreChunks {
  const StoreChunk* all = nullptr;
  int64_t count = 0;
  int shift = -1;  // every chunk but the last has 2^shift rows and none is missing in between

  // The address of a row; null where no chunk holds it.
  MK_BOTH char* at(int64_t row) const {
    int64_t c = 0;
    if (shift >= 0) {
      c = row >> shift;
      if (c >= count) return nullptr;
    } else {
      int64_t end = count;
      while (end - c > 1) {
        const int64_t middle = (c + end) / 2;
        (all[middle].first <= row ? c : end) = middle;
      }
      if (!count) return nullptr;
    }
    const int64_t at = row - all[c].first;
    return at >= 0 && at < all[c].rows ? all[c].data + at * all[c].stride : nullptr;
  }
};

// What a gather copies: `absent` where a row is negative.
struct StoreGather {
  StoreChunks chunks;
  const int64_t* rows;
  const char* absent;
  char* to;
  int64_t width;
  bool past_caches;  // the output is not kept in cache: `to` lies at a multiple of 64, and so does every row of it
};

// What a scatter writes: nothing where a row is negative.
struct StoreScatter {
  StoreChunks chunks;
  const int64_t* rows;
  const char* from;
  int64_t step, width;
  int stretch;       // stretches of 2^stretch rows are dealt out to the owners
  int64_t owners;    // a power of two
  bool past_caches;  // as above, of every row of every chunk
};

struct StoreLookupKernels {
  // Rows of the int64 keys [begin, end); -1 where a key is not there.
  void (*find)(const store::Table& table, const uint64_t* keys, int64_t* rows, int64_t begin, int64_t end);
  // Copies the rows [begin, end); gives one that no chunk holds, or -1.
  int64_t (*gather)(const StoreGather& work, int64_t begin, int64_t end);
  // Writes those of the rows [begin, end) that are of one owner, in the order of the batch.
  void (*scatter)(const StoreScatter& work, int64_t owner, int64_t begin, int64_t end);
};

MK_KERNELS(StoreLookupKernels, store_lookup)

}  // namespace mk::cpu
