#include "kernels/format/tide_maker.h"

#include <algorithm>
#include <cmath>
#include <complex>
#include <cstddef>
#include <numbers>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"
#include "kernels/format/tide.h"

namespace kvtide {
namespace {

using Matrix = std::vector<double>;  // square, row-major

// Directions that no query of the text looked at still count this share of the mean.
constexpr double kLeastQueryShare = 1e-3;
// Coefficients weaker than this share of the strongest are scaled no further, so that the inverse stays tame.
constexpr double kLeastVariance = 1e-9;

// The error of a coefficient of variance 1 at each width.
constexpr double kError[kMostTideWidth + 1] = {1,         0.36338,   0.117482,  0.034549,
                                               0.0095062, 0.0025211, 0.00066242};

// The pairs of channels that RoPE turns, and the rest in pairs that it does not.
struct Pair {
  size_t first, second;
  double frequency;
};
std::vector<Pair> PairsOf(size_t dim, const Rope& rope) {
  std::vector<Pair> pairs;
  const int n = static_cast<int>(rope.frequencies.size());
  for (int i = 0; i < n; i++)
    pairs.push_back({static_cast<size_t>(PairFirstChannel(rope.pairs, i)),
                     static_cast<size_t>(PairSecondChannel(rope.pairs, i, n)),
                     static_cast<double>(rope.frequencies[static_cast<size_t>(i)])});
  for (size_t c = 2 * static_cast<size_t>(n); c < dim; c += 2) pairs.push_back({c, c + 1, 0});
  return pairs;
}

// The mean of exp(i angle n) over all pairs of tokens of a window of `span`, n = 0 .. span - 1 apart.
std::complex<double> MeanTurn(double angle, int64_t span) {
  const auto n = static_cast<double>(span);
  if (std::abs(angle) * n < 1e-3) return {1, angle * (n - 1) / 3};
  const std::complex<double> turn = std::polar(1.0, angle),
                             all = std::polar(1.0, std::fmod(angle * (n + 1), 2 * std::numbers::pi));
  return (n - (n + 1) * turn + all) / ((1.0 - turn) * (1.0 - turn)) * 2.0 / (n * (n + 1));
}

// Eigenvalues, descending, with their vectors as columns, of a symmetric matrix: cyclic Jacobi rotations.
struct Eigen {
  std::vector<double> values;
  Matrix vectors;
};
Eigen Decompose(size_t n, Matrix a) {
  Matrix v(n * n, 0.0);
  for (size_t i = 0; i < n; i++) v[i * n + i] = 1;
  double total = 0;
  for (const double x : a) total += x * x;
  for (int sweep = 0; sweep < 60; sweep++) {
    double off = 0;
    for (size_t p = 0; p < n; p++)
      for (size_t q = 0; q < p; q++) off += a[p * n + q] * a[p * n + q];
    if (off <= 1e-26 * total) break;
    for (size_t p = 0; p < n; p++)
      for (size_t q = p + 1; q < n; q++) {
        const double apq = a[p * n + q];
        if (apq == 0) continue;
        const double theta = (a[q * n + q] - a[p * n + p]) / (2 * apq);
        const double t = (theta < 0 ? -1 : 1) / (std::abs(theta) + std::sqrt(theta * theta + 1));
        const double c = 1 / std::sqrt(t * t + 1), s = t * c;
        // Rows p and q, then the columns by symmetry.
        double *row_p = a.data() + p * n, *row_q = a.data() + q * n;
        const double app = row_p[p], aqq = row_q[q];
        for (size_t i = 0; i < n; i++) {
          const double x = row_p[i], y = row_q[i];
          row_p[i] = c * x - s * y;
          row_q[i] = s * x + c * y;
        }
        for (size_t i = 0; i < n; i++) {
          a[i * n + p] = row_p[i];
          a[i * n + q] = row_q[i];
        }
        row_p[p] = app - t * apq;
        row_q[q] = aqq + t * apq;
        row_p[q] = row_q[p] = 0;
        double *vec_p = v.data() + p * n, *vec_q = v.data() + q * n;  // vectors as rows here
        for (size_t i = 0; i < n; i++) {
          const double x = vec_p[i], y = vec_q[i];
          vec_p[i] = c * x - s * y;
          vec_q[i] = s * x + c * y;
        }
      }
  }
  std::vector<size_t> order(n);
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t x, size_t y) { return a[x * n + x] > a[y * n + y]; });
  Eigen eigen{std::vector<double>(n), Matrix(n * n)};
  for (size_t j = 0; j < n; j++) {
    eigen.values[j] = a[order[j] * n + order[j]];
    for (size_t i = 0; i < n; i++) eigen.vectors[i * n + j] = v[order[j] * n + i];
  }
  return eigen;
}

