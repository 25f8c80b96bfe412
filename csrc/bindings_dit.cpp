// The ops of the picture generator's blocks (megatron_omni/ops/dit.py has what they compute): schemas, argument checks,
// allocation, calls to kernels.h, and gradients. fp32 on a CPU. Wrong arguments raise ValueError with the argument's name.
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <utility>

#include "arguments.h"
#include "autograd.h"
#include "kernels.h"
#include "pool.h"

namespace {

using at::Tensor;
using omni::find;
using omni::if_defined;
using omni::pool;
using std::optional;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

constexpr int64_t kLanes = 16;  // widths are multiples of it

void check(const Tensor& x, const char* name, at::IntArrayRef sizes) { omni::check(x, x, at::kFloat, sizes, name); }

void check_dims(const Tensor& x, const char* name, int64_t dims, int64_t width) {
  TORCH_CHECK_VALUE(x.dim() == dims, name, ": has ", x.dim(), " dimensions, must have ", dims);
  TORCH_CHECK_VALUE(width % kLanes == 0 && width > 0, name, ": is ", width, " wide, must be a multiple of ", kLanes);
  check(x, name, x.sizes());
}

const float* in(const Tensor& x) { return x.const_data_ptr<float>(); }
const float* in(const optional<Tensor>& x) { return x ? x->const_data_ptr<float>() : nullptr; }
float* out(const Tensor& x) { return x.mutable_data_ptr<float>(); }
Tensor sized(at::IntArrayRef sizes, const Tensor& like) { return at::empty(sizes, like.options()); }

// ---- modulated_norm ---------------------------------------------------------------------------------------------------

omni::cpu::ModulatedNorm norm_of(const Tensor& x, const Tensor& weight, const optional<Tensor>& factor) {
  check_dims(x, "x", 3, x.size(-1));
  check(weight, "weight", {x.size(2)});
  if (factor) check(*factor, "factor", {x.size(0), x.size(2)});
  omni::cpu::ModulatedNorm a{};
  a.B = x.size(0), a.T = x.size(1), a.H = x.size(2), a.x = in(x), a.weight = in(weight), a.factor = in(factor);
  return a;
}

Two modulated_norm(const Tensor& x, const Tensor& weight, const optional<Tensor>& factor, const optional<Tensor>& residual,
                   double eps) {
  auto a = norm_of(x, weight, factor);
  if (residual) check(*residual, "residual", x.sizes());
  Tensor y = at::empty_like(x), rstd = sized({a.B, a.T}, x);
  a.eps = static_cast<float>(eps), a.residual = in(residual), a.y = out(y), a.rstd = out(rstd);
  omni::cpu::modulated_norm(a, pool());
  return {y, rstd};
}

Two modulated_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& rstd, const Tensor& weight,
                            const optional<Tensor>& factor) {
  auto a = norm_of(x, weight, factor);
  check(grad, "grad", x.sizes());
  check(rstd, "rstd", {a.B, a.T});
  Tensor grad_x = at::empty_like(x), sums = sized({a.B, a.H}, x);
  a.grad = in(grad), a.rstd = out(rstd), a.grad_x = out(grad_x), a.sums = out(sums);
  omni::cpu::modulated_norm_backward(a, pool());
  return {grad_x, sums};
}

// ---- rotary_norm ------------------------------------------------------------------------------------------------------

omni::cpu::RotaryNorm rotary_of(const Tensor& x, const Tensor& weight, const Tensor& turns, int64_t heads) {
  check_dims(x, "x", 3, x.size(-1));
  TORCH_CHECK_VALUE(heads > 0 && x.size(2) % heads == 0 && x.size(2) / heads % kLanes == 0, "heads: ", heads,
                    " of rows of ", x.size(2), " must be multiples of ", kLanes, " wide");
  omni::cpu::RotaryNorm a{};
  a.B = x.size(0), a.T = x.size(1), a.heads = heads, a.D = x.size(2) / heads;
  check(weight, "weight", {x.size(2)});
  check(turns, "turns", {a.T, a.D / 2, 2});
  a.x = in(x), a.weight = in(weight), a.turns = in(turns);
  return a;
}

