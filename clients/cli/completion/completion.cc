#include "clients/cli/completion/completion.h"

#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "daemon/command_line.h"

namespace kvtide::cli {
namespace {

std::vector<const CLI::App*> Subcommands(const CLI::App& app) {
  return app.get_subcommands([](const CLI::App* one) { return !one->get_name().empty(); });
}

std::vector<std::string> Options(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::Option* option : app.get_options())
    for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
  return names;
}

// Calls `visit` with every command and its words: "", "plan", "seq list".
void Walk(const CLI::App& app, const std::string& words,
          const std::function<void(const CLI::App&, const std::string&)>& visit) {
  visit(app, words);
  for (const CLI::App* one : Subcommands(app))
    Walk(*one, words.empty() ? one->get_name() : absl::StrCat(words, " ", one->get_name()), visit);
}

// Two passes over the words before the cursor: which command it is, then what may follow.
std::string Bash(const CLI::App& app) {
  const std::string& name = app.get_name();
  std::string script =
      absl::StrCat("# bash completion of ", name, ", made by `kvtide completion bash ", name, "`\n_", name,
                   "() {\n"
                   "  local cur=\"${COMP_WORDS[COMP_CWORD]}\" path=\"\" word i\n"
                   "  for ((i = 1; i < COMP_CWORD; i++)); do\n"
                   "    word=\"${COMP_WORDS[i]}\"\n"
                   "    case \"${path:+$path }$word\" in\n      ");
  std::vector<std::string> commands;
  Walk(app, "", [&](const CLI::App&, const std::string& words) {
    if (!words.empty()) commands.push_back(absl::StrCat("\"", words, "\""));
  });
  absl::StrAppend(&script, commands.empty() ? "\"\"" : absl::StrJoin(commands, "|"),
                  ") path=\"${path:+$path }$word\" ;;\n    esac\n  done\n  case \"$path\" in\n");
  Walk(app, "", [&](const CLI::App& command, const std::string& words) {
    std::vector<std::string> next = Options(command);
    for (const CLI::App* one : Subcommands(command)) next.push_back(one->get_name());
    absl::StrAppend(&script, "    \"", words, "\") COMPREPLY=($(compgen -W \"", absl::StrJoin(next, " "),
                    "\" -- \"$cur\")) ;;\n");
  });
  absl::StrAppend(
      &script,
      "  esac\n  [[ ${#COMPREPLY[@]} -eq 0 && \"$cur\" != -* ]] && COMPREPLY=($(compgen -f -- \"$cur\"))\n}\n"
      "complete -F _",
      name, " ", name, "\n");
  return script;
}

std::string Fish(const CLI::App& app) {
  const auto quoted = [](const std::string& text) {
    return absl::StrCat("'", absl::StrReplaceAll(text, {{"\\", "\\\\"}, {"'", "\\'"}, {"\n", " "}}), "'");
  };
  const std::string& name = app.get_name();
  std::string script =
      absl::StrCat("# fish completion of ", name, ", made by `kvtide completion fish ", name, "`\n");
  Walk(app, "", [&](const CLI::App& command, const std::string& words) {
    std::string condition = Subcommands(app).empty() ? "true" : "__fish_use_subcommand";
    if (!words.empty())
      condition = absl::StrCat("__fish_seen_subcommand_from ", words.substr(words.rfind(' ') + 1));
    for (const CLI::App* one : Subcommands(command))
      absl::StrAppend(&script, "complete -c ", name, " -f -n '", condition, "' -a ", one->get_name(), " -d ",
                      quoted(one->get_description()), "\n");
    for (const CLI::Option* option : command.get_options())
      for (const std::string& option_name : option->get_lnames())
        absl::StrAppend(&script, "complete -c ", name, " -n '", condition, "' -l ", option_name, " -d ",
                        quoted(option->get_description()), "\n");
  });
  return script;
}

}  // namespace

std::string CompletionScript(const CLI::App& app, const std::string& shell) {
  if (shell == "fish") return Fish(app);
  if (shell == "zsh")
    return absl::StrCat("#compdef ", app.get_name(), "\nautoload -U +X bashcompinit && bashcompinit\n",
                        Bash(app));
  return Bash(app);
}

void AddCompletionCommand(CLI::App& app, int* exit_code) {
  auto shell = std::make_shared<std::string>(), program = std::make_shared<std::string>("kvtide");
  CLI::App* completion =
      app.add_subcommand("completion", "Print the completions of kvtide or kvtided for a shell");
  completion->footer(
      "Examples:\n"
      "  source <(kvtide completion bash)\n"
      "  source <(kvtide completion bash kvtided)\n"
      "  kvtide completion zsh > ~/.zfunc/_kvtide\n"
      "  kvtide completion fish > ~/.config/fish/completions/kvtide.fish\n"
      "An installed package has put them in place already.");
  completion->add_option("shell", *shell, "bash, zsh or fish")
      ->required()
      ->check(CLI::IsMember({"bash", "zsh", "fish"}));
  completion->add_option("program", *program, "kvtide or kvtided")
      ->capture_default_str()
      ->check(CLI::IsMember({"kvtide", "kvtided"}));
  completion->callback([&app, shell, program, exit_code] {
    CLI::App daemon(kDaemonDescription, "kvtided");
    CommandLine flags;
    AddCommandLine(&daemon, &flags);
    std::fputs(CompletionScript(*program == "kvtide" ? app : daemon, *shell).c_str(), stdout);
    *exit_code = 0;
  });
}

}  // namespace kvtide::cli
