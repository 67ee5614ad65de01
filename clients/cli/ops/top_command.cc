#include "clients/cli/ops/top_command.h"

#include <poll.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdio>
#include <memory>
#include <string>

#include "absl/time/clock.h"
#include "clients/cli/ops/status_command.h"
#include "clients/cli/ops/top_screen.h"
#include "clients/cli/terminal/command_status.h"
#include "clients/cli/terminal/number_checks.h"
#include "kernels/base/status.h"

namespace kvtide::cli {
namespace {

struct TopFlags {
  DaemonFlags daemon;
  double interval_seconds = 1;
  std::string order = "largest";
  int count = 0;  // screens; 0 = until the user ends it, or one where there is no terminal
};

std::atomic<bool> stop_asked{false};
static_assert(std::atomic<bool>::is_always_lock_free);
void AskToStop(int) { stop_asked = true; }

// The other screen of the terminal, without cursor and echo; puts everything back.
class Screen {
 public:
  explicit Screen(bool enabled) : enabled_(enabled), keys_(enabled && isatty(STDIN_FILENO) != 0) {
    if (!enabled_) return;
    std::signal(SIGINT, AskToStop);
    std::signal(SIGTERM, AskToStop);
    if (keys_ && tcgetattr(STDIN_FILENO, &saved_) == 0) {
      termios raw = saved_;
      raw.c_lflag &= ~static_cast<tcflag_t>(ICANON | ECHO);
      tcsetattr(STDIN_FILENO, TCSANOW, &raw);
    }
    std::fputs("\x1b[?1049h\x1b[?25l", stdout);
    std::fflush(stdout);
  }
  ~Screen() {
    if (!enabled_) return;
    std::fputs("\x1b[?25h\x1b[?1049l", stdout);
    std::fflush(stdout);
    if (keys_) tcsetattr(STDIN_FILENO, TCSANOW, &saved_);
    std::signal(SIGINT, SIG_DFL);
    std::signal(SIGTERM, SIG_DFL);
  }
  Screen(const Screen&) = delete;
  Screen& operator=(const Screen&) = delete;

  void Draw(const std::string& text) const {
    if (enabled_) {
      // Overwrites in place and clears what is left of each line: no flicker.
      std::string out = "\x1b[H";
      for (const char c : PrintableLines(text)) {
        if (c == '\n') out += "\x1b[K";
        out += c;
      }
      std::fputs((out + "\x1b[J").c_str(), stdout);
    } else {
      Say(text);
    }
    std::fflush(stdout);
  }

  // False when the user wants to end.
  bool Wait(absl::Duration duration) const {
    const absl::Time end = absl::Now() + duration;
    while (!stop_asked) {
      const int64_t left = absl::ToInt64Milliseconds(end - absl::Now());
      if (left <= 0) return true;
      pollfd key{STDIN_FILENO, POLLIN, 0};
      if (poll(&key, keys_ ? 1 : 0, static_cast<int>(left)) <= 0) continue;
      char c = 0;
      if (read(STDIN_FILENO, &c, 1) != 1 || c == 'q' || c == 'Q') return false;
    }
    return false;
  }

  int height() const {
    winsize size{};
    if (enabled_ && ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_row > 4) return size.ws_row - 1;
    return 60;
  }

 private:
  const bool enabled_;
  const bool keys_;
  termios saved_{};
};

absl::Status RunTop(const TopFlags& flags) {
  KVTIDE_ASSIGN_OR_RETURN(const std::unique_ptr<client::Client> client, flags.daemon.Connect());
  KVTIDE_ASSIGN_OR_RETURN(DaemonSnapshot before, TakeSnapshot(*client));
  const bool interactive = Terminal::Of(STDOUT_FILENO).interactive();
  const int count = flags.count > 0 ? flags.count : interactive ? 0 : 1;
  const Screen screen(interactive);
  absl::Time taken = absl::Now();
  if (interactive)
    screen.Draw(
        RenderTop(before, before, 0, screen.height(), Terminal::Of(STDOUT_FILENO), OrderOf(flags.order)));
  for (int shown = 0; count == 0 || shown < count; ++shown) {
    if (!screen.Wait(absl::Seconds(flags.interval_seconds))) break;
    absl::StatusOr<DaemonSnapshot> now = TakeSnapshot(*client);
    const absl::Time at = absl::Now();
    if (!now.ok()) {
      if (!interactive) return now.status();
      screen.Draw("kvtided at " + client->address() + " does not answer; waiting for it, q quits\n" +
                  std::string(now.status().message()) + "\n");
      continue;
    }
    screen.Draw(RenderTop(before, *now, absl::ToDoubleSeconds(at - taken), screen.height(),
                          Terminal::Of(STDOUT_FILENO), OrderOf(flags.order)));
    before = *std::move(now);
    taken = at;
  }
  return absl::OkStatus();
}

}  // namespace

void AddTopCommand(CLI::App& app, int* exit_code) {
  auto flags = std::make_shared<TopFlags>();
  CLI::App* top = app.add_subcommand("top", "Watch a running kvtided at work (q quits)");
  top->footer(
      "Examples:\n"
      "  kvtide top\n"
      "  kvtide top --interval 0.5 --address 127.0.0.1:7600\n"
      "  kvtide top --count 3 > log.txt");
  flags->daemon.AddTo(top);
  top->add_option("--interval", flags->interval_seconds, "Seconds between two screens")
      ->capture_default_str()
      ->check(CLI::Range(0.1, 3600.0));
  top->add_option("--count", flags->count,
                  "Screens to show; default: until q, or one when the output is no terminal")
      ->check(Positive());
  top->add_option("--order", flags->order, "Which sequences: largest, hottest or coldest (longest idle)")
      ->check(CLI::IsMember({"coldest", "hottest", "largest"}))
      ->capture_default_str();
  top->callback([flags, exit_code] {
    const absl::Status done = RunTop(*flags);
    SayFailed("kvtide top", done);
    *exit_code = ExitCode(done);
  });
}

}  // namespace kvtide::cli