Two rotary_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& turns, int64_t heads, double eps) {
  auto a = rotary_of(x, weight, turns, heads);
  check(bias, "bias", weight.sizes());
  Tensor y = sized({a.B, heads, a.T, a.D}, x), stats = sized({a.B, a.T, 2}, x);
  a.eps = static_cast<float>(eps), a.bias = in(bias), a.y = out(y), a.stats = out(stats);
  omni::cpu::rotary_norm(a, pool());
  return {y, stats};
}

Three rotary_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& stats, const Tensor& weight,
                           const Tensor& turns) {
  TORCH_CHECK_VALUE(grad.dim() == 4, "grad: has ", grad.dim(), " dimensions, must have 4");
  auto a = rotary_of(x, weight, turns, grad.size(1));
  check(grad, "grad", {a.B, a.heads, a.T, a.D});
  check(stats, "stats", {a.B, a.T, 2});
  Tensor grad_x = at::empty_like(x), weights = sized({a.B, x.size(2)}, x), biases = sized({a.B, x.size(2)}, x);
  a.grad = in(grad), a.stats = out(stats), a.grad_x = out(grad_x), a.weight_sums = out(weights), a.bias_sums = out(biases);
  omni::cpu::rotary_norm_backward(a, pool());
  return {grad_x, weights, biases};
}

// ---- swiglu -----------------------------------------------------------------------------------------------------------

Tensor swiglu(const Tensor& gate, const Tensor& up) {
  check(gate, "gate", gate.sizes());
  check(up, "up", gate.sizes());
  Tensor y = at::empty_like(gate);
  omni::cpu::swiglu({gate.numel(), in(gate), in(up), nullptr, out(y), nullptr, nullptr}, pool());
  return y;
}

Two swiglu_backward(const Tensor& grad, const Tensor& gate, const Tensor& up) {
  check(gate, "gate", gate.sizes());
  check(up, "up", gate.sizes());
  check(grad, "grad", gate.sizes());
  Tensor grad_gate = at::empty_like(gate), grad_up = at::empty_like(gate);
  omni::cpu::swiglu_backward({gate.numel(), in(gate), in(up), in(grad), nullptr, out(grad_gate), out(grad_up)}, pool());
  return {grad_gate, grad_up};
}

// ---- joint_attention --------------------------------------------------------------------------------------------------

using MaybeTensor = optional<Tensor>;

// Rows [B, n, groups D] of conditions.
omni::cpu::Segment rows_of(const MaybeTensor& keys, const MaybeTensor& values, const MaybeTensor& gate,
                           const MaybeTensor& mask, const omni::cpu::JointAttention& a, const char* names[4]) {
  omni::cpu::Segment rows{};
  if (!keys) return rows;
  TORCH_CHECK_VALUE(values && gate, names[0], ": needs ", names[1], " and ", names[2]);
  TORCH_CHECK_VALUE(keys->dim() == 3, names[0], ": has ", keys->dim(), " dimensions, must have 3");
  const int64_t count = keys->size(1), width = a.groups * a.D;
  check(*keys, names[0], {a.B, count, width});
  check(*values, names[1], {a.B, count, width});
  check(*gate, names[2], {a.heads});
  omni::check(mask, *keys, at::kBool, {a.B, count}, names[3]);
  rows.count = count, rows.scale = 1 / std::sqrt(static_cast<float>(a.D));
  rows.keys = in(keys), rows.values = in(values), rows.gate = in(gate);
  rows.keys_at = rows.values_at = {count * width, a.D, width};
  rows.mask = mask ? mask->const_data_ptr<bool>() : nullptr;
  return rows;
}

