// The flags of train_gpt; examples/python/gpt_options.py has the same ones with the same defaults.
#pragma once

#include <cstdint>
#include <set>
#include <string>

#include <nlohmann/json.hpp>

#include "flags.h"
#include "gpt.h"

namespace example {

constexpr const char* kHelp = R"(train_gpt [flags]

Trains a GPT-2-style language model on the bytes of a text file, under autocast with dynamic loss scaling.

model
  --preset NAME          small (default, 0.8 M parameters) or gpt2 (124 M)
  --layers, --heads, --width, --context, --vocab N    in place of the preset's
  --dropout X            (0)
  --recipe NAME          quantization-aware training of every linear layer, e.g. qat-w8a8, or int8-training for integer matrix
                         products; the embeddings and the output head, which is tied to one, stay in floating point
  --calibration-batches N    batches that set the recipe's ranges (4)
run
  --data FILE            text file (default: $QUANTRAIN_DATA/tinyshakespeare/input.txt)
  --out FOLDER           folder of checkpoint, metrics and TensorBoard events (runs/gpt)
  --init FILE            start from this checkpoint's weights; either language's
  --restart              begin again instead of resuming the run in --out
  --device NAME          cpu (default) or cuda
  --seed N               (0)
  --threads N            CPU threads; 0: PyTorch's choice
  --no-tensorboard       no TensorBoard events
  --benchmark N          time N steps, print one JSON line, write nothing
precision
  --precision NAME       fp32 (default), fp16 (with loss scaling) or bf16
  --tf32                 float32 products in TF32 on a GPU
  --init-scale X         first loss scale (65536)
  --growth-interval N    good steps in a row before the scale doubles (2000)
  --captured             on a GPU: the whole step as one CUDA graph
training
  --batch-size N         sequences of a forward pass (small 32, gpt2 8)
  --accumulate N         forward passes a step (1)
  --clip X               largest gradient norm; 0: no clipping (1)
  --lr X, --min-lr X     largest and last learning rate (small 1e-3, gpt2 6e-4; a tenth of --lr)
  --warmup N             steps of linear warm-up, before the cosine (100)
  --weight-decay X       on weights of two or more dimensions (0.1)
  --steps N              length of the schedule (2000)
  --max-steps N          stop after this step of the schedule; 0: at its end
  --eval-every N         steps; 0: at the end only (200)
  --eval-batches N       (20)
  --save-every N         steps between checkpoints; 0: at the end only (200)

Ctrl-C saves and stops; the same command goes on from there. A second Ctrl-C stops at once.
)";

struct Options {
  bool help = false;
  std::string preset = "small";
  GPTConfig config;
  std::string recipe;
  int64_t calibration_batches = 4;
  std::string data;
  std::string out = "runs/gpt";
  std::string init;
  bool restart = false;
  std::string device = "cpu";
  int64_t seed = 0;
  int64_t threads = 0;
  bool tensorboard = true;
  int64_t benchmark = 0;
  std::string precision = "fp32";
  bool tf32 = false;
  double init_scale = 65536.0;
  int64_t growth_interval = 2000;
  bool captured = false;
  int64_t batch_size = 32;
  int64_t accumulate = 1;
  double clip = 1.0;
  double lr = 1e-3;
  double min_lr = 1e-4;
  int64_t warmup = 100;
  double weight_decay = 0.1;
  int64_t steps = 2000;
  int64_t max_steps = 0;
  int64_t eval_every = 200;
  int64_t eval_batches = 20;
  int64_t save_every = 200;

  // What a checkpoint must agree in.
  nlohmann::json sizes() const {
    return {{"layers", config.layers},
            {"heads", config.heads},
            {"width", config.width},
            {"context", config.context},
            {"vocab", config.vocab}};
  }

  // Checkpoints hold these too: another value is another training, and resuming it is refused.
  nlohmann::json settings(int64_t text_bytes) const {
    return {{"batch_size", batch_size},
            {"accumulate", accumulate},
            {"steps", steps},
            {"lr", lr},
            {"min_lr", min_lr},
            {"warmup", warmup},
            {"weight_decay", weight_decay},
            {"clip", clip},
            {"dropout", config.dropout},
            {"precision", precision},
            {"seed", seed},
            {"text_bytes", text_bytes}};
  }
};

