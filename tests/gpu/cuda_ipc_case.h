// The blocks of the IPC test: made by one process, attended by two.
#pragma once

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "kernels/backend.h"

namespace kvtide::testing {

inline constexpr int kIpcBlocks = 40, kIpcHeads = 8;

inline BlockLayout IpcLayout() { return BlockLayout({2, 2, 128, 128}, *ParseCachePair("turbo4/turbo3")); }

// Random codes; scales that are finite.
inline absl::Status FillIpcBlocks(Backend& backend, std::byte* slab) {
  const BlockLayout layout = IpcLayout();
  std::mt19937 rng(11);
  std::vector<std::byte> bytes(layout.block_bytes() * kIpcBlocks);
  for (std::byte& b : bytes) b = static_cast<std::byte>(rng());
  for (size_t record = 0; record < bytes.size(); record += layout.record_bytes())
    for (const auto& [at, count] : {std::pair{layout.k_scales(), layout.k().scale_bytes},
                                    std::pair{layout.v_scales(), layout.v().scale_bytes}})
      for (size_t i = 1; i < count; i += 2) bytes[record + at + i] = std::byte{0x28};  // about 2^-5
  auto ticket =
      backend.StartCopy(std::vector<CopyPiece>{{slab, bytes.data(), bytes.size()}}, CopyDirection::kFromHost);
  if (!ticket.ok()) return ticket.status();
  for (;;) {
    const auto done = backend.Poll(*ticket);
    if (!done.ok()) return done.status();
    if (*done) return absl::OkStatus();
  }
}

inline std::vector<float> AttendIpcBlocks(Backend& backend, std::byte* slab) {
  const BlockLayout layout = IpcLayout();
  std::vector<std::byte*> blocks;
  for (size_t i = 0; i < kIpcBlocks; i++) blocks.push_back(slab + i * layout.block_bytes());
  BlockRun run;
  run.layout = &layout;
  run.blocks = blocks;
  run.tokens = kIpcBlocks * kBlockTokens - 5;
  std::vector<float> q(kIpcHeads * 128), out(kIpcHeads * 128), lse(kIpcHeads);
  std::mt19937 rng(12);
  std::normal_distribution<float> normal;
  for (float& x : q) x = normal(rng);
  AttendItem item;
  item.runs = {&run, 1};
  item.q = q.data();
  item.queries = 1;
  item.first_query_position = run.tokens;
  item.out = out.data();
  item.lse = lse.data();
  AttendArgs args;
  args.layer = 1;
  args.heads = kIpcHeads;
  args.scale = 1.0f / std::sqrt(128.0f);
  args.items = {&item, 1};
  if (!backend.Attend(args).ok()) return {};
  out.insert(out.end(), lse.begin(), lse.end());
  return out;
}

int AttendByIpc();  // the second process

}  // namespace kvtide::testing
