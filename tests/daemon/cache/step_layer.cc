#include "tests/daemon/cache/step_layer.h"

#include <algorithm>
#include <cmath>

namespace kvtide::testing {

StepLayer::StepLayer(const Step& step, size_t item, const ModelSpec& model, const NewRows& rows)
    : group_(GroupOf(model, rows.layer)),
      layer_(model.layers[static_cast<size_t>(rows.layer)].layer_in_group),
      start_(step.start(item)),
      tokens_(step.end(item) - start_) {
  const int64_t end = start_ + tokens_;
  int64_t written = 0;
  for (const SnapshotRun& run : step.Runs(item, model.layers[static_cast<size_t>(rows.layer)].group)) {
    for (int64_t index = run.first_block; index < run.end_block(); index++) {
      const int64_t from = std::max(start_, index * kBlockTokens);
      const int64_t to = std::min(end, (index + 1) * kBlockTokens);
      if (from >= to || run.layout->pair() != ExactPair()) continue;
      AppendPiece& piece = pieces_[run.tier].emplace_back();
      piece.layout = run.layout;
      piece.block = run.blocks[static_cast<size_t>(index - run.first_block)];
      piece.layer = layer_;
      piece.first_token = static_cast<int>(from - index * kBlockTokens);
      piece.tokens = static_cast<int>(to - from);
      piece.source_row = static_cast<size_t>(from - start_);
      piece.k = {rows.k.data(), DataType::kF32};
      piece.v = {rows.v.data(), DataType::kF32};
      written += to - from;
    }
    const int64_t begin = run.first_block * kBlockTokens;
    tier_ = runs_.empty() || tier_ == run.tier ? run.tier : -1;
    runs_.push_back({run.layout, run.profile.get(), run.blocks, begin,
                     std::min(run.end_block() * kBlockTokens, end) - begin});
  }
  complete_ = written == tokens_;
}

absl::Status StepLayer::Attend(Backend& backend, const std::vector<float>& q, std::vector<float>* out,
                               std::vector<float>* lse) const {
  const auto rows = static_cast<size_t>(tokens_ * group_.heads);
  out->assign(rows * static_cast<size_t>(group_.shape.head_dim_v), NAN);
  lse->assign(rows, NAN);
  AttendItem item;
  item.runs = runs_;
  item.q = q.data();
  item.queries = static_cast<int>(tokens_);
  item.first_query_position = start_;
  item.out = out->data();
  item.lse = lse->data();
  AttendArgs args;
  args.layer = layer_;
  args.heads = group_.heads;
  args.scale = group_.scale != 0 ? group_.scale : 1 / std::sqrt(static_cast<float>(group_.shape.head_dim_k));
  args.window = group_.window;
  args.softcap = group_.softcap;
  args.items = {&item, 1};
  return backend.Attend(args);
}

}  // namespace kvtide::testing
