#include "clients/cli/ops/daemon_flags.h"

namespace kvtide::cli {

void DaemonFlags::AddTo(CLI::App* command) {
  command->add_option(
      "--address", address,
      "Where kvtided listens: unix:/path/to/socket or host:port (default: $KVTIDE_ADDRESS, else the "
      "default socket)");
  AddCredentialsTo(command);
}

void DaemonFlags::AddCredentialsTo(CLI::App* command) {
  command->add_option(
      "--tls-ca", credentials.tls_ca,
      "TLS: PEM file with the CA of kvtided's certificate, or system (default: $KVTIDE_TLS_CA)");
  command->add_option("--tls-cert", credentials.tls_cert,
                      "mTLS: PEM file with your certificate (default: $KVTIDE_TLS_CERT)");
  command->add_option("--tls-key", credentials.tls_key, "PEM file with its key (default: $KVTIDE_TLS_KEY)");
  command->add_option("--token-file", credentials.token_file,
                      "File with a bearer token (default: $KVTIDE_TOKEN_FILE)");
  command->add_option("--timeout", timeout_seconds, "Seconds to wait for the daemon, for each call")
      ->capture_default_str()
      ->check(CLI::Range(0.05, 600.0));
}

absl::StatusOr<std::unique_ptr<client::Client>> DaemonFlags::Connect() const {
  client::ClientOptions options;
  options.timeout = options.connect_timeout = absl::Seconds(timeout_seconds);
  options.wait_for_daemon = false;
  options.credentials = credentials;
  return client::Client::Connect(Address(), options);
}

}  // namespace kvtide::cli
