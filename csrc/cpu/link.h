// Arguments and kernel table of link_step and link_read; included by the host side and by every ISA level.
#pragma once
#include "cpu/kernels.h"

namespace mk::cpu {

// Element strides; the last dimension of every input is contiguous, outputs and gradients are contiguous.
struct LinkArgs {
  const void *link, *precedence, *write, *read;               // [B, H, N, N], [B, H, N] twice, [B, R, N]
  const void *dnew, *dprecedence_new, *dforward, *dbackward;  // upstream; null where none arrived
  void *link_new, *precedence_new, *forward, *backward;       // [B, H, N, N], [B, H, N], [B, R, H, N] twice
  void *dlink, *dprecedence, *dwrite, *dread;                 // a gradient nobody needs is null
  int64_t batch, heads, read_heads, rows;
  int64_t link_b, link_h, link_n, precedence_b, precedence_h, write_b, write_h, read_b, read_r;
  int64_t dnew_b, dnew_h, dnew_n, dprecedence_b, dprecedence_h;
  int64_t dforward_b, dforward_r, dforward_h, dbackward_b, dbackward_r, dbackward_h;
  bool update;  // link_step; else link_read, which has no precedence and no write weights
};

constexpr int64_t kLinkChunk = 128;  // rows a task owns; the same for every batch, thread count and level
constexpr int64_t kLinkTile = 16;    // rows whose sums are reduced together

MK_INLINE int64_t link_padded(const LinkArgs& a) { return (a.rows + 15) / 16 * 16; }
// Elements of the accumulation type: the column sums of a task, and what it keeps beside them.
MK_INLINE int64_t link_partial(const LinkArgs& a, bool backward) {
  return link_padded(a) * (a.read_heads + (backward && a.update ? 2 : 0));
}
MK_INLINE int64_t link_scratch(const LinkArgs& a, bool backward) {
  return link_padded(a) * (2 + a.read_heads * (backward ? 3 : 1)) + (a.read_heads + 1) * kLinkTile * 16 + kLinkTile;
}

// `at` is b * H + h. A task takes rows [begin, end) of one matrix and leaves its column sums in `partial`; combine adds
// those of all chunks in order and computes what no task can.
struct LinkKernels {
  void (*forward[kFloatTypes])(const LinkArgs&, int64_t at, int64_t begin, int64_t end, void* partial, void* scratch);
  void (*combine_forward[kFloatTypes])(const LinkArgs&, int64_t at, const void* partials, int64_t chunks);
  void (*backward[kFloatTypes])(const LinkArgs&, int64_t at, int64_t begin, int64_t end, void* partial, void* scratch);
  void (*combine_backward[kFloatTypes])(const LinkArgs&, int64_t b, const void* partials, int64_t chunks);
};

MK_KERNELS(LinkKernels, link)

}  // namespace mk::cpu
