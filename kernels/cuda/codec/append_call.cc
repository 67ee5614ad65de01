#include "kernels/cuda/codec/append_call.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels/base/status.h"

namespace kvtide::cuda {
namespace {

constexpr size_t kShared = 64 << 10;  // worth a second thread, or none

size_t Size(int64_t n) { return static_cast<size_t>(n); }

// Those of a piece, in its tensor of `width` values a row.
struct RowBytes {
  const std::byte* data;
  size_t bytes;
};
RowBytes RowsOf(TensorView tensor, const AppendPiece& piece, int width) {
  const size_t row = Size(width) * DataTypeBytes(tensor.type);
  return {static_cast<const std::byte*>(tensor.data) + piece.source_row * row, Size(piece.tokens) * row};
}

// Rows [first, first + count) of `width` values, to a tensor of `type`.
void CopyRows(TensorView from, size_t first, size_t count, size_t width, DataType type, std::byte* to) {
  if (from.type == type) {
    const size_t bytes = DataTypeBytes(type);
    std::memcpy(to, static_cast<const std::byte*>(from.data) + first * width * bytes, count * width * bytes);
    return;
  }
  auto* const values = reinterpret_cast<float*>(to);  // tensors of unlike types meet in f32
  for (size_t i = 0; i < count * width; i++) values[i] = from.At(first * width + i);
}

// That of all tensors, or f32.
DataType CommonType(const AppendArgs& args) {
  const AppendPiece* first = nullptr;
  for (const AppendPiece& piece : args.pieces) {
    if (piece.tokens == 0) continue;
    if (first == nullptr) first = &piece;
    for (const TensorView view : {KeysOf(args, piece), ValuesOf(args, piece)})
      if (view.type != KeysOf(args, *first).type) return DataType::kF32;
  }
  return KeysOf(args, *first).type;
}

bool IsBf16(CacheType type) {
  return VisitCodec(type, [](auto codec) { return std::is_same_v<decltype(codec), Bf16>; });
}

AppendSide SideOf(const HalfLayout& half, CacheType type, size_t offset, const std::byte* rows) {
  AppendSide side;
  side.rows = rows;
  side.head_dim = half.head_dim;
  side.stored_dim = half.stored_dim;
  side.offset = static_cast<int32_t>(offset);
  side.bf16 = IsBf16(type);
  return side;
}

}  // namespace

absl::StatusOr<AppendRows> AppendRows::Make(const AppendArgs& args) {
  AppendRows made;
  made.args_ = args;
  size_t rows = 0;
  for (const AppendPiece& piece : args.pieces) {
    if (!(*piece.layout == *args.pieces[0].layout))
      return absl::InvalidArgumentError("append: pieces of unequal layouts");
    if (piece.tokens == 0) continue;
    if (KeysOf(args, piece).data == nullptr || ValuesOf(args, piece).data == nullptr)
      return absl::InvalidArgumentError("append: no k or no v");
    rows += Size(piece.tokens);
    made.most_tokens_ = std::max(made.most_tokens_, piece.tokens);
    made.jobs_++;
  }
  if (made.jobs_ == 0) return made;
  const GroupShape& shape = args.pieces[0].layout->shape();
  made.type_ = CommonType(args);
  made.k_bytes_ = rows * Size(shape.kv_heads) * Size(shape.head_dim_k) * DataTypeBytes(made.type_);
  made.v_bytes_ = rows * Size(shape.kv_heads) * Size(shape.head_dim_v) * DataTypeBytes(made.type_);
  return made;
}

void AppendRows::UsePinned(const PinnedRanges& ranges) {
  if (ranges.empty() || row_bytes() < kShared) return;
  const GroupShape& shape = args_.pieces[0].layout->shape();
  pinned_ = std::all_of(args_.pieces.begin(), args_.pieces.end(), [&](const AppendPiece& piece) {
    const RowBytes k = RowsOf(KeysOf(args_, piece), piece, shape.kv_heads * shape.head_dim_k),
                   v = RowsOf(ValuesOf(args_, piece), piece, shape.kv_heads * shape.head_dim_v);
    return piece.tokens == 0 || (KeysOf(args_, piece).type == type_ && ValuesOf(args_, piece).type == type_ &&
                                 ranges.Reaches(k.data, k.bytes) && ranges.Reaches(v.data, v.bytes));
  });
}

absl::Status AppendRows::Place(Workspace& workspace, SecondHand* hand, CopiesIn* copies) {
  if (empty()) return absl::OkStatus();
  const BlockLayout& layout = *args_.pieces[0].layout;
  const GroupShape& shape = layout.shape();
  const size_t k_width = Size(shape.kv_heads) * Size(shape.head_dim_k),
               v_width = Size(shape.kv_heads) * Size(shape.head_dim_v), value_bytes = DataTypeBytes(type_);
  const auto placed = workspace.Place<AppendJob>(jobs_);
  std::vector<const AppendPiece*> pieces;  // of the jobs
  pieces.reserve(jobs_);
  int64_t row = 0;
  for (const AppendPiece& piece : args_.pieces) {
    if (piece.tokens == 0) continue;
    AppendJob& job = placed.host[pieces.size()];
    job = {piece.block + layout.RecordOffset(piece.layer, 0), row, piece.first_token, piece.tokens, 0};
    pieces.push_back(&piece);
    row += piece.tokens;
  }
  const std::byte *k_rows = nullptr, *v_rows = nullptr;
  if (pinned_) {
    KVTIDE_RETURN_IF_ERROR(workspace.sent_rows.Reserve(row_bytes()));
    k_rows = workspace.sent_rows.data();
    v_rows = k_rows + k_bytes_;
    std::byte *k_to = workspace.sent_rows.data(), *v_to = k_to + k_bytes_;
    for (const AppendPiece* const piece : pieces) {
      const RowBytes k = RowsOf(KeysOf(args_, *piece), *piece, shape.kv_heads * shape.head_dim_k),
                     v = RowsOf(ValuesOf(args_, *piece), *piece, shape.kv_heads * shape.head_dim_v);
      copies->Add(k.data, std::exchange(k_to, k_to + k.bytes), k.bytes);
      copies->Add(v.data, std::exchange(v_to, v_to + v.bytes), v.bytes);
    }
  } else {
    const auto k = workspace.Place<std::byte>(k_bytes_), v = workspace.Place<std::byte>(v_bytes_);
    k_rows = k.device;
    v_rows = v.device;
    const auto copy = [&](size_t index) {
      const AppendPiece& piece = *pieces[index];
      const size_t at = Size(placed.host[index].first_row), tokens = Size(piece.tokens);
      CopyRows(KeysOf(args_, piece), piece.source_row, tokens, k_width, type_,
               k.host + at * k_width * value_bytes);
      CopyRows(ValuesOf(args_, piece), piece.source_row, tokens, v_width, type_,
               v.host + at * v_width * value_bytes);
    };
    if (hand != nullptr && row_bytes() >= kShared) {
      hand->Share(jobs_, copy);
    } else {
      for (size_t i = 0; i < jobs_; i++) copy(i);
    }
  }
  params_.k = SideOf(layout.k(), layout.pair().k, 0, k_rows);
  params_.v = SideOf(layout.v(), layout.pair().v, layout.v_codes(), v_rows);
  params_.jobs = placed.device;
  params_.type = type_;
  params_.heads = shape.kv_heads;
  params_.record_bytes = layout.record_bytes();
  return absl::OkStatus();
}

absl::Status AppendRows::Launch(cudaStream_t stream) const {
  if (empty()) return absl::OkStatus();
  KVTIDE_CUDA_RETURN_IF_ERROR(LaunchAppend(params_, static_cast<int>(jobs_), most_tokens_, stream));
  return absl::OkStatus();
}

absl::Status AppendCall(const AppendArgs& args, size_t in_place_bytes, Workspace& workspace) {
  KVTIDE_ASSIGN_OR_RETURN(AppendRows rows, AppendRows::Make(args));
  if (rows.empty()) return absl::OkStatus();
  KVTIDE_RETURN_IF_ERROR(workspace.Begin(Workspace::Bound(AppendRows::kArrays, rows.staging_bytes()),
                                         rows.row_bytes() <= in_place_bytes));
  KVTIDE_RETURN_IF_ERROR(rows.Place(workspace, nullptr, nullptr));
  KVTIDE_RETURN_IF_ERROR(workspace.Send());
  KVTIDE_RETURN_IF_ERROR(rows.Launch(workspace.stream()));
  return workspace.Finish();
}

}  // namespace kvtide::cuda
