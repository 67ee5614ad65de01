kvtide_add_test(kvtide_test_clients_replay
  LIBS kvtide_cli_replay nlohmann_json::nlohmann_json
  SOURCES replay_command_test.cc)
