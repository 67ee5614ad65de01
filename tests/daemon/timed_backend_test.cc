#include "daemon/timed_backend.h"

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvtide {
namespace {

// Says which of its calls came, and answers in its own way.
class Told : public Backend {
 public:
  explicit Told(std::vector<std::string>* calls) : calls_(calls) {}
  std::string name() const override { return "told"; }
  absl::Status CheckSupport(const BlockLayout&) const override { return absl::NotFoundError("support"); }
  absl::StatusOr<std::unique_ptr<Slab>> AllocateSlab(size_t bytes) override {
    return absl::ResourceExhaustedError(std::to_string(bytes));
  }
  absl::Status Append(const AppendArgs&) override { return Note("append"); }
  absl::Status Recode(std::span<const RecodePiece>) override { return Note("recode"); }
  absl::Status Attend(const AttendArgs&) override { return Note("attend"); }
  absl::StatusOr<std::unique_ptr<AttendPlan>> PlanAttend(const AttendPlanArgs&,
                                                         std::unique_ptr<AttendPlan> previous) override {
    calls_->push_back(previous == nullptr ? "plan" : "plan with the previous one");
    return std::make_unique<AttendPlan>();
  }
  absl::Status AttendLayer(AttendPlan&, const AttendLayerArgs&) override { return Note("attend layer"); }
  absl::Status Decode(const DecodeArgs&) override { return Note("decode"); }
  absl::Status DecodeTokens(std::span<const DecodePiece>, const Cancellation*) override {
    return Note("decode tokens");
  }
  absl::StatusOr<CopyTicket> StartCopy(std::span<const CopyPiece>, CopyDirection direction) override {
    if (direction == CopyDirection::kInside) return absl::InternalError("copy");
    calls_->push_back("copy");
    return ++tickets_;
  }
  absl::StatusOr<bool> Poll(CopyTicket ticket) override {
    if (ticket == 2) return absl::InternalError("poll");
    return polls_++ > 1;
  }
  absl::Status CopyNow(const CopyPiece&, CopyDirection) override { return Note("copy now"); }

 private:
  absl::Status Note(const char* call) {
    calls_->push_back(call);
    return absl::AbortedError(call);
  }
  std::vector<std::string>* const calls_;
  CopyTicket tickets_ = 0;
  int polls_ = 0;
};

TEST(TimedBackend, PassesAllOnAndTimesTheWork) {
  std::vector<std::string> calls;
  std::map<Work, int> timed;
  const std::unique_ptr<Backend> backend =
      MakeTimedBackend(std::make_unique<Told>(&calls), [&](Work work, absl::Duration time) {
        EXPECT_GE(time, absl::ZeroDuration());
        timed[work]++;
      });
  EXPECT_EQ(backend->name(), "told");
  EXPECT_EQ(backend->AllocateSlab(7).status().message(), "7");
  // Answers and errors are those of the backend inside.
  EXPECT_EQ(backend->Append({}).message(), "append");
  EXPECT_EQ(backend->Recode({}).message(), "recode");
  EXPECT_EQ(backend->Attend({}).message(), "attend");
  auto plan = backend->PlanAttend({}, nullptr);
  ASSERT_TRUE(plan.ok());
  EXPECT_EQ(backend->AttendLayer(**plan, {}).message(), "attend layer");
  ASSERT_TRUE(backend->PlanAttend({}, std::move(*plan)).ok());
  EXPECT_EQ(backend->Decode({}).message(), "decode");
  EXPECT_EQ(backend->DecodeTokens({}, nullptr).message(), "decode tokens");
  EXPECT_THAT(calls, testing::ElementsAre("append", "recode", "attend", "plan", "attend layer",
                                          "plan with the previous one", "decode", "decode tokens"));
  EXPECT_EQ(timed, (std::map<Work, int>{
                       {Work::kAppend, 1}, {Work::kSeal, 1}, {Work::kAttend, 2}, {Work::kRead, 2}}));
  // A copy ends when it was seen to be done, once; one that never began took no time.
  EXPECT_FALSE(backend->StartCopy({}, CopyDirection::kInside).ok());
  const CopyTicket ticket = *backend->StartCopy({}, CopyDirection::kToHost);
  EXPECT_FALSE(*backend->Poll(ticket));
  EXPECT_FALSE(*backend->Poll(ticket));
  EXPECT_EQ(timed[Work::kCopy], 0);
  EXPECT_TRUE(*backend->Poll(ticket));
  EXPECT_EQ(timed[Work::kCopy], 1);
  EXPECT_FALSE(backend->Poll(*backend->StartCopy({}, CopyDirection::kFromHost)).ok());
  EXPECT_EQ(timed[Work::kCopy], 2);
  // One that the caller's thread makes is made there, and not put in the one queue of copies.
  calls.clear();
  EXPECT_EQ(backend->CopyNow({}, CopyDirection::kToHost).message(), "copy now");
  EXPECT_THAT(calls, testing::ElementsAre("copy now"));
  EXPECT_EQ(timed[Work::kCopy], 3);
}

}  // namespace
}  // namespace kvtide
