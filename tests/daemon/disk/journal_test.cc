// The durable map: what was acknowledged is there after a crash at any step, in one piece; a torn end is cut
// off; damage in the middle is told and never read.
#include "daemon/disk/journal.h"

#include <random>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "tests/daemon/disk/fault_file_system.h"

namespace kvtide {
namespace {

using testing::FaultFileSystem;
constexpr char kFolder[] = "/disk";

std::unique_ptr<Journal> OpenOrCreate(FaultFileSystem& files, const SecretKey* key = nullptr) {
  absl::StatusOr<std::unique_ptr<Journal>> journal = Journal::Open(files, kFolder, key);
  if (absl::IsNotFound(journal.status())) journal = Journal::Create(files, kFolder, {}, key);
  return journal.ok() ? *std::move(journal) : nullptr;
}

TEST(Journal, KeepsEntriesOverARestart) {
  FaultFileSystem files;
  auto journal = OpenOrCreate(files);
  ASSERT_TRUE(journal->Append({{1, "one"}, {2, "two"}}).ok());
  ASSERT_TRUE(journal->Append({{1, std::nullopt}, {3, ""}}).ok());
  const Journal::Entries expected = {{2, "two"}, {3, ""}};
  EXPECT_EQ(journal->entries(), expected);
  journal.reset();
  files.Crash();
  journal = OpenOrCreate(files);
  ASSERT_NE(journal, nullptr);
  EXPECT_EQ(journal->entries(), expected);
}

TEST(Journal, StaysSmallHoweverOftenValuesChange) {
  FaultFileSystem files;
  auto journal = OpenOrCreate(files);
  const std::string value(10'000, 'x');
  for (uint64_t i = 0; i < 1000; i++) ASSERT_TRUE(journal->Append({{i % 5, value}}).ok());
  EXPECT_LT(journal->file_bytes(), 2'000'000u);
  EXPECT_EQ(files.Paths().size(), 1u);
  EXPECT_EQ(journal->entries().size(), 5u);
}

TEST(Journal, DamageInTheMiddleIsTold) {
  for (uint64_t at = 0; at < 400; at += 7) {
    FaultFileSystem files;
    auto journal = OpenOrCreate(files);
    for (uint64_t i = 0; i < 10; i++) ASSERT_TRUE(journal->Append({{i, absl::StrCat("value ", i)}}).ok());
    const std::string path = files.Paths().front();
    ASSERT_GT(files.SizeOf(path), 500u);
    journal.reset();
    ASSERT_TRUE(files.Damage(path, at));
    EXPECT_EQ(Journal::Open(files, kFolder).status().code(), absl::StatusCode::kDataLoss) << at;
  }
}

TEST(Journal, AFailedChangeDoesNotHarmLaterOnes) {
  for (const auto call : {FaultFileSystem::kWrite, FaultFileSystem::kSync, FaultFileSystem::kFolder}) {
    FaultFileSystem files;
    auto journal = OpenOrCreate(files);
    ASSERT_TRUE(journal->Append({{1, "one"}}).ok());
    files.Fail(FaultFileSystem::kSync);
    EXPECT_FALSE(journal->Append({{2, "two"}}).ok());
    files.Fail(call);  // in the checkpoint that follows
    EXPECT_FALSE(journal->Append({{3, "three"}}).ok());
    files.ClearFaults();
    ASSERT_TRUE(journal->Append({{4, "four"}}).ok());
    journal.reset();
    files.Crash();
    journal = OpenOrCreate(files);
    ASSERT_NE(journal, nullptr);
    EXPECT_EQ(journal->entries().at(1), "one");
    EXPECT_EQ(journal->entries().at(4), "four");
    EXPECT_EQ(journal->entries().count(2), 0u);
  }
}

// Encrypted records: nothing of them is on the disk, damage is told, and one that was put into another file
// or in another one's place counts as damage.
TEST(Journal, EncryptedRecordsTellNothingAndKeepTheirPlace) {
  const SecretKey key = SecretKey::Random(), other = SecretKey::Random();
  FaultFileSystem files;
  const auto text_of = [&](const std::string& path) {
    const std::unique_ptr<File> file = files.Open(path, false, false).value();
    std::string text(file->Size().value(), '\0');
    EXPECT_TRUE(ReadAll(*file, 0, std::as_writable_bytes(std::span(text))).ok());
    return text;
  };
  const auto write = [&](const std::string& path, const std::string& text) {
    ASSERT_TRUE(files.Remove(path).ok());
    const std::unique_ptr<File> file = files.Open(path, true, false).value();
    ASSERT_TRUE(WriteAll(*file, 0, std::as_bytes(std::span(text))).ok());
  };
  auto journal = Journal::Create(files, kFolder, {{1, "the first"}}, &key).value();
  const std::string path = files.Paths().front(), begin = text_of(path);
  ASSERT_TRUE(journal->Append({{2, "a secret value"}}).ok());
  const std::string middle = text_of(path);
  ASSERT_TRUE(journal->Append({{2, "another value!"}}).ok());
  const std::string end = text_of(path);
  for (const char* value : {"the first", "secret", "another"})
    EXPECT_EQ(end.find(value), std::string::npos) << value;
  journal.reset();
  const auto code = [&](const SecretKey* with) {
    return Journal::Open(files, kFolder, with).status().code();
  };
  EXPECT_EQ(code(&other), absl::StatusCode::kDataLoss);
  EXPECT_EQ(Journal::Open(files, kFolder, &key).value()->entries(),
            (Journal::Entries{{1, "the first"}, {2, "another value!"}}));
  // The two records exchanged; the first one twice; all of it as a file of another number.
  const std::string second = middle.substr(begin.size()), third = end.substr(middle.size());
  write(path, begin + third + second);
  EXPECT_EQ(code(&key), absl::StatusCode::kDataLoss);
  write(path, begin + second + second);
  EXPECT_EQ(code(&key), absl::StatusCode::kDataLoss);
  write(std::string(kFolder) + "/index-99", end);
  EXPECT_EQ(code(&key), absl::StatusCode::kDataLoss);
  ASSERT_TRUE(files.Remove(std::string(kFolder) + "/index-99").ok());
  write(path, end);
  EXPECT_TRUE(Journal::Open(files, kFolder, &key).ok());
}

// Random changes; the process dies in any of its steps, again and again.
TEST(Journal, WhatWasAcknowledgedIsThereAfterACrashAtAnyStep) {
  const SecretKey encrypting = SecretKey::Random();
  for (uint32_t seed = 1; seed <= 100; seed++) {
    const SecretKey* const key = seed % 2 == 0 ? &encrypting : nullptr;
    std::mt19937 random(seed);
    FaultFileSystem files(seed);
    Journal::Entries acknowledged;
    std::vector<Journal::Change> in_doubt;
    for (int life = 0; life < 6; life++) {
      files.DieAfter(static_cast<int>(random() % 40));
      auto journal = OpenOrCreate(files, key);
      for (int step = 0; journal != nullptr && step < 30; step++) {
        in_doubt.clear();
        for (uint32_t i = 0; i <= random() % 3; i++) {
          Journal::Change& change = in_doubt.emplace_back();
          change.key = random() % 8;
          if (random() % 4 != 0)
            change.value = std::string(random() % 40'000, static_cast<char>('a' + random() % 26));
        }
        if (!journal->Append(in_doubt).ok()) break;
        for (const Journal::Change& change : in_doubt) {
          acknowledged.erase(change.key);
          if (change.value.has_value()) acknowledged[change.key] = *change.value;
        }
        in_doubt.clear();
      }
      journal.reset();
      files.Crash();
      journal = OpenOrCreate(files, key);
      ASSERT_NE(journal, nullptr) << "seed " << seed << " life " << life;
      Journal::Entries with_doubt = acknowledged;
      for (const Journal::Change& change : in_doubt) {
        with_doubt.erase(change.key);
        if (change.value.has_value()) with_doubt[change.key] = *change.value;
      }
      ASSERT_TRUE(journal->entries() == acknowledged || journal->entries() == with_doubt)
          << "seed " << seed << " life " << life;
      acknowledged = journal->entries();
    }
  }
}

}  // namespace
}  // namespace kvtide
