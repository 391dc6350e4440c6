// Arguments and kernel table of content_read and content_address, which is the same without the reading.
#pragma once
#include "cpu/kernels.h"

namespace mk::cpu {

enum class Similarity : int { cosine, dot, l2 };

// Element strides; the last dimension of every tensor is contiguous. Absent tensors are null.
struct ContentArgs {
  const void *memory, *key, *strength,
      *value;                    // [B, N, W], [B, R, W], [B, R], [B, N, V]; without value the memory is read
  const bool* mask;              // [B, N]
  void *read, *weights, *total;  // outputs, contiguous; total and stats in the accumulation type
  void* stats;                   // [B, R, 2]: largest logit, sum of exp(logit - largest)
  void* logits;                  // [B, R, N], accumulation type, when weights are wanted; may be `weights` itself
  const void *dread, *dweights;  // [B, R, V], [B, R, N]
  void *dmemory, *dkey, *dstrength, *dvalue;  // contiguous
  void* delta;                                // [B, R], accumulation type: sum_n weights * (gradient of the weights)
  int64_t batch, rows, width, heads, value_width;
  int64_t memory_b, memory_n, key_b, key_r, strength_b, value_b, value_n, mask_b, dread_b, dread_r, dweights_b,
      dweights_r;
  int64_t tile;  // rows taken at a time, at most 64
  Similarity similarity;
  bool reads;  // false: content_address
};

// Sizes in elements of the accumulation type. A forward partial holds, per head, the largest logit, the sum of
// exponentials and the weighted sum of values; a backward partial holds dkey, and five numbers
// (content_backward.inl.h).
MK_INLINE int64_t forward_partial(const ContentArgs& a) { return a.heads * (2 + (a.reads ? a.value_width : 0)); }
MK_INLINE int64_t backward_partial(const ContentArgs& a) { return a.heads * (a.width + 5); }
MK_INLINE int64_t content_scratch(const ContentArgs& a) {
  return a.heads * (a.width + a.value_width + 8 + 3 * 64) + 3 * 64 + 64;
}

// Kernels work on rows [begin, end) of batch entry b; partials of the chunks of an entry lie one after the other.
struct ContentKernels {
  void (*forward[kFloatTypes])(const ContentArgs&, int64_t b, int64_t begin, int64_t end, void* partial, void* scratch);
  void (*combine[kFloatTypes])(const ContentArgs&, int64_t b, const void* partials, int64_t chunks);
  void (*weigh[kFloatTypes])(const ContentArgs&, int64_t b, int64_t begin, int64_t end);
  // partial[r] = sum over the rows of weights * dweights.
  void (*center[kFloatTypes])(const ContentArgs&, int64_t b, int64_t begin, int64_t end, void* partial, void* scratch);
  void (*delta[kFloatTypes])(const ContentArgs&, int64_t b, const void* partials, int64_t chunks);
  void (*backward[kFloatTypes])(const ContentArgs&, int64_t b, int64_t begin, int64_t end, void* partial,
                                void* scratch);
  void (*backward_combine[kFloatTypes])(const ContentArgs&, int64_t b, const void* partials, int64_t chunks);
};

MK_KERNELS(ContentKernels, content)

}  // namespace mk::cpu
