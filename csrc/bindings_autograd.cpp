// Gradients of the ops: which op computes the gradient of which. The formulas are in megatron_omni/ops/<op>.py.
//
// In C++ rather than from Python because these ops run a few times in every layer on few rows as well: a Python
// registration costs 40 to 50 microseconds a call, this one 3. A file of its own because torch's autograd headers take
// longer to compile than everything else; it changes rarely.
#include <ATen/ops/empty_like.h>

#include <optional>
#include <string>
#include <tuple>

#include "autograd.h"

namespace {

using at::Tensor;
using c10::SymInt;
using omni::find;
using omni::if_defined;
using std::optional;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor call_permute(const Tensor& x, const Tensor& row_token, const Tensor& token_offsets, const Tensor& token_rows,
                    SymInt num_rows) {
  static const auto op = find<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, SymInt)>(
      "megatron_omni::permute");
  return op.call(x, row_token, token_offsets, token_rows, std::move(num_rows));
}

Tensor call_unpermute(const Tensor& rows, const optional<Tensor>& weights, const Tensor& row_token,
                      const Tensor& token_offsets, const Tensor& token_rows, SymInt num_tokens,
                      const optional<Tensor>& factor, at::ScalarType out_dtype) {
  static const auto op = find<Tensor(const Tensor&, const optional<Tensor>&, const Tensor&, const Tensor&, const Tensor&,
                                     SymInt, const optional<Tensor>&, at::ScalarType)>("megatron_omni::unpermute");
  return op.call(rows, weights, row_token, token_offsets, token_rows, std::move(num_tokens), factor, out_dtype);
}

optional<Tensor> if_defined_contiguous(const Tensor& x) {
  return x.defined() ? optional<Tensor>(x.contiguous()) : std::nullopt;
}

