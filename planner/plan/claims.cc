#include "kernels/base/check.h"
#include "planner/csv.h"
#include "planner/embedded.h"
#include "planner/plan/quality.h"

namespace kvtide::planner {

const std::vector<Claim>& PublishedClaims() {
  static const std::vector<Claim> claims = [] {
    absl::StatusOr<std::vector<CsvRow>> rows =
        ParseCsv(kClaimsCsv, "claims.csv", {"pair", "models", "claim", "verdict", "source"});
    KVTIDE_CHECK(rows.ok(), std::string(rows.status().message()));
    std::vector<Claim> list;
    for (const CsvRow& row : *rows) {
      list.push_back(
          {row.Text("pair"), row.Text("models"), row.Text("claim"), row.Text("verdict"), row.Text("source")});
    }
    return list;
  }();
  return claims;
}

}  // namespace kvtide::planner
