// grouped_gemm on the tensor cores of any device from compute capability 8.0: bf16 and fp16, accumulating in fp32.
//
// A block of 8 warps computes a tile of one expert's result through the portable WMMA interface, its operands arriving by
// cp.async in a ring of stages. Operands keep in shared memory the order they have in memory, so a transposed operand is
// only another fragment layout. Padding of 8 elements a row keeps fragment loads off one bank.
//
// Tiles of 128 and 64 rows are 128 columns wide. With up to kFewRows rows an expert (a decoded token; very fine experts)
// all time goes into reading weights once: a tile is then 16 rows, half as wide so that twice as many blocks read, and
// deep, with two groups of warps that share the reduction and are added in a fixed order.
#if !defined(OMNI_EMULATE_CUDA)
#include <cuda_pipeline.h>
#include <mma.h>
#endif

#include "gemm_tiles.cuh"

namespace omni::cuda {
namespace {

namespace wmma = nvcuda::wmma;

constexpr int kPad = 8, kThreads = 256;
constexpr int kFragment = 16;   // a fragment is 16 x 16 x 16
constexpr int kChunk = 8;       // elements a cp.async moves: 16 bytes
constexpr int kSmallGroup = 256;  // rows an expert on average, below which 64-row tiles waste less

// Sizes of a tile, and how 8 warps share it: warps_m x warps_n parts of the result, each by warps_k warps. Tiles in shared
// memory as rows x (columns + kPad), in the order of the operand in memory.
template <Kind kind, int kTileM>
struct Layout {
  static constexpr bool is_few = kTileM == kSmallestTile;
  static constexpr int kTileN = is_few ? 64 : 128, kTileK = is_few ? 64 : 32, kStages = is_few ? 4 : 3;
  static constexpr int warps_m = is_few ? 1 : 2, warps_n = 4, warps_k = is_few ? 2 : 1;
  // Blocks of an SM at least, which bounds registers: few rows want as many reads in flight as fit. Of tiles of 128 rows
  // nvcc chooses (0): held to two blocks it spills (docs/kernels.md).
  static constexpr int min_blocks = is_few ? 4 : kTileM == 64 ? 2 : 0;
  static constexpr int frags_m = kTileM / warps_m / kFragment, frags_n = kTileN / warps_n / kFragment;
  static constexpr bool a_is_mk = kind != Kind::Wgrad;  // [m][k], else [k][m]
  static constexpr bool b_is_kn = kind != Kind::Dgrad;  // [k][n], else [n][k]
  static constexpr int a_rows = a_is_mk ? kTileM : kTileK, a_columns = a_is_mk ? kTileK : kTileM;
  static constexpr int b_rows = b_is_kn ? kTileK : kTileN, b_columns = b_is_kn ? kTileN : kTileK;
  static constexpr int a_ld = a_columns + kPad, b_ld = b_columns + kPad;
  static constexpr int a_size = a_rows * a_ld, stage_size = a_size + b_rows * b_ld;  // elements
  static constexpr size_t shared_bytes = sizeof(uint16_t) * stage_size * kStages;
  static_assert(warps_m * warps_n * warps_k * kWarp == kThreads);
  static_assert(shared_bytes >= kThreads / kWarp * kFragment * kFragment * sizeof(float), "staging of the epilogue");
};

// Starts the copy of a tile; what lies outside `valid_rows` x `valid_columns` becomes zero. `source` is the tile's corner.
template <int rows, int columns, class T>
__device__ inline void load_tile(T* target, const T* source, int64_t ld, int64_t valid_rows, int64_t valid_columns) {
  constexpr int chunks_a_row = columns / kChunk;
  for (int i = threadIdx.x; i < rows * chunks_a_row; i += kThreads) {
    const int row = i / chunks_a_row, column = i % chunks_a_row * kChunk;
    const bool valid = row < valid_rows && column < valid_columns;
    __pipeline_memcpy_async(target + row * (columns + kPad) + column, valid ? source + row * ld + column : source, 16,
                            valid ? 0 : 16);
  }
}

template <Kind kind, int kTileM, class T, class Out>
__global__ void __launch_bounds__(kThreads, Layout<kind, kTileM>::min_blocks) mma_kernel(GroupedProblem<T, Out> p) {
  using L = Layout<kind, kTileM>;
  using MajorA = std::conditional_t<L::a_is_mk, wmma::row_major, wmma::col_major>;
  using MajorB = std::conditional_t<L::b_is_kn, wmma::row_major, wmma::col_major>;
  constexpr int kTileN = L::kTileN, kTileK = L::kTileK, kStages = L::kStages;
  constexpr int frags_m = L::frags_m, frags_n = L::frags_n;
  OMNI_DYNAMIC_SHARED(shared);

  const Work work = work_of<kind>(p, kTileM);
  if (work.expert < 0) return;
  const Group<T, Out> g = group_of<kind>(p, work.expert);
  const int64_t row0 = work.row, column0 = static_cast<int64_t>(work.column) * kTileN;
  const int steps = static_cast<int>((g.k + kTileK - 1) / kTileK);
  if (steps == 0 && p.accumulate) return;

  T* const stages = reinterpret_cast<T*>(shared);
  const auto load = [&](int step) {
    T* const a = stages + step % kStages * L::stage_size;
    const int64_t k0 = static_cast<int64_t>(step) * kTileK;
    const int64_t left_m = g.m - row0, left_n = g.n - column0, left_k = g.k - k0;
    if constexpr (L::a_is_mk) {
      load_tile<L::a_rows, L::a_columns>(a, g.a + row0 * g.a_m + k0, g.a_m, left_m, left_k);
    } else {
      load_tile<L::a_rows, L::a_columns>(a, g.a + k0 * g.a_k + row0, g.a_k, left_k, left_m);
    }
    if constexpr (L::b_is_kn) {
      load_tile<L::b_rows, L::b_columns>(a + L::a_size, g.b + k0 * g.b_k + column0, g.b_k, left_k, left_n);
    } else {
      load_tile<L::b_rows, L::b_columns>(a + L::a_size, g.b + column0 * g.b_n + k0, g.b_n, left_n, left_k);
    }
  };

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int part = warp % (L::warps_m * L::warps_n), share = L::warps_k > 1 ? warp / (L::warps_m * L::warps_n) : 0;
  const int m0 = part / L::warps_n * frags_m * kFragment, n0 = part % L::warps_n * frags_n * kFragment;
  wmma::fragment<wmma::accumulator, kFragment, kFragment, kFragment, float> sum[frags_m][frags_n];
  for (int i = 0; i < frags_m; ++i) {
    for (int j = 0; j < frags_n; ++j) wmma::fill_fragment(sum[i][j], 0.0f);
  }

  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) load(step);
    __pipeline_commit();
  }
  for (int step = 0; step < steps; ++step) {
    __pipeline_wait_prior(kStages - 2);  // this step's tiles have arrived for this thread
    __syncthreads();                     // and for all; and all are done with the stage that is loaded into next
    if (step + kStages - 1 < steps) load(step + kStages - 1);
    __pipeline_commit();
    const T* const a = stages + step % kStages * L::stage_size;
    const T* const b = a + L::a_size;
#pragma unroll
    for (int k0 = 0; k0 < kTileK; k0 += L::warps_k * kFragment) {
      const int k = k0 + share * kFragment;
      wmma::fragment<wmma::matrix_a, kFragment, kFragment, kFragment, T, MajorA> fa[frags_m];
      wmma::fragment<wmma::matrix_b, kFragment, kFragment, kFragment, T, MajorB> fb[frags_n];
      for (int i = 0; i < frags_m; ++i) {
        const int m = m0 + i * kFragment;
        wmma::load_matrix_sync(fa[i], a + (L::a_is_mk ? m * L::a_ld + k : k * L::a_ld + m), L::a_ld);
      }
      for (int j = 0; j < frags_n; ++j) {
        const int n = n0 + j * kFragment;
        wmma::load_matrix_sync(fb[j], b + (L::b_is_kn ? k * L::b_ld + n : n * L::b_ld + k), L::b_ld);
      }
      for (int i = 0; i < frags_m; ++i) {
        for (int j = 0; j < frags_n; ++j) wmma::mma_sync(sum[i][j], fa[i], fb[j], sum[i][j]);
      }
    }
  }
  __pipeline_wait_prior(0);
  __syncthreads();  // the ring is free: each warp stages its fragments in it, one at a time

