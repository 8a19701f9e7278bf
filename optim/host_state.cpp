#include "optim/host_state.h"

#include <optional>
#include <utility>

#include <ATen/ops/empty_strided.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "ops/common/check.h"
#include "ops/common/stream.h"

namespace quantrain::optim {
namespace {

constexpr size_t kPageBytes = size_t{64} << 20;  // of state on the device at a time; two pages are, one on its way

c10::Stream new_stream(c10::Device device) { return c10::impl::VirtualGuardImpl(device.type()).getNewStream(device); }

// Runs [first, last) of states that are at most a page together, or one that is more.
std::vector<std::pair<size_t, size_t>> pages_of(const std::vector<HostState::Tensors>& states) {
  std::vector<std::pair<size_t, size_t>> pages;
  size_t first = 0, held = 0;
  for (size_t i = 0; i < states.size(); ++i) {
    size_t size = 0;
    for (const at::Tensor& tensor : states[i]) size += tensor.nbytes();
    if (i > first && held + size > kPageBytes) {
      pages.emplace_back(first, i);
      first = i;
      held = 0;
    }
    held += size;
  }
  if (first < states.size()) pages.emplace_back(first, states.size());
  return pages;
}

}  // namespace

at::Tensor pinned(const at::Tensor& tensor) {
  const auto options = tensor.options().device(at::kCPU).pinned_memory(true);
  return at::empty_strided(tensor.sizes(), tensor.strides(), options).copy_(tensor);
}

HostState::HostState(c10::Device device)
    : device_(device), incoming_(new_stream(device)), outgoing_(new_stream(device)) {}

void HostState::update(const std::vector<Tensors>& states,
                       const std::function<void(size_t, const std::vector<Tensors>&)>& update) {
  QUANTRAIN_CHECK_VALUE(!is_capturing(device_), "AdamW8bit: expected no capture of a CUDA graph with {}, got one",
                        "state_on_host");
  const c10::impl::VirtualGuardImpl guard(device_.type());
  const c10::Stream current = guard.getStream(device_);
  const auto wait = [&](const c10::Stream& waiting, const c10::Stream& stream) {
    c10::Event event(device_.type());
    event.record(stream);
    event.block(waiting);
  };
  const auto pages = pages_of(states);
  const auto fetch = [&](size_t page) {
    const c10::StreamGuard on(incoming_);
    std::vector<Tensors> on_device;
    for (size_t i = pages[page].first; i < pages[page].second; ++i) {
      Tensors& visiting = on_device.emplace_back();
      for (const at::Tensor& tensor : states[i])
        visiting.push_back(tensor.is_cpu() ? tensor.to(device_, /*non_blocking=*/true) : tensor);
    }
    return on_device;
  };
  wait(incoming_, outgoing_);  // of the last step
  std::vector<Tensors> next;
  if (!pages.empty()) next = fetch(0);
  for (size_t page = 0; page < pages.size(); ++page) {
    const std::vector<Tensors> here = std::move(next);
    wait(current, incoming_);
    if (page + 1 < pages.size()) {
      if (page > 0) wait(incoming_, outgoing_);  // the memory of the page before is free for the next
      next = fetch(page + 1);
    }
    const size_t first = pages[page].first;
    update(first, here);
    wait(outgoing_, current);
    const c10::StreamGuard on(outgoing_);
    for (size_t i = 0; i < here.size(); ++i) {
      for (size_t t = 0; t < here[i].size(); ++t) {
        const at::Tensor& host = states[first + i][t];
        if (!host.is_cpu()) continue;
        at::Tensor(host).copy_(here[i][t], /*non_blocking=*/true);
        here[i][t].record_stream(current);
        here[i][t].record_stream(outgoing_);
      }
    }
  }
}

}  // namespace quantrain::optim
