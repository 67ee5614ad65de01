// The conformance suite of PageCopier: pages of random engines (orders, block sizes, types, odd strides and
// counts) become the records that EncodeHalf makes of their rows, and come back as the values of DecodeHalf
// in other pages, while everything around stays as it was.
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
#include "kernels/page_copier.h"

namespace kvtide::testing {

class PageCopierWorld {
 public:
  virtual ~PageCopierWorld() = default;
  virtual absl::StatusOr<std::unique_ptr<PageCopier>> Make(const PageCopyOptions& options,
                                                           std::span<std::byte* const> layers) = 0;
  // Memory of pages for as long as the world lives, at a multiple of 256 bytes.
  virtual std::byte* Allocate(size_t bytes) = 0;
  virtual void Upload(const void* from, std::byte* to, size_t bytes) = 0;
  virtual void Download(const std::byte* from, void* to, size_t bytes) = 0;
};

struct PageCopierCase {
  std::string name;  // letters and digits
  std::function<std::unique_ptr<PageCopierWorld>()> make;
  friend void PrintTo(const PageCopierCase& c, std::ostream* out) { *out << c.name; }
};

class PageCopierConformance : public ::testing::TestWithParam<PageCopierCase> {};

inline std::string PageCopierCaseName(const ::testing::TestParamInfo<PageCopierCase>& info) {
  return info.param.name;
}

}  // namespace kvtide::testing
