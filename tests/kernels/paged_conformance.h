// The conformance suite of PagedAttention: an engine in miniature keeps block tables, exact pages and coded
// pages of many sequences, takes random steps (prefill chunks, decoding, several query tokens, prefixes of
// others, ends and reuse of pages), and compares every step with float64 attention over the same bytes
// (ReferenceAttend), every exact page with the rows that were written, and every coded page with the bytes of
// the format's definition.
//
// An implementation passes by instantiating it with a world: its memory and its factory.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <ostream>
#include <span>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/paged_attention.h"

namespace kvtide::testing {

// Memory that an implementation computes in, and how its work is run.
class PagedWorld {
 public:
  virtual ~PagedWorld() = default;
  virtual absl::StatusOr<std::unique_ptr<PagedAttention>> Make(const PagedOptions& options,
                                                               std::span<const PagedLayer> layers) = 0;
  // Memory for as long as the world lives, at a multiple of 256 bytes.
  virtual std::byte* Allocate(size_t bytes) = 0;
  virtual void Upload(const void* from, std::byte* to, size_t bytes) = 0;
  virtual void Download(const std::byte* from, void* to, size_t bytes) = 0;
  // Runs a step and waits: `plan`, then `layers`, on one stream. A world that replays records `layers` (and
  // `plan` too, or not) the first time and replays the record from then on.
  virtual absl::Status Run(const std::function<absl::Status(void* stream)>& plan,
                           const std::function<absl::Status(void* stream)>& layers) = 0;
  // Whether steps must have equal bounds and addresses, as records are made once.
  virtual bool replays() const { return false; }
};

struct PagedWorldCase {
  std::string name;  // letters and digits
  std::function<std::unique_ptr<PagedWorld>()> make;
  friend void PrintTo(const PagedWorldCase& c, std::ostream* out) { *out << c.name; }
};

class PagedConformance : public ::testing::TestWithParam<PagedWorldCase> {};

inline std::string PagedCaseName(const ::testing::TestParamInfo<PagedWorldCase>& info) {
  return info.param.name;
}

}  // namespace kvtide::testing
