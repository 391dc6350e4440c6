// The logarithm of floats by a table, in half of the instructions of the general one.
#pragma once

namespace mk::cpu::MK_LEVEL {
namespace {

// x = 2^e m with m from 3/4 to 3/2, and 5 bits of m choose c, about 1/m: log x = e ln2 - log c + log(1 + r), where r =
// m c - 1 lies between -1/64 and 1/32. c is 1 on either side of m = 1, so that nothing cancels there; elsewhere c is
// such that -log c, plus ln2 where e counts from m / 2, is a float but for 3e-12. Within 1.6 ulp; of 0: -inf, of what
// is negative: NaN.
alignas(64) constexpr float kLogReciprocal[32] = {
    1.0f,       0.95706284f, 0.9281467f, 0.9015071f,  0.87743896f, 0.8537763f,  0.8324992f,  0.8100589f,
    0.7897216f, 0.77118164f, 0.7538069f, 0.73519397f, 0.7200946f,  0.70387787f, 0.68860406f, 0.6743972f,
    1.3179741f, 1.2903981f,  1.2686924f, 1.240959f,   1.2205979f,  1.1978965f,  1.1746466f,  1.1541452f,
    1.1338739f, 1.1147773f,  1.0958539f, 1.0763237f,  1.0587376f,  1.040094f,   1.0219792f,  1.0f};
alignas(64) constexpr float kLogOfReciprocal[32] = {
    0.0f,        0.043886226f, 0.074565455f, 0.10368738f, 0.13074788f, 0.15808609f, 0.18332301f, 0.21064833f,
    0.23607479f, 0.25983134f,  0.28261906f,  0.3076209f,  0.32837266f, 0.35115042f, 0.37308884f, 0.39393607f,
    0.4170514f,  0.4381964f,   0.45516044f,  0.47726268f, 0.4938064f,  0.5125801f,  0.53217983f, 0.54978716f,
    0.56750715f, 0.5844925f,   0.6016133f,   0.6195959f,  0.6360699f,  0.6538361f,  0.67140603f, 0.6931472f};
constexpr float kLogSeries[3] = {-0.2439804f, 0.33336633f, -0.5000012f};  // of (log(1 + r) - r) / r^2

MK_INLINE Vec<float> log(Vec<float> x) {
  const __m512 m = _mm512_getmant_ps(x.v, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_nan);
  const __m512i place = _mm512_srli_epi32(_mm512_castps_si512(m), 18);
  const auto look_up = [&](const float* table) {
    return Vec<float>{_mm512_permutex2var_ps(_mm512_load_ps(table), place, _mm512_load_ps(table + 16))};
  };
  const Vec<float> r = fma({m}, look_up(kLogReciprocal), Vec<float>::set1(-1));
  const Vec<float> whole = fma(exponent(x), Vec<float>::set1(0.693147182464599609375f), look_up(kLogOfReciprocal));
  return whole + fma(r * r, polynomial(r, kLogSeries), r);
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
