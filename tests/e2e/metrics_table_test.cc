// daemon/metrics/families.md is what a real daemon tells Prometheus: every family with its type, labels, unit
// and meaning.
//
//   KVTIDE_WRITE_METRICS_TABLE=daemon/metrics/families.md kvtide_test_e2e --gtest_filter='MetricsTable.*'
//   writes it
#include <arpa/inet.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "clients/cpp/block_store.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/e2e/test_daemon.h"
#include "tests/source_path.h"

namespace kvtide::e2e {
namespace {

struct Family {
  std::string type, help;
  std::set<std::string> labels;
};

std::string Scrape(const std::string& address) {
  const size_t colon = address.rfind(':');
  sockaddr_in name{};
  name.sin_family = AF_INET;
  name.sin_port = htons(static_cast<uint16_t>(std::stoi(address.substr(colon + 1))));
  ::inet_pton(AF_INET, address.substr(0, colon).c_str(), &name.sin_addr);
  const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
  EXPECT_EQ(::connect(fd, reinterpret_cast<sockaddr*>(&name), sizeof(name)), 0);
  const std::string request = "GET /metrics HTTP/1.0\r\n\r\n";
  EXPECT_EQ(::send(fd, request.data(), request.size(), 0), static_cast<ssize_t>(request.size()));
  std::string text;
  char piece[1 << 16];
  for (ssize_t size; (size = ::recv(fd, piece, sizeof(piece), 0)) > 0;)
    text.append(piece, static_cast<size_t>(size));
  ::close(fd);
  return text;
}

std::map<std::string, Family> Families(const std::string& exposition) {
  std::map<std::string, Family> families;
  std::istringstream lines(exposition);
  for (std::string line; std::getline(lines, line);) {
    absl::string_view rest = absl::StripSuffix(line, "\r");
    if (absl::ConsumePrefix(&rest, "# HELP ")) {
      const std::vector<std::string> parts = absl::StrSplit(rest, absl::MaxSplits(' ', 1));
      families[parts[0]].help = parts.back();
    } else if (absl::ConsumePrefix(&rest, "# TYPE ")) {
      const std::vector<std::string> parts = absl::StrSplit(rest, ' ');
      families[parts[0]].type = parts.back();
    } else if (const size_t open = rest.find('{'); open != absl::string_view::npos && rest[0] != '#') {
      std::string name(rest.substr(0, open));
      for (const char* part : {"_bucket", "_sum", "_count"})
        if (const std::string whole(absl::StripSuffix(name, part)); whole != name && families.contains(whole))
          name = whole;
      for (const absl::string_view label :
           absl::StrSplit(rest.substr(open + 1, rest.rfind('}') - open - 1), "\","))
        if (const std::string key(label.substr(0, label.find('='))); key != "le")
          families[name].labels.insert(key);
    }
  }
  // The HTTP library's own, and GPUs, which only some machines have (daemon/metrics/README.md).
  std::erase_if(families, [](const auto& family) {
    return absl::StartsWith(family.first, "exposer_") || absl::StartsWith(family.first, "kvtide_gpu_");
  });
  return families;
}

std::string UnitOf(const std::string& name) {
  const absl::string_view base = absl::StripSuffix(name, "_total");
  if (absl::EndsWith(base, "_seconds")) return "s";
  if (absl::EndsWith(base, "_bytes")) return "bytes";
  if (absl::EndsWith(base, "_bytes_per_second")) return "bytes/s";
  if (absl::EndsWith(base, "_info")) return "always 1";
  return name == "kvtide_bytes_per_value" ? "bytes per value" : "count";
}

std::map<std::string, std::string> Rows(const std::map<std::string, Family>& families) {
  std::map<std::string, std::string> rows;
  for (const auto& [name, family] : families)
    rows[name] =
        absl::StrCat("| `", name, "` | ", family.type, " | ", absl::StrJoin(family.labels, ", "), " | ",
                     UnitOf(name), " | ", absl::StrReplaceAll(family.help, {{"|", "\\|"}}), " |");
  return rows;
}

std::map<std::string, std::string> ReadTable(const std::string& path) {
  std::map<std::string, std::string> rows;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);)
    if (absl::StartsWith(line, "| `")) rows[line.substr(3, line.find('`', 3) - 3)] = line;
  return rows;
}

TEST(MetricsTable, IsWhatARealDaemonTells) {
  const std::string folder = MakeFolder();
  // A device and a pair of every kind of family: sequences, blocks in all tiers, a disk, a remote tier that
  // is away.
  const auto daemon = TestDaemon::Start({"--metrics-address", "127.0.0.1:0", "--disk", folder + "/disk:16MiB",
                                         "--remote", "unix:" + folder + "/nobody.sock"});
  const auto client = daemon->Connect();
  ASSERT_TRUE(client->RegisterModel(SmallModel()).ok());
  const auto sequence = client->CreateSequence("small", {.pair = "f16/f16"});
  ASSERT_TRUE(sequence.ok());
  ASSERT_TRUE(client->Append(*sequence, 0, Tokens(1, 0, 100).layers).ok());
  client::NamespaceSpec spec;
  spec.model = "small";
  spec.block_tokens = 64;
  spec.content = client::OpaqueBlocks{4096, ""};
  const auto store = client::BlockStore::Open(*client, spec);
  ASSERT_TRUE(store.ok()) << store.status();
  const std::string_view key = "not there";
  ASSERT_TRUE((*store)->Lookup(std::span(&key, 1)).ok());
  const std::vector<client::TokenId> prompt(100, 7);
  ASSERT_TRUE(client->LookupPrefix("small", {.pair = "f16/f16"}, prompt, -1).ok());
  ASSERT_TRUE(client->LookupPrefix("small", {.pair = "f16/f16"}, prompt, -1, true).ok());  // counts not
  const std::string text = Scrape(daemon->metrics_address());
  EXPECT_THAT(text, ::testing::HasSubstr("kvtide_tenant_lookups_total{found_in=\"none\",tenant=\"default\","
                                         "unit=\"tokens\"} 100"));
  std::map<std::string, std::string> now = Rows(Families(text));
  ASSERT_GT(now.size(), 50u);
  const std::string path = testing::SourcePath("daemon/metrics/families.md");
  if (const char* to = std::getenv("KVTIDE_WRITE_METRICS_TABLE"); to != nullptr) {
    std::ofstream out(to);
    out << "# All metrics of kvtided\n\nWritten by a test from a scrape of a real daemon "
           "(tests/e2e/metrics_table_test.cc says how); "
           "the same test compares them. Histograms have\n`_bucket` (label `le`), `_sum` and `_count`. "
           "Families of the disk are there with "
           "a disk tier, `kvtide_remote_*` with a remote one, `kvtide_allocator_*` where jemalloc is linked; "
           "`kvtide_gpu_*` (README.md) is left "
           "out: few machines have it.\n\n| metric | type | labels | unit | "
           "meaning |\n|---|---|---|---|---|\n";
    for (const auto& [name, row] : now) out << row << "\n";
  }
  std::map<std::string, std::string> table = ReadTable(path);
  const auto allocator = [](const auto& row) { return absl::StartsWith(row.first, "kvtide_allocator_"); };
  if (std::none_of(now.begin(), now.end(), allocator)) std::erase_if(table, allocator);
  EXPECT_EQ(table, now) << "write the table again, see above";
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace kvtide::e2e
