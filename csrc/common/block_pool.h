// Memory of large outputs, kept from one call to the next. malloc maps a block of 32 MB or more anew every time and
// often trims its heap by smaller ones; the new pages cost a fault and clearing each: half the time of a backward pass
// whose gradients are as large as what it reads (4 queries over 65,536 keys of 8 heads: 62 ms, 30 ms with memory that
// was there). MADV_FREE on what is idle would let the system take it when it runs short; it costs 5% of that pass.
#pragma once
#include <cstdint>

namespace mk::block_pool {

constexpr int64_t kLeast = int64_t(4) << 20;  // bytes

// A block that starts on a 2 MB page and holds anything. Null where there is none: not Linux, no memory, a limit of 0.
void* take(int64_t bytes);
void give_back(void* block);
// Whether this is the start of a block that was written to before: its pages are there.
bool used_before(const void* block);

void set_limit(int64_t bytes);  // of what is idle; at first a sixteenth of the machine's memory
void release();                 // what is idle goes back to the system

}  // namespace mk::block_pool
