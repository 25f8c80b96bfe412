// grouped_gemm without tensor cores: fp32 and fp64 in full precision, and 16-bit elements whose sizes do not fit the
// tensor-core kernels. A block of 256 threads computes a 64 x 64 tile, 4 x 4 entries a thread. For correctness, not speed.
#include "gemm_tiles.cuh"

namespace omni::cuda {
namespace {

constexpr int kTile = 64, kTileK = 16, kThreads = 256, kSide = 16, kEach = kTile / kSide;

template <Kind kind, class T, class Out>
__global__ void __launch_bounds__(kThreads) simt_kernel(GroupedProblem<T, Out> p) {
  using Acc = Accumulator<T>;
  __shared__ Acc a[kTileK][kTile + 1];
  __shared__ Acc b[kTileK][kTile + 1];
  const Work work = work_of<kind>(p, kTile);
  if (work.expert < 0) return;
  const Group<T, Out> g = group_of<kind>(p, work.expert);
  const int64_t row0 = work.row, column0 = static_cast<int64_t>(work.column) * kTile;
  const int y = threadIdx.x / kSide, x = threadIdx.x % kSide;
  Acc sum[kEach][kEach] = {};

  for (int64_t k0 = 0; k0 < g.k; k0 += kTileK) {
    for (int i = threadIdx.x; i < kTileK * kTile; i += kThreads) {
      // neighbouring threads read neighbours in memory: along k for x and dy as A, along m for x^T
      const int a_k = kind == Kind::Wgrad ? i / kTile : i % kTileK, a_m = kind == Kind::Wgrad ? i % kTile : i / kTileK;
      const int b_k = kind == Kind::Dgrad ? i % kTileK : i / kTile, b_n = kind == Kind::Dgrad ? i / kTileK : i % kTile;
      const bool a_valid = row0 + a_m < g.m && k0 + a_k < g.k, b_valid = column0 + b_n < g.n && k0 + b_k < g.k;
      a[a_k][a_m] = a_valid ? load_as<Acc>(g.a[(row0 + a_m) * g.a_m + (k0 + a_k) * g.a_k]) : Acc(0);
      b[b_k][b_n] = b_valid ? load_as<Acc>(g.b[(k0 + b_k) * g.b_k + (column0 + b_n) * g.b_n]) : Acc(0);
    }
    __syncthreads();
    for (int k = 0; k < kTileK; ++k) {
      for (int i = 0; i < kEach; ++i) {
        for (int j = 0; j < kEach; ++j) sum[i][j] += a[k][y + i * kSide] * b[k][x + j * kSide];
      }
    }
    __syncthreads();
  }

  for (int i = 0; i < kEach; ++i) {
    for (int j = 0; j < kEach; ++j) {
      const int64_t m = row0 + y + i * kSide, n = column0 + x + j * kSide;
      if (m >= g.m || n >= g.n) continue;
      Out* const target = g.d + m * g.d_m + n;
      *target = store_as<Out>(p.accumulate ? load_as<Acc>(*target) + sum[i][j] : sum[i][j]);
    }
  }
}

template <Kind kind, class T, class Out>
void launch(GroupedProblem<T, Out> p, int64_t rows, int64_t E, void* workspace, void* stream) {
  const dim3 grid = plan_tiles<kind, kTile, kTile>(p, rows, E, workspace, stream);
  const auto kernel = simt_kernel<kind, T, Out>;
  OMNI_LAUNCH(kernel, grid, kThreads, 0, stream, p);
}

}  // namespace

void simt_grouped_gemm(Kind kind, DType dtype, DType dtype_out, const void* a, const void* b, void* d, const int64_t* offsets,
                       int64_t rows, int64_t E, int64_t K, int64_t N, bool accumulate, void* workspace, void* stream) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const auto problem = [&](auto* out) {
      using Out = std::remove_pointer_t<decltype(out)>;
      return GroupedProblem<T, Out>{static_cast<const T*>(a), static_cast<const T*>(b), out, offsets, K, N, nullptr, 0, 0,
                                    accumulate};
    };
    if (kind == Kind::Forward) {
      launch<Kind::Forward>(problem(static_cast<T*>(d)), rows, E, workspace, stream);
    } else if (kind == Kind::Dgrad) {
      launch<Kind::Dgrad>(problem(static_cast<T*>(d)), rows, E, workspace, stream);
    } else if (dtype_out == dtype) {
      launch<Kind::Wgrad>(problem(static_cast<T*>(d)), rows, E, workspace, stream);
    } else if constexpr (sizeof(T) == 2) {
      launch<Kind::Wgrad>(problem(static_cast<float*>(d)), rows, E, workspace, stream);
    }
  });
  check_launch("grouped_gemm");
}

}  // namespace omni::cuda
