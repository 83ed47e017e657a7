// Elementary functions on Vec, written once over the primitives of each set.
//
// Coefficients: minimax fits of our own (Lawson iteration in float64, rounded once to float32).
#pragma once

namespace vlmops {
namespace VLMOPS_ISA {

// e^x. inf above 88.73, 0 below -104, NaN for NaN.
VLMOPS_INLINE Vec exp(Vec x) {
  // min/max in this order return x where x is NaN on x86; elsewhere NaN survives by itself.
  const Vec c = max(set1(-104.f), min(set1(89.f), x));
  const Vec n = round(c * set1(1.442695041f));
  Vec r = fnma(n, set1(0.693145752f), c);  // ln 2 in two parts, the first exact in 16 bits
  r = fnma(n, set1(1.428606820e-6f), r);
  Vec p = set1(1.381454058e-3f);
  p = fma(p, r, set1(8.368745446e-3f));
  p = fma(p, r, set1(4.166838899e-2f));
  p = fma(p, r, set1(1.666652113e-1f));
  p = fma(p, r, set1(4.999999404e-1f));
  p = fma(p, r * r, r);
  return scale2(p + set1(1.f), n);
}

// 1 / (1 + e^-x).
VLMOPS_INLINE Vec sigmoid(Vec x) { return set1(1.f) / (set1(1.f) + exp(-x)); }

// Natural logarithm of a positive normal number.
VLMOPS_INLINE Vec log(Vec x) {
  Vec e;
  const Vec f = split2(x, e) - set1(1.f);
  Vec p = set1(-7.634497434e-2f);
  p = fma(p, f, set1(1.276157796e-1f));
  p = fma(p, f, set1(-1.316018254e-1f));
  p = fma(p, f, set1(1.420175731e-1f));
  p = fma(p, f, set1(-1.662335694e-1f));
  p = fma(p, f, set1(2.000122666e-1f));
  p = fma(p, f, set1(-2.500081956e-1f));
  p = fma(p, f, set1(3.333333135e-1f));
  const Vec ff = f * f;
  Vec t = fma(e, set1(1.428606820e-6f), p * (ff * f));
  t = fma(ff, set1(-0.5f), t);
  return fma(e, set1(0.693145752f), t + f);
}

VLMOPS_INLINE Vec tanh(Vec x) {
  const Vec a = abs(x);
  const Vec s = x * x;
  Vec p = set1(-5.704986863e-3f);
  p = fma(p, s, set1(2.063908800e-2f));
  p = fma(p, s, set1(-5.373971537e-2f));
  p = fma(p, s, set1(1.333144158e-1f));
  p = fma(p, s, set1(-3.333328068e-1f));
  const Vec small = fma(p * s, x, x);
  const Vec big = set1(1.f) - set1(2.f) / (exp(a + a) + set1(1.f));
  return select(lt(a, set1(0.625f)), small, copysign(big, x));
}

VLMOPS_INLINE Vec erf(Vec x) {
  const Vec a = abs(x);
  const Vec s = x * x;
  Vec p = set1(-5.862082471e-4f);
  p = fma(p, s, set1(4.967506975e-3f));
  p = fma(p, s, set1(-2.674886398e-2f));
  p = fma(p, s, set1(1.128132045e-1f));
  p = fma(p, s, set1(-3.761244714e-1f));
  p = fma(p, s, set1(1.283791363e-1f));
  const Vec small = fma(p, x, x);
  // 1 - exp(-a (1 + poly(a))); at 3.95 it has reached 1 in float32.
  const Vec b = min(set1(3.95f), a);
  Vec q = set1(-2.145949402e-4f);
  q = fma(q, b, set1(3.219974926e-3f));
  q = fma(q, b, set1(-2.290602960e-2f));
  q = fma(q, b, set1(1.052868515e-1f));
  q = fma(q, b, set1(6.356993914e-1f));
  q = fma(q, b, set1(1.285199523e-1f));
  const Vec big = set1(1.f) - exp(-fma(q, b, b));
  return select(lt(a, set1(0.9375f)), small, copysign(big, x));
}

}  // namespace VLMOPS_ISA
}  // namespace vlmops
