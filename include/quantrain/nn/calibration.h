// Calibration, and the switches of a whole model. Through Calibrates a module says what it does in calibration; nothing
// here knows a family by name.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include <torch/nn/module.h>

#include "quantrain/ops/export.h"

namespace quantrain::nn {

// A module that rounds tensors and takes its ranges from them, or that calibration changes otherwise.
class QUANTRAIN_API Calibrates {
 public:
  virtual ~Calibrates() = default;
  virtual void enable_fake_quant(bool on = true) { fake_quant_enabled_ = on; }
  bool fake_quant_enabled() const { return fake_quant_enabled_; }
  virtual void enable_observer(bool /*on*/) {}  // whether its range follows training

  // From begin to end forward passes are seen and not rounded. keep: takes over what was seen, else all is as before.
  virtual void begin_calibration() {}
  virtual void end_calibration(bool /*keep*/) {}
  // 0 ends first, then 1: modules whose range depends on another's.
  virtual int end_order() const { return 1; }

  enum class Reached { kNotAsked, kNothing, kOnlyZeros, kSomething };
  virtual Reached reached_by_calibration() { return Reached::kNotAsked; }

  // Whether a tensor of the module's state, by its name below the module, is one that the float model does not have.
  virtual bool is_own_tensor(const std::string& /*name*/) const { return true; }

 protected:
  bool fake_quant_enabled_ = true;
};

struct Recipe;

// A layer that a recipe describes.
class QUANTRAIN_API HasRecipe {
 public:
  virtual ~HasRecipe() = default;
  virtual const Recipe& recipe() const = 0;
};

// A layer that owns modules that calibrate: what it does once they have their ranges.
class QUANTRAIN_API FinishesCalibration {
 public:
  virtual ~FinishesCalibration() = default;
  virtual void observe_weight() {}        // a weight's range needs no batch, so even where none reached the layer
  virtual void freeze_for_inference() {}  // under a recipe that is not for training
};

// Switches every module that rounds, itself included. enable_observer(module, false) freezes the ranges, for the last
// part of training.
QUANTRAIN_API void enable_observer(torch::nn::Module& module, bool on = true);
QUANTRAIN_API void enable_fake_quant(torch::nn::Module& module, bool on = true);

// What calibration did not reach, by the names of modules ("fc.input_fake_quant").
struct QUANTRAIN_API CalibrationReport {
  std::vector<std::string> unreached;   // no tensor came by: evaluation raises there
  std::vector<std::string> only_zeros;  // only tensors of zeros came by: evaluation rounds others to whole numbers

  bool empty() const { return unreached.empty() && only_zeros.empty(); }
  std::string text() const;
};

// While it lives, forward passes of `module` calibrate: evaluation mode, no gradients, observers on, nothing quantized.
// Afterwards modes and switches are what they were: in training the ranges go on following the tensors (learnable
// scales belong to the optimizer) until enable_observer(module, false) freezes them. Layers whose recipe is not for
// training (ptq-..., int8-static) have their ranges frozen at the end, except those that saw nothing or only zeros.
// Where an exception ends it, ranges and scales are restored too.
//
// Calibrate a network whose batch norms have seen data: TORCH_WARN names one that has not, and at the end what was not
// reached.
class QUANTRAIN_API Calibration {
 public:
  explicit Calibration(torch::nn::Module& module);
  ~Calibration();
  Calibration(const Calibration&) = delete;
  Calibration& operator=(const Calibration&) = delete;

  // Ends the calibration now, before the object's own end, and says what it did not reach. Once.
  CalibrationReport finish();

 private:
  struct Saved;
  void end(bool keep);
  CalibrationReport report() const;
  std::unique_ptr<Saved> saved_;
};

}  // namespace quantrain::nn
