// The example of clients/cpp/README.md: without a daemon it ends with the client's advice.
#include <cstdio>

#include "clients/cpp/client.h"

int main(int argc, char** argv) {
  const std::string address = argc > 1 ? argv[1] : kvtide::client::DefaultAddress();
  auto client = kvtide::Client::Connect(address, {.connect_timeout = absl::Milliseconds(100)});
  if (!client.ok()) {
    std::printf("%s\n", client.status().ToString().c_str());
    return 3;
  }
  kvtide::client::Model model{"my-model",
                              {{.kv_heads = 8, .head_dim_k = 128, .head_dim_v = 128, .query_heads = 32}}};
  if (!(*client)->RegisterModel(model).ok()) return 1;
  return (*client)->CreateSequence("my-model", {.pair = "q8_0/turbo4"}).ok() ? 0 : 1;
}
