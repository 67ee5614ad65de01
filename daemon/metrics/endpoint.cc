#include "daemon/metrics/endpoint.h"

#include <CivetServer.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <zlib.h>

#include <cstring>
#include <exception>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"

namespace kvtide::metrics {
namespace {

// A connection takes one of the endpoint's threads until it has sent its request or this time has passed:
// whoever connects and says nothing must not keep a scrape waiting for longer than scrapes wait.
constexpr char kThreads[] = "16", kTimeoutMs[] = "1000";

// Of a thread with turns of the usual 3 ms a whole one may have to end before this one's begins; among
// threads that have their due, the one whose turn would end first runs. No privilege is needed, kernels
// without it ignore it.
void AskForShortTurns() {
  struct {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period;
  } attributes{};
  constexpr uint64_t kTurnNs = 100'000;  // the shortest
  if (syscall(SYS_sched_getattr, 0, &attributes, sizeof(attributes), 0) != 0 ||
      attributes.policy != SCHED_OTHER)
    return;
  attributes.runtime = kTurnNs;
  syscall(SYS_sched_setattr, 0, &attributes, 0);
}

void* BeginThread(const mg_context*, int) {
  AskForShortTurns();
  return nullptr;
}

bool TakesGzip(const mg_connection* connection) {
  const char* const accepted = mg_get_header(connection, "Accept-Encoding");
  return accepted != nullptr && std::strstr(accepted, "gzip") != nullptr;
}

class Handler final : public CivetHandler {
 public:
  explicit Handler(std::function<std::string()> text) : text_(std::move(text)) {}
  bool handleGet(CivetServer*, mg_connection* connection) override {
    std::string body = text_();
    const bool gzip = TakesGzip(connection);
    if (gzip) body = Gzip(body);
    const std::string head =
        absl::StrCat("HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\n",
                     gzip ? "Content-Encoding: gzip\r\n" : "", "Content-Length: ", body.size(), "\r\n\r\n");
    // A scraper that has gone away has no use for an error.
    if (mg_write(connection, head.data(), head.size()) > 0) mg_write(connection, body.data(), body.size());
    return true;
  }

 private:
  const std::function<std::string()> text_;
};

}  // namespace

std::string Gzip(const std::string& text) {
  z_stream stream{};
  constexpr int kGzip = 16, kMemory = 8;
  KVTIDE_CHECK(
      deflateInit2(&stream, Z_BEST_SPEED, Z_DEFLATED, MAX_WBITS + kGzip, kMemory, Z_DEFAULT_STRATEGY) == Z_OK,
      "no memory to compress metrics");
  std::string packed(deflateBound(&stream, text.size()), '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(text.data()));
  stream.avail_in = static_cast<uInt>(text.size());
  stream.next_out = reinterpret_cast<Bytef*>(packed.data());
  stream.avail_out = static_cast<uInt>(packed.size());
  const int ended = deflate(&stream, Z_FINISH);
  packed.resize(stream.total_out);
  deflateEnd(&stream);
  KVTIDE_CHECK(ended == Z_STREAM_END, "metrics were not compressed");
  return packed;
}

struct Endpoint::Server {
  Server(const EndpointAddress& address, std::function<std::string()> text)
      : handler(std::move(text)),
        civet(std::vector<std::string>{"listening_ports", address.Text(), "num_threads", kThreads,
                                       "request_timeout_ms", kTimeoutMs, "keep_alive_timeout_ms", kTimeoutMs},
              &Callbacks()) {
    civet.addHandler("/metrics", &handler);
  }
  static const CivetCallbacks& Callbacks() {
    static const CivetCallbacks callbacks = [] {
      CivetCallbacks made;
      made.init_thread = BeginThread;
      return made;
    }();
    return callbacks;
  }

  Handler handler;  // outlives the server's threads
  CivetServer civet;
};

Endpoint::Endpoint(std::unique_ptr<Server> server) : server_(std::move(server)) {}
Endpoint::~Endpoint() = default;

absl::StatusOr<std::unique_ptr<Endpoint>> Endpoint::Start(const EndpointAddress& address,
                                                          std::function<std::string()> text) {
  try {
    return std::unique_ptr<Endpoint>(new Endpoint(std::make_unique<Server>(address, std::move(text))));
  } catch (const std::exception& error) {
    // The library does not say why; the address does.
    const absl::Status reason = CheckBindable(address);
    if (!reason.ok()) return reason;
    return absl::UnavailableError(absl::StrCat("metrics address ", address.Text(), ": ", error.what()));
  }
}

int Endpoint::port() const { return server_->civet.getListeningPorts().front(); }

}  // namespace kvtide::metrics
