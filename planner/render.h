// A plan as text: a table for people, JSON (schema "kvtide.plan/1", documented in README.md; sizes in bytes),
// CSV with one line per context and pair. Pure functions of the plan.
#pragma once

#include <string>

#include "planner/plan.h"

namespace kvtide::planner {

struct TableStyle {
  bool color = false;
  bool all_pairs = true;  // otherwise only those that fit or were measured
};

std::string RenderTable(const PlanRequest& request, const Plan& plan, const TableStyle& style);
std::string RenderJson(const PlanRequest& request, const Plan& plan);
std::string RenderCsv(const PlanRequest& request, const Plan& plan);

// What others published about pairs of this plan.
std::vector<Claim> ClaimsAbout(const Plan& plan);

}  // namespace kvtide::planner
