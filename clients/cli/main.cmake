# The command itself.
kvtide_add_executable(kvtide main.cc)
target_compile_definitions(kvtide PRIVATE KVTIDE_VERSION="${PROJECT_VERSION}")
target_link_libraries(kvtide PRIVATE kvtide_cli_connect kvtide_cli_engine kvtide_cli_ops kvtide_cli_plan CLI11::CLI11)
# Commands that start a daemon of their own look for it beside themselves and in the build tree.
add_dependencies(kvtide kvtided)
install(TARGETS kvtide RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
