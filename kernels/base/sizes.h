// Sizes and counts from outside, multiplied and added without wrapping around: the result says whether it
// fits, and whoever asked turns that into an error of its own words.
#pragma once

#include <concepts>
#include <limits>
#include <optional>
#include <type_traits>

namespace kvtide {

// nullopt if the sum or product does not fit T.
template <std::integral T>
constexpr std::optional<T> CheckedAdd(T a, std::type_identity_t<T> b) {
  T sum;
  if (__builtin_add_overflow(a, b, &sum)) return std::nullopt;
  return sum;
}
template <std::integral T>
constexpr std::optional<T> CheckedMul(T a, std::type_identity_t<T> b) {
  T product;
  if (__builtin_mul_overflow(a, b, &product)) return std::nullopt;
  return product;
}

// Of any number of factors: CheckedProduct<size_t>(rows, heads, dim, 2). Negative factors do not fit an
// unsigned T. nullopt too if a partial product does not fit although a later factor is 0.
template <std::integral T, std::integral... Factors>
constexpr std::optional<T> CheckedProduct(Factors... factors) {
  T product = 1;
  const bool fits = (... && !__builtin_mul_overflow(product, factors, &product));
  return fits ? std::optional<T>(product) : std::nullopt;
}

// The same for a bound that does not matter exactly: the largest T in place of what does not fit.
template <std::integral T>
constexpr T SaturatingMul(T a, std::type_identity_t<T> b) {
  T product;
  if (!__builtin_mul_overflow(a, b, &product)) return product;
  return (a < 0) == (b < 0) ? std::numeric_limits<T>::max() : std::numeric_limits<T>::min();
}
template <std::integral T>
constexpr T SaturatingAdd(T a, std::type_identity_t<T> b) {
  T sum;
  if (!__builtin_add_overflow(a, b, &sum)) return sum;
  return b < 0 ? std::numeric_limits<T>::min() : std::numeric_limits<T>::max();
}

// a / b rounded up, and `a` rounded up to a multiple of `b`; a >= 0, b > 0.
template <std::integral T>
constexpr T DivideUp(T a, std::type_identity_t<T> b) {
  return a / b + (a % b != 0 ? 1 : 0);
}
template <std::integral T>
constexpr T RoundUp(T a, std::type_identity_t<T> b) {
  return DivideUp(a, b) * b;
}

}  // namespace kvtide
