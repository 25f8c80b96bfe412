// Token permutation: rows gathered into expert order, the weighted sum back, and the gradients of that sum.
//
// A warp owns a row of the result and its lanes own vectors of 16 bytes in it, so a sum over the rows of a token is one
// lane's own loop, in fp32 and in a fixed order: no atomics, nothing to wait for. All three are bound by memory.
#include "device.cuh"

namespace omni::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarpsPerBlock = kThreads / kWarp;
constexpr int64_t kMaxBlocks = 132 * 16;  // rows beyond one wave are taken in strides

inline unsigned blocks_for(int64_t rows) {
  const int64_t blocks = div_up(rows, kWarpsPerBlock);
  return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

__device__ inline int64_t first_row() {
  return static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
}

__device__ inline int64_t row_stride() { return static_cast<int64_t>(gridDim.x) * kWarpsPerBlock; }

__device__ inline int lane() { return threadIdx.x % kWarp; }

// The rows of a token: one of each expert that the map names, in the order of the experts. rank_in_expert counts the
// tokens up to and including t that the map gives to e. Where the map does not hold A entries the device stops, before
// anything is written past the results.
__global__ void __launch_bounds__(kThreads)
fill_permutation_kernel(const bool* map, const int64_t* rank_in_expert, const int64_t* offsets,
                        const int64_t* token_offsets, int64_t T, int64_t E, int64_t A,
                        int64_t* row_token, int64_t* row_expert, int64_t* token_rows) {
  if (token_offsets[T] != A) __trap();
  for (int64_t t = first_row(); t < T; t += row_stride()) {
    int64_t position = token_offsets[t];
    for (int64_t e0 = 0; e0 < E; e0 += kWarp) {
      const int64_t e = e0 + lane();
      const bool is_taken = e < E && map[t * E + e];
      const unsigned taken = __ballot_sync(kAllLanes, is_taken);
      if (is_taken) {
        const int64_t row = offsets[e] + rank_in_expert[t * E + e] - 1;
        row_token[row] = t;
        row_expert[row] = e;
        token_rows[position + __popc(taken & ((1u << lane()) - 1))] = row;
      }
      position += __popc(taken);
    }
  }
}

// V: the unit of a copy, uint4 where rows are whole multiples of 16 bytes. `width` counts units.
template <class V>
__global__ void __launch_bounds__(kThreads)
permute_kernel(const V* x, const int64_t* row_token, int64_t A, int64_t num_rows, int64_t width, V* out) {
  for (int64_t row = first_row(); row < num_rows; row += row_stride()) {
    V* target = out + row * width;
    if (row < A) {
      const V* source = x + row_token[row] * width;
#pragma unroll 4
      for (int64_t c = lane(); c < width; c += kWarp) target[c] = source[c];
    } else {
      for (int64_t c = lane(); c < width; c += kWarp) target[c] = V{};
    }
  }
}

template <class V>
void launch_permute(const void* x, const int64_t* row_token, int64_t A, int64_t num_rows, int64_t row_bytes, void* out,
                    void* stream) {
  OMNI_LAUNCH(permute_kernel<V>, blocks_for(num_rows), kThreads, 0, stream, static_cast<const V*>(x), row_token, A,
              num_rows, row_bytes / static_cast<int64_t>(sizeof(V)), static_cast<V*>(out));
}

template <class In, class Out, class Acc, int n>
__global__ void __launch_bounds__(kThreads)
unpermute_kernel(const In* rows, const Acc* weights, const int64_t* token_offsets,
                 const int64_t* token_rows, int64_t T, int64_t H, Out* out) {
  for (int64_t t = first_row(); t < T; t += row_stride()) {
    const int64_t begin = token_offsets[t], end = token_offsets[t + 1];
    for (int64_t c = static_cast<int64_t>(lane()) * n; c < H; c += kWarp * n) {
      Acc sum[n] = {};
#pragma unroll 4
      for (int64_t j = begin; j < end; ++j) {
        const int64_t row = token_rows[j];
        const Acc weight = weights == nullptr ? Acc(1) : weights[row];
        const auto in = *reinterpret_cast<const Pack<In, n>*>(rows + row * H + c);
        for (int i = 0; i < n; ++i) sum[i] += weight * load_as<Acc>(in.value[i]);
      }
      Pack<Out, n> result;
      for (int i = 0; i < n; ++i) result.value[i] = store_as<Out>(sum[i]);
      *reinterpret_cast<Pack<Out, n>*>(out + t * H + c) = result;
    }
  }
}

template <class In, class Grad, class Acc, int n>
__global__ void __launch_bounds__(kThreads)
unpermute_backward_kernel(const Grad* grad_y, const In* rows, const Acc* weights, const Acc* factor,
                          const int64_t* row_token, int64_t A, int64_t num_rows, int64_t H, In* grad_rows,
                          Acc* grad_weights) {
  for (int64_t a = first_row(); a < num_rows; a += row_stride()) {
    if (a >= A) {
      for (int64_t c = lane(); grad_rows != nullptr && c < H; c += kWarp) grad_rows[a * H + c] = store_as<In>(Acc(0));
      continue;
    }
    const Grad* g = grad_y + row_token[a] * H;
    const Acc f = factor == nullptr ? Acc(1) : factor[a];
    const Acc weight = weights == nullptr ? Acc(1) : weights[a];
    Acc dot = 0;
#pragma unroll 2
    for (int64_t c = static_cast<int64_t>(lane()) * n; c < H; c += kWarp * n) {
      const auto in = *reinterpret_cast<const Pack<Grad, n>*>(g + c);
      Acc scaled[n];
      for (int i = 0; i < n; ++i) scaled[i] = f * load_as<Acc>(in.value[i]);
      if (grad_weights != nullptr) {
        const auto row = *reinterpret_cast<const Pack<In, n>*>(rows + a * H + c);
        for (int i = 0; i < n; ++i) dot += load_as<Acc>(row.value[i]) * scaled[i];
      }
      if (grad_rows != nullptr) {
        Pack<In, n> result;
        for (int i = 0; i < n; ++i) result.value[i] = store_as<In>(weight * scaled[i]);
        *reinterpret_cast<Pack<In, n>*>(grad_rows + a * H + c) = result;
      }
    }
    if (grad_weights != nullptr) {
      dot = warp_sum(dot);
      if (lane() == 0) grad_weights[a] = dot;
    }
  }
}

// Widest vector of both types: 16 bytes of the narrower one, where every row starts on such a boundary.
template <class A, class B>
constexpr int kVector = 16 / static_cast<int>(sizeof(A) < sizeof(B) ? sizeof(A) : sizeof(B));

// f(In{}, Out{}) for the pairs that exist: F64 with F64, and any two of the others.
template <class F>
void with_two_dtypes(const char* op, DType first, DType second, const F& f) {
  if ((first == DType::F64) != (second == DType::F64)) {
    throw std::runtime_error(std::string(op) + ": float64 goes with float64 only");
  }
  with_dtype(first, [&](auto in) {
    using In = decltype(in);
    with_dtype(second, [&](auto out) {
      using Out = decltype(out);
      if constexpr (std::is_same_v<In, double> == std::is_same_v<Out, double>) f(In{}, Out{});
    });
  });
}

}  // namespace

