// State of an optimizer in pinned host memory, which visits the device page by page during a step. Private to the
// library.
#pragma once

#include <cstddef>
#include <functional>
#include <vector>

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/Stream.h>

namespace quantrain::optim {

// A copy in pinned host memory, of the same strides.
at::Tensor pinned(const at::Tensor& tensor);

// Brings pages of states to a device and back, beside what the device computes: while a page is updated the next one is
// copied in and the one before is copied out, each on a stream of its own.
class HostState {
 public:
  using Tensors = std::vector<at::Tensor>;  // of one parameter; those on the device stay where they are

  explicit HostState(c10::Device device);

  // Calls update(first, on_device) page by page: it queues its work on the current stream, and what it changes in place
  // goes back to `states`, from `first` on.
  void update(const std::vector<Tensors>& states,
              const std::function<void(size_t first, const std::vector<Tensors>& on_device)>& update);

  // Waits until the host tensors hold what the last step wrote.
  void synchronize() const { outgoing_.synchronize(); }

 private:
  c10::Device device_;
  c10::Stream incoming_, outgoing_;
};

}  // namespace quantrain::optim
