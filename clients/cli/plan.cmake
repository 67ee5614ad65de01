# The planning commands, which need neither the daemon nor the engine.
find_package(CLI11 CONFIG REQUIRED)
kvtide_add_library(kvtide_cli_plan
  plan/fleet_command.cc
  plan/plan_command.cc
  plan/plan_device.cc
  plan/plan_flags.cc
  plan/plan_io.cc
)
target_link_libraries(kvtide_cli_plan PUBLIC kvtide_cli_terminal kvtide_key_profile kvtide_planner CLI11::CLI11 PRIVATE absl::cleanup ${CMAKE_DL_LIBS})
