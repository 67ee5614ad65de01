#include "clients/cli/ops/seq_verbs.h"

#include <algorithm>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "clients/cli/ops/daemon_flags.h"
#include "clients/cli/ops/status_report.h"
#include "clients/cli/terminal/command_status.h"
#include "kernels/base/status.h"
#include "planner/units.h"

namespace kvtide::cli {
namespace {

struct Flags {
  DaemonFlags daemon;
  std::vector<client::SequenceId> ids;
  std::string model, tenant, output = "table", tier;
  size_t limit = 50;
  bool drop = false;
  std::string ttl = "10m", priority;
};

// What a verb prints.
using Run = std::function<absl::StatusOr<std::string>(client::Client&, const Flags&)>;

CLI::App* AddVerb(CLI::App* seq, const std::string& name, const std::string& help,
                  const std::shared_ptr<Flags>& flags, int* exit_code, Run run) {
  CLI::App* verb = seq->add_subcommand(name, help);
  flags->daemon.AddTo(verb);
  verb->callback([flags, exit_code, name, run = std::move(run)] {
    const auto call = [&]() -> absl::StatusOr<std::string> {
      KVTIDE_ASSIGN_OR_RETURN(const std::unique_ptr<client::Client> client, flags->daemon.Connect());
      return run(*client, *flags);
    };
    const absl::StatusOr<std::string> done = call();
    if (done.ok()) {
      Say(*done);
    } else {
      SayFailed("kvtide seq " + name, done.status());
    }
    *exit_code = ExitCode(done.status());
  });
  return verb;
}

absl::StatusOr<std::string> List(client::Client& client, const Flags& flags) {
  KVTIDE_ASSIGN_OR_RETURN(std::vector<client::SequenceInfo> all, client.ListSequences(flags.model));
  std::erase_if(all, [&](const client::SequenceInfo& info) {
    return !flags.tenant.empty() && info.tenant != flags.tenant;
  });
  if (flags.output == "json") return RenderSequencesJson(all);
  std::string text = RenderSequences(all, flags.limit, Terminal::Of(1));
  if (!text.empty() && text.front() == '\n') text.erase(0, 1);
  return text.empty() ? "no sequences\n" : text;
}

absl::StatusOr<std::string> Show(client::Client& client, const Flags& flags) {
  KVTIDE_ASSIGN_OR_RETURN(const client::SequenceInfo info, FindSequence(client, flags.ids.front()));
  return flags.output == "json" ? RenderSequencesJson({info}) : RenderSequence(info);
}

std::string MovedText(const char* verb, const client::MoveResult& moved) {
  std::string text =
      absl::StrCat(verb, " ", moved.blocks, " blocks (", planner::FormatBytes(moved.bytes), ")");
  if (moved.dropped_blocks > 0) absl::StrAppend(&text, ", dropped ", moved.dropped_blocks);
  if (moved.degraded_blocks > 0)
    absl::StrAppend(&text, ", recoded ", moved.degraded_blocks, " to fewer bits to make room");
  if (moved.blocks_left > 0)
    absl::StrAppend(&text, "; ", moved.blocks_left, " stayed: busy, or no room (kvtide status)");
  if (moved.shared_blocks > 0)
    absl::StrAppend(&text, "; ", moved.shared_blocks,
                    " stayed for forks: name all branches to move them too");
  return text + "\n";
}

}  // namespace

absl::StatusOr<client::SequenceInfo> FindSequence(client::Client& client, client::SequenceId id) {
  absl::StatusOr<client::SequenceInfo> info = client.GetSequence(id);
  if (!absl::IsNotFound(info.status())) return info;
  return absl::NotFoundError(absl::StrCat(info.status().message(), "; `kvtide seq list` lists what it has"));
}

namespace {

void AddOutput(CLI::App* verb, Flags* flags) {
  verb->add_option("--output", flags->output, "table or json")
      ->check(CLI::IsMember({"table", "json"}))
      ->capture_default_str();
}

void AddIds(CLI::App* verb, Flags* flags, bool several) {
  auto* option = verb->add_option(several ? "ids" : "id", flags->ids,
                                  several ? "Ids, as kvtide seq list shows them" : "The sequence's id")
                     ->required();
  if (!several) option->expected(1);
}

void AddList(CLI::App* seq, int* exit_code) {
  const auto flags = std::make_shared<Flags>();
  CLI::App* list =
      AddVerb(seq, "list", "The sequences of the daemon, longest idle first", flags, exit_code, List);
  list->footer(
      "Examples:\n"
      "  kvtide seq list --model tidelm-7m --limit 20\n"
      "  kvtide seq list --output json | jq -r '.[] | select(.idle_seconds > 3600) | .id'");
  list->add_option("--model", flags->model, "Of this model only");
  list->add_option("--tenant", flags->tenant, "Of this tenant only");
  list->add_option("--limit", flags->limit, "How many rows of the table")->capture_default_str();
  AddOutput(list, flags.get());
}

void AddShow(CLI::App* seq, int* exit_code) {
  const auto flags = std::make_shared<Flags>();
  CLI::App* show = AddVerb(seq, "show", "All that is known of one", flags, exit_code, Show);
  show->footer("Example:\n  kvtide seq show 8812934");
  AddIds(show, flags.get(), false);
  AddOutput(show, flags.get());
}

void AddFork(CLI::App* seq, int* exit_code) {
  const auto flags = std::make_shared<Flags>();
  CLI::App* fork =
      AddVerb(seq, "fork", "A copy that shares all blocks; prints its id", flags, exit_code,
              [](client::Client& client, const Flags& f) -> absl::StatusOr<std::string> {
                KVTIDE_ASSIGN_OR_RETURN(const client::SequenceId child, client.ForkSequence(f.ids.front()));
                return absl::StrCat(child, "\n");
              });
  fork->footer("Example:\n  kvtide seq fork 8812934");
  AddIds(fork, flags.get(), false);
}

void AddEvict(CLI::App* seq, int* exit_code) {
  const auto flags = std::make_shared<Flags>();
  CLI::App* evict = AddVerb(seq, "evict", "Move their blocks down a tier, or drop them", flags, exit_code,
                            [](client::Client& client, const Flags& f) -> absl::StatusOr<std::string> {
                              client::EvictOptions options;
                              options.tier = f.tier;
                              options.drop = f.drop;
                              KVTIDE_ASSIGN_OR_RETURN(const client::MoveResult moved,
                                                      client.EvictSequences(f.ids, options));
                              return MovedText("moved", moved);
                            });
  evict->footer("Examples:\n  kvtide seq evict 8812934 8812935\n  kvtide seq evict 8812934 --tier disk");
  AddIds(evict, flags.get(), true);
  evict->add_option("--tier", flags->tier, "Down to this tier (default: the next one)");
  evict->add_flag("--drop", flags->drop,
                  "Drop the blocks of sequences that were created so that they may be");
}

void AddPrefetch(CLI::App* seq, int* exit_code) {
  const auto flags = std::make_shared<Flags>();
  CLI::App* prefetch =
      AddVerb(seq, "prefetch", "Move their blocks up to the first tier", flags, exit_code,
              [](client::Client& client, const Flags& f) -> absl::StatusOr<std::string> {
                KVTIDE_ASSIGN_OR_RETURN(const client::MoveResult moved, client.PrefetchSequences(f.ids));
                return MovedText("moved", moved);
              });
  prefetch->footer("Example:\n  kvtide seq prefetch 8812934");
  AddIds(prefetch, flags.get(), true);
}

void AddPin(CLI::App* seq, int* exit_code) {
  const auto flags = std::make_shared<Flags>();
  CLI::App* pin =
      AddVerb(seq, "pin", "Keep their blocks where they are for a while", flags, exit_code,
              [](client::Client& client, const Flags& f) -> absl::StatusOr<std::string> {
                absl::Duration time;
                if (!absl::ParseDuration(f.ttl, &time))
                  return absl::InvalidArgumentError(
                      absl::StrCat("--ttl '", f.ttl, "' is no time such as 90s, 10m or 1h30m"));
                KVTIDE_RETURN_IF_ERROR(client.PinSequences(f.ids, time));
                return time == absl::ZeroDuration()
                           ? absl::StrCat("ended the pins of ", f.ids.size(), "\n")
                           : absl::StrCat("pinned ", f.ids.size(), " for ", absl::FormatDuration(time), "\n");
              });
  pin->footer(
      "Examples:\n"
      "  kvtide seq prefetch 8812934 && kvtide seq pin 8812934 --ttl 30m\n"
      "  kvtide seq pin 8812934 --ttl 0            ends it");
  AddIds(pin, flags.get(), true);
  pin->add_option("--ttl", flags->ttl, "How long: 90s, 10m, 1h30m, a day at most; 0 ends the pin")
      ->capture_default_str();
}

void AddPriority(CLI::App* seq, int* exit_code) {
  const auto flags = std::make_shared<Flags>();
  CLI::App* priority =
      AddVerb(seq, "priority", "Say whose blocks make way first among those of one tenant", flags, exit_code,
              [](client::Client& client, const Flags& f) -> absl::StatusOr<std::string> {
                const client::Priority level = f.priority == "low"    ? client::Priority::kLow
                                               : f.priority == "high" ? client::Priority::kHigh
                                                                      : client::Priority::kNormal;
                KVTIDE_RETURN_IF_ERROR(client.SetPriority(f.ids, level));
                return absl::StrCat(f.ids.size(), f.ids.size() == 1 ? " has" : " have", " ", f.priority,
                                    " priority now\n");
              });
  priority->footer(
      "Examples:\n"
      "  kvtide seq priority 8812934 --set high\n"
      "  kvtide seq priority 8812935 8812936 --set low");
  AddIds(priority, flags.get(), true);
  priority->add_option("--set", flags->priority, "low, normal or high")
      ->required()
      ->check(CLI::IsMember({"low", "normal", "high"}));
}

void AddClose(CLI::App* seq, int* exit_code) {
  const auto flags = std::make_shared<Flags>();
  CLI::App* close =
      AddVerb(seq, "close", "Close them: their blocks are freed, also on disk", flags, exit_code,
              [](client::Client& client, const Flags& f) -> absl::StatusOr<std::string> {
                for (const client::SequenceId id : f.ids)
                  KVTIDE_RETURN_IF_ERROR(Annotate(client.CloseSequence(id), absl::StrCat("sequence ", id)));
                return absl::StrCat("closed ", f.ids.size(), "\n");
              });
  close->footer("Example:\n  kvtide seq close 8812934 8812935");
  AddIds(close, flags.get(), true);
}

}  // namespace

void AddSeqVerbs(CLI::App* seq, int* exit_code) {
  AddList(seq, exit_code);
  AddShow(seq, exit_code);
  AddFork(seq, exit_code);
  AddEvict(seq, exit_code);
  AddPrefetch(seq, exit_code);
  AddPin(seq, exit_code);
  AddPriority(seq, exit_code);
  AddClose(seq, exit_code);
}

}  // namespace kvtide::cli
