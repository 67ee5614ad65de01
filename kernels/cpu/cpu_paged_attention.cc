#include "kernels/cpu/cpu_paged_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/finite.h"
#include "kernels/base/status.h"
#include "kernels/format/catalogue.h"

namespace kvtide {
namespace {

size_t Size(int64_t n) { return static_cast<size_t>(n); }

// Rows of a tensor without gaps: where they lie, or packed into `packed`.
TensorView DenseRows(PagedRows rows, DataType type, int64_t tokens, int64_t width,
                     std::vector<std::byte>& packed) {
  if (rows.stride == width || tokens <= 1) return {rows.data, type};
  const size_t bytes = DataTypeBytes(type), row = Size(width) * bytes;
  packed.resize(Size(tokens) * row);
  for (size_t t = 0; t < Size(tokens); t++)
    std::memcpy(packed.data() + t * row,
                static_cast<const std::byte*>(rows.data) + t * Size(rows.stride) * bytes, row);
  return {packed.data(), type};
}

class CpuPagedAttention : public PagedAttention {
 public:
  CpuPagedAttention(Backend& backend, const PagedOptions& options, std::span<const PagedLayer> layers)
      : backend_(backend),
        options_(options),
        coded_(CodedPage(options)),
        exact_(ExactPage(options)),
        layers_(layers.begin(), layers.end()) {
    if (options_.coded_stride == 0) options_.coded_stride = coded_.block_bytes();
    if (options_.exact_stride == 0) options_.exact_stride = exact_.block_bytes();
    if (options_.pool) options_.coded_stride = options_.exact_stride = kPoolUnit;
    profiles_.resize(layers.size() * Size(std::max(1, options.max_profiles)));
    for (size_t i = 0; i < layers.size(); i++) profiles_[i] = MakeProfile(layers[i].k_mean, layers[i].k_gain);
  }

  // Once, where keys are calibrated.
  absl::Status SetTransforms() {
    KVTIDE_ASSIGN_OR_RETURN(Profile all, MakePagedKeyProfile(options_, layers_));
    for (size_t i = 0; i < layers_.size(); i++) {
      const auto first = all.k.begin() + static_cast<std::ptrdiff_t>(i) * options_.shape.kv_heads;
      Profile& profile = *(profiles_[i] = std::make_unique<Profile>());
      profile.shape = options_.shape;
      profile.k.assign(std::make_move_iterator(first),
                       std::make_move_iterator(first + options_.shape.kv_heads));
      profile.v.resize(profile.k.size());
      profile.hash = HashProfile(profile);
    }
    return absl::OkStatus();
  }

  absl::Status SetProfile(int index, const float* k_mean, const float* k_gain, void*) override {
    KVTIDE_RETURN_IF_ERROR(CheckPagedProfile(index, options_));
    const size_t values = Size(options_.shape.kv_heads) * Size(options_.shape.head_dim_k);
    const auto of = [values](const float* all, size_t layer) {
      return all == nullptr ? nullptr : all + layer * values;
    };
    for (size_t layer = 0; layer < layers_.size(); layer++)
      profiles_[Size(index) * layers_.size() + layer] = MakeProfile(of(k_mean, layer), of(k_gain, layer));
    return absl::OkStatus();
  }

  absl::Status Plan(const PagedStep& step, void*) override {
    KVTIDE_RETURN_IF_ERROR(CheckPagedStep(step, options_));
    step_ = step;
    planned_ = true;
    FindPlaces();
    return absl::OkStatus();
  }

  absl::Status Write(int layer, PagedRows k, PagedRows v, void*) override {
    KVTIDE_RETURN_IF_ERROR(CheckCall(layer));
    KVTIDE_RETURN_IF_ERROR(CheckPagedWritten(k, v, step_, options_));
    const GroupShape& shape = options_.shape;
    AppendArgs append;
    append.k = StorableRows(k, int64_t{shape.kv_heads} * shape.head_dim_k, k_);
    append.v = StorableRows(v, int64_t{shape.kv_heads} * shape.head_dim_v, v_);
    pieces_.clear();
    for (int t = 0; t < step_.tokens; t++) {
      const auto [page, in_page] = places_[Size(t)];
      if (page < 0) continue;
      if (in_page != 0 && t > 0 && places_[Size(t) - 1] == Place{page, in_page - 1}) {
        pieces_.back().tokens++;
        continue;
      }
      AppendPiece& piece = pieces_.emplace_back();
      piece.layout = &exact_;
      piece.block = ExactPageOf(layer, page);
      piece.first_token = in_page;
      piece.tokens = 1;
      piece.source_row = Size(t);
    }
    append.pieces = pieces_;
    return backend_.Append(append);
  }