void fill_permutation(const bool* map, const int64_t* rank_in_expert, const int64_t* offsets, const int64_t* token_offsets,
                      int64_t T, int64_t E, int64_t A, int64_t* row_token, int64_t* row_expert, int64_t* token_rows,
                      void* stream) {
  if (T == 0) return;
  OMNI_LAUNCH(fill_permutation_kernel, blocks_for(T), kThreads, 0, stream, map, rank_in_expert, offsets, token_offsets, T,
              E, A, row_token, row_expert, token_rows);
  check_launch("build_permutation");
}

void permute(const void* x, const int64_t* row_token, int64_t A, int64_t num_rows, int64_t H, DType dtype, void* out,
             void* stream) {
  if (num_rows == 0 || H == 0) return;
  const int64_t row_bytes = H * size_of(dtype);
  if (row_bytes % 16 == 0 && is_aligned(x, 16) && is_aligned(out, 16)) {
    launch_permute<uint4>(x, row_token, A, num_rows, row_bytes, out, stream);
  } else if (size_of(dtype) == 8) {
    launch_permute<uint64_t>(x, row_token, A, num_rows, row_bytes, out, stream);
  } else if (size_of(dtype) == 4) {
    launch_permute<uint32_t>(x, row_token, A, num_rows, row_bytes, out, stream);
  } else {
    launch_permute<uint16_t>(x, row_token, A, num_rows, row_bytes, out, stream);
  }
  check_launch("permute");
}

void unpermute(const void* rows, const void* weights, const int64_t* token_offsets, const int64_t* token_rows, int64_t T,
               int64_t H, DType dtype_in, DType dtype_out, void* out, void* stream) {
  if (T == 0 || H == 0) return;
  with_two_dtypes("unpermute", dtype_in, dtype_out, [&](auto in, auto result) {
    using In = decltype(in);
    using Out = decltype(result);
    using Acc = Accumulator<In>;
    constexpr int n = kVector<In, Out>;
    const auto go = [&](auto kernel) {
      OMNI_LAUNCH(kernel, blocks_for(T), kThreads, 0, stream, static_cast<const In*>(rows),
                  static_cast<const Acc*>(weights), token_offsets, token_rows, T, H, static_cast<Out*>(out));
    };
    if (H % n == 0 && is_aligned(rows, 16) && is_aligned(out, 16)) {
      go(unpermute_kernel<In, Out, Acc, n>);
    } else {
      go(unpermute_kernel<In, Out, Acc, 1>);
    }
  });
  check_launch("unpermute");
}

void unpermute_backward(const void* grad_y, const void* rows, const void* weights, const void* factor,
                        const int64_t* row_token, int64_t A, int64_t num_rows, int64_t H, DType dtype_rows,
                        DType dtype_grad, void* grad_rows, void* grad_weights, void* stream) {
  if (num_rows == 0) return;
  with_two_dtypes("unpermute_backward", dtype_rows, dtype_grad, [&](auto in, auto gradient) {
    using In = decltype(in);
    using Grad = decltype(gradient);
    using Acc = Accumulator<In>;
    constexpr int n = kVector<In, Grad>;
    const auto go = [&](auto kernel) {
      OMNI_LAUNCH(kernel, blocks_for(num_rows), kThreads, 0, stream, static_cast<const Grad*>(grad_y),
                  static_cast<const In*>(rows), static_cast<const Acc*>(weights), static_cast<const Acc*>(factor),
                  row_token, A, num_rows, H, static_cast<In*>(grad_rows), static_cast<Acc*>(grad_weights));
    };
    if (H % n == 0 && is_aligned(grad_y, 16) && is_aligned(rows, 16) && is_aligned(grad_rows, 16)) {
      go(unpermute_backward_kernel<In, Grad, Acc, n>);
    } else {
      go(unpermute_backward_kernel<In, Grad, Acc, 1>);
    }
  });
  check_launch("unpermute_backward");
}

}  // namespace omni::cuda