struct Arguments {
  const Tensor &query, &keys, &values;
  const MaybeTensor &vision_keys, &vision_values, &vision_gate, &vision_mask;
  const MaybeTensor &caption_keys, &caption_values, &caption_gate, &caption_mask;
  double scale;
};

omni::cpu::JointAttention attention_of(const Arguments& x) {
  check_dims(x.query, "query", 4, x.query.size(-1));
  check_dims(x.keys, "keys", 4, x.keys.size(-1));
  omni::cpu::JointAttention a{};
  a.B = x.query.size(0), a.heads = x.query.size(1), a.T = x.query.size(2), a.D = x.query.size(3);
  a.groups = x.keys.size(1);
  const int64_t count = x.keys.size(2), width = a.groups * a.D;
  TORCH_CHECK_VALUE(a.groups > 0 && a.heads % a.groups == 0, "keys: ", a.groups, " groups for ", a.heads, " heads");
  check(x.keys, "keys", {a.B, a.groups, count, a.D});
  check(x.values, "values", {a.B, count, width});
  a.query = in(x.query);
  auto& own = a.segments[0];
  own.count = count, own.scale = static_cast<float>(x.scale), own.keys = in(x.keys), own.values = in(x.values);
  own.keys_at = {width * count, count * a.D, a.D}, own.values_at = {width * count, a.D, width};
  const char* vision[] = {"vision_keys", "vision_values", "vision_gate", "vision_mask"};
  const char* caption[] = {"caption_keys", "caption_values", "caption_gate", "caption_mask"};
  a.segments[1] = rows_of(x.vision_keys, x.vision_values, x.vision_gate, x.vision_mask, a, vision);
  a.segments[2] = rows_of(x.caption_keys, x.caption_values, x.caption_gate, x.caption_mask, a, caption);
  return a;
}

#define OMNI_ATTENTION_ARGUMENTS                                                                                      \
  const Tensor &query, const Tensor &keys, const Tensor &values, const MaybeTensor &vision_keys,                      \
      const MaybeTensor &vision_values, const MaybeTensor &vision_gate, const MaybeTensor &vision_mask,               \
      const MaybeTensor &caption_keys, const MaybeTensor &caption_values, const MaybeTensor &caption_gate,            \
      const MaybeTensor &caption_mask, double scale
#define OMNI_ATTENTION_PASSED                                                                                         \
  query, keys, values, vision_keys, vision_values, vision_gate, vision_mask, caption_keys, caption_values,            \
      caption_gate, caption_mask, scale

Tensor joint_attention(OMNI_ATTENTION_ARGUMENTS) {
  auto a = attention_of({OMNI_ATTENTION_PASSED});
  Tensor result = sized({a.B, a.T, a.heads * a.D}, query);
  a.out = out(result);
  omni::cpu::joint_attention(a, pool());
  return result;
}

// Gradients of query, keys, values, then of keys, values and gate of vision and of caption: empty where there are none.
std::vector<Tensor> joint_attention_backward(const Tensor& grad, OMNI_ATTENTION_ARGUMENTS) {
  auto a = attention_of({OMNI_ATTENTION_PASSED});
  check(grad, "grad", {a.B, a.T, a.heads * a.D});
  std::vector<Tensor> found{at::empty_like(query)};
  const auto segment = [&](omni::cpu::Segment& rows, const MaybeTensor& keys, const MaybeTensor& values, bool gated) {
    found.push_back(keys ? at::zeros_like(*keys) : sized({0}, query));
    found.push_back(keys ? at::zeros_like(*values) : sized({0}, query));
    rows.grad_keys = out(found[found.size() - 2]), rows.grad_values = out(found.back());
    if (!gated) return;
    found.push_back(keys ? sized({a.B, a.heads}, query) : sized({0}, query));
    rows.grad_gate = keys ? out(found.back()) : nullptr;
  };
  segment(a.segments[0], keys, values, false);
  segment(a.segments[1], vision_keys, vision_values, true);
  segment(a.segments[2], caption_keys, caption_values, true);
  a.grad = in(grad), a.grad_query = out(found[0]);
  omni::cpu::joint_attention_backward(a, pool());
  return found;
}

