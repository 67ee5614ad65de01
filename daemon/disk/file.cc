#include "daemon/disk/file.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"

namespace kvtide {
namespace {

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  const int fd_;
};

class SystemFile : public File {
 public:
  SystemFile(int fd, std::string path) : fd_(fd), path_(std::move(path)) {}

  absl::StatusOr<size_t> Read(uint64_t offset, std::span<std::byte> bytes) override {
    while (true) {
      const ssize_t got = pread(fd_.get(), bytes.data(), bytes.size(), static_cast<off_t>(offset));
      if (got >= 0) return static_cast<size_t>(got);
      if (errno != EINTR) return IoError(errno, absl::StrCat("reading ", path_, " at ", offset));
    }
  }
  absl::StatusOr<size_t> Write(uint64_t offset, std::span<const std::byte> bytes) override {
    while (true) {
      const ssize_t put = pwrite(fd_.get(), bytes.data(), bytes.size(), static_cast<off_t>(offset));
      if (put >= 0) return static_cast<size_t>(put);
      if (errno != EINTR) return IoError(errno, absl::StrCat("writing ", path_, " at ", offset));
    }
  }
  absl::Status Sync() override {
    if (fdatasync(fd_.get()) == 0) return absl::OkStatus();
    return IoError(errno, absl::StrCat("syncing ", path_));
  }
  absl::Status Reserve(uint64_t bytes) override {
    if (fallocate(fd_.get(), 0, 0, static_cast<off_t>(bytes)) == 0) return absl::OkStatus();
    if (errno == EOPNOTSUPP) return Truncate(bytes);  // the space comes with the writes then
    return IoError(errno, absl::StrCat("taking ", bytes, " bytes for ", path_));
  }
  absl::Status Truncate(uint64_t bytes) override {
    if (ftruncate(fd_.get(), static_cast<off_t>(bytes)) == 0) return absl::OkStatus();
    return IoError(errno, absl::StrCat("truncating ", path_));
  }
  absl::StatusOr<uint64_t> Size() const override {
    struct stat info {};
    if (fstat(fd_.get(), &info) != 0) return IoError(errno, path_);
    return static_cast<uint64_t>(info.st_size);
  }
  int descriptor() const override { return fd_.get(); }

 private:
  const Descriptor fd_;
  const std::string path_;
};

class SystemLock : public FolderLock {
 public:
  SystemLock(int fd, std::string path) : fd_(fd), path_(std::move(path)) {}
  absl::Status Check() const override {
    struct stat now;
    if (fstat(fd_.get(), &now) == 0 && now.st_nlink > 0) return absl::OkStatus();
    return absl::FailedPreconditionError(
        absl::StrCat(path_, " was removed while it was in use; start again with a folder that stays"));
  }

