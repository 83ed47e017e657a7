// Elementwise activations that no library fuses into its product.
#pragma once

#include "isa.h"

// x * sigmoid(1.702 x) in place on n elements of `dtype`.
VLMOPS_DECLARE(void, quick_gelu_inplace, void* x, long long n, int dtype)