struct Permute : torch::autograd::Function<Permute> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& row_token, const Tensor& token_offsets,
                        const Tensor& token_rows, SymInt num_rows) {
    ctx->save_for_backward({row_token, token_offsets, token_rows});
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor rows = call_permute(x, row_token, token_offsets, token_rows, std::move(num_rows));
    ctx->saved_data["num_tokens"] = x.sym_size(0);
    return rows;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor grad = grads[0].contiguous();
    const Tensor grad_x = call_unpermute(grad, std::nullopt, saved[0], saved[1], saved[2],
                                         ctx->saved_data["num_tokens"].toSymInt(), std::nullopt, grad.scalar_type());
    return {grad_x, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

struct Unpermute : torch::autograd::Function<Unpermute> {
  static Tensor forward(AutogradContext* ctx, const Tensor& rows, const optional<Tensor>& weights,
                        const Tensor& row_token, const Tensor& token_offsets, const Tensor& token_rows,
                        SymInt num_tokens, const optional<Tensor>& factor, at::ScalarType out_dtype) {
    ctx->save_for_backward({rows, weights.value_or(Tensor()), factor.value_or(Tensor()), row_token, token_offsets,
                            token_rows});
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_unpermute(rows, weights, row_token, token_offsets, token_rows, std::move(num_tokens), factor, out_dtype);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find<std::tuple<Tensor, Tensor>(
        const Tensor&, const Tensor&, const optional<Tensor>&, const optional<Tensor>&, const Tensor&, const Tensor&,
        const Tensor&, bool, bool)>("megatron_omni::unpermute_backward");
    const auto saved = ctx->get_saved_variables();
    const bool needs_rows = ctx->needs_input_grad(0), needs_weights = saved[1].defined() && ctx->needs_input_grad(1);
    auto [grad_rows, grad_weights] = op.call(grads[0].contiguous(), saved[0], if_defined(saved[1]), if_defined(saved[2]),
                                             saved[3], saved[4], saved[5], needs_rows, needs_weights);
    return {needs_rows ? grad_rows : Tensor(), needs_weights ? grad_weights : Tensor(), Tensor(), Tensor(), Tensor(),
            Tensor(), Tensor(), Tensor()};
  }
};

struct GatherAssignments : torch::autograd::Function<GatherAssignments> {
  static Tensor forward(AutogradContext* ctx, const Tensor& values, const Tensor& row_token, const Tensor& row_expert) {
    static const auto op = find<Tensor(const Tensor&, const Tensor&, const Tensor&)>("megatron_omni::gather_assignments");
    ctx->save_for_backward({row_token, row_expert});
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor entries = op.call(values, row_token, row_expert);
    ctx->saved_data["num_tokens"] = values.sym_size(0);
    ctx->saved_data["num_experts"] = values.sym_size(1);
    return entries;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op =
        find<Tensor(const Tensor&, const Tensor&, const Tensor&, SymInt, SymInt)>("megatron_omni::scatter_assignments");
    const auto saved = ctx->get_saved_variables();
    return {op.call(grads[0].contiguous(), saved[0], saved[1], ctx->saved_data["num_tokens"].toSymInt(),
                    ctx->saved_data["num_experts"].toSymInt()),
            Tensor(), Tensor()};
  }
};

struct ToppRoute : torch::autograd::Function<ToppRoute> {
  static variable_list forward(AutogradContext* ctx, const Tensor& z, int64_t num_routed, int64_t num_null, double top_p,
                               optional<int64_t> top_k, const std::string& estimator, const optional<Tensor>& gumbel,
                               const optional<Tensor>& bernoulli, optional<int64_t> max_routed,
                               const optional<Tensor>& padding, const optional<Tensor>& keep) {
    static const auto op = find<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
        const Tensor&, int64_t, int64_t, double, optional<int64_t>, c10::string_view, const optional<Tensor>&,
        const optional<Tensor>&, optional<int64_t>, const optional<Tensor>&, const optional<Tensor>&)>(
        "megatron_omni::topp_route");
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [weights, shared_weights, mask, scale, k, draw_rank] =
        op.call(z, num_routed, num_null, top_p, top_k, estimator, gumbel, bernoulli, max_routed, padding, keep);
    ctx->save_for_backward({weights, shared_weights, scale});
    ctx->saved_data["estimator"] = estimator;
    ctx->mark_non_differentiable({mask, scale, k, draw_rank});
    ctx->set_materialize_grads(false);
    return {weights, shared_weights, mask, scale, k, draw_rank};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find<Tensor(const optional<Tensor>&, const optional<Tensor>&, const Tensor&, const Tensor&,
                                       const Tensor&, c10::string_view)>("megatron_omni::topp_route_backward");
    const auto saved = ctx->get_saved_variables();
    variable_list result(11);
    result[0] = op.call(if_defined_contiguous(grads[0]), if_defined_contiguous(grads[1]), saved[0], saved[1], saved[2],
                        ctx->saved_data["estimator"].toStringRef());
    return result;
  }
};

struct ReleaseRoute : torch::autograd::Function<ReleaseRoute> {
  static variable_list forward(AutogradContext* ctx, const Tensor& z, int64_t num_routed, int64_t num_null, double top_p,
                               optional<int64_t> top_k, double eps, const optional<Tensor>& gumbel,
                               const optional<Tensor>& bernoulli, optional<int64_t> max_routed,
                               const optional<Tensor>& padding, const optional<Tensor>& keep) {
    static const auto op = find<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
        const Tensor&, int64_t, int64_t, double, optional<int64_t>, double, const optional<Tensor>&, const optional<Tensor>&,
        optional<int64_t>, const optional<Tensor>&, const optional<Tensor>&)>("megatron_omni::release_route");
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [weights, shared_weights, mask, k, draw_rank, multiplier] =
        op.call(z, num_routed, num_null, top_p, top_k, eps, gumbel, bernoulli, max_routed, padding, keep);
    ctx->save_for_backward({z, mask, draw_rank, multiplier, keep.value_or(Tensor())});
    ctx->saved_data["eps"] = eps;
    ctx->mark_non_differentiable({mask, k, draw_rank, multiplier});
    ctx->set_materialize_grads(false);
    return {weights, shared_weights, mask, k, draw_rank, multiplier};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find<Tensor(const optional<Tensor>&, const optional<Tensor>&, const Tensor&, const Tensor&,
                                       const Tensor&, const Tensor&, const optional<Tensor>&, double)>(
        "megatron_omni::release_route_backward");
    const auto saved = ctx->get_saved_variables();
    variable_list result(11);
    result[0] = op.call(if_defined_contiguous(grads[0]), if_defined_contiguous(grads[1]), saved[0], saved[1], saved[2],
                        saved[3], if_defined(saved[4]), ctx->saved_data["eps"].toDouble());
    return result;
  }
};

struct GroupedGemm : torch::autograd::Function<GroupedGemm> {
  using Op = Tensor(const Tensor&, const Tensor&, const Tensor&);
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& w, const Tensor& offsets) {
    static const auto op = find<Op>("megatron_omni::grouped_gemm");
    ctx->save_for_backward({x, w, offsets});
    at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(x, w, offsets);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto dgrad = find<Op>("megatron_omni::grouped_gemm_dgrad");
    static const auto wgrad = find<Op>("megatron_omni::grouped_gemm_wgrad");
    const auto saved = ctx->get_saved_variables();
    const Tensor grad = grads[0].contiguous();
    return {ctx->needs_input_grad(0) ? dgrad.call(grad, saved[1], saved[2]) : Tensor(),
            ctx->needs_input_grad(1) ? wgrad.call(saved[0], grad, saved[2]) : Tensor(), Tensor()};
  }
};

