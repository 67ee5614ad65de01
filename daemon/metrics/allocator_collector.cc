#include "daemon/metrics/allocator_collector.h"

#include <cstdint>

#include "daemon/metrics/family.h"

// Weak: null unless the program links jemalloc.
extern "C" int mallctl(const char* name, void* old_value, size_t* old_length, void* new_value,
                       size_t new_length) __attribute__((weak));

namespace kvtide::metrics {

Mallctl ProcessMallctl() { return &mallctl; }

std::vector<prometheus::MetricFamily> AllocatorCollector::Collect() const {
  if (mallctl_ == nullptr) return {};
  // jemalloc refreshes its numbers when the epoch is written.
  uint64_t epoch = 1;
  size_t length = sizeof(epoch);
  if (mallctl_("epoch", &epoch, &length, &epoch, sizeof(epoch)) != 0) return {};

  std::vector<prometheus::MetricFamily> families;
  FamilyWriter writer(&families);
  const auto gauge = [&](const char* statistic, const char* name, const char* help) {
    size_t value = 0;
    size_t value_length = sizeof(value);
    if (mallctl_(statistic, &value, &value_length, nullptr, 0) != 0) return;  // built without statistics
    writer.Gauge(name, help).Sample(static_cast<double>(value));
  };
  gauge("stats.allocated", "kvtide_allocator_allocated_bytes",
        "Bytes that the process asked the allocator for.");
  gauge("stats.active", "kvtide_allocator_active_bytes",
        "Bytes of pages with allocations; less allocated = fragmentation.");
  gauge("stats.metadata", "kvtide_allocator_metadata_bytes", "Bytes of the allocator's own books.");
  gauge("stats.resident", "kvtide_allocator_resident_bytes", "Bytes of the allocator's pages in memory.");
  gauge("stats.mapped", "kvtide_allocator_mapped_bytes", "Bytes of the allocator's mapped extents.");
  gauge("stats.retained", "kvtide_allocator_retained_bytes",
        "Bytes of address space kept for reuse, without memory.");
  return families;
}

}  // namespace kvtide::metrics
