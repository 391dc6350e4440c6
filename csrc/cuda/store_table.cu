// The key-value store's table on the device: layout, hash and steps are those of common/store_table.h, so the table is
// the CPU's byte for byte.
//
// find: a thread a key; the line of its bucket is all it reads, 64 bytes a key. Writing: a thread owns a part of 256
// buckets and takes the elements whose home lies there in the order of the batch; no atomics, hence no race decides
// where a key goes. What leaves its part (about one key in a thousand) one thread does at the end.
#include "cuda/store_table.h"

#include "common/store_table.h"
#include "cuda/launch.cuh"

namespace mk::cuda {
namespace {

using namespace mk::store;

constexpr int kThreads = 128;
constexpr int64_t kMostBlocks = 65536;

dim3 blocks_for(int64_t threads) {
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  return dim3(unsigned(blocks < 1 ? 1 : blocks < kMostBlocks ? blocks : kMostBlocks), 1, 1);
}

__device__ __forceinline__ int64_t first_index() { return blockIdx.x * int64_t(blockDim.x) + threadIdx.x; }
__device__ __forceinline__ int64_t all_threads() { return int64_t(gridDim.x) * blockDim.x; }

__global__ void find_kernel(Table table, const uint64_t* keys, int64_t* rows, int64_t n) {
  for (int64_t i = first_index(); i < n; i += all_threads()) {
    const Place place = table.find(keys[i], home_of(keys[i], table.buckets), true, Any());
    rows[i] = place.bucket < 0 ? -1 : row_at(table.at(place.bucket), place.place);
  }
}

__global__ void parts_kernel(int64_t buckets, const uint64_t* keys, int64_t* parts, int64_t n) {
  for (int64_t i = first_index(); i < n; i += all_threads()) parts[i] = home_of(keys[i], buckets) / kPart;
}

// step(element) for all elements of a part, a thread a part; or for those left over, by one thread.
template <class Step>
__device__ __forceinline__ void for_each(const StoreSlice& slice, const Step& step) {
  if (slice.later) {
    if (first_index() == 0)
      for (int64_t k = 0; k < slice.n && slice.flags[slice.later[k]]; k++) step(slice.later[k]);
    return;
  }
  for (int64_t part = first_index(); part < slice.parts; part += all_threads())
    for (int64_t k = slice.starts[part]; k < slice.starts[part + 1]; k++) step(slice.order[k]);
}

__global__ void upsert_kernel(StoreSlice slice, StoreUpsert work) {
  const Table table{slice.table, slice.buckets};
  const Mode mode = Mode(work.mode);
  const bool leave = slice.later != nullptr;
  for_each(slice, [&](int64_t i) {
    const int64_t row = mode == Mode::assign ? kPending + i : work.rows[i];
    const Upserted done = upsert(table, slice.keys[i], row, mode, leave, Any());
    slice.flags[i] = leave || done.place.bucket == kOutside;
    work.codes[i] = done.place.bucket < 0 ? -1 : done.place.bucket * 8 + done.place.place;
    if (done.place.bucket != kOutside) work.now[i] = done.now, work.old[i] = done.old;
  });
}

__global__ void give_rows_kernel(StoreSlice slice, StoreUpsert work) {
  const Table table{slice.table, slice.buckets};
  const bool left_over = slice.later != nullptr;
  for_each(slice, [&](int64_t i) {
    if (work.codes[i] >= 0 && bool(slice.flags[i]) == left_over)
      set_row(table.at(work.codes[i] / 8), int(work.codes[i] % 8), work.now[i]);
  });
}

__global__ void erase_kernel(StoreSlice slice, int64_t* removed, int64_t* codes) {
  const Table table{slice.table, slice.buckets};
  const bool leave = slice.later != nullptr;
  const auto close = [&](int64_t i) { return table.close({codes[i] / 8, int(codes[i] % 8)}, leave); };
  for_each(slice, [&](int64_t i) {
    if (leave && removed[i] >= 0) {  // gone already; what passed its place by comes back now
      close(i);
      return;
    }
    const int64_t home = home_of(slice.keys[i], table.buckets);
    const Place place = table.find(slice.keys[i], home, leave, Any());
    removed[i] = place.bucket < 0 ? -1 : row_at(table.at(place.bucket), place.place);
    slice.flags[i] = leave || place.bucket == kOutside;
    if (place.bucket < 0) return;
    table.take_out(place, home);
    codes[i] = place.bucket * 8 + place.place;
    if (leave) close(i);
  });
  if (leave) return;
  for_each(slice, [&](int64_t i) {
    if (removed[i] >= 0) slice.flags[i] = !close(i);
  });
}

template <class... Formal, class... Actual>
cudaError_t over(const StoreSlice& slice, void (*kernel)(StoreSlice, Formal...), cudaStream_t stream,
                 Actual... arguments) {
  if (slice.later) return launch(kernel, dim3(1, 1, 1), dim3(1, 1, 1), stream, slice, arguments...);
  return launch(kernel, blocks_for(slice.parts), dim3(kThreads, 1, 1), stream, slice, arguments...);
}

}  // namespace

cudaError_t store_find(const uint64_t* table, int64_t buckets, const uint64_t* keys, int64_t* rows, int64_t n,
                       cudaStream_t stream) {
  const Table view{const_cast<uint64_t*>(table), buckets};
  return launch(find_kernel, blocks_for(n), dim3(kThreads, 1, 1), stream, view, keys, rows, n);
}
cudaError_t store_parts(int64_t buckets, const uint64_t* keys, int64_t* parts, int64_t n, cudaStream_t stream) {
  return launch(parts_kernel, blocks_for(n), dim3(kThreads, 1, 1), stream, buckets, keys, parts, n);
}
cudaError_t store_upsert(const StoreSlice& slice, const StoreUpsert& work, cudaStream_t stream) {
  return over(slice, upsert_kernel, stream, work);
}
cudaError_t store_give_rows(const StoreSlice& slice, const StoreUpsert& work, cudaStream_t stream) {
  return over(slice, give_rows_kernel, stream, work);
}
cudaError_t store_erase(const StoreSlice& slice, int64_t* removed, int64_t* codes, cudaStream_t stream) {
  return over(slice, erase_kernel, stream, removed, codes);
}

}  // namespace mk::cuda
