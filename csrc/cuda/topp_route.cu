// Top-P routing and its backward, a warp a token. What is computed: megatron_omni/ops/topp_route.py.
//
// The draw order is found by counting: the rank of a slot is the number of slots with a larger key (ties: lower index
// first, as a stable sort does), E / 32 slots a lane against E keys in shared memory. The prefix sum over the order is
// sequential, in the order of the definition, and stops at top_p: after k steps, and k is small.
#include "device.cuh"

namespace omni::cuda {
namespace {

constexpr int kMaxWarps = 8;
constexpr size_t kSharedBytes = 48 * 1024;  // what every device gives a block without asking

template <class T>
struct Inputs {
  const T* z;
  const T* gumbel;
  const T* bernoulli;
  const bool* padding;
  const bool* keep;
};

template <class T>
struct Outputs {
  bool* mask;
  T* weights;
  T* shared_weights;
  T* scale;
  int64_t* k;
  int64_t* draw_rank;
};

// One token's arrays in shared memory, num_dynamic entries each.
template <class T>
struct Slots {
  T* key;        // z + noise
  T* p;          // softmax(z), in draw order
  int* rank;     // place in the draw order
  int* order;    // slot at a place
  int* selected;
  static size_t bytes(int64_t num_dynamic) { return (2 * sizeof(T) + 3 * sizeof(int)) * num_dynamic; }
};

template <class T>
__device__ Slots<T> slots_of_warp(unsigned char* shared, int warp, int warps, int n) {
  T* values = reinterpret_cast<T*>(shared) + static_cast<int64_t>(warp) * 2 * n;
  int* integers = reinterpret_cast<int*>(shared + sizeof(T) * 2 * n * warps) + static_cast<int64_t>(warp) * 3 * n;
  return {values, values + n, integers, integers + n, integers + 2 * n};
}

// Whether slot `a` of value `x` comes before slot `b` of value `y`: larger first, ties by index.
template <class T>
__device__ inline bool before(T x, int a, T y, int b) {
  return x > y || (x == y && a < b);
}

template <class T>
__global__ void __launch_bounds__(kMaxWarps * kWarp) topp_route_kernel(ToppRoute r, Inputs<T> in, Outputs<T> out) {
  OMNI_DYNAMIC_SHARED(shared);
  const int n = static_cast<int>(r.num_dynamic), lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int warps = blockDim.x / kWarp;
  const Slots<T> slots = slots_of_warp<T>(shared, warp, warps, n);
  const int64_t num_columns = r.num_dynamic + r.num_shared;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * warps + warp; t < r.T; t += static_cast<int64_t>(gridDim.x) * warps) {
    const T* z = in.z + t * num_columns;
    const bool is_padding = in.padding != nullptr && in.padding[t];

    // keys, and softmax(z) over the dynamic slots
    T largest = -INFINITY;
    for (int e = lane; e < n; e += kWarp) {
      slots.key[e] = in.gumbel == nullptr ? z[e] : z[e] + in.gumbel[t * n + e];
      slots.order[e] = e;  // overwritten below; stays in range even if a NaN makes ranks collide
      slots.selected[e] = 0;
      largest = z[e] > largest ? z[e] : largest;
    }
    largest = warp_max(largest);
    T total = 0;
    for (int e = lane; e < n; e += kWarp) total += exp(z[e] - largest);
    total = warp_sum(total);
    __syncwarp();

    for (int e = lane; e < n; e += kWarp) {
      int rank = 0;
      for (int other = 0; other < n; ++other) rank += before(slots.key[other], other, slots.key[e], e);
      slots.rank[e] = rank;
    }
    __syncwarp();
    for (int e = lane; e < n; e += kWarp) {
      slots.order[slots.rank[e]] = e;
      slots.p[slots.rank[e]] = exp(z[e] - largest) / total;
    }
    __syncwarp();

    // the prefix, and the cap on real experts in it
    if (lane == 0) {
      int count = 1;
      if (r.top_k > 0) {
        count = r.top_k < n ? static_cast<int>(r.top_k) : n;
      } else {
        T sum = slots.p[0];
        while (count < n && sum < static_cast<T>(r.top_p)) sum += slots.p[count++];
      }
      int64_t num_real = 0, num_selected = 0;
      for (int place = 0; place < count && !is_padding; ++place) {
        const int e = slots.order[place];
        if (e < r.num_routed && r.max_routed >= 0 && num_real >= r.max_routed) continue;
        num_real += e < r.num_routed;
        if (in.keep != nullptr && !in.keep[t * n + e]) continue;
        num_selected += 1;
        slots.selected[e] = 1;
      }
      out.k[t] = num_selected;
    }
    __syncwarp();

    // masked softmax over the selected and the shared slots
    T top = -INFINITY;
    for (int64_t e = lane; e < num_columns; e += kWarp) {
      if ((e >= n || slots.selected[e]) && z[e] > top) top = z[e];
    }
    top = warp_max(top);
    T sum = 0;
    for (int64_t e = lane; e < num_columns; e += kWarp) {
      if (e >= n || slots.selected[e]) sum += exp(z[e] - top);
    }
    sum = warp_sum(sum);
    for (int64_t e = n + lane; e < num_columns; e += kWarp) {
      out.shared_weights[t * r.num_shared + e - n] = exp(z[e] - top) / sum;
    }
    const bool has_estimator = r.estimator != Estimator::None && in.bernoulli != nullptr;
    const T keep = r.estimator == Estimator::Paper ? T(0.625) : T(0.25);
    for (int e = lane; e < n; e += kWarp) {
      T scale = 1;
      if (has_estimator && !(in.bernoulli[t * n + e] < keep)) {
        bool is_argmax = true;  // of what was left when this slot was drawn
        for (int other = 0; other < n; ++other) {
          is_argmax &= !(slots.rank[other] > slots.rank[e] && before(z[other], other, z[e], e));
        }
        if (!is_argmax) scale = T(1) / T(3);
      }
      const T weight = slots.selected[e] ? exp(z[e] - top) / sum * scale : T(0);
      out.mask[t * n + e] = slots.selected[e] != 0;
      out.weights[t * n + e] = weight;
      out.scale[t * n + e] = scale;
      out.draw_rank[t * n + e] = slots.rank[e];
    }
    __syncwarp();  // the next token reuses the arrays
  }
}

// With v the softmax (weights / s): grad_z = v (g - <v, g>), g the gradient of v: s grad_weights for the paper's
// estimator, grad_weights otherwise. A slot that was not selected has v = 0 and gets 0.
template <class T>
__global__ void __launch_bounds__(kMaxWarps * kWarp)
topp_route_backward_kernel(ToppRoute r, const T* grad_weights, const T* grad_shared, const T* weights,
                           const T* shared_weights, const T* scale, T* grad_z) {
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const int64_t n = r.num_dynamic, m = r.num_shared;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / kWarp; t < r.T;
       t += static_cast<int64_t>(gridDim.x) * warps) {
    T dot = 0;
    for (int64_t e = lane; e < n; e += kWarp) {
      const T s = scale[t * n + e], g = grad_weights == nullptr ? T(0) : grad_weights[t * n + e];
      dot += weights[t * n + e] / s * (r.estimator == Estimator::Paper ? s * g : g);
    }
    for (int64_t e = lane; e < m; e += kWarp) {
      dot += shared_weights[t * m + e] * (grad_shared == nullptr ? T(0) : grad_shared[t * m + e]);
    }
    dot = warp_sum(dot);
    for (int64_t e = lane; e < n; e += kWarp) {
      const T s = scale[t * n + e], g = grad_weights == nullptr ? T(0) : grad_weights[t * n + e];
      grad_z[t * (n + m) + e] = weights[t * n + e] / s * ((r.estimator == Estimator::Paper ? s * g : g) - dot);
    }
    for (int64_t e = lane; e < m; e += kWarp) {
      const T g = grad_shared == nullptr ? T(0) : grad_shared[t * m + e];
      grad_z[t * (n + m) + n + e] = shared_weights[t * m + e] * (g - dot);
    }
  }
}

