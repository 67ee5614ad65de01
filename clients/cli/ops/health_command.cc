#include "clients/cli/ops/health_command.h"

#include <cstdio>
#include <memory>
#include <string>

#include "clients/cli/ops/daemon_flags.h"
#include "clients/cli/terminal/command_status.h"
#include "kernels/base/status.h"

namespace kvtide::cli {

void AddHealthCommand(CLI::App& app, int* exit_code) {
  auto flags = std::make_shared<DaemonFlags>();
  CLI::App* health = app.add_subcommand("health", "Whether a kvtided serves: exit code 0 or 1, for probes");
  health->footer(
      "Examples:\n"
      "  kvtide health && echo serving\n"
      "  kvtide health --address unix:/run/kvtide/kvtided.sock --timeout 2\n"
      "It asks the standard health service, which needs no token and no place in a quota.");
  flags->AddTo(health);
  health->callback([flags, exit_code] {
    const auto ask = [&]() -> absl::Status {
      KVTIDE_ASSIGN_OR_RETURN(const std::unique_ptr<client::Client> client, flags->Connect());
      return client->CheckHealth();
    };
    const absl::Status status = ask();
    if (status.ok()) {
      std::printf("serving\n");
    } else {
      SayFailed("kvtide health", status);
    }
    *exit_code = ExitCode(status);
  });
}

}  // namespace kvtide::cli
