// The same as the fuzzer does: its corpus, and some random inputs.
#include "tests/daemon/service/hostile_messages.h"

#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

#include "gtest/gtest.h"

namespace kvtide::service {
namespace {

TEST(HostileMessages, TheCorpusTouchesNothingElse) {
  int files = 0, served = 0;
  for (const auto& entry : std::filesystem::directory_iterator(KVTIDE_FUZZ_CORPUS "/messages")) {
    SCOPED_TRACE(entry.path().string());
    std::ifstream file(entry.path(), std::ios::binary);
    const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    served += PlayHostileMessages({reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()});
    files++;
  }
  EXPECT_GE(files, 4);
  EXPECT_GT(served, files) << "messages that go well are among them";
}

TEST(HostileMessages, RandomOnesTouchNothingElse) {
  std::mt19937 random(20261130);
  int served = 0;
  for (int i = 0; i < 300; i++) {
    std::vector<uint8_t> bytes(random() % 1500);
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
    served += PlayHostileMessages(bytes);
  }
  EXPECT_GT(served, 1000);
}

}  // namespace
}  // namespace kvtide::service
