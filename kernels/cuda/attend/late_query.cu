#include <vector>

#include "kernels/cuda/attend/instantiate.cuh"
#include "kernels/cuda/attend/late_query.h"

namespace kvtide::cuda {
namespace {

template <class Kind>
__global__ void __launch_bounds__(32 * Kind::kRows, 1024 / (32 * Kind::kRows))
    LateQuery(const __grid_constant__ AttendParams params) {
  __shared__ __align__(128) uint8_t shared[Kind::kBytes];
  QueryBody<Kind>(params, blockIdx.x, shared);
}

template <class CodedQuery, class ExactQuery>
__global__ void __launch_bounds__(32 * CodedQuery::kRows, 1024 / (32 * CodedQuery::kRows))
    LateJointQuery(const __grid_constant__ JointParams params) {
  static_assert(CodedQuery::kRows == ExactQuery::kRows);
  __shared__ __align__(128)
      uint8_t shared[CodedQuery::kBytes > ExactQuery::kBytes ? CodedQuery::kBytes : ExactQuery::kBytes];
  if (blockIdx.x < params.coded_units) {
    QueryBody<CodedQuery>(params.coded, blockIdx.x, shared);
  } else {
    QueryBody<ExactQuery>(params.exact, blockIdx.x - params.coded_units, shared);
  }
}

// Queries are prepared alike for all kernels of these.
struct Entry {
  Form k;
  int dk, rows;
  const void *query, *joint;
};

template <bool kBf16, int D, int MT>
using HalfQuery = typename TileInfo<HalfTile<DeviceWarp, kBf16, D, D, MT, HalfTokens(D)>>::Query;

template <int D, int MT, bool kBf16>
void AddHalfQuery(std::vector<Entry>* list) {
  list->push_back({kBf16 ? Form::kBf16 : Form::kF16, D, 8 * MT,
                   reinterpret_cast<const void*>(&LateQuery<HalfQuery<kBf16, D, MT>>), nullptr});
}
template <int D, int MT, class... Codecs>
void AddCodedQueries(std::vector<Entry>* list) {
  const auto add = [list]<class K>() {
    using Query = typename TileInfo<CodedTile<DeviceWarp, K, K, D, D, MT>>::Query;
    Entry entry{FormOfCodec<K>(), D, 8 * MT, reinterpret_cast<const void*>(&LateQuery<Query>), nullptr};
    if constexpr (D <= 256)
      entry.joint = reinterpret_cast<const void*>(&LateJointQuery<Query, HalfQuery<false, D, MT>>);
    list->push_back(entry);
  };
  (add.template operator()<typename Codecs::Stored>(), ...);
}
template <int D, int MT>
void AddRows(std::vector<Entry>* list) {
  AddHalfQuery<D, MT, false>(list);
  AddCodedQueries<D, MT, Q8_0, Turbo4, Turbo3, Turbo2, Wht4>(list);
  if constexpr (D == 128) {
    AddHalfQuery<D, MT, true>(list);
    AddCodedQueries<D, MT, Q5_0, Q4_0>(list);
  }
}

const Entry* Find(const AttendKernel& kernel) {
  static const std::vector<Entry>* const list = [] {
    auto* all = new std::vector<Entry>;
    AddRows<64, 1>(all);
    AddRows<64, 2>(all);
    AddRows<96, 1>(all);
    AddRows<96, 2>(all);
    AddRows<128, 1>(all);
    AddRows<128, 2>(all);
    AddRows<192, 1>(all);
    AddRows<192, 2>(all);
    AddRows<256, 1>(all);
    AddRows<256, 2>(all);
    AddRows<512, 1>(all);
    return all;
  }();
  for (const Entry& entry : *list)
    if (entry.k == kernel.k && entry.dk == kernel.dk && entry.rows == kernel.rows) return &entry;
  return nullptr;
}

}  // namespace

const void* LateQueryKernel(const AttendKernel& kernel) {
  const Entry* const entry = Find(kernel);
  return entry == nullptr ? nullptr : entry->query;
}

const void* LateJointQueryKernel(const AttendKernel& kernel) {
  const Entry* const entry = Find(kernel);
  return entry == nullptr ? nullptr : entry->joint;
}

}  // namespace kvtide::cuda
