// Random steps through DirectAttention, with what happens to sequences in between. Every attention is
// compared with a naive one over the rows that the pool holds, and in the end the bytes of every sequence
// with those of one that was appended to the usual way. The engine's memory is the host's here, a GPU's in
// tests/gpu.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "clients/cpp/direct_attention.h"

namespace kvtide::testing {

// Tensors where the engine computes.
class EngineMemory {
 public:
  virtual ~EngineMemory() = default;
  virtual void* stream() const { return nullptr; }
  // Values, or room for them; valid until Clear.
  float* Put(std::span<const float> values) {
    float* const data = Room(values.size());
    Set(data, values);
    return data;
  }
  virtual float* Room(size_t count) = 0;
  virtual void Set(float* data, std::span<const float> values) = 0;
  virtual std::vector<float> Get(const float* data, size_t count) = 0;
  virtual void Clear() = 0;
  // Runs the work of the layers of a step; a memory that records it runs the record of the first one from
  // then on.
  virtual void Replay(const std::function<void()>& work) { work(); }
};
std::unique_ptr<EngineMemory> MakeHostMemory();

struct DirectScriptOptions {
  std::vector<std::string> pairs;  // each sequence has one of them
  uint32_t seed = 1;
  int rounds = 40;
  double tolerance = 3e-3;  // of outputs, relative, and of log-sum-exps
};

class DirectScript {
 public:
  // `memory`: null = the host's.
  DirectScript(Pool& pool, const DirectScriptOptions& options,
               std::unique_ptr<EngineMemory> memory = nullptr);
  ~DirectScript();

  void Create();
  // So many steps, each begun before the one before has ended; the last one is taken back now and then.
  void Steps(int count);
  // One of all that may happen.
  void Round();
  // The pool holds of every sequence what it holds of one with the same rows that were appended to it.
  void CheckBytes();
  const std::vector<client::SequenceId>& ids() const { return ids_; }
  client::DirectAttention& attention() { return *attention_; }
  // The pool is gone: sequences are not closed.
  void Abandon() { ids_.clear(); }
  std::vector<float> TakeAnswers() { return std::move(answers_); }

 private:
  struct Open;
  // Rows of a sequence by layer, as they were given or as they are held.
  struct Rows {
    std::vector<std::vector<float>> k, v;
    int64_t tokens = 0;
  };
  int Pick(int below) { return static_cast<int>(random_() % static_cast<uint32_t>(below)); }
  std::vector<float> Random(int64_t tokens, int heads, int dim, bool keys);
  Rows Held(client::SequenceId id, int64_t tokens);
  void Layers(Open& open);
  static void Extend(Rows& rows, const Rows& by);
  void Append(client::SequenceId id, int64_t start, const Rows& rows);

  Pool& pool_;
  const DirectScriptOptions options_;
  std::unique_ptr<EngineMemory> memory_;
  std::mt19937 random_;
  const client::Model model_;
  std::unique_ptr<client::DirectAttention> attention_;
  std::vector<client::SequenceId> ids_;
  std::vector<client::SequenceOptions> how_;
  std::vector<Rows> given_;
  std::vector<float> answers_;
};

// Failures are test failures. All outputs and log-sum-exps.
std::vector<float> RunDirectScript(Pool& pool, const DirectScriptOptions& options,
                                   std::unique_ptr<EngineMemory> memory = nullptr);

struct MixedStepsOptions {
  std::vector<std::string> pairs;
  uint32_t seed = 1;
  // Steps as a graph wants them: one token of each sequence, all pairs named before.
  bool graphs = false;
  int steps = 24;
};

// Sequences of several pairs, with and without centred keys, in one step get what a step of each pair alone
// gives them: equal to the bit where sequences have few new tokens, as then the work is cut alike. Rows of
// outputs have gaps between them. `memory`: null = the host's.
void CheckMixedSteps(Pool& pool, const MixedStepsOptions& options,
                     std::unique_ptr<EngineMemory> memory = nullptr);

}  // namespace kvtide::testing
