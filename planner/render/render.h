// A plan as text: a table for people, JSON (schema "kvtide.plan/1", documented in README.md; sizes in bytes),
// CSV with one line per context and pair. Pure functions of the plan.
#pragma once

#include <string>

#include "planner/plan/plan.h"

namespace kvtide::planner {

struct TableStyle {
  bool color = false;
  // Every pair, the bill of every context and what others claim. Otherwise an answer of about 20 lines: a
  // line per context, and of the longest the choice and the measured pairs that no other beats on both harm
  // and bytes.
  bool full = true;
  bool every_pair = false;  // also in the short answer: somebody named them
  int devices = 1;          // several: sizes are labelled as those of one; RenderTable takes the request's
};

std::string RenderTable(const PlanRequest& request, const Plan& plan, const TableStyle& style);
std::string RenderJson(const PlanRequest& request, const Plan& plan);
std::string RenderCsv(const PlanRequest& request, const Plan& plan);

// What others published about pairs of this plan.
std::vector<Claim> ClaimsAbout(const Plan& plan);

}  // namespace kvtide::planner
