// A client that appends to a sequence of the small model until it is killed: `appender ADDRESS
// [session|register]`; register: it makes the model known first, and looks a block up now and then, and one
// that is not there.
#include <array>
#include <cstdio>
#include <memory>
#include <string>
#include <string_view>

#include "clients/cpp/block_store.h"
#include "tests/e2e/test_daemon.h"

int main(int argc, char** argv) {
  kvtide::client::ClientOptions options;
  options.session = argc > 2 && std::string(argv[2]) == "session";
  auto client = kvtide::Client::Connect(argv[1], options);
  if (!client.ok()) return std::fprintf(stderr, "%s\n", client.status().ToString().c_str()), 1;
  std::unique_ptr<kvtide::client::BlockStore> store;
  constexpr std::array<std::string_view, 2> kKeys = {"there", "not there"};
  if (argc > 2 && std::string(argv[2]) == "register") {
    if (!(*client)->RegisterModel(kvtide::e2e::SmallModel()).ok()) return 1;
    kvtide::client::NamespaceSpec spec;
    spec.model = "small";
    spec.block_tokens = 64;
    spec.content = kvtide::client::OpaqueBlocks{4096, "zeros"};
    auto opened = kvtide::client::BlockStore::Open(**client, spec);
    const std::array<std::byte, 4096> zeros{};
    if (!opened.ok() || !(*opened)->Store(std::span(kKeys).first(1), zeros).ok()) return 1;
    store = *std::move(opened);
  }
  kvtide::client::SequenceOptions exact;
  exact.pair = "f16/f16";
  const auto sequence = (*client)->CreateSequence("small", exact);
  if (!sequence.ok()) return std::fprintf(stderr, "%s\n", sequence.status().ToString().c_str()), 1;
  constexpr int64_t kPiece = 20;
  for (int64_t start = 0;; start += kPiece) {
    if (store != nullptr && start % 200 == 0 && !store->Lookup(kKeys, -1).ok()) return 1;
    if (start == 10000) {  // begins again, so that it never ends by itself
      if (!(*client)->TruncateSequence(*sequence, 200).ok()) return 1;
      start = 200;
    }
    const auto length = (*client)->Append(*sequence, start, kvtide::e2e::Tokens(1, start, kPiece).layers);
    if (!length.ok()) return std::fprintf(stderr, "%s\n", length.status().ToString().c_str()), 1;
  }
}