  constexpr int fragment_size = kFragment * kFragment, next_share = L::warps_m * L::warps_n * fragment_size;
  float* const staged = reinterpret_cast<float*>(shared) + warp * fragment_size;
  const int r = lane / 2, c = lane % 2 * kChunk;  // a lane's 8 neighbours in a fragment
  for (int i = 0; i < frags_m; ++i) {
    for (int j = 0; j < frags_n; ++j) {
      wmma::store_matrix_sync(staged, sum[i][j], kFragment, wmma::mem_row_major);
      L::warps_k > 1 ? __syncthreads() : __syncwarp();
      const int64_t m = row0 + m0 + i * kFragment + r, n = column0 + n0 + j * kFragment + c;
      if (share == 0 && m < g.m && n < g.n) {
        auto* const target = reinterpret_cast<Pack<Out, kChunk>*>(g.d + m * g.d_m + n);
        Pack<Out, kChunk> result;
        if (p.accumulate) result = *target;
        for (int v = 0; v < kChunk; ++v) {
          float value = 0;
          for (int s = 0; s < L::warps_k; ++s) value += staged[s * next_share + r * kFragment + c + v];
          result.value[v] = store_as<Out>(p.accumulate ? load_as<float>(result.value[v]) + value : value);
        }
        *target = result;
      }
      L::warps_k > 1 ? __syncthreads() : __syncwarp();
    }
  }
}

