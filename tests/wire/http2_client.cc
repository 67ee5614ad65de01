#include "tests/wire/http2_client.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include <zlib.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>

namespace kvtide::wire {
namespace {

constexpr int kResourceExhausted = 8, kUnavailable = 14;
constexpr int32_t kLargestWindow = 0x7fffffff;

Http2Client* Self(void* user_data) { return static_cast<Http2Client*>(user_data); }

}  // namespace

std::unique_ptr<Http2Client> Http2Client::Connect(const std::string& socket_path, Options options) {
  const int fd = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  std::strncpy(name.sun_path, socket_path.c_str(), sizeof(name.sun_path) - 1);
  if (fd < 0 || ::connect(fd, reinterpret_cast<const sockaddr*>(&name), sizeof(name)) != 0) {
    if (fd >= 0) ::close(fd);
    return nullptr;
  }
  ::fcntl(fd, F_SETFL, O_NONBLOCK);
  std::unique_ptr<Http2Client> client(new Http2Client(fd));
  client->Start(options);
  return client;
}

void Http2Client::Start(Options options) {
  nghttp2_option* option = nullptr;
  nghttp2_option_new(&option);
  nghttp2_option_set_no_auto_window_update(option, options.deaf ? 1 : 0);
  nghttp2_option_set_peer_max_concurrent_streams(option, 1 << 20);
  nghttp2_session_client_new2(&session_, Callbacks(), this, option);
  nghttp2_option_del(option);
  const nghttp2_settings_entry window = {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE,
                                         options.deaf ? 65535u : static_cast<uint32_t>(kLargestWindow)};
  nghttp2_submit_settings(session_, NGHTTP2_FLAG_NONE, &window, 1);
  if (!options.deaf) nghttp2_session_set_local_window_size(session_, NGHTTP2_FLAG_NONE, 0, kLargestWindow);
}

Http2Client::~Http2Client() {
  nghttp2_session_del(session_);
  ::close(fd_);
}

nghttp2_session_callbacks* Http2Client::Callbacks() {
  static nghttp2_session_callbacks* const kCallbacks = [] {
    nghttp2_session_callbacks* callbacks = nullptr;
    nghttp2_session_callbacks_new(&callbacks);
    nghttp2_session_callbacks_set_on_header_callback(
        callbacks, [](nghttp2_session*, const nghttp2_frame* frame, const uint8_t* name, size_t name_size,
                      const uint8_t* value, size_t value_size, uint8_t, void* user_data) {
          const auto found = Self(user_data)->calls_.find(frame->hd.stream_id);
          if (found == Self(user_data)->calls_.end()) return 0;
          found->second.answer.headers[std::string(reinterpret_cast<const char*>(name), name_size)] =
              std::string(reinterpret_cast<const char*>(value), value_size);
          return 0;
        });
    nghttp2_session_callbacks_set_on_data_chunk_recv_callback(
        callbacks,
        [](nghttp2_session*, uint8_t, int32_t stream, const uint8_t* data, size_t size, void* user_data) {
          const auto found = Self(user_data)->calls_.find(stream);
          if (found != Self(user_data)->calls_.end())
            found->second.answer.bytes.append(reinterpret_cast<const char*>(data), size);
          return 0;
        });
    nghttp2_session_callbacks_set_on_stream_close_callback(
        callbacks, [](nghttp2_session*, int32_t stream, uint32_t error, void* user_data) {
          const auto found = Self(user_data)->calls_.find(stream);
          if (found == Self(user_data)->calls_.end()) return 0;
          Answer* answer = &found->second.answer;
          const auto status = answer->headers.find("grpc-status");
          if (status == answer->headers.end()) {
            // As gRPC maps it.
            Self(user_data)->End(answer, error == NGHTTP2_ENHANCE_YOUR_CALM ? kResourceExhausted : kUnavailable,
                                 "reset with HTTP/2 error " + std::to_string(error));
          } else {
            Self(user_data)->End(answer, std::atoi(status->second.c_str()), answer->headers["grpc-message"]);
          }
          return 0;
        });
    nghttp2_session_callbacks_set_on_frame_recv_callback(
        callbacks, [](nghttp2_session*, const nghttp2_frame* frame, void* user_data) {
          if (frame->hd.type == NGHTTP2_GOAWAY) {
            Self(user_data)->goodbye_.assign(reinterpret_cast<const char*>(frame->goaway.opaque_data),
                                             frame->goaway.opaque_data_len);
          }
          return 0;
        });
    return callbacks;
  }();
  return kCallbacks;
}

void Http2Client::End(Answer* answer, int code, const std::string& text) {
  answer->ended = true;
  answer->code = code;
  answer->text = text;
}

std::string Http2Client::Frame(const Message& message) {
  if (message.nothing) return "";
  const uint32_t size = static_cast<uint32_t>(static_cast<int64_t>(message.bytes.size()) + message.missing);
  std::string framed(5, '\0');
  framed[0] = message.compressed ? 1 : 0;
  for (int i = 0; i < 4; i++) framed[static_cast<size_t>(1 + i)] = static_cast<char>(size >> (24 - 8 * i));
  return framed + message.bytes;
}

ssize_t Http2Client::Read(nghttp2_session*, int32_t, uint8_t* buffer, size_t size, uint32_t* flags,
                          nghttp2_data_source* source, void*) {
  auto* call = static_cast<Outgoing*>(source->ptr);
  const size_t left = call->bytes.size() - call->sent;
  if (left == 0 && call->open) {
    call->waiting = true;
    return NGHTTP2_ERR_DEFERRED;
  }
  const size_t now = std::min(size, left);
  std::memcpy(buffer, call->bytes.data() + call->sent, now);
  call->sent += now;
  if (call->sent == call->bytes.size() && !call->open) *flags |= NGHTTP2_DATA_FLAG_EOF;
  return static_cast<ssize_t>(now);
}

int32_t Http2Client::Call(const std::string& method, Message message,
                          const std::vector<std::pair<std::string, std::string>>& headers) {
  std::vector<std::pair<std::string, std::string>> all = {
      {":method", "POST"},         {":scheme", "http"}, {":path", method},
      {":authority", "localhost"}, {"te", "trailers"},  {"content-type", "application/grpc"},
  };
  if (message.compressed) all.emplace_back("grpc-encoding", "gzip");
  all.insert(all.end(), headers.begin(), headers.end());
  std::vector<nghttp2_nv> pairs;
  for (auto& [name, value] : all) {
    pairs.push_back({reinterpret_cast<uint8_t*>(name.data()), reinterpret_cast<uint8_t*>(value.data()),
                     name.size(), value.size(), NGHTTP2_NV_FLAG_NONE});
  }
  // The next stream's number is known, and its entry must be there when nghttp2 asks for data.
  const int32_t number = static_cast<int32_t>(nghttp2_session_get_next_stream_id(session_));
  Outgoing& call = calls_[number];
  call.bytes = Frame(message);
  call.open = message.more || message.missing > 0;
  nghttp2_data_provider provider{};
  provider.source.ptr = &call;
  provider.read_callback = Read;
  nghttp2_submit_request(session_, nullptr, pairs.data(), pairs.size(), &provider, nullptr);
  return number;
}

void Http2Client::Send(int32_t number, Message message) {
  Outgoing& call = calls_[number];
  call.bytes.erase(0, call.sent);
  call.sent = 0;
  call.bytes += Frame(message);
  call.open = message.more || message.missing > 0;
  if (call.waiting) nghttp2_session_resume_data(session_, number);
  call.waiting = false;
}

void Http2Client::Cancel(int32_t call) {
  nghttp2_submit_rst_stream(session_, NGHTTP2_FLAG_NONE, call, NGHTTP2_CANCEL);
}

int64_t Http2Client::unsent_bytes() const {
  int64_t bytes = static_cast<int64_t>(out_.size() - out_sent_);
  for (const auto& [number, call] : calls_) {
    if (!call.answer.ended) bytes += static_cast<int64_t>(call.bytes.size() - call.sent);
  }
  return bytes;
}

bool Http2Client::Move() {
  if (!open_) return false;
  char buffer[65536];
  for (ssize_t n; (n = ::recv(fd_, buffer, sizeof(buffer), 0)) != -1 || errno == EINTR;) {
    if (n < 0) continue;
    if (n == 0 ||
        nghttp2_session_mem_recv(session_, reinterpret_cast<uint8_t*>(buffer), static_cast<size_t>(n)) < 0) {
      open_ = false;
      break;
    }
    if (static_cast<size_t>(n) < sizeof(buffer)) break;
  }
  while (open_) {
    if (out_sent_ == out_.size()) {
      out_.clear();
      out_sent_ = 0;
      const uint8_t* data = nullptr;
      // Several frames in one write, as a well-behaved client does.
      while (out_.size() < sizeof(buffer)) {
        const ssize_t n = nghttp2_session_mem_send(session_, &data);
        if (n <= 0) break;
        out_.append(reinterpret_cast<const char*>(data), static_cast<size_t>(n));
      }
      if (out_.empty()) break;
    }
    const ssize_t sent = ::send(fd_, out_.data() + out_sent_, out_.size() - out_sent_, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0 && errno != EAGAIN) open_ = false;
    if (sent < 0) break;
    out_sent_ += static_cast<size_t>(sent);
  }
  if (!open_) {
    for (auto& [number, call] : calls_) {
      if (!call.answer.ended) End(&call.answer, kUnavailable, "the connection has ended: " + goodbye_);
    }
  }
  return open_;
}

bool Http2Client::Until(const std::function<bool()>& done, double seconds) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  for (;;) {
    const bool moved = Move();
    if (done()) return true;
    if (!moved || std::chrono::steady_clock::now() > end) return false;
    const bool writes = out_sent_ < out_.size();
    pollfd wait = {fd_, static_cast<short>(writes ? POLLIN | POLLOUT : POLLIN), 0};
    ::poll(&wait, 1, 20);
  }
}