namespace detail {

inline const std::set<std::string> kSwitches = {"restart", "tf32", "captured", "no-tensorboard", "help"};

inline void take_model(Flags& flags, Options& options) {
  flags.take("preset", options.preset);
  check_one_of("--preset", options.preset, {"small", "gpt2"});
  if (options.preset == "gpt2") {
    options.config = {12, 12, 768, 1024, 50304};
    options.batch_size = 8;
    options.lr = 6e-4;
  }
  GPTConfig& config = options.config;
  flags.take<int64_t>("layers", config.layers, 1);
  flags.take<int64_t>("heads", config.heads, 1);
  flags.take<int64_t>("width", config.width, 1);
  flags.take<int64_t>("context", config.context, 1);
  flags.take<int64_t>("vocab", config.vocab, 0);
  flags.take<double>("dropout", config.dropout, 0.0);
  if (config.vocab < 256) fail("--vocab of at least 256 (tokens are bytes)", std::to_string(config.vocab));
  if (config.width % config.heads != 0) {
    fail("--width to be a multiple of --heads", std::to_string(config.width) + " and " + std::to_string(config.heads));
  }
  if (config.dropout >= 1.0) fail("--dropout in [0, 1)", std::to_string(config.dropout));
  flags.take("recipe", options.recipe);
  flags.take<int64_t>("calibration-batches", options.calibration_batches, 1);
}

inline void take_precision(Flags& flags, Options& options) {
  flags.take("precision", options.precision);
  check_one_of("--precision", options.precision, {"fp32", "fp16", "bf16"});
  options.tf32 = flags.take("tf32");
  flags.take<double>("init-scale", options.init_scale, 0.0);
  if (options.init_scale == 0.0) fail("--init-scale above 0", "0");
  flags.take<int64_t>("growth-interval", options.growth_interval, 1);
  options.captured = flags.take("captured");
}

inline void take_run(Flags& flags, Options& options) {
  flags.take("data", options.data);
  flags.take("out", options.out);
  flags.take("init", options.init);
  options.restart = flags.take("restart");
  flags.take("device", options.device);
  check_one_of("--device", options.device.substr(0, options.device.find(':')), {"cpu", "cuda"});
  flags.take<int64_t>("seed", options.seed, 0);
  flags.take<int64_t>("threads", options.threads, 0);
  options.tensorboard = !flags.take("no-tensorboard");
  flags.take<int64_t>("benchmark", options.benchmark, 0);
}

inline void take_training(Flags& flags, Options& options) {
  flags.take<int64_t>("batch-size", options.batch_size, 1);
  flags.take<int64_t>("accumulate", options.accumulate, 1);
  flags.take<double>("clip", options.clip, 0.0);
  flags.take<double>("lr", options.lr, 0.0);
  options.min_lr = options.lr / 10;
  flags.take<double>("min-lr", options.min_lr, 0.0);
  flags.take<int64_t>("warmup", options.warmup, 0);
  flags.take<double>("weight-decay", options.weight_decay, 0.0);
  flags.take<int64_t>("steps", options.steps, 1);
  flags.take<int64_t>("max-steps", options.max_steps, 0);
  flags.take<int64_t>("eval-every", options.eval_every, 0);
  flags.take<int64_t>("eval-batches", options.eval_batches, 1);
  flags.take<int64_t>("save-every", options.save_every, 0);
}

}  // namespace detail

// The flags, checked, with defaults that depend on the preset filled in. Throws for a flag or a value outside its rule.
inline Options parse(int argc, char** argv) {
  detail::Flags flags(argc, argv, detail::kSwitches);
  Options options;
  options.help = flags.take("help");
  detail::take_model(flags, options);
  detail::take_precision(flags, options);
  detail::take_run(flags, options);
  detail::take_training(flags, options);
  flags.finish();
  if (options.captured && options.device.rfind("cuda", 0) != 0)
    detail::fail("--device cuda with --captured", options.device);
  return options;
}

}  // namespace example
