// kvtide.plan: the planner with the flags of `kvtide plan`, its answer as the planner's JSON.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <type_traits>

#include "clients/cli/eval/eval_plot.h"
#include "clients/cli/plan/plan_flags.h"
#include "clients/engine/key_profile.h"
#include "clients/python/bindings.h"
#include "clients/python/raise.h"
#include "planner/model/catalogue.h"
#include "planner/model/gguf.h"
#include "planner/model/load_model.h"
#include "planner/render/render.h"

namespace nb = nanobind;

namespace kvtide::python {

void BindPlan(nb::module_& m) {
  using cli::PlanFlags;
  nb::class_<PlanFlags>(m, "PlanFlags")
      .def(nb::init<>())
      .def_rw("model", &PlanFlags::model)
      .def_rw("contexts", &PlanFlags::contexts)
      .def_rw("device", &PlanFlags::device)
      .def_rw("engine", &PlanFlags::engine)
      .def_rw("build", &PlanFlags::build)
      .def_rw("weights", &PlanFlags::weights)
      .def_rw("pairs", &PlanFlags::pairs)
      .def_rw("max_ppl_increase", &PlanFlags::max_ppl_increase)
      .def_rw("margin", &PlanFlags::margin)
      .def_rw("host_memory", &PlanFlags::host_memory)
      .def_rw("used", &PlanFlags::used)
      .def_rw("exact_window", &PlanFlags::exact_window)
      .def_rw("profile", &PlanFlags::profile)
      .def_rw("quality_files", &PlanFlags::quality_files)
      .def_rw("gpus", &PlanFlags::gpus)
      .def_rw("concurrency", &PlanFlags::concurrency)
      .def_rw("shared_prefix", &PlanFlags::shared_prefix)
      .def_rw("own_quality_only", &PlanFlags::own_quality_only)
      .def_rw("ignore_unknown_fields", &PlanFlags::ignore_unknown_fields);
  m.def("plan", [](const PlanFlags& flags) {
    const nb::gil_scoped_release release;
    const planner::PlanRequest request = Raise(cli::MakePlanRequest(flags));
    return planner::RenderJson(request, Raise(planner::MakePlan(request)));
  });
  m.def("harm_plot", [](const std::string& title, const std::string& subtitle, const std::string& harm,
                        const std::vector<std::tuple<std::string, std::string, double, double, bool>>& rows) {
    std::vector<cli::PlotPoint> points;
    for (const auto& [name, detail, bits, value, pareto] : rows)
      points.push_back({name, detail, bits, value, pareto});
    return cli::RenderHarmPlot(title, subtitle, harm, points);
  });
  // (architecture, [(KV heads, head dim of K, of V)]) of the layers of a GGUF file that keep keys and values.
  m.def("model_layers", [](const std::string& path) {
    const planner::GgufFile file = Raise(planner::ReadGguf(path));
    const planner::ModelGeometry model = Raise(planner::LoadModel(path)).geometry;
    const auto found = file.metadata.find("general.architecture");
    const auto* architecture =
        found == file.metadata.end() ? nullptr : std::get_if<std::string>(&found->second);
    std::vector<std::tuple<int, int, int>> layers;
    for (const planner::LayerGeometry& layer : model.layers) {
      if (layer.OwnsCache() && layer.head_dim_v > 0)
        layers.emplace_back(layer.n_kv_heads, layer.head_dim_k, layer.head_dim_v);
    }
    return std::make_tuple(architecture == nullptr ? std::string() : *architecture, layers);
  });
  // A profile of keys: (model, text, tokens, KV heads, head dim, means, transforms, widths, means before
  // RoPE, frequencies, whether RoPE turns neighbours, whether
  // transforms are of keys after RoPE, tokens of the text's windows); parts are lists of bytes by layer,
  // clients/engine/key_profile.h says their shapes.
  m.def("read_key_profile", [](const std::string& path) {
    const engine::KeyProfile profile = Raise(engine::ReadKeyProfile(path));
    const auto by_layer = [](const auto& layers) {
      std::vector<nb::bytes> out;
      for (const auto& layer : layers) out.emplace_back(layer.data(), layer.size() * sizeof(layer[0]));
      return out;
    };
    const auto parts = [&](auto part) {
      std::vector<std::remove_cvref_t<decltype(profile.transforms[0].*part)>> layers;
      for (const KeyTransforms& layer : profile.transforms) layers.push_back(layer.*part);
      return by_layer(layers);
    };
    return nb::make_tuple(
        profile.model, profile.text, profile.tokens, profile.kv_heads, profile.head_dim,
        by_layer(profile.means), parts(&KeyTransforms::matrices), parts(&KeyTransforms::widths),
        parts(&KeyTransforms::centres), parts(&KeyTransforms::frequencies),
        !profile.transforms.empty() && profile.transforms[0].pairs == RopePairs::kNeighbours,
        profile.after_rope, profile.context);
  });
  m.def("catalogue_models", [] {
    std::vector<std::string> names;
    for (const planner::ModelGeometry& model : planner::CatalogueModels()) names.push_back(model.name);
    return names;
  });
  m.def("catalogue_devices", [] {
    std::vector<std::string> names;
    for (const planner::DeviceBudget& device : planner::CatalogueGpus()) names.push_back(device.name);
    return names;
  });
}

}  // namespace kvtide::python
