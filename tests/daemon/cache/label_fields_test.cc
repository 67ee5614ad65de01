#include "daemon/cache/tier/label_fields.h"

#include <gtest/gtest.h>

namespace kvtide {
namespace {

struct Stored {
  uint32_t kind;
  uint64_t write_id, bytes, checksum, model_hash, sequence, name_space_hash, tenant;
  uint64_t chain[2];
  int64_t index;
  int32_t group, codec_version_k, codec_version_v;
  uint64_t profile_hash, layout_hash;
  char k_type[16], v_type[16];
};

BlockLabel Example() {
  BlockLabel label{BlockLabel::Kind::kManifest, 1, 2, 3, 4, 5, 6, 7, 8, 9, {10, 11}};
  label.k_type = "fifteen letters";
  label.v_type = "f16";
  label.codec_version_k = 12;
  label.codec_version_v = 13;
  label.profile_hash = 14;
  label.layout_hash = 15;
  return label;
}

TEST(LabelFieldsTest, EveryFieldComesBack) {
  Stored stored{};
  StoreLabel(Example(), &stored);
  EXPECT_EQ(LoadLabel(stored).value(), Example());
  EXPECT_NE(LoadLabel(stored).value(), BlockLabel());
}

TEST(LabelFieldsTest, ANameWithoutAnEndIsDamage) {
  for (const bool keys : {true, false}) {
    Stored stored{};
    StoreLabel(Example(), &stored);
    std::fill_n(keys ? stored.k_type : stored.v_type, 16, 'x');
    EXPECT_TRUE(absl::IsDataLoss(LoadLabel(stored).status()));
  }
}

TEST(LabelFieldsDeathTest, ANameThatIsTooLongIsAFault) {
  BlockLabel label = Example();
  label.k_type += "!";
  Stored stored{};
  EXPECT_DEATH(StoreLabel(label, &stored), "too long: fifteen letters!");
}

}  // namespace
}  // namespace kvtide
