// Attention of one warp over coded pages (64 tokens of one KV head), with int8 tensor-core products.
//
// Queries and softmax weights are 16-bit integers whose high and low bytes share one tile of 16 rows: rows
// 0-7 hold the high bytes of 8 query rows, rows 8-15 the low bytes, so a thread finds both parts of a sum in
// its own registers. A logit is exact up to the rounding of the query; the V scale, the page's reference and
// the rounding of a weight cost one FMA.
//
// The reference exponent of a row moves only when a page exceeds it by 2^kSlack, so that sums are rarely
// rescaled; contributions above the reference are no problem in f32. Weights keep a margin below 2^16: the
// rounding of the reference itself may lift them by up to kCeiling's distance, which covers logits of
// magnitude up to a million.
//
// Names: n = lane / 4 and c = lane % 4 as in the fragment maps; m = tile of 8 query rows; a thread owns query
// rows n + 8m and, of the output, dims 8j + 2c and the next one. Logit t of a thread belongs to token
// TokenOf(t, c).
#pragma once

#include <type_traits>

#include "kernels/cuda/attend/quad_decoder.h"
#include "kernels/format/page_order.h"

namespace kvtide::cuda {

constexpr float kMasked = -1e30f;
constexpr float kSlack = 12.0f;

// What a tile class keeps for its query rows over all pages of a unit: unnormalised output relative to
// 2^reference and this thread's part of the sum of weights.
template <int DV, int MT>
struct RowSums {
  float output[MT][DV / 8][2];
  float reference[MT], sum[MT];

  KVTIDE_DEVICE void Reset() {
#pragma unroll
    for (int m = 0; m < MT; m++) {
      reference[m] = kMasked;
      sum[m] = 0;
#pragma unroll
      for (int j = 0; j < DV / 8; j++) output[m][j][0] = output[m][j][1] = 0;
    }
  }

  // Moves the references up where a page needs it; returns nothing, later contributions use reference[].
  template <class W>
  KVTIDE_DEVICE void Raise(const float (&page_reference)[MT], const bool (&seen)[MT]) {
    float raised[MT];
    bool keep = true;
#pragma unroll
    for (int m = 0; m < MT; m++) {
      raised[m] = seen[m] && page_reference[m] > reference[m] + kSlack ? page_reference[m] : reference[m];
      keep = keep && raised[m] == reference[m];
    }
    if (W::All(keep)) return;
#pragma unroll
    for (int m = 0; m < MT; m++) {
      const float decay = W::Ex2(reference[m] - raised[m]);
      reference[m] = raised[m];
      sum[m] *= decay;
#pragma unroll
      for (int j = 0; j < DV / 8; j++) {
        output[m][j][0] *= decay;
        output[m][j][1] *= decay;
      }
    }
  }
};

template <class W, class KCodec, class VCodec, int DK, int DV, int MT>
struct CodedTile {
  using Shared = typename W::Shared;
  using KDecoder = QuadDecoder<W, KCodec>;
  using VDecoder = QuadDecoder<W, VCodec>;
  static constexpr int kTokens = kBlockTokens, kTilesPerPage = 1, kLogits = 16;
  static constexpr int kRows = 8 * MT;
  static constexpr int kKSteps = DK / 32, kVSteps = DV / 32;
  static constexpr int kKGroups = (DK + KCodec::kGroup - 1) / KCodec::kGroup;
  static constexpr int kVGroups = (DV + VCodec::kGroup - 1) / VCodec::kGroup;
  static constexpr int kKCodeBytes = static_cast<int>(CodePlaneBytes(KCodec::kBits, DK));
  static constexpr int kVCodeBytes = static_cast<int>(CodePlaneBytes(VCodec::kBits, DV));
  static constexpr int kKBytes = kKCodeBytes + kKGroups * kBlockTokens * 2;
  static constexpr int kVBytes = kVCodeBytes + kVGroups * kBlockTokens * 2;
  static constexpr int kKPieceOffset(int) { return 0; }
  static constexpr int kVPieceOffset(int) { return kKBytes; }
  static constexpr float kKUnit = KCodec::kLevelUnit, kVUnit = VCodec::kLevelUnit;

  // The query area in shared memory (query_row.h writes it): fragments, then the start values of the sums.
  static constexpr int kQueryFragmentBytes = MT * kKSteps * 512;
  static constexpr int kQueryBytes = kQueryFragmentBytes + kRows * kKGroups * 8;

