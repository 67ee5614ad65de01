// Cache types rotor3 and rotor4: groups of 3 channels are turned by fixed rotors of Cl(3,0), y = R v R~, then
// Lloyd-Max levels and one scale for 128 values. After RotorQuant of scrya-com/rotorquant, which never packed
// it and spent bits on the trivector part; a sandwich product of a vector has none, so here a value is 3 or 4
// bits like in the other types. Of every 128 channels 42 groups are turned and the last 2 are left alone (64:
// 21 and 1, 32: 10 and 2, 96: all). The rotors are uniform random rotations, scalar first, then the parts of
// e23, e31, e12; made like the quaternions of iso.h from seed 43, in kvtide's own table, as no other
// bit-packed form exists to be compatible with. Keys are equalised per channel, as for planar (planar.h).
#pragma once

#include "kernels/format/codebook.h"

namespace kvtide {

struct Rotors {
  // Part 0..3 of rotor g, 0..41.
  static KVTIDE_HD float Entry(int g, int part) {
    // clang-format off
    const float table[168] = {
        -0.00744912215f, -0.209425569f, 0.938072085f, 0.275873512f, -0.379999578f, -0.280050725f, -0.878915012f, -0.0684124827f,
        -0.681251168f, -0.290260881f, -0.520278394f, 0.425389111f, -0.139437556f, -0.18229796f, -0.642715812f, -0.730917871f,
        0.354514956f, 0.20838134f, -0.877158046f, -0.247971967f, 0.232280359f, -0.222033575f, -0.577353358f, -0.750606418f,
        0.596376836f, -0.52543509f, -0.561456323f, 0.230259567f, -0.145316422f, 0.633402467f, -0.177323103f, 0.739081204f,
        -0.458604693f, 0.672009706f, -0.491063148f, -0.311354637f, -0.49983266f, -0.288419724f, -0.750541747f, 0.321975857f,
        0.471583515f, -0.413777441f, -0.753992319f, 0.194660768f, -0.512960851f, -0.44840762f, 0.715860069f, 0.15279448f,
        -0.0529700108f, -0.685465753f, 0.285498112f, 0.66769886f, -0.111503303f, 0.424290985f, 0.776475787f, 0.452359915f,
        0.303649962f, 0.587870121f, 0.561983287f, 0.496367007f, 0.186354861f, -0.903832197f, 0.214728534f, -0.319766849f,
        0.545226276f, -0.117304355f, -0.701720595f, -0.44334662f, -0.337424904f, -0.266051233f, -0.254752547f, 0.866292298f,
        -0.0110968091f, -0.541469753f, 0.616693676f, -0.571293533f, -0.403136373f, 0.605908096f, 0.680214405f, 0.0875487924f,
        0.894705355f, 0.266510576f, -0.352384627f, -0.0655709207f, -0.347714901f, -0.757420659f, 0.137602299f, 0.535232604f,
        -0.753733099f, 0.186499044f, -0.419475436f, -0.470260501f, -0.669506967f, -0.29327023f, -0.134751171f, -0.669025481f,
        -0.724260688f, -0.511397779f, -0.110395864f, -0.449145317f, 0.315162122f, -0.270853579f, 0.353851825f, 0.837914109f,
        -0.13442935f, -0.79450649f, 0.541489065f, 0.239745229f, 0.200234145f, -0.619402409f, 0.756378293f, -0.0643338487f,
        0.05287138f, 0.240976378f, 0.96593225f, -0.0781661049f, -0.0425012335f, -0.112333357f, -0.185064629f, 0.97535938f,
        -0.507536471f, -0.658990204f, -0.0374466032f, -0.553837836f, -0.125360936f, 0.161536276f, 0.28035444f, -0.937865674f,
        -0.925061762f, 0.249243975f, -0.256601691f, -0.127646953f, -0.930481791f, 0.300510287f, 0.123644523f, 0.169142798f,
        0.491309404f, -0.10308259f, 0.721124053f, -0.477461189f, -0.547899723f, -0.336817801f, -0.535267472f, 0.547584176f,
        -0.416992784f, -0.311870992f, 0.252638936f, -0.815491915f, -0.497354448f, 0.16589281f, 0.182823703f, -0.831681192f,
        -0.321429968f, 0.621071219f, -0.513156533f, 0.49761796f, 0.798552394f, 0.0433097482f, -0.215660781f, 0.560293436f,
        0.178491399f, 0.343085825f, -0.556510091f, -0.735343099f, -0.394321948f, 0.895504355f, 0.200358957f, -0.0493807979f};
    // clang-format on
    return table[4 * g + part];
  }
  // v = R v R~ with R = w + x e23 + y e31 + z e12, written as v + w t + u x t with u = (x, y, z), t = 2 u x
  // v.
  static KVTIDE_HD void Sandwich(float w, float x, float y, float z, float* v) {
    const float t0 = 2.0f * (Mul(y, v[2]) - Mul(z, v[1]));
    const float t1 = 2.0f * (Mul(z, v[0]) - Mul(x, v[2]));
    const float t2 = 2.0f * (Mul(x, v[1]) - Mul(y, v[0]));
    v[0] = v[0] + Mul(w, t0) + (Mul(y, t2) - Mul(z, t1));
    v[1] = v[1] + Mul(w, t1) + (Mul(z, t0) - Mul(x, t2));
    v[2] = v[2] + Mul(w, t2) + (Mul(x, t1) - Mul(y, t0));
  }
  // direction 1: forward, -1: back.
  static KVTIDE_HD void Turn(float* x, int stored_dim, float direction) {
    for (int run = 0; run < stored_dim; run += 128) {
      const int n = stored_dim - run < 128 ? stored_dim - run : 128;
      for (int g = 0; g < n / 3; g++)
        Sandwich(Entry(g, 0), direction * Entry(g, 1), direction * Entry(g, 2), direction * Entry(g, 3),
                 x + run + 3 * g);
    }
  }
  static KVTIDE_HD void Forward(float* x, int stored_dim) { Turn(x, stored_dim, 1.0f); }
  static KVTIDE_HD void Inverse(float* y, int stored_dim) { Turn(y, stored_dim, -1.0f); }
};

struct Rotor3 : CodebookCodec<3, Rotors> {
  static constexpr char kName[] = "rotor3";
  static constexpr Equalise kKeys = Equalise::kFull;
};
struct Rotor4 : CodebookCodec<4, Rotors> {
  static constexpr char kName[] = "rotor4";
  static constexpr Equalise kKeys = Equalise::kFull;
};

}  // namespace kvtide
