// What a run shows and writes: metrics.jsonl, TensorBoard events, a progress line. examples/python/gpt_log.py writes
// the same.
#pragma once

#include <unistd.h>

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "tensorboard.h"

namespace example {

inline double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// metrics.jsonl in `folder`, a JSON object a line, and TensorBoard events of the same numbers. A resumed run drops the
// lines past its first step, which it will write again.
class Metrics {
 public:
  Metrics(const std::filesystem::path& folder, int64_t first_step, bool tensorboard) {
    const std::filesystem::path path = folder / "metrics.jsonl";
    std::vector<std::string> kept;
    if (first_step > 0) {
      std::ifstream earlier(path);
      for (std::string line; std::getline(earlier, line);) {
        if (keeps(line, first_step)) kept.push_back(line);
      }
    }
    file_.open(path, std::ios::trunc);
    if (!file_) throw std::runtime_error(path.string() + ": expected a file that can be written, got none");
    for (const std::string& line : kept) file_ << line << '\n';
    file_.flush();
    if (tensorboard) writer_.emplace(folder / "tensorboard", first_step);
  }

  // Adds a line; a number that is not finite becomes null.
  void write(const std::string& event, int64_t step, const std::vector<std::pair<std::string, double>>& values) {
    nlohmann::ordered_json line = {{"event", event}, {"step", step}};
    for (const auto& [name, value] : values) {
      line[name] = std::isfinite(value) ? nlohmann::ordered_json(value) : nlohmann::ordered_json();
      if (writer_) writer_->add_scalar(event + "/" + name, value, step);
    }
    file_ << line.dump() << std::endl;
    if (writer_ && event == "eval") writer_->flush();
  }

 private:
  static bool keeps(const std::string& line, int64_t step) {
    const auto entry = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!entry.is_object()) return false;  // a last line cut short by a crash
    const int64_t at = entry.value("step", int64_t{0});
    return entry.value("event", "") == "eval" ? at <= step : at < step;
  }

  std::ofstream file_;
  std::optional<TensorBoardWriter> writer_;
};

// One line on stderr, rewritten in place on a terminal, else a line now and then.
class ProgressLine {
 public:
  ProgressLine(int64_t first, int64_t last) : first_(first), last_(last), terminal_(isatty(STDERR_FILENO) != 0) {}
  ~ProgressLine() { std::fputs(terminal_ && shown_at_ >= 0 ? "\n" : "", stderr); }
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;

  void update(int64_t done, double loss, double tokens_per_second, double scale, int64_t skipped) {
    constexpr int64_t kBar = 20;
    const double seconds = seconds_since(start_);
    if (done != last_ && seconds - shown_at_ < (terminal_ ? 0.2 : 20.0)) return;
    shown_at_ = seconds;
    const std::string bar(static_cast<size_t>(kBar * done / last_), '#');
    const double left = seconds / static_cast<double>(done - first_) * static_cast<double>(last_ - done);
    std::fprintf(stderr, "%s[%-20s] step %lld/%lld  loss %.3f  %.0f tokens/s  scale %g  skipped %lld  %.0f s left%s",
                 terminal_ ? "\r" : "", bar.c_str(), static_cast<long long>(done), static_cast<long long>(last_), loss,
                 tokens_per_second, scale, static_cast<long long>(skipped), left, terminal_ ? "\x1b[K" : "\n");
    std::fflush(stderr);
  }

 private:
  int64_t first_;
  int64_t last_;
  bool terminal_;
  double shown_at_ = -1.0;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace example
