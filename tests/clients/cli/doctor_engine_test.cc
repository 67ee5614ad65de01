// The part of `kvtide doctor` that asks an engine's Python.
#include "clients/cli/ops/doctor_engine.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvtide::cli {
namespace {

using testing::HasSubstr;

TEST(DoctorEngine, FindingsAreTakenOver) {
  const std::vector<Finding> findings =
      EngineFindings("vllm", "python3",
                     R"([{"verdict": "ok", "subject": "vllm", "text": "vllm 0.32.0", "advice": ""},
          {"verdict": "fail", "subject": "connector", "text": "none", "advice": "install it"}])",
                     1);
  ASSERT_EQ(findings.size(), 2u);
  EXPECT_EQ(findings[0].verdict, Verdict::kOk);
  EXPECT_EQ(findings[0].text, "vllm 0.32.0");
  EXPECT_EQ(findings[1].verdict, Verdict::kFail);
  EXPECT_EQ(findings[1].advice, "install it");
}

TEST(DoctorEngine, WhatIsNoAnswerFailsWithAdvice) {
  for (const char* output : {"", "No module named kvtide", "{}", "[]"}) {
    const std::vector<Finding> findings = EngineFindings("sglang", "python3", output, 1);
    ASSERT_EQ(findings.size(), 1u);
    EXPECT_EQ(findings[0].verdict, Verdict::kFail);
    EXPECT_THAT(findings[0].advice, HasSubstr("pip install kvtide"));
  }
}

TEST(DoctorEngine, AnInterpreterThatIsNotThere) {
  const std::vector<Finding> findings = ExamineEngine("vllm", "/nonexistent/python3", "unix:/nonexistent");
  ASSERT_EQ(findings.size(), 1u);
  EXPECT_EQ(findings[0].verdict, Verdict::kFail);
  EXPECT_EQ(findings[0].text, "there is no /nonexistent/python3");
  EXPECT_EQ(findings[0].advice, "name the engine's interpreter with --python");
}

}  // namespace
}  // namespace kvtide::cli
