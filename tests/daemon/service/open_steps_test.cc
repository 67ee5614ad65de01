// Steps of a session: what belongs to it and ends with it, and clients that send whatever they like.
#include "daemon/service/open_steps.h"

#include <cmath>
#include <random>

#include "absl/strings/match.h"
#include "daemon/cache/kv_cache.h"
#include "daemon/service/handlers.h"
#include "daemon/service/verbs.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"

namespace kvtide::service {
namespace {

using absl::StatusCode;

class OpenStepsTest : public ::testing::Test {
 protected:
  static constexpr int kLayers = 2, kHeads = 2, kDim = 64;

  OpenStepsTest() {
    CpuBackendOptions cpu;
    cpu.threads = 1;
    backend_ = MakeCpuBackend(cpu);
    CacheOptions options;
    options.tiers.push_back({"device", backend_.get(), size_t{4} << 20, false, "cpu"});
    options.tiers.push_back({"host", backend_.get(), size_t{4} << 20, false, "cpu"});
    cache_ = KvCache::Create(options).value();
    handlers_ = std::make_unique<Handlers>(cache_.get(), ServiceOptions());
    v1::SessionRequest request;
    v1::Model& model = *request.mutable_register_model()->mutable_model();
    model.set_name("m");
    for (int l = 0; l < kLayers; l++) {
      v1::Layer& layer = *model.add_layers();
      layer.set_kv_heads(1);
      layer.set_query_heads(kHeads);
      layer.set_head_dim_k(kDim);
      layer.set_head_dim_v(kDim);
    }
    Serve(request).IgnoreError();
  }

  absl::Status Serve(const v1::SessionRequest& request) {
    Call call;
    call.steps = owned_.steps();
    call.maps_pool = maps_;
    answer_.Clear();
    SequenceId sequence = 0;
    absl::Status status = ServeMessage(handlers_.get(), request, call, &answer_, &sequence);
    if (status.ok()) owned_.Note(request, answer_);
    return status;
  }
  SequenceId Create() {
    v1::SessionRequest request;
    request.mutable_create_sequence()->set_model("m");
    request.mutable_create_sequence()->set_pair("q8_0/turbo4");
    EXPECT_TRUE(Serve(request).ok());
    return answer_.create_sequence().sequence_id();
  }
  uint64_t UsedBytes() const {
    uint64_t bytes = 0;
    for (const TierStats& tier : cache_->Stats().tiers) bytes += tier.used_bytes;
    return bytes;
  }

