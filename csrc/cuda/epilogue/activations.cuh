// Activations by the project's names, in float.
#pragma once

#include "../ptx/math.cuh"
#include "../ptx/platform.cuh"

namespace vlmops {

enum class Activation { none, gelu, gelu_tanh, quick_gelu, silu, relu };

template <Activation A>
VLMOPS_DEVICE float activate(float x) {
  if constexpr (A == Activation::gelu) {
    return 0.5f * x * (1.f + erf_exact(x * 0.7071067811865476f));
  } else if constexpr (A == Activation::gelu_tanh) {  // (1 + tanh(u)) / 2 = sigmoid(2 u)
    return x * sigmoid(1.5957691216057308f * fma(0.044715f * x * x, x, x));
  } else if constexpr (A == Activation::quick_gelu) {
    return x * sigmoid(1.702f * x);
  } else if constexpr (A == Activation::silu) {
    return x * sigmoid(x);
  } else if constexpr (A == Activation::relu) {
    return x < 0.f ? 0.f : x;  // a NaN stays one
  } else {
    return x;
  }
}

}  // namespace vlmops
