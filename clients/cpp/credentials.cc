#include "clients/cpp/credentials.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "grpcpp/security/tls_certificate_provider.h"
#include "grpcpp/security/tls_credentials_options.h"
#include "kernels/base/status.h"
#include "kernels/base/text_file.h"

namespace kvtide::client {
namespace {

constexpr unsigned kRefreshSeconds = 5;
constexpr char kSystemRoots[] = "system";
constexpr size_t kLongestToken = 4096;

void FromEnvironment(const char* variable, std::string* field) {
  if (const char* value = std::getenv(variable); field->empty() && value != nullptr) *field = value;
}

}  // namespace

Credentials WithEnvironment(Credentials credentials) {
  FromEnvironment("KVTIDE_TLS_CA", &credentials.tls_ca);
  FromEnvironment("KVTIDE_TLS_CERT", &credentials.tls_cert);
  FromEnvironment("KVTIDE_TLS_KEY", &credentials.tls_key);
  FromEnvironment("KVTIDE_TOKEN_FILE", &credentials.token_file);
  return credentials;
}

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> ChannelCredentialsFor(
    const std::string& address, const Credentials& credentials) {
  const bool own = !credentials.tls_cert.empty() || !credentials.tls_key.empty();
  if (absl::StartsWith(address, "unix:") || (credentials.tls_ca.empty() && !own))
    return grpc::InsecureChannelCredentials();
  if (credentials.tls_cert.empty() != credentials.tls_key.empty())
    return absl::InvalidArgumentError("--tls-cert and --tls-key come together");
  if (credentials.tls_ca.empty())
    return absl::InvalidArgumentError(
        "--tls-cert needs --tls-ca: a PEM file with the CA of the daemon's certificate, or \"system\"");
  const bool system = credentials.tls_ca == kSystemRoots;
  if (!system) KVTIDE_RETURN_IF_ERROR(ReadTextFile("CA", credentials.tls_ca).status());
  if (own) {
    KVTIDE_RETURN_IF_ERROR(ReadTextFile("client certificate", credentials.tls_cert).status());
    KVTIDE_RETURN_IF_ERROR(ReadTextFile("client key", credentials.tls_key).status());
  }
  using grpc::experimental::FileWatcherCertificateProvider;
  grpc::experimental::TlsChannelCredentialsOptions options;
  if (!system || own) {
    options.set_certificate_provider(std::make_shared<FileWatcherCertificateProvider>(
        credentials.tls_key, credentials.tls_cert, system ? "" : credentials.tls_ca, kRefreshSeconds));
  }
  if (!system) options.watch_root_certs();
  if (own) options.watch_identity_key_cert_pairs();
  return grpc::experimental::TlsCredentials(options);
}

absl::StatusOr<std::shared_ptr<TokenFile>> TokenFile::Open(const std::string& path) {
  if (path.empty()) return std::shared_ptr<TokenFile>();
  std::shared_ptr<TokenFile> file(new TokenFile(path));
  const MutexLock lock(file->mutex_);
  KVTIDE_RETURN_IF_ERROR(file->Read());
  return file;
}

absl::Status TokenFile::Read() {
  read_at_ = absl::Now();
  KVTIDE_ASSIGN_OR_RETURN(const std::string text, ReadTextFile("token", path_));
  const std::string token(absl::StripAsciiWhitespace(text));
  // What could not stand in a header would end the process in gRPC. The token itself is shown nowhere.
  const bool sane = std::all_of(token.begin(), token.end(),
                                [](char c) { return std::isgraph(static_cast<unsigned char>(c)) != 0; });
  if (token.empty() || token.size() > kLongestToken || !sane)
    return absl::InvalidArgumentError(absl::StrCat("the file ", path_,
                                                   " holds no token: one word of at most ", kLongestToken,
                                                   " letters, digits and signs"));
  header_ = absl::StrCat("Bearer ", token);
  return absl::OkStatus();
}

void TokenFile::AddTo(grpc::ClientContext* context) {
  const MutexLock lock(mutex_);
  // A file that is being replaced: the last token, and another look later.
  if (absl::Now() - read_at_ > absl::Seconds(1)) Read().IgnoreError();
  context->AddMetadata("authorization", header_);
}

}  // namespace kvtide::client