// ---- gradients --------------------------------------------------------------------------------------------------------

struct ModulatedNorm : torch::autograd::Function<ModulatedNorm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const optional<Tensor>& factor,
                               const optional<Tensor>& residual, double eps) {
    static const auto op = find<decltype(modulated_norm)>("megatron_omni::modulated_norm");
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, rstd] = op.call(x, weight, factor, residual, eps);
    ctx->save_for_backward({x, weight, factor.value_or(Tensor()), rstd});
    ctx->saved_data["residual"] = residual.has_value();
    ctx->mark_non_differentiable({rstd});
    return {y, rstd};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find<decltype(modulated_norm_backward)>("megatron_omni::modulated_norm_backward");
    const auto saved = ctx->get_saved_variables();
    const Tensor grad = grads[0].contiguous(), &weight = saved[1], &factor = saved[2];
    auto [grad_x, sums] = op.call(grad, saved[0], saved[3], weight, if_defined(factor));
    Tensor grad_factor, grad_weight = (factor.defined() ? sums * factor : sums).sum(0);
    if (factor.defined()) grad_factor = sums * weight;
    return {grad_x, grad_weight, grad_factor, ctx->saved_data["residual"].toBool() ? grad : Tensor(), Tensor()};
  }
};

struct RotaryNorm : torch::autograd::Function<RotaryNorm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Tensor& bias,
                               const Tensor& turns, int64_t heads, double eps) {
    static const auto op = find<decltype(rotary_norm)>("megatron_omni::rotary_norm");
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, stats] = op.call(x, weight, bias, turns, heads, eps);
    ctx->save_for_backward({x, stats, weight, turns});
    ctx->mark_non_differentiable({stats});
    return {y, stats};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find<decltype(rotary_norm_backward)>("megatron_omni::rotary_norm_backward");
    const auto saved = ctx->get_saved_variables();
    auto [grad_x, weights, biases] = op.call(grads[0].contiguous(), saved[0], saved[1], saved[2], saved[3]);
    return {grad_x, weights.sum(0), biases.sum(0), Tensor(), Tensor(), Tensor()};
  }
};

struct SwiGlu : torch::autograd::Function<SwiGlu> {
  static Tensor forward(AutogradContext* ctx, const Tensor& gate, const Tensor& up) {
    static const auto op = find<decltype(swiglu)>("megatron_omni::swiglu");
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({gate, up});
    return op.call(gate, up);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find<decltype(swiglu_backward)>("megatron_omni::swiglu_backward");
    const auto saved = ctx->get_saved_variables();
    auto [grad_gate, grad_up] = op.call(grads[0].contiguous(), saved[0], saved[1]);
    return {grad_gate, grad_up};
  }
};

struct JointAttention : torch::autograd::Function<JointAttention> {
  static Tensor forward(AutogradContext* ctx, OMNI_ATTENTION_ARGUMENTS) {
    static const auto op = find<decltype(joint_attention)>("megatron_omni::joint_attention");
    at::AutoDispatchBelowADInplaceOrView guard;
    variable_list saved{query, keys, values};
    for (const auto* x : {&vision_keys, &vision_values, &vision_gate, &vision_mask, &caption_keys, &caption_values,
                          &caption_gate, &caption_mask})
      saved.push_back(x->value_or(Tensor()));
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["scale"] = scale;
    return op.call(OMNI_ATTENTION_PASSED);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find<decltype(joint_attention_backward)>("megatron_omni::joint_attention_backward");
    const auto x = ctx->get_saved_variables();
    auto found = op.call(grads[0].contiguous(), x[0], x[1], x[2], if_defined(x[3]), if_defined(x[4]), if_defined(x[5]),
                         if_defined(x[6]), if_defined(x[7]), if_defined(x[8]), if_defined(x[9]), if_defined(x[10]),
                         ctx->saved_data["scale"].toDouble());
    const bool seen = x[3].defined(), read = x[7].defined();
    const auto part = [&](bool there, int i) { return there ? found[i] : Tensor(); };
    const auto gate = [&](bool there, int i) { return there ? found[i].sum(0) : Tensor(); };
    return {found[0],      found[1],      found[2],      part(seen, 3), part(seen, 4), gate(seen, 5), Tensor(),
            part(read, 6), part(read, 7), gate(read, 8), Tensor(),      Tensor()};
  }
};

