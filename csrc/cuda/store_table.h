// Launchers of the key-value store's table. All arrays are contiguous, on the device of the table.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace mk::cuda {

// A slice of a batch. `order` holds its elements sorted by the part of their home (stable), `starts` where each part
// begins in it; `flags` marks elements that leave their part, and `later` lists those first, in the order of the batch.
struct StoreSlice {
  uint64_t* table;
  int64_t buckets;
  const uint64_t* keys;
  int64_t n;
  const int64_t *order, *starts;
  int64_t parts;
  uint8_t* flags;
  const int64_t* later;  // null: the parts, else what is left over
};
struct StoreUpsert {
  const int64_t* rows;
  int mode;  // mk::store::Mode
  int64_t *now, *old, *codes;
};

cudaError_t store_find(const uint64_t* table, int64_t buckets, const uint64_t* keys, int64_t* rows, int64_t n,
                       cudaStream_t stream);
cudaError_t store_parts(int64_t buckets, const uint64_t* keys, int64_t* parts, int64_t n, cudaStream_t stream);
cudaError_t store_upsert(const StoreSlice& slice, const StoreUpsert& work, cudaStream_t stream);
cudaError_t store_give_rows(const StoreSlice& slice, const StoreUpsert& work, cudaStream_t stream);
cudaError_t store_erase(const StoreSlice& slice, int64_t* removed, int64_t* codes, cudaStream_t stream);

}  // namespace mk::cuda
