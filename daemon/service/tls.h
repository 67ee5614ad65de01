// TLS on the daemon's TCP addresses, by gRPC's own credentials. The files are looked at every few seconds:
// certificates are renewed by replacing them, without a restart.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "grpcpp/security/auth_context.h"
#include "grpcpp/security/server_credentials.h"

namespace kvtide::service {

struct TlsOptions {
  std::string certificate, key;  // PEM files: kvtided's chain and its key; empty = no TLS
  std::string client_ca;  // PEM file: clients show a certificate that it has signed; empty = they need none
  bool enabled() const { return !certificate.empty(); }
};

// InvalidArgument where a file cannot be read or is none, the key is another certificate's, or that has
// expired: with words, since a handshake would fail without them.
absl::Status CheckTls(const TlsOptions& options);

std::shared_ptr<grpc::ServerCredentials> MakeServerCredentials(const TlsOptions& options);

// The names in the certificate that a client has shown: the common name first, then the alternative names.
std::vector<std::string> NamesOfCertificate(const grpc::AuthContext& context);

}  // namespace kvtide::service
