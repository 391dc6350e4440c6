#pragma once
#include "common/types.h"

using __half = mk::float16;
inline float __half2float(__half x) { return mk::to_float(x); }
inline __half __float2half_rn(float x) { return mk::to_float16(x); }
