// The CSV files of this folder as text, built into the program.
#pragma once

namespace kvtide::planner {

extern const char kModelsCsv[];
extern const char kRefusedCsv[];
extern const char kFamiliesCsv[];
extern const char kGpusCsv[];
extern const char kWeightsCsv[];
extern const char kQualityCsv[];
extern const char kClaimsCsv[];

}  // namespace kvtide::planner
