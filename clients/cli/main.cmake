# The command itself.
kvtide_add_executable(kvtide completion/completion.cc completion/manual.cc main.cc)
target_compile_definitions(kvtide PRIVATE KVTIDE_VERSION="${PROJECT_VERSION}")
target_link_libraries(kvtide PRIVATE kvtide_cli_bench kvtide_cli_connect kvtide_cli_engine kvtide_cli_ops kvtide_cli_plan kvtide_cli_replay kvtide_daemon CLI11::CLI11)
# Commands that start a daemon of their own look for it beside themselves and in the build tree.
add_dependencies(kvtide kvtided)
# Completions and manual pages are what the program itself says of its options and of those of kvtided.
if(NOT CMAKE_CROSSCOMPILING OR CMAKE_CROSSCOMPILING_EMULATOR)
  set(generated ${CMAKE_CURRENT_BINARY_DIR}/generated)
  file(MAKE_DIRECTORY ${generated})
  foreach(program kvtide kvtided)
    add_custom_command(TARGET kvtide POST_BUILD
      COMMAND kvtide completion bash ${program} > ${generated}/${program}.bash
      COMMAND kvtide completion zsh ${program} > ${generated}/_${program}
      COMMAND kvtide completion fish ${program} > ${generated}/${program}.fish VERBATIM)
    install(FILES ${generated}/${program}.bash DESTINATION ${CMAKE_INSTALL_DATADIR}/bash-completion/completions RENAME ${program})
    install(FILES ${generated}/_${program} DESTINATION ${CMAKE_INSTALL_DATADIR}/zsh/vendor-completions)
    install(FILES ${generated}/${program}.fish DESTINATION ${CMAKE_INSTALL_DATADIR}/fish/vendor_completions.d)
  endforeach()
  add_custom_command(TARGET kvtide POST_BUILD
    COMMAND kvtide manual kvtide > ${generated}/kvtide.1
    COMMAND kvtide manual kvtided > ${generated}/kvtided.8
    COMMAND gzip -9nf ${generated}/kvtide.1 ${generated}/kvtided.8 VERBATIM)
  install(FILES ${generated}/kvtide.1.gz DESTINATION ${CMAKE_INSTALL_MANDIR}/man1)
  install(FILES ${generated}/kvtided.8.gz DESTINATION ${CMAKE_INSTALL_MANDIR}/man8)
endif()
install(TARGETS kvtide RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
