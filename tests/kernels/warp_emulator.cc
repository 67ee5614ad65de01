#include "tests/kernels/warp_emulator.h"

#include <ucontext.h>

#include <vector>

#include "kernels/base/check.h"

namespace kvtide::testing {
namespace {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = size_t{1} << 18;

struct Lane {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
  Collective kind = Collective::kNone;
  LaneOperands operands;
};

ucontext_t scheduler;
Lane lanes[kLanes];
int current = 0;
const std::function<void(int)>* code = nullptr;

void LaneEntry() {
  (*code)(current);
  lanes[current].done = true;
  swapcontext(&lanes[current].context, &scheduler);
}

uint8_t ByteOf(uint32_t word, int i) { return static_cast<uint8_t>(word >> (8 * i)); }

// m16n8k32: row of A fragment register r is n + 8 (r & 1), column 4c + i + 16 (r >> 1).
void MultiplyBytes(bool is_signed) {
  int a[16][32], b[32][8];
  for (int l = 0; l < kLanes; l++)
    for (int r = 0; r < 4; r++)
      for (int i = 0; i < 4; i++) {
        const uint8_t x = ByteOf(lanes[l].operands.in[r], i);
        a[(l >> 2) + 8 * (r & 1)][4 * (l & 3) + i + 16 * (r >> 1)] = is_signed ? static_cast<int8_t>(x) : x;
        if (r < 2)
          b[4 * (l & 3) + i + 16 * r][l >> 2] = static_cast<int8_t>(ByteOf(lanes[l].operands.in[4 + r], i));
      }
  for (int l = 0; l < kLanes; l++)
    for (int r = 0; r < 4; r++) {
      int64_t sum = static_cast<int32_t>(lanes[l].operands.in[6 + r]);
      for (int k = 0; k < 32; k++) sum += a[(l >> 2) + 8 * (r >> 1)][k] * b[k][2 * (l & 3) + (r & 1)];
      KVTIDE_CHECK(sum >= INT32_MIN && sum <= INT32_MAX, "an integer sum leaves 32 bits");
      lanes[l].operands.out[r] = static_cast<uint32_t>(static_cast<int32_t>(sum));
    }
}

// m16n8k16: pairs of columns; register r of A: row n + 8 (r & 1), columns 2c, 2c + 1, + 8 (r >> 1).
void MultiplyHalves(bool bf16) {
  const auto value = [bf16](uint32_t word, int i) {
    const uint16_t h = static_cast<uint16_t>(word >> (16 * i));
    return bf16 ? Bf16ToF32(h) : F16ToF32(h);
  };
  float a[16][16], b[16][8];
  for (int l = 0; l < kLanes; l++)
    for (int r = 0; r < 4; r++)
      for (int i = 0; i < 2; i++) {
        a[(l >> 2) + 8 * (r & 1)][2 * (l & 3) + i + 8 * (r >> 1)] = value(lanes[l].operands.in[r], i);
        if (r < 2) b[2 * (l & 3) + i + 8 * r][l >> 2] = value(lanes[l].operands.in[4 + r], i);
      }
  for (int l = 0; l < kLanes; l++)
    for (int r = 0; r < 4; r++) {
      float sum = FloatFromBits(lanes[l].operands.in[6 + r]);
      for (int k = 0; k < 16; k++) sum += a[(l >> 2) + 8 * (r >> 1)][k] * b[k][2 * (l & 3) + (r & 1)];
      lanes[l].operands.out[r] = FloatBits(sum);
    }
}

// ldmatrix x4: lane 8m + i gives row i of matrix m; a lane gets elements 2c, 2c + 1 of row n, or of column n.
void LoadMatrices(bool transposed) {
  for (int l = 0; l < kLanes; l++)
    for (int m = 0; m < 4; m++) {
      uint32_t word = 0;
      for (int e = 0; e < 2; e++) {
        const int row = transposed ? 2 * (l & 3) + e : l >> 2, column = transposed ? l >> 2 : 2 * (l & 3) + e;
        uint16_t h;
        std::memcpy(&h, lanes[8 * m + row].operands.address + 2 * column, 2);
        word |= static_cast<uint32_t>(h) << (16 * e);
      }
      lanes[l].operands.out[m] = word;
    }
}

void RunCollective() {
  const Collective kind = lanes[0].kind;
  for (const Lane& lane : lanes) KVTIDE_CHECK(lane.kind == kind, "lanes stand at different collectives");
  switch (kind) {
    case Collective::kNone:
      KVTIDE_CHECK(false, "no collective");
      break;
    case Collective::kShuffle:
      for (int l = 0; l < kLanes; l++)
        lanes[l].operands.out[0] = lanes[l ^ static_cast<int>(lanes[l].operands.in[1])].operands.in[0];
      break;
    case Collective::kAll: {
      uint32_t all = 1;
      for (const Lane& lane : lanes) all &= lane.operands.in[0];
      for (Lane& lane : lanes) lane.operands.out[0] = all;
      break;
    }
    case Collective::kMmaSigned:
      MultiplyBytes(true);
      break;
    case Collective::kMmaUnsigned:
      MultiplyBytes(false);
      break;
    case Collective::kMmaF16:
      MultiplyHalves(false);
      break;
    case Collective::kMmaBf16:
      MultiplyHalves(true);
      break;
    case Collective::kLoadMatrix:
      LoadMatrices(false);
      break;
    case Collective::kLoadMatrixTransposed:
      LoadMatrices(true);
      break;
  }
}

}  // namespace

LaneOperands& CurrentOperands() { return lanes[current].operands; }
int CurrentLane() { return current; }
void Park(Collective kind) {
  lanes[current].kind = kind;
  swapcontext(&lanes[current].context, &scheduler);
}

void RunWarp(const std::function<void(int lane)>& lane_code) {
  code = &lane_code;
  for (Lane& lane : lanes) {
    lane.done = false;
    lane.stack.resize(kStackBytes);
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.data();
    lane.context.uc_stack.ss_size = lane.stack.size();
    lane.context.uc_link = nullptr;
    makecontext(&lane.context, LaneEntry, 0);
  }
  for (;;) {
    int done = 0;
    for (current = 0; current < kLanes; current++) {
      if (!lanes[current].done) swapcontext(&scheduler, &lanes[current].context);
      done += lanes[current].done;
    }
    if (done == kLanes) return;
    KVTIDE_CHECK(done == 0, "a lane ended while others wait at a collective");
    RunCollective();
  }
}

}  // namespace kvtide::testing
