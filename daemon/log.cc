#include "daemon/log.h"

#include <grpc/support/log.h>
#include <spdlog/formatter.h>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <cstdlib>
#include <memory>
#include <string>

#include "absl/time/clock.h"
#include "daemon/failure_log.h"
#include "daemon/log_json.h"
#include "google/protobuf/stubs/logging.h"
#include "kernels/base/mutex.h"

namespace kvtide {
namespace {

bool WantsColour() {
  const char* no_color = std::getenv("NO_COLOR");
  const char* term = std::getenv("TERM");
  return ::isatty(STDERR_FILENO) != 0 && (no_color == nullptr || *no_color == '\0') &&
         (term == nullptr || std::string(term) != "dumb");
}

class JsonFormatter final : public spdlog::formatter {
 public:
  void format(const spdlog::details::log_msg& message, spdlog::memory_buf_t& to) override {
    const spdlog::string_view_t level = spdlog::level::to_string_view(message.level);
    const std::string line = LogLineAsJson(absl::FromChrono(message.time), {level.data(), level.size()},
                                           {message.payload.data(), message.payload.size()}) +
                             "\n";
    to.append(line.data(), line.data() + line.size());
  }
  std::unique_ptr<spdlog::formatter> clone() const override { return std::make_unique<JsonFormatter>(); }
};

// What libraries say of clients' mistakes, at the clients' pace: limited.
void LogLimited(spdlog::level::level_enum level, const char* library, const std::string& text) {
  static Mutex mutex;
  static RateLimit limit(20, 1);
  int64_t suppressed = 0;
  {
    const MutexLock lock(mutex);
    if (!limit.Pass(absl::Now(), &suppressed)) return;
  }
  if (suppressed > 0) {
    spdlog::log(level, "{}: {} suppressed={}", library, Escaped(text), suppressed);
  } else {
    spdlog::log(level, "{}: {}", library, Escaped(text));
  }
}

// gRPC reports broken connections as errors; for the daemon they are what clients do.
void LogFromGrpc(gpr_log_func_args* message) {
  const auto level = message->severity == GPR_LOG_SEVERITY_ERROR ? spdlog::level::warn : spdlog::level::debug;
  if (spdlog::should_log(level)) LogLimited(level, "grpc", message->message);
}

// Texts that are not UTF-8, messages without an end; the call's own line says more.
void LogFromProtobuf(google::protobuf::LogLevel, const char*, int, const std::string& message) {
  if (spdlog::should_log(spdlog::level::debug)) LogLimited(spdlog::level::debug, "protobuf", message);
}

}  // namespace

void SetUpLogging(const std::string& level, bool json) {
  std::shared_ptr<spdlog::sinks::sink> sink;
  if (WantsColour() && !json) {
    sink = std::make_shared<spdlog::sinks::stderr_color_sink_mt>();
  } else {
    sink = std::make_shared<spdlog::sinks::stderr_sink_mt>();
  }
  auto logger = std::make_shared<spdlog::logger>("kvtided", sink);
  if (json) {
    logger->set_formatter(std::make_unique<JsonFormatter>());
  } else {
    logger->set_pattern("%Y-%m-%dT%H:%M:%S.%e%z %^%l%$ %v");
  }
  logger->set_level(spdlog::level::from_str(level));
  logger->flush_on(spdlog::level::trace);
  spdlog::set_default_logger(logger);
  gpr_set_log_function(LogFromGrpc);
  google::protobuf::SetLogHandler(LogFromProtobuf);
}

void SetLogLevel(const std::string& level) {
  spdlog::default_logger()->set_level(spdlog::level::from_str(level));
}

}  // namespace kvtide
