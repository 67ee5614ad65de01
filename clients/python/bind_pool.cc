// The verbs. Every call that may block gives up the GIL; answers become dicts with the field names of
// clients/cpp/client.h, which are the names of the dataclasses in kvtide/pool.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "clients/cpp/pool.h"
#include "clients/python/arrays.h"
#include "clients/python/bindings.h"
#include "clients/python/raise.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvtide::python {
namespace {

template <class T, class F>
nb::list List(const std::vector<T>& values, F&& convert) {
  nb::list list;
  for (const T& value : values) list.append(convert(value));
  return list;
}

// dict(name=value, ...) of the named members of `from`.
#define KVTIDE_PUT(name) out[#name] = from.name

nb::tuple ToPython(const ExactWindow& window) {
  return nb::make_tuple(window.first_blocks, window.last_blocks);
}

nb::dict ToPython(const client::TierInfo& from) {
  nb::dict out;
  KVTIDE_PUT(name), KVTIDE_PUT(backend), KVTIDE_PUT(capacity_bytes), KVTIDE_PUT(device);
  KVTIDE_PUT(io), KVTIDE_PUT(durable);
  return out;
}

nb::dict ToPython(const client::CacheTypeDescription& from) {
  nb::dict out;
  KVTIDE_PUT(name), KVTIDE_PUT(bits), KVTIDE_PUT(group), KVTIDE_PUT(version), KVTIDE_PUT(bits_per_value);
  return out;
}

nb::dict ToPython(const client::ServerInfo& from) {
  nb::dict out;
  KVTIDE_PUT(version), KVTIDE_PUT(block_tokens), KVTIDE_PUT(default_pair), KVTIDE_PUT(models);
  KVTIDE_PUT(max_message_bytes), KVTIDE_PUT(max_sequences), KVTIDE_PUT(max_models), KVTIDE_PUT(max_tokens);
  KVTIDE_PUT(max_items), KVTIDE_PUT(max_append_tokens), KVTIDE_PUT(process_id), KVTIDE_PUT(uptime_seconds);
  out["tiers"] = List(from.tiers, [](const client::TierInfo& tier) { return ToPython(tier); });
  out["cache_types"] =
      List(from.cache_types, [](const client::CacheTypeDescription& type) { return ToPython(type); });
  out["default_exact_window"] = ToPython(from.default_exact_window);
  return out;
}

nb::dict ToPython(const client::TierShare& from) {
  nb::dict out;
  KVTIDE_PUT(tier), KVTIDE_PUT(blocks), KVTIDE_PUT(bytes), KVTIDE_PUT(device);
  return out;
}

nb::dict ToPython(const client::SequenceInfo& from) {
  nb::dict out;
  KVTIDE_PUT(id), KVTIDE_PUT(forked_from), KVTIDE_PUT(model), KVTIDE_PUT(pair), KVTIDE_PUT(tenant);
  KVTIDE_PUT(tokens), KVTIDE_PUT(max_layer_tokens), KVTIDE_PUT(dropped_blocks), KVTIDE_PUT(shared_blocks);
  KVTIDE_PUT(seal_at_once), KVTIDE_PUT(idle_seconds), KVTIDE_PUT(age_seconds), KVTIDE_PUT(device);
  KVTIDE_PUT(durable), KVTIDE_PUT(durable_tokens), KVTIDE_PUT(known_tokens), KVTIDE_PUT(reused_tokens);
  KVTIDE_PUT(degraded_blocks), KVTIDE_PUT(degrade);
  out["degraded"] = List(from.degraded, [](const client::DegradedTokens& tokens) {
    return nb::make_tuple(tokens.layer_group, tokens.first_token, tokens.tokens, tokens.pair);
  });
  out["priority"] = static_cast<int>(from.priority);
  out["tiers"] = List(from.tiers, [](const client::TierShare& share) { return ToPython(share); });
  out["exact_window"] = ToPython(from.exact_window);
  return out;
}

nb::dict ToPython(const client::PairStats& from) {
  nb::dict out;
  KVTIDE_PUT(pair), KVTIDE_PUT(blocks), KVTIDE_PUT(bytes);
  return out;
}

nb::dict ToPython(const client::TierStats& from) {
  nb::dict out;
  KVTIDE_PUT(name), KVTIDE_PUT(backend), KVTIDE_PUT(capacity_bytes), KVTIDE_PUT(used_bytes);
  KVTIDE_PUT(largest_free_bytes), KVTIDE_PUT(blocks), KVTIDE_PUT(pinned_blocks), KVTIDE_PUT(demoted_blocks);
  KVTIDE_PUT(promoted_blocks), KVTIDE_PUT(dropped_blocks), KVTIDE_PUT(device), KVTIDE_PUT(lost_blocks);
  KVTIDE_PUT(io), KVTIDE_PUT(problem), KVTIDE_PUT(read_bytes), KVTIDE_PUT(written_bytes);
  KVTIDE_PUT(read_errors), KVTIDE_PUT(write_errors), KVTIDE_PUT(checksum_errors), KVTIDE_PUT(sync_errors);
  KVTIDE_PUT(degraded_blocks), KVTIDE_PUT(degraded_bytes);
  KVTIDE_PUT(prefix_hit_tokens), KVTIDE_PUT(encrypted), KVTIDE_PUT(attended_in_place);
  KVTIDE_PUT(promoted_first), KVTIDE_PUT(attend_bytes_per_second), KVTIDE_PUT(promote_bytes_per_second);
  KVTIDE_PUT(low_priority_blocks), KVTIDE_PUT(high_priority_blocks);
  out["pairs"] = List(from.pairs, [](const client::PairStats& pair) { return ToPython(pair); });
  return out;
}

nb::dict ToPython(const client::RemoteStats& from) {
  nb::dict out;
  KVTIDE_PUT(server), KVTIDE_PUT(problem), KVTIDE_PUT(write_problem);
  KVTIDE_PUT(hit_blocks), KVTIDE_PUT(miss_blocks), KVTIDE_PUT(read_blocks), KVTIDE_PUT(read_bytes);
  KVTIDE_PUT(written_blocks), KVTIDE_PUT(written_bytes), KVTIDE_PUT(present_blocks);
  KVTIDE_PUT(left_out_blocks), KVTIDE_PUT(damaged_blocks), KVTIDE_PUT(timeouts), KVTIDE_PUT(errors);
  KVTIDE_PUT(connects), KVTIDE_PUT(queued_blocks), KVTIDE_PUT(memory_limit_bytes);
  KVTIDE_PUT(memory_used_bytes), KVTIDE_PUT(memory_policy);
  return out;
}

nb::dict ToPython(const client::ServerStats& from) {
  nb::dict out;
  KVTIDE_PUT(models), KVTIDE_PUT(sequences), KVTIDE_PUT(tokens), KVTIDE_PUT(shared_blocks);
  KVTIDE_PUT(stored_bytes), KVTIDE_PUT(f16_equivalent_bytes), KVTIDE_PUT(bits_per_value);
  KVTIDE_PUT(uptime_seconds), KVTIDE_PUT(sequences_created), KVTIDE_PUT(sequences_closed);
  KVTIDE_PUT(appended_tokens), KVTIDE_PUT(sealed_blocks), KVTIDE_PUT(copied_on_write_blocks);
  KVTIDE_PUT(deferred_seals), KVTIDE_PUT(failed_seals);
  KVTIDE_PUT(window_freed_blocks), KVTIDE_PUT(evict_calls), KVTIDE_PUT(prefetch_calls), KVTIDE_PUT(moves);
  KVTIDE_PUT(failed_moves), KVTIDE_PUT(moved_bytes), KVTIDE_PUT(dropped_blocks), KVTIDE_PUT(attended_blocks);
  KVTIDE_PUT(attended_blocks_below_first_tier), KVTIDE_PUT(checksum_failures), KVTIDE_PUT(exhausted);
  KVTIDE_PUT(lost_blocks), KVTIDE_PUT(persist_calls), KVTIDE_PUT(persisted), KVTIDE_PUT(failed_persists);
  KVTIDE_PUT(persisted_bytes), KVTIDE_PUT(durable_sequences);
  KVTIDE_PUT(compacted_blocks), KVTIDE_PUT(compacted_bytes);
  KVTIDE_PUT(prefix_blocks), KVTIDE_PUT(prefix_alone_bytes), KVTIDE_PUT(durable_prefix_blocks);
  KVTIDE_PUT(prefix_lookups), KVTIDE_PUT(prefix_miss_tokens), KVTIDE_PUT(prefix_reused_tokens);
  out["tiers"] = List(from.tiers, [](const client::TierStats& tier) { return ToPython(tier); });
  if (from.remote.has_value()) out["remote"] = ToPython(*from.remote);
  return out;
}

nb::dict ToPython(const client::PersistResult& from) {
  nb::dict out;
  KVTIDE_PUT(sequences), KVTIDE_PUT(tokens), KVTIDE_PUT(blocks), KVTIDE_PUT(bytes);
  return out;
}

nb::dict ToPython(const client::MoveResult& from) {
  nb::dict out;
  KVTIDE_PUT(blocks), KVTIDE_PUT(bytes), KVTIDE_PUT(dropped_blocks), KVTIDE_PUT(blocks_left);
  KVTIDE_PUT(shared_blocks), KVTIDE_PUT(degraded_blocks);
  return out;
}

const char* VerdictName(client::PlanVerdict verdict) {
  switch (verdict) {
    case client::PlanVerdict::kFits:
      return "fits";
    case client::PlanVerdict::kFitsWithTiers:
      return "fits_with_tiers";
    case client::PlanVerdict::kDoesNotFit:
      return "does_not_fit";
  }
  return "does_not_fit";
}

nb::dict ToPython(const client::PlanCandidate& from) {
  nb::dict out;
  KVTIDE_PUT(pair), KVTIDE_PUT(rejection), KVTIDE_PUT(kv_bytes), KVTIDE_PUT(total_bytes),
      KVTIDE_PUT(free_bytes);
  KVTIDE_PUT(fits), KVTIDE_PUT(measured), KVTIDE_PUT(bits_per_value), KVTIDE_PUT(ratio_to_f16);
  KVTIDE_PUT(perplexity_increase_percent), KVTIDE_PUT(max_context), KVTIDE_PUT(max_concurrency);
  KVTIDE_PUT(measured_model), KVTIDE_PUT(measured_text), KVTIDE_PUT(measured_tokens), KVTIDE_PUT(calibrated);
  return out;
}

nb::dict ToPython(const client::ContextAnswer& from) {
  nb::dict out;
  KVTIDE_PUT(context), KVTIDE_PUT(chosen_pair), KVTIDE_PUT(reason), KVTIDE_PUT(split_pair);
  KVTIDE_PUT(split_device_bytes), KVTIDE_PUT(split_host_bytes);
  out["verdict"] = VerdictName(from.verdict);
  out["candidates"] =
      List(from.candidates, [](const client::PlanCandidate& candidate) { return ToPython(candidate); });
  return out;
}

nb::dict ToPython(const client::PlanAnswer& from) {
  nb::dict out;
  KVTIDE_PUT(device_budget_bytes), KVTIDE_PUT(assumptions), KVTIDE_PUT(notes);
  out["verdict"] = VerdictName(from.verdict);
  out["contexts"] = List(from.contexts, [](const client::ContextAnswer& answer) { return ToPython(answer); });
  return out;
}
#undef KVTIDE_PUT

using Ids = std::vector<client::SequenceId>;
using TokenIds = std::vector<client::TokenId>;
client::SequenceOptions MakeSequenceOptions(const nb::dict& settings) {
  client::SequenceOptions options;
  for (const auto& [key, value] : settings) {
    const auto name = nb::cast<std::string>(key);
    if (name == "pair") {
      options.pair = nb::cast<std::string>(value);
    } else if (name == "group_pairs") {
      options.group_pairs = nb::cast<std::vector<std::string>>(value);
    } else if (name == "degrade") {
      options.degrade = nb::cast<std::vector<std::string>>(value);
    } else if (name == "exact_window") {
      const auto window = nb::cast<std::pair<int, int>>(value);
      options.exact_window = ExactWindow{window.first, window.second};
    } else if (name == "seal_at_once") {
      options.seal_at_once = nb::cast<bool>(value);
    } else if (name == "key_centring") {
      options.key_centring = static_cast<client::KeyCentring>(nb::cast<int>(value));
    } else if (name == "key_equalising") {
      options.key_equalising = static_cast<client::KeyEqualising>(nb::cast<int>(value));
    } else if (name == "rope_pairs") {
      options.rope_pairs = static_cast<client::RopePairs>(nb::cast<int>(value));
    } else if (name == "tenant") {
      options.tenant = nb::cast<std::string>(value);
    } else if (name == "allow_drop") {
      options.allow_drop = nb::cast<bool>(value);
    } else if (name == "persistence") {
      options.persistence = static_cast<client::Persistence>(nb::cast<int>(value));
    } else if (name == "priority") {
      options.priority = static_cast<client::Priority>(nb::cast<int>(value));
    } else if (name == "device") {
      options.device = nb::cast<std::string>(value);
    } else if (name == "prefix_salt") {
      options.prefix_salt = nb::cast<std::string>(value);
    } else {
      throw StatusException(absl::InvalidArgumentError("unknown setting of a sequence: " + name));
    }
  }
  return options;
}

client::PlanQuestion MakeQuestion(const nb::dict& from) {
  client::PlanQuestion question;
  question.model = nb::cast<std::string>(from["model"]);
  question.contexts = nb::cast<std::vector<int64_t>>(from["contexts"]);
  question.concurrency = nb::cast<int>(from["concurrency"]);
  question.device_bytes = nb::cast<int64_t>(from["device_bytes"]);
  question.weights_bytes = nb::cast<int64_t>(from["weights_bytes"]);
  question.host_bytes = nb::cast<int64_t>(from["host_bytes"]);
  question.pairs = nb::cast<std::vector<std::string>>(from["pairs"]);
  if (const auto window = nb::cast<std::optional<std::pair<int, int>>>(from["exact_window"]))
    question.exact_window = ExactWindow{window->first, window->second};
  question.max_perplexity_increase_percent =
      nb::cast<std::optional<double>>(from["max_perplexity_increase_percent"]);
  question.margin_bytes = nb::cast<std::optional<int64_t>>(from["margin_bytes"]);
  question.key_centring = static_cast<client::KeyCentring>(nb::cast<int>(from["key_centring"]));
  return question;
}

// Owns the pool until Close; a call that runs keeps it alive.
class Handle {
 public:
  explicit Handle(std::unique_ptr<client::Pool> pool) : pool_(std::move(pool)) {}

