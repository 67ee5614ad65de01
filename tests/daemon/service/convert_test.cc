#include "daemon/service/convert.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvtide::service {
namespace {

using ::testing::HasSubstr;

v1::Layer MakeLayer(int kv_heads, int dim, int64_t window, int heads) {
  v1::Layer layer;
  layer.set_kv_heads(kv_heads);
  layer.set_head_dim_k(dim);
  layer.set_head_dim_v(dim);
  layer.set_window(window);
  layer.set_query_heads(heads);
  return layer;
}

TEST(Convert, GroupsLayersThatAreAlike) {
  v1::Model model;
  model.set_name("m");
  for (int i = 0; i < 6; i++) *model.add_layers() = MakeLayer(2, 64, i % 3 == 2 ? 0 : 1024, 8);
  const auto spec = FromProto(model);
  ASSERT_TRUE(spec.ok()) << spec.status();
  ASSERT_EQ(spec->groups.size(), 2u);
  EXPECT_EQ(spec->groups[0].shape.layers, 4);
  EXPECT_EQ(spec->groups[0].window, 1024);
  EXPECT_EQ(spec->groups[1].shape.layers, 2);
  EXPECT_EQ(spec->layers[5], (LayerSpec{1, 1}));
  EXPECT_EQ(spec->layers[4], (LayerSpec{0, 3}));
  EXPECT_TRUE(CheckModelSpec(*spec).ok()) << CheckModelSpec(*spec);
  v1::RegisterModelResponse response;
  ToProto(*spec, &response);
  ASSERT_EQ(response.groups_size(), 2);
  EXPECT_THAT(response.groups(1).layers(), ::testing::ElementsAre(2, 5));
  // 2 layers x 2 heads x 64 tokens x (64 + 64) values x 2 bytes.
  EXPECT_EQ(response.groups(1).exact_block_bytes(), 2 * 2 * 64 * 128 * 2);
}

TEST(Convert, NamesTheLayerThatMakesNoSense) {
  const v1::Layer kBad[] = {MakeLayer(0, 64, 0, 8), MakeLayer(2, 65, 0, 8), MakeLayer(2, 64, -1, 8),
                            MakeLayer(2, 64, 0, 7), MakeLayer(2, 64, 0, 0)};
  for (const v1::Layer& bad : kBad) {
    v1::Model model;
    *model.add_layers() = MakeLayer(2, 64, 0, 8);
    *model.add_layers() = bad;
    const auto spec = FromProto(model);
    EXPECT_EQ(spec.status().code(), absl::StatusCode::kInvalidArgument) << bad.ShortDebugString();
    EXPECT_THAT(std::string(spec.status().message()), HasSubstr("layers[1]"));
  }
}

TEST(Convert, MeansOfKeysFollowTheirLayersIntoGroups) {
  const auto mean = [](float value) {
    const std::vector<float> values(2 * 64, value);
    return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
  };
  v1::Model model;
  model.set_name("means");
  for (int i = 0; i < 4; i++) {
    *model.add_layers() = MakeLayer(2, 64, i % 2 == 0 ? 0 : 1024, 8);
    model.mutable_layers(i)->set_key_mean(mean(static_cast<float>(i)));
  }
  const auto spec = FromProto(model);
  ASSERT_TRUE(spec.ok()) << spec.status();
  ASSERT_EQ(spec->groups.size(), 2u);
  ASSERT_EQ(spec->groups[1].key_means.size(), 2u * 2 * 64);
  EXPECT_EQ(spec->groups[1].key_means.front(), 1);
  EXPECT_EQ(spec->groups[1].key_means.back(), 3);
  EXPECT_TRUE(CheckModelSpec(*spec).ok()) << CheckModelSpec(*spec);
  model.mutable_layers(2)->set_key_mean("");
  EXPECT_THAT(std::string(FromProto(model).status().message()), HasSubstr("layers[2].key_mean: of layers"));
  model.mutable_layers(2)->set_key_mean("12345678");
  EXPECT_THAT(std::string(FromProto(model).status().message()),
              HasSubstr("key_mean has 8 bytes, expected 512"));
}

TEST(Convert, TransformsOfKeysStandBesideTheirMeans) {
  const auto bytes = [](size_t values) {
    const std::vector<float> floats(values, 0.5f);
    return std::string(reinterpret_cast<const char*>(floats.data()), values * sizeof(float));
  };
  v1::Model model;
  model.set_name("transforms");
  for (int i = 0; i < 2; i++) {
    *model.add_layers() = MakeLayer(2, 64, 0, 8);
    model.mutable_layers(i)->set_key_mean(bytes(2 * 64));
    model.mutable_layers(i)->set_key_centre(bytes(2 * 64));
    model.mutable_layers(i)->set_key_frequencies(bytes(32));
    model.mutable_layers(i)->set_key_transform(bytes(2 * 64 * 64));
    model.mutable_layers(i)->set_key_widths(std::string(2 * 4 * 8, static_cast<char>(i + 1)));
  }
  const auto spec = FromProto(model);
  ASSERT_TRUE(spec.ok()) << spec.status();
  ASSERT_EQ(spec->groups.size(), 1u);
  const KeyTransforms& keys = spec->groups[0].key_transforms;
  EXPECT_EQ(keys.pairs, RopePairs::kHalves);
  EXPECT_EQ(keys.frequencies.size(), 2u * 32);
  EXPECT_EQ(keys.centres.size(), 2u * 2 * 64);
  EXPECT_EQ(keys.matrices.size(), 2u * 2 * 64 * 64);
  ASSERT_EQ(keys.widths.size(), 2u * 2 * 4 * 8);
  EXPECT_EQ(keys.widths.back(), 2);
  const auto message = [&](auto change) {
    v1::Model other = model;
    change(*other.mutable_layers(1));
    return std::string(FromProto(other).status().message());
  };
  EXPECT_THAT(message([&](v1::Layer& l) { l.set_key_transform(bytes(5)); }),
              HasSubstr("key_transform has 20 bytes, expected 32768"));
  EXPECT_THAT(message([&](v1::Layer& l) { l.set_key_widths("123"); }),
              HasSubstr("key_widths has 3 bytes, expected 64"));
  EXPECT_THAT(message([&](v1::Layer& l) { l.clear_key_widths(); }), HasSubstr("come together"));
  EXPECT_THAT(message([&](v1::Layer& l) { l.clear_key_centre(); }), HasSubstr("a profile of before"));
  EXPECT_THAT(message([&](v1::Layer& l) { l.set_key_frequencies(bytes(33)); }),
              HasSubstr("key_frequencies has 132 bytes"));
  EXPECT_THAT(message([&](v1::Layer& l) { l.set_key_frequencies(bytes(16)); }), HasSubstr("as many pairs"));
  EXPECT_THAT(message([&](v1::Layer& l) { l.set_key_rope_neighbours(true); }), HasSubstr("of one kind"));
  EXPECT_THAT(message([&](v1::Layer& l) { l.clear_key_mean(); }), HasSubstr("beside key_mean"));
  EXPECT_THAT(message([&](v1::Layer& l) {
                l.clear_key_transform();
                l.clear_key_widths();
                l.clear_key_centre();
                l.clear_key_frequencies();
              }),
              HasSubstr("layers[1].key_transform: of layers with one shape all have it, or none"));
}

TEST(Convert, SequencesGetDefaultsUnlessTheyAsk) {
  const SequenceDefaults defaults{ParseCachePair("turbo4/turbo3").value(), {2, 5}};
  v1::CreateSequenceRequest request;
  auto options = FromProto(request, defaults);
  ASSERT_TRUE(options.ok());
  EXPECT_EQ(options->pair, defaults.pair);
  EXPECT_EQ(options->exact_window, defaults.exact_window);
  EXPECT_EQ(options->centre, Centre::kTypeDefault);
  EXPECT_FALSE(options->equalise.has_value());
  request.set_pair("q8_0");
  request.mutable_exact_window();  // set, and zero: no exact blocks
  request.set_key_equalising(v1::KEY_EQUALISING_FULL);
  request.set_key_centring(v1::KEY_CENTRING_NONE);
  options = FromProto(request, defaults);
  ASSERT_TRUE(options.ok());
  EXPECT_EQ(PairName(options->pair), "q8_0/q8_0");
  EXPECT_EQ(options->exact_window, (ExactWindow{0, 0}));
  EXPECT_EQ(options->equalise, Equalise::kFull);
  EXPECT_EQ(options->centre, Centre::kNone);
  EXPECT_EQ(options->priority, Priority::kNormal);
  for (const Priority priority : kAllPriorities) {
    request.set_priority(ToProto(priority));
    EXPECT_EQ(FromProto(request, defaults)->priority, priority);
    v1::Sequence proto;
    SequenceInfo info;
    info.options.priority = priority;
    ToProto(info, {}, absl::Now(), &proto);
    EXPECT_EQ(proto.priority(), ToProto(priority));
  }
  request.set_priority(static_cast<v1::Priority>(9));
  EXPECT_THAT(std::string(FromProto(request, defaults).status().message()), HasSubstr("priority 9"));
  request.clear_priority();
  request.set_key_centring(static_cast<v1::KeyCentring>(9));
  EXPECT_THAT(std::string(FromProto(request, defaults).status().message()), HasSubstr("key_centring 9"));
}

TEST(Convert, SequencesSayWhatTheirBlocksMayBecome) {
  v1::CreateSequenceRequest request;
  request.set_pair("q8_0/turbo4");
  EXPECT_TRUE(FromProto(request, {}).value().degrade.empty());
  request.add_degrade("turbo4/turbo3");
  request.add_degrade("turbo2");
  const SequenceOptions options = FromProto(request, {}).value();
  ASSERT_EQ(options.degrade.size(), 2u);
  EXPECT_EQ(PairName(options.degrade[0]), "turbo4/turbo3");
  EXPECT_EQ(PairName(options.degrade[1]), "turbo2/turbo2");

  SequenceInfo info;
  info.options = options;
  info.degraded_blocks = 7;
  info.degraded = {{0, 2, 8, options.degrade[0]}, {1, 5, 6, options.degrade[1]}};
  v1::Sequence sequence;
  ToProto(info, {}, absl::UnixEpoch(), &sequence);
  EXPECT_EQ(sequence.degraded_blocks(), 7);
  ASSERT_EQ(sequence.degrade_size(), 2);
  EXPECT_EQ(sequence.degrade(0), "turbo4/turbo3");
  EXPECT_EQ(sequence.degrade(1), "turbo2/turbo2");
  ASSERT_EQ(sequence.degraded_size(), 2);
  EXPECT_EQ(sequence.degraded(0).layer_group(), 0);
  EXPECT_EQ(sequence.degraded(0).first_token(), 128);
  EXPECT_EQ(sequence.degraded(0).tokens(), 384);
  EXPECT_EQ(sequence.degraded(0).pair(), "turbo4/turbo3");
  EXPECT_EQ(sequence.degraded(1).layer_group(), 1);
  EXPECT_EQ(sequence.degraded(1).tokens(), 64);

  CacheStats stats;
  stats.tiers.resize(2);
  stats.tiers[1].degraded_blocks = 5;
  stats.tiers[1].degraded_bytes = 4096;
  v1::GetStatsResponse proto;
  ToProto(stats, &proto);
  EXPECT_EQ(proto.tiers(0).degraded_blocks(), 0);
  EXPECT_EQ(proto.tiers(1).degraded_blocks(), 5);
  EXPECT_EQ(proto.tiers(1).degraded_bytes(), 4096);

  request.add_degrade("turbo9");
  const absl::Status status = FromProto(request, {}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("degrade[2]"));
}

TEST(Convert, StatisticsSayWhichBlocksWereNotCoded) {
  CacheStats stats;
  stats.sealed_blocks = 5;
  stats.deferred_seals = 6;
  stats.failed_seals = 7;
  v1::GetStatsResponse proto;
  ToProto(stats, &proto);
  EXPECT_EQ(proto.sealed_blocks(), 5);
  EXPECT_EQ(proto.deferred_seals(), 6);
  EXPECT_EQ(proto.failed_seals(), 7);
}

TEST(Convert, StatisticsSayHowLowerTiersAreAttended) {
  CacheStats stats;
  TierStats& tier = stats.tiers.emplace_back();
  tier.attended_in_place = 3;
  tier.promoted_first = 4;
  tier.attend_rate = 5e9;
  tier.promote_rate = 2e10;
  tier.low_priority_blocks = 6;
  tier.high_priority_blocks = 7;
  v1::GetStatsResponse proto;
  ToProto(stats, &proto);
  EXPECT_EQ(proto.tiers(0).attended_in_place(), 3);
  EXPECT_EQ(proto.tiers(0).promoted_first(), 4);
  EXPECT_EQ(proto.tiers(0).attend_bytes_per_second(), 5e9);
  EXPECT_EQ(proto.tiers(0).promote_bytes_per_second(), 2e10);
  EXPECT_EQ(proto.tiers(0).low_priority_blocks(), 6);
  EXPECT_EQ(proto.tiers(0).high_priority_blocks(), 7);
}

TEST(Convert, StatusesKeepCodeAndMessage) {
  EXPECT_TRUE(ToGrpc(absl::OkStatus()).ok());
  const grpc::Status status = ToGrpc(absl::DataLossError("tokens 0 to 63 were dropped"));
  EXPECT_EQ(status.error_code(), grpc::StatusCode::DATA_LOSS);
  EXPECT_EQ(status.error_message(), "tokens 0 to 63 were dropped");
  EXPECT_EQ(ToGrpc(absl::InternalError(std::string(100000, 'x'))).error_message().size(), 4096u);
}

}  // namespace
}  // namespace kvtide::service
