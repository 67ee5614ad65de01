// kvtide.calibrate: what `kvtide calibrate` gathers, from the keys and queries of somebody else's model.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "clients/engine/key_calibration.h"
#include "clients/engine/key_profile.h"
#include "clients/python/arrays.h"
#include "clients/python/bindings.h"
#include "kernels/base/finite.h"
#include "kernels/base/status.h"
#include "kernels/base/thread_pool.h"
#include "kernels/format/block_layout.h"

namespace nb = nanobind;

namespace kvtide::python {
namespace {

using ConstRows3 = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

class Calibration {
 public:
  Calibration(int layers, int kv_heads, int query_heads, int head_dim,
              const std::vector<std::vector<float>>& frequencies, bool neighbours, bool after_rope,
              int threads)
      : geometry_(Checked(layers, kv_heads, query_heads, head_dim, frequencies, neighbours)),
        pool_(threads),
        calibration_(geometry_, after_rope ? engine::KeysAt::kAfterRope : engine::KeysAt::kBeforeRope,
                     pool_) {}

  void Add(int layer, int64_t position, const ConstRows3& q, const ConstRows3& k, bool held_back) {
    Check(layer, position, q, k);
    Blocking([&] {
      const int n = static_cast<int>(k.shape(0));
      if (held_back) {
        calibration_.HoldBack(layer, position, n, q.data(), k.data());
      } else {
        calibration_.Add(layer, position, n, q.data(), k.data());
      }
    });
  }

  int64_t tokens() const { return calibration_.tokens(); }

  // Writes the profile; for each calibrated type its error, the type beside it, and that one's.
  std::vector<std::tuple<std::string, double, std::string, double>> Write(const std::string& path,
                                                                          const std::string& model,
                                                                          const std::string& text,
                                                                          int64_t context,
                                                                          bool transforms) const {
    std::vector<engine::KeyTypeError> errors;
    Raise(Blocking([&]() -> absl::Status {
      if (calibration_.tokens() == 0) return absl::InvalidArgumentError("no tokens were added");
      engine::KeyProfile profile{model,
                                 text,
                                 calibration_.tokens(),
                                 geometry_.kv_heads,
                                 geometry_.head_dim,
                                 calibration_.means(),
                                 {},
                                 false,
                                 context};
      if (transforms) KVTIDE_RETURN_IF_ERROR(calibration_.AddTransforms(&profile, &errors));
      return engine::WriteKeyProfile(path, profile);
    }));
    std::vector<std::tuple<std::string, double, std::string, double>> out;
    for (const engine::KeyTypeError& e : errors) out.emplace_back(e.type, e.error, e.beside, e.beside_error);
    return out;
  }

 private:
  static engine::KvGeometry Checked(int layers, int kv_heads, int query_heads, int head_dim,
                                    const std::vector<std::vector<float>>& frequencies, bool neighbours) {
    Raise(CheckGroupShape({layers, kv_heads, head_dim, head_dim}));
    if (query_heads < kv_heads || query_heads % kv_heads != 0)
      Raise(absl::InvalidArgumentError(
          absl::StrCat(query_heads, " query heads over ", kv_heads, " KV heads: not a multiple")));
    if (frequencies.size() != static_cast<size_t>(layers))
      Raise(absl::InvalidArgumentError(
          absl::StrCat("frequencies of ", frequencies.size(), " layers for a model of ", layers)));
    engine::KvGeometry geometry;
    geometry.layers = layers;
    geometry.query_heads = query_heads;
    geometry.kv_heads = kv_heads;
    geometry.head_dim = head_dim;
    for (const std::vector<float>& layer : frequencies) {
      if (2 * layer.size() > static_cast<size_t>(head_dim) || layer.size() != frequencies[0].size())
        Raise(absl::InvalidArgumentError(
            absl::StrCat(layer.size(), " frequencies of RoPE in a layer for head dim ", head_dim,
                         ": at most half of it, and as many in every layer")));
      for (const float x : layer)
        if (!(x >= 0 && x <= kMostFrequency))
          Raise(absl::InvalidArgumentError(
              absl::StrCat("a frequency of RoPE is ", x, " radians a position, not 0 to ", kMostFrequency)));
      geometry.ropes.push_back({neighbours ? RopePairs::kNeighbours : RopePairs::kHalves, layer});
    }
    return geometry;
  }

  void Check(int layer, int64_t position, const ConstRows3& q, const ConstRows3& k) const {
    if (layer < 0 || layer >= geometry_.layers)
      Raise(absl::InvalidArgumentError(
          absl::StrCat("layer ", layer, " of a model of ", geometry_.layers, " layers")));
    constexpr int64_t kMostPosition = int64_t{1} << 31;
    if (position < 0 || position > kMostPosition)
      Raise(absl::InvalidArgumentError(absl::StrCat("position ", position)));
    const auto is = [](const ConstRows3& rows, size_t n, int heads, int dim) {
      return rows.shape(0) == n && rows.shape(1) == static_cast<size_t>(heads) &&
             rows.shape(2) == static_cast<size_t>(dim);
    };
    constexpr size_t kMostTokens = 1 << 24;
    if (k.shape(0) == 0 || k.shape(0) > kMostTokens ||
        !is(k, k.shape(0), geometry_.kv_heads, geometry_.head_dim) ||
        !is(q, k.shape(0), geometry_.query_heads, geometry_.head_dim))
      Raise(absl::InvalidArgumentError(
          absl::StrCat("q is not [n][", geometry_.query_heads, "][", geometry_.head_dim, "] or k is not [n][",
                       geometry_.kv_heads, "][", geometry_.head_dim, "], n from 1 on")));
    for (const ConstRows3* rows : {&q, &k})
      if (FirstBeyond({rows->data(), DataType::kF32}, rows->size(), kMaxF32) != rows->size())
        Raise(absl::InvalidArgumentError(absl::StrCat("layer ", layer, ": a value is not finite")));
  }

  const engine::KvGeometry geometry_;
  ThreadPool pool_;
  engine::KeyCalibration calibration_;
};

}  // namespace

void BindCalibration(nb::module_& m) {
  nb::class_<Calibration>(m, "KeyCalibration")
      .def(nb::init<int, int, int, int, const std::vector<std::vector<float>>&, bool, bool, int>())
      .def("add", &Calibration::Add)
      .def("write", &Calibration::Write)
      .def_prop_ro("tokens", &Calibration::tokens);
}

}  // namespace kvtide::python
