#pragma once
#include "common/types.h"

using __nv_bfloat16 = mk::bfloat16;
inline float __bfloat162float(__nv_bfloat16 x) { return mk::to_float(x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return mk::to_bfloat16(x); }