Two modulated_norm_autograd(const Tensor& x, const Tensor& weight, const optional<Tensor>& factor,
                            const optional<Tensor>& residual, double eps) {
  auto found = ModulatedNorm::apply(x, weight, factor, residual, eps);
  return {found[0], found[1]};
}

Two rotary_norm_autograd(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& turns, int64_t heads,
                         double eps) {
  auto found = RotaryNorm::apply(x, weight, bias, turns, heads, eps);
  return {found[0], found[1]};
}

Tensor swiglu_autograd(const Tensor& gate, const Tensor& up) { return SwiGlu::apply(gate, up); }

Tensor joint_attention_autograd(OMNI_ATTENTION_ARGUMENTS) { return JointAttention::apply(OMNI_ATTENTION_PASSED); }

}  // namespace

TORCH_LIBRARY_FRAGMENT(megatron_omni, m) {
  m.def("modulated_norm(Tensor x, Tensor weight, Tensor? factor, Tensor? residual, float eps) -> (Tensor y, Tensor rstd)");
  m.def("modulated_norm_backward(Tensor grad, Tensor x, Tensor rstd, Tensor weight, Tensor? factor)"
        " -> (Tensor grad_x, Tensor sums)");
  m.def("rotary_norm(Tensor x, Tensor weight, Tensor bias, Tensor turns, int heads, float eps) -> (Tensor y, Tensor stats)");
  m.def("rotary_norm_backward(Tensor grad, Tensor x, Tensor stats, Tensor weight, Tensor turns)"
        " -> (Tensor grad_x, Tensor weight_sums, Tensor bias_sums)");
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor grad_gate, Tensor grad_up)");
  m.def("joint_attention(Tensor query, Tensor keys, Tensor values, Tensor? vision_keys, Tensor? vision_values,"
        " Tensor? vision_gate, Tensor? vision_mask, Tensor? caption_keys, Tensor? caption_values, Tensor? caption_gate,"
        " Tensor? caption_mask, float scale) -> Tensor");
  m.def("joint_attention_backward(Tensor grad, Tensor query, Tensor keys, Tensor values, Tensor? vision_keys,"
        " Tensor? vision_values, Tensor? vision_gate, Tensor? vision_mask, Tensor? caption_keys, Tensor? caption_values,"
        " Tensor? caption_gate, Tensor? caption_mask, float scale) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(megatron_omni, CPU, m) {
  m.impl("modulated_norm", modulated_norm);
  m.impl("modulated_norm_backward", modulated_norm_backward);
  m.impl("rotary_norm", rotary_norm);
  m.impl("rotary_norm_backward", rotary_norm_backward);
  m.impl("swiglu", swiglu);
  m.impl("swiglu_backward", swiglu_backward);
  m.impl("joint_attention", joint_attention);
  m.impl("joint_attention_backward", joint_attention_backward);
}

TORCH_LIBRARY_IMPL(megatron_omni, Autograd, m) {
  m.impl("modulated_norm", modulated_norm_autograd);
  m.impl("rotary_norm", rotary_norm_autograd);
  m.impl("swiglu", swiglu_autograd);
  m.impl("joint_attention", joint_attention_autograd);
}