 private:
  const Descriptor fd_;
  const std::string path_;
};

class SystemFileSystem : public FileSystem {
 public:
  absl::StatusOr<std::unique_ptr<File>> Open(const std::string& path, bool create, bool direct) override {
    const int flags = O_RDWR | O_CLOEXEC | (create ? O_CREAT : 0);
    int fd = open(path.c_str(), flags | (direct ? O_DIRECT : 0), 0600);
    // A file system without direct I/O (tmpfs) says EINVAL.
    if (fd < 0 && direct && errno == EINVAL) fd = open(path.c_str(), flags, 0600);
    if (fd < 0 && errno == ENOENT) return absl::NotFoundError(absl::StrCat(path, " does not exist"));
    if (fd < 0) return IoError(errno, absl::StrCat("opening ", path));
    return std::make_unique<SystemFile>(fd, path);
  }
  absl::StatusOr<std::vector<std::string>> List(const std::string& folder) override {
    DIR* open = opendir(folder.c_str());
    if (open == nullptr) return IoError(errno, absl::StrCat("listing ", folder));
    std::vector<std::string> names;
    while (const dirent* entry = readdir(open)) {
      const std::string name = entry->d_name;
      if (name != "." && name != "..") names.push_back(name);
    }
    closedir(open);
    std::sort(names.begin(), names.end());
    return names;
  }
  absl::Status MakeFolder(const std::string& path) override {
    if (mkdir(path.c_str(), 0750) == 0 || errno == EEXIST) return absl::OkStatus();
    if (errno == ENOENT)
      return absl::NotFoundError(
          absl::StrCat("there is no folder to make ", path, " in; make it or mend the path"));
    return IoError(errno, absl::StrCat("making the folder ", path));
  }
  absl::Status Rename(const std::string& from, const std::string& to) override {
    if (rename(from.c_str(), to.c_str()) == 0) return absl::OkStatus();
    return IoError(errno, absl::StrCat("renaming ", from));
  }
  absl::Status Remove(const std::string& path) override {
    if (unlink(path.c_str()) == 0 || errno == ENOENT) return absl::OkStatus();
    return IoError(errno, absl::StrCat("removing ", path));
  }
  absl::Status SyncFolder(const std::string& path) override {
    const Descriptor fd(open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (fd.get() >= 0 && fsync(fd.get()) == 0) return absl::OkStatus();
    return IoError(errno, absl::StrCat("syncing the folder ", path));
  }
  absl::StatusOr<std::unique_ptr<FolderLock>> Lock(const std::string& folder) override {
    const std::string path = absl::StrCat(folder, "/lock");
    const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0) return IoError(errno, absl::StrCat("opening ", path));
    auto lock = std::make_unique<SystemLock>(fd, path);
    if (flock(fd, LOCK_EX | LOCK_NB) == 0) return std::unique_ptr<FolderLock>(std::move(lock));
    if (errno != EWOULDBLOCK) return IoError(errno, absl::StrCat("locking ", path));
    return absl::AlreadyExistsError(
        absl::StrCat("the folder ", folder, " belongs to another running daemon; give each one its own"));
  }
};

}  // namespace

FileSystem& SystemFiles() {
  static SystemFileSystem files;
  return files;
}

absl::Status ReadAll(File& file, uint64_t offset, std::span<std::byte> bytes) {
  while (!bytes.empty()) {
    KVTIDE_ASSIGN_OR_RETURN(const size_t got, file.Read(offset, bytes));
    if (got == 0)
      return absl::OutOfRangeError(absl::StrCat("the file ends ", bytes.size(), " bytes before its end"));
    offset += got;
    bytes = bytes.subspan(got);
  }
  return absl::OkStatus();
}

absl::Status WriteAll(File& file, uint64_t offset, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    KVTIDE_ASSIGN_OR_RETURN(const size_t put, file.Write(offset, bytes));
    if (put == 0) return absl::UnavailableError("the system wrote nothing and gave no reason");
    offset += put;
    bytes = bytes.subspan(put);
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> ReadFile(FileSystem& files, const std::string& path, size_t most_bytes) {
  KVTIDE_ASSIGN_OR_RETURN(const std::unique_ptr<File> file, files.Open(path, false, false));
  KVTIDE_ASSIGN_OR_RETURN(const uint64_t size, file->Size());
  std::string bytes(std::min<uint64_t>(size, most_bytes), '\0');
  KVTIDE_RETURN_IF_ERROR(
      Annotate(ReadAll(*file, 0, std::as_writable_bytes(std::span(bytes.data(), bytes.size()))), path));
  return bytes;
}

absl::Status ReplaceFile(FileSystem& files, const std::string& folder, const std::string& name,
                         const std::string& bytes) {
  const std::string path = absl::StrCat(folder, "/", name), unfinished = path + ".tmp";
  KVTIDE_RETURN_IF_ERROR(files.Remove(unfinished));
  {
    KVTIDE_ASSIGN_OR_RETURN(const std::unique_ptr<File> file, files.Open(unfinished, true, false));
    KVTIDE_RETURN_IF_ERROR(WriteAll(*file, 0, std::as_bytes(std::span(bytes.data(), bytes.size()))));
    KVTIDE_RETURN_IF_ERROR(file->Sync());
  }
  KVTIDE_RETURN_IF_ERROR(files.Rename(unfinished, path));
  return files.SyncFolder(folder);
}

absl::Status IoError(int error, const std::string& what) {
  const std::string text = absl::StrCat(what, ": ", std::strerror(error));
  if (error == ENOSPC || error == EDQUOT || error == EFBIG) return absl::ResourceExhaustedError(text);
  if (error == EACCES || error == EPERM || error == EROFS) return absl::PermissionDeniedError(text);
  return absl::UnavailableError(text);
}

}  // namespace kvtide
