// The parts of the picture generator's blocks on odd sizes against float64 loops, forward and backward. Rows that a mask
// leaves out are not numbers, what a kernel must not touch is null, and every array ends where a protected page begins.
#include "checks.h"

using namespace omni;

namespace {

int64_t cases = 0;

// A number of the reference, and the sum of the sizes of what it was added up from: what roundings are measured with.
struct Term {
  double value = 0, size = 0;
  Term() = default;
  Term(double x) : value(x), size(std::fabs(x)) {}
  Term(double x, double s) : value(x), size(s) {}
};
Term operator+(Term a, Term b) { return {a.value + b.value, a.size + b.size}; }
Term operator-(Term a, Term b) { return {a.value - b.value, a.size + b.size}; }
Term operator*(Term a, Term b) { return {a.value * b.value, a.size * b.size}; }
using Terms = std::vector<Term>;

// Sums of n terms in their way.
void check_term(float got, Term expected, int64_t n, const char* what, int64_t i, int64_t j) {
  const double error = (kOps + std::sqrt(n + 2.0)) * unit<float>() * expected.size;
  check(got, expected.value, stored<float>(expected.value, error), what, i, j);
}

void modulated_norm(int64_t B, int64_t T, int64_t H, bool factor, bool residual) {
  const double eps = 1e-3;
  Guarded<float> x(B * T * H), weight(H), by(B * H), before(B * T * H), grad(B * T * H);
  Guarded<float> y(B * T * H), rstd(B * T), grad_x(B * T * H), sums(B * H);
  for (auto* in : {&x, &weight, &by, &before, &grad}) fill(*in);
  cpu::ModulatedNorm a{B, T, H, float(eps), x.data, weight.data, factor ? by.data : nullptr};
  a.residual = residual ? before.data : nullptr, a.y = y.data, a.rstd = rstd.data;
  cpu::modulated_norm(a, many);
  a.residual = nullptr, a.y = nullptr, a.grad = grad.data, a.grad_x = grad_x.data, a.sums = sums.data;
  cpu::modulated_norm_backward(a, many);
  ++cases;
  Terms sum(B * H), f(H);
  for (int64_t row = 0; row < B * T; ++row) {
    const int64_t b = row / T;
    const float *X = x.data + row * H, *G = grad.data + row * H;
    double squares = 0;
    Term dots;
    for (int64_t i = 0; i < H; ++i) squares += double(X[i]) * X[i];
    const Term r = 1 / std::sqrt(squares / H + float(eps));
    for (int64_t i = 0; i < H; ++i) {
      f[i] = factor ? Term(weight[i]) * Term(by[b * H + i]) : Term(weight[i]);
      dots = dots + f[i] * Term(G[i]) * Term(X[i]);
      sum[b * H + i] = sum[b * H + i] + Term(G[i]) * Term(X[i]) * r;
    }
    check_term(rstd[row], r, H, "rstd", b, row % T);
    for (int64_t i = 0; i < H; ++i) {
      const Term normed = f[i] * Term(X[i]) * r;
      check_term(y[row * H + i], residual ? normed + Term(before[row * H + i]) : normed, H, "modulated_norm", row, i);
      check_term(grad_x[row * H + i], f[i] * Term(G[i]) * r - Term(X[i]) * dots * r * r * r * Term(1.0 / H), H,
                 "grad_x of modulated_norm", row, i);
    }
  }
  for (int64_t i = 0; i < B * H; ++i) check_term(sums[i], sum[i], H + T, "sums of modulated_norm", i / H, i % H);
}

void rotary_norm(int64_t B, int64_t T, int64_t heads, int64_t D) {
  const int64_t W = heads * D;
  const double eps = 1e-3;
  Guarded<float> x(B * T * W), weight(W), bias(W), turns(T * D), grad(B * T * W);
  Guarded<float> y(B * T * W), stats(B * T * 2), grad_x(B * T * W), weight_sums(B * W), bias_sums(B * W);
  for (auto* in : {&x, &weight, &bias, &turns, &grad}) fill(*in);
  cpu::RotaryNorm a{B, T, heads, D, float(eps), x.data, weight.data, bias.data, turns.data};
  a.y = y.data, a.stats = stats.data;
  cpu::rotary_norm(a, many);
  a.bias = nullptr, a.y = nullptr, a.grad = grad.data;
  a.grad_x = grad_x.data, a.weight_sums = weight_sums.data, a.bias_sums = bias_sums.data;
  cpu::rotary_norm_backward(a, many);
  ++cases;
  Terms of_weight(B * W), of_bias(B * W), off(W), g(W);
  for (int64_t row = 0; row < B * T; ++row) {
    const int64_t b = row / T, t = row % T;
    const float* X = x.data + row * W;
    Term mean;
    double squares = 0;
    for (int64_t i = 0; i < W; ++i) mean = mean + Term(X[i]) * Term(1.0 / W);
    for (int64_t i = 0; i < W; ++i) squares += (X[i] - mean.value) * (X[i] - mean.value);
    const Term r = 1 / std::sqrt(squares / W + float(eps));
    check_term(stats[2 * row], mean, W, "mean", b, t);
    check_term(stats[2 * row + 1], r, W, "deviation", b, t);
    for (int64_t i = 0; i < W; ++i) off[i] = (Term(X[i]) - mean) * r;
    for (int64_t i = 0; i < W; i += 2) {
      const int64_t c = i % D, to = ((b * heads + i / D) * T + t) * D + c;
      const Term cos = turns[t * D + c], sin = turns[t * D + c + 1], even = grad[to], odd = grad[to + 1];
      const Term one = off[i] * Term(weight[i]) + Term(bias[i]), other = off[i + 1] * Term(weight[i + 1]) + Term(bias[i + 1]);
      check_term(y[to], one * cos - other * sin, W, "rotary_norm", row, i);
      check_term(y[to + 1], one * sin + other * cos, W, "rotary_norm", row, i + 1);
      g[i] = even * cos + odd * sin, g[i + 1] = odd * cos - even * sin;
    }
    Term level, slope;
    for (int64_t i = 0; i < W; ++i) {
      level = level + g[i] * Term(weight[i]) * Term(1.0 / W);
      slope = slope + g[i] * Term(weight[i]) * off[i] * Term(1.0 / W);
      of_weight[b * W + i] = of_weight[b * W + i] + g[i] * off[i];
      of_bias[b * W + i] = of_bias[b * W + i] + g[i];
    }
    for (int64_t i = 0; i < W; ++i)
      check_term(grad_x[row * W + i], r * (g[i] * Term(weight[i]) - level - off[i] * slope), 2 * W,
                 "grad_x of rotary_norm", row, i);
  }
  for (int64_t i = 0; i < B * W; ++i) {
    check_term(weight_sums[i], of_weight[i], W + T, "weight_sums", i / W, i % W);
    check_term(bias_sums[i], of_bias[i], T, "bias_sums", i / W, i % W);
  }
}

void swiglu(int64_t n) {
  Guarded<float> gate(n), up(n), grad(n), y(n), grad_gate(n), grad_up(n);
  for (auto* in : {&gate, &up, &grad}) fill(*in);
  for (int64_t i = 0; i < n; ++i) gate[i] *= i % 11 ? 10.0f : 400.0f;  // past what exp can give, too
  cpu::swiglu({n, gate.data, up.data, nullptr, y.data, nullptr, nullptr}, many);
  cpu::swiglu_backward({n, gate.data, up.data, grad.data, nullptr, grad_gate.data, grad_up.data}, many);
  ++cases;
  for (int64_t i = 0; i < n; ++i) {
    const double sigmoid = 1 / (1 + std::exp(-double(gate[i])));
    const Term s(sigmoid, sigmoid + 1e-30), silu = s * Term(gate[i]), u = up[i], g = grad[i];  // exp ends at about 1e38
    check_term(y[i], silu * u, 1, "swiglu", i, 0);
    check_term(grad_gate[i], g * u * (silu * (Term(1) - s) + s), 1, "grad_gate of swiglu", i, 0);
    check_term(grad_up[i], g * silu, 1, "grad_up of swiglu", i, 0);
  }
}

// ---- joint_attention --------------------------------------------------------------------------------------------------

struct Sizes { int64_t B, T, heads, groups, D; };

// Rows of one segment, their gradients and their terms; keys are [B, groups, count, D] or as values, [B, count, groups, D].
struct Rows {
  Rows(const Sizes& n, int64_t count, double scale, bool keys_by_group, bool gated, bool masked)
      : count(count), there(count > 0 || gated), keys(n.B * count * n.groups * n.D), values(keys.count), gate(n.heads),
        mask(n.B * count), grad_keys(keys.count), grad_values(keys.count), grad_gate(n.B * n.heads),
        of_keys(keys.count, Term(1)), of_values(keys.count, Term(1)), of_gate(n.B * n.heads) {
    const int64_t width = n.groups * n.D;
    fill(gate);
    segment = {count, float(scale), keys.data, values.data, gated ? gate.data : nullptr};
    segment.values_at = {count * width, n.D, width};
    segment.keys_at = keys_by_group ? cpu::Strides{count * width, count * n.D, n.D} : segment.values_at;
    segment.mask = masked ? mask.data : nullptr, segment.grad_gate = gated ? grad_gate.data : nullptr;
    segment.grad_keys = grad_keys.data, segment.grad_values = grad_values.data;
    if (count == 0) segment.keys = segment.values = nullptr, segment.grad_keys = segment.grad_values = nullptr;
    for (int64_t i = 0; i < keys.count; ++i) grad_keys[i] = grad_values[i] = 1;  // is added to
    for (int64_t b = 0; b < n.B; ++b)  // one picture sees all rows, one some, one none
      for (int64_t j = 0; j < count; ++j) mask[b * count + j] = b % 3 == 0 || (b % 3 == 1 && draw() < 0);
    for (int64_t b = 0; b < n.B; ++b)
      for (int64_t j = 0; j < count; ++j)
        for (int64_t g = 0; g < n.groups && sees(b, j); ++g)
          for (int64_t c = 0; c < n.D; ++c)
            store(draw(), keys[at(segment.keys_at, b, g, j) + c]),
                store(draw(), values[at(segment.values_at, b, g, j) + c]);
  }
  bool sees(int64_t b, int64_t j) { return !segment.mask || mask[b * count + j]; }
  static int64_t at(const cpu::Strides& s, int64_t b, int64_t g, int64_t j) { return b * s.picture + g * s.group + j * s.row; }