Matrix Multiply(size_t n, const Matrix& a, const Matrix& b) {
  Matrix c(n * n, 0.0);
  for (size_t i = 0; i < n; i++)
    for (size_t k = 0; k < n; k++)
      for (size_t j = 0; j < n; j++) c[i * n + j] += a[i * n + k] * b[k * n + j];
  return c;
}

// The symmetric square root of a positive definite matrix.
Matrix SquareRoot(size_t n, const Matrix& a) {
  const Eigen eigen = Decompose(n, a);
  Matrix root(n * n, 0.0);
  for (size_t k = 0; k < n; k++) {
    const double value = std::sqrt(std::max(0.0, eigen.values[k]));
    for (size_t i = 0; i < n; i++)
      for (size_t j = 0; j < n; j++)
        root[i * n + j] += value * eigen.vectors[i * n + k] * eigen.vectors[j * n + k];
  }
  return root;
}

// Units given out one by one to the group where the next bit lowers the harm most.
void GiveOut(std::span<const double> harms, int units, std::span<uint8_t> widths) {
  std::fill(widths.begin(), widths.end(), uint8_t{0});
  for (; units > 0; units--) {
    size_t best = harms.size();
    double most = 0;
    for (size_t g = 0; g < harms.size(); g++) {
      if (widths[g] == kMostTideWidth) continue;
      const double gain = harms[g] * (kError[widths[g]] - kError[widths[g] + 1]);
      if (best == harms.size() || gain > most) {
        best = g;
        most = gain;
      }
    }
    if (best == harms.size()) return;
    widths[best]++;
  }
}

absl::StatusOr<HeadProfile> MakeHead(const KeyStatistics& statistics, const TideBudget& budget) {
  const size_t n = static_cast<size_t>(statistics.head_dim());
  Matrix metric = statistics.QueryMetric();
  double trace = 0;
  for (size_t i = 0; i < n; i++) trace += metric[i * n + i];
  if (!(trace > 0)) return absl::InvalidArgumentError("the text has no queries, or they are all zero");
  for (size_t i = 0; i < n; i++) metric[i * n + i] += kLeastQueryShare * trace / static_cast<double>(n);
  const Matrix root = SquareRoot(n, metric);
  const Eigen eigen = Decompose(n, Multiply(n, Multiply(n, root, statistics.KeyCovariance()), root));
  HeadProfile head;
  for (const double mean : statistics.Mean()) head.mean.push_back(static_cast<float>(mean));
  for (const double mean : statistics.Centre()) head.centre.push_back(static_cast<float>(mean));
  head.rope = statistics.rope();
  // transform[i][j] = (root V)[i][j] / sqrt(variance j): z = V' root X.
  const Matrix turned = Multiply(n, root, eigen.vectors);
  head.transform.resize(n * n);
  const double least = std::max(eigen.values[0] * kLeastVariance, 1e-20);
  for (size_t i = 0; i < n; i++)
    for (size_t j = 0; j < n; j++)
      head.transform[i * n + j] =
          static_cast<float>(turned[i * n + j] / std::sqrt(std::max(eigen.values[j], least)));
  std::vector<double> harms(n / kTideGroup);
  for (size_t j = 0; j < n; j++) harms[j / kTideGroup] += std::max(eigen.values[j], 0.0);
  const int stored = StoredDim(statistics.head_dim());
  const size_t groups = static_cast<size_t>(stored / kTideGroup);
  head.widths.resize(kTideTypes * groups);
  for (size_t type = 0; type < kTideTypes; type++) {
    const int most = TideUnits(kTideBits[type], stored), units = budget.units[type];
    if (units < 0 || units > most)
      return absl::InvalidArgumentError(absl::StrCat(kTideNames[type], " has room for 1 to ", most,
                                                     " bit planes at ", stored, " channels, not for ", units));
    GiveOut(harms, units == 0 ? most : units, std::span(head.widths).subspan(type * groups, harms.size()));
  }
  KVTIDE_RETURN_IF_ERROR(CompleteTransform(statistics.head_dim(), head));
  return head;
}

}  // namespace

