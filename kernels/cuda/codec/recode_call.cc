#include "kernels/cuda/codec/recode_call.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "kernels/base/status.h"
#include "kernels/cuda/codec/codec_kernels.h"

namespace kvtide::cuda {
namespace {

size_t Size(int n) { return static_cast<size_t>(n); }

// K or V of all pieces.
class SideRecode {
 public:
  SideRecode(const RecodePiece& any, Side side)
      : side_(side),
        from_(*any.from),
        to_(*any.to),
        from_type_(key() ? from_.pair().k : from_.pair().v),
        to_type_(key() ? to_.pair().k : to_.pair().v),
        from_profile_(ProfileOf(from_type_, any.from_profile)),
        to_profile_(ProfileOf(to_type_, any.to_profile)) {
    const bool same_frame =
        any.from_profile == any.to_profile || !key() || Info(from_type_).storage == Storage::kHalf;
    copied_ = from_type_ == to_type_ && same_frame && any.tokens == kBlockTokens;
  }

  size_t StagingBound(size_t records) const {
    if (copied_) return 0;
    return Workspace::Bound(
        2 + 4 * AllRecords(),
        2 * records * sizeof(CodecJob) + 4 * AllRecords() * Size(from_half().head_dim) * sizeof(float));
  }
  // f32 rows between decoder and encoder.
  size_t RowBytes() const {
    return copied_ || direct() ? 0 : kBlockTokens * Size(from_half().head_dim) * sizeof(float);
  }

  // Before Place: transforms of calibrated keys, which stay on the device.
  absl::Status TakeTransforms(ProfileStore& profiles) {
    const auto take = [&](CacheType type, const Profile* profile,
                          std::shared_ptr<const DeviceProfile>* heads) -> absl::Status {
      if (copied_ || !Info(type).calibrated) return absl::OkStatus();
      KVTIDE_ASSIGN_OR_RETURN(*heads, profiles.Get(*profile, ProfilePart::kTransforms));
      return absl::OkStatus();
    };
    KVTIDE_RETURN_IF_ERROR(take(from_type_, from_profile_, &from_heads_));
    return take(to_type_, to_profile_, &to_heads_);
  }

  // Places what the kernels read; `rows` has RowBytes() for each record.
  void Place(std::span<const RecodePiece> pieces, std::byte* rows, Workspace& workspace) {
    if (copied_) return;
    const std::vector<Equaliser> from = PlaceMeans(from_type_, from_profile_, workspace),
                                 to = PlaceMeans(to_type_, to_profile_, workspace);
    std::vector<CodecJob> decode, encode;
    for (const RecodePiece& piece : pieces)
      for (size_t record = FirstRecord(piece); record < FirstRecord(piece) + Records(piece); record++) {
        CodecJob job;
        job.row_stride = from_half().head_dim;
        job.position = piece.position;
        job.source = Source(piece, record);
        if (!direct()) {
          job.target = rows + RowBytes() * encode.size();
          SetProfile(from[record], from_heads_.get(), record, &job);
          decode.push_back(job);
          job.source = job.target;
        }
        job.target = Target(piece, record);
        job.tokens = piece.tokens;
        SetProfile(to[record], to_heads_.get(), record, &job);
        encode.push_back(job);
      }
    decode_ = workspace.Upload(decode);
    encode_ = workspace.Upload(encode);
    count_ = static_cast<int>(encode.size());
  }

  absl::Status Launch(std::span<const RecodePiece> pieces, cudaStream_t stream) const {
    if (copied_) {
      for (const RecodePiece& piece : pieces)
        KVTIDE_CUDA_RETURN_IF_ERROR(cudaMemcpy2DAsync(
            Target(piece, FirstRecord(piece)), to_.record_bytes(), Source(piece, FirstRecord(piece)),
            from_.record_bytes(), to_half().bytes, Records(piece), cudaMemcpyDeviceToDevice, stream));
      return absl::OkStatus();
    }
    if (!direct())
      KVTIDE_CUDA_RETURN_IF_ERROR(
          LaunchDecode(from_type_, side_, from_half(), RowTarget::kF32Rows, 0, decode_, count_, stream));
    KVTIDE_CUDA_RETURN_IF_ERROR(LaunchEncode(to_type_, side_, to_half(),
                                             direct() ? RowSource::kF16Page : RowSource::kF32Rows, encode_,
                                             count_, stream));
    return absl::OkStatus();
  }

