// The remote tier over a Redis or Valkey server. See README.md for what lies there, and for what happens when
// the server does not answer.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/random/random.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "daemon/cache/tier/remote_tier.h"
#include "daemon/remote/remote_options.h"
#include "daemon/remote/resp_connection.h"
#include "kernels/base/mutex.h"

namespace kvtide {

struct RedisTierOptions {
  RemoteOptions remote;
  size_t piece_bytes = size_t{2} << 20;  // of a value
  size_t max_connections = 4;
  absl::Duration least_back_off = absl::Seconds(1), most_back_off = absl::Seconds(60);
  std::function<absl::Time()> clock = absl::Now;  // of the back-off
};

class RedisTier : public RemoteTier {
 public:
  // InvalidArgument for options that do not fit together. The server need not be there: it is asked once, and
  // `problem` of the statistics says what came of it.
  static absl::StatusOr<std::unique_ptr<RedisTier>> Open(RedisTierOptions options);
  ~RedisTier() override;

  std::string name() const override { return address_text_; }
  std::vector<std::optional<BlockLabel>> Find(const std::string& space, std::span<const RemoteName> names,
                                              const RemoteLimit& limit) override;
  void Read(const std::string& space, std::span<RemoteJob> jobs, const RemoteLimit& limit) override;
  void Write(const std::string& space, std::span<RemoteJob> jobs, const RemoteLimit& limit) override;
  absl::Status Erase(const std::string& space, const RemoteLimit& limit) override;
  bool Writable() const override;
  RemoteStats Stats() const override;

  // The name of a value, for tests and operators: "kvtide:<space>:b<key>:<group>".
  std::string ValueName(const std::string& space, const RemoteName& name) const;

 private:
  explicit RedisTier(RedisTierOptions options);
  using Connection = std::unique_ptr<RespConnection>;
  using Commands = std::vector<RespCommand>;

  RespConnection::Limits LimitsOf(const RemoteLimit& limit) const;
  // One that is connected and let in. Unavailable while the server is not asked.
  absl::StatusOr<Connection> Take(const RespConnection::Limits& limits, bool fresh, bool* reused);
  absl::StatusOr<Connection> Connect(const RespConnection::Limits& limits);
  void GiveBack(Connection connection);
  // All commands in one round trip, on a connection of the pool.
  absl::Status Run(const Commands& commands, const RespConnection::Limits& limits,
                   const RespConnection::OnReply& reply);
  // An error that concerns the server, not a value: it is not asked for a while.
  void Away(const absl::Status& status);
  void Full(const std::string& problem);
  // A reply that is an error: ResourceExhausted (it takes no writes), PermissionDenied, DataLoss (of the
  // value), else Unavailable.
  static absl::Status ErrorOf(const redisReply& reply);
  std::string SpaceName(const std::string& space) const;
  std::string PieceName(const std::string& value, uint64_t write_id, size_t piece) const;
  void SetTtl(RespCommand* command) const;
  void Renew(const std::vector<std::string>& names, const RespConnection::Limits& limits);
  void Remove(const std::vector<std::string>& names, const RespConnection::Limits& limits);

  const RedisTierOptions options_;
  const std::string address_text_;
  mutable Mutex mu_;
  CondVar connection_free_;
  std::vector<Connection> idle_ ABSL_GUARDED_BY(mu_);
  size_t open_ ABSL_GUARDED_BY(mu_) = 0;       // in use, idle or being made
  bool probing_ ABSL_GUARDED_BY(mu_) = false;  // after an error one call tries at a time
  absl::Time retry_at_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  absl::Time write_retry_at_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  absl::Duration back_off_ ABSL_GUARDED_BY(mu_), write_back_off_ ABSL_GUARDED_BY(mu_);
  absl::BitGen random_ ABSL_GUARDED_BY(mu_);
  RemoteStats stats_ ABSL_GUARDED_BY(mu_);
};

}  // namespace kvtide
