// What derivatives computed from rounded values share: they have none of their own.
#pragma once

#include <c10/util/Exception.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>

#include <memory>
#include <utility>

namespace quantrain {

// The node of such a derivative: it raises where a second derivative is asked for.
struct NoSecondDerivative : torch::autograd::Node {
  NoSecondDerivative(const char* op, torch::autograd::edge_list&& edges) : Node(std::move(edges)), op_(op) {}

  torch::autograd::variable_list apply(torch::autograd::variable_list&&) override {
    TORCH_CHECK_NOT_IMPLEMENTED(false, op_,
                                ": expected one derivative, got a second one asked for: its gradients are "
                                "computed from rounded values, which have no derivative");
    return {};
  }

 private:
  const char* op_;
};

// Called at the end of a backward pass with its results. With create_graph they depend on grad_output and on whatever
// the node depends on.
inline void refuse_second_derivative(torch::autograd::variable_list& gradients,
                                     const torch::autograd::Variable& grad_output, const char* op) {
  if (!c10::GradMode::is_enabled()) return;
  torch::autograd::edge_list edges;
  if (const auto node = torch::autograd::get_current_node()) edges = node->next_edges();
  edges.push_back(torch::autograd::impl::gradient_edge(grad_output));
  const auto refusal = std::make_shared<NoSecondDerivative>(op, std::move(edges));
  for (torch::autograd::Variable& gradient : gradients)
    if (gradient.defined()) torch::autograd::create_gradient_edge(gradient, refusal);
}

}  // namespace quantrain