  // q4_0 and q5_0 have scales of either sign: weights are then signed.
  static constexpr bool kSignedWeights = VCodec::kGroup == 32 && VCodec::kBits < 8;
  static constexpr float kCeiling = kSignedWeights ? 30000.0f : 60000.0f;
  static constexpr float kLog2Ceiling = kSignedWeights ? 14.87267488f : 15.87267488f;
  // Adding it leaves the rounded integer in the low 16 bits (plus 128 when signed, which balances the low
  // byte).
  static constexpr float kMagic = kSignedWeights ? 12582912.0f + 128.0f : 8388608.0f;

  RowSums<DV, MT> rows;
  Shared query;
  uint32_t slot_offset, lane_offset;  // of this lane in a plane of codes and in a query fragment
  KDecoder k_decoder;
  VDecoder v_decoder;

  static KVTIDE_DEVICE int TokenOf(int t, int c) { return t / 8 * 32 + 8 * c + t % 8; }

  static constexpr int kTableBytes = 2 * KDecoder::kTableBytes;
  static KVTIDE_DEVICE void WriteTables(Shared area) {
    KDecoder::WriteTables(area);
    VDecoder::WriteTables(area + KDecoder::kTableBytes);
  }
  KVTIDE_DEVICE void Init(Shared tables) {
    slot_offset = W::template Kept<MT == 1>(SlotOffset());
    lane_offset = W::template Kept<MT == 1>(16 * W::Lane());
    k_decoder.Init(tables);
    if constexpr (std::is_same_v<KDecoder, VDecoder>) {
      v_decoder = k_decoder;
    } else {
      v_decoder.Init(tables + KDecoder::kTableBytes);
    }
  }

  KVTIDE_DEVICE void LoadQuery(Shared query_area) { query = query_area; }

  static KVTIDE_DEVICE int SlotOffset() {
    const int lane = W::Lane(), n = lane >> 2, c = lane & 3;
    return (8 * c + (n ^ (2 * c))) * 16;
  }

  // Loads the 16-byte slots that begin inside quad `quad` of a lane's words.
  template <int kBits, int kSlots>
  static KVTIDE_DEVICE void LoadSlots(Shared lane_slots, int quad, uint32_t (&words)[4 * kSlots]) {
#pragma unroll
    for (int x = 0; x < kSlots; x++)
      if (4 * x >= quad * kBits && 4 * x < (quad + 1) * kBits)
        W::Load128(lane_slots + x * 512, &words[4 * x]);
  }

  static KVTIDE_DEVICE void LoadScales(Shared address, float* f) {
    uint32_t w[4];
    W::Load128(address, w);
#pragma unroll
    for (int i = 0; i < 4; i++) W::HalfPair(w[i], f[2 * i], f[2 * i + 1]);
  }

  // y: integer products times K scales.
  KVTIDE_DEVICE void KeyStage(Shared k_half, int /*tile*/, float (&y)[MT][kLogits]) {
    constexpr int kSlots = LaneWords(KCodec::kBits, DK) / 4;
    const int lane = W::Lane(), c = lane & 3;
    const Shared lane_slots = k_half + slot_offset;
    uint32_t words[4 * kSlots];
#pragma unroll
    for (int group32 = 0; group32 < 2; group32++) {
      int acc[MT][4][4];
#pragma unroll
      for (int s = 0; s < kKSteps; s++) {
        const int group = s * 32 / KCodec::kGroup;
        const bool first = s * 32 % KCodec::kGroup == 0;
        const bool last = s + 1 == kKSteps || (s + 1) * 32 % KCodec::kGroup == 0;
        const int quad = group32 * kKSteps + s;
        LoadSlots<KCodec::kBits, kSlots>(lane_slots, quad, words);
        uint32_t b[4][2];
        k_decoder.Decode(&words[quad * KCodec::kBits], b);
#pragma unroll
        for (int m = 0; m < MT; m++) {
          uint32_t a[4];
          W::Load128(query + (m * kKSteps + s) * 512 + lane_offset, a);
          if (first) {
            uint32_t start[2] = {0, 0};  // of the high and of the low part
            if constexpr (KDecoder::kOffset != 0)
              W::Load64(query + kQueryFragmentBytes + ((8 * m + (lane >> 2)) * kKGroups + group) * 8, start);
#pragma unroll
            for (int i = 0; i < 4; i++) {
              acc[m][i][0] = acc[m][i][1] = static_cast<int>(start[0]);
              acc[m][i][2] = acc[m][i][3] = static_cast<int>(start[1]);
            }
          }
#pragma unroll
          for (int i = 0; i < 4; i++) W::template MmaBytes<true>(acc[m][i], a, b[i][0], b[i][1], acc[m][i]);
        }
        if (!last) continue;
        float scales[8];
        LoadScales(k_half + kKCodeBytes + (group * kBlockTokens + group32 * 32 + 8 * c) * 2, scales);
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
          for (int i = 0; i < 4; i++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
              const float product = W::ToFloat(acc[m][i][e] * 256 + acc[m][i][2 + e]);
              float& logit = y[m][group32 * 8 + i * 2 + e];
              logit = group == 0 ? product * scales[i * 2 + e] : W::Fma(product, scales[i * 2 + e], logit);
            }
      }
    }
  }