  // Called with the GIL.
  std::shared_ptr<client::Pool> pool() const {
    if (pool_ == nullptr) throw StatusException(absl::FailedPreconditionError("the pool has been closed"));
    return pool_;
  }
  void Close() {
    std::shared_ptr<client::Pool> last = std::move(pool_);
    pool_ = nullptr;
    const nb::gil_scoped_release release;
    last.reset();
  }
  ~Handle() {
    if (pool_ != nullptr) Close();
  }

 private:
  std::shared_ptr<client::Pool> pool_;
};

void Attend(const Handle& handle, int layer, const Ids& ids,
            const std::vector<std::optional<int64_t>>& positions, const std::vector<AnyArray>& q,
            const std::vector<Floats>& outputs, const std::vector<Floats>& lses,
            const client::AttentionOptions& options) {
  std::vector<client::AttendItem> items;
  for (size_t i = 0; i < ids.size(); i++) {
    items.push_back({ids[i], positions.at(i), Ref(q.at(i)), Span(outputs.at(i)),
                     lses.empty() ? std::span<float>() : Span(lses.at(i))});
  }
  const auto pool = handle.pool();
  Raise(Blocking([&] { return pool->Attend(layer, items, options); }));
}

void AppendAttend(const Handle& handle, int layer, const Ids& ids, const std::vector<int64_t>& starts,
                  const std::vector<AnyArray>& q, const std::vector<AnyArray>& k,
                  const std::vector<AnyArray>& v, const std::vector<Floats>& outputs,
                  const std::vector<Floats>& lses, const client::AttentionOptions& options,
                  const std::vector<TokenIds>& token_ids) {
  std::vector<client::AppendAttendItem> items;
  for (size_t i = 0; i < ids.size(); i++) {
    items.push_back({ids[i], starts.at(i), Ref(q.at(i)), Ref(k.at(i)), Ref(v.at(i)), Span(outputs.at(i)),
                     lses.empty() ? std::span<float>() : Span(lses.at(i)),
                     token_ids.empty() ? std::span<const client::TokenId>() : token_ids.at(i)});
  }
  const auto pool = handle.pool();
  Raise(Blocking([&] { return pool->AppendAttend(layer, items, options); }));
}

}  // namespace

