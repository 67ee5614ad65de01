#include "daemon/service/tls_files.h"

#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <ctime>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"
#include "kernels/base/text_file.h"

namespace kvtide::service {
namespace {

constexpr absl::Duration kRenewBefore = absl::Hours(14 * 24);

// Of the first certificate in a PEM text, which is the server's.
absl::Time EndOf(const std::string& pem) {
  const std::unique_ptr<BIO, decltype(&BIO_free_all)> text(
      BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())), &BIO_free_all);
  const std::unique_ptr<X509, decltype(&X509_free)> certificate(
      PEM_read_bio_X509(text.get(), nullptr, nullptr, nullptr), &X509_free);
  ERR_clear_error();
  tm end{};
  if (certificate == nullptr || ASN1_TIME_to_tm(X509_get0_notAfter(certificate.get()), &end) != 1)
    return absl::InfiniteFuture();
  return absl::FromTM(end, absl::UTCTimeZone());
}

}  // namespace

absl::StatusOr<std::unique_ptr<TlsFiles>> TlsFiles::Open(const TlsOptions& options) {
  std::unique_ptr<TlsFiles> files(new TlsFiles(options));
  const auto add = [&](const std::string& path, std::string* copy) -> absl::Status {
    if (path.empty()) return absl::OkStatus();
    const int fd = ::memfd_create("kvtided-tls", MFD_CLOEXEC);
    if (fd < 0) return absl::InternalError(absl::StrCat("no memory file: ", std::strerror(errno)));
    files->files_.push_back({path, "", fd});
    *copy = absl::StrCat("/proc/self/fd/", fd);
    return absl::OkStatus();
  };
  KVTIDE_RETURN_IF_ERROR(add(options.certificate, &files->copies_.certificate));
  KVTIDE_RETURN_IF_ERROR(add(options.key, &files->copies_.key));
  KVTIDE_RETURN_IF_ERROR(add(options.client_ca, &files->copies_.client_ca));
  KVTIDE_RETURN_IF_ERROR(files->Refresh());
  return files;
}

TlsFiles::~TlsFiles() {
  for (const File& file : files_) ::close(file.copy);
}

absl::Status TlsFiles::Refresh() {
  std::vector<std::string> now;
  bool changed = false;
  for (const File& file : files_) {
    KVTIDE_ASSIGN_OR_RETURN(std::string bytes, ReadTextFile("TLS file", file.path));
    changed = changed || bytes != file.bytes;
    now.push_back(std::move(bytes));
  }
  if (!changed) return absl::OkStatus();
  KVTIDE_RETURN_IF_ERROR(CheckTls(options_));
  // What was checked is what was read, unless somebody writes just now: then the next look takes it.
  for (size_t i = 0; i < files_.size(); i++) {
    KVTIDE_ASSIGN_OR_RETURN(const std::string again, ReadTextFile("TLS file", files_[i].path));
    if (again != now[i]) return absl::OkStatus();
  }
  for (size_t i = 0; i < files_.size(); i++) {
    File& file = files_[i];
    if (now[i] == file.bytes) continue;
    const auto size = static_cast<ssize_t>(now[i].size());
    if (::ftruncate(file.copy, 0) != 0 || ::pwrite(file.copy, now[i].data(), now[i].size(), 0) != size)
      return absl::InternalError(absl::StrCat("no memory for ", file.path, ": ", std::strerror(errno)));
    file.bytes = std::move(now[i]);
  }
  expires_ = EndOf(files_[0].bytes);
  return absl::OkStatus();
}

std::string ExpiryWarning(const std::string& path, absl::Time expires, absl::Time now) {
  if (expires - now > kRenewBefore) return "";
  const std::string date = absl::FormatTime(absl::RFC3339_sec, expires, absl::UTCTimeZone());
  if (expires <= now) return absl::StrCat("the server certificate ", path, " has expired at ", date);
  return absl::StrCat("the server certificate ", path, " expires in ", (expires - now) / absl::Hours(24),
                      " days, at ", date);
}

}  // namespace kvtide::service
