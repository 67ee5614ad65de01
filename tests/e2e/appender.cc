// A client that appends to a sequence of the small model until it is killed: `appender ADDRESS
// [session|register]`; register: it makes the model known first, and looks up now and then a block and
// one that is not there, and a prompt of which the first half is what it has appended.
#include <array>
#include <cstdio>
#include <memory>
#include <numeric>
#include <span>
#include <string>
#include <string_view>
#include <vector>

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
  constexpr int64_t kPiece = 20, kLongest = 10000;
  std::vector<kvtide::client::TokenId> ids(kLongest), prompt(256);
  std::iota(ids.begin(), ids.end(), 0);
  std::iota(prompt.begin(), prompt.begin() + 128, 0);
  for (int64_t start = 0;; start += kPiece) {
    if (store != nullptr && start % 200 == 0 &&
        (!store->Lookup(kKeys, -1).ok() || !(*client)->LookupPrefix("small", exact, prompt, -1).ok()))
      return 1;
    if (start == kLongest) {  // begins again, so that it never ends by itself
      if (!(*client)->TruncateSequence(*sequence, 200).ok()) return 1;
      start = 200;
    }
    const auto known = store == nullptr ? std::span<const kvtide::client::TokenId>()
                                        : std::span<const kvtide::client::TokenId>(ids).subspan(
                                              static_cast<size_t>(start), kPiece);
    const auto length =
        (*client)->Append(*sequence, start, kvtide::e2e::Tokens(1, start, kPiece).layers, known);
    if (!length.ok()) return std::fprintf(stderr, "%s\n", length.status().ToString().c_str()), 1;
  }
}
