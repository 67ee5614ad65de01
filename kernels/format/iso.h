// Cache types iso3 and iso4: groups of 4 channels, read as quaternions (w, x, y, z), are multiplied from the
// left by fixed unit quaternions, then Lloyd-Max levels and one scale for 128 values. After IsoQuant (fast
// mode) of scrya-com/rotorquant. The quaternions are 32 rows of 4 standard normals, normalised: Box-Muller in
// blocks of 16 over u = (mt19937 & 0xffffff) / 2^24 seeded with 42 (radius from u[j], angle from u[j + 8], j
// < 8), which is the table of its CPU code. Its CUDA table is another one and not of unit length (0.787
// to 1.003); it is not used here. The 32 quaternions are used again in every 128 channels. Keys are equalised
// per channel, as for planar (planar.h).
#pragma once

#include "kernels/format/codebook.h"

namespace kvtide {

struct Quaternions {
  // Part 0..3 of quaternion g, 0..31.
  static KVTIDE_HD float Entry(int g, int part) {
    // clang-format off
    const float table[128] = {
        0.576560915f, 0.44501695f, 0.269507617f, -0.630002439f, 0.317657977f, -0.578054905f, -0.0201655999f, -0.751358271f,
        -0.323423892f, 0.708962739f, -0.168768644f, -0.603561103f, -0.51274389f, -0.394081175f, -0.541595697f, 0.53709203f,
        0.923390627f, -0.0897334069f, -0.279661089f, 0.247158512f, -0.332357109f, 0.472723663f, 0.351062924f, 0.736767232f,
        0.546860814f, 0.55425638f, 0.260991216f, 0.570637047f, -0.250051916f, 0.0450818017f, -0.271590322f, 0.928267419f,
        -0.5812217f, -0.365704328f, -0.093758598f, 0.72086823f, 0.322882771f, -0.429847836f, 0.309558153f, -0.784315825f,
        -0.729983151f, 0.466622055f, -0.412326843f, -0.281735867f, -0.453549385f, 0.755630612f, -0.439489543f, -0.173678741f,
        -0.733815849f, -0.52849555f, 0.0626545027f, 0.422233552f, -0.288465291f, 0.704250991f, -0.481182247f, -0.435065508f,
        -0.900019884f, 0.0230922122f, -0.0407132879f, 0.433328241f, -0.0377033688f, 0.711068809f, -0.456624895f, 0.533341646f,
        0.51044035f, 0.302496254f, 0.783453703f, 0.184788987f, 0.203398988f, -0.115786567f, -0.618792653f, 0.749878645f,
        -0.246253461f, 0.749081135f, 0.080976069f, 0.609655261f, 0.231406942f, -0.258257627f, -0.887950242f, -0.302155882f,
        0.00723749073f, -0.225580543f, -0.892805874f, -0.389818817f, 0.392337173f, 0.383874536f, 0.835035264f, 0.0377884693f,
        0.495807081f, -0.320952058f, -0.699416995f, 0.402468622f, -0.723503709f, -0.34773013f, 0.560683548f, 0.20312573f,
        -0.938361883f, 0.182471976f, 0.293370515f, 0.0107116811f, 0.443037897f, 0.403275162f, 0.737705946f, -0.311249912f,
        -0.207570314f, 0.843378246f, 0.45348382f, 0.199950278f, 0.19837366f, 0.953393579f, -0.000981719582f, -0.227349192f,
        -0.883457959f, -0.0620501526f, -0.363291621f, 0.289259344f, 0.738957345f, 0.0927560627f, -0.395912349f, 0.537207425f,
        -0.0156171722f, 0.296495616f, 0.163165495f, 0.940863132f, 0.773866832f, 0.240208223f, 0.508816481f, 0.290750593f};
    // clang-format on
    return table[4 * g + part];
  }
  // v = (w, x, y, z) * v, the Hamilton product.
  static KVTIDE_HD void MultiplyLeft(float w, float x, float y, float z, float* v) {
    const float a = v[0], b = v[1], c = v[2], d = v[3];
    v[0] = Mul(w, a) - Mul(x, b) - Mul(y, c) - Mul(z, d);
    v[1] = Mul(w, b) + Mul(x, a) + Mul(y, d) - Mul(z, c);
    v[2] = Mul(w, c) - Mul(x, d) + Mul(y, a) + Mul(z, b);
    v[3] = Mul(w, d) + Mul(x, c) - Mul(y, b) + Mul(z, a);
  }
  static KVTIDE_HD void Forward(float* x, int stored_dim) {
    for (int i = 0; i < stored_dim; i += 4) {
      const int g = i / 4 % 32;
      MultiplyLeft(Entry(g, 0), Entry(g, 1), Entry(g, 2), Entry(g, 3), x + i);
    }
  }
  static KVTIDE_HD void Inverse(float* y, int stored_dim) {
    for (int i = 0; i < stored_dim; i += 4) {
      const int g = i / 4 % 32;
      MultiplyLeft(Entry(g, 0), -Entry(g, 1), -Entry(g, 2), -Entry(g, 3), y + i);
    }
  }
};

struct Iso3 : CodebookCodec<3, Quaternions> {
  static constexpr char kName[] = "iso3";
  static constexpr Equalise kKeys = Equalise::kFull;
};
struct Iso4 : CodebookCodec<4, Quaternions> {
  static constexpr char kName[] = "iso4";
  static constexpr Equalise kKeys = Equalise::kFull;
};

}  // namespace kvtide
