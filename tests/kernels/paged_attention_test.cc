// What every implementation of PagedAttention refuses, each with what to change.
#include "kernels/paged_attention.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <vector>

#include "kernels/paged_library.h"
#include "tests/format/test_tide.h"

namespace kvtide {
namespace {

using ::testing::HasSubstr;

struct alignas(128) Page {
  std::byte bytes[128];
};

struct Arguments {
  Page page;
  PagedOptions options;
  PagedLayer layer;
  int32_t numbers[4] = {};
  PagedStep step;

  Arguments() {
    options.shape = {1, 2, 64, 64};
    options.pair = *ParseCachePair("turbo4/turbo4");
    options.heads = 4;
    options.scale = 0.125f;
    options.max_sequences = 2;
    options.max_tokens = 8;
    options.max_coded_blocks = 4;
    options.max_exact_blocks = 4;
    options.max_seals = 2;
    options.exact_pages = 8;
    layer.coded = layer.exact = page.bytes;
    step.sequences = 1;
    step.tokens = step.most_queries = 2;
    step.query_start = step.lengths = step.coded_first = step.coded_count = numbers;
    step.coded_table = step.exact_table = step.write_slots = step.seal_pages = numbers;
    step.coded_row = step.exact_row = 4;
  }
  std::string WrongOptions() const { return std::string(CheckPagedOptions(options, {&layer, 1}).message()); }
  std::string WrongStep() const { return std::string(CheckPagedStep(step, options).message()); }
};

TEST(PagedArguments, AreAcceptedWhereTheyFit) {
  Arguments a;
  EXPECT_EQ(a.WrongOptions(), "");
  EXPECT_EQ(a.WrongStep(), "");
  a.step = PagedStep{};  // nothing to do
  EXPECT_EQ(a.WrongStep(), "");
}

TEST(PagedArguments, SayWhichOptionIsWrong) {
  const auto wrong = [](auto change) {
    Arguments a;
    change(a);
    return a.WrongOptions();
  };
  EXPECT_THAT(wrong([](Arguments& a) { a.options.shape.layers = 2; }), HasSubstr("one layer"));
  EXPECT_THAT(wrong([](Arguments& a) { a.options.pair = *ParseCachePair("tide3/turbo3"); }),
              HasSubstr("layer 0, tide3/turbo3: calibrated keys need the transforms of a profile"));
  EXPECT_THAT(wrong([](Arguments& a) {
                a.options.pair = *ParseCachePair("tide3/turbo3");
                a.options.max_profiles = 2;
              }),
              HasSubstr("max_profiles"));
  EXPECT_THAT(wrong([](Arguments& a) { a.options.heads = 3; }), HasSubstr("KV heads"));
  EXPECT_THAT(wrong([](Arguments& a) { a.options.scale = std::numeric_limits<float>::quiet_NaN(); }),
              HasSubstr("scale"));
  EXPECT_THAT(wrong([](Arguments& a) { a.options.softcap = -1; }), HasSubstr("softcap"));
  EXPECT_THAT(wrong([](Arguments& a) { a.options.window = -1; }), HasSubstr("window"));
  EXPECT_THAT(wrong([](Arguments& a) { a.options.max_sequences = kMostPagedSequences + 1; }),
              HasSubstr("max_sequences"));
  EXPECT_THAT(wrong([](Arguments& a) { a.options.max_tokens = 1; }), HasSubstr("max_tokens"));
  EXPECT_THAT(wrong([](Arguments& a) { a.options.max_coded_blocks = std::numeric_limits<int>::max(); }),
              HasSubstr("max_coded_blocks"));
  EXPECT_THAT(wrong([](Arguments& a) { a.options.exact_pages = std::numeric_limits<int>::max(); }),
              HasSubstr("exact_pages"));
  EXPECT_THAT(wrong([](Arguments& a) { a.options.coded_stride = 128; }), HasSubstr("stride"));
  EXPECT_THAT(wrong([](Arguments& a) { a.layer.coded = nullptr; }), HasSubstr("no coded pages"));
  EXPECT_THAT(wrong([](Arguments& a) { a.layer.exact++; }), HasSubstr("multiple of 128"));
}

TEST(PagedArguments, CalibratedKeysHaveTransformsOfKeysAfterRope) {
  Arguments a;
  a.options.pair = *ParseCachePair("tide3/turbo3");
  const Profile before = test::TideProfile(a.options.shape, 1), after = test::AfterRope(before);
  a.layer.keys = after.k.data();
  EXPECT_EQ(a.WrongOptions(), "");
  const absl::StatusOr<Profile> made = MakePagedKeyProfile(a.options, std::vector{a.layer, a.layer});
  ASSERT_TRUE(made.ok()) << made.status();
  EXPECT_EQ(made->shape.layers, 2);
  ASSERT_EQ(made->k.size(), 4u);
  EXPECT_TRUE(made->k[3] == after.k[1]);  // inverse included
  const std::vector<float> means(128, 0.5f);
  a.layer.k_mean = means.data();
  EXPECT_THAT(a.WrongOptions(), HasSubstr("means of their own"));
  a.layer.k_mean = nullptr;
  a.layer.keys = before.k.data();
  EXPECT_THAT(a.WrongOptions(), HasSubstr("codes keys before RoPE"));
  EXPECT_THAT(a.WrongOptions(), HasSubstr("python -m kvtide.calibrate --keys after-rope"));
}

TEST(PagedArguments, SayWhatOfAStepIsWrong) {
  const auto wrong = [](auto change) {
    Arguments a;
    change(a);
    return a.WrongStep();
  };
  EXPECT_THAT(wrong([](Arguments& a) { a.step.sequences = 3; }), HasSubstr("sequences"));
  EXPECT_THAT(wrong([](Arguments& a) { a.step.tokens = 9; }), HasSubstr("tokens"));
  EXPECT_THAT(wrong([](Arguments& a) { a.step.most_queries = 3; }), HasSubstr("most_queries"));
  EXPECT_THAT(wrong([](Arguments& a) { a.step.seals = 3; }), HasSubstr("seals"));
  EXPECT_THAT(wrong([](Arguments& a) { a.step.lengths = nullptr; }), HasSubstr("lengths"));
  EXPECT_THAT(wrong([](Arguments& a) { a.step.coded_table = nullptr; }), HasSubstr("coded_table"));
  EXPECT_THAT(wrong([](Arguments& a) { a.step.host_lengths = a.numbers; }), HasSubstr("host_"));
}

TEST(PagedArguments, SayWhatOfRowsIsWrong) {
  Arguments a;
  const auto wrong = [&](PagedRows rows) {
    return std::string(CheckPagedRows(rows, DataType::kF16, 2, 64, "q").message());
  };
  EXPECT_EQ(wrong({a.page.bytes, 384}), "");
  EXPECT_THAT(wrong({nullptr, 384}), HasSubstr("no q"));
  EXPECT_THAT(wrong({a.page.bytes, 64}), HasSubstr("stride"));
  EXPECT_THAT(wrong({a.page.bytes + 2, 384}), HasSubstr("16 bytes"));
  EXPECT_THAT(wrong({a.page.bytes, 129}), HasSubstr("16 bytes"));
}

TEST(PagedArguments, SayWhichRowsOfACallAreWrong) {
  Arguments a;
  a.options.type = a.options.output_type = DataType::kF16;
  const PagedRows good{a.page.bytes, 256}, narrow{a.page.bytes, 64}, of_heads{a.page.bytes, 128};
  const auto written = [&](PagedRows k, PagedRows v) { return CheckPagedWritten(k, v, a.step, a.options); };
  EXPECT_TRUE(written(of_heads, of_heads).ok());
  EXPECT_THAT(std::string(written(narrow, good).message()), HasSubstr("k: a stride"));
  EXPECT_THAT(std::string(written(good, {}).message()), HasSubstr("no v"));
  a.step.among_coded = true;
  EXPECT_EQ(written(good, good).code(), absl::StatusCode::kFailedPrecondition);
  // Of four query heads.
  const auto attended = [&](PagedRows q, MutablePagedRows out) {
    return CheckPagedAttended(q, out, a.options);
  };
  EXPECT_TRUE(attended(good, {a.page.bytes, 256}).ok());
  EXPECT_THAT(std::string(attended(of_heads, {a.page.bytes, 256}).message()), HasSubstr("q: a stride"));
  EXPECT_THAT(std::string(attended(good, {a.page.bytes, 128}).message()), HasSubstr("out: a stride"));
  EXPECT_THAT(std::string(attended(good, {}).message()), HasSubstr("no out"));
}

class NothingPaged final : public PagedAttention {
 public:
  absl::Status Plan(const PagedStep&, void*) override { return absl::OkStatus(); }
  absl::Status Write(int, PagedRows, PagedRows, void*) override { return absl::OkStatus(); }
  absl::Status Attend(int, PagedRows, MutablePagedRows, float*, void*) override { return absl::OkStatus(); }
  absl::Status WriteAttend(int, PagedRows, PagedRows, PagedRows, MutablePagedRows, float*, void*) override {
    return absl::OkStatus();
  }
  absl::Status Seal(int, void*) override { return absl::OkStatus(); }
  absl::Status SealLayers(void*) override { return absl::OkStatus(); }
  absl::Status SetProfile(int, const float*, const float*, void*) override { return absl::OkStatus(); }
  absl::StatusOr<uint64_t> ChangedValues(void*) override { return 7; }
  size_t bytes() const override { return 5; }
};

TEST(PagedLibrary, AnEntryMakesObjectsForItsOwnBuildOnly) {
  Arguments a;
  const PagedFactory factory =
      [](const PagedOptions& options,
         std::span<const PagedLayer> layers) -> absl::StatusOr<std::unique_ptr<PagedAttention>> {
    if (options.heads != 4 || layers.size() != 1) return absl::InvalidArgumentError("other arguments");
    return std::make_unique<NothingPaged>();
  };
  PagedAttention* made = nullptr;
  char error[100] = {};
  const auto call = [&](const std::string& build) {
    return static_cast<absl::StatusCode>(
        MakePagedByEntry(factory, build.c_str(), &a.options, &a.layer, 1, &made, error, sizeof error));
  };
  EXPECT_EQ(call(PagedBuild()), absl::StatusCode::kOk);
  ASSERT_NE(made, nullptr);
  EXPECT_EQ(made->bytes(), 5u);
  delete made;
  EXPECT_EQ(call("0;other"), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(made, nullptr);
  EXPECT_THAT(error, HasSubstr("another build"));
  a.options.heads = 2;
  EXPECT_EQ(call(PagedBuild()), absl::StatusCode::kInvalidArgument);
  EXPECT_STREQ(error, "other arguments");
}

TEST(PagedLibrary, ACopierIsMadeInTheSameWay) {
  std::byte page{};
  std::byte* const layers[] = {&page};
  const PageCopierFactory factory =
      [&](const PageCopyOptions& options,
          std::span<std::byte* const> given) -> absl::StatusOr<std::unique_ptr<PageCopier>> {
    EXPECT_EQ(options.pages, 7);
    EXPECT_EQ(given.front(), &page);
    return absl::ResourceExhaustedError("no memory");
  };
  PageCopyOptions options;
  options.pages = 7;
  PageCopier* made = nullptr;
  char error[100] = {};
  const auto call = [&](const std::string& build) {
    return static_cast<absl::StatusCode>(
        MakePageCopierByEntry(factory, build.c_str(), &options, layers, 1, &made, error, sizeof error));
  };
  EXPECT_EQ(call(PagedBuild()), absl::StatusCode::kResourceExhausted);
  EXPECT_STREQ(error, "no memory");
  EXPECT_EQ(call("1;an older one"), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(error, HasSubstr("another build"));
  EXPECT_EQ(made, nullptr);
}

TEST(PagedLibrary, SaysWhyThereIsNone) {
  const auto none = LoadPagedLibrary("./no_such_library.so");
  EXPECT_EQ(none.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(none.status().message(), HasSubstr("no_such_library.so"));
  const auto other = LoadPagedLibrary("libm.so.6");
  EXPECT_EQ(other.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(LoadPageCopierLibrary("./no_such_library.so").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(LoadPageCopierLibrary("libm.so.6").status().code(), absl::StatusCode::kFailedPrecondition);
}

}  // namespace
}  // namespace kvtide
