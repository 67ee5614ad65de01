#include "kernels/cpu/page/code_table.h"

#include <vector>

#include "kernels/base/check.h"
#include "kernels/format/catalogue.h"
#include "kernels/format/tide.h"

namespace kvtide {
namespace {

template <class C>
CodeTable MakeTable() {
  CodeTable table;
  if constexpr (C::kStorage == Storage::kHalf) {
    table.bf16 = std::is_same_v<C, Bf16>;
  } else {
    table.bits = C::kBits;
    table.group = C::kGroup;
    table.unit = C::kLevelUnit;
    if constexpr (C::kBits == 8) {
      for (int i = 0; i < 256; i++)
        KVTIDE_CHECK(C::Level(i) == (i < 128 ? i : i - 256), C::kName,
                     ": an 8-bit level must be the code as a signed byte");
    } else {
      constexpr int kCodes = 1 << C::kBits;
      for (int i = 0; i < 32; i++) table.words[i] = static_cast<int16_t>(C::Level(i % kCodes));
      for (int i = 0; i < 32; i++) table.bytes[i] = static_cast<int8_t>(C::Level(i % kCodes));
    }
  }
  return table;
}

std::vector<CodeTable> MakeTables() {
  std::vector<CodeTable> tables;
  for (const CacheType type : AllCacheTypes())
    tables.push_back(VisitCodec(type, [](auto codec) { return MakeTable<decltype(codec)>(); }));
  CodeTable calibrated;
  calibrated.bits = 8;
  calibrated.group = kMaxTideDim;
  calibrated.unit = 1;
  calibrated.calibrated = true;
  tables.resize(kCacheTypes, calibrated);
  return tables;
}

}  // namespace

const CodeTable& CodeTableOf(CacheType type) {
  static const std::vector<CodeTable> kTables = MakeTables();
  return kTables[static_cast<size_t>(type)];
}

}  // namespace kvtide