client::Model MakeModel(const std::string& name, const std::vector<nb::dict>& layers) {
  client::Model model;
  model.name = name;
  for (const nb::dict& from : layers) {
    client::ModelLayer layer;
    layer.kv_heads = nb::cast<int>(from["kv_heads"]);
    layer.head_dim_k = nb::cast<int>(from["head_dim_k"]);
    layer.head_dim_v = nb::cast<int>(from["head_dim_v"]);
    layer.window = nb::cast<int64_t>(from["window"]);
    layer.query_heads = nb::cast<int>(from["query_heads"]);
    layer.scale = nb::cast<float>(from["scale"]);
    layer.softcap = nb::cast<float>(from["softcap"]);
    if (from.contains("key_mean")) layer.key_mean = nb::cast<std::vector<float>>(from["key_mean"]);
    if (from.contains("key_transform")) {
      layer.key_transform = nb::cast<std::vector<float>>(from["key_transform"]);
      layer.key_widths = nb::cast<std::vector<uint8_t>>(from["key_widths"]);
      layer.key_centre = nb::cast<std::vector<float>>(from["key_centre"]);
      layer.key_frequencies = nb::cast<std::vector<float>>(from["key_frequencies"]);
      layer.key_rope_neighbours = nb::cast<bool>(from["key_rope_neighbours"]);
    }
    if (from.contains("rope_frequencies"))
      layer.rope = client::ModelRope{nb::cast<std::vector<float>>(from["rope_frequencies"]),
                                     nb::cast<bool>(from["rope_neighbours"])};
    model.layers.push_back(layer);
  }
  return model;
}