template <class F>
void with_float(DType dtype, const F& f) {
  if (dtype == DType::F32) return f(float{});
  if (dtype == DType::F64) return f(double{});
  throw std::runtime_error("topp_route: logits are float32 or float64");
}

unsigned grid_for(int64_t tokens, int warps) {
  const int64_t blocks = div_up(tokens, warps);
  return static_cast<unsigned>(blocks < 65535 ? blocks : 65535);
}

}  // namespace

void topp_route(const ToppRoute& r, DType dtype, const void* z, const void* gumbel, const void* bernoulli,
                const bool* padding, const bool* keep, bool* mask, void* weights, void* shared_weights, void* scale,
                int64_t* k, int64_t* draw_rank, void* stream) {
  if (r.T == 0) return;
  if (r.num_dynamic < 1 || r.num_dynamic > kMaxSlots) {
    throw std::runtime_error("topp_route: 1 to " + std::to_string(kMaxSlots) + " dynamic slots on CUDA");
  }
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    const size_t token_bytes = Slots<T>::bytes(r.num_dynamic);
    const size_t fitting = kSharedBytes / token_bytes;
    const int warps = fitting < kMaxWarps ? static_cast<int>(fitting) : kMaxWarps;
    const Inputs<T> in{static_cast<const T*>(z), static_cast<const T*>(gumbel), static_cast<const T*>(bernoulli), padding,
                       keep};
    const Outputs<T> out{mask,      static_cast<T*>(weights), static_cast<T*>(shared_weights), static_cast<T*>(scale), k,
                         draw_rank};
    OMNI_LAUNCH(topp_route_kernel<T>, grid_for(r.T, warps), warps * kWarp, token_bytes * warps, stream, r, in, out);
  });
  check_launch("topp_route");
}

void topp_route_backward(const ToppRoute& r, DType dtype, const void* grad_weights, const void* grad_shared,
                         const void* weights, const void* shared_weights, const void* scale, void* grad_z, void* stream) {
  if (r.T == 0) return;
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    OMNI_LAUNCH(topp_route_backward_kernel<T>, grid_for(r.T, kMaxWarps), kMaxWarps * kWarp, 0, stream, r,
                static_cast<const T*>(grad_weights), static_cast<const T*>(grad_shared), static_cast<const T*>(weights),
                static_cast<const T*>(shared_weights), static_cast<const T*>(scale), static_cast<T*>(grad_z));
  });
  check_launch("topp_route_backward");
}

}  // namespace omni::cuda