// With main_grad buffers the weights' gradients are added there, and autograd gets uninitialised memory for them: whoever
// listens for a gradient (overlapped reduction) hears that it is there, and nobody may use it.
struct ExpertMlp : torch::autograd::Function<ExpertMlp> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& w1, const Tensor& w2,
                               const Tensor& offsets, const optional<Tensor>& row_weight,
                               const optional<Tensor>& main_grad1, const optional<Tensor>& main_grad2) {
    static const auto op =
        find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const optional<Tensor>&,
                                        const optional<Tensor>&, const optional<Tensor>&)>("megatron_omni::expert_mlp");
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, h] = op.call(x, w1, w2, offsets, row_weight, main_grad1, main_grad2);
    // Not saved as variables: other backward passes add to them in between.
    ctx->saved_data["main_grad1"] = main_grad1;
    ctx->saved_data["main_grad2"] = main_grad2;
    ctx->save_for_backward({x, h, w1, w2, offsets, row_weight.value_or(Tensor())});
    ctx->mark_non_differentiable({h});
    ctx->set_materialize_grads(false);
    return {y, h};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find<std::tuple<Tensor, Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const optional<Tensor>&,
        bool, bool, bool, bool, const optional<Tensor>&, const optional<Tensor>&)>("megatron_omni::expert_mlp_backward");
    if (!grads[0].defined()) return variable_list(7);
    const auto saved = ctx->get_saved_variables();
    const bool x = ctx->needs_input_grad(0), w1 = ctx->needs_input_grad(1), w2 = ctx->needs_input_grad(2);
    const bool row_weight = saved[5].defined() && ctx->needs_input_grad(4);
    const auto main_grad1 = ctx->saved_data["main_grad1"].toOptional<Tensor>();
    const auto main_grad2 = ctx->saved_data["main_grad2"].toOptional<Tensor>();
    auto [dx, dw1, dw2, drow_weight] = op.call(grads[0].contiguous(), saved[0], saved[1], saved[2], saved[3], saved[4],
                                               if_defined(saved[5]), x, w1, w2, row_weight, main_grad1, main_grad2);
    if (main_grad1 && w1) dw1 = at::empty_like(saved[2]);
    if (main_grad2 && w2) dw2 = at::empty_like(saved[3]);
    return {x ? dx : Tensor(), w1 ? dw1 : Tensor(), w2 ? dw2 : Tensor(), Tensor(), row_weight ? drow_weight : Tensor(),
            Tensor(), Tensor()};
  }
};

Tensor permute(const Tensor& x, const Tensor& row_token, const Tensor& token_offsets, const Tensor& token_rows,
               SymInt num_rows) {
  return Permute::apply(x, row_token, token_offsets, token_rows, std::move(num_rows));
}

Tensor unpermute(const Tensor& rows, const optional<Tensor>& weights, const Tensor& row_token,
                 const Tensor& token_offsets, const Tensor& token_rows, SymInt num_tokens,
                 const optional<Tensor>& gradient_factor, at::ScalarType out_dtype) {
  return Unpermute::apply(rows, weights, row_token, token_offsets, token_rows, std::move(num_tokens), gradient_factor,
                          out_dtype);
}

Tensor gather_assignments(const Tensor& values, const Tensor& row_token, const Tensor& row_expert) {
  return GatherAssignments::apply(values, row_token, row_expert);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> topp_route(
    const Tensor& z, int64_t num_routed, int64_t num_null, double top_p, optional<int64_t> top_k,
    c10::string_view estimator, const optional<Tensor>& gumbel, const optional<Tensor>& bernoulli,
    optional<int64_t> max_routed, const optional<Tensor>& padding, const optional<Tensor>& keep) {
  auto out = ToppRoute::apply(z, num_routed, num_null, top_p, top_k, std::string(estimator), gumbel, bernoulli, max_routed,
                              padding, keep);
  return {out[0], out[1], out[2], out[3], out[4], out[5]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> release_route(
    const Tensor& z, int64_t num_routed, int64_t num_null, double top_p, optional<int64_t> top_k, double eps,
    const optional<Tensor>& gumbel, const optional<Tensor>& bernoulli, optional<int64_t> max_routed,
    const optional<Tensor>& padding, const optional<Tensor>& keep) {
  auto out =
      ReleaseRoute::apply(z, num_routed, num_null, top_p, top_k, eps, gumbel, bernoulli, max_routed, padding, keep);
  return {out[0], out[1], out[2], out[3], out[4], out[5]};
}

Tensor grouped_gemm(const Tensor& x, const Tensor& w, const Tensor& offsets) { return GroupedGemm::apply(x, w, offsets); }

std::tuple<Tensor, Tensor> expert_mlp(const Tensor& x, const Tensor& w1, const Tensor& w2, const Tensor& offsets,
                                      const optional<Tensor>& row_weight, const optional<Tensor>& main_grad1,
                                      const optional<Tensor>& main_grad2) {
  auto out = ExpertMlp::apply(x, w1, w2, offsets, row_weight, main_grad1, main_grad2);
  return {out[0], out[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(megatron_omni, Autograd, m) {
  m.impl("permute", permute);
  m.impl("unpermute", unpermute);
  m.impl("gather_assignments", gather_assignments);
  m.impl("topp_route", topp_route);
  m.impl("release_route", release_route);
  m.impl("grouped_gemm", grouped_gemm);
  m.impl("expert_mlp", expert_mlp);
}
