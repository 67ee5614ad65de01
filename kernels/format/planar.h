// Cache types planar3 and planar4: neighbouring channels (2p, 2p+1) are turned by fixed random angles (Givens
// rotations), then Lloyd-Max levels and one scale for 128 values. After PlanarQuant of scrya-com/rotorquant;
// the angles are those of its CUDA table (its CPU table differs, so that blocks written by one were misread
// by the other): angle p is 2 pi u_p, u_p = (s >> 11) / 2^53, s = 6364136223846793005 s + 1442695040888963407
// mod 2^64, from s = 42. The 64 pairs are used again in every 128 channels. The 4-bit levels are the correct
// ones (see codebook.h).
//
// pq3 and pq4 (PairQuant) are Givens pairs, Lloyd-Max levels, an f16 scale and an inverse rotation that runs
// once per output instead of once per value. kvtide takes every inverse back that late, so in its layout they
// are planar3 and planar4 under another name: the same bytes.
//
// Pairs mix only two channels, so outlier channels stay outliers and a table made for N(0,1) clips them: keys
// are equalised per channel by the profile.
#pragma once

#include "kernels/format/codebook.h"

namespace kvtide {

struct GivensPairs {
  // Cosine (part 0) or sine (part 1) of pair p, 0..63.
  static KVTIDE_HD float Entry(int p, int part) {
    // clang-format off
    const float table[128] = {
        -0.909505367f, -0.41569224f, 0.153557852f, 0.988139689f, -0.853748918f, 0.520684898f, -0.682721794f, -0.730678439f,
        -0.424938798f, -0.905222058f, 0.98645103f, 0.164056137f, 0.990667403f, 0.136301547f, 0.57523632f, 0.817987263f,
        -0.986645877f, 0.162879899f, 0.98788482f, 0.155188933f, -0.621568382f, 0.783359885f, -0.983559787f, -0.180582881f,
        0.877726376f, -0.479162186f, -0.462464005f, 0.886638045f, 0.284313589f, -0.958731353f, -0.773996055f, 0.633190393f,
        0.238523424f, -0.971136749f, 0.91219151f, 0.409764171f, -0.881500423f, 0.472183287f, -0.263969958f, -0.964530885f,
        -0.551708758f, 0.834036827f, -0.903529465f, 0.428525984f, -0.852054298f, 0.523453355f, -0.560063601f, 0.828449607f,
        -0.76672864f, 0.64197135f, -0.987794936f, -0.155759946f, -0.978194952f, -0.207688674f, -0.995337307f, 0.0964556485f,
        -0.862205386f, 0.506558836f, -0.738211811f, -0.674569011f, 0.913603783f, -0.406605661f, -0.255850464f, -0.966716349f,
        -0.854100049f, 0.520108759f, -0.615933537f, -0.787798107f, 0.986125648f, 0.1660005f, -0.675856054f, -0.737033665f,
        0.424957156f, 0.905213475f, -0.621954501f, 0.783053398f, 0.913057327f, -0.407831192f, -0.594816089f, -0.803861797f,
        0.575978279f, 0.817465007f, 0.972990096f, -0.230846763f, 0.653599858f, -0.756840289f, 0.922219574f, -0.386666656f,
        -0.766808391f, 0.641876042f, 0.511617839f, -0.859213114f, -0.784878671f, 0.61964947f, 0.990211129f, 0.139577821f,
        0.199716777f, 0.97985369f, 0.717300296f, 0.696764112f, -0.999999821f, -0.000631460513f, -0.955786884f, 0.29406029f,
        0.559485257f, 0.828840315f, -0.998011172f, -0.0630371273f, 0.978239834f, 0.207477197f, -0.915000439f, 0.403452843f,
        -0.408475429f, 0.912769318f, 0.00715491828f, -0.99997443f, 0.955848277f, 0.293860644f, -0.0971921682f, 0.995265663f,
        -0.946933389f, 0.321429819f, 0.999949217f, 0.0100754015f, 0.610058904f, -0.792356074f, 0.0350818932f, -0.999384463f};
    // clang-format on
    return table[2 * p + part];
  }
  static KVTIDE_HD void Forward(float* x, int stored_dim) {
    for (int i = 0; i < stored_dim; i += 2) {
      const float c = Entry(i / 2 % 64, 0), s = Entry(i / 2 % 64, 1), a = x[i], b = x[i + 1];
      x[i] = Mul(c, a) - Mul(s, b);
      x[i + 1] = Mul(s, a) + Mul(c, b);
    }
  }
  static KVTIDE_HD void Inverse(float* y, int stored_dim) {
    for (int i = 0; i < stored_dim; i += 2) {
      const float c = Entry(i / 2 % 64, 0), s = Entry(i / 2 % 64, 1), a = y[i], b = y[i + 1];
      y[i] = Mul(c, a) + Mul(s, b);
      y[i + 1] = Mul(c, b) - Mul(s, a);
    }
  }
};

struct Planar3 : CodebookCodec<3, GivensPairs> {
  static constexpr char kName[] = "planar3";
  static constexpr Equalise kKeys = Equalise::kFull;
};
struct Planar4 : CodebookCodec<4, GivensPairs> {
  static constexpr char kName[] = "planar4";
  static constexpr Equalise kKeys = Equalise::kFull;
};
struct Pq3 : Planar3 {
  static constexpr char kName[] = "pq3";
  static constexpr const char* kAliasOf = Planar3::kName;
};
struct Pq4 : Planar4 {
  static constexpr char kName[] = "pq4";
  static constexpr const char* kAliasOf = Planar4::kName;
};

}  // namespace kvtide
