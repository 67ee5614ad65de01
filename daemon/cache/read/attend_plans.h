// Plans of attention, kept for the next layer and the next step. A plan says which blocks a batch attends
// over and what every tier's backend has prepared for them; as long as no table, length or query position of
// the batch changes, it serves every layer of the group.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/backend.h"
#include "kernels/base/mutex.h"

namespace kvtide {

struct AttendPlanKey {
  // What a plan is for: the group and the sequences, with their numbers of queries. The last plan of the same
  // shape is what the next one is made from.
  std::vector<uint64_t> shape;
  // And what it was made of: snapshots, lengths, positions, masks.
  std::vector<uint64_t> content;
};

struct CachedAttendPlan {
  struct TierPart {
    int tier = 0;
    std::vector<size_t> items;  // of the call, which have blocks in this tier
    double pass_bytes = 0;      // of these blocks, one layer, in all passes over them
    std::unique_ptr<AttendPlan> plan;
  };
  AttendPlanKey key;
  std::vector<TierPart> parts;
  std::vector<int> parts_of_item;  // in how many parts each item is
  std::vector<std::shared_ptr<const Profile>> profiles;
  uint64_t blocks = 0, blocks_below_tier0 = 0;  // that the call reads
  std::vector<uint64_t> tier_bytes;             // of them, by tier, in one layer

  size_t DeviceBytes() const;
};

class AttendPlans {
 public:
  // At most so many, and so many bytes of devices' memory.
  AttendPlans(size_t most, size_t most_bytes) : most_(most), most_bytes_(most_bytes) {}

  // The plan of this key, out of the cache until it is put back; null if there is none.
  std::unique_ptr<CachedAttendPlan> Take(const AttendPlanKey& key);
  // Any plan of this shape, the latest first: what it was made of is out of date.
  std::unique_ptr<CachedAttendPlan> TakeShape(const AttendPlanKey& key);
  // Forgets those that were not used for longest if there are too many.
  void Put(std::unique_ptr<CachedAttendPlan> plan);
  size_t size() const;
  size_t bytes() const;

 private:
  template <class Fits>
  std::unique_ptr<CachedAttendPlan> TakeWhere(Fits fits);

  struct Kept {
    std::unique_ptr<CachedAttendPlan> plan;
    size_t bytes = 0;
  };

  const size_t most_, most_bytes_;
  mutable Mutex mu_;
  std::vector<Kept> plans_ ABSL_GUARDED_BY(mu_);  // the latest last
  size_t bytes_ ABSL_GUARDED_BY(mu_) = 0;         // of all of them
};

}  // namespace kvtide