 private:
  // On the device; null = none.
  struct Equaliser {
    const float *mean = nullptr, *gain = nullptr;
  };

  static void SetProfile(const Equaliser& equaliser, const DeviceProfile* transforms, size_t record,
                         CodecJob* job) {
    job->mean = equaliser.mean;
    job->gain = equaliser.gain;
    if (transforms != nullptr) job->tide = transforms->heads() + record;
  }
  bool key() const { return side_ == Side::kKey; }
  bool direct() const { return from_type_ == ExactPair().k; }  // the encoder reads the page
  const HalfLayout& from_half() const { return key() ? from_.k() : from_.v(); }
  const HalfLayout& to_half() const { return key() ? to_.k() : to_.v(); }
  size_t AllRecords() const { return Size(from_.shape().layers * from_.shape().kv_heads); }
  size_t FirstRecord(const RecodePiece& piece) const {
    return Size(piece.first_layer * from_.shape().kv_heads);
  }
  size_t Records(const RecodePiece& piece) const { return Size(piece.layers * from_.shape().kv_heads); }
  const std::byte* Source(const RecodePiece& piece, size_t record) const {
    return piece.source + from_.record_bytes() * record + (key() ? 0 : from_.v_codes());
  }
  std::byte* Target(const RecodePiece& piece, size_t record) const {
    return piece.target + to_.record_bytes() * record + (key() ? 0 : to_.v_codes());
  }
  const Profile* ProfileOf(CacheType type, const Profile* profile) const {
    return key() && Info(type).storage == Storage::kCodes ? profile : nullptr;
  }
  // Not of calibrated keys, which have transforms. Once for each (layer, KV head), whatever the number of
  // pieces.
  std::vector<Equaliser> PlaceMeans(CacheType type, const Profile* profile, Workspace& workspace) const {
    std::vector<Equaliser> placed(AllRecords());
    if (profile == nullptr || Info(type).calibrated) return placed;
    for (size_t i = 0; i < placed.size(); i++) {
      if (!profile->k[i].mean.empty()) placed[i].mean = workspace.Upload(profile->k[i].mean);
      if (!profile->k[i].gain.empty()) placed[i].gain = workspace.Upload(profile->k[i].gain);
    }
    return placed;
  }

  const Side side_;
  const BlockLayout &from_, &to_;
  const CacheType from_type_, to_type_;
  const Profile *const from_profile_, *const to_profile_;
  std::shared_ptr<const DeviceProfile> from_heads_, to_heads_;  // of calibrated keys
  bool copied_ = false;                                         // the bytes stay what they are
  const CodecJob *decode_ = nullptr, *encode_ = nullptr;
  int count_ = 0;
};

}  // namespace

bool SameKind(const RecodePiece& a, const RecodePiece& b) {
  return *a.from == *b.from && *a.to == *b.to && a.from_profile == b.from_profile &&
         a.to_profile == b.to_profile && (a.tokens == kBlockTokens) == (b.tokens == kBlockTokens);
}

absl::Status RecodeCall(std::span<const RecodePiece> pieces, ProfileStore& profiles, Workspace& workspace) {
  size_t records = 0;
  for (const RecodePiece& piece : pieces) records += Size(piece.layers) * Size(piece.from->shape().kv_heads);
  if (records == 0) return absl::OkStatus();
  SideRecode k(pieces[0], Side::kKey), v(pieces[0], Side::kValue);
  KVTIDE_RETURN_IF_ERROR(k.TakeTransforms(profiles));
  KVTIDE_RETURN_IF_ERROR(workspace.Begin(k.StagingBound(records) + v.StagingBound(records) + 256));
  // K's rows are read before V's are written: one stream.
  KVTIDE_RETURN_IF_ERROR(workspace.rows.Reserve(records * std::max(k.RowBytes(), v.RowBytes())));
  for (SideRecode* side : {&k, &v}) side->Place(pieces, workspace.rows.data(), workspace);
  KVTIDE_RETURN_IF_ERROR(workspace.Send());
  for (const SideRecode* side : {&k, &v}) KVTIDE_RETURN_IF_ERROR(side->Launch(pieces, workspace.stream()));
  return workspace.Finish();
}

}  // namespace kvtide::cuda
