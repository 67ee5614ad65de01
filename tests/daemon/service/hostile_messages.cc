#include "tests/daemon/service/hostile_messages.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "daemon/cache/kv_cache.h"
#include "daemon/service/handlers.h"
#include "daemon/service/verbs.h"
#include "kernels/base/check.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/daemon/choices.h"

namespace kvtide::service {
namespace {

constexpr int kLayers = 2, kHeads = 2, kDim = 64;
constexpr size_t kArena = 1 << 16, kGuard = 1 << 20;
constexpr std::byte kUntouched{0x3c};  // small numbers, as f32 and as f16

class Choices : public testing::Choices {
 public:
  using testing::Choices::Choices;
  int Pick(int below) { return Next<uint8_t>() % below; }
  bool Rarely() { return Next<uint8_t>() >= 0xf0; }
  // Near what numbers are compared with, or any.
  uint64_t Odd() {
    const uint64_t kNear[] = {0,
                              1,
                              63,
                              64,
                              kArena,
                              kArena - 16,
                              uint64_t{1} << 31,
                              uint64_t{1} << 32,
                              uint64_t{1} << 40,
                              uint64_t{1} << 62,
                              uint64_t{1} << 63,
                              ~uint64_t{0}};
    if (Pick(4) == 0) return Next<uint64_t>();
    return kNear[static_cast<size_t>(Pick(std::size(kNear)))] + static_cast<uint64_t>(Next<int8_t>());
  }
  uint64_t Number(uint64_t good) { return Rarely() ? Odd() : good; }
  int64_t Signed(int64_t good) { return static_cast<int64_t>(Number(static_cast<uint64_t>(good))); }
};

class GuardedArena {
 public:
  GuardedArena() {
    all_ = static_cast<std::byte*>(
        ::mmap(nullptr, kArena + 2 * kGuard, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    KVTIDE_CHECK(all_ != MAP_FAILED && ::mprotect(data(), kArena, PROT_READ | PROT_WRITE) == 0);
    std::memset(data(), static_cast<int>(kUntouched), kArena);
  }
  ~GuardedArena() { ::munmap(all_, kArena + 2 * kGuard); }
  GuardedArena(const GuardedArena&) = delete;
  GuardedArena& operator=(const GuardedArena&) = delete;

  std::byte* data() const { return all_ + kGuard; }

 private:
  std::byte* all_;
};

class HostileClient {
 public:
  explicit HostileClient(std::span<const uint8_t> bytes) : choices_(bytes), tensors_(arena_.data(), kArena) {
    CpuBackendOptions cpu;
    cpu.threads = 1;
    backend_ = MakeCpuBackend(cpu);
    CacheOptions options;
    options.background_moves = false;
    options.tiers.push_back({"device", backend_.get(), size_t{2} << 20, false, "cpu"});
    options.tiers.push_back({"host", backend_.get(), size_t{2} << 20, false, "cpu"});
    cache_ = KvCache::Create(options).value();
    handlers_ = std::make_unique<Handlers>(cache_.get(), ServiceOptions());
    v1::Model& model = *request_.mutable_register_model()->mutable_model();
    model.set_name("m");
    for (int l = 0; l < kLayers; l++) {
      v1::Layer& layer = *model.add_layers();
      layer.set_kv_heads(1);
      layer.set_query_heads(kHeads);
      layer.set_head_dim_k(kDim);
      layer.set_head_dim_v(kDim);
    }
    Serve(false);
  }

  int Play() {
    while (!choices_.empty() && messages_ < 200) {
      request_.Clear();
      written_.clear();
      Serve(Choose());
    }
    owned_.Release(handlers_.get());
    cache_->CheckInvariants();
    const CacheStats stats = cache_->Stats();
    KVTIDE_CHECK(stats.sequences == 0 && stats.leases == 0);
    return served_;
  }

 private:
  // `anywhere`: what it wrote is not known.
  void Serve(bool anywhere) {
    Call call;
    call.tensors = &tensors_;
    call.steps = owned_.steps();
    call.maps_pool = choices_.Pick(2) == 0;
    call.max_answer_bytes = 1 << 16;
    answer_.Clear();
    SequenceId sequence = 0;
    const absl::Status status = ServeMessage(handlers_.get(), request_, call, &answer_, &sequence);
    KVTIDE_CHECK(status.code() != absl::StatusCode::kInternal);
    messages_++;
    // Outputs have a type and a size of their own: what does not fit is refused before a byte is written.
    std::sort(written_.begin(), written_.end());
    size_t at = 0;
    for (const auto& [begin, end] : written_) {
      KVTIDE_CHECK(anywhere || begin <= at || IsUntouched(at, begin));
      at = std::max(at, end);
    }
    KVTIDE_CHECK(anywhere || IsUntouched(at, kArena));
    std::memset(arena_.data(), static_cast<int>(kUntouched), kArena);
    if (!status.ok()) return;
    served_++;
    owned_.Note(request_, answer_);
    if (answer_.has_create_sequence()) sequences_.push_back(answer_.create_sequence().sequence_id());
    if (answer_.has_begin_step()) steps_.push_back(answer_.begin_step().step_id());
    if (answer_.has_pin_step()) steps_.push_back(answer_.pin_step().step_id());
    if (answer_.has_open_namespace()) space_ = answer_.open_namespace().namespace_id();
    if (answer_.has_lookup_blocks()) lease_ = answer_.lookup_blocks().lease_id();
    if (answer_.has_lookup_prefix()) prefix_ = answer_.lookup_prefix().lease_id();
  }

  bool IsUntouched(size_t begin, size_t end) const {
    return std::all_of(arena_.data() + begin, arena_.data() + end,
                       [](std::byte byte) { return byte == kUntouched; });
  }

  uint64_t Sequence() {
    return choices_.Rarely() || sequences_.empty()
               ? choices_.Odd()
               : sequences_[static_cast<size_t>(choices_.Pick(static_cast<int>(sequences_.size())))];
  }
  uint64_t StepId() { return choices_.Rarely() || steps_.empty() ? choices_.Pick(2) : steps_.back(); }
  int64_t Length(uint64_t sequence) { return choices_.Signed(cache_->Length(sequence).value_or(0)); }

  // Where something is said to lie. Results of the right size are expected to be written nowhere else.
  void SetPlace(uint64_t bytes, bool result, v1::Place* place) {
    const uint64_t slots = bytes < kArena ? (kArena - bytes) / 16 + 1 : 1;
    place->set_offset(choices_.Number(choices_.Next<uint16_t>() % slots * 16));
    place->set_bytes(choices_.Number(bytes));
    if (!result) return;
    const uint64_t begin = std::min<uint64_t>(place->offset(), kArena);
    written_.emplace_back(begin, begin + std::min<uint64_t>(place->bytes(), kArena - begin));
  }
  void SetTensor(int64_t tokens, int heads, v1::Tensor* tensor) {
    tokens = choices_.Signed(tokens);
    tensor->set_dtype(choices_.Rarely() ? static_cast<v1::DataType>(choices_.Pick(8)) : v1::DATA_TYPE_F32);
    for (const int64_t dimension : {tokens, int64_t{heads}, int64_t{kDim}})
      tensor->add_shape(choices_.Signed(dimension));
    SetPlace(static_cast<uint64_t>(tokens) * static_cast<uint64_t>(heads) * kDim * sizeof(float), false,
             tensor->mutable_place());
  }
  void SetIds(int64_t tokens, google::protobuf::RepeatedField<uint32_t>* ids) {
    if (choices_.Pick(2) == 0) return;
    const int64_t count = choices_.Rarely() ? choices_.Pick(100) : tokens;
    for (int64_t i = 0; i < count; i++) ids->Add(static_cast<uint32_t>(i));
  }
  void SetLayout(v1::PageLayout* layout) {
    if (choices_.Rarely()) layout->set_dtype(static_cast<v1::DataType>(choices_.Pick(8)));
    layout->set_order(static_cast<v1::PageOrder>(choices_.Pick(3)));
    // [block][layer][K, V][token][dim], as long as nothing is odd.
    const int64_t part = kBlock * kDim;
    layout->set_block_stride(choices_.Signed(2 * kLayers * part));
    layout->set_layer_stride(choices_.Signed(2 * part));
    layout->set_value_offset(choices_.Signed(part));
    layout->set_token_stride_k(choices_.Signed(0));
    layout->set_token_stride_v(choices_.Signed(0));
    layout->set_head_stride_k(choices_.Signed(0));
    layout->set_head_stride_v(choices_.Signed(0));
  }
  void SetResults(int64_t tokens, v1::Place* output, v1::Place* lse) {
    SetPlace(static_cast<uint64_t>(tokens) * kHeads * kDim * sizeof(float), true, output);
    SetPlace(static_cast<uint64_t>(tokens) * kHeads * sizeof(float), true, lse);
  }
  int32_t Layer() { return static_cast<int32_t>(choices_.Signed(choices_.Pick(kLayers))); }
  uint64_t BlockBytes(int blocks) const {
    return static_cast<uint64_t>(blocks) * 2 * kLayers * kBlock * kDim * sizeof(uint16_t);
  }

  // Fills the request. True if it is not known what it may write.
  bool Choose() {
    switch (choices_.Pick(14)) {
      case 0:
      case 1:
        if (sequences_.size() >= 4) return false;
        request_.mutable_create_sequence()->set_model("m");
        request_.mutable_create_sequence()->set_pair(choices_.Pick(2) == 0 ? "q8_0/turbo4" : "f16/f16");
        if (choices_.Pick(4) == 0) request_.mutable_create_sequence()->set_prefix_lease(prefix_);
        return false;
      case 2:
      case 3: {
        v1::AppendRequest& append = *request_.mutable_append();
        append.set_sequence_id(Sequence());
        append.set_start_position(Length(append.sequence_id()));
        const int64_t tokens = 1 + choices_.Pick(100);
        for (int l = 0; l < kLayers; l++) {
          v1::LayerTokens& layer = *append.add_layers();
          layer.set_layer(static_cast<int32_t>(choices_.Signed(l)));
          SetTensor(tokens, 1, layer.mutable_k());
          SetTensor(tokens, 1, layer.mutable_v());
        }
        SetIds(tokens, append.mutable_token_ids());
        return false;
      }
      case 4:
      case 5: {
        v1::AppendAttendRequest& attend = *request_.mutable_append_attend();
        attend.set_layer(Layer());
        if (choices_.Pick(2) == 0) attend.set_step_id(StepId());
        for (int i = 0; i < 1 + choices_.Pick(2); i++) {
          v1::AppendAttendItem& item = *attend.add_items();
          item.set_sequence_id(Sequence());
          item.set_start_position(Length(item.sequence_id()));
          const int64_t tokens = 1 + choices_.Pick(3);
          SetTensor(tokens, kHeads, item.mutable_q());
          SetTensor(tokens, 1, item.mutable_k());
          SetTensor(tokens, 1, item.mutable_v());
          SetIds(tokens, item.mutable_token_ids());
          SetResults(tokens, item.mutable_output_place(), item.mutable_lse_place());
        }
        return false;
      }
      case 6: {
        v1::AttendRequest& attend = *request_.mutable_attend();
        attend.set_layer(Layer());
        if (choices_.Pick(2) == 0) attend.set_step_id(StepId());
        v1::AttendItem& item = *attend.add_items();
        item.set_sequence_id(Sequence());
        if (choices_.Pick(2) == 0) item.set_first_query_position(choices_.Signed(0));
        const int64_t queries = 1 + choices_.Pick(8);
        SetTensor(queries, kHeads, item.mutable_q());
        SetResults(queries, item.mutable_output_place(), item.mutable_lse_place());
        return false;
      }
      case 7: {
        v1::ReadTokensRequest& read = *request_.mutable_read_tokens();
        read.set_sequence_id(Sequence());
        const int64_t tokens = 1 + choices_.Pick(80);
        read.set_tokens(choices_.Signed(tokens));
        read.set_first_token(choices_.Signed(choices_.Pick(2)));
        for (int l = 0; l < kLayers; l++) {
          read.add_layers(static_cast<int32_t>(choices_.Signed(l)));
          SetPlace(static_cast<uint64_t>(tokens) * kDim * sizeof(uint16_t), true, read.add_k_places());
          SetPlace(static_cast<uint64_t>(tokens) * kDim * sizeof(uint16_t), true, read.add_v_places());
        }
        return false;
      }
      case 8: {
        if (choices_.Pick(4) == 0) {
          v1::PinStepRequest& pin = *request_.mutable_pin_step();
          for (int i = 0; i < 1 + choices_.Pick(2); i++) pin.add_sequence_ids(Sequence());
          pin.set_tables(static_cast<v1::StepTables>(choices_.Pick(4)));
          pin.set_mapped(choices_.Pick(3) == 0);
          return false;
        }
        v1::BeginStepRequest& begin = *request_.mutable_begin_step();
        for (int i = 0; i < 1 + choices_.Pick(3); i++) {
          v1::StepItem& item = *begin.add_items();
          item.set_sequence_id(Sequence());
          item.set_new_tokens(choices_.Signed(1 + choices_.Pick(3)));
          SetIds(item.new_tokens() > 4 ? 1 : item.new_tokens(), item.mutable_token_ids());
        }
        if (choices_.Pick(2) == 0) begin.set_after_step_id(StepId());
        begin.set_tables(static_cast<v1::StepTables>(choices_.Pick(4)));
        begin.set_mapped(choices_.Pick(3) == 0);
        begin.set_most_seals(static_cast<int32_t>(choices_.Signed(4)));
        return false;
      }
      case 9: {
        v1::EndStepRequest& end = *request_.mutable_end_step();
        end.set_step_id(StepId());
        end.set_roll_back(choices_.Pick(4) == 0);
        for (int i = 0; i < choices_.Pick(3); i++) {
          v1::StepTokens& tokens = *end.add_tokens();
          tokens.set_item(static_cast<int32_t>(choices_.Signed(i)));
          SetIds(1 + choices_.Pick(3), tokens.mutable_token_ids());
        }
        return false;
      }
      case 10: {
        if (space_ == 0) {
          v1::Namespace& space = *request_.mutable_open_namespace()->mutable_namespace_();
          space.set_model("m");
          space.set_block_tokens(kBlock);
          v1::TensorBlocks& tensors = *space.mutable_tensors();
          tensors.set_layers(kLayers);
          tensors.set_kv_heads(1);
          tensors.set_head_dim_k(kDim);
          tensors.set_head_dim_v(kDim);
          tensors.set_pair(choices_.Pick(2) == 0 ? "turbo4/turbo4" : "f16/f16");
          return false;
        }
        v1::StoreBlocksRequest& store = *request_.mutable_store_blocks();
        store.set_namespace_id(choices_.Number(space_));
        const int blocks = 1 + choices_.Pick(3);
        for (int i = 0; i < blocks; i++)
          store.add_keys(std::string(1, static_cast<char>('a' + choices_.Pick(8))));
        store.set_form(static_cast<v1::BlockForm>(choices_.Pick(4)));
        SetLayout(store.mutable_layout());
        SetPlace(BlockBytes(blocks), false, store.mutable_place());
        return false;
      }
      case 11: {
        if (lease_ == 0) {
          v1::LookupBlocksRequest& lookup = *request_.mutable_lookup_blocks();
          lookup.set_namespace_id(choices_.Number(space_));
          for (int i = 0; i < 4; i++)
            lookup.add_keys(std::string(1, static_cast<char>('a' + choices_.Pick(8))));
          return false;
        }
        v1::LoadBlocksRequest& load = *request_.mutable_load_blocks();
        load.set_lease_id(choices_.Number(lease_));
        load.set_first_block(choices_.Signed(0));
        load.set_blocks(choices_.Signed(choices_.Pick(3)));
        load.set_form(static_cast<v1::BlockForm>(choices_.Pick(4)));
        SetLayout(load.mutable_layout());
        SetPlace(BlockBytes(2), true, load.mutable_place());
        return false;
      }
      case 12: {
        const int verb = choices_.Pick(4);
        if (verb == 0) {
          request_.mutable_truncate_sequence()->set_sequence_id(Sequence());
          request_.mutable_truncate_sequence()->set_tokens(choices_.Signed(choices_.Pick(64)));
        } else if (verb == 1) {
          request_.mutable_evict_sequences()->add_sequence_ids(Sequence());
        } else if (verb == 2) {
          v1::LookupPrefixRequest& lookup = *request_.mutable_lookup_prefix();
          lookup.mutable_like()->set_model("m");
          lookup.mutable_like()->set_pair(choices_.Pick(2) == 0 ? "q8_0/turbo4" : "f16/f16");
          for (uint32_t i = 0; i < 130; i++) lookup.add_token_ids(i);
        } else if (!sequences_.empty()) {
          request_.mutable_close_sequence()->set_sequence_id(sequences_.back());
          sequences_.pop_back();
        }
        return false;
      }
      default: {
        const std::span<const uint8_t> bytes = choices_.Rest(choices_.Next<uint8_t>());
        if (!request_.ParseFromArray(bytes.data(), static_cast<int>(bytes.size()))) request_.Clear();
        return true;
      }
    }
  }

  static constexpr int kBlock = 16;  // tokens of a block of the namespace

  Choices choices_;
  GuardedArena arena_;
  const TensorMemory tensors_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<KvCache> cache_;
  std::unique_ptr<Handlers> handlers_;
  SessionOwned owned_;
  v1::SessionRequest request_;
  v1::SessionResponse answer_;
  std::vector<std::pair<size_t, size_t>> written_;  // where results may lie
  std::vector<uint64_t> sequences_, steps_;
  uint64_t space_ = 0, lease_ = 0, prefix_ = 0;
  int messages_ = 0, served_ = 0;
};

}  // namespace

int PlayHostileMessages(std::span<const uint8_t> bytes) { return HostileClient(bytes).Play(); }

}  // namespace kvtide::service