Answer Http2Client::CallAndWait(const std::string& method, const std::string& bytes, double seconds) {
  const int32_t call = Call(method, {.bytes = bytes});
  Until([&] { return answer(call).ended; }, seconds);
  Answer result = answer(call);
  Forget(call);
  return result;
}

namespace {

template <class Next>
std::string Deflate(Next next) {
  z_stream stream{};
  constexpr int kGzip = 16 + MAX_WBITS;
  deflateInit2(&stream, Z_BEST_COMPRESSION, Z_DEFLATED, kGzip, 8, Z_DEFAULT_STRATEGY);
  std::string out, buffer(65536, '\0');
  for (int flush = Z_NO_FLUSH; flush != Z_FINISH;) {
    const auto [data, size, last] = next();
    stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(data));
    stream.avail_in = static_cast<uInt>(size);
    flush = last ? Z_FINISH : Z_NO_FLUSH;
    do {
      stream.next_out = reinterpret_cast<Bytef*>(buffer.data());
      stream.avail_out = static_cast<uInt>(buffer.size());
      deflate(&stream, flush);
      out.append(buffer, 0, buffer.size() - stream.avail_out);
    } while (stream.avail_out == 0);
  }
  deflateEnd(&stream);
  return out;
}

struct Piece {
  const char* data;
  size_t size;
  bool last;
};

}  // namespace

std::string Gzip(const std::string& bytes) {
  return Deflate([&] { return Piece{bytes.data(), bytes.size(), true}; });
}

std::string GzipOfZeros(int64_t count) {
  const std::string zeros(1 << 20, '\0');
  return Deflate([&zeros, count]() mutable {
    const int64_t now = std::min<int64_t>(count, static_cast<int64_t>(zeros.size()));
    count -= now;
    return Piece{zeros.data(), static_cast<size_t>(now), count == 0};
  });
}

}  // namespace kvtide::wire
