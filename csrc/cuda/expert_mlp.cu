// expert_mlp: two grouped GEMMs around SwiGLU with the routing weight, and its backward from x and h alone.
//
//   h = x w1 = (gate | up)    a = s silu(gate) up    y = a w2         s: the row's routing weight
// With da = dy w2^T (gradient of a), one pass over the rows gives
//   ds = <da, silu(gate) up>    dup = s da silu(gate)    dgate = s da up sigma (1 + gate (1 - sigma))
// and a again, in the place of da; then dw2 = a^T dy, dw1 = x^T dh, dx = dh w1^T. y is not needed, so it is not kept.
#include "device.cuh"

namespace omni::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 132 * 16;

template <class A>
__device__ inline A sigmoid(A x) {
  return A(1) / (A(1) + exp(-x));
}

// a = s silu(gate) up for the rows of some expert; rows past offsets[E] are not read by the GEMM that follows.
template <class T, class Acc, int n>
__global__ void __launch_bounds__(kThreads)
swiglu_kernel(const T* h, const Acc* row_weight, const int64_t* offsets, int64_t E, int64_t F, T* a) {
  const int64_t per_row = F / n, total = offsets[E] * per_row;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += step) {
    const int64_t row = i / per_row, f = i % per_row * n;
    const auto gate = *reinterpret_cast<const Pack<T, n>*>(h + row * 2 * F + f);
    const auto up = *reinterpret_cast<const Pack<T, n>*>(h + row * 2 * F + F + f);
    const Acc s = row_weight == nullptr ? Acc(1) : row_weight[row];
    Pack<T, n> result;
    for (int v = 0; v < n; ++v) {
      const Acc g = load_as<Acc>(gate.value[v]);
      result.value[v] = store_as<T>(s * (g * sigmoid(g) * load_as<Acc>(up.value[v])));
    }
    *reinterpret_cast<Pack<T, n>*>(a + row * F + f) = result;
  }
}

// A block a row. `a` holds da and receives a; dh receives (dgate | dup).
template <class T, class Acc, int n>
__global__ void __launch_bounds__(kThreads)
swiglu_backward_kernel(const T* h, const Acc* row_weight, const int64_t* offsets, int64_t E, int64_t rows,
                       int64_t F, T* a, T* dh, Acc* drow_weight) {
  __shared__ Acc partial[kThreads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t used = offsets[E];
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    if (row >= used) {
      if (drow_weight != nullptr && threadIdx.x == 0) drow_weight[row] = 0;
      continue;
    }
    const Acc s = row_weight == nullptr ? Acc(1) : row_weight[row];
    const T* const h_row = h + row * 2 * F;
    T* const a_row = a + row * F;
    T* const dh_row = dh + row * 2 * F;
    Acc ds = 0;
    for (int64_t f = static_cast<int64_t>(threadIdx.x) * n; f < F; f += kThreads * n) {
      const auto gate = *reinterpret_cast<const Pack<T, n>*>(h_row + f);
      const auto up = *reinterpret_cast<const Pack<T, n>*>(h_row + F + f);
      const auto da = *reinterpret_cast<const Pack<T, n>*>(a_row + f);
      Pack<T, n> again, dgate, dup;
      for (int v = 0; v < n; ++v) {
        const Acc g = load_as<Acc>(gate.value[v]), u = load_as<Acc>(up.value[v]), d = load_as<Acc>(da.value[v]);
        const Acc sigma = sigmoid(g), silu = g * sigma;
        ds += d * (silu * u);
        again.value[v] = store_as<T>(s * (silu * u));
        dup.value[v] = store_as<T>(s * d * silu);
        dgate.value[v] = store_as<T>(s * d * u * sigma * (Acc(1) + g * (Acc(1) - sigma)));
      }
      *reinterpret_cast<Pack<T, n>*>(a_row + f) = again;
      *reinterpret_cast<Pack<T, n>*>(dh_row + f) = dgate;
      *reinterpret_cast<Pack<T, n>*>(dh_row + F + f) = dup;
    }
    if (drow_weight == nullptr) continue;
    ds = warp_sum(ds);
    if (lane == 0) partial[warp] = ds;
    __syncthreads();
    if (threadIdx.x == 0) {
      Acc sum = 0;
      for (int i = 0; i < kThreads / kWarp; ++i) sum += partial[i];
      drow_weight[row] = sum;
    }
    __syncthreads();  // before the next row writes partial
  }
}

