// The kernel table of attention at one level.
#pragma once
#include "cpu/generic/attention_lanes.inl.h"
#include "cpu/generic/attention_mask.inl.h"

namespace mk::cpu::MK_LEVEL {

#define MK_ATTENTION_TYPES(function) \
  { function<double, double>, function<float, float>, function<float, bfloat16>, function<float, float16> }
#define MK_ATTENTION_SUMS(function) \
  { function<double>, function<float>, function<float>, function<float> }
#ifndef MK_ATTENTION_OVERRIDDEN
const AttentionKernels attention = {MK_ATTENTION_SUMS(forward_scratch),
                                    MK_ATTENTION_SUMS(backward_scratch),
                                    MK_ATTENTION_TYPES(forward),
                                    MK_ATTENTION_TYPES(merge),
                                    MK_ATTENTION_TYPES(prepare),
                                    MK_ATTENTION_TYPES(restate_beyond),
                                    MK_ATTENTION_TYPES(restate),
                                    MK_ATTENTION_TYPES(center),
                                    MK_ATTENTION_TYPES(backward),
                                    MK_ATTENTION_TYPES(finish),
                                    MK_ATTENTION_TYPES(mask_backward),
                                    MK_ATTENTION_TYPES(sink_backward),
                                    {kQueryGroup, kQueryGroup, kQueryGroup, kQueryGroup},
                                    kBackwardKeys,
                                    kBackwardQueries};
#endif

}  // namespace mk::cpu::MK_LEVEL
