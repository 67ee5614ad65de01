#include "daemon/service/clients.h"

#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"

namespace kvtide::service {
namespace {

CallReport Call(Way way, const char* method, const char* tenant, int code = 0) {
  CallReport call;
  call.way = way;
  call.method = method;
  call.tenant = tenant;
  call.code = code;
  call.request_bytes = 10;
  call.response_bytes = 3;
  return call;
}

TEST(Clients, CountByWayAndByClient) {
  Clients clients;
  const auto engine = clients.Add(Way::kDirect, "unix:uid=1,pid=2", "acme");
  auto script = clients.Add(Way::kGrpc, "127.0.0.1:5", "");
  for (int i = 0; i < 5; i++) {
    clients.Count(Call(Way::kDirect, "BeginStep", "acme"), engine.get());
    clients.Count(Call(Way::kDirect, "EndStep", "acme", i == 0 ? 9 : 0), engine.get());
  }
  clients.Count(Call(Way::kGrpc, "Append", "shop", 8), script.get());
  clients.Count(Call(Way::kGrpc, "Session", "shop"), script.get());  // its calls count, not the stream
  clients.Count(Call(Way::kGrpc, "Append", "shop"), nullptr);        // whose connection has gone
  v1::GetStatsResponse all;
  clients.ToProto({"default", true}, &all);
  ASSERT_EQ(all.ways_size(), 3);
  EXPECT_EQ(all.ways(0).way(), "grpc");
  EXPECT_EQ(all.ways(0).clients(), 1);
  EXPECT_EQ(all.ways(0).calls(), 2);
  EXPECT_EQ(all.ways(1).way(), "shared_memory");
  EXPECT_EQ(all.ways(1).clients() + all.ways(1).calls(), 0);
  EXPECT_EQ(all.ways(2).way(), "direct");
  EXPECT_EQ(all.ways(2).calls(), 10);
  EXPECT_EQ(all.ways(2).steps(), 4) << "a step that could not end is none";
  EXPECT_EQ(all.ways(2).received_bytes(), 100);
  EXPECT_EQ(all.ways(2).sent_bytes(), 30);
  ASSERT_EQ(all.clients_size(), 2);
  EXPECT_EQ(all.clients(0).name(), "unix:uid=1,pid=2") << "most calls first";
  EXPECT_EQ(all.clients(0).way(), "direct");
  EXPECT_EQ(all.clients(0).steps(), 4);
  EXPECT_EQ(all.clients(1).tenant(), "shop") << "as its last call has proved";
  EXPECT_EQ(all.clients(1).calls(), 1);

  // What others have is nobody's business.
  v1::GetStatsResponse mine;
  clients.ToProto({"shop", false}, &mine);
  ASSERT_EQ(mine.clients_size(), 1);
  EXPECT_EQ(mine.clients(0).name(), "127.0.0.1:5");

  script.reset();
  v1::GetStatsResponse later;
  clients.ToProto({"default", true}, &later);
  EXPECT_EQ(later.clients_size(), 1);
  EXPECT_EQ(later.ways(0).clients(), 0);
  EXPECT_EQ(later.ways(0).calls(), 2) << "counters do not go with their clients";
}

TEST(Clients, SoManyAreNamed) {
  Clients clients;
  std::vector<std::shared_ptr<Client>> held;
  for (size_t i = 0; i < Clients::kMostShown + 100; i++) {
    held.push_back(clients.Add(Way::kGrpc, absl::StrCat("client ", i), "default"));
    for (size_t calls = 0; calls < i; calls++)
      clients.Count(Call(Way::kGrpc, "Append", "default"), held[i].get());
  }
  v1::GetStatsResponse stats;
  clients.ToProto({"default", true}, &stats);
  ASSERT_EQ(stats.clients_size(), static_cast<int>(Clients::kMostShown));
  EXPECT_EQ(stats.clients(0).name(), absl::StrCat("client ", Clients::kMostShown + 99));
  EXPECT_EQ(stats.ways(0).clients(), static_cast<int64_t>(Clients::kMostShown + 100));
}

TEST(Clients, ComeAndGoInAnyThread) {
  Clients clients;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; t++)
    threads.emplace_back([&] {
      for (int i = 0; i < 1000; i++) {
        const auto one = clients.Add(Way::kSharedMemory, "one", "default");
        clients.Count(Call(Way::kSharedMemory, "Append", "default"), one.get());
        if (i % 100 == 0) clients.Ways();
      }
    });
  for (std::thread& thread : threads) thread.join();
  const auto ways = clients.Ways();
  EXPECT_EQ(ways[1].connected, 0);
  EXPECT_EQ(ways[1].traffic.calls, 4000);
}

}  // namespace
}  // namespace kvtide::service
