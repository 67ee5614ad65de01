#include "clients/cli/completion/manual.h"

#include <cstdio>
#include <memory>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "daemon/command_line.h"

namespace kvtide::cli {
namespace {

// Plain text as roff: nothing of it is a request.
std::string Roff(const std::string& text) {
  std::vector<std::string> lines;
  for (const absl::string_view line : absl::StrSplit(text, '\n')) {
    std::string escaped = absl::StrReplaceAll(line, {{"\\", "\\e"}, {"-", "\\-"}});
    if (absl::StartsWith(escaped, ".") || absl::StartsWith(escaped, "'")) escaped.insert(0, "\\&");
    lines.push_back(std::move(escaped));
  }
  return absl::StrJoin(lines, "\n");
}

// Lines as they are, for examples.
void AddVerbatim(const std::string& text, std::string* page) {
  if (!text.empty()) absl::StrAppend(page, ".PP\n.nf\n", Roff(text), "\n.fi\n");
}

void AddItem(const std::string& term, const std::string& text, std::string* page) {
  absl::StrAppend(page, ".TP\n.B ", Roff(term), "\n", Roff(text), "\n");
}

// "--output TEXT"; of an argument without dashes its name.
std::string TermOf(const CLI::Option& option) {
  std::vector<std::string> names;
  for (const std::string& name : option.get_snames()) names.push_back("-" + name);
  for (const std::string& name : option.get_lnames()) names.push_back("--" + name);
  if (names.empty()) return absl::AsciiStrToUpper(option.get_name());
  std::string term = absl::StrJoin(names, ", ");
  if (option.get_items_expected_max() > 0) absl::StrAppend(&term, " VALUE");
  return term;
}

std::string TextOf(const CLI::Option& option) {
  std::string text = option.get_description();
  if (option.get_required()) absl::StrAppend(&text, text.empty() ? "" : " ", "(needed)");
  if (!option.get_default_str().empty()) absl::StrAppend(&text, " [", option.get_default_str(), "]");
  return text.empty() ? "\n" : text;
}

void AddOptions(const CLI::App& app, std::string* page) {
  for (const CLI::Option* option : app.get_options()) AddItem(TermOf(*option), TextOf(*option), page);
}

std::vector<const CLI::App*> CommandsOf(const CLI::App& app) {
  return app.get_subcommands([](const CLI::App* one) { return !one->get_name().empty(); });
}

void AddCommands(const CLI::App& app, const std::string& words, std::string* page) {
  for (const CLI::App* command : CommandsOf(app)) {
    const std::string name = absl::StrCat(words, words.empty() ? "" : " ", command->get_name());
    absl::StrAppend(page, ".SS ", Roff(name), "\n", Roff(command->get_description()), ".\n");
    AddOptions(*command, page);
    AddVerbatim(command->get_footer(), page);
    AddCommands(*command, name, page);
  }
}

const std::vector<ManualSection>& CommandSections() {
  static const auto* const sections = new std::vector<ManualSection>{
      {"ENVIRONMENT",
       {{"KVTIDE_ADDRESS", "Where kvtided listens, for commands that ask a daemon."},
        {"KVTIDE_TLS_CA, KVTIDE_TLS_CERT, KVTIDE_TLS_KEY", "As --tls-ca, --tls-cert and --tls-key."},
        {"KVTIDE_TOKEN_FILE", "As --token-file."},
        {"KVTIDE_DATA_DIR", "Where the bundled model and text are."},
        {"KVTIDE_*",
         "Settings of kvtided, for config and for daemons that a command starts; see kvtided(8)."},
        {"NO_COLOR", "No colours."}}},
      {"EXIT STATUS",
       {{"0", "Done."}, {"1", "Failed."}, {"2", "Bad input."}, {"130", "Stopped by the user."}}},
      {"SEE ALSO", {{"kvtided(8)", "The daemon."}}},
  };
  return *sections;
}

const std::vector<ManualSection>& DaemonSections() {
  static const auto* const sections = new std::vector<ManualSection>{
      {"SIGNALS",
       {{"SIGTERM, SIGINT", "Finishes the calls under way and stops; a second one ends it at once."},
        {"SIGHUP", "Reads again what may change while it runs."}}},
      {"FILES",
       {{"/etc/kvtide/kvtided.json", "The configuration of the system's service."},
        {"/run/kvtide/kvtided.sock", "The socket of the system's service."},
        {"/var/lib/kvtide", "Where the disk tier of the system's service may lie."}}},
      {"EXIT STATUS",
       {{"0", "Stopped as asked."},
        {"1", "Could not start."},
        {"2", "Bad flags or configuration."},
        {"3", "Stopped as asked, but a call did not come back after it was cancelled."},
        {"134", "Out of memory (SIGABRT)."}}},
      {"SEE ALSO", {{"kvtide(1)", "The command line, with kvtide config check and kvtide doctor."}}},
  };
  return *sections;
}

}  // namespace

std::string ManualPage(const CLI::App& app, int section, const std::string& version,
                       const std::vector<ManualSection>& more) {
  const std::string& name = app.get_name();
  std::string page =
      absl::StrCat(".\\\" Made by `kvtide manual ", name, "`.\n.TH ", absl::AsciiStrToUpper(name), " ",
                   section, " \"\" \"kvtide ", version, "\" \"kvtide\"\n.SH NAME\n", name, " \\- ",
                   Roff(absl::StrReplaceAll(app.get_description(), {{absl::StrCat(name, " "), ""}})), "\n");
  const bool commands = !CommandsOf(app).empty();
  absl::StrAppend(&page, ".SH SYNOPSIS\n.B ", name, "\n", commands ? "COMMAND " : "", "[OPTION]...\n");
  absl::StrAppend(&page, ".SH DESCRIPTION\n", Roff(app.get_description()), "\n.SH OPTIONS\n");
  AddOptions(app, &page);
  if (commands) {
    absl::StrAppend(&page, ".SH COMMANDS\n");
    AddCommands(app, "", &page);
  }
  for (const ManualSection& one : more) {
    absl::StrAppend(&page, ".SH ", one.title, "\n");
    for (const auto& [term, text] : one.items) AddItem(term, text, &page);
  }
  if (!app.get_footer().empty()) absl::StrAppend(&page, ".SH EXAMPLES\n");
  AddVerbatim(app.get_footer(), &page);
  return page;
}

void AddManualCommand(CLI::App& app, int* exit_code) {
  auto program = std::make_shared<std::string>("kvtide");
  CLI::App* manual = app.add_subcommand("manual", "Print the manual page of kvtide or kvtided, for man");
  manual->footer(
      "Examples:\n"
      "  kvtide manual kvtided | man -l -\n"
      "An installed package has put both in place already: man kvtide, man kvtided.");
  manual->add_option("program", *program, "kvtide or kvtided")
      ->capture_default_str()
      ->check(CLI::IsMember({"kvtide", "kvtided"}));
  manual->callback([&app, program, exit_code] {
    if (*program == "kvtide") {
      std::fputs(ManualPage(app, 1, KVTIDE_VERSION, CommandSections()).c_str(), stdout);
    } else {
      CLI::App daemon(kDaemonDescription, "kvtided");
      CommandLine flags;
      AddCommandLine(&daemon, &flags);
      std::fputs(ManualPage(daemon, 8, KVTIDE_VERSION, DaemonSections()).c_str(), stdout);
    }
    *exit_code = 0;
  });
}

}  // namespace kvtide::cli
