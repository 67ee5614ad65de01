#include "daemon/remote/redis_tier.h"

#include <hiredis/hiredis.h>
#include <openssl/sha.h>
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "daemon/remote/value_header.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace kvtide {
namespace {

using Limits = RespConnection::Limits;

std::string Hex(uint64_t value) { return std::string(absl::StrCat(absl::Hex(value, absl::kZeroPad16))); }

std::string_view TextOf(const redisReply& reply) {
  const bool text =
      reply.type == REDIS_REPLY_STRING || reply.type == REDIS_REPLY_STATUS || reply.type == REDIS_REPLY_ERROR;
  return text ? std::string_view(reply.str, reply.len) : std::string_view();
}
bool IsError(const redisReply& reply) { return reply.type == REDIS_REPLY_ERROR; }

std::span<const std::byte> BytesOf(std::string_view text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

// "PASSWORD" or "USER PASSWORD".
absl::StatusOr<RespCommand> AuthCommand(const std::string& file_name) {
  std::ifstream file(file_name);
  std::string line;
  if (!file || !std::getline(file, line))
    return absl::PermissionDeniedError(absl::StrCat("cannot read remote_auth_file ", file_name));
  RespCommand command{{"AUTH"}, 0, {}};
  const std::vector<std::string> words = absl::StrSplit(line, absl::ByAnyChar(" \t\r"), absl::SkipEmpty());
  if (words.empty() || words.size() > 2)
    return absl::PermissionDeniedError(
        absl::StrCat("remote_auth_file ", file_name, " must hold PASSWORD or USER PASSWORD in one line"));
  command.words.insert(command.words.end(), words.begin(), words.end());
  return command;
}

// "used_memory:123\r\n..."
std::string FieldOf(std::string_view info, const std::string& field) {
  const std::string wanted = absl::StrCat(field, ":");
  for (size_t at = 0; at < info.size();) {
    const size_t end = std::min(info.find('\n', at), info.size());
    std::string line(info.substr(at, end - at));
    if (absl::StartsWith(line, wanted)) {
      line.erase(0, wanted.size());
      while (!line.empty() && line.back() == '\r') line.pop_back();
      return line;
    }
    at = end + 1;
  }
  return "";
}

class Stopwatch {
 public:
  absl::Duration Elapsed() const { return absl::Now() - start_; }

 private:
  const absl::Time start_ = absl::Now();
};

}  // namespace

RedisTier::RedisTier(RedisTierOptions options)
    : options_(std::move(options)), address_text_(options_.remote.address.Text()) {
  stats_.server = address_text_;
}
RedisTier::~RedisTier() = default;

absl::StatusOr<std::unique_ptr<RedisTier>> RedisTier::Open(RedisTierOptions options) {
  KVTIDE_RETURN_IF_ERROR(CheckRemoteOptions(options.remote));
  std::unique_ptr<RedisTier> tier(new RedisTier(std::move(options)));
  // Says now what is wrong, if something is.
  const absl::Status asked =
      tier->Run({{{"PING"}, 0, {}}}, tier->LimitsOf({}), [](size_t, const redisReply&) {});
  (void)asked;  // Stats says it
  return tier;
}

Limits RedisTier::LimitsOf(const RemoteLimit& limit) const {
  return {absl::Now() + limit.time, options_.remote.timeout, limit.cancellation};
}

// Names.

std::string RedisTier::SpaceName(const std::string& space) const {
  std::array<uint8_t, SHA256_DIGEST_LENGTH> hash;
  SHA256(reinterpret_cast<const uint8_t*>(space.data()), space.size(), hash.data());
  std::string hex;
  for (size_t i = 0; i < 16; i++) absl::StrAppend(&hex, absl::Hex(hash[i], absl::kZeroPad2));
  return absl::StrCat(options_.remote.prefix, ":", hex, ":");
}

namespace {
std::string NameIn(const std::string& space_name, const RemoteName& name) {
  const char kind = name.kind == RemoteName::Kind::kBlock ? 'b' : 'p';
  return absl::StrCat(space_name, std::string(1, kind), Hex(name.key.high), Hex(name.key.low), ":",
                      name.group);
}
}  // namespace

std::string RedisTier::ValueName(const std::string& space, const RemoteName& name) const {
  return NameIn(SpaceName(space), name);
}

// Pieces of different writes never meet: their names have the write's id.
std::string RedisTier::PieceName(const std::string& value, uint64_t write_id, size_t piece) const {
  return absl::StrCat(value, ":", Hex(write_id), ":", piece);
}

// Connections.

absl::StatusOr<RedisTier::Connection> RedisTier::Connect(const Limits& limits) {
  const RemoteOptions& remote = options_.remote;
  Limits within = limits;
  within.deadline = std::min(limits.deadline, absl::Now() + remote.timeout);
  KVTIDE_ASSIGN_OR_RETURN(Connection connection,
                          RespConnection::Connect(remote.address, remote.ca_file, within));
  Commands commands;
  if (!remote.auth_file.empty()) {
    KVTIDE_ASSIGN_OR_RETURN(RespCommand auth, AuthCommand(remote.auth_file));
    commands.push_back(std::move(auth));
  }
  const size_t auths = commands.size();
  if (remote.address.database != 0)
    commands.push_back({{"SELECT", absl::StrCat(remote.address.database)}, 0, {}});
  commands.push_back({{"PING"}, 0, {}});
  const size_t needed = commands.size();
  commands.push_back({{"INFO", "memory"}, 0, {}});
  absl::Status refused;
  std::string info;
  within.deadline = std::min(limits.deadline, absl::Now() + remote.timeout);
  KVTIDE_RETURN_IF_ERROR(connection->Run(commands, within, [&](size_t i, const redisReply& reply) {
    if (i >= needed) {
      if (!IsError(reply)) info = std::string(TextOf(reply));
      return;
    }
    if (IsError(reply) && refused.ok()) {
      const std::string text(TextOf(reply));
      const bool auth = i < auths || absl::StartsWith(text, "NOAUTH") || absl::StartsWith(text, "NOPERM");
      const char* const hint = !auth                      ? ""
                               : remote.auth_file.empty() ? " (it wants a password: remote_auth_file)"
                                                          : " (see remote_auth_file)";
      refused = auth ? absl::PermissionDeniedError(absl::StrCat(text, hint)) : absl::UnavailableError(text);
    }
  }));
  KVTIDE_RETURN_IF_ERROR(refused);
  const MutexLock lock(mu_);
  stats_.connects++;
  if (!info.empty()) {
    if (!absl::SimpleAtoi(FieldOf(info, "maxmemory"), &stats_.memory_limit_bytes))
      stats_.memory_limit_bytes = 0;
    if (!absl::SimpleAtoi(FieldOf(info, "used_memory"), &stats_.memory_used_bytes))
      stats_.memory_used_bytes = 0;
    stats_.memory_policy = FieldOf(info, "maxmemory_policy");
  }
  return connection;
}

absl::StatusOr<RedisTier::Connection> RedisTier::Take(const Limits& limits, bool fresh, bool* reused) {
  *reused = false;
  bool probe = false;
  {
    MutexLock lock(mu_);
    if (fresh) {
      open_ -= idle_.size();
      idle_.clear();
    }
    while (true) {
      if (options_.clock() < retry_at_ || probing_)
        return absl::UnavailableError(absl::StrCat("the server is not asked for a while: ", stats_.problem));
      if (!idle_.empty()) {
        *reused = true;
        Connection connection = std::move(idle_.back());
        idle_.pop_back();
        return connection;
      }
      if (open_ < options_.max_connections) break;
      const absl::Duration left = limits.deadline - absl::Now();
      if (left <= absl::ZeroDuration())
        return absl::ResourceExhaustedError("all connections to the server are in use");
      connection_free_.WaitFor(mu_, absl::ToChronoNanoseconds(std::min(left, absl::Milliseconds(50))));
    }
    open_++;
    probe = probing_ = back_off_ > absl::ZeroDuration();
  }
  absl::StatusOr<Connection> connection = Connect(limits);
  if (!connection.ok() && !absl::IsCancelled(connection.status())) Away(connection.status());
  MutexLock lock(mu_);
  if (probe) probing_ = false;
  if (!connection.ok()) open_--;
  if (connection.ok()) {
    back_off_ = absl::ZeroDuration();
    stats_.problem.clear();
  }
  connection_free_.NotifyAll();
  return connection;
}

void RedisTier::GiveBack(Connection connection) {
  MutexLock lock(mu_);
  if (connection != nullptr) {
    idle_.push_back(std::move(connection));
  } else {
    open_--;
  }
  connection_free_.NotifyAll();
}

void RedisTier::Away(const absl::Status& status) {
  std::vector<Connection> closing;
  MutexLock lock(mu_);
  if (absl::IsDeadlineExceeded(status)) {
    stats_.timeouts++;
  } else {
    stats_.errors++;
  }
  back_off_ = std::clamp(2 * back_off_, options_.least_back_off, options_.most_back_off);
  // Daemons that have lost the same server do not come back in the same moment.
  retry_at_ = options_.clock() + back_off_ * absl::Uniform(random_, .75, 1.25);
  stats_.problem = std::string(status.message());
  open_ -= idle_.size();
  closing.swap(idle_);
}

void RedisTier::Full(const std::string& problem) {
  MutexLock lock(mu_);
  stats_.errors++;
  write_back_off_ = std::clamp(2 * write_back_off_, options_.least_back_off, options_.most_back_off);
  write_retry_at_ = options_.clock() + write_back_off_ * absl::Uniform(random_, .75, 1.25);
  stats_.write_problem = problem;
}

absl::Status RedisTier::ErrorOf(const redisReply& reply) {
  const std::string text(TextOf(reply));
  for (const char* full : {"OOM", "READONLY", "MISCONF", "NOREPLICAS"})
    if (absl::StartsWith(text, full)) return absl::ResourceExhaustedError(text);
  for (const char* refused : {"NOAUTH", "NOPERM", "WRONGPASS"})
    if (absl::StartsWith(text, refused)) return absl::PermissionDeniedError(text);
  if (absl::StartsWith(text, "WRONGTYPE")) return absl::DataLossError("something else lies there");
  return absl::UnavailableError(text);
}

absl::Status RedisTier::Run(const Commands& commands, const Limits& limits,
                            const RespConnection::OnReply& reply) {
  absl::Status status;
  for (const bool fresh : {false, true}) {
    bool reused = false;
    absl::StatusOr<Connection> connection = Take(limits, fresh, &reused);
    KVTIDE_RETURN_IF_ERROR(connection.status());
    status = (*connection)->Run(commands, limits, reply);
    const bool answered = (*connection)->answered();
    GiveBack(status.ok() ? *std::move(connection) : nullptr);
    // A connection that rested may have ended with a server that was started anew since.
    if (status.ok() || !reused || answered || !absl::IsUnavailable(status)) break;
  }
  if (!status.ok() && !absl::IsCancelled(status)) Away(status);
  return status;
}

void RedisTier::SetTtl(RespCommand* command) const {
  if (options_.remote.ttl == absl::InfiniteDuration()) return;
  command->words.push_back("PX");
  command->words.push_back(absl::StrCat(absl::ToInt64Milliseconds(options_.remote.ttl)));
}

// As far as the server allows it.
void RedisTier::Renew(const std::vector<std::string>& names, const Limits& limits) {
  if (options_.remote.ttl == absl::InfiniteDuration() || names.empty()) return;
  const std::string time = absl::StrCat(absl::ToInt64Milliseconds(options_.remote.ttl));
  Commands commands;
  for (const std::string& name : names) commands.push_back({{"PEXPIRE", name, time}, 0, {}});
  (void)Run(commands, limits, [](size_t, const redisReply&) {});
}

// Values that are of no use: they would keep good ones from being written.
void RedisTier::Remove(const std::vector<std::string>& names, const Limits& limits) {
  if (names.empty() || options_.remote.writes == RemoteWrites::kNone) return;
  RespCommand command{{"UNLINK"}, 0, {}};
  command.words.insert(command.words.end(), names.begin(), names.end());
  (void)Run({std::move(command)}, limits, [](size_t, const redisReply&) {});
}

// Values.

std::vector<std::optional<BlockLabel>> RedisTier::Find(const std::string& space,
                                                       std::span<const RemoteName> names,
                                                       const RemoteLimit& limit) {
  std::vector<std::optional<BlockLabel>> found(names.size());
  if (names.empty()) return found;
  const std::string prefix = SpaceName(space);
  const std::string last = absl::StrCat(kValueHeaderBytes - 1);
  Commands commands;
  commands.reserve(names.size());
  for (const RemoteName& name : names)
    commands.push_back({{"GETRANGE", NameIn(prefix, name), "0", last}, 0, {}});
  const Limits limits = LimitsOf(limit);
  const Stopwatch watch;
  absl::Status refused;
  const absl::Status status = Run(commands, limits, [&](size_t i, const redisReply& reply) {
    if (IsError(reply)) {
      const absl::Status error = ErrorOf(reply);
      if (refused.ok() && !absl::IsDataLoss(error)) refused = error;
      return;
    }
    const absl::StatusOr<ValueHeader> header = DecodeValueHeader(BytesOf(TextOf(reply)));
    if (header.ok()) found[i] = header->label;
  });
  if (!refused.ok()) Away(refused);
  if (!status.ok()) found.assign(names.size(), std::nullopt);
  const MutexLock lock(mu_);
  if (status.ok()) stats_.find.Add(watch.Elapsed());
  return found;
}

void RedisTier::Read(const std::string& space, std::span<RemoteJob> jobs, const RemoteLimit& limit) {
  const std::string prefix = SpaceName(space);
  const Limits limits = LimitsOf(limit);
  const Stopwatch watch;
  struct Reading {
    RemoteJob* job = nullptr;
    std::string name;
    ValueHeader header;
    XXH3_state_t* hash = nullptr;
    size_t bytes = 0, next = 0;  // what has come, and which piece is next
    std::vector<std::string> names;
  };
  struct HashGuard {
    std::vector<XXH3_state_t*> states;
    ~HashGuard() {
      for (XXH3_state_t* const state : states) XXH3_freeState(state);
    }
  } hashes;
  std::vector<Reading> readings(jobs.size());
  for (size_t i = 0; i < jobs.size(); i++) {
    Reading& reading = readings[i];
    reading.job = &jobs[i];
    reading.name = NameIn(prefix, jobs[i].name);
    reading.names = {reading.name};
    reading.hash = XXH3_createState();
    hashes.states.push_back(reading.hash);
    XXH3_64bits_reset(reading.hash);
    jobs[i].status = absl::UnavailableError("not read");
  }
  absl::Status refused;
  const auto take = [](Reading& reading, std::string_view bytes) {
    const uint64_t left = reading.header.label.bytes - reading.bytes;
    const uint64_t wanted = std::min<uint64_t>(left, std::max<uint64_t>(reading.header.piece_bytes, 1));
    if (bytes.size() != wanted)
      return absl::DataLossError(
          absl::StrCat("piece ", reading.next, " has ", bytes.size(), " bytes, not ", wanted));
    // The reply belongs to this call.
    const std::span<std::byte> piece(reinterpret_cast<std::byte*>(const_cast<char*>(bytes.data())),
                                     bytes.size());
    XXH3_64bits_update(reading.hash, piece.data(), piece.size());
    if (!piece.empty()) KVTIDE_RETURN_IF_ERROR(reading.job->copy(reading.bytes, piece));
    reading.bytes += piece.size();
    reading.next++;
    return absl::OkStatus();
  };
  const auto finish = [](Reading& reading) {
    if (reading.bytes != reading.header.label.bytes) return;  // more is to come
    RemoteJob& job = *reading.job;
    job.status = XXH3_64bits_digest(reading.hash) == reading.header.label.checksum
                     ? absl::OkStatus()
                     : absl::DataLossError("the checksum of the value is not that of its bytes");
    if (job.status.ok()) job.label = reading.header.label;
  };
  // The first values, each with a label.
  Commands commands;
  for (const Reading& reading : readings) commands.push_back({{"GET", reading.name}, 0, {}});
  absl::Status status = Run(commands, limits, [&](size_t i, const redisReply& reply) {
    Reading& reading = readings[i];
    RemoteJob& job = *reading.job;
    if (IsError(reply)) {
      job.status = ErrorOf(reply);
      if (refused.ok() && !absl::IsDataLoss(job.status)) refused = job.status;
      return;
    }
    if (reply.type == REDIS_REPLY_NIL) {
      job.status = absl::NotFoundError("nothing lies there");
      return;
    }
    const std::string_view text = TextOf(reply);
    const absl::StatusOr<ValueHeader> header = DecodeValueHeader(BytesOf(text));
    job.status = header.ok() ? CheckValueLabel(header->label, job.label) : header.status();
    if (!job.status.ok()) return;
    reading.header = *header;
    job.status = take(reading, text.substr(kValueHeaderBytes));
    if (!job.status.ok()) return;
    job.status = absl::UnavailableError("not read to its end");
    finish(reading);
  });
  // Their further pieces.
  commands.clear();
  std::vector<Reading*> of_command;
  for (Reading& reading : readings) {
    if (!status.ok() || reading.next != 1) continue;
    for (size_t piece = 1; piece < reading.header.pieces(); piece++) {
      reading.names.push_back(PieceName(reading.name, reading.header.label.write_id, piece));
      commands.push_back({{"GET", reading.names.back()}, 0, {}});
      of_command.push_back(&reading);
    }
  }
  if (!commands.empty())
    status = Run(commands, limits, [&](size_t i, const redisReply& reply) {
      Reading& reading = *of_command[i];
      RemoteJob& job = *reading.job;
      if (!absl::IsUnavailable(job.status)) return;  // failed before
      if (IsError(reply)) {
        job.status = ErrorOf(reply);
        if (refused.ok() && !absl::IsDataLoss(job.status)) refused = job.status;
      } else if (reply.type == REDIS_REPLY_NIL) {
        job.status = absl::DataLossError("a piece of the value is not there any more");
      } else if (absl::Status taken = take(reading, TextOf(reply)); !taken.ok()) {
        job.status = std::move(taken);
      } else {
        finish(reading);
      }
    });
  if (!refused.ok()) Away(refused);
  std::vector<std::string> good, bad;
  uint64_t bytes = 0, blocks = 0, damaged = 0;
  for (Reading& reading : readings) {
    if (reading.job->status.ok()) {
      blocks++;
      bytes += reading.bytes;
      good.insert(good.end(), reading.names.begin(), reading.names.end());
    } else if (absl::IsDataLoss(reading.job->status)) {
      damaged++;
      bad.push_back(reading.name);
    }
  }
  {
    const MutexLock lock(mu_);
    stats_.read_blocks += blocks;
    stats_.read_bytes += bytes;
    stats_.damaged_blocks += damaged;
    if (status.ok()) stats_.read.Add(watch.Elapsed());
  }
  if (!status.ok() || !refused.ok()) return;
  Renew(good, limits);
  Remove(bad, limits);
}

void RedisTier::Write(const std::string& space, std::span<RemoteJob> jobs, const RemoteLimit& limit) {
  const std::string prefix = SpaceName(space);
  const Limits limits = LimitsOf(limit);
  const Stopwatch watch;
  struct Writing {
    RemoteJob* job = nullptr;
    std::string name, header;
    std::vector<std::byte> bytes;
    size_t pieces = 1;
  };
  std::vector<Writing> writings(jobs.size());
  const auto piece_of = [&](const Writing& writing, size_t piece) {
    const std::string_view all(reinterpret_cast<const char*>(writing.bytes.data()), writing.bytes.size());
    return all.substr(std::min(all.size(), piece * options_.piece_bytes), options_.piece_bytes);
  };
  for (size_t i = 0; i < jobs.size(); i++) {
    Writing& writing = writings[i];
    RemoteJob& job = jobs[i];
    writing.job = &job;
    writing.name = NameIn(prefix, job.name);
    writing.bytes.resize(static_cast<size_t>(job.label.bytes));
    job.status = writing.bytes.empty() ? absl::OkStatus() : job.copy(0, writing.bytes);
    if (!job.status.ok()) continue;
    {
      const MutexLock lock(mu_);
      job.label.write_id = absl::Uniform<uint64_t>(random_);
    }
    job.label.checksum = XXH3_64bits(writing.bytes.data(), writing.bytes.size());
    const ValueHeader header{job.label, options_.piece_bytes};
    writing.pieces = header.pieces();
    writing.header = EncodeValueHeader(header);
  }
  absl::Status full, refused;
  const auto send = [&](bool first) {
    Commands commands;
    std::vector<RemoteJob*> of_command;
    for (Writing& writing : writings) {
      if (!writing.job->status.ok()) continue;
      for (size_t piece = first ? 0 : 1; piece < (first ? 1 : writing.pieces); piece++) {
        RespCommand command;
        command.words = {
            "SET", piece == 0 ? writing.name : PieceName(writing.name, writing.job->label.write_id, piece)};
        command.value_at = 2;
        if (piece == 0) command.value.push_back(writing.header);
        command.value.push_back(piece_of(writing, piece));
        SetTtl(&command);
        commands.push_back(std::move(command));
        of_command.push_back(writing.job);
      }
    }
    if (commands.empty()) return absl::OkStatus();
    return Run(commands, limits, [&](size_t i, const redisReply& reply) {
      if (!IsError(reply)) return;
      of_command[i]->status = ErrorOf(reply);
      absl::Status& of_kind = absl::IsUnavailable(of_command[i]->status) ? refused : full;
      if (of_kind.ok()) of_kind = of_command[i]->status;
    });
  };
  // What is found by its first value is there in full.
  absl::Status status = send(false);
  if (status.ok()) status = send(true);
  if (!status.ok())
    for (RemoteJob& job : jobs)
      if (job.status.ok()) job.status = status;
  if (!refused.ok()) Away(refused);
  // It may not be written to, and may be read all the same.
  if (!full.ok()) Full(std::string(full.message()));
  if (status.ok()) {
    // Pieces that nobody will find would take the room of others.
    std::vector<std::string> orphans;
    for (const Writing& writing : writings)
      for (size_t piece = 1; !writing.job->status.ok() && piece < writing.pieces; piece++)
        orphans.push_back(PieceName(writing.name, writing.job->label.write_id, piece));
    Remove(orphans, limits);
  }
  const MutexLock lock(mu_);
  if (status.ok() && full.ok() && refused.ok()) {
    write_back_off_ = absl::ZeroDuration();
    stats_.write_problem.clear();
    stats_.write.Add(watch.Elapsed());
  }
  for (const Writing& writing : writings) {
    if (!writing.job->status.ok()) continue;
    stats_.written_blocks++;
    stats_.written_bytes += writing.bytes.size();
  }
}

absl::Status RedisTier::Erase(const std::string& space, const RemoteLimit& limit) {
  const std::string pattern = absl::StrCat(SpaceName(space), "*");
  const Limits limits = LimitsOf(limit);
  std::string cursor = "0";
  do {
    RespCommand unlink{{"UNLINK"}, 0, {}};
    std::string next;
    absl::Status refused;
    KVTIDE_RETURN_IF_ERROR(
        Run({{{"SCAN", cursor, "MATCH", pattern, "COUNT", "1000"}, 0, {}}}, limits,
            [&](size_t, const redisReply& reply) {
              if (IsError(reply) || reply.type != REDIS_REPLY_ARRAY || reply.elements != 2) {
                refused = IsError(reply) ? ErrorOf(reply) : absl::InternalError("SCAN gave no page of names");
                return;
              }
              next = std::string(TextOf(*reply.element[0]));
              const redisReply& page = *reply.element[1];
              for (size_t i = 0; i < page.elements; i++) unlink.words.emplace_back(TextOf(*page.element[i]));
            }));
    if (unlink.words.size() > 1)
      KVTIDE_RETURN_IF_ERROR(Run({std::move(unlink)}, limits, [&](size_t, const redisReply& reply) {
        if (IsError(reply)) refused = ErrorOf(reply);
      }));
    KVTIDE_RETURN_IF_ERROR(refused);
    cursor = next;
  } while (cursor != "0" && !cursor.empty());
  return absl::OkStatus();
}

bool RedisTier::Writable() const {
  const MutexLock lock(mu_);
  const absl::Time now = options_.clock();
  return options_.remote.writes != RemoteWrites::kNone && now >= retry_at_ && now >= write_retry_at_;
}

RemoteStats RedisTier::Stats() const {
  const MutexLock lock(mu_);
  return stats_;
}

}  // namespace kvtide
