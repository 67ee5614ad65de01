#include "daemon/service/tls.h"

#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509.h>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "grpc/grpc_security_constants.h"
#include "grpcpp/security/tls_certificate_provider.h"
#include "grpcpp/security/tls_credentials_options.h"
#include "kernels/base/status.h"
#include "kernels/base/text_file.h"

namespace kvtide::service {
namespace {

// How often the files are looked at.
constexpr unsigned kRefreshSeconds = 5;

template <auto kFree>
struct Freed {
  template <class T>
  void operator()(T* object) const {
    kFree(object);
  }
};
using Certificate = std::unique_ptr<X509, Freed<&X509_free>>;
using Key = std::unique_ptr<EVP_PKEY, Freed<&EVP_PKEY_free>>;
using Text = std::unique_ptr<BIO, Freed<&BIO_free_all>>;

Text Open(const std::string& pem) { return Text(BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size()))); }

// Passphrases are nobody's to type in: the daemon starts alone.
int NoPassphrase(char*, int, int, void*) { return 0; }

absl::StatusOr<Certificate> ReadCertificate(const char* what, const std::string& path) {
  KVTIDE_ASSIGN_OR_RETURN(const std::string pem, ReadTextFile(what, path));
  Certificate certificate(PEM_read_bio_X509(Open(pem).get(), nullptr, NoPassphrase, nullptr));
  ERR_clear_error();
  if (certificate == nullptr)
    return absl::InvalidArgumentError(
        absl::StrCat("the ", what, " ", path, " holds no certificate in PEM form"));
  if (X509_cmp_current_time(X509_get0_notAfter(certificate.get())) <= 0)
    return absl::InvalidArgumentError(absl::StrCat("the ", what, " ", path, " has expired; renew it"));
  return certificate;
}

}  // namespace

absl::Status CheckTls(const TlsOptions& options) {
  if (options.certificate.empty() != options.key.empty())
    return absl::InvalidArgumentError("--server-cert and --server-key come together");
  if (!options.client_ca.empty() && !options.enabled())
    return absl::InvalidArgumentError(
        "--client-ca needs --server-cert and --server-key: clients show no "
        "certificate where there is no TLS");
  if (!options.enabled()) return absl::OkStatus();
  KVTIDE_ASSIGN_OR_RETURN(const Certificate certificate,
                          ReadCertificate("server certificate", options.certificate));
  KVTIDE_ASSIGN_OR_RETURN(const std::string pem, ReadTextFile("server key", options.key));
  const Key key(PEM_read_bio_PrivateKey(Open(pem).get(), nullptr, NoPassphrase, nullptr));
  ERR_clear_error();
  if (key == nullptr)
    return absl::InvalidArgumentError(absl::StrCat("the server key ", options.key,
                                                   " holds no private key in PEM form without a passphrase"));
  const bool fits = X509_check_private_key(certificate.get(), key.get()) == 1;
  ERR_clear_error();
  if (!fits)
    return absl::InvalidArgumentError(absl::StrCat("the server key ", options.key,
                                                   " is not that of the certificate ", options.certificate));
  return options.client_ca.empty() ? absl::OkStatus()
                                   : ReadCertificate("client CA", options.client_ca).status();
}

std::shared_ptr<grpc::ServerCredentials> MakeServerCredentials(const TlsOptions& options) {
  const bool mutual = !options.client_ca.empty();
  grpc::experimental::TlsServerCredentialsOptions credentials(
      std::make_shared<grpc::experimental::FileWatcherCertificateProvider>(
          options.key, options.certificate, options.client_ca, kRefreshSeconds));
  credentials.watch_identity_key_cert_pairs();
  if (mutual) credentials.watch_root_certs();
  credentials.set_cert_request_type(mutual ? GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY
                                           : GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE);
  return grpc::experimental::TlsServerCredentials(credentials);
}

std::vector<std::string> NamesOfCertificate(const grpc::AuthContext& context) {
  std::vector<std::string> names;
  for (const char* property : {GRPC_X509_CN_PROPERTY_NAME, GRPC_X509_SAN_PROPERTY_NAME})
    for (const grpc::string_ref& name : context.FindPropertyValues(property))
      names.emplace_back(name.data(), name.size());
  return names;
}

}  // namespace kvtide::service
