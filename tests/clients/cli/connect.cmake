# kvtide connect.
kvtide_add_test(kvtide_test_clients_cli_connect
  LIBS kvtide_cli_connect
  SOURCES
    connect_plan_test.cc
)
