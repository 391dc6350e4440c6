// Arguments and kernel table of segment_attention; included by the host side and by every ISA level.
#pragma once
#include "cpu/kernels.h"

namespace mk::cpu {

// A tensor "rows NH width" by its element strides; the last dimension is contiguous.
struct SegmentTensor {
  const void* data;
  int64_t row, h, width;
};

// A row with more edges is worked on in runs of so many, joined in order: the split knows nothing of threads.
constexpr int64_t kSegmentRun = 256;
constexpr int64_t kSegmentChunk = 64;   // edges whose rows are gathered together; a multiple of every vector length
constexpr int64_t kSegmentLanes = 256;  // the square of the longest vector: products before they are added up

// The graph seen from its nodes (near rows are sources), or transposed, from its sources (near rows are nodes). Own and
// near rows have a left part of width D (query, key) and a right part of width V (value, dout; no data: none).
struct SegmentSide {
  const int64_t *ptr, *near;
  const int64_t* edge;  // the edge at each place; null: the place itself
  int64_t rows, edges;
  SegmentTensor own_left, own_right, near_left, near_right;
  bool numbers_near;             // base, unit and delta belong to the near rows
  void *dleft, *dright, *dbias;  // gradients of the own rows and of edge_bias, contiguous; null: not wanted
};

struct SegmentArgs {
  SegmentSide side;
  int64_t heads, nodes;
  double scale;
  const void* bias;  // "E NH" or null
  int64_t bias_e;
  void *out, *lse, *stats, *exact;  // written by forward, contiguous; exact may be null
  // Backward. A weight is unit exp(score - base), its score's gradient weight (dout . value - delta): base, unit and
  // delta lie in numbers [nodes][3][segment_heads], written by prepare() from what forward saved.
  const void *saved_out, *saved_stats;
  SegmentTensor dout, dlse;
  bool saved_exact;  // saved_out is of the accumulation type
  void* numbers;
};

MK_INLINE constexpr int64_t segment_padded(int64_t n) { return (n + 15) / 16 * 16; }
// Numbers of an edge lie head by head, in groups of as many heads as a vector holds, the last or only one filled up to
// a power of two: at most so many in all.
MK_INLINE constexpr int64_t segment_heads(int64_t n) { return n > 8 ? segment_padded(n) : n > 4 ? 8 : n > 2 ? 4 : n; }
// Elements of the accumulation type: what a run leaves (forward: sums, maxima, sums of weights; backward: gradients),
// and what a call of forward() or backward() needs besides.
MK_INLINE int64_t segment_rows(const SegmentArgs& a) {
  return a.heads * (segment_padded(a.side.own_left.width) + segment_padded(a.side.near_right.width));
}
MK_INLINE int64_t segment_slot(const SegmentArgs& a) { return segment_rows(a) + segment_padded(2 * a.heads); }
MK_INLINE int64_t segment_scratch(const SegmentArgs& a) {
  return segment_slot(a) + segment_rows(a) + 2 * segment_heads(a.heads) * kSegmentChunk + kSegmentLanes +
         3 * segment_padded(a.heads);
}

struct SegmentAttentionKernels {
  // Rows [begin, end) whose edges are one run: all of it. The others are left out,
  void (*forward[kFloatTypes])(const SegmentArgs&, int64_t begin, int64_t end, void* scratch);
  void (*backward[kFloatTypes])(const SegmentArgs&, int64_t begin, int64_t end, void* scratch);
  // and done by runs: edges [first, last) of one row into a slot,
  void (*forward_run[kFloatTypes])(const SegmentArgs&, int64_t row, int64_t first, int64_t last, void* slot,
                                   void* scratch);
  void (*backward_run[kFloatTypes])(const SegmentArgs&, int64_t row, int64_t first, int64_t last, void* slot,
                                    void* scratch);
  // the slots of a row then joined in order into the first one, and written.
  void (*forward_join[kFloatTypes])(const SegmentArgs&, int64_t row, void* slots, int64_t count);
  void (*backward_join[kFloatTypes])(const SegmentArgs&, int64_t row, void* slots, int64_t count);
  void (*prepare[kFloatTypes])(const SegmentArgs&, int64_t begin, int64_t end);
};

MK_KERNELS(SegmentAttentionKernels, segment_attention)

}  // namespace mk::cpu