  absl::Status WriteAttend(int layer, PagedRows k, PagedRows v, PagedRows q, MutablePagedRows out, float* lse,
                           void* stream) override {
    KVTIDE_RETURN_IF_ERROR(CheckCall(layer));
    KVTIDE_RETURN_IF_ERROR(CheckAttended(q, out));
    KVTIDE_RETURN_IF_ERROR(Write(layer, k, v, stream));
    return Attend(layer, q, out, lse, stream);
  }

  absl::Status Attend(int layer, PagedRows q, MutablePagedRows out, float* lse, void*) override {
    KVTIDE_RETURN_IF_ERROR(CheckCall(layer));
    KVTIDE_RETURN_IF_ERROR(CheckAttended(q, out));
    const GroupShape& shape = options_.shape;
    const int64_t q_width = int64_t{options_.heads} * shape.head_dim_k,
                  out_width = int64_t{options_.heads} * shape.head_dim_v;
    const int rows = AttendedRows();
    const TensorView dense_q = DenseRows(q, options_.type, rows, q_width, q_);
    const bool direct = out.stride == out_width || rows <= 1;
    const size_t q_row = Size(q_width) * DataTypeBytes(options_.type),
                 out_row = Size(out_width) * DataTypeBytes(options_.output_type);
    if (!direct) out_.resize(Size(rows) * out_row);
    auto* const target = direct ? static_cast<std::byte*>(out.data) : out_.data();

    MakeItems(layer);
    std::vector<LayerItem> tensors;
    tensors.reserve(items_.size());
    for (size_t i = 0; i < items_.size(); i++) {
      const size_t first = Size(step_.query_start[sequences_[i]]);
      LayerItem& item = tensors.emplace_back();
      item.q = {static_cast<const std::byte*>(dense_q.data) + first * q_row, options_.type};
      item.out = {target + first * out_row, options_.output_type};
      item.lse = lse == nullptr ? nullptr : lse + first * Size(options_.heads);
    }
    if (items_.empty()) return absl::OkStatus();
    KVTIDE_ASSIGN_OR_RETURN(
        plan_, backend_.PlanAttend({options_.heads, true, options_.window, items_}, std::move(plan_)));
    AttendLayerArgs args;
    args.scale = options_.scale;
    args.softcap = options_.softcap;
    args.sinks = layers_[Size(layer)].sinks;
    args.items = tensors;
    const absl::Status status = backend_.AttendLayer(*plan_, args);
    // Internal: logits that leave f32, which this contract leaves as they come.
    if (!status.ok() && status.code() != absl::StatusCode::kInternal) return status;
    if (direct) return absl::OkStatus();
    // Rows of others are not touched.
    for (const int s : sequences_)
      for (size_t t = Size(step_.query_start[s]); t < Size(step_.query_start[s + 1]); t++)
        std::memcpy(
            static_cast<std::byte*>(out.data) + t * Size(out.stride) * DataTypeBytes(options_.output_type),
            out_.data() + t * out_row, out_row);
    return absl::OkStatus();
  }

  absl::Status Seal(int layer, void*) override {
    KVTIDE_RETURN_IF_ERROR(CheckCall(layer));
    seals_.clear();
    AddSeals(layer);
    return backend_.Recode(seals_);
  }

  absl::Status SealLayers(void*) override {
    KVTIDE_RETURN_IF_ERROR(CheckCall(0));
    seals_.clear();
    for (int layer = 0; layer < static_cast<int>(layers_.size()); layer++) AddSeals(layer);
    return backend_.Recode(seals_);
  }

  absl::StatusOr<uint64_t> ChangedValues(void*) override { return changed_; }
  size_t bytes() const override {
    size_t sum = k_.packed.capacity() + v_.packed.capacity() + q_.capacity() + out_.capacity();
    sum += (k_.changed.capacity() + v_.changed.capacity()) * sizeof(float);
    sum += blocks_.capacity() * sizeof(std::byte*) + pieces_.capacity() * sizeof(AppendPiece) +
           seals_.capacity() * sizeof(RecodePiece) + runs_.capacity() * sizeof(BlockRun);
    for (const std::unique_ptr<Profile>& profile : profiles_)
      for (size_t h = 0; profile != nullptr && h < profile->k.size(); h++)
        sum += (profile->k[h].transform.size() + profile->k[h].inverse.size()) * sizeof(float);
    return sum;
  }

 private:
  struct Place {
    int32_t page = -1, token = 0;  // no page: the row is not written
    bool operator==(const Place&) const = default;
  };
  // Rows of K or V on their way into f16.
  struct Rows {
    std::vector<std::byte> packed;
    std::vector<float> changed;
  };

  const Profile* ProfileOf(int layer, const int32_t* indices, int at) const {
    const int index =
        indices == nullptr ? 0 : std::clamp(indices[at], 0, std::max(0, options_.max_profiles - 1));
    return profiles_[Size(index) * layers_.size() + Size(layer)].get();
  }

