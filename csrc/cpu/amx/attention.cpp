// Attention of bfloat16 with AMX tiles; the other dtypes, and what the tiles do not cover, run the generic code at this
// level.
#include "cpu/amx/attention_backward.h"
#include "cpu/amx/attention_units.h"

namespace mk::cpu::MK_LEVEL {
namespace {

int64_t half_forward_scratch(const AttentionArgs& a) {
  const int64_t tiles = larger(HalfForward(a, nullptr).used, HalfUnits(a, nullptr).used);
  return larger(tiles, forward_scratch<float>(a));
}
int64_t half_backward_scratch(const AttentionArgs& a) {
  return larger(HalfBackward(a, nullptr).used, backward_scratch<float>(a));
}

}  // namespace

const AttentionKernels attention = {
    {forward_scratch<double>, forward_scratch<float>, half_forward_scratch, forward_scratch<float>},
    {backward_scratch<double>, backward_scratch<float>, half_backward_scratch, backward_scratch<float>},
    {forward<double, double>, forward<float, float>, half_forward, forward<float, float16>},
    MK_ATTENTION_TYPES(merge),
    MK_ATTENTION_TYPES(prepare),
    {restate_beyond<double, double>, restate_beyond<float, float>, half_restate_beyond, restate_beyond<float, float16>},
    MK_ATTENTION_TYPES(restate),
    MK_ATTENTION_TYPES(center),
    {backward<double, double>, backward<float, float>, half_backward, backward<float, float16>},
    MK_ATTENTION_TYPES(finish),
    MK_ATTENTION_TYPES(mask_backward),
    MK_ATTENTION_TYPES(sink_backward),
    {kQueryGroup, kQueryGroup, kHalfGroup, kQueryGroup},
    kBackwardKeys,
    kTaskQueries};

}  // namespace mk::cpu::MK_LEVEL
