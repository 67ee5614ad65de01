// A gRPC client on bare HTTP/2 (nghttp2) over a Unix socket: for what a well-behaved client never does
// (messages that do not end, answers that are never read, compressed bombs), and for loads that should cost
// the client little. One connection, any number of calls at once, one thread.
#pragma once

#include <nghttp2/nghttp2.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace kvtide::wire {

// What a call sends: a message, as gRPC frames it.
struct Message {
  std::string bytes;        // of the message, or of its compressed form
  bool compressed = false;  // with the header grpc-encoding: gzip
  int64_t missing = 0;      // so many bytes are announced besides that never come
  bool more = false;        // the call's side stays open
  bool nothing = false;     // there is no message at all
};

// What came back.
struct Answer {
  bool ended = false;
  int code = -1;  // grpc-status; 14 when the stream was reset or the connection ended
  std::string text;
  std::string bytes;                           // of all messages, each with its five bytes of framing
  std::map<std::string, std::string> headers;  // leading and trailing
};

class Http2Client {
 public:
  struct Options {
    // The client never takes answers: windows stay as they are, so the daemon can send 64 KiB and no more.
    bool deaf = false;
  };
  // Null when nobody listens.
  static std::unique_ptr<Http2Client> Connect(const std::string& socket_path, Options options);
  static std::unique_ptr<Http2Client> Connect(const std::string& socket_path) {
    return Connect(socket_path, {});
  }
  ~Http2Client();
  Http2Client(const Http2Client&) = delete;
  Http2Client& operator=(const Http2Client&) = delete;

  // Starts a call of "/package.Service/Method"; its number.
  int32_t Call(const std::string& method, Message message,
               const std::vector<std::pair<std::string, std::string>>& headers = {});
  // A further message of a call that stayed open.
  void Send(int32_t call, Message message);
  void Cancel(int32_t call);
  const Answer& answer(int32_t call) { return calls_[call].answer; }
  void Forget(int32_t call) { calls_.erase(call); }
  int64_t unsent_bytes() const;

  // Sends and receives without waiting; false when the connection has ended.
  bool Move();
  // Moves until `done` or so many seconds have passed; whether it was done.
  bool Until(const std::function<bool()>& done, double seconds);
  // A whole call.
  Answer CallAndWait(const std::string& method, const std::string& bytes, double seconds = 60);

  bool open() const { return open_; }
  int fd() const { return fd_; }
  // Why the daemon closed the connection, if it said so.
  const std::string& goodbye() const { return goodbye_; }

 private:
  struct Outgoing {
    std::string bytes;  // framed
    size_t sent = 0;
    bool open = false;
    bool waiting = false;  // nghttp2 was told that there is nothing to send
    Answer answer;
  };
  explicit Http2Client(int fd) : fd_(fd) {}
  void Start(Options options);
  static std::string Frame(const Message& message);
  static nghttp2_session_callbacks* Callbacks();
  static ssize_t Read(nghttp2_session*, int32_t stream, uint8_t* buffer, size_t size, uint32_t* flags,
                      nghttp2_data_source* source, void*);
  void End(Answer* answer, int code, const std::string& text);

  const int fd_;
  bool open_ = true;
  nghttp2_session* session_ = nullptr;
  std::string out_;  // taken from nghttp2, not sent yet
  size_t out_sent_ = 0;
  std::map<int32_t, Outgoing> calls_;
  std::string goodbye_;
};

// `bytes` as gzip has them.
std::string Gzip(const std::string& bytes);
// Gzip of so many zeros, made in pieces.
std::string GzipOfZeros(int64_t count);

}  // namespace kvtide::wire
