#include "clients/cli/eval/eval_needle.h"

#include <algorithm>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "clients/engine/sampler.h"
#include "clients/engine/vector_math.h"
#include "kernels/base/status.h"

namespace kvtide::cli {
namespace {

using engine::SequenceId;

constexpr const char* kWords[] = {"harbour", "copper", "violet", "anchor", "meadow", "lantern",
                                  "granite", "willow", "falcon", "ribbon", "cedar",  "marble",
                                  "saffron", "timber", "beacon", "orchid"};
constexpr int kWordCount = sizeof(kWords) / sizeof(kWords[0]);

uint64_t NextRandom(uint64_t* state) {
  *state = *state * 6364136223846793005u + 1442695040888963407u;
  return *state >> 33;
}

// Feeds the answer token by token; the score of one needle.
absl::Status Ask(const engine::LlamaModel& model, engine::KvStore& store, SequenceId sequence, int64_t start,
                 const std::vector<int32_t>& question, const std::vector<int32_t>& answer,
                 NeedleScore* score) {
  std::vector<int32_t> tokens = question;
  tokens.insert(tokens.end(), answer.begin(), answer.end() - 1);
  std::vector<float> hidden;
  KVTIDE_RETURN_IF_ERROR(model.Forward(store, sequence, start, tokens, &hidden));
  const size_t vocab = model.config().vocab_size, width = model.config().hidden_size;
  std::vector<float> logits(answer.size() * vocab);
  model.Logits(hidden.data() + (question.size() - 1) * width, static_cast<int>(answer.size()), logits.data());
  bool found = true;
  double likelihood = 0;
  for (size_t i = 0; i < answer.size(); ++i) {
    const std::span<const float> row(logits.data() + i * vocab, vocab);
    found = found && engine::ArgMax(row) == answer[i];
    likelihood += row[answer[i]] - engine::LogSumExp(row.data(), vocab);
  }
  score->asked = 1;
  score->found = found ? 1 : 0;
  score->log_likelihood = likelihood / static_cast<double>(answer.size());
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<NeedleTask> MakeNeedleTask(const engine::Tokenizer& tokenizer,
                                          std::span<const int32_t> text_tokens, int context, int needles,
                                          uint64_t seed) {
  if (needles < 1 || needles > kWordCount) {
    return absl::InvalidArgumentError(absl::StrCat("needles must be 1 .. ", kWordCount));
  }
  NeedleTask task;
  std::vector<std::vector<int32_t>> lines;
  size_t taken = 0;
  for (int i = 0; i < needles; ++i) {
    const std::string question = absl::StrCat("\nThe secret code of the ", kWords[i], " is");
    const std::string answer = absl::StrCat(" ", 1000 + NextRandom(&seed) % 9000);
    KVTIDE_ASSIGN_OR_RETURN(std::vector<int32_t> question_tokens, tokenizer.Encode(question));
    KVTIDE_ASSIGN_OR_RETURN(std::vector<int32_t> answer_tokens, tokenizer.Encode(answer));
    KVTIDE_ASSIGN_OR_RETURN(const std::vector<int32_t> end, tokenizer.Encode(" .\n"));
    lines.push_back(question_tokens);
    lines.back().insert(lines.back().end(), answer_tokens.begin(), answer_tokens.end());
    lines.back().insert(lines.back().end(), end.begin(), end.end());
    taken += lines.back().size();
    task.questions.push_back(std::move(question_tokens));
    task.answers.push_back(std::move(answer_tokens));
  }
  const size_t room = 64;  // for a question and its answer
  if (static_cast<size_t>(context) < taken + room + 256 ||
      text_tokens.size() < static_cast<size_t>(context)) {
    return absl::InvalidArgumentError(
        absl::StrCat("a context of ", context, " tokens is too short for ", needles, " needles"));
  }
  const size_t hay = context - taken - room;
  size_t used = 0;
  for (int i = 0; i < needles; ++i) {
    const double depth = (i + 0.5) / needles;
    const size_t until = static_cast<size_t>(depth * static_cast<double>(hay));
    task.haystack.insert(task.haystack.end(), text_tokens.begin() + used, text_tokens.begin() + until);
    task.haystack.insert(task.haystack.end(), lines[i].begin(), lines[i].end());
    task.depths.push_back(depth);
    used = until;
  }
  task.haystack.insert(task.haystack.end(), text_tokens.begin() + used, text_tokens.begin() + hay);
  return task;
}

absl::StatusOr<std::vector<NeedleScore>> AskNeedles(const engine::LlamaModel& model, engine::KvStore& store,
                                                    const NeedleTask& task, int chunk) {
  KVTIDE_ASSIGN_OR_RETURN(const SequenceId sequence, store.CreateSequence());
  const auto close = absl::MakeCleanup([&] { store.Close(sequence).IgnoreError(); });
  const std::span<const int32_t> hay = task.haystack;
  std::vector<float> hidden;
  for (size_t at = 0; at < hay.size(); at += chunk) {
    const size_t n = std::min<size_t>(chunk, hay.size() - at);
    KVTIDE_RETURN_IF_ERROR(model.Forward(store, sequence, at, hay.subspan(at, n), &hidden));
  }
  std::vector<NeedleScore> scores;
  for (size_t i = 0; i < task.questions.size(); ++i) {
    KVTIDE_ASSIGN_OR_RETURN(const SequenceId fork, store.Fork(sequence));
    NeedleScore score;
    score.depth = task.depths[i];
    const absl::Status asked =
        Ask(model, store, fork, hay.size(), task.questions[i], task.answers[i], &score);
    KVTIDE_RETURN_IF_ERROR(store.Close(fork));
    KVTIDE_RETURN_IF_ERROR(asked);
    scores.push_back(score);
  }
  return scores;
}

}  // namespace kvtide::cli