KeyStatistics::KeyStatistics(int head_dim, const Rope& rope)
    : dim_(static_cast<size_t>(head_dim)), rope_(rope), sum_(dim_), turned_sum_(dim_) {}

void KeyStatistics::AddTurnedBack(const float* rows, int n, size_t stride, int heads, int64_t position,
                                  double* sum, std::vector<double>& products) const {
  std::vector<float> row(dim_);
  std::vector<double> x(dim_);
  for (int r = 0; r < n * heads; r++) {
    const int t = r / heads;
    std::copy_n(rows + static_cast<size_t>(t) * stride + static_cast<size_t>(r % heads) * dim_, dim_,
                row.begin());
    TurnKey(rope_, position + t, 0, true, row.data());
    std::copy(row.begin(), row.end(), x.begin());
    for (size_t i = 0; i < dim_; i++) {
      sum[i] += x[i];
      double* const target = products.data() + i * dim_;
      for (size_t j = 0; j <= i; j++) target[j] += x[i] * x[j];
    }
  }
}

void KeyStatistics::AddKeys(const float* rows, int n, size_t stride, int64_t position) {
  for (int t = 0; t < n; t++)
    for (size_t i = 0; i < dim_; i++)
      sum_[i] += static_cast<double>(rows[static_cast<size_t>(t) * stride + i]);
  key_products_.resize(dim_ * dim_);
  AddTurnedBack(rows, n, stride, 1, position, turned_sum_.data(), key_products_);
  keys_ += n;
}

void KeyStatistics::AddQueries(const float* rows, int n, size_t stride, int64_t position, int heads) {
  std::vector<double> unused(dim_);
  query_products_.resize(dim_ * dim_);
  AddTurnedBack(rows, n, stride, heads, position, unused.data(), query_products_);
  queries_ += int64_t{1} * n * heads;
  span_ = std::max(span_, position + n);
}

std::vector<double> KeyStatistics::Mean() const {
  std::vector<double> mean = sum_;
  for (double& x : mean) x /= static_cast<double>(std::max<int64_t>(1, keys_));
  return mean;
}

std::vector<double> KeyStatistics::Centre() const {
  std::vector<double> centre = turned_sum_;
  for (double& x : centre) x /= static_cast<double>(std::max<int64_t>(1, keys_));
  return centre;
}

std::vector<double> KeyStatistics::KeyCovariance() const {
  const std::vector<double> centre = Centre();
  std::vector<double> covariance(dim_ * dim_);
  if (keys_ == 0) return covariance;
  for (size_t i = 0; i < dim_; i++)
    for (size_t j = 0; j <= i; j++)
      covariance[i * dim_ + j] = covariance[j * dim_ + i] =
          key_products_[i * dim_ + j] / static_cast<double>(keys_) - centre[i] * centre[j];
  return covariance;
}

// A block of two pairs, taken as a map of complex numbers, is z -> a z + b conj(z); R(-n) multiplies z by
// exp(-i angle n), so that the mean over n multiplies a and b by a mean turn each.
std::vector<double> KeyStatistics::QueryMetric() const {
  Matrix metric(dim_ * dim_);
  if (queries_ == 0) return metric;
  const auto count = static_cast<double>(queries_);
  const auto moment = [&](size_t i, size_t j) {
    return query_products_[std::max(i, j) * dim_ + std::min(i, j)] / count;
  };
  const std::vector<Pair> pairs = PairsOf(dim_, rope_);
  for (const Pair& row : pairs)
    for (const Pair& column : pairs) {
      const double xx = moment(row.first, column.first), xy = moment(row.first, column.second),
                   yx = moment(row.second, column.first), yy = moment(row.second, column.second);
      const std::complex<double> a =
          std::complex<double>(xx + yy, yx - xy) / 2.0 * MeanTurn(row.frequency - column.frequency, span_);
      const std::complex<double> b =
          std::complex<double>(xx - yy, yx + xy) / 2.0 * MeanTurn(row.frequency + column.frequency, span_);
      metric[row.first * dim_ + column.first] = a.real() + b.real();
      metric[row.second * dim_ + column.first] = a.imag() + b.imag();
      metric[row.first * dim_ + column.second] = b.imag() - a.imag();
      metric[row.second * dim_ + column.second] = a.real() - b.real();
    }
  return metric;
}

