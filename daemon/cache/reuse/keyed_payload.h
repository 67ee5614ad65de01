// The bytes of one call of the block store: rows of K and V in the caller's layout, or blocks as they rest.
// It writes them into blocks and reads them out of them, through the backend of the tier where a block lies;
// it knows no lock and no index.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <span>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "daemon/cache/block/keyed_index.h"
#include "daemon/cache/call/keyed_calls.h"
#include "kernels/backend.h"

namespace kvtide {

// Bytes of a payload of so many blocks; InvalidArgument where the form or the layout is not one of the
// namespace.
absl::StatusOr<uint64_t> PayloadBytes(const NamespaceSpec& spec, uint64_t block_bytes, BlockPayload form,
                                      const PageLayout& layout, uint64_t blocks);

// DataLoss unless the block's bytes, in host memory, have this XXH3.
absl::Status CheckBlock(std::span<const std::byte> block, uint64_t checksum);

class KeyedPayload {
 public:
  // InvalidArgument if the bytes are not those of so many blocks; an outgoing payload may have more.
  static absl::StatusOr<KeyedPayload> Incoming(const KeyedNamespace& space, BlockPayload form,
                                               const PageLayout& layout, size_t blocks,
                                               std::span<const std::byte> bytes);
  static absl::StatusOr<KeyedPayload> Outgoing(const KeyedNamespace& space, BlockPayload form,
                                               const PageLayout& layout, size_t blocks,
                                               std::span<std::byte> bytes);

  // InvalidArgument with block, layer, token and head of the first value that is NaN, infinite or beyond f16.
  absl::Status CheckValues() const;
  // Whether Write and Read may run for several blocks at once: bytes are only copied, rows are coded by the
  // backend's own threads.
  bool side_by_side() const { return form_ == BlockPayload::kBytes; }
  // One block of the payload into `target`, in the memory of the tier. Rows are coded on the way. `checksum`:
  // null, or gets the XXH3 of the block, made while its bytes are near. Looks at the cancellation.
  absl::Status Write(Backend& backend, int tier, size_t index, std::byte* target, uint64_t* checksum,
                     const Cancellation* cancellation);
  // And out of `source`, where it has this form: the namespace's, or that of a rung of its ladder. As bytes
  // the latter is coded in the namespace's pair once more, one block at a time. `checksum`: null, or what the
  // block must have, else DataLoss; what is in the payload then means nothing.
  absl::Status Read(Backend& backend, int tier, size_t index, std::byte* source, const BlockForm& form,
                    const uint64_t* checksum, const Cancellation* cancellation);

 private:
  static absl::StatusOr<KeyedPayload> Make(const KeyedNamespace& space, BlockPayload form,
                                           const PageLayout& layout, size_t blocks, uint64_t bytes,
                                           bool exactly);
  const void* Source(const ResolvedPages::Side& side, size_t block, int layer, int token, int head) const;
  void* Target(const ResolvedPages::Side& side, size_t block, int layer, int token, int head) const;
  // Consecutive rows of a layer that lie in one page.
  struct Segment {
    int layer = 0, token = 0;  // of the block
    int page = 0, row = 0;     // of what is stored
    int rows = 0;
  };
  std::vector<Segment> Segments() const;
  absl::StatusOr<std::byte*> Staging(Backend& backend, int tier);
  absl::Status WriteRows(Backend& backend, int tier, size_t index, std::byte* target);
  absl::Status ReadRows(Backend& backend, size_t index, std::byte* source, const BlockLayout* layout,
                        const Cancellation* cancellation);
  // The rows of a block from one layout to another.
  absl::Status Recode(Backend& backend, const BlockLayout* from, const std::byte* source,
                      const BlockLayout* to, std::byte* target) const;

  const KeyedNamespace* space_ = nullptr;
  BlockPayload form_ = BlockPayload::kBytes;
  PageShape shape_;
  ResolvedPages pages_;
  size_t blocks_ = 0;
  const std::byte* in_ = nullptr;
  std::byte* out_ = nullptr;
  std::map<int, std::unique_ptr<Slab>> staging_;  // of one block in its largest form, by tier
  std::vector<std::byte> dense_k_, dense_v_;      // rows of a segment where they do not lie side by side
};

}  // namespace kvtide
