#include "kernels/base/tickets.h"

#include <gtest/gtest.h>

#include <set>

namespace kvtide {
namespace {

using Ticket = TicketBook::Ticket;

TEST(TicketBook, TellsTheEndOnce) {
  TicketBook book(3);
  const Ticket good = *book.Issue(), bad = *book.Issue();
  EXPECT_FALSE(*book.Poll(good));
  book.Finish(good, absl::OkStatus());
  book.Finish(bad, absl::DataLossError("lost"));
  EXPECT_TRUE(*book.Poll(good));
  EXPECT_EQ(book.Poll(good).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(book.Poll(bad).status(), absl::DataLossError("lost"));
  EXPECT_EQ(book.Poll(bad).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(book.Poll(0).status().code(), absl::StatusCode::kInvalidArgument);
  book.Finish(99, absl::OkStatus());  // nobody's
  EXPECT_EQ(book.open(), 0u);
}

TEST(TicketBook, KeepsItsLimitAndUsesNoTicketTwice) {
  TicketBook book(2);
  std::set<Ticket> seen;
  for (int round = 0; round < 100; round++) {
    const Ticket a = *book.Issue(), b = *book.Issue();
    EXPECT_TRUE(seen.insert(a).second && seen.insert(b).second && a != 0 && b != 0);
    EXPECT_EQ(book.Issue().status().code(), absl::StatusCode::kResourceExhausted);
    book.Finish(a, absl::OkStatus());
    EXPECT_EQ(book.Issue().status().code(), absl::StatusCode::kResourceExhausted) << "not yet polled";
    EXPECT_TRUE(*book.Poll(a));
    book.Finish(b, absl::OkStatus());
    EXPECT_TRUE(*book.Poll(b));
  }
}

}  // namespace
}  // namespace kvtide
