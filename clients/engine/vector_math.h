// The element-wise parts of a transformer on rows of floats: norms, SiLU, softmax pieces and the distances
// between two predictions. Vectorised for the CPU that runs it; pure functions, any thread.
#pragma once

#include <cstddef>

namespace kvtide::engine {

// out = x / rms(x) * weight. `out` may be `x`.
void RmsNorm(const float* x, const float* weight, size_t n, float epsilon, float* out);

// gate = silu(gate) * up.
void SiluMultiply(float* gate, const float* up, size_t n);

// gate = gelu(gate) * up, GELU by its tanh form.
void GeluMultiply(float* gate, const float* up, size_t n);

// x = cap * tanh(x / cap).
void SoftCap(float* x, size_t n, float cap);

// x += y.
void AddTo(float* x, const float* y, size_t n);

void Scale(float* x, size_t n, float factor);

float Maximum(const float* x, size_t n);

// x = exp(x - shift); returns the sum.
float ExpShifted(float* x, size_t n, float shift);

// log of the sum of exp(x).
double LogSumExp(const float* x, size_t n);

// Kullback-Leibler divergence in nats of softmax(q) from softmax(p), given the log-sum-exp of both.
double KlDivergence(const float* p, double p_lse, const float* q, double q_lse, size_t n);

}  // namespace kvtide::engine