void BindPool(nb::module_& m) {
  nb::class_<client::AttentionOptions>(m, "AttentionOptions")
      .def(
          "__init__",
          [](client::AttentionOptions* self, std::optional<float> scale, std::optional<bool> causal,
             std::optional<int64_t> window, std::optional<float> softcap, std::vector<float> sinks) {
            new (self) client::AttentionOptions{scale, causal, window, softcap, std::move(sinks)};
          },
          "scale"_a.none(), "causal"_a.none(), "window"_a.none(), "softcap"_a.none(), "sinks"_a);

  nb::class_<Handle>(m, "Pool")
      .def_prop_ro("address", [](const Handle& handle) { return handle.pool()->address(); })
      .def_prop_ro("way", [](const Handle& handle) { return client::WayName(handle.pool()->way()); })
      .def_prop_ro("why", [](const Handle& handle) { return handle.pool()->why(); })
      .def_prop_ro("connected", [](const Handle& handle) { return handle.pool()->connected(); })
      .def_prop_ro("host_tier_bytes",
                   [](const Handle& handle) { return handle.pool()->host_tier().bytes.size(); })
      .def("drop_host_tier", [](const Handle& handle) { handle.pool()->DropHostTier(); })
      .def("close", &Handle::Close)
      // Bytes of Pool::Allocate as an array, which keeps the pool.
      .def("allocate",
           [](const Handle& handle, size_t bytes) {
             struct Owner {
               std::shared_ptr<client::Pool> pool;
               client::TensorBuffer buffer;
             };
             auto owner = std::make_unique<Owner>();
             owner->pool = handle.pool();
             owner->buffer = Raise(owner->pool->Allocate(bytes));
             auto* const data = reinterpret_cast<uint8_t*>(owner->buffer.data());
             const nb::capsule keep(owner.release(), [](void* p) noexcept { delete static_cast<Owner*>(p); });
             return nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>(data, {bytes}, keep);
           })
      .def("info",
           [](const Handle& handle) {
             const auto pool = handle.pool();
             return ToPython(Raise(Blocking([&] { return pool->GetServerInfo(); })));
           })
      .def("stats",
           [](const Handle& handle) {
             const auto pool = handle.pool();
             return ToPython(Raise(Blocking([&] { return pool->GetStats(); })));
           })
      .def("register_model",
           [](const Handle& handle, const std::string& name, const std::vector<nb::dict>& layers) {
             const client::Model model = MakeModel(name, layers);
             const auto pool = handle.pool();
             Raise(Blocking([&] { return pool->RegisterModel(model); }));
           })
      .def("unregister_model",
           [](const Handle& handle, const std::string& name) {
             const auto pool = handle.pool();
             Raise(Blocking([&] { return pool->UnregisterModel(name); }));
           })
      .def("create_sequence",
           [](const Handle& handle, const std::string& model, const nb::dict& settings,
              client::LeaseId prefix) {
             const client::SequenceOptions options = MakeSequenceOptions(settings);
             const auto pool = handle.pool();
             int64_t tokens = 0;
             const client::SequenceId id =
                 Raise(Blocking([&] { return pool->CreateSequence(model, options, prefix, &tokens); }));
             return std::pair(id, tokens);
           })
      .def("lookup_prefix",
           [](const Handle& handle, const std::string& model, const nb::dict& settings, const TokenIds& ids,
              double lease_seconds, bool peek) {
             const client::SequenceOptions options = MakeSequenceOptions(settings);
             const auto pool = handle.pool();
             const client::CachedPrefix found = Raise(
                 Blocking([&] { return pool->LookupPrefix(model, options, ids, lease_seconds, peek); }));
             nb::dict out;
             out["tokens"] = found.tokens;
             out["tiers"] = found.tiers;
             out["lease"] = found.lease;
             return out;
           })
      .def("release_lease",
           [](const Handle& handle, client::LeaseId lease) {
             const auto pool = handle.pool();
             return Raise(Blocking([&] { return pool->ReleaseLease(lease); }));
           })
      .def("fork_sequence",
           [](const Handle& handle, client::SequenceId sequence) {
             const auto pool = handle.pool();
             return Raise(Blocking([&] { return pool->ForkSequence(sequence); }));
           })
      .def("truncate_sequence",
           [](const Handle& handle, client::SequenceId sequence, int64_t tokens) {
             const auto pool = handle.pool();
             Raise(Blocking([&] { return pool->TruncateSequence(sequence, tokens); }));
           })
      .def("close_sequence",
           [](const Handle& handle, client::SequenceId sequence) {
             const auto pool = handle.pool();
             Raise(Blocking([&] { return pool->CloseSequence(sequence); }));
           })
      .def(
          "append",
          [](const Handle& handle, client::SequenceId sequence, int64_t start, const std::vector<int>& layers,
             const std::vector<AnyArray>& k, const std::vector<AnyArray>& v, const TokenIds& ids) {
            std::vector<client::LayerTokens> parts;
            for (size_t i = 0; i < layers.size(); i++)
              parts.push_back({layers[i], Ref(k.at(i)), Ref(v.at(i))});
            const auto pool = handle.pool();
            return Raise(Blocking([&] { return pool->Append(sequence, start, parts, ids); }));
          })
      .def("attend", &Attend, "layer"_a, "ids"_a, "positions"_a, "q"_a, "outputs"_a, "lses"_a, "options"_a)
      .def("append_attend", &AppendAttend, "layer"_a, "ids"_a, "starts"_a, "q"_a, "k"_a, "v"_a, "outputs"_a,
           "lses"_a, "options"_a, "token_ids"_a)
      .def(
          "read",
          [](const Handle& handle, client::SequenceId sequence, int layer, int64_t start,
             const AnyWritableArray& k, const AnyWritableArray& v) {
            const auto target = [](const AnyWritableArray& array) {
              client::MutableTensorRef out{array.data(), ElementType(array.dtype()), {}};
              for (size_t i = 0; i < array.ndim(); i++)
                out.shape.push_back(static_cast<int64_t>(array.shape(i)));
              return out;
            };
            const client::ReadItem item{layer, target(k), target(v)};
            const auto pool = handle.pool();
            Raise(Blocking([&] { return pool->ReadTokens(sequence, start, {&item, 1}); }));
          },
          nb::arg(), nb::arg(), nb::arg(), nb::arg().noconvert(), nb::arg().noconvert())
      .def("evict",
           [](const Handle& handle, const Ids& sequences, const std::string& tier, bool drop) {
             const auto pool = handle.pool();
             return ToPython(Raise(Blocking([&] {
               return sequences.empty() ? pool->EvictAll({tier, drop})
                                        : pool->EvictSequences(sequences, {tier, drop});
             })));
           })
      .def("prefetch",
           [](const Handle& handle, const Ids& sequences) {
             const auto pool = handle.pool();
             return ToPython(Raise(Blocking([&] { return pool->PrefetchSequences(sequences); })));
           })
      .def("persist",
           [](const Handle& handle, const Ids& sequences) {
             const auto pool = handle.pool();
             return ToPython(Raise(Blocking([&] { return pool->PersistSequences(sequences); })));
           })
      .def("set_priority",
           [](const Handle& handle, const Ids& sequences, int priority) {
             const auto pool = handle.pool();
             Raise(Blocking(
                 [&] { return pool->SetPriority(sequences, static_cast<client::Priority>(priority)); }));
           })
      .def("open_block_store",
           [](const Handle& handle, const nb::dict& spec) { return OpenBlockStore(handle.pool(), spec); })
      .def("open_device_steps",
           [](const Handle& handle, const std::string& name, const std::vector<nb::dict>& layers,
              const nb::dict& spec) { return OpenDeviceSteps(handle.pool(), MakeModel(name, layers), spec); })
      .def("sequences",
           [](const Handle& handle, const std::string& model) {
             const auto pool = handle.pool();
             const auto all = Raise(Blocking([&] { return pool->ListSequences(model); }));
             return List(all, [](const client::SequenceInfo& info) { return ToPython(info); });
           })
      .def("sequence",
           [](const Handle& handle, client::SequenceId id) {
             const auto pool = handle.pool();
             return ToPython(Raise(Blocking([&] { return pool->GetSequence(id); })));
           })
      .def("plan", [](const Handle& handle, const nb::dict& question) {
        const client::PlanQuestion asked = MakeQuestion(question);
        const auto pool = handle.pool();
        return ToPython(Raise(Blocking([&] { return pool->Plan(asked); })));
      });

  m.def(
      "connect",
      [](const std::string& address, double timeout, double connect_timeout, int64_t max_message_bytes,
         bool session, const std::string& embedded_config, int64_t arena_bytes,
         const std::tuple<std::string, std::string, std::string, std::string>& credentials,
         const std::string& direct_device, bool host_tier) {
        client::PoolOptions options;
        options.client.timeout = absl::Seconds(timeout);
        options.client.connect_timeout = absl::Seconds(connect_timeout);
        options.client.max_message_bytes = max_message_bytes;
        options.client.session = session;
        std::tie(options.client.credentials.tls_ca, options.client.credentials.tls_cert,
                 options.client.credentials.tls_key, options.client.credentials.token_file) = credentials;
        options.embedded_config = embedded_config;
        options.arena_bytes = arena_bytes;
        options.direct_device = direct_device;
        options.host_tier = host_tier;
        return std::make_unique<Handle>(
            Raise(Blocking([&] { return client::Pool::Connect(address, options); })));
      },
      "address"_a, "timeout"_a, "connect_timeout"_a, "max_message_bytes"_a, "session"_a, "embedded_config"_a,
      "arena_bytes"_a, "credentials"_a, "direct_device"_a = "", "host_tier"_a = false);
  m.def("default_address", &client::DefaultAddress);
}

}  // namespace kvtide::python
