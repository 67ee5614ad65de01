#include "daemon/disk/disk_tier.h"

#include <sys/mman.h>

#ifdef KVTIDE_XXH_DISPATCH
#include <xxh_x86dispatch.h>  // the vector instructions of this processor; the same hash
#else
#include <xxhash.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <set>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "daemon/disk/extent_header.h"
#include "daemon/disk/folder_key.h"
#include "daemon/disk/folder_size.h"
#include "kernels/base/check.h"
#include "kernels/base/random_bytes.h"
#include "kernels/base/status.h"

namespace kvtide {
namespace {

constexpr absl::Duration kFirstBackOff = absl::Seconds(1), kLongestBackOff = absl::Minutes(1);
// More than so many pages of manifests that cannot be read are a device in trouble, not a lost page.
constexpr size_t kMostUnreadPages = 64;

size_t RoundUp(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

class Hash {
 public:
  Hash() : state_(XXH3_createState()) { XXH3_64bits_reset(state_); }
  ~Hash() { XXH3_freeState(state_); }
  Hash(const Hash&) = delete;
  Hash& operator=(const Hash&) = delete;
  void Add(std::span<const std::byte> bytes) { XXH3_64bits_update(state_, bytes.data(), bytes.size()); }
  uint64_t Value() const { return XXH3_64bits_digest(state_); }

 private:
  XXH3_state_t* const state_;
};

struct FreeDeleter {
  void operator()(std::byte* memory) const { std::free(memory); }
};
// Memory for direct I/O, in huge pages where it has some: a request of 1 MiB is one piece of memory for the
// device then, not 256.
using AlignedBytes = std::unique_ptr<std::byte, FreeDeleter>;
AlignedBytes AllocateAligned(size_t bytes) {
  constexpr size_t kHugePage = size_t{2} << 20;
  const bool huge = bytes % kHugePage == 0;
  AlignedBytes memory(static_cast<std::byte*>(std::aligned_alloc(huge ? kHugePage : kDiskPage, bytes)));
  if (huge && memory != nullptr) (void)madvise(memory.get(), bytes, MADV_HUGEPAGE);
  return memory;
}

constexpr char kManifests[] = "manifests", kSegment[] = "segment-";

ExtentPlace PlaceOf(const IoJob& job) { return {ExtentPlace::File::kSegments, job.offset}; }

// What may be taken of the capacity for manifests: 40 bytes for each block, which has 8 KiB at least.
size_t ManifestBytes(size_t capacity) { return RoundUp(capacity / 128, kDiskPage) + 8 * kDiskPage; }

}  // namespace

// What one Run works with: a queue and its pieces of memory.
class DiskTier::Lane {
 public:
  Lane(std::unique_ptr<IoQueue> made, std::byte* memory, size_t piece_bytes, unsigned depth)
      : queue(std::move(made)) {
    for (unsigned i = 0; i < depth; i++) pieces.push_back(memory + i * piece_bytes);
  }
  AlignedBytes own_memory;
  std::unique_ptr<IoQueue> queue;
  std::vector<std::byte*> pieces;  // those that are free
};

// The jobs of one Run: pieces are issued in order and finished in order, `depth` of them under way.
class DiskTier::Pipeline {
 public:
  Pipeline(DiskTier& tier, Lane& lane) : tier_(tier), lane_(lane) {}
  ~Pipeline() {
    while (!under_way_.empty()) FinishFirst();
  }

  void Write(IoJob& job);
  void Read(IoJob& job);

 private:
  struct Piece {
    IoJob* job = nullptr;
    std::byte* memory = nullptr;
    size_t at = 0, bytes = 0;  // of the extent
    std::vector<IoQueue::Op> ops;
    std::shared_ptr<Hash> hash;                                 // of a read
    std::shared_ptr<uint64_t> found;                            // the checksum that the label promises
    std::shared_ptr<std::optional<ExtentDecryptor>> decryptor;  // of a read; empty: its bytes are in clear
  };

  std::byte* TakePiece() {
    while (lane_.pieces.empty()) FinishFirst();
    std::byte* memory = lane_.pieces.back();
    lane_.pieces.pop_back();
    return memory;
  }
  void Issue(Piece piece);
  void FinishFirst();
  void FinishRead(const Piece& piece);
  // The bytes of the block in a piece of its extent: what is beyond the label and before the padding.
  static std::span<std::byte> BlockBytes(const Piece& piece, size_t* at) {
    const size_t begin = std::max(piece.at, kDiskPage);
    const size_t end = std::min(piece.at + piece.bytes, kDiskPage + piece.job->label.bytes);
    *at = begin - kDiskPage;
    return {piece.memory + (begin - piece.at), end - begin};
  }
  // The same with the padding.
  static std::span<std::byte> EncryptedBytes(const Piece& piece) {
    const size_t label = piece.at == 0 ? kDiskPage : 0;
    return {piece.memory + label, piece.bytes - label};
  }
  bool Wanted(IoJob& job) const {
    if (IsCancelled(job.cancellation) && job.status.ok()) job.status = absl::CancelledError("the move");
    return job.status.ok();
  }