  std::unique_ptr<Profile> MakeProfile(const float* k_mean, const float* k_gain) const {
    if (k_mean == nullptr && k_gain == nullptr) return nullptr;
    auto profile = std::make_unique<Profile>();
    profile->shape = options_.shape;
    const size_t dim = Size(options_.shape.head_dim_k);
    for (size_t head = 0; head < Size(options_.shape.kv_heads); head++) {
      HeadProfile& key = profile->k.emplace_back();
      if (k_mean != nullptr) key.mean.assign(k_mean + head * dim, k_mean + (head + 1) * dim);
      if (k_gain != nullptr) key.gain.assign(k_gain + head * dim, k_gain + (head + 1) * dim);
    }
    profile->v.resize(profile->k.size());
    profile->hash = HashProfile(*profile);
    return profile;
  }

  // Where rows of the step go.
  void FindPlaces() {
    places_.assign(Size(step_.tokens), {});
    if (step_.write_slots != nullptr) {
      for (size_t t = 0; t < places_.size(); t++) {
        const int32_t slot = step_.write_slots[t];
        if (slot >= 0) places_[t] = {slot / kBlockTokens, slot % kBlockTokens};
      }
      return;
    }
    for (int s = 0; s < step_.sequences; s++) {
      const int first = step_.query_start[s], queries = step_.query_start[s + 1] - first;
      for (int i = 0; i < queries && first + i < step_.tokens; i++) {
        const int position = step_.lengths[s] - queries + i;
        if (position < 0) continue;
        const int block = position / kBlockTokens;
        const int at = block < step_.coded_first[s] ? block : block - step_.coded_count[s];
        places_[Size(first + i)] = {step_.exact_table[s * step_.exact_row + at], position % kBlockTokens};
      }
    }
  }

  absl::Status CheckCall(int layer) const {
    if (layer < 0 || Size(layer) >= layers_.size())
      return absl::InvalidArgumentError(absl::StrCat("layer ", layer, " of ", layers_.size()));
    if (!planned_) return absl::FailedPreconditionError("no step is planned; call Plan first");
    return absl::OkStatus();
  }

  // Of q and out that belong to sequences.
  int AttendedRows() const { return step_.sequences == 0 ? 0 : step_.query_start[step_.sequences]; }

  absl::Status CheckAttended(PagedRows q, MutablePagedRows out) const {
    if (AttendedRows() > step_.tokens)
      return absl::InvalidArgumentError(
          absl::StrCat("query_start ends at ", AttendedRows(), ", the step has ", step_.tokens, " tokens"));
    return CheckPagedAttended(q, out, options_);
  }

  std::byte* ExactPageOf(int layer, int32_t page) const {
    if (page >= options_.exact_pages)
      return options_.scratch + Size(page - options_.exact_pages) * options_.exact_stride;
    return layers_[Size(layer)].exact + Size(page) * options_.exact_stride;
  }
  std::byte* CodedPageOf(int layer, int32_t page) const {
    return layers_[Size(layer)].coded + Size(page) * options_.coded_stride;
  }

  // Rows whose values f16 holds: those of the caller, or a copy with what it does not hold changed.
  TensorView StorableRows(PagedRows rows, int64_t width, Rows& memory) {
    const TensorView dense = DenseRows(rows, options_.type, step_.tokens, width, memory.packed);
    uint64_t changed = 0;
    const size_t row = Size(width);
    const auto fits = [](float x) { return std::abs(x) <= kMaxF16; };  // NaN does not
    memory.changed.clear();
    for (size_t t = 0; t < Size(step_.tokens); t++) {
      if (places_[t].page < 0) continue;
      for (size_t i = t * row; i < (t + 1) * row; i++) {
        const float value = dense.At(i);
        if (fits(value)) continue;
        if (memory.changed.empty()) {
          memory.changed.resize(Size(step_.tokens) * row);
          for (size_t j = 0; j < memory.changed.size(); j++) memory.changed[j] = dense.At(j);
        }
        memory.changed[i] = std::isnan(value) ? 0 : std::copysign(kMaxF16, value);
        changed++;
      }
    }
    changed_ += changed;
    return changed == 0 ? dense : TensorView{memory.changed.data(), DataType::kF32};
  }

