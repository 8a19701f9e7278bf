// The training loop's parts that have nothing to do with quantization: schedule, optimizer, progress line,
// metrics.jsonl. Each is the Python job's, so that one checkpoint and one seed give the same losses in both languages.
#pragma once

#if defined(__linux__)
#include <malloc.h>
#endif
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/nn/module.h>
#include <torch/optim/sgd.h>

namespace example {

// A training step frees and allocates the same activations over and over; by default glibc gives large blocks back to
// the system and faults them in again page by page, which can cost more than the step's arithmetic.
inline void keep_freed_memory() {
#if defined(M_MMAP_THRESHOLD)
  mallopt(M_MMAP_THRESHOLD, 32 << 20);  // glibc takes no more
  mallopt(M_TRIM_THRESHOLD, std::numeric_limits<int>::max());
#endif
}

inline double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// One cycle (Smith & Topin, arXiv:1708.07120): up linearly over the first quarter of the steps, down along half a
// cosine.
inline double learning_rate(int64_t step, int64_t total, double peak) {
  constexpr double kWarmup = 0.25;
  constexpr double kPi = 3.14159265358979323846;
  const double place = static_cast<double>(step + 1) / static_cast<double>(total);
  if (place < kWarmup) return peak * place / kWarmup;
  return peak * 0.5 * (1 + std::cos(kPi * (place - kWarmup) / (1 - kWarmup)));
}

// SGD with Nesterov momentum 0.9; weight decay 5e-4 on weights of two or more dimensions, not on biases, norms and
// scales.
inline torch::optim::SGD make_optimizer(const torch::nn::Module& module) {
  std::vector<at::Tensor> decayed;
  std::vector<at::Tensor> other;
  for (const auto& item : module.named_parameters()) {
    const std::string& name = item.key();
    const bool is_weight = name.size() >= 6 && name.compare(name.size() - 6, 6, "weight") == 0;
    (is_weight && item.value().dim() >= 2 ? decayed : other).push_back(item.value());
  }
  const auto options = [](double weight_decay) {
    return std::make_unique<torch::optim::SGDOptions>(
        torch::optim::SGDOptions(0.0).momentum(0.9).nesterov(true).weight_decay(weight_decay));
  };
  std::vector<torch::optim::OptimizerParamGroup> groups;
  groups.emplace_back(decayed, options(5e-4));
  groups.emplace_back(other, options(0.0));
  return torch::optim::SGD(groups, torch::optim::SGDOptions(0.0).momentum(0.9).nesterov(true));
}

inline void set_learning_rate(torch::optim::SGD& optimizer, double lr) {
  for (auto& group : optimizer.param_groups()) group.options().set_lr(lr);
}

// metrics.jsonl: a JSON object a line, appended as the run goes.
class Metrics {
 public:
  explicit Metrics(const std::string& path) : file_(path, std::ios::app) {
    if (!file_) throw std::runtime_error(path + ": expected a file that can be written, got none");
    file_.precision(std::numeric_limits<double>::max_digits10);
  }

  void step(const std::string& stage, int64_t step, int64_t epoch, double loss, double lr, double seconds) {
    file_ << R"({"stage": ")" << stage << R"(", "event": "step", "step": )" << step << R"(, "epoch": )" << epoch
          << R"(, "loss": )" << loss << R"(, "lr": )" << lr << R"(, "seconds": )" << seconds << "}" << std::endl;
  }

  void evaluation(const std::string& stage, int64_t step, double epoch, double accuracy, double loss) {
    file_ << R"({"stage": ")" << stage << R"(", "event": "eval", "step": )" << step << R"(, "epoch": )" << epoch
          << R"(, "accuracy": )" << accuracy << R"(, "loss": )" << loss << "}" << std::endl;
  }

 private:
  std::ofstream file_;
};

// One line on stderr, rewritten in place on a terminal, else a line at the end.
class ProgressLine {
 public:
  ProgressLine(std::string stage, int64_t steps)
      : stage_(std::move(stage)), steps_(steps), terminal_(isatty(STDERR_FILENO) != 0) {}
  ~ProgressLine() { std::fputs(shown_ ? "\n" : "", stderr); }
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;

  void update(int64_t done, double loss, double lr) {
    const double seconds = seconds_since(start_);
    if (done != steps_ && (!terminal_ || seconds - last_ < 0.2)) return;
    last_ = seconds;
    shown_ = true;
    const double a_step = seconds / static_cast<double>(done);
    std::fprintf(stderr, "%s%-12s %5.1f %%  step %lld/%lld  loss %.4f  lr %.4f  %.0f ms/step  %.0f s left%s",
                 terminal_ ? "\r" : "", stage_.c_str(), 100.0 * static_cast<double>(done) / static_cast<double>(steps_),
                 static_cast<long long>(done), static_cast<long long>(steps_), loss, lr, 1e3 * a_step,
                 a_step * static_cast<double>(steps_ - done), terminal_ ? "\x1b[K" : "");
    std::fflush(stderr);
  }

 private:
  std::string stage_;
  int64_t steps_;
  bool terminal_;
  bool shown_ = false;
  double last_ = -1.0;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace example