template <Kind kind, int kTileM, class T, class Out>
void launch(GroupedProblem<T, Out> p, int64_t rows, int64_t E, void* workspace, void* stream) {
  const dim3 grid = plan_tiles<kind, kTileM, Layout<kind, kTileM>::kTileN>(p, rows, E, workspace, stream);
  constexpr size_t bytes = Layout<kind, kTileM>::shared_bytes;
  const auto kernel = mma_kernel<kind, kTileM, T, Out>;
  if (bytes > 48 * 1024) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (status != cudaSuccess) throw std::runtime_error(std::string("grouped_gemm: ") + cudaGetErrorString(status));
  }
  OMNI_LAUNCH(kernel, grid, kThreads, bytes, stream, p);
}

template <Kind kind, class T>
void launch_by_rows(const GroupedProblem<T, T>& p, int64_t rows, int64_t E, void* workspace, void* stream) {
  if (rows <= kFewRows * E) return launch<kind, kSmallestTile>(p, rows, E, workspace, stream);
  rows < kSmallGroup * E ? launch<kind, 64>(p, rows, E, workspace, stream) : launch<kind, 128>(p, rows, E, workspace, stream);
}

template <class T>
void dispatch(Kind kind, DType dtype_out, const void* a, const void* b, void* d, const int64_t* offsets, int64_t rows,
              int64_t E, int64_t K, int64_t N, bool accumulate, void* workspace, void* stream) {
  const auto* pa = static_cast<const T*>(a);
  const auto* pb = static_cast<const T*>(b);
  if (kind == Kind::Wgrad) {
    if (dtype_out == DType::F32) {
      launch<Kind::Wgrad, 128>(
          GroupedProblem<T, float>{pa, pb, static_cast<float*>(d), offsets, K, N, nullptr, 0, 0, accumulate}, rows, E,
          workspace, stream);
    } else {
      launch<Kind::Wgrad, 128>(GroupedProblem<T, T>{pa, pb, static_cast<T*>(d), offsets, K, N, nullptr, 0, 0, accumulate},
                               rows, E, workspace, stream);
    }
    return;
  }
  const GroupedProblem<T, T> p{pa, pb, static_cast<T*>(d), offsets, K, N, nullptr, 0, 0, false};
  kind == Kind::Forward ? launch_by_rows<Kind::Forward>(p, rows, E, workspace, stream)
                        : launch_by_rows<Kind::Dgrad>(p, rows, E, workspace, stream);
}

}  // namespace

void mma_grouped_gemm(Kind kind, DType dtype, DType dtype_out, const void* a, const void* b, void* d, const int64_t* offsets,
                      int64_t rows, int64_t E, int64_t K, int64_t N, bool accumulate, void* workspace, void* stream) {
  if (dtype == DType::BF16) {
    dispatch<__nv_bfloat16>(kind, dtype_out, a, b, d, offsets, rows, E, K, N, accumulate, workspace, stream);
  } else {
    dispatch<__half>(kind, dtype_out, a, b, d, offsets, rows, E, K, N, accumulate, workspace, stream);
  }
  check_launch("grouped_gemm");
}

size_t mma_shared_bytes(Kind kind, int tile_rows) {
  const auto by_rows = [&](auto few, auto small, auto large) {
    return tile_rows == kSmallestTile ? few.shared_bytes : tile_rows == 64 ? small.shared_bytes : large.shared_bytes;
  };
  switch (kind) {
    case Kind::Forward:
      return by_rows(Layout<Kind::Forward, kSmallestTile>{}, Layout<Kind::Forward, 64>{}, Layout<Kind::Forward, 128>{});
    case Kind::Dgrad:
      return by_rows(Layout<Kind::Dgrad, kSmallestTile>{}, Layout<Kind::Dgrad, 64>{}, Layout<Kind::Dgrad, 128>{});
    default: return Layout<Kind::Wgrad, 128>::shared_bytes;
  }
}

}  // namespace omni::cuda