  // The step's sequences that have new tokens, with the pages of a layer that they see.
  void MakeItems(int layer) {
    sequences_.clear();
    items_.clear();
    blocks_.clear();
    runs_.clear();
    struct Part {
      const BlockLayout* layout;
      int64_t first_block, blocks;
      size_t first;  // in blocks_
    };
    std::vector<Part> parts;
    std::vector<std::pair<size_t, size_t>> parts_of;
    std::vector<PlanItem> planned;
    for (int s = 0; s < step_.sequences; s++) {
      const int queries = step_.query_start[s + 1] - step_.query_start[s], length = step_.lengths[s];
      if (queries <= 0 || length <= 0) continue;
      const int64_t blocks = (int64_t{length} + kBlockTokens - 1) / kBlockTokens,
                    coded_begin = step_.coded_first[s], coded_end = coded_begin + step_.coded_count[s],
                    first_query = int64_t{length} - queries;
      const int64_t begin =
          options_.window > 0 ? std::max<int64_t>(0, first_query - options_.window + 1) / kBlockTokens : 0;
      const size_t first_part = parts.size();
      const auto add = [&](int64_t from, int64_t to, const BlockLayout& layout, const auto& page) {
        from = std::max(from, begin);
        to = std::min(to, blocks);
        if (from >= to) return;
        parts.push_back({&layout, from, to - from, blocks_.size()});
        for (int64_t b = from; b < to; b++) blocks_.push_back(page(b));
      };
      const int32_t* coded = step_.coded_table + s * step_.coded_row;
      const int32_t* exact = step_.exact_table + s * step_.exact_row;
      add(0, coded_begin, exact_, [&](int64_t b) { return ExactPageOf(layer, exact[b]); });
      add(coded_begin, coded_end, coded_, [&](int64_t b) { return CodedPageOf(layer, coded[b]); });
      add(coded_end, blocks, exact_,
          [&](int64_t b) { return ExactPageOf(layer, exact[b - (coded_end - coded_begin)]); });
      parts_of.emplace_back(first_part, parts.size());
      sequences_.push_back(s);
      planned.push_back({{}, queries, first_query});
    }
    runs_.reserve(parts.size());
    for (size_t i = 0; i < planned.size(); i++) {
      const int64_t length = step_.lengths[sequences_[i]];
      for (size_t p = parts_of[i].first; p < parts_of[i].second; p++) {
        const Part& part = parts[p];
        BlockRun& run = runs_.emplace_back();
        run.layout = part.layout;
        run.profile = part.layout == &coded_ ? ProfileOf(layer, step_.profiles, sequences_[i]) : nullptr;
        run.blocks = std::span<std::byte* const>(blocks_).subspan(part.first, Size(part.blocks));
        run.first_position = part.first_block * kBlockTokens;
        run.tokens = std::min(length - run.first_position, part.blocks * kBlockTokens);
      }
      planned[i].runs =
          std::span<const BlockRun>(runs_).subspan(parts_of[i].first, parts_of[i].second - parts_of[i].first);
    }
    items_ = std::move(planned);
  }

  void AddSeals(int layer) {
    const int count = step_.seal_count == nullptr ? step_.seals : std::min(step_.seals, *step_.seal_count);
    for (int i = 0; i < count; i++) {
      const int32_t from = step_.seal_pages[2 * i], to = step_.seal_pages[2 * i + 1];
      if (from < 0) continue;
      RecodePiece& piece = seals_.emplace_back();
      piece.from = &exact_;
      piece.source = ExactPageOf(layer, from);
      piece.to = &coded_;
      piece.target = CodedPageOf(layer, to);
      piece.to_profile = ProfileOf(layer, step_.seal_profiles, i);
      piece.layers = 1;
    }
  }

  Backend& backend_;
  PagedOptions options_;
  const BlockLayout coded_, exact_;
  const std::vector<PagedLayer> layers_;
  std::vector<std::unique_ptr<Profile>> profiles_;  // [max_profiles, at least 1][layers]
  PagedStep step_;
  bool planned_ = false;
  uint64_t changed_ = 0;
  std::unique_ptr<AttendPlan> plan_;

  // Memory of a call, kept for the next.
  Rows k_, v_;
  std::vector<std::byte> q_, out_;
  std::vector<Place> places_;  // of the step's rows
  std::vector<AppendPiece> pieces_;
  std::vector<RecodePiece> seals_;
  std::vector<int> sequences_;  // of items_
  std::vector<PlanItem> items_;
  std::vector<BlockRun> runs_;
  std::vector<std::byte*> blocks_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<PagedAttention>> MakeCpuPagedAttention(Backend& backend,
                                                                      const PagedOptions& options,
                                                                      std::span<const PagedLayer> layers) {
  constexpr size_t kCacheLine = 64;
  KVTIDE_RETURN_IF_ERROR(CheckPagedOptions(options, layers, kCacheLine));
  KVTIDE_RETURN_IF_ERROR(backend.CheckSupport(CodedPage(options)));
  auto attention = std::make_unique<CpuPagedAttention>(backend, options, layers);
  if (Info(options.pair.k).calibrated) KVTIDE_RETURN_IF_ERROR(attention->SetTransforms());
  return attention;
}

}  // namespace kvtide