  std::unique_ptr<Backend> backend_;
  std::unique_ptr<KvCache> cache_;
  std::unique_ptr<Handlers> handlers_;
  SessionOwned owned_;
  v1::SessionResponse answer_;
  bool maps_ = false;
};

TEST_F(OpenStepsTest, AStepIsTakenByOneCallAtATimeAndEndsWithItsSession) {
  const SequenceId id = Create();
  v1::SessionRequest begin;
  v1::StepItem* const item = begin.mutable_begin_step()->add_items();
  item->set_sequence_id(id);
  item->set_new_tokens(100);
  ASSERT_TRUE(Serve(begin).ok());
  const uint64_t step = answer_.begin_step().step_id();
  {
    const auto taken = OpenSteps::TakeFrom(owned_.steps(), step);
    ASSERT_TRUE(taken.ok()) << taken.status();
    EXPECT_EQ(OpenSteps::TakeFrom(owned_.steps(), step).status().code(), StatusCode::kAborted);
    begin.mutable_begin_step()->set_after_step_id(step);
    EXPECT_EQ(Serve(begin).code(), StatusCode::kAborted) << "it may end meanwhile";
  }
  ASSERT_TRUE(Serve(begin).ok());
  EXPECT_EQ(answer_.begin_step().items(0).start_position(), 100);
  EXPECT_EQ(owned_.steps()->Previous(answer_.begin_step().step_id()), step);
  EXPECT_EQ(OpenSteps::TakeFrom(nullptr, step).status().code(), StatusCode::kFailedPrecondition);
  EXPECT_GT(UsedBytes(), 0u);
  owned_.Release(handlers_.get());
  EXPECT_EQ(OpenSteps::TakeFrom(owned_.steps(), step).status().code(), StatusCode::kNotFound);
  EXPECT_EQ(UsedBytes(), 0u);
  cache_->CheckInvariants();
}

TEST_F(OpenStepsTest, WhatIsPinnedIsKeptUntilItsSessionEnds) {
  const SequenceId id = Create();
  v1::SessionRequest append;
  append.mutable_append()->set_sequence_id(id);
  const std::vector<float> rows(100 * kDim, 0.5f);
  for (int l = 0; l < kLayers; l++) {
    v1::LayerTokens* const layer = append.mutable_append()->add_layers();
    layer->set_layer(l);
    for (v1::Tensor* const tensor : {layer->mutable_k(), layer->mutable_v()}) {
      tensor->set_dtype(v1::DATA_TYPE_F32);
      for (const int64_t dimension : {int64_t{100}, int64_t{1}, int64_t{kDim}}) tensor->add_shape(dimension);
      tensor->set_data(rows.data(), rows.size() * sizeof(float));
    }
  }
  ASSERT_TRUE(Serve(append).ok());
  v1::SessionRequest pin;
  pin.mutable_pin_step()->add_sequence_ids(id);
  pin.mutable_pin_step()->set_tables(v1::STEP_TABLES_CHANGES);
  ASSERT_TRUE(Serve(pin).ok());
  const uint64_t step = answer_.pin_step().step_id();
  ASSERT_EQ(answer_.pin_step().items_size(), 1);
  EXPECT_EQ(answer_.pin_step().items(0).start_position(), 100);
  const v1::StepTable table = answer_.pin_step().items(0).tables(0);
  EXPECT_EQ(table.first_changed(), 0);
  EXPECT_EQ(table.pair(), "q8_0/turbo4");
  // Once more: nothing has changed.
  ASSERT_TRUE(Serve(pin).ok());
  EXPECT_EQ(answer_.pin_step().items(0).tables(0).first_changed(), 2);
  EXPECT_EQ(answer_.pin_step().items(0).tables(0).pair(), "");
  v1::SessionRequest end;
  end.mutable_end_step()->set_step_id(answer_.pin_step().step_id());
  EXPECT_TRUE(Serve(end).ok());
  pin.mutable_pin_step()->set_mapped(true);
  EXPECT_EQ(Serve(pin).code(), StatusCode::kFailedPrecondition);
  v1::SessionRequest close;
  close.mutable_close_sequence()->set_sequence_id(id);
  ASSERT_TRUE(Serve(close).ok());
  EXPECT_GT(UsedBytes(), 0u);
  EXPECT_TRUE(OpenSteps::TakeFrom(owned_.steps(), step).ok());
  owned_.Release(handlers_.get());
  EXPECT_EQ(UsedBytes(), 0u);
  cache_->CheckInvariants();
}

TEST_F(OpenStepsTest, OnlyWhoHasMappedThePoolWritesBlocksHimself) {
  const SequenceId id = Create();
  v1::SessionRequest begin;
  v1::StepItem* const item = begin.mutable_begin_step()->add_items();
  item->set_sequence_id(id);
  item->set_new_tokens(1);
  begin.mutable_begin_step()->set_mapped(true);
  const absl::Status status = Serve(begin);
  EXPECT_EQ(status.code(), StatusCode::kFailedPrecondition);
  EXPECT_TRUE(absl::StrContains(status.message(), "mapped the pool")) << status;
  maps_ = true;
  begin.mutable_begin_step()->set_tables(v1::STEP_TABLES_CHANGES);
  ASSERT_TRUE(Serve(begin).ok());
  EXPECT_EQ(answer_.begin_step().items(0).tables_size(), 1);
  v1::SessionRequest end;
  end.mutable_end_step()->set_step_id(answer_.begin_step().step_id());
  EXPECT_TRUE(Serve(end).ok()) << "its rows are not seen here";
}

// Messages with any numbers in them, and bytes that are none, between good ones.
TEST_F(OpenStepsTest, AHostileClientIsRefusedAndLeavesNothing) {
  for (uint32_t seed = 1; seed <= 6; seed++) {
    std::mt19937 random(seed);
    maps_ = seed % 2 == 0;
    std::vector<SequenceId> ids;
    std::vector<uint64_t> steps = {0};
    const auto pick = [&](size_t below) { return random() % below; };
    const auto odd = [&]() -> int64_t {
      const int64_t kOdd[] = {0, 1, 2, -1, 63, 64, 65, 200, INT32_MAX, INT64_MAX, INT64_MIN};
      return kOdd[pick(std::size(kOdd))];
    };
    const auto sequence = [&] { return ids.empty() || pick(10) == 0 ? random() : ids[pick(ids.size())]; };
    const auto step = [&] { return pick(8) == 0 ? static_cast<uint64_t>(odd()) : steps[pick(steps.size())]; };
    const auto rows = [&](v1::Tensor* tensor, int64_t tokens, int heads) {
      if (pick(12) == 0) tokens = odd();
      tensor->set_dtype(pick(20) == 0 ? static_cast<v1::DataType>(77) : v1::DATA_TYPE_F32);
      for (const int64_t dimension : {tokens, int64_t{heads}, int64_t{kDim}}) tensor->add_shape(dimension);
      const auto count = static_cast<size_t>(std::clamp<int64_t>(tokens, 0, 300) * heads * kDim);
      std::vector<float> values(count, pick(30) == 0 ? NAN : 0.5f);
      tensor->set_data(values.data(), count * sizeof(float));
    };
    for (int round = 0; round < 600; round++) {
      v1::SessionRequest request;
      switch (pick(11)) {
        case 0:
          if (ids.size() < 4) ids.push_back(Create());
          continue;
        case 1:
        case 2: {
          v1::BeginStepRequest& begin = *request.mutable_begin_step();
          for (size_t i = 0; i < 1 + pick(3); i++) {
            v1::StepItem* const item = begin.add_items();
            item->set_sequence_id(sequence());
            item->set_new_tokens(pick(4) == 0 ? odd() : static_cast<int64_t>(1 + pick(3)));
          }
          if (pick(2) == 0) begin.set_after_step_id(step());
          begin.set_tables(static_cast<v1::StepTables>(pick(5)));
          begin.set_mapped(pick(3) == 0);
          begin.set_most_seals(static_cast<int32_t>(odd()));
          break;
        }
        case 3: {
          v1::EndStepRequest& end = *request.mutable_end_step();
          end.set_step_id(step());
          end.set_roll_back(pick(2) == 0);
          break;
        }
        case 4: {
          v1::GetStepProfileRequest& profile = *request.mutable_get_step_profile();
          profile.set_step_id(step());
          profile.set_item(static_cast<int32_t>(odd()));
          profile.set_group(static_cast<int32_t>(odd()));
          break;
        }
        case 5:
        case 6: {
          v1::AppendAttendRequest& attend = *request.mutable_append_attend();
          attend.set_layer(static_cast<int32_t>(pick(6) == 0 ? odd() : static_cast<int64_t>(pick(kLayers))));
          attend.set_step_id(step());
          for (size_t i = 0; i < 1 + pick(2); i++) {
            v1::AppendAttendItem* const item = attend.add_items();
            item->set_sequence_id(sequence());
            const auto length = cache_->Length(item->sequence_id());
            item->set_start_position(pick(5) == 0 ? odd() : length.value_or(0));
            const auto tokens = static_cast<int64_t>(1 + pick(3));
            rows(item->mutable_q(), tokens, kHeads);
            rows(item->mutable_k(), tokens, 1);
            rows(item->mutable_v(), tokens, 1);
          }
          break;
        }
        case 7: {
          if (ids.empty() || pick(4) != 0) continue;
          request.mutable_close_sequence()->set_sequence_id(ids.back());
          ids.pop_back();
          break;
        }
        case 8: {
          v1::PinStepRequest& pin = *request.mutable_pin_step();
          for (size_t i = 0; i < pick(4); i++) pin.add_sequence_ids(sequence());
          pin.set_tables(static_cast<v1::StepTables>(pick(5)));
          pin.set_mapped(pick(3) == 0);
          break;
        }
        case 9: {
          v1::AttendRequest& attend = *request.mutable_attend();
          attend.set_layer(static_cast<int32_t>(pick(6) == 0 ? odd() : static_cast<int64_t>(pick(kLayers))));
          attend.set_step_id(step());
          for (size_t i = 0; i < 1 + pick(2); i++) {
            v1::AttendItem* const item = attend.add_items();
            item->set_sequence_id(sequence());
            if (pick(4) == 0) item->set_first_query_position(odd());
            rows(item->mutable_q(), static_cast<int64_t>(1 + pick(3)), kHeads);
          }
          break;
        }
        default: {
          std::string bytes(pick(60), '\0');
          for (char& byte : bytes) byte = static_cast<char>(random());
          if (!request.ParseFromString(bytes)) continue;
          break;
        }
      }
      const absl::Status status = Serve(request);
      EXPECT_NE(status.code(), StatusCode::kInternal) << status;
      if (status.ok() && answer_.has_begin_step()) steps.push_back(answer_.begin_step().step_id());
      if (status.ok() && answer_.has_pin_step()) steps.push_back(answer_.pin_step().step_id());
      if (round % 20 == 0) cache_->CheckInvariants();
    }
    owned_.Release(handlers_.get());
    cache_->CheckInvariants();
    EXPECT_EQ(UsedBytes(), 0u) << "seed " << seed;
  }
}

}  // namespace
}  // namespace kvtide::service
