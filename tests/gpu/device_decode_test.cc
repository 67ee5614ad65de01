// Decode steps planned on the device give what the backend gives that plans on the host: captured once in a
// CUDA graph and replayed with other lengths, tables, hidden tokens and queries.
#include "kernels/cuda/step/device_decode.h"

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/copy_to_device.h"

namespace kvtide::testing {
namespace {

constexpr int kLayers = 2, kKvHeads = 2, kSequences = 7, kCodedBlocks = 40, kExactBlocks = 4, kPool = 160;

template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : count_(count) {
    EXPECT_EQ(cudaMalloc(&data_, count * sizeof(T)), cudaSuccess);
  }
  ~DeviceArray() { (void)cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  T* data() const { return static_cast<T*>(data_); }
  void Set(const std::vector<T>& v) const {
    ASSERT_LE(v.size(), count_);
    ASSERT_TRUE(cuda::CopyToDevice(data_, v.data(), v.size() * sizeof(T)).ok());
  }
  std::vector<T> Get() const {
    std::vector<T> v(count_);
    EXPECT_EQ(cudaMemcpy(v.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost), cudaSuccess);
    return v;
  }

 private:
  const size_t count_;
  void* data_ = nullptr;
};

// Blocks with random codes and tame scales, or tame halves.
std::vector<std::byte> RandomBlocks(const BlockLayout& layout, size_t blocks, std::mt19937& rng) {
  std::vector<std::byte> bytes(layout.block_bytes() * blocks);
  for (std::byte& b : bytes) b = static_cast<std::byte>(rng());
  const auto tame = [&](size_t at, size_t count, bool positive) {  // the high bytes: magnitudes 2^-4 .. 1
    for (size_t i = 1; i < count; i += 2)
      bytes[at + i] = static_cast<std::byte>(0x2c + rng() % 12) |
                      (positive || rng() % 2 == 0 ? std::byte{0} : std::byte{0x80});
  };
  for (size_t record = 0; record < bytes.size(); record += layout.record_bytes())
    for (const auto& [half, start] :
         {std::pair{layout.k(), size_t{0}}, std::pair{layout.v(), layout.v_codes()}}) {
      if (half.groups == 0) {
        tame(record + start, half.code_bytes, false);
      } else {
        tame(record + start + half.code_bytes, half.scale_bytes, true);
      }
    }
  return bytes;
}

struct Lengths {
  std::vector<int32_t> coded, exact;
  int window;  // 0 = none; counted from the last token of each sequence
};

class DeviceDecodeTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto backend = MakeCudaBackend();
    ASSERT_TRUE(backend.ok()) << backend.status();
    backend_ = std::move(backend).value();
  }
  std::unique_ptr<Backend> backend_;
  std::mt19937 rng_{23};
  std::normal_distribution<float> normal_;
};

// `type` of q and out; profile: K mean and gain of the coded runs.
struct Case {
  const char* pair;
  int dim;
  int heads;
  DataType type;
  bool profile;
  float softcap;
};

class DeviceDecodeCases : public DeviceDecodeTest, public ::testing::WithParamInterface<Case> {};