  // A fragments of 16 weights (two groups of 8 tokens): high bytes in rows 0-7, low bytes in rows 8-15.
  // Tokens are in the order of the decoder's codes.
  static KVTIDE_DEVICE void PackWeights(const uint32_t (&bits)[16], uint32_t (&a)[2][4]) {
#pragma unroll
    for (int group32 = 0; group32 < 2; group32++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        constexpr int kStride = VDecoder::kInterleaved ? 2 : 1;
        const uint32_t* w = &bits[group32 * 8 + h * (VDecoder::kInterleaved ? 1 : 4)];
        const uint32_t low = W::Prmt(w[0], w[kStride], 0x5410u),
                       high = W::Prmt(w[2 * kStride], w[3 * kStride], 0x5410u);
        a[group32][2 * h] = W::Prmt(low, high, 0x7531u);
        a[group32][2 * h + 1] = W::Prmt(low, high, 0x6420u);
        if constexpr (kSignedWeights) a[group32][2 * h + 1] ^= 0x80808080u;
      }
  }

  // Softmax weights of a page before V scales: 2^(logit - page_reference), and this thread's part of their
  // sum. seen: rows that see a token.
  static KVTIDE_DEVICE void Weigh(const float (&y)[MT][kLogits], const float (&factor)[MT], float shift,
                                  float (&page_reference)[MT], bool (&seen)[MT], float (&weight)[MT][kLogits],
                                  float (&page_sum)[MT]) {
#pragma unroll
    for (int m = 0; m < MT; m++) {
      float top = y[m][0];
#pragma unroll
      for (int t = 1; t < kLogits; t++) top = W::Max(top, y[m][t]);
      top = W::Max(top, W::ShflXor(top, 1));
      top = W::Max(top, W::ShflXor(top, 2));
      seen[m] = top > 0.5f * kMasked;
      page_reference[m] = W::Fma(seen[m] ? top : 0.0f, factor[m], shift);
      page_sum[m] = 0;
#pragma unroll
      for (int t = 0; t < kLogits; t++) {
        weight[m][t] = W::Ex2(W::Fma(y[m][t], factor[m], -page_reference[m]));
        page_sum[m] += weight[m][t];
      }
    }
  }