  const int64_t count;
  const bool there;
  cpu::Segment segment;
  Guarded<float> keys, values, gate;
  Guarded<bool> mask;
  Guarded<float> grad_keys, grad_values, grad_gate;
  Terms of_keys, of_values, of_gate;
};

// What one query adds up from one segment: to out [D], and to all gradients.
void attend(const Sizes& n, Rows& rows, int64_t b, int64_t h, const float* query, const float* grad, Term* out, Term* of_query) {
  const int64_t g = h / (n.heads / n.groups);
  const Term scale = rows.segment.scale, gate = rows.segment.gate ? double(rows.gate[h]) : 1.0;
  std::vector<int64_t> seen;
  for (int64_t j = 0; j < rows.count; ++j)
    if (rows.sees(b, j)) seen.push_back(j);
  Terms p(seen.size()), d(seen.size());
  double top = -1e300, total = 0, sizes = 0;
  for (size_t i = 0; i < seen.size(); ++i) {
    const int64_t key = Rows::at(rows.segment.keys_at, b, g, seen[i]), value = Rows::at(rows.segment.values_at, b, g, seen[i]);
    for (int64_t c = 0; c < n.D; ++c) {
      p[i] = p[i] + scale * Term(query[c]) * Term(rows.keys[key + c]);
      d[i] = d[i] + Term(grad[c]) * Term(rows.values[value + c]);
    }
    top = std::max(top, p[i].value), sizes = std::max(sizes, p[i].size);
  }
  Term mean;
  for (Term& x : p) total += x.value = std::exp(x.value - top);
  for (Term& x : p) x = {x.value / total, x.value / total * (1 + 2 * sizes)};  // scores that are off make it off as much
  for (size_t i = 0; i < seen.size(); ++i) mean = mean + p[i] * d[i];
  Term& sum = rows.of_gate[b * n.heads + h];
  sum = sum + mean;
  for (size_t i = 0; i < seen.size(); ++i) {
    const int64_t key = Rows::at(rows.segment.keys_at, b, g, seen[i]), value = Rows::at(rows.segment.values_at, b, g, seen[i]);
    const Term slope = scale * gate * p[i] * (d[i] - mean), share = gate * p[i];
    for (int64_t c = 0; c < n.D; ++c) {
      out[c] = out[c] + share * Term(rows.values[value + c]);
      of_query[c] = of_query[c] + slope * Term(rows.keys[key + c]);
      rows.of_keys[key + c] = rows.of_keys[key + c] + slope * Term(query[c]);
      rows.of_values[value + c] = rows.of_values[value + c] + share * Term(grad[c]);
    }
  }
}

// `own` rows without a mask, conditions of `seen` and `read` rows (negative: there are none); masked: the first, or both.
void joint_attention(const Sizes& n, int64_t own, int64_t seen, int64_t read, int masked) {
  const int64_t count = n.B * n.T * n.heads * n.D, width = n.heads * n.D;
  Guarded<float> query(count), grad(count), out(count), grad_query(count);
  fill(query), fill(grad);
  const double scale = 1 / std::sqrt(double(n.D));
  Rows patches(n, own, 3.0, true, false, false), vision(n, std::max<int64_t>(seen, 0), scale, false, seen >= 0, masked > 0),
      caption(n, std::max<int64_t>(read, 0), scale, false, read >= 0, masked > 1);
  cpu::JointAttention a{n.B, n.T, n.heads, n.groups, n.D, {patches.segment}, query.data};
  if (vision.there) a.segments[1] = vision.segment;
  if (caption.there) a.segments[2] = caption.segment;
  a.out = out.data;
  cpu::joint_attention(a, many);
  a.out = nullptr, a.grad = grad.data, a.grad_query = grad_query.data;
  cpu::joint_attention_backward(a, many);
  ++cases;
  const int64_t all = n.D + n.T * (n.heads / n.groups) + own + std::max<int64_t>(seen, 0) + std::max<int64_t>(read, 0);
  for (int64_t i = 0; i < n.B * n.heads * n.T; ++i) {
    const int64_t b = i / (n.heads * n.T), h = i / n.T % n.heads, across = (b * n.T + i % n.T) * width + h * n.D;
    Terms sum(n.D), of_query(n.D);
    for (auto* rows : {&patches, &vision, &caption})
      attend(n, *rows, b, h, query.data + i * n.D, grad.data + across, sum.data(), of_query.data());
    for (int64_t c = 0; c < n.D; ++c) {
      check_term(out[across + c], sum[c], all, "joint_attention", i, c);
      check_term(grad_query[i * n.D + c], of_query[c], all, "grad_query", i, c);
    }
  }
  for (auto* rows : {&patches, &vision, &caption}) {
    for (int64_t i = 0; i < rows->keys.count; ++i) {
      check_term(rows->grad_keys[i], rows->of_keys[i], all, "grad_keys", i / n.D, i % n.D);
      check_term(rows->grad_values[i], rows->of_values[i], all, "grad_values", i / n.D, i % n.D);
    }
    for (int64_t i = 0; rows->segment.grad_gate && i < n.B * n.heads; ++i)
      check_term(rows->grad_gate[i], rows->of_gate[i], all, "grad_gate", i / n.heads, i % n.heads);
  }
}

void all_sizes(bool quick) {
  for (const int choice : {0, 1, 2, 3}) modulated_norm(3, 5, 48, choice & 1, choice & 2);
  modulated_norm(1, 1, 16, true, true), modulated_norm(0, 3, 16, true, true), modulated_norm(2, 0, 16, true, true);
  modulated_norm(4, 64, 160, true, true);  // enough for several threads, as the last of each
  rotary_norm(3, 7, 1, 16), rotary_norm(2, 1, 4, 32), rotary_norm(2, 3, 3, 48), rotary_norm(0, 3, 1, 16);
  rotary_norm(2, 0, 1, 16), rotary_norm(5, 52, 4, 32);
  for (const int64_t n : {0, 1, 7, 16, 33, 40001}) swiglu(n);
  joint_attention({3, 6, 6, 2, 16}, 6, 0, 17, 2);    // vision rows of no number
  joint_attention({3, 17, 2, 1, 48}, 20, 3, 5, 2);   // vision rows that are masked, more keys than patches
  joint_attention({3, 1, 4, 4, 32}, 16, 2, 0, 1);    // caption rows of no number
  joint_attention({2, 9, 4, 2, 32}, 9, -1, 4, 0);    // no vision, no mask
  joint_attention({2, 16, 2, 2, 16}, 1, -1, -1, 0);  // no conditions
  joint_attention({2, 0, 2, 1, 16}, 3, 2, 2, 2), joint_attention({0, 4, 2, 1, 16}, 4, 2, 2, 2);
  joint_attention({5, 13, 8, 2, 64}, 3, 2, 4, 2);
  if (quick) return;
  modulated_norm(3, 33, 1024, true, true), rotary_norm(3, 33, 16, 64), swiglu(1000003);
  joint_attention({4, 64, 8, 4, 64}, 64, 33, 40, 2), joint_attention({3, 129, 4, 1, 128}, 129, 0, 15, 2);
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && std::strcmp(argv[1], "--quick") == 0;
  for_each_engine([&](const std::string& engine) {
    const int before = failures;
    all_sizes(quick);
    if (failures > before) std::printf("engine %s: %d wrong\n", engine.c_str(), failures - before);
  });
  return report(cases);
}