TEST_P(DeviceDecodeCases, ReplaysWithOtherLengths) {
  const Case& c = GetParam();
  const size_t dim = static_cast<size_t>(c.dim), heads = static_cast<size_t>(c.heads), row = heads * dim;
  const BlockLayout coded({kLayers, kKvHeads, c.dim, c.dim}, *ParseCachePair(c.pair));
  const BlockLayout exact(coded.shape(), ExactPair());
  DeviceArray<std::byte> coded_pool(coded.block_bytes() * kPool), exact_pool(exact.block_bytes() * kPool);
  coded_pool.Set(RandomBlocks(coded, kPool, rng_));
  exact_pool.Set(RandomBlocks(exact, kPool, rng_));

  DeviceArray<std::byte*> coded_table(kSequences * kCodedBlocks), exact_table(kSequences * kExactBlocks);
  DeviceArray<int32_t> coded_tokens(kSequences), exact_tokens(kSequences), coded_hidden(kSequences),
      exact_hidden(kSequences);
  DeviceArray<uint8_t> q(kLayers * kSequences * row * DataTypeBytes(c.type)),
      out(kLayers * kSequences * row * DataTypeBytes(c.type));
  DeviceArray<float> lse(kLayers * kSequences * heads), sinks(heads);
  DeviceArray<float> mean(kLayers * kSequences * kKvHeads * dim), gain(kLayers * kSequences * kKvHeads * dim);
  const auto random = [&](size_t count, float scale, float offset) {
    std::vector<float> v(count);
    for (float& x : v) x = normal_(rng_) * scale + offset;
    return v;
  };
  const std::vector<float> sink_values = random(heads, 1, 0),
                           mean_values = random(kLayers * kSequences * kKvHeads * dim, 0.1f, 0);
  std::vector<float> gain_values = random(mean_values.size(), 0.2f, 1);
  for (float& x : gain_values) x = std::clamp(x, 0.5f, 2.0f);
  sinks.Set(sink_values);
  mean.Set(mean_values);
  gain.Set(gain_values);

  DecodeOptions options;
  options.shape = coded.shape();
  options.pair = coded.pair();
  options.heads = c.heads;
  options.max_sequences = kSequences;
  options.scale = 1.0f / std::sqrt(static_cast<float>(c.dim));
  options.softcap = c.softcap;
  options.type = c.type;
  options.coded = {coded_table.data(), coded_tokens.data(), coded_hidden.data(), kCodedBlocks};
  options.exact = {exact_table.data(), exact_tokens.data(), exact_hidden.data(), kExactBlocks};
  std::vector<DecodeLayer> layers(kLayers);
  for (int l = 0; l < kLayers; l++) {
    const size_t at = static_cast<size_t>(l) * kSequences;
    layers[static_cast<size_t>(l)] = {l,
                                      q.data() + at * row * DataTypeBytes(c.type),
                                      out.data() + at * row * DataTypeBytes(c.type),
                                      lse.data() + at * heads,
                                      nullptr,
                                      nullptr,
                                      sinks.data()};
    if (c.profile) {
      layers[static_cast<size_t>(l)].k_mean = mean.data() + at * kKvHeads * dim;
      layers[static_cast<size_t>(l)].k_gain = gain.data() + at * kKvHeads * dim;
    }
  }
  const auto made = DeviceDecode::Make(options, layers);
  ASSERT_TRUE(made.ok()) << made.status();
  DeviceDecode& decode = **made;

  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
  ASSERT_TRUE(decode.Plan(stream).ok());
  for (int l = 0; l < kLayers; l++) {
    const absl::Status status = decode.Attend(l, stream);
    ASSERT_TRUE(status.ok()) << status;
  }
  ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  ASSERT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);

  const Lengths steps[] = {
      {{2560, 1, 64, 640, 0, 1000, 300}, {192, 64, 1, 255, 5, 0, 130}, 0},
      {{0, 0, 0, 0, 0, 0, 128}, {0, 0, 0, 7, 0, 0, 0}, 0},
      {{2501, 700, 65, 63, 128, 0, 2048}, {70, 256, 1, 255, 0, 192, 190}, 150},
      {{0, 0, 0, 0, 0, 0, 0}, {0, 0, 0, 0, 0, 0, 0}, 0},
      {{64, 2560, 2560, 2560, 2560, 2560, 2560}, {0, 256, 256, 256, 256, 256, 256}, 700},
  };
  for (size_t step = 0; step < std::size(steps); step++) {
    SCOPED_TRACE(::testing::Message() << "step " << step);
    const Lengths& lengths = steps[step];
    const auto table = [&](const DeviceArray<std::byte>& pool, size_t bytes, int blocks) {
      std::vector<std::byte*> v(static_cast<size_t>(kSequences * blocks));
      for (std::byte*& p : v) p = pool.data() + rng_() % kPool * bytes;
      return v;
    };
    const std::vector<std::byte*> coded_blocks = table(coded_pool, coded.block_bytes(), kCodedBlocks);
    const std::vector<std::byte*> exact_blocks = table(exact_pool, exact.block_bytes(), kExactBlocks);
    std::vector<int32_t> hidden_coded(kSequences), hidden_exact(kSequences);
    for (size_t s = 0; s < kSequences; s++) {
      const int hidden =
          lengths.window == 0 ? 0 : std::max(0, lengths.coded[s] + lengths.exact[s] - lengths.window);
      hidden_coded[s] = std::min(hidden, lengths.coded[s]);
      hidden_exact[s] = hidden - hidden_coded[s];
    }
    std::vector<float> q_values = random(kLayers * kSequences * row, 1, 0);
    std::vector<uint16_t> q_halves;
    if (c.type == DataType::kF32) {
      std::vector<uint8_t> bytes(q_values.size() * 4);
      std::memcpy(bytes.data(), q_values.data(), bytes.size());
      q.Set(bytes);
    } else {
      std::vector<uint8_t> bytes(q_values.size() * 2);
      for (size_t i = 0; i < q_values.size(); i++) {
        const uint16_t half = c.type == DataType::kF16 ? F32ToF16(q_values[i]) : F32ToBf16(q_values[i]);
        q_values[i] = c.type == DataType::kF16 ? F16ToF32(half) : Bf16ToF32(half);
        std::memcpy(&bytes[2 * i], &half, 2);
      }
      q.Set(bytes);
    }
    coded_table.Set(coded_blocks);
    exact_table.Set(exact_blocks);
    coded_tokens.Set(lengths.coded);
    exact_tokens.Set(lengths.exact);
    coded_hidden.Set(hidden_coded);
    exact_hidden.Set(hidden_exact);
    ASSERT_EQ(cudaGraphLaunch(exec, stream), cudaSuccess);
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);

    const std::vector<uint8_t> got_bytes = out.Get();
    const std::vector<float> got_lse = lse.Get();
    for (int l = 0; l < kLayers; l++)
      for (size_t s = 0; s < kSequences; s++) {
        SCOPED_TRACE(::testing::Message() << "layer " << l << ", sequence " << s);
        Profile profile;
        profile.shape = coded.shape();
        profile.k.resize(kLayers * kKvHeads);
        profile.v.resize(kLayers * kKvHeads);
        for (size_t h = 0; h < kKvHeads && c.profile; h++) {
          const size_t at = ((static_cast<size_t>(l) * kSequences + s) * kKvHeads + h) * dim;
          HeadProfile& head = profile.k[static_cast<size_t>(l) * kKvHeads + h];
          head.mean.assign(mean_values.begin() + static_cast<long>(at),
                           mean_values.begin() + static_cast<long>(at + dim));
          head.gain.assign(gain_values.begin() + static_cast<long>(at),
                           gain_values.begin() + static_cast<long>(at + dim));
        }
        const std::vector<std::byte*> my_coded(
            coded_blocks.begin() + static_cast<long>(s * kCodedBlocks),
            coded_blocks.begin() + static_cast<long>((s + 1) * kCodedBlocks));
        const std::vector<std::byte*> my_exact(
            exact_blocks.begin() + static_cast<long>(s * kExactBlocks),
            exact_blocks.begin() + static_cast<long>((s + 1) * kExactBlocks));
        BlockRun runs[2];
        runs[0] = {&coded, c.profile ? &profile : nullptr, my_coded, 0, lengths.coded[s]};
        runs[1] = {&exact, nullptr, my_exact, lengths.coded[s], lengths.exact[s]};
        std::vector<float> want(row), want_lse(heads);
        const size_t at = (static_cast<size_t>(l) * kSequences + s) * row;
        AttendItem item;
        item.runs = runs;
        item.q = q_values.data() + at;
        item.queries = 1;
        item.first_query_position = std::max(0, lengths.coded[s] + lengths.exact[s] - 1);
        item.out = want.data();
        item.lse = want_lse.data();
        AttendArgs args;
        args.layer = l;
        args.heads = c.heads;
        args.scale = options.scale;
        args.softcap = c.softcap;
        args.window = lengths.window;
        args.sinks = sink_values.data();
        args.items = {&item, 1};
        const absl::Status status = backend_->Attend(args);
        ASSERT_TRUE(status.ok()) << status;
        double error = 0, size = 0;
        for (size_t i = 0; i < row; i++) {
          float x = 0;
          if (c.type == DataType::kF32) {
            std::memcpy(&x, &got_bytes[4 * (at + i)], 4);
          } else {
            uint16_t half;
            std::memcpy(&half, &got_bytes[2 * (at + i)], 2);
            x = c.type == DataType::kF16 ? F16ToF32(half) : Bf16ToF32(half);
          }
          error += (static_cast<double>(x) - want[i]) * (static_cast<double>(x) - want[i]);
          size += static_cast<double>(want[i]) * want[i];
        }
        const double bound = c.type == DataType::kF32 ? 1e-5 : c.type == DataType::kF16 ? 1e-3 : 6e-3;
        ASSERT_LE(std::sqrt(error), bound * std::sqrt(size) + 1e-12);
        for (size_t h = 0; h < heads; h++) {
          const float x = got_lse[(static_cast<size_t>(l) * kSequences + s) * heads + h];
          if (std::isinf(want_lse[h])) {
            ASSERT_EQ(x, want_lse[h]);
          } else {
            ASSERT_NEAR(x, want_lse[h], 1e-4);
          }
        }
      }
  }
  (void)cudaGraphExecDestroy(exec);
  (void)cudaGraphDestroy(graph);
  (void)cudaStreamDestroy(stream);
}

