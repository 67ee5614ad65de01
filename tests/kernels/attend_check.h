// Runs one attention on a backend and in the float64 reference, over the same bytes, and compares them.
#pragma once

#include <memory>
#include <vector>

#include "kernels/backend.h"
#include "tests/kernels/test_sequence.h"

namespace kvtide::testing {

// What a single item asks for; queries stand at the end of the sequence unless first_query_position says
// otherwise.
struct AttendCase {
  int layer = 0;
  int group = 4;  // query heads per KV head
  int queries = 1;
  int64_t first_query_position = -1;
  float query_size = 1;  // standard deviation of the query values
  float scale = 0;       // of q.k; 0 = 1/sqrt(head_dim_k)
  bool causal = true;
  int64_t window = 0;
  float softcap = 0;
  std::vector<float> sinks;
  uint32_t seed = 1;
};

struct AttendResult {
  std::vector<float> out;  // [queries][heads][head_dim_v]
  std::vector<float> lse;  // [queries][heads]
};

std::vector<float> MakeQueries(const TestSequence& sequence, const AttendCase& c);
// Attention by the backend over its copy of the given runs.
AttendResult AttendOn(Backend& backend, const TestSequence& sequence, std::vector<BlockRun> runs,
                      const AttendCase& c, const std::vector<float>& q);
// The same by a plan, which the call makes of `plan` (null at first) and leaves there, and one layer on it,
// with q and out in a type; results are widened again.
AttendResult AttendByPlan(Backend& backend, const TestSequence& sequence, const std::vector<BlockRun>& runs,
                          const AttendCase& c, const std::vector<float>& q, DataType type,
                          std::unique_ptr<AttendPlan>& plan);
// Values rounded to a type.
std::vector<float> Rounded(const std::vector<float>& values, DataType type);
AttendResult AttendByReference(const TestSequence& sequence, const AttendCase& c,
                               const std::vector<float>& q);
// The same over f16 copies of the blocks: what a backend attends over that has no kernel for the pair. The
// rounding alone moves some rows by more than 1e-3 (planar3, dim 80).
AttendResult AttendByReferenceOverF16(const TestSequence& sequence, const AttendCase& c,
                                      const std::vector<float>& q);
// The same with keys of calibrated types that are coded before RoPE as RebuiltKeys has them.
AttendResult AttendByReferenceOverRebuilt(const TestSequence& sequence, const AttendCase& c,
                                          const std::vector<float>& q);

// The largest relative L2 distance of an output row of `got` from `wanted`; infinite if one is not finite.
double LargestDistance(const AttendResult& got, const AttendResult& wanted, int dim);
// Adds a failure if an output row differs by more than `tolerance` (relative L2) or an lse by more than 2e-3
// (twice the tolerance, if that is more) plus 2e-5 of its size: 16-bit queries bound it.
void ExpectClose(const AttendResult& got, const AttendResult& wanted, int dim, double tolerance);
// Adds a failure if results in a type are not those of f32 (of the same rounded queries), rounded.
void ExpectRounded(const AttendResult& got, const AttendResult& f32, int dim, DataType type);
// AttendOn and AttendByPlan against AttendByReference, or else AttendByReferenceOverF16, or else, with
// calibrated keys, AttendByReferenceOverRebuilt, which must be within kRebuiltDistance of the first. The
// tolerance is 1e-3, 3e-3 above kFewRows rows of a KV head (backends may compute those with f16 queries, keys
// and weights), and 5e-3 with calibrated keys, which they may turn as halves. Results in f16 and bf16 are
// compared with those of f32.
constexpr double kRebuiltDistance = 0.2;
constexpr int kFewRows = 64;
void CheckAttend(Backend& backend, const TestSequence& sequence, const AttendCase& c);

}  // namespace kvtide::testing