  // Adds the page. multiplier[m]: base-2 logit per unit of y. special: adjust(y, multiplier) has to be called
  // first, for masks and soft-cap. Such pages and those that raise a reference are weighed twice, so that all
  // others run without a branch from the first key to the weights, and meanwhile decode the first quad of V.
  template <class Adjust>
  KVTIDE_DEVICE void ValueStage(Shared v_half, int /*tile*/, float (&y)[MT][kLogits],
                                const float (&multiplier)[MT], bool special, const Adjust& adjust) {
    constexpr int kSlots = LaneWords(VCodec::kBits, DV) / 4;
    const int c = W::Lane() & 3;
    const Shared lane_slots = v_half + slot_offset;

    float inverse = 1, shift = 0, v_scales[16];
    if constexpr (kVGroups == 1)  // the reference takes the largest V scale in: one FMA less for each weight
      shift = W::Lg2(LoadValueScales(v_half, c, 0, v_scales)) - kLog2Ceiling;
    float page_reference[MT], page_sum[MT], weight[MT][kLogits];
    bool seen[MT];
    Weigh(y, multiplier, shift, page_reference, seen, weight, page_sum);
    uint32_t words[4 * kSlots], first_quad[4][2];
    LoadSlots<VCodec::kBits, kSlots>(lane_slots, 0, words);
    v_decoder.Decode(words, first_quad);
    bool plain = !special;
#pragma unroll
    for (int m = 0; m < MT; m++) plain = plain && page_reference[m] <= rows.reference[m] + kSlack;
    if (!W::All(plain)) {
      float factor[MT];
#pragma unroll
      for (int m = 0; m < MT; m++) factor[m] = multiplier[m];
      if (special) adjust(y, factor);
      Weigh(y, factor, shift, page_reference, seen, weight, page_sum);
      rows.template Raise<W>(page_reference, seen);
#pragma unroll
      for (int m = 0; m < MT; m++)  // weights are 0
        if (!seen[m]) page_reference[m] = rows.reference[m];
    }
    float gain[MT];
#pragma unroll
    for (int m = 0; m < MT; m++) {
      gain[m] = W::Ex2(page_reference[m] - rows.reference[m]);
      rows.sum[m] = W::Fma(page_sum[m], gain[m], rows.sum[m]);
    }

    uint32_t weights[MT][2][4];
    float group_gain[MT] = {};
    int start[MT][4] = {};  // of the sums: takes the offset of the tables back
#pragma unroll
    for (int step = 0; step < kVSteps; step++) {
      const int group = step * 32 / VCodec::kGroup;
      if (step * 32 % VCodec::kGroup == 0) {
        if constexpr (kVGroups > 1) {
          const float largest = LoadValueScales(v_half, c, group, v_scales);
          inverse = kCeiling * W::Rcp(largest);
#pragma unroll
          for (int t = 0; t < 16; t++) v_scales[t] *= inverse;
          inverse = largest * (1.0f / kCeiling);
        }
#pragma unroll
        for (int m = 0; m < MT; m++) {
          uint32_t bits[16];
#pragma unroll
          for (int t = 0; t < 16; t++) bits[t] = W::Bits(W::Fma(weight[m][t], v_scales[t], kMagic));
          PackWeights(bits, weights[m]);
          group_gain[m] = gain[m] * inverse;
          start[m][0] = start[m][1] = start[m][2] = start[m][3] = 0;
          if constexpr (VDecoder::kOffset != 0) {  // 0xc0 is -64
            W::template MmaBytes<kSignedWeights>(start[m], weights[m][0], 0xc0c0c0c0u, 0xc0c0c0c0u, start[m]);
            W::template MmaBytes<kSignedWeights>(start[m], weights[m][1], 0xc0c0c0c0u, 0xc0c0c0c0u, start[m]);
          }
        }
      }
      int acc[MT][4][4];
#pragma unroll
      for (int group32 = 0; group32 < 2; group32++) {
        const int quad = 2 * step + group32;
        uint32_t decoded[4][2];
        if (quad > 0) {
          LoadSlots<VCodec::kBits, kSlots>(lane_slots, quad, words);
          v_decoder.Decode(&words[quad * VCodec::kBits], decoded);
        }
        const auto& b = quad > 0 ? decoded : first_quad;
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
          for (int i = 0; i < 4; i++)
            W::template MmaBytes<kSignedWeights>(acc[m][i], weights[m][group32], b[i][0], b[i][1],
                                                 group32 == 0 ? start[m] : acc[m][i]);
      }
#pragma unroll
      for (int m = 0; m < MT; m++)
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            float& o = rows.output[m][4 * step + i][e];
            o = W::Fma(W::ToFloat(acc[m][i][e] * 256 + acc[m][i][2 + e]), group_gain[m], o);
          }
    }
  }

  // The V scales of this thread's 16 tokens in one group; returns the largest magnitude on the page, never 0.
  static KVTIDE_DEVICE float LoadValueScales(Shared v_half, int c, int group, float (&scales)[16]) {
    uint32_t w[8];
    const Shared row = v_half + kVCodeBytes + group * kBlockTokens * 2 + 16 * c;
    W::Load128(row, w);
    W::Load128(row + 64, w + 4);
    uint32_t top = kSignedWeights ? W::HalfAbs(w[0]) : w[0];
#pragma unroll
    for (int i = 1; i < 8; i++) top = W::HalfMax(top, kSignedWeights ? W::HalfAbs(w[i]) : w[i]);
    top = W::HalfMax(top, W::ShflXor(top, 1));
    top = W::HalfMax(top, W::ShflXor(top, 2));
#pragma unroll
    for (int i = 0; i < 8; i++) W::HalfPair(w[i], scales[2 * i], scales[2 * i + 1]);
    float low, high;
    W::HalfPair(top, low, high);
    return W::Max(W::Max(low, high), 1e-20f);
  }
};

}  // namespace kvtide::cuda
