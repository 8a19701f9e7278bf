// Trains a GPT-2-style language model on the bytes of a text file without Python: autocast, dynamic loss scaling,
// clipping, checkpoints that the Python twin examples/python/train_gpt.py resumes. `train_gpt --help` lists the flags.
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/cuda.h>

#include "gpt_log.h"
#include "gpt_trainer.h"
#ifdef QUANTRAIN_WITH_CUDA
#include "gpt_capture.h"
#endif

namespace {

using example::Options;
using example::StepResult;
using example::Trainer;
using Clock = std::chrono::steady_clock;
using Step = std::function<StepResult()>;

volatile std::sig_atomic_t stop_requested = 0;

// How the trainer takes a step: kernel by kernel, or by replaying a CUDA graph.
Step make_step(Trainer& trainer) {
  if (!trainer.options().captured) return [&trainer] { return trainer.train_step(); };
#ifdef QUANTRAIN_WITH_CUDA
  const auto captured = std::make_shared<example::CapturedStep>(trainer);
  return [captured] { return captured->run(); };
#else
  throw std::invalid_argument("expected a build with QUANTRAIN_CUDA=ON for --captured, got one without");
#endif
}

void check_loss(double loss, int64_t step) {
  if (std::isfinite(loss)) return;
  // No loss scale would mend it: this is the loss before scaling.
  throw std::runtime_error("expected a finite loss, got " + std::to_string(loss) + " at step " + std::to_string(step) +
                           " (try a lower --lr, or --precision bf16)");
}

bool due(int64_t step, int64_t every, int64_t last) { return step == last || (every > 0 && step % every == 0); }

// Trains to the last step; the exit status: 0, or 130 where the user stopped the run.
int train(Trainer& trainer) {
  const Options& options = trainer.options();
  const int64_t last = options.max_steps > 0 ? std::min(options.steps, options.max_steps) : options.steps;
  if (trainer.step() >= last) {
    std::fprintf(stderr, "train_gpt: nothing to do, the run is at step %lld of %lld\n",
                 static_cast<long long>(trainer.step()), static_cast<long long>(last));
    return 0;
  }
  const Step take_step = make_step(trainer);
  std::filesystem::create_directories(options.out);
  example::Metrics metrics(options.out, trainer.step(), options.tensorboard);
  example::ProgressLine progress(trainer.step(), last);
  const double tokens = static_cast<double>(options.accumulate * options.batch_size * options.config.context);
  double scale = trainer.scale();
  double evaluation = 0.0;
  while (trainer.step() < last) {
    const auto started = Clock::now();
    const int64_t step = trainer.step();
    const StepResult result = take_step();
    const double loss = result.loss.item<double>();  // the one wait for the device
    check_loss(loss, step);
    const double before = scale;
    scale = trainer.scale();
    if (scale < before) trainer.count_skipped();
    const double speed = tokens / example::seconds_since(started);
    std::vector<std::pair<std::string, double>> values = {{"loss", loss},
                                                          {"lr", example::learning_rate(step, options)},
                                                          {"scale", before},
                                                          {"skipped", static_cast<double>(trainer.skipped())},
                                                          {"tokens_per_second", speed}};
    if (result.norm.defined()) values.emplace_back("grad_norm", result.norm.item<double>());
    metrics.write("step", step, values);
    progress.update(trainer.step(), loss, speed, scale, trainer.skipped());
    if (due(trainer.step(), options.eval_every, last)) {
      evaluation = trainer.evaluate();
      metrics.write("eval", trainer.step(), {{"loss", evaluation}});
    }
    const bool stopping = stop_requested != 0;
    if (stopping || due(trainer.step(), options.save_every, last)) trainer.save();
    if (stopping) {
      std::fprintf(stderr, "train_gpt: interrupted after step %lld; the same command goes on from there\n",
                   static_cast<long long>(step));
      return 130;
    }
  }
  std::printf("step %lld: loss %.4f on the evaluation part, checkpoint %s\n", static_cast<long long>(last), evaluation,
              trainer.path().c_str());
  return 0;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t half = values.size() / 2;
  return values.size() % 2 ? values[half] : (values[half - 1] + values[half]) / 2;
}

// A point in the device's work: of the stream on a GPU, of the clock elsewhere.
class Mark {
 public:
  explicit Mark(at::Device device)
      : cuda_(device.is_cuda()), event_(device.type(), c10::EventFlag::BACKEND_DEFAULT), time_(Clock::now()) {
    if (cuda_) event_.record(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
  }

  double milliseconds_to(const Mark& later) const {
    if (cuda_) return event_.elapsedTime(later.event_);
    return 1e3 * std::chrono::duration<double>(later.time_ - time_).count();
  }

 private:
  bool cuda_;
  c10::Event event_;
  Clock::time_point time_;
};

int64_t peak_memory_bytes(at::Device device) {
  if (device.is_cuda()) {
    const auto total = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    return c10::getDeviceAllocator(device.type())->getDeviceStats(device.index()).allocated_bytes[total].peak;
  }
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return int64_t{1024} * usage.ru_maxrss;
}

// Two passes of --benchmark steps: back to back for the time a step takes, then each alone for the host's part.
nlohmann::ordered_json benchmark(Trainer& trainer) {
  constexpr int kWarmup = 10;
  const Options& options = trainer.options();
  const at::Device device = trainer.device();
  const auto synchronize = [device] {
    if (device.is_cuda()) torch::cuda::synchronize(device.index());
  };
  const Step take_step = make_step(trainer);
  StepResult result;
  for (int i = 0; i < kWarmup; ++i) result = take_step();
  synchronize();
  std::vector<Mark> marks;
  marks.emplace_back(device);
  for (int64_t i = 0; i < options.benchmark; ++i) {
    result = take_step();
    marks.emplace_back(device);
  }
  synchronize();
  std::vector<double> times;
  for (size_t i = 0; i + 1 < marks.size(); ++i) times.push_back(marks[i].milliseconds_to(marks[i + 1]));
  std::vector<double> host_times;
  for (int64_t i = 0; i < options.benchmark; ++i) {
    const auto started = Clock::now();
    result = take_step();
    host_times.push_back(1e3 * example::seconds_since(started));
    synchronize();
  }
  return {{"language", "c++"},
          {"precision", options.tf32 && options.precision == "fp32" ? "tf32" : options.precision},
          {"captured", options.captured},
          {"batch", options.batch_size},
          {"context", options.config.context},
          {"step_ms_median", median(times)},
          {"host_ms_median", median(host_times)},
          {"peak_memory_bytes", peak_memory_bytes(device)},
          {"final_loss", result.loss.item<double>()}};
}

int run(int argc, char** argv) {
  const Options options = example::parse(argc, argv);
  if (options.help) {
    std::fputs(example::kHelp, stdout);
    return 0;
  }
  if (options.device != "cpu" && !torch::cuda::is_available()) {
    throw std::invalid_argument("expected a GPU for --device " + options.device + ", got none");
  }
  if (options.threads > 0) at::set_num_threads(static_cast<int>(options.threads));
  if (options.tf32) {
    at::globalContext().setAllowTF32CuBLAS(true);
    at::globalContext().setAllowTF32CuDNN(true);
  }
  Trainer trainer(options);
  if (options.benchmark > 0) {
    std::puts(benchmark(trainer).dump().c_str());
    return 0;
  }
  return train(trainer);
}

}  // namespace

int main(int argc, char** argv) {
  const auto stop = [](int signal) {
    stop_requested = 1;
    std::signal(signal, SIG_DFL);  // a second one stops at once
  };
  std::signal(SIGINT, stop);
  std::signal(SIGTERM, stop);
  try {
    return run(argc, argv);
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "train_gpt: %s\n", error.what_without_backtrace());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "train_gpt: %s\n", error.what());
  }
  return 1;
}
