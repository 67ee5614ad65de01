# The command itself.
kvtide_add_executable(kvtide completion/completion.cc main.cc)
target_compile_definitions(kvtide PRIVATE KVTIDE_VERSION="${PROJECT_VERSION}")
target_link_libraries(kvtide PRIVATE kvtide_cli_connect kvtide_cli_engine kvtide_cli_ops kvtide_cli_plan CLI11::CLI11)
# Commands that start a daemon of their own look for it beside themselves and in the build tree.
add_dependencies(kvtide kvtided)
# Completions are what the program itself says of its options.
if(NOT CMAKE_CROSSCOMPILING)
  add_custom_command(TARGET kvtide POST_BUILD
    COMMAND kvtide completion bash > ${CMAKE_CURRENT_BINARY_DIR}/kvtide.bash
    COMMAND kvtide completion zsh > ${CMAKE_CURRENT_BINARY_DIR}/_kvtide
    COMMAND kvtide completion fish > ${CMAKE_CURRENT_BINARY_DIR}/kvtide.fish VERBATIM)
  install(FILES ${CMAKE_CURRENT_BINARY_DIR}/kvtide.bash DESTINATION ${CMAKE_INSTALL_DATADIR}/bash-completion/completions RENAME kvtide)
  install(FILES ${CMAKE_CURRENT_BINARY_DIR}/_kvtide DESTINATION ${CMAKE_INSTALL_DATADIR}/zsh/vendor-completions)
  install(FILES ${CMAKE_CURRENT_BINARY_DIR}/kvtide.fish DESTINATION ${CMAKE_INSTALL_DATADIR}/fish/vendor_completions.d)
endif()
install(TARGETS kvtide RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