absl::StatusOr<Profile> MakeTideProfile(const GroupShape& shape, std::span<const KeyStatistics> heads,
                                        const TideBudget& budget) {
  KVTIDE_CHECK(heads.size() == static_cast<size_t>(shape.layers * shape.kv_heads), heads.size(), " heads of ",
               shape.layers, " x ", shape.kv_heads);
  Profile profile;
  profile.shape = shape;
  for (size_t h = 0; h < heads.size(); h++) {
    const std::string where = absl::StrCat("layer ", h / static_cast<size_t>(shape.kv_heads), ", KV head ",
                                           h % static_cast<size_t>(shape.kv_heads));
    if (heads[h].keys() < int64_t{4} * shape.head_dim_k)
      return absl::InvalidArgumentError(
          absl::StrCat(where, ": ", heads[h].keys(), " keys are too few for a transform of ",
                       shape.head_dim_k, " channels: use at least ", 4 * shape.head_dim_k, " tokens"));
    absl::StatusOr<HeadProfile> head = MakeHead(heads[h], budget);
    if (!head.ok()) return Annotate(head.status(), where);
    profile.k.push_back(*std::move(head));
  }
  profile.hash = HashProfile(profile);
  return profile;
}

absl::StatusOr<Profile> MakeCalibratedProfile(const GroupShape& shape, std::span<const float> means,
                                              const KeyTransforms& transforms) {
  const size_t d = static_cast<size_t>(shape.head_dim_k),
               groups = static_cast<size_t>(StoredDim(shape.head_dim_k) / kTideGroup);
  const size_t layers = static_cast<size_t>(shape.layers), kv_heads = static_cast<size_t>(shape.kv_heads),
               heads = layers * kv_heads;
  const size_t pairs = transforms.frequencies.size() / layers;
  // Widths of a head; older profiles have fewer.
  const size_t each =
      groups * (transforms.widths.size() == heads * kLeastTideTypes * groups ? kLeastTideTypes : kTideTypes);
  if (means.size() != heads * d || transforms.centres.size() != heads * d ||
      transforms.matrices.size() != heads * d * d || transforms.widths.size() != heads * each ||
      transforms.frequencies.size() != layers * pairs)
    return absl::InvalidArgumentError(absl::StrCat(
        "profile of keys: ", means.size(), " means, ", transforms.centres.size(), " means of coded keys, ",
        transforms.matrices.size(), " values of transforms, ", transforms.widths.size(), " widths and ",
        transforms.frequencies.size(), " frequencies for ", layers, " layers of ", kv_heads, " heads of ", d,
        ", must be ", heads * d, ", ", heads * d, ", ", heads * d * d, ", ", heads * each,
        " and as many for each layer"));
  Profile profile;
  profile.shape = shape;
  profile.k.resize(heads);
  for (size_t h = 0; h < heads; h++) {
    HeadProfile& head = profile.k[h];
    const auto take = [](const auto& from, size_t at, size_t count, auto& to) {
      to.assign(from.begin() + static_cast<std::ptrdiff_t>(at * count),
                from.begin() + static_cast<std::ptrdiff_t>((at + 1) * count));
    };
    head.rope.pairs = transforms.pairs;
    take(transforms.frequencies, h / kv_heads, pairs, head.rope.frequencies);
    take(means, h, d, head.mean);
    take(transforms.centres, h, d, head.centre);
    take(transforms.matrices, h, d * d, head.transform);
    take(transforms.widths, h, each, head.widths);
    KVTIDE_RETURN_IF_ERROR(Annotate(CompleteTransform(shape.head_dim_k, head), absl::StrCat("head ", h)));
  }
  profile.hash = HashProfile(profile);
  return profile;
}

KeyTransforms TransformsOf(const Profile& profile) {
  KeyTransforms transforms;
  const auto add = [](const auto& from, auto& to) { to.insert(to.end(), from.begin(), from.end()); };
  for (size_t h = 0; h < profile.k.size(); h++) {
    const HeadProfile& head = profile.k[h];
    transforms.pairs = head.rope.pairs;
    if (h % static_cast<size_t>(profile.shape.kv_heads) == 0)
      add(head.rope.frequencies, transforms.frequencies);
    add(head.centre, transforms.centres);
    add(head.transform, transforms.matrices);
    add(head.widths, transforms.widths);
  }
  return transforms;
}

}  // namespace kvtide
