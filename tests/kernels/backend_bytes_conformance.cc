// Conformance of Append, Recode, Decode and copies: the bytes are those of the definition (page_codec.h).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <thread>

#include "kernels/format/page_codec.h"
#include "tests/kernels/backend_conformance.h"
#include "tests/kernels/test_sequence.h"

namespace kvtide::testing {
namespace {

constexpr int kHeadDims[] = {64, 80, 96, 112, 128, 192, 256, 512};

// Rows that try the corners of an encoder, one kind per token.
std::vector<float> HardRows(int dim, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> rows;
  for (int t = 0; t < kBlockTokens; t++)
    for (int d = 0; d < dim; d++) {
      const float x = normal(random);
      switch (t % 16) {
        case 0:
          rows.push_back(0.0f);
          break;
        case 1:
          rows.push_back(1.5f);
          break;
        case 2:
          rows.push_back(d % 2 == 0 ? -3.0f : 3.0f);
          break;
        case 3:
          rows.push_back(x * 15000.0f);
          break;
        case 4:
          rows.push_back(x * 3e-8f);
          break;
        case 5:
          rows.push_back(d == t % dim ? 100.0f : 0.0f);
          break;
        case 6:
          rows.push_back(d == 3 ? 1e-30f : -0.0f);
          break;
        case 7:
          rows.push_back(static_cast<float>(d % 16));
          break;
        case 8:
          rows.push_back(d % 2 == 0 ? 65504.0f : -65504.0f);
          break;
        default:
          rows.push_back(x);
          break;
      }
      rows.back() =
          F16ToF32(F32ToF16(std::clamp(rows.back(), -65504.0f, 65504.0f)));  // what an f16 block can hold
    }
  return rows;
}

// A block of `layout` whose halves are encoded by the definition; rows(side, layer, head).
template <class Rows>
std::vector<std::byte> DefinitionBlock(const BlockLayout& layout, const Profile* profile, int tokens,
                                       Rows rows) {
  std::vector<std::byte> bytes(layout.block_bytes());
  for (int layer = 0; layer < layout.shape().layers; layer++)
    for (int head = 0; head < layout.shape().kv_heads; head++) {
      std::byte* record = bytes.data() + layout.RecordOffset(layer, head);
      const std::vector<float> k = rows(Side::kKey, layer, head), v = rows(Side::kValue, layer, head);
      EncodeHalf(layout.pair().k, Side::kKey, layout.k(),
                 profile == nullptr ? nullptr : &profile->key(layer, head), k.data(), tokens, record);
      EncodeHalf(layout.pair().v, Side::kValue, layout.v(), nullptr, v.data(), tokens,
                 record + layout.v_codes());
    }
  return bytes;
}

std::vector<std::byte> RecodeOn(Backend& backend, const BlockLayout& from,
                                const std::vector<std::byte>& source, const BlockLayout& to,
                                RecodePiece piece) {
  BackendBlocks a(backend, from, 1), b(backend, to, 1);
  a.Write(0, source);
  b.Write(0, std::vector<std::byte>(to.block_bytes(), std::byte{0x5a}));
  piece.from = &from;
  piece.source = a.block(0);
  piece.to = &to;
  piece.target = b.block(0);
  const absl::Status status = backend.Recode({&piece, 1});
  EXPECT_TRUE(status.ok()) << status;
  return b.Read(0);
}

TEST_P(BackendConformance, SealsEveryTypeToTheBytesOfTheDefinition) {
  for (CacheType type : AllCacheTypes())
    for (int dim : kHeadDims) {
      SCOPED_TRACE(std::string(Name(type)) + " d " + std::to_string(dim));
      const GroupShape shape{1, 1, dim, dim};
      const BlockLayout exact(shape, ExactPair()), coded(shape, {type, type});
      const auto rows = [&](Side side, int, int) { return HardRows(dim, side == Side::kKey ? 1 : 2); };
      RecodePiece piece;
      piece.layers = 1;
      EXPECT_EQ(RecodeOn(backend(), exact, DefinitionBlock(exact, nullptr, kBlockTokens, rows), coded, piece),
                DefinitionBlock(coded, nullptr, kBlockTokens, rows));
    }
}

TEST_P(BackendConformance, SealsWithProfilesPartsOfBlocksAndLayerRanges) {
  const GroupShape shape{3, 2, 128, 64};
  const Profile profile = RandomProfile(shape, 5);
  for (CacheType type : AllCacheTypes()) {
    SCOPED_TRACE(Name(type));
    const BlockLayout exact(shape, ExactPair()), coded(shape, {type, type});
    const auto rows = [&](Side side, int layer, int head) {
      return HardRows(side == Side::kKey ? 128 : 64, static_cast<uint32_t>(layer * 10 + head));
    };
    const std::vector<std::byte> source = DefinitionBlock(exact, nullptr, kBlockTokens, rows);
    const std::vector<std::byte> wanted = DefinitionBlock(coded, &profile, 40, rows);
    RecodePiece piece;
    piece.to_profile = &profile;
    piece.first_layer = 1;
    piece.layers = 2;
    piece.tokens = 40;
    const std::vector<std::byte> got = RecodeOn(backend(), exact, source, coded, piece);
    const size_t layer = coded.RecordOffset(1, 0);
    EXPECT_TRUE(std::equal(got.begin() + static_cast<int64_t>(layer), got.end(),
                           wanted.begin() + static_cast<int64_t>(layer)));
    EXPECT_TRUE(std::all_of(got.begin(), got.begin() + static_cast<int64_t>(layer), [](std::byte b) {
      return b == std::byte{0x5a};
    })) << "layer 0 was not asked for";
  }
}

TEST_P(BackendConformance, RecodesToFewerBitsAsTheDefinitionDoes) {
  const GroupShape shape{1, 1, 128, 128};
  const Profile profile = RandomProfile(shape, 6);
  for (const char* to_name : {"turbo3/turbo2", "q4_0/q4_0", "turbo4/turbo3", "f16/f16"}) {
    SCOPED_TRACE(to_name);
    const BlockLayout from(shape, *ParseCachePair("turbo4/q8_0")), to(shape, *ParseCachePair(to_name));
    const std::vector<std::byte> source =
        DefinitionBlock(from, &profile, kBlockTokens,
                        [](Side side, int, int) { return HardRows(128, side == Side::kKey ? 7 : 8); });
    // The definition: decode to the original frame, encode again; a side that stays what it is keeps its
    // bytes.
    std::vector<float> k(64 * 128), v(64 * 128);
    DecodeHalf(from.pair().k, Side::kKey, from.k(), &profile.key(0, 0), source.data(), k.data());
    DecodeHalf(from.pair().v, Side::kValue, from.v(), nullptr, source.data() + from.v_codes(), v.data());
    std::vector<std::byte> wanted(to.block_bytes());
    if (to.pair().k == from.pair().k) {
      std::copy_n(source.data(), to.k().bytes, wanted.data());
    } else {
      EncodeHalf(to.pair().k, Side::kKey, to.k(), &profile.key(0, 0), k.data(), kBlockTokens, wanted.data());
    }
    EncodeHalf(to.pair().v, Side::kValue, to.v(), nullptr, v.data(), kBlockTokens,
               wanted.data() + to.v_codes());
    RecodePiece piece;
    piece.from_profile = &profile;
    piece.to_profile = &profile;
    piece.layers = 1;
    EXPECT_EQ(RecodeOn(backend(), from, source, to, piece), wanted);
  }
}

// Pieces of a call may differ in anything: each gets what it gets alone.
TEST_P(BackendConformance, RecodesPiecesOfSeveralKindsInOneCall) {
  const GroupShape shape{2, 2, 128, 64};
  const Profile profile = RandomProfile(shape, 12);
  const auto layout = [&](const char* pair) { return BlockLayout(shape, *ParseCachePair(pair)); };
  const BlockLayout exact = layout("f16"), q8_turbo4 = layout("q8_0/turbo4"),
                    q8_turbo3 = layout("q8_0/turbo3"), turbo4_f16 = layout("turbo4/f16"),
                    turbo3 = layout("turbo3");
  struct Case {
    const BlockLayout *from, *to;
    bool profile;
    int first_layer, layers, tokens;
  };
  const Case cases[] = {{&exact, &q8_turbo4, true, 0, 2, kBlockTokens},
                        {&exact, &q8_turbo4, true, 1, 1, kBlockTokens},
                        {&exact, &q8_turbo4, true, 0, 2, 9},
                        {&q8_turbo4, &q8_turbo3, true, 0, 2, kBlockTokens},
                        {&q8_turbo4, &turbo3, false, 0, 1, 33},
                        {&exact, &exact, false, 1, 1, kBlockTokens},
                        {&turbo4_f16, &exact, false, 0, 2, 64},
                        {&exact, &turbo4_f16, false, 0, 2, 64},
                        {&exact, &turbo4_f16, false, 0, 0, 64}};
  std::vector<std::unique_ptr<BackendBlocks>> sources, targets;
  std::vector<RecodePiece> pieces;
  std::vector<std::vector<std::byte>> wanted;
  for (const Case& c : cases) {
    const uint32_t seed = static_cast<uint32_t>(pieces.size());
    const std::vector<std::byte> bytes = DefinitionBlock(
        *c.from, c.profile ? &profile : nullptr, kBlockTokens, [&](Side side, int layer, int head) {
          return HardRows(side == Side::kKey ? 128 : 64,
                          seed * 100 + static_cast<uint32_t>(layer * 10 + head));
        });
    RecodePiece piece;
    piece.from_profile = piece.to_profile = c.profile ? &profile : nullptr;
    piece.first_layer = c.first_layer;
    piece.layers = c.layers;
    piece.tokens = c.tokens;
    wanted.push_back(RecodeOn(backend(), *c.from, bytes, *c.to, piece));
    sources.push_back(std::make_unique<BackendBlocks>(backend(), *c.from, 1));
    targets.push_back(std::make_unique<BackendBlocks>(backend(), *c.to, 1));
    sources.back()->Write(0, bytes);
    targets.back()->Write(0, std::vector<std::byte>(c.to->block_bytes(), std::byte{0x5a}));
    piece.from = c.from;
    piece.source = sources.back()->block(0);
    piece.to = c.to;
    piece.target = targets.back()->block(0);
    pieces.push_back(piece);
  }
  const absl::Status status = backend().Recode(pieces);
  ASSERT_TRUE(status.ok()) << status;
  for (size_t i = 0; i < wanted.size(); i++) EXPECT_EQ(targets[i]->Read(0), wanted[i]) << "piece " << i;
}

TEST_P(BackendConformance, AppendsOneByOneAsInBulkAndAsTheDefinition) {
  for (DataType type : {DataType::kF32, DataType::kF16, DataType::kBf16})
    for (int dim : {64, 80, 96, 128, 256}) {
      SCOPED_TRACE(std::string(DataTypeName(type)) + " d " + std::to_string(dim));
      const GroupShape shape{2, 2, dim, 64};
      const BlockLayout layout(shape, ExactPair());
      // Rows [token][head][dim] in the given element type.
      std::mt19937 random(9);
      std::normal_distribution<float> normal;
      const auto make = [&](int width) {
        std::vector<float> rows(static_cast<size_t>(kBlockTokens * 2 * width));
        for (float& x : rows) x = (random() % 50 == 0 ? 1e-6f : 1.0f) * normal(random);
        return rows;
      };
      const auto convert = [&](const std::vector<float>& rows) {
        std::vector<std::byte> bytes(rows.size() * DataTypeBytes(type));
        for (size_t i = 0; i < rows.size(); i++) {
          if (type == DataType::kF32) {
            std::memcpy(bytes.data() + 4 * i, &rows[i], 4);
          } else {
            const uint16_t bits = type == DataType::kF16 ? F32ToF16(rows[i]) : F32ToBf16(rows[i]);
            std::memcpy(bytes.data() + 2 * i, &bits, 2);
          }
        }
        return bytes;
      };
      const std::vector<std::byte> k = convert(make(dim)), v = convert(make(64));
      AppendArgs args;
      args.k = {k.data(), type};
      args.v = {v.data(), type};
      BackendBlocks blocks(backend(), layout, 2);
      for (int i = 0; i < 2; i++) blocks.Write(i, std::vector<std::byte>(layout.block_bytes()));
      std::vector<AppendPiece> bulk;
      for (int layer = 0; layer < 2; layer++)
        bulk.push_back({&layout, blocks.block(0), layer, 0, kBlockTokens, 0});
      args.pieces = bulk;
      ASSERT_TRUE(backend().Append(args).ok());
      for (int t = 0; t < kBlockTokens; t++) {
        std::vector<AppendPiece> one;
        for (int layer = 0; layer < 2; layer++)
          one.push_back({&layout, blocks.block(1), layer, t, 1, static_cast<size_t>(t)});
        args.pieces = one;
        ASSERT_TRUE(backend().Append(args).ok());
      }
      const std::vector<std::byte> wanted =
          DefinitionBlock(layout, nullptr, kBlockTokens, [&](Side side, int, int head) {
            const int width = side == Side::kKey ? dim : 64;
            const TensorView view = side == Side::kKey ? args.k : args.v;
            std::vector<float> rows;
            for (int t = 0; t < kBlockTokens; t++)
              for (int d = 0; d < width; d++)
                rows.push_back(view.At(static_cast<size_t>((t * 2 + head) * width + d)));
            return rows;
          });
      EXPECT_EQ(blocks.Read(0), wanted);
      EXPECT_EQ(blocks.Read(1), wanted);
    }
}

// As new tokens of a batch of sequences come: every piece with tensors of its own, of any element type.
TEST_P(BackendConformance, AppendsPiecesOfSeveralTensorsInOneCall) {
  for (const bool mixed : {false, true})
    for (int dim : {64, 112}) {
      SCOPED_TRACE("mixed " + std::to_string(mixed) + " d " + std::to_string(dim));
      const GroupShape shape{2, 3, dim, 64};
      const BlockLayout layout(shape, ExactPair());
      constexpr int kSources = 5;
      BackendBlocks together(backend(), layout, kSources), alone(backend(), layout, kSources);
      std::mt19937 random(17);
      std::normal_distribution<float> normal;
      std::deque<std::vector<std::byte>> tensors;
      const auto make = [&](int width, DataType type) {
        std::vector<std::byte>& bytes =
            tensors.emplace_back(static_cast<size_t>(4 * 3 * width) * DataTypeBytes(type));
        const MutableTensorView view{bytes.data(), type};
        for (size_t i = 0; i < static_cast<size_t>(4 * 3 * width); i++) view.Set(i, normal(random));
        return TensorView{bytes.data(), type};
      };
      std::vector<AppendPiece> pieces;
      for (int i = 0; i < kSources; i++) {
        for (BackendBlocks* blocks : {&together, &alone})
          blocks->Write(i, std::vector<std::byte>(layout.block_bytes()));
        const DataType types[] = {DataType::kF16, DataType::kF32, DataType::kBf16};
        const DataType type = mixed ? types[i % 3] : DataType::kF16;
        AppendPiece piece{&layout, together.block(i), i % 2, 7 * i, i % 3, static_cast<size_t>(i % 2)};
        piece.k = make(dim, type);
        piece.v = make(64, type);
        pieces.push_back(piece);
      }
      AppendArgs args;
      args.pieces = pieces;
      ASSERT_TRUE(backend().Append(args).ok());
      for (int i = 0; i < kSources; i++) {
        AppendPiece piece = pieces[static_cast<size_t>(i)];
        AppendArgs one;
        one.k = piece.k;
        one.v = piece.v;
        piece.block = alone.block(i);
        piece.k = piece.v = {};
        one.pieces = {&piece, 1};
        ASSERT_TRUE(backend().Append(one).ok());
        EXPECT_EQ(together.Read(i), alone.Read(i)) << "source " << i;
      }
    }
}

// As an append of all layers of a model whose layer groups differ: blocks of several layouts, interleaved.
TEST_P(BackendConformance, AppendsToBlocksOfSeveralLayoutsInOneCall) {
  const BlockLayout wide({1, 1, 128, 64}, ExactPair()), narrow({2, 2, 64, 64}, ExactPair());
  BackendBlocks wide_blocks(backend(), wide, 2), narrow_blocks(backend(), narrow, 2);
  std::mt19937 random(18);
  std::normal_distribution<float> normal;
  std::vector<float> rows(3 * 128);
  for (float& x : rows) x = normal(random);
  const TensorView view{rows.data(), DataType::kF32};
  std::vector<AppendPiece> pieces = {{&narrow, narrow_blocks.block(0), 0, 5, 3, 0, view, view},
                                     {&wide, wide_blocks.block(0), 0, 9, 2, 1, view, view},
                                     {&narrow, narrow_blocks.block(0), 1, 5, 3, 0, view, view}};
  for (BackendBlocks* blocks : {&wide_blocks, &narrow_blocks})
    for (int i = 0; i < 2; i++)
      blocks->Write(i, std::vector<std::byte>((blocks == &wide_blocks ? wide : narrow).block_bytes()));
  AppendArgs args;
  args.pieces = pieces;
  const absl::Status status = backend().Append(args);
  ASSERT_TRUE(status.ok()) << status;
  for (AppendPiece piece : pieces) {
    piece.block = piece.layout == &wide ? wide_blocks.block(1) : narrow_blocks.block(1);
    args.pieces = {&piece, 1};
    ASSERT_TRUE(backend().Append(args).ok());
  }
  EXPECT_EQ(wide_blocks.Read(0), wide_blocks.Read(1));
  EXPECT_EQ(narrow_blocks.Read(0), narrow_blocks.Read(1));
}

TEST_P(BackendConformance, RefusesToAppendToCodedBlocksOrBeyondTheBlock) {
  const GroupShape shape{1, 1, 64, 64};
  const BlockLayout coded(shape, *ParseCachePair("turbo4")), exact(shape, ExactPair());
  BackendBlocks blocks(backend(), exact, 1);
  const std::vector<float> rows(64 * 64);
  AppendArgs args;
  args.k = args.v = {rows.data(), DataType::kF32};
  AppendPiece piece{&coded, blocks.block(0), 0, 0, 1, 0};
  args.pieces = {&piece, 1};
  EXPECT_EQ(backend().Append(args).code(), absl::StatusCode::kInvalidArgument);
  piece = {&exact, blocks.block(0), 0, 60, 5, 0};
  EXPECT_EQ(backend().Append(args).code(), absl::StatusCode::kInvalidArgument);
  piece = {&exact, blocks.block(0), 1, 0, 1, 0};
  EXPECT_EQ(backend().Append(args).code(), absl::StatusCode::kInvalidArgument);
}

TEST_P(BackendConformance, DecodesToTheOriginalFrame) {
  const GroupShape shape{2, 2, 112, 64};
  const Profile profile = RandomProfile(shape, 10);
  for (CacheType type : AllCacheTypes()) {
    SCOPED_TRACE(Name(type));
    const BlockLayout layout(shape, {type, type});
    const std::vector<std::byte> bytes =
        DefinitionBlock(layout, &profile, kBlockTokens, [](Side side, int layer, int head) {
          return HardRows(side == Side::kKey ? 112 : 64, static_cast<uint32_t>(20 + layer * 2 + head));
        });
    BackendBlocks block(backend(), layout, 1);
    block.Write(0, bytes);
    std::vector<float> k(64 * 2 * 112), v(64 * 2 * 64);
    DecodeArgs args;
    args.layout = &layout;
    args.profile = &profile;
    args.block = block.block(0);
    args.layer = 1;
    args.k = k.data();
    args.v = v.data();
    ASSERT_TRUE(backend().Decode(args).ok());
    for (int head = 0; head < 2; head++) {
      const std::byte* record = bytes.data() + layout.RecordOffset(1, head);
      std::vector<float> wanted_k(64 * 112), wanted_v(64 * 64);
      DecodeHalf(type, Side::kKey, layout.k(), &profile.key(1, head), record, wanted_k.data());
      DecodeHalf(type, Side::kValue, layout.v(), nullptr, record + layout.v_codes(), wanted_v.data());
      for (int t = 0; t < 64; t++) {
        for (int d = 0; d < 112; d++) {
          const float wanted = wanted_k[static_cast<size_t>(t * 112 + d)];
          ASSERT_NEAR(k[static_cast<size_t>((t * 2 + head) * 112 + d)], wanted,
                      1e-5f * std::fabs(wanted) + 1e-6f)
              << t << " " << d;
        }
        for (int d = 0; d < 64; d++) {
          const float wanted = wanted_v[static_cast<size_t>(t * 64 + d)];
          ASSERT_NEAR(v[static_cast<size_t>((t * 2 + head) * 64 + d)], wanted,
                      1e-5f * std::fabs(wanted) + 1e-6f)
              << t << " " << d;
        }
      }
    }
  }
}

TEST_P(BackendConformance, CopiesManyPiecesAndForgetsPolledTickets) {
  constexpr size_t kBytes = 1 << 16;
  auto slab = backend().AllocateSlab(kBytes);
  ASSERT_TRUE(slab.ok()) << slab.status();
  EXPECT_GE((*slab)->bytes(), kBytes);
  std::vector<std::byte> source(kBytes), back(kBytes);
  std::mt19937 random(11);
  for (std::byte& b : source) b = static_cast<std::byte>(random());
  std::vector<CopyPiece> pieces;  // in reverse order, of unequal sizes
  for (size_t end = kBytes; end > 0;) {
    const size_t bytes = std::min<size_t>(end, 1 + random() % 5000);
    end -= bytes;
    pieces.push_back({(*slab)->data() + end, source.data() + end, bytes});
  }
  const auto ticket = backend().StartCopy(pieces, CopyDirection::kFromHost);
  ASSERT_TRUE(ticket.ok()) << ticket.status();
  for (;;) {
    const auto done = backend().Poll(*ticket);
    ASSERT_TRUE(done.ok()) << done.status();
    if (*done) break;
    std::this_thread::yield();
  }
  EXPECT_FALSE(backend().Poll(*ticket).ok()) << "a ticket ends with the poll that says so";
  CopyAndWait(backend(), back.data(), (*slab)->data(), kBytes, CopyDirection::kToHost);
  EXPECT_EQ(back, source);
  CopyAndWait(backend(), (*slab)->data(), (*slab)->data() + kBytes / 2, kBytes / 2, CopyDirection::kInside);
  CopyAndWait(backend(), back.data(), (*slab)->data(), kBytes / 2, CopyDirection::kToHost);
  EXPECT_TRUE(std::equal(back.begin(), back.begin() + kBytes / 2, source.begin() + kBytes / 2));
  EXPECT_FALSE(backend().AllocateSlab(0).ok());
}

}  // namespace
}  // namespace kvtide::testing
