// The verbs of steps.
#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "daemon/cache/call/refusal.h"
#include "daemon/service/handlers.h"
#include "daemon/service/open_steps.h"
#include "kernels/base/status.h"

namespace kvtide::service {
namespace {

std::span<const TokenId> Ids(const google::protobuf::RepeatedField<uint32_t>& ids) {
  return {ids.data(), static_cast<size_t>(ids.size())};
}

// The blocks of a table from `first` on.
void ToProto(const KvCache& cache, const ToldTable& table, int64_t first, CachePair pair,
             v1::StepTable* proto) {
  proto->set_first_block(table.first_block);
  proto->set_first_changed(first);
  if (first == table.first_block) proto->set_pair(PairName(pair));
  const std::vector<TierOptions>& tiers = cache.options().tiers;
  v1::StepBlocks* blocks = nullptr;
  const ToldTable::Entry* last = nullptr;
  const std::byte* base = nullptr;
  for (int64_t i = first; i < table.end_block(); i++) {
    const ToldTable::Entry& entry = table.blocks[static_cast<size_t>(i - table.first_block)];
    if (last == nullptr || entry.layout != last->layout || entry.tier != last->tier) {
      const TierOptions& tier = tiers[static_cast<size_t>(entry.tier)];
      base = cache.SlabOf(entry.tier)->data();
      blocks = proto->add_blocks();
      blocks->set_pair(PairName(entry.layout->pair()));
      blocks->set_tier(tier.name);
      blocks->set_device(tier.Device());
    }
    last = &entry;
    blocks->add_offsets(static_cast<uint64_t>(entry.data - base));
  }
}

// Where the step's items begin and where their blocks lie, as the request wants it.
void TellItems(const KvCache& cache, const Step& step, v1::StepTables tables, OpenSteps* steps,
               google::protobuf::RepeatedPtrField<v1::StepSequence>* items) {
  if (tables == v1::STEP_TABLES_ALL) steps->ForgetAll();
  for (size_t i = 0; i < step.size(); i++) {
    v1::StepSequence* const out = items->Add();
    out->set_start_position(step.start(i));
    if (tables == v1::STEP_TABLES_UNSPECIFIED) continue;
    for (size_t group = 0; group < step.model().groups.size(); group++) {
      const int g = static_cast<int>(group);
      steps->Tell(step.sequence(i), g, [&](ToldTable& told) {
        const int64_t first = told.Update(step, i, g);
        v1::StepTable* const table = out->add_tables();
        ToProto(cache, told, std::max(first, told.first_block), step.PairOf(i, g), table);
        const Profile* const profile = step.ProfileOf(i, g);
        if (step.mapped() && profile != nullptr) table->set_profile(profile->hash);
      });
    }
  }
}

// An answer that does not fit would leave a step that nobody knows.
absl::Status CheckAnswerFits(size_t bytes, const Call& call, const ServiceOptions& options) {
  const int64_t most = MostAnswerBytes(call, options);
  if (static_cast<int64_t>(bytes) + 4096 <= most) return absl::OkStatus();
  return Refused(Refusal::kTooLarge,
                 absl::ResourceExhaustedError(absl::StrCat("the tables of the step have ", bytes,
                                                           " bytes, an answer has at most ", most,
                                                           "; begin steps of fewer sequences")));
}

absl::Status CheckMapped(bool mapped, const Call& call) {
  if (!mapped || call.maps_pool) return absl::OkStatus();
  return absl::FailedPreconditionError(
      "a mapped step is for clients that have mapped the pool (the direct way)");
}

}  // namespace

absl::Status Handlers::BeginStep(const v1::BeginStepRequest& request, v1::BeginStepResponse* response,
                                 const Call& call) {
  if (call.steps == nullptr) return OpenSteps::TakeFrom(nullptr, 0).status();
  KVTIDE_RETURN_IF_ERROR(call.steps->CheckRoom());
  std::vector<StepItem> items;
  items.reserve(static_cast<size_t>(request.items_size()));
  for (const v1::StepItem& item : request.items())
    items.push_back({item.sequence_id(), item.new_tokens(), Ids(item.token_ids())});
  KVTIDE_RETURN_IF_ERROR(CheckMapped(request.mapped(), call));
  StepCall begin;
  begin.items = items;
  begin.mapped = request.mapped();
  begin.most_seals = static_cast<size_t>(std::max(0, request.most_seals()));
  begin.context = &call.context;
  // The step that this one follows cannot end before this one has begun.
  std::optional<OpenSteps::Taken> after;
  if (request.after_step_id() != 0) {
    KVTIDE_ASSIGN_OR_RETURN(OpenSteps::Taken taken, OpenSteps::TakeFrom(call.steps, request.after_step_id()));
    after.emplace(std::move(taken));
    begin.after = after->get();
  }
  KVTIDE_ASSIGN_OR_RETURN(std::unique_ptr<Step> step, cache_->BeginStep(begin));
  const Step& begun = *step;
  TellItems(*cache_, begun, request.tables(), call.steps, response->mutable_items());
  for (const StepSeal& seal : begun.Seals()) {
    v1::StepSeal* const out = response->add_seals();
    const std::byte* const base = cache_->SlabOf(begun.home(seal.item))->data();
    out->set_item(static_cast<int32_t>(seal.item));
    out->set_group(seal.group);
    out->set_block(seal.block);
    out->set_source_offset(static_cast<uint64_t>(seal.source - base));
    out->set_target_offset(static_cast<uint64_t>(seal.target - base));
    out->set_pair(PairName(seal.layout->pair()));
  }
  KVTIDE_RETURN_IF_ERROR(CheckAnswerFits(response->ByteSizeLong(), call, options_));
  KVTIDE_ASSIGN_OR_RETURN(const uint64_t id, call.steps->Add(std::move(step), request.after_step_id()));
  response->set_step_id(id);
  return absl::OkStatus();
}

absl::Status Handlers::PinStep(const v1::PinStepRequest& request, v1::PinStepResponse* response,
                               const Call& call) {
  if (call.steps == nullptr) return OpenSteps::TakeFrom(nullptr, 0).status();
  KVTIDE_RETURN_IF_ERROR(call.steps->CheckRoom());
  KVTIDE_RETURN_IF_ERROR(CheckMapped(request.mapped(), call));
  PinCall pin;
  const std::vector<SequenceId> sequences(request.sequence_ids().begin(), request.sequence_ids().end());
  pin.sequences = sequences;
  pin.mapped = request.mapped();
  pin.context = &call.context;
  KVTIDE_ASSIGN_OR_RETURN(std::unique_ptr<Step> step, cache_->PinStep(pin));
  TellItems(*cache_, *step, request.tables(), call.steps, response->mutable_items());
  KVTIDE_RETURN_IF_ERROR(CheckAnswerFits(response->ByteSizeLong(), call, options_));
  KVTIDE_ASSIGN_OR_RETURN(const uint64_t id, call.steps->Add(std::move(step), 0));
  response->set_step_id(id);
  return absl::OkStatus();
}

absl::Status Handlers::EndStep(const v1::EndStepRequest& request, v1::EndStepResponse*, const Call& call) {
  KVTIDE_ASSIGN_OR_RETURN(OpenSteps::Taken taken, OpenSteps::TakeFrom(call.steps, request.step_id()));
  if (request.roll_back()) {
    std::move(taken).Remove().reset();
    return absl::OkStatus();
  }
  if (const uint64_t previous = call.steps->Previous(request.step_id()); previous != 0)
    return absl::FailedPreconditionError(
        absl::StrCat("step ", previous, " is open, which this one follows; end that one first"));
  for (const v1::StepTokens& tokens : request.tokens()) {
    if (tokens.item() < 0 || static_cast<size_t>(tokens.item()) >= (*taken).size())
      return absl::InvalidArgumentError(
          absl::StrCat("tokens of item ", tokens.item(), ": the step has ", (*taken).size(), " items"));
    KVTIDE_RETURN_IF_ERROR((*taken).SayTokens(static_cast<size_t>(tokens.item()), Ids(tokens.token_ids())));
  }
  if (const int layer = (*taken).FirstLayerLeft(); layer >= 0 && !(*taken).mapped())
    return absl::FailedPreconditionError(absl::StrCat(
        "the rows of layer ", layer, " have not come (AppendAttend with step_id), or roll the step back"));
  return cache_->EndStep(std::move(taken).Remove());
}

absl::Status Handlers::GetStepProfile(const v1::GetStepProfileRequest& request,
                                      v1::GetStepProfileResponse* response, const Call& call) {
  KVTIDE_ASSIGN_OR_RETURN(const OpenSteps::Taken taken, OpenSteps::TakeFrom(call.steps, request.step_id()));
  const Step& step = *taken;
  if (request.item() < 0 || static_cast<size_t>(request.item()) >= step.size() || request.group() < 0 ||
      static_cast<size_t>(request.group()) >= step.model().groups.size())
    return absl::InvalidArgumentError(absl::StrCat("item ", request.item(), ", group ", request.group(),
                                                   ": the step has ", step.size(), " items of ",
                                                   step.model().groups.size(), " groups"));
  const Profile* const profile = step.ProfileOf(static_cast<size_t>(request.item()), request.group());
  if (profile == nullptr) return absl::NotFoundError("keys of this table have no profile");
  response->set_profile(profile->hash);
  const auto dim = static_cast<size_t>(profile->shape.head_dim_k);
  const auto any = [&](std::vector<float> HeadProfile::*field) {
    return std::any_of(profile->k.begin(), profile->k.end(),
                       [&](const HeadProfile& head) { return !(head.*field).empty(); });
  };
  const auto add = [&](std::vector<float> HeadProfile::*field, float fill, auto* out) {
    if (!any(field)) return;
    out->Reserve(static_cast<int>(profile->k.size() * dim));
    for (const HeadProfile& head : profile->k)
      for (size_t i = 0; i < dim; i++) out->Add((head.*field).empty() ? fill : (head.*field)[i]);
  };
  add(&HeadProfile::mean, 0, response->mutable_mean());
  add(&HeadProfile::gain, 1, response->mutable_gain());
  return absl::OkStatus();
}

}  // namespace kvtide::service