INSTANTIATE_TEST_SUITE_P(Cuda, DeviceDecodeCases,
                         // Pairs whose kernels read f16 pages in the same launch; then others.
                         ::testing::Values(Case{"turbo4", 128, 8, DataType::kF32, false, 0},
                                           Case{"turbo3", 128, 32, DataType::kF16, true, 0},
                                           Case{"q8_0/turbo4", 128, 2, DataType::kBf16, false, 20.0f},
                                           Case{"turbo4/turbo3", 64, 6, DataType::kF32, true, 0},
                                           Case{"q8_0", 64, 24, DataType::kF32, false, 0},
                                           Case{"turbo2", 256, 8, DataType::kF32, true, 0},
                                           Case{"turbo4", 256, 20, DataType::kF32, false, 30.0f},
                                           Case{"f16", 128, 6, DataType::kF32, false, 0},
                                           Case{"q5_0", 128, 4, DataType::kF32, true, 0},
                                           Case{"turbo4", 192, 8, DataType::kF32, false, 0},
                                           Case{"wht4", 128, 16, DataType::kBf16, true, 0}),
                         [](const auto& test) { return "Case" + std::to_string(test.index); });

TEST_F(DeviceDecodeTest, SaysWhatIsMissing) {
  DecodeOptions options;
  options.shape = {1, 2, 128, 128};
  options.pair = *ParseCachePair("turbo4");
  options.heads = 8;
  options.max_sequences = 4;
  DecodeLayer layer;
  float value;
  layer.q = layer.out = layer.lse = &value;
  EXPECT_EQ(DeviceDecode::Make(options, {layer}).status().message(), "no block table");
  std::byte* block = nullptr;
  int32_t tokens = 0;
  options.coded = {&block, &tokens, nullptr, 8};
  options.heads = 80;  // 40 rows
  EXPECT_EQ(DeviceDecode::Make(options, {layer}).status().code(), absl::StatusCode::kInvalidArgument);
  options.heads = 8;
  options.pair = *ParseCachePair("tide3/turbo3");
  EXPECT_NE(DeviceDecode::Make(options, {layer}).status().message().find("need transforms"),
            std::string::npos);
  options.pair = *ParseCachePair("turbo4");
  options.max_sequences = 5000;
  EXPECT_EQ(DeviceDecode::Make(options, {layer}).status().message(),
            "max_sequences is 5000, 1..4096 are possible");
  options.max_sequences = 4;
  layer.layer = 1;
  EXPECT_EQ(DeviceDecode::Make(options, {layer}).status().message(), "layer 1 of 1");
}

}  // namespace
}  // namespace kvtide::testing
