// Random steps through DirectAttention, with what happens to sequences in between. Every attention is
// compared with a naive one over the rows that the pool holds, and in the end the bytes of every sequence
// with those of one that was appended to the usual way. The engine's memory is the host's here, a GPU's in
// tests/gpu.
#pragma once

#include <cstdint>
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
  virtual float* Put(std::span<const float> values) = 0;
  virtual float* Room(size_t count) = 0;
  virtual std::vector<float> Get(const float* data, size_t count) = 0;
  virtual void Clear() = 0;
};
std::unique_ptr<EngineMemory> MakeHostMemory();

struct DirectScriptOptions {
  std::string pair;
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

}  // namespace kvtide::testing