  DiskTier& tier_;
  Lane& lane_;
  std::deque<Piece> under_way_;
};

void DiskTier::Pipeline::Write(IoJob& job) {
  const size_t extent = tier_.ExtentBytes(job.label.bytes), piece_bytes = tier_.options_.piece_bytes;
  Hash hash;
  std::optional<ExtentEncryptor> encryptor;
  if (tier_.key_ != nullptr) encryptor.emplace(*tier_.key_, PlaceOf(job));
  Piece first;
  // The first piece has the label, and with it the checksum of all: it is issued last.
  for (size_t begin = 0; begin < extent && Wanted(job); begin += piece_bytes) {
    Piece piece;
    piece.job = &job;
    piece.memory = TakePiece();
    piece.at = begin;
    piece.bytes = std::min(piece_bytes, extent - begin);
    size_t at = 0;
    const std::span<std::byte> block = BlockBytes(piece, &at);
    if (job.status.ok()) job.status = job.copy(at, block);
    hash.Add(block);
    std::byte* const end = block.data() + block.size();
    std::memset(end, 0, static_cast<size_t>(piece.memory + piece.bytes - end));
    if (encryptor.has_value()) encryptor->Add(EncryptedBytes(piece));
    if (begin == 0) {
      first = std::move(piece);
    } else if (job.status.ok()) {
      Issue(std::move(piece));
    } else {
      lane_.pieces.push_back(piece.memory);
    }
  }
  if (first.memory == nullptr) return;
  if (!Wanted(job)) {
    lane_.pieces.push_back(first.memory);
    return;
  }
  job.label.checksum = hash.Value();
  const std::span<std::byte> page{first.memory, kDiskPage};
  if (encryptor.has_value()) {
    encryptor->WriteLabel(job.label, page);
  } else {
    WriteExtentHeader(job.label, page);
  }
  Issue(std::move(first));
}

void DiskTier::Pipeline::Read(IoJob& job) {
  const size_t extent = job.label_only ? kDiskPage : tier_.ExtentBytes(job.label.bytes);
  const size_t piece_bytes = tier_.options_.piece_bytes;
  const auto hash = std::make_shared<Hash>();
  const auto found = std::make_shared<uint64_t>(0);
  const auto decryptor = std::make_shared<std::optional<ExtentDecryptor>>();
  for (size_t begin = 0; begin < extent && Wanted(job); begin += piece_bytes) {
    Piece piece;
    piece.job = &job;
    piece.memory = TakePiece();
    piece.at = begin;
    piece.bytes = std::min(piece_bytes, extent - begin);
    piece.hash = hash;
    piece.found = found;
    piece.decryptor = decryptor;
    Issue(std::move(piece));
  }
}

void DiskTier::Pipeline::Issue(Piece piece) {
  size_t done = 0;
  for (const Part& part : tier_.PartsOf(piece.job->offset + piece.at, piece.bytes)) {
    File& file = *tier_.segments_[part.segment];
    const std::span<std::byte> bytes{piece.memory + done, part.bytes};
    done += part.bytes;
    if (piece.job->write) {
      MutexLock lock(tier_.mu_);
      tier_.dirty_[part.segment] = true;
    }
    piece.ops.push_back(piece.job->write ? lane_.queue->Write(file, part.offset, bytes)
                                         : lane_.queue->Read(file, part.offset, bytes));
  }
  under_way_.push_back(std::move(piece));
}

void DiskTier::Pipeline::FinishFirst() {
  const Piece piece = std::move(under_way_.front());
  under_way_.pop_front();
  IoJob& job = *piece.job;
  absl::Status status;
  for (const IoQueue::Op op : piece.ops)
    if (absl::Status part = lane_.queue->Wait(op); status.ok()) status = std::move(part);
  const absl::Status whole = Annotate(status, tier_.name());
  if (job.write) {
    // A segment that was being synced meanwhile is dirty again.
    MutexLock lock(tier_.mu_);
    for (const Part& part : tier_.PartsOf(job.offset + piece.at, piece.bytes))
      tier_.dirty_[part.segment] = true;
  }
  if (job.write) {
    tier_.CountWrite(status, piece.bytes);
    if (job.status.ok()) job.status = whole;
  } else if (job.status.ok()) {
    if (!status.ok()) job.status = absl::DataLossError(whole.message());
    tier_.CountRead(job.status, true, piece.bytes);
    if (status.ok()) FinishRead(piece);
  }
  lane_.pieces.push_back(piece.memory);
}

void DiskTier::Pipeline::FinishRead(const Piece& piece) {
  IoJob& job = *piece.job;
  if (piece.at == 0) {
    const absl::StatusOr<BlockLabel> label =
        tier_.ReadLabel(PlaceOf(job), {piece.memory, kDiskPage}, piece.decryptor.get());
    job.status = label.ok() ? CheckLabel(*label, job.label) : absl::DataLossError(label.status().message());
    if (label.ok()) *piece.found = label->checksum;
    if (job.label_only && job.status.ok()) return;
  }
  if (piece.decryptor->has_value()) (*piece.decryptor)->Add(EncryptedBytes(piece));
  size_t at = 0;
  const std::span<std::byte> block = BlockBytes(piece, &at);
  piece.hash->Add(block);
  const bool last = piece.at + piece.bytes == tier_.ExtentBytes(job.label.bytes);
  if (job.status.ok() && last && piece.decryptor->has_value()) job.status = (*piece.decryptor)->Check();
  if (job.status.ok() && last && piece.hash->Value() != *piece.found)
    job.status = absl::DataLossError(
        absl::StrCat("the checksum of the block is ", piece.hash->Value(), ", not ", *piece.found));
  if (!job.status.ok()) {
    job.status = Annotate(job.status, tier_.name());
    return tier_.CountRead(job.status, false, 0);
  }
  job.status = job.copy(at, block);
}

DiskTier::DiskTier(DiskTierOptions options) : options_(std::move(options)) {}
DiskTier::~DiskTier() = default;

std::string DiskTier::name() const { return absl::StrCat("disk:", options_.folder); }

size_t DiskTier::ExtentBytes(size_t bytes) const { return kDiskPage + RoundUp(bytes, kDiskPage); }

size_t DiskTier::staging_bytes() const {
  return options_.piece_bytes * options_.depth * static_cast<size_t>(options_.runs);
}

absl::StatusOr<std::unique_ptr<DiskTier>> DiskTier::Open(DiskTierOptions options) {
  options.capacity_bytes = options.capacity_bytes / kDiskPage * kDiskPage;
  if (options.folder.empty()) return absl::InvalidArgumentError("the disk tier has no folder");
  constexpr size_t kSmallest = 16 * kDiskPage;
  if (options.capacity_bytes < kSmallest)
    return absl::InvalidArgumentError(absl::StrCat("disk tier ", options.folder, ": ", options.capacity_bytes,
                                                   " bytes, must have at least ", kSmallest));
  if (options.piece_bytes < kDiskPage || options.piece_bytes % kDiskPage != 0 || options.depth < 2 ||
      options.runs < 1 || options.segment_bytes < kDiskPage || options.segment_bytes % kDiskPage != 0)
    return absl::InvalidArgumentError(
        "disk tier: pieces and segments are multiples of 4096, depth at least 2");
  // The operator's key opens the folder's, and is not kept.
  const std::shared_ptr<const SecretKey> operators = std::move(options.key);
  auto tier = std::unique_ptr<DiskTier>(new DiskTier(std::move(options)));
  const DiskTierOptions& mine = tier->options_;
  KVTIDE_RETURN_IF_ERROR(mine.files->MakeFolder(mine.folder));
  KVTIDE_ASSIGN_OR_RETURN(tier->lock_, mine.files->Lock(mine.folder));
  absl::StatusOr<std::shared_ptr<const SecretKey>> key =
      OpenFolderKey(*mine.files, mine.folder, operators.get());
  if (!key.ok()) return Annotate(key.status(), "disk tier");
  tier->key_ = *std::move(key);
  tier->manifest_bytes_ = ManifestBytes(mine.capacity_bytes);
  tier->extent_bytes_ = mine.capacity_bytes - tier->manifest_bytes_;
  bool fresh = false;
  KVTIDE_RETURN_IF_ERROR(Annotate(tier->OpenFiles(&fresh), "disk tier"));
  KVTIDE_RETURN_IF_ERROR(Annotate(tier->OpenIndex(fresh), "disk tier"));
  // From here on something may become durable.
  const absl::StatusOr<size_t> written = ReadFolderSize(*mine.files, mine.folder);
  if (!written.ok() || *written != mine.capacity_bytes)
    KVTIDE_RETURN_IF_ERROR(
        Annotate(WriteFolderSize(*mine.files, mine.folder, mine.capacity_bytes), "disk tier"));
  tier->id_base_ = mine.id_seed;
  if (tier->id_base_ == 0) FillRandom(std::as_writable_bytes(std::span(&tier->id_base_, 1)));
  tier->queues_ = std::make_unique<IoQueues>(mine.io, static_cast<int>(std::min(mine.depth, 4u)));
  for (int run = 0; run < mine.runs; run++) {
    KVTIDE_ASSIGN_OR_RETURN(std::unique_ptr<IoQueue> queue, tier->queues_->Make(2 * mine.depth));
    const size_t bytes = mine.piece_bytes * mine.depth;
    std::byte* memory = mine.staging ? mine.staging(bytes) : nullptr;
    AlignedBytes own = memory == nullptr ? AllocateAligned(bytes) : nullptr;
    if (memory == nullptr) memory = own.get();
    if (memory == nullptr) return absl::ResourceExhaustedError("no memory for the pieces of the disk tier");
    queue->Register({memory, bytes});
    auto lane = std::make_unique<Lane>(std::move(queue), memory, mine.piece_bytes, mine.depth);
    lane->own_memory = std::move(own);
    MutexLock lock(tier->mu_);
    tier->lanes_.push_back(std::move(lane));
  }
  return tier;
}

// Of a folder whose size was not written down, by what its files have.
absl::StatusOr<size_t> DiskTier::SizeOfFiles(const std::vector<std::string>& names) {
  size_t bytes = 0;
  for (const std::string& name : names) {
    if (name != kManifests && !absl::StartsWith(name, kSegment)) continue;
    KVTIDE_ASSIGN_OR_RETURN(const std::unique_ptr<File> file,
                            options_.files->Open(absl::StrCat(options_.folder, "/", name), false, true));
    KVTIDE_ASSIGN_OR_RETURN(const uint64_t size, file->Size());
    bytes += size;
  }
  return bytes;
}

absl::Status DiskTier::CheckNothingIsDurable(size_t former_bytes) {
  absl::StatusOr<std::unique_ptr<File>> file =
      options_.files->Open(absl::StrCat(options_.folder, "/", kManifests), false, true);
  if (absl::IsNotFound(file.status())) return absl::OkStatus();
  KVTIDE_RETURN_IF_ERROR(file.status());
  KVTIDE_ASSIGN_OR_RETURN(const uint64_t size, (*file)->Size());
  manifest_file_ = *std::move(file);
  const size_t mine = std::exchange(manifest_bytes_, size / kDiskPage * kDiskPage);
  std::vector<size_t> unread;
  const absl::StatusOr<std::vector<Manifest>> found = ScanManifests(&unread);
  std::set<uint64_t> keys;
  if (found.ok())
    for (const Manifest& manifest : *found)
      if (ReadManifest(manifest).ok()) keys.insert(manifest.label.sequence);
  manifest_file_ = nullptr;
  manifest_bytes_ = mine;
  KVTIDE_RETURN_IF_ERROR(found.status());
  if (keys.empty() && unread.empty()) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(
      options_.folder, " had ", former_bytes, " bytes, and ", keys.size(),
      " sequences and lists of blocks that are durable there",
      unread.empty() ? ""
                     : absl::StrCat(", or more: ", unread.size(), " pages of its manifests cannot be read"),
      ". A tier of ", options_.capacity_bytes, " bytes would lose what lies behind its end: give it ",
      former_bytes,
      " bytes, and close what is durable before it gets smaller; or give another folder. Nothing was "
      "changed"));
}

void DiskTier::NoteShortFiles(size_t former_bytes, const std::vector<std::string>& names) {
  const size_t manifests = ManifestBytes(former_bytes);
  if (former_bytes <= manifests) return;
  const size_t extents = former_bytes - manifests;
  const auto note = [&](const std::string& name, size_t bytes) {
    uint64_t size = 0;
    if (std::find(names.begin(), names.end(), name) != names.end()) {
      const absl::StatusOr<std::unique_ptr<File>> file =
          options_.files->Open(absl::StrCat(options_.folder, "/", name), false, true);
      const absl::StatusOr<uint64_t> found = file.ok() ? (*file)->Size() : file.status();
      if (!found.ok()) return;  // which opening it will say
      size = *found;
    }
    if (size >= bytes) return;
    MutexLock lock(index_mu_);
    lost_.push_back(absl::StrCat(options_.folder, "/", name, " has ", size, " of ", bytes,
                                 " bytes: what lay behind them is lost"));
  };
  note(kManifests, manifests);
  for (size_t s = 0; s * options_.segment_bytes < extents; s++)
    note(absl::StrCat(kSegment, s), std::min(options_.segment_bytes, extents - s * options_.segment_bytes));
}

// With so many bytes: what is missing is taken now, what is too much (a smaller tier than last time) given
// back.
absl::StatusOr<std::unique_ptr<File>> DiskTier::OpenSized(const std::string& name, size_t bytes) {
  KVTIDE_ASSIGN_OR_RETURN(std::unique_ptr<File> file,
                          options_.files->Open(absl::StrCat(options_.folder, "/", name), true, true));
  KVTIDE_ASSIGN_OR_RETURN(const uint64_t size, file->Size());
  if (size > bytes) KVTIDE_RETURN_IF_ERROR(file->Truncate(bytes));
  if (size == bytes) return file;
  if (size < bytes) {
    if (absl::Status status = file->Reserve(bytes); !status.ok())
      return absl::Status(status.code(),
                          absl::StrCat(status.message(), " (the tier has ", options_.capacity_bytes,
                                       " bytes: choose less, or another folder)"));
  }
  KVTIDE_RETURN_IF_ERROR(file->Sync());
  return file;
}

absl::Status DiskTier::OpenFiles(bool* fresh) {
  FileSystem& files = *options_.files;
  KVTIDE_ASSIGN_OR_RETURN(const std::vector<std::string> names, files.List(options_.folder));
  const absl::StatusOr<size_t> written = ReadFolderSize(files, options_.folder);
  KVTIDE_ASSIGN_OR_RETURN(const size_t former, written.ok() ? written : SizeOfFiles(names));
  if (former > options_.capacity_bytes) {
    KVTIDE_RETURN_IF_ERROR(CheckNothingIsDurable(former));
    KVTIDE_RETURN_IF_ERROR(WriteFolderSize(files, options_.folder, options_.capacity_bytes));
  } else if (written.ok()) {
    NoteShortFiles(former, names);
  }
  *fresh = std::find(names.begin(), names.end(), kManifests) == names.end();
  KVTIDE_ASSIGN_OR_RETURN(manifest_file_, OpenSized(kManifests, manifest_bytes_));
  const size_t count = RoundUp(extent_bytes_, options_.segment_bytes) / options_.segment_bytes;
  for (const std::string& name : names) {
    uint64_t number = 0;
    if (absl::StartsWith(name, kSegment) && absl::SimpleAtoi(name.substr(sizeof kSegment - 1), &number) &&
        number >= count)
      KVTIDE_RETURN_IF_ERROR(files.Remove(absl::StrCat(options_.folder, "/", name)));
  }
  for (size_t s = 0; s < count; s++) {
    const size_t bytes = std::min(options_.segment_bytes, extent_bytes_ - s * options_.segment_bytes);
    KVTIDE_ASSIGN_OR_RETURN(std::unique_ptr<File> file, OpenSized(absl::StrCat(kSegment, s), bytes));
    segments_.push_back(std::move(file));
  }
  MutexLock lock(mu_);
  dirty_.resize(count);
  return files.SyncFolder(options_.folder);
}

absl::StatusOr<BlockLabel> DiskTier::ReadLabel(const ExtentPlace& place, std::span<const std::byte> page,
                                               std::optional<ExtentDecryptor>* decryptor) const {
  if (key_ == nullptr) return ReadExtentHeader(page);
  KVTIDE_ASSIGN_OR_RETURN(ExtentDecryptor opened, ExtentDecryptor::Open(*key_, place, page));
  const BlockLabel label = opened.label();
  if (decryptor != nullptr) decryptor->emplace(std::move(opened));
  return label;
}

std::string DiskTier::EncodeEntry(const Manifest& manifest) {
  std::string text(sizeof(uint64_t) + kDiskPage, '\0');
  const uint64_t offset = manifest.offset;
  std::memcpy(text.data(), &offset, sizeof offset);
  WriteExtentHeader(manifest.label, std::as_writable_bytes(std::span(text)).subspan(sizeof offset));
  text.resize(text.find_last_not_of('\0') + 1);  // the rest of the page is zeros
  return text;
}

int64_t DiskTier::VersionOf(const std::string& entry) {
  std::string page = entry.size() > sizeof(uint64_t) ? entry.substr(sizeof(uint64_t)) : "";
  page.resize(kDiskPage);
  const absl::StatusOr<BlockLabel> label = ReadExtentHeader(std::as_bytes(std::span(page)));
  return label.ok() ? label->index : 0;
}

void DiskTier::Lose(std::string what) {
  lost_.push_back(std::move(what));
  MutexLock lock(mu_);
  stats_.manifest_errors++;
}

// Of each key the newest manifest that is whole counts. The index says which keys there should be, and which
// manifest was the newest one.
absl::Status DiskTier::OpenIndex(bool fresh) {
  MutexLock lock(index_mu_);
  std::vector<size_t> unread;
  KVTIDE_ASSIGN_OR_RETURN(const std::vector<Manifest> found, ScanManifests(&unread));
  if (unread.size() > kMostUnreadPages)
    return absl::UnavailableError(absl::StrCat(
        name(), ": ", unread.size(),
        " pages of its manifests cannot be read, so all that is durable is in doubt; "
        "nothing was changed: look after the device and start again, or give the tier another folder"));
  for (const Manifest& manifest : found) {
    last_version_ = std::max(last_version_, manifest.label.index);
    const auto best = manifests_.find(manifest.label.sequence);
    if (best != manifests_.end() && best->second.label.index >= manifest.label.index) continue;
    if (ReadManifest(manifest).ok()) manifests_[manifest.label.sequence] = manifest;
  }
  Journal::Entries entries;
  for (const auto& [key, manifest] : manifests_) entries[key] = EncodeEntry(manifest);
  absl::StatusOr<std::unique_ptr<Journal>> journal =
      Journal::Open(*options_.files, options_.folder, key_.get());
  if (journal.ok()) {
    for (const auto& [key, text] : (*journal)->entries()) {
      const int64_t version = VersionOf(text);
      last_version_ = std::max(last_version_, version);
      if (const auto counts = manifests_.find(key); counts == manifests_.end()) {
        Lose(absl::StrCat("the manifest of ", key, " is damaged"));
      } else if (version > counts->second.label.index) {
        Lose(absl::StrCat("the newest manifest of ", key,
                          " is damaged: an older one counts, and what was made durable after that is lost"));
      }
    }
  } else {
    const absl::StatusCode code = journal.status().code();
    if (code != absl::StatusCode::kNotFound && code != absl::StatusCode::kDataLoss) return journal.status();
    if (!fresh) rebuild_reason_ = std::string(journal.status().message());
    for (const Manifest& manifest : found) {
      const auto counts = manifests_.find(manifest.label.sequence);
      if (counts == manifests_.end() || counts->second.label.index < manifest.label.index)
        Lose(absl::StrCat("a manifest of ", manifest.label.sequence,
                          " is damaged, and so is the index, which would say whether it counted"));
    }
  }
  if (!journal.ok() || (*journal)->entries() != entries)
    journal = Journal::Create(*options_.files, options_.folder, std::move(entries), key_.get());
  KVTIDE_RETURN_IF_ERROR(journal.status());
  journal_ = *std::move(journal);
  // What does not count must not be found when what does is gone.
  bool wiped = false;
  for (const Manifest& manifest : found) {
    const auto counts = manifests_.find(manifest.label.sequence);
    if (counts != manifests_.end() && counts->second == manifest) continue;
    KVTIDE_RETURN_IF_ERROR(WipeManifest(manifest.offset));
    wiped = true;
  }
  // Nor what could not be read now: it may be readable at the next start, when its key was erased.
  for (const size_t page : unread) {
    const bool counts = std::any_of(manifests_.begin(), manifests_.end(), [&](const auto& entry) {
      const Manifest& manifest = entry.second;
      return page >= manifest.offset && page < manifest.offset + ExtentBytes(manifest.label.bytes);
    });
    if (counts) continue;
    KVTIDE_RETURN_IF_ERROR(WipeManifest(page));
    wiped = true;
  }
  if (wiped) KVTIDE_RETURN_IF_ERROR(manifest_file_->Sync());
  manifest_space_ = ExtentAllocator(manifest_bytes_);
  for (const auto& [key, manifest] : manifests_)
    if (!manifest_space_.AllocateAt(manifest.offset, ExtentBytes(manifest.label.bytes)))
      return absl::DataLossError(
          absl::StrCat(name(), ": the manifest of ", key, " lies over another one; remove the folder"));
  return absl::OkStatus();
}

// Every page may begin a manifest.
absl::StatusOr<std::vector<DiskTier::Manifest>> DiskTier::ScanManifests(std::vector<size_t>* unread) {
  constexpr size_t kRead = size_t{1} << 20;
  const AlignedBytes memory = AllocateAligned(kRead);
  std::vector<Manifest> found;
  for (size_t begin = 0; begin < manifest_bytes_; begin += kRead) {
    const size_t bytes = std::min(kRead, manifest_bytes_ - begin);
    // A stretch that cannot be read as a whole is read page by page: what can be read counts.
    const bool whole = ReadAll(*manifest_file_, begin, {memory.get(), bytes}).ok();
    for (size_t at = 0; at < bytes; at += kDiskPage) {
      const std::span<std::byte> page{memory.get() + at, kDiskPage};
      if (!whole && !ReadAll(*manifest_file_, begin + at, page).ok()) {
        unread->push_back(begin + at);
        continue;
      }
      const absl::StatusOr<BlockLabel> label =
          ReadLabel({ExtentPlace::File::kManifests, begin + at}, page, nullptr);
      if (label.ok() && label->kind == BlockLabel::Kind::kManifest) found.push_back({begin + at, *label});
    }
  }
  return found;
}

absl::StatusOr<std::string> DiskTier::ReadManifest(const Manifest& manifest) {
  const size_t bytes = ExtentBytes(manifest.label.bytes);
  if (manifest.label.bytes > manifest_bytes_ || manifest.offset % kDiskPage != 0 ||
      manifest.offset + bytes > manifest_bytes_)
    return absl::DataLossError("it is not inside the file of manifests");
  const AlignedBytes memory = AllocateAligned(bytes);
  KVTIDE_RETURN_IF_ERROR(ReadAll(*manifest_file_, manifest.offset, {memory.get(), bytes}));
  std::optional<ExtentDecryptor> decryptor;
  KVTIDE_ASSIGN_OR_RETURN(const BlockLabel label, ReadLabel({ExtentPlace::File::kManifests, manifest.offset},
                                                            {memory.get(), kDiskPage}, &decryptor));
  KVTIDE_RETURN_IF_ERROR(CheckLabel(label, manifest.label));
  std::byte* const value = memory.get() + kDiskPage;
  if (decryptor.has_value()) {
    decryptor->Add({value, bytes - kDiskPage});
    KVTIDE_RETURN_IF_ERROR(decryptor->Check());
  }
  if (XXH3_64bits(value, label.bytes) != label.checksum)
    return absl::DataLossError("its checksum is not the one of its label");
  return std::string(reinterpret_cast<const char*>(value), label.bytes);
}

absl::Status DiskTier::WriteManifest(Manifest& manifest, const std::string& value) {
  const size_t bytes = ExtentBytes(value.size());
  const AlignedBytes memory = AllocateAligned(bytes);
  std::memset(memory.get(), 0, bytes);
  std::memcpy(memory.get() + kDiskPage, value.data(), value.size());
  manifest.label.bytes = value.size();
  manifest.label.checksum = XXH3_64bits(value.data(), value.size());
  const std::span<std::byte> page{memory.get(), kDiskPage};
  if (key_ != nullptr) {
    ExtentEncryptor encryptor(*key_, {ExtentPlace::File::kManifests, manifest.offset});
    encryptor.Add({memory.get() + kDiskPage, bytes - kDiskPage});
    encryptor.WriteLabel(manifest.label, page);
  } else {
    WriteExtentHeader(manifest.label, page);
  }
  absl::Status status = WriteAll(*manifest_file_, manifest.offset, {memory.get(), bytes});
  CountWrite(status, bytes);
  if (status.ok()) status = SyncFile(*manifest_file_);
  return status;
}

std::vector<DiskTier::Part> DiskTier::PartsOf(size_t offset, size_t bytes) const {
  KVTIDE_CHECK(offset + bytes <= extent_bytes_, "extent at ", offset, " of ", bytes, " bytes");
  std::vector<Part> parts;
  while (bytes > 0) {
    const size_t segment = offset / options_.segment_bytes, at = offset % options_.segment_bytes;
    const size_t here = std::min(bytes, options_.segment_bytes - at);
    parts.push_back({segment, at, here});
    offset += here;
    bytes -= here;
  }
  return parts;
}

absl::Status DiskTier::WipeManifest(size_t offset) {
  alignas(kDiskPage) static const std::byte kZeros[kDiskPage] = {};
  const absl::Status status = WriteAll(*manifest_file_, offset, kZeros);
  CountWrite(status, kDiskPage);
  return status;
}

uint64_t DiskTier::NextWriteId() {
  MutexLock lock(mu_);
  const uint64_t pair[2] = {id_base_, ++last_id_};
  const uint64_t id = XXH3_64bits(pair, sizeof pair);
  return id != 0 ? id : 1;
}

std::unique_ptr<DiskTier::Lane> DiskTier::TakeLane() {
  MutexLock lock(mu_);
  while (lanes_.empty()) lane_free_.Wait(mu_);
  std::unique_ptr<Lane> lane = std::move(lanes_.back());
  lanes_.pop_back();
  return lane;
}

void DiskTier::GiveBack(std::unique_ptr<Lane> lane) {
  MutexLock lock(mu_);
  lanes_.push_back(std::move(lane));
  lane_free_.NotifyOne();
}

void DiskTier::Run(std::span<IoJob> jobs) {
  std::unique_ptr<Lane> lane = TakeLane();
  {
    Pipeline pipeline(*this, *lane);
    for (IoJob& job : jobs) {
      if (job.write) {
        pipeline.Write(job);
      } else {
        pipeline.Read(job);
      }
    }
  }
  GiveBack(std::move(lane));
  MutexLock lock(mu_);
  for (const IoJob& job : jobs)
    if (job.status.ok()) (job.write ? stats_.writes : stats_.reads)++;
}

void DiskTier::CountWrite(const absl::Status& status, uint64_t bytes) {
  MutexLock lock(mu_);
  if (status.ok()) {
    stats_.written_bytes += bytes;
    stats_.problem.clear();
    back_off_ = absl::ZeroDuration();
    retry_at_ = absl::InfinitePast();
    return;
  }
  stats_.write_errors++;
  stats_.problem = std::string(status.message());
  const absl::Time now = options_.clock();
  if (now < retry_at_) return;  // pieces that were under way when the first one failed
  back_off_ = std::clamp(2 * back_off_, kFirstBackOff, kLongestBackOff);
  retry_at_ = now + back_off_;
}

void DiskTier::CountRead(const absl::Status& status, bool device_error, uint64_t bytes) {
  MutexLock lock(mu_);
  if (status.ok()) {
    stats_.read_bytes += bytes;
  } else {
    (device_error ? stats_.read_errors : stats_.checksum_errors)++;
  }
}

bool DiskTier::Writable() const {
  MutexLock lock(mu_);
  return options_.clock() >= retry_at_;
}

IoTierStats DiskTier::Stats() const {
  MutexLock lock(mu_);
  IoTierStats stats = stats_;
  stats.writable = stats.problem.empty();
  stats.encrypted = key_ != nullptr;
  return stats;
}

std::map<uint64_t, std::string> DiskTier::Load(std::vector<std::string>* lost) {
  MutexLock lock(index_mu_);
  std::map<uint64_t, std::string> values;
  std::vector<uint64_t> unread;
  for (const auto& [key, manifest] : manifests_) {
    absl::StatusOr<std::string> value = ReadManifest(manifest);
    if (value.ok()) {
      values[key] = *std::move(value);
    } else {
      Lose(absl::StrCat("the manifest of ", key, ": ", value.status().message()));
      unread.push_back(key);
    }
  }
  *lost = lost_;
  if (unread.empty()) return values;
  // As in OpenIndex: nobody knows the keys from now on, and they must not come back.
  if (const absl::Status status = EraseKeys(unread); !status.ok())
    lost->push_back(absl::StrCat("they may be there again at the next start: ", status.message()));
  return values;
}

absl::Status DiskTier::SyncFile(File& file) {
  KVTIDE_RETURN_IF_ERROR(sync_failed_);
  const absl::Status status = file.Sync();
  MutexLock lock(mu_);
  stats_.syncs++;
  if (status.ok()) {
    if (&file == manifest_file_.get()) wipes_unsynced_ = false;
    return status;
  }
  stats_.sync_errors++;
  stats_.problem = std::string(status.message());
  // Linux drops pages whose write-back failed: a second sync would say OK about bytes that are gone.
  sync_failed_ = absl::UnavailableError(
      absl::StrCat(name(), ": ", status.message(), "; nothing is made durable any more, restart the daemon"));
  return sync_failed_;
}

absl::Status DiskTier::SyncSegments() {
  std::vector<size_t> dirty;
  {
    MutexLock lock(mu_);
    for (size_t s = 0; s < dirty_.size(); s++)
      if (dirty_[s]) dirty.push_back(s);
    for (const size_t s : dirty) dirty_[s] = false;
  }
  for (const size_t s : dirty) KVTIDE_RETURN_IF_ERROR(SyncFile(*segments_[s]));
  return absl::OkStatus();
}

// Where a manifest of the key may lie: the one that counts, and those in doubt.
void DiskTier::FreeManifests(uint64_t key) {
  const auto free = [&](const Manifest& manifest) ABSL_EXCLUSIVE_LOCKS_REQUIRED(index_mu_) {
    manifest_space_.Free(manifest.offset, ExtentBytes(manifest.label.bytes));
  };
  if (const auto former = manifests_.find(key); former != manifests_.end()) {
    free(former->second);
    manifests_.erase(former);
  }
  for (const Manifest& manifest : in_doubt_[key]) free(manifest);
  in_doubt_.erase(key);
}

absl::Status DiskTier::WipeManifests(uint64_t key) {
  if (const auto former = manifests_.find(key); former != manifests_.end())
    KVTIDE_RETURN_IF_ERROR(WipeManifest(former->second.offset));
  const auto doubtful = in_doubt_.find(key);
  if (doubtful == in_doubt_.end()) return absl::OkStatus();
  for (const Manifest& manifest : doubtful->second) KVTIDE_RETURN_IF_ERROR(WipeManifest(manifest.offset));
  return absl::OkStatus();
}

absl::Status DiskTier::Put(uint64_t key, const std::string& value) {
  MutexLock lock(index_mu_);
  KVTIDE_RETURN_IF_ERROR(sync_failed_);
  KVTIDE_RETURN_IF_ERROR(Annotate(lock_->Check(), name()));
  const std::optional<size_t> offset =
      manifest_space_.Allocate(ExtentBytes(value.size()), ExtentAllocator::End::kBottom);
  if (!offset.has_value())
    return absl::ResourceExhaustedError(absl::StrCat(name(), ": no room for a manifest of ", value.size(),
                                                     " bytes beside ", manifests_.size(),
                                                     " others; close sequences or give the tier more"));
  Manifest manifest;
  manifest.offset = *offset;
  manifest.label.kind = BlockLabel::Kind::kManifest;
  manifest.label.sequence = key;
  manifest.label.index = ++last_version_;
  manifest.label.write_id = NextWriteId();
  // The extents, the manifest, the index: each is durable before the next one may be.
  absl::Status status = SyncSegments();
  if (status.ok()) status = Annotate(WriteManifest(manifest, value), name());
  if (status.ok()) status = Annotate(journal_->Append({{key, EncodeEntry(manifest)}}), name());
  if (!status.ok()) {
    manifest.label.bytes = value.size();
    in_doubt_[key].push_back(manifest);
    // ResourceExhausted says that nothing was written.
    return absl::IsResourceExhausted(status) ? absl::UnavailableError(status.message()) : status;
  }
  // Until the next sync makes this durable a crash may bring the former one back, with its lower version.
  // One that could not be wiped keeps its place, and is wiped before the new one goes: it must not be the
  // newest then.
  if (WipeManifests(key).ok()) {
    FreeManifests(key);
  } else if (const auto former = manifests_.find(key); former != manifests_.end()) {
    in_doubt_[key].push_back(former->second);
  }
  wipes_unsynced_ = true;
  manifests_[key] = manifest;
  return absl::OkStatus();
}

absl::Status DiskTier::Erase(std::span<const uint64_t> keys) {
  MutexLock lock(index_mu_);
  return EraseKeys(keys);
}

absl::Status DiskTier::EraseKeys(std::span<const uint64_t> keys) {
  // The newest manifest must not go while an older one may come back.
  if (wipes_unsynced_) KVTIDE_RETURN_IF_ERROR(SyncFile(*manifest_file_));
  std::vector<Journal::Change> changes;
  for (const uint64_t key : keys) {
    if (manifests_.count(key) == 0 && in_doubt_.count(key) == 0) continue;
    KVTIDE_RETURN_IF_ERROR(Annotate(WipeManifests(key), name()));
    changes.push_back({key, std::nullopt});
  }
  if (changes.empty()) return absl::OkStatus();
  KVTIDE_RETURN_IF_ERROR(SyncFile(*manifest_file_));
  KVTIDE_RETURN_IF_ERROR(Annotate(journal_->Append(changes), name()));
  for (const Journal::Change& change : changes) FreeManifests(change.key);
  return absl::OkStatus();
}

}  // namespace kvtide