unsigned at_most(int64_t blocks) { return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks); }

bool vectors_fit(DType dtype, int64_t F, const void* h, const void* a, const void* dh) {
  return F * size_of(dtype) % 16 == 0 && is_aligned(h, 16) && is_aligned(a, 16) && is_aligned(dh, 16);
}

}  // namespace

void expert_mlp(const void* x, const void* w1, const void* w2, const int64_t* offsets, const void* row_weight,
                int64_t rows, int64_t E, int64_t H, int64_t F, DType dtype, void* h, void* a, void* y, void* workspace,
                void* stream) {
  if (rows == 0) return;
  grouped_gemm(x, w1, offsets, rows, E, H, 2 * F, dtype, false, h, workspace, stream);
  if (F > 0) {
    with_dtype(dtype, [&](auto element) {
      using T = decltype(element);
      using Acc = Accumulator<T>;
      constexpr int n = 16 / static_cast<int>(sizeof(T));
      const bool wide = vectors_fit(dtype, F, h, a, nullptr);
      const auto kernel = wide ? swiglu_kernel<T, Acc, n> : swiglu_kernel<T, Acc, 1>;
      const int64_t units = rows * (F / (wide ? n : 1));
      OMNI_LAUNCH(kernel, at_most(div_up(units, kThreads)), kThreads, 0, stream, static_cast<const T*>(h),
                  static_cast<const Acc*>(row_weight), offsets, E, F, static_cast<T*>(a));
    });
    check_launch("expert_mlp");
  }
  grouped_gemm(a, w2, offsets, rows, E, F, H, dtype, false, y, workspace, stream);
}

void expert_mlp_backward(const void* dy, const void* x, const void* h, const void* w1, const void* w2,
                         const int64_t* offsets, const void* row_weight, int64_t rows, int64_t E, int64_t H, int64_t F,
                         DType dtype, DType dtype_dw, bool accumulate, void* a, void* dh, void* dx, void* dw1, void* dw2,
                         void* drow_weight, void* workspace, void* stream) {
  grouped_gemm(dy, w2, offsets, rows, E, F, H, dtype, true, a, workspace, stream);
  if (rows > 0) {
    with_dtype(dtype, [&](auto element) {
      using T = decltype(element);
      using Acc = Accumulator<T>;
      const auto kernel = vectors_fit(dtype, F, h, a, dh) ? swiglu_backward_kernel<T, Acc, 16 / static_cast<int>(sizeof(T))>
                                                          : swiglu_backward_kernel<T, Acc, 1>;
      OMNI_LAUNCH(kernel, at_most(rows), kThreads, 0, stream, static_cast<const T*>(h), static_cast<const Acc*>(row_weight),
                  offsets, E, rows, F, static_cast<T*>(a), static_cast<T*>(dh), static_cast<Acc*>(drow_weight));
    });
    check_launch("expert_mlp_backward");
  }
  if (dw2 != nullptr) {
    grouped_wgrad(a, dy, offsets, rows, E, F, H, dtype, dtype_dw, accumulate, dw2, workspace, stream);
  }
  if (dw1 != nullptr) {
    grouped_wgrad(x, dh, offsets, rows, E, H, 2 * F, dtype, dtype_dw, accumulate, dw1, workspace, stream);
  }
  if (dx != nullptr) grouped_gemm(dh, w1, offsets, rows, E, H, 2 * F, dtype, true, dx, workspace, stream);
}

}  // namespace omni::cuda
