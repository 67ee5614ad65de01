#include "daemon/service/read_turns.h"

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "gtest/gtest.h"

namespace kvtide::service {
namespace {

struct Counted final : ReadTurns::Reader {
  explicit Counted(std::vector<int>* turns, int number) : turns_(turns), number_(number) {}
  void Read() override { turns_->push_back(number_); }

 private:
  std::vector<int>* const turns_;
  const int number_;
};

TEST(ReadTurns, ReadsAFewAtATimeInTheirOrder) {
  ReadTurns turns;
  std::vector<int> read, wanted;
  std::vector<std::unique_ptr<Counted>> readers;
  for (int i = 0; i < 10; i++) {
    readers.push_back(std::make_unique<Counted>(&read, i));
    turns.Enter(*readers.back());
    if (i < ReadTurns::kMost) wanted.push_back(i);
  }
  EXPECT_EQ(read, wanted);
  for (int i = ReadTurns::kMost; i < 10; i++) {
    turns.Leave();
    wanted.push_back(i);
    EXPECT_EQ(read, wanted);
  }
  for (int i = 0; i < ReadTurns::kMost; i++) turns.Leave();
  EXPECT_EQ(read, wanted);
  Counted late(&read, 10);
  turns.Enter(late);
  EXPECT_EQ(read.back(), 10);
}

// Readers that leave within Read, from several threads: all get their turn.
TEST(ReadTurns, EverybodyGetsATurn) {
  struct Brief final : ReadTurns::Reader {
    void Read() override {
      count++;
      turns->Leave();
    }
    ReadTurns* turns = nullptr;
    std::atomic<int> count{0};
  };
  ReadTurns turns;
  constexpr size_t kThreads = 4, kEach = 500;
  std::vector<Brief> readers(kThreads * kEach);
  for (Brief& reader : readers) reader.turns = &turns;
  std::vector<std::thread> threads;
  for (size_t t = 0; t < kThreads; t++)
    threads.emplace_back([&, t] {
      for (size_t i = 0; i < kEach; i++) turns.Enter(readers[t * kEach + i]);
    });
  for (std::thread& thread : threads) thread.join();
  for (const Brief& reader : readers) EXPECT_EQ(reader.count, 1);
}

}  // namespace
}  // namespace kvtide::service
