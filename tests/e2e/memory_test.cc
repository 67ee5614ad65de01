// A byte of the daemon's host tier changes behind its back, as bad memory does it: with checksums, as it starts, that
// is told and never served, without it nobody can know.
#include <fcntl.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <random>
#include <sstream>

#include "absl/strings/match.h"
#include "clients/cpp/block_store.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/e2e/test_daemon.h"

namespace kvtide::e2e {
namespace {

using Bytes = std::vector<std::byte>;

// Changes the last byte of every place in the process's memory that has these bytes; how many there were, -1
// where its memory may not be looked at.
int DamageAll(pid_t pid, const Bytes& wanted) {
  const std::string folder = "/proc/" + std::to_string(pid);
  const int memory = open((folder + "/mem").c_str(), O_RDWR | O_CLOEXEC);
  if (memory < 0) return -1;
  int found = 0;
  std::istringstream lines(ReadWhole(folder + "/maps"));
  for (std::string line; std::getline(lines, line);) {
    uint64_t begin = 0, end = 0;
    char access[5] = {};
    if (std::sscanf(line.c_str(), "%lx-%lx %4s", &begin, &end, access) != 3 || access[1] != 'w') continue;
    if (end - begin > (uint64_t{1} << 30)) continue;  // address space without pages
    Bytes bytes(end - begin);
    const ssize_t got = pread(memory, bytes.data(), bytes.size(), static_cast<off_t>(begin));
    if (got < static_cast<ssize_t>(wanted.size())) continue;
    const char* const first = reinterpret_cast<const char*>(bytes.data());
    for (const char* at = first;
         (at = static_cast<const char*>(
              memmem(at, static_cast<size_t>(first + got - at), wanted.data(), wanted.size()))) != nullptr;
         at++) {
      const std::byte changed = wanted.back() ^ std::byte{1};
      const uint64_t place = begin + static_cast<uint64_t>(at - first) + wanted.size() - 1;
      if (pwrite(memory, &changed, 1, static_cast<off_t>(place)) == 1) found++;
    }
  }
  close(memory);
  return found;
}

TEST(Memory, WhatChangesInTheHostTierIsToldWhereItHasChecksums) {
  for (const bool checksums : {true, false}) {
    SCOPED_TRACE(checksums);
    std::vector<std::string> arguments;
    if (!checksums) arguments.push_back("--host-checksum=false");
    const auto daemon = TestDaemon::Start(arguments);
    ASSERT_NE(daemon, nullptr);
    const auto client = daemon->Connect();
    client::NamespaceSpec spec;
    spec.model = "engine";
    spec.block_tokens = 16;
    spec.content = client::OpaqueBlocks{100'000, "pages"};
    const auto store = client::BlockStore::Open(*client, spec).value();
    Bytes payload(200'000);
    std::mt19937 random(3);
    for (std::byte& byte : payload) byte = static_cast<std::byte>(random());
    const std::string_view keys[] = {"whole", "changed"};
    ASSERT_EQ(store->Store(keys, payload)->stored, 2);
    const int damaged = DamageAll(daemon->pid(), Bytes(payload.begin() + 150'000, payload.begin() + 150'100));
    if (damaged < 0) GTEST_SKIP() << "this process may not look into the memory of another one";
    ASSERT_GE(damaged, 1);
    const auto found = store->Lookup(keys);
    ASSERT_EQ(found->hits, 2);
    Bytes back(200'000);
    std::vector<int64_t> lost;
    const absl::Status loaded = store->Load(found->lease, 0, 2, back, {}, {}, &lost);
    ASSERT_TRUE(loaded.ok()) << loaded;
    if (checksums) {
      EXPECT_EQ(lost, std::vector<int64_t>{1});
      EXPECT_TRUE(std::equal(payload.begin(), payload.begin() + 100'000, back.begin()));
      EXPECT_EQ(client->GetStats()->checksum_failures, 1);
      EXPECT_EQ(store->Lookup(keys)->hits, 1);
    } else {
      EXPECT_TRUE(lost.empty());
      EXPECT_NE(back, payload);
    }
  }
}

}  // namespace
}  // namespace kvtide::e2e
