// grouped_gemm: which kernel computes it, and the parts that no GEMM kernel writes.
//
//   bf16, fp16, compute capability 9.0, K and N multiples of 8    CUTLASS, wgmma (sm90_*.cu; where built with CUTLASS)
//   bf16, fp16, from 8.0, K and N multiples of 8                  WMMA with cp.async (grouped_gemm_mma.cu)
//   anything else                                                 plain tiles (grouped_gemm_simt.cu)
// Up to kFewRows rows an expert Hopper takes WMMA for y and dx, too: CUTLASS's narrowest tile is 256 columns wide, and the
// second product of a decoded token (N = 3,584, two experts) would keep 28 of 132 SMs busy with reading weights, not 112.
// Tiles are chosen by the average rows of an expert, never by the total: the same model on more tokens keeps its kernels.
#include "gemm_tiles.cuh"
#include "sm90_grouped_gemm.h"

namespace omni::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kLargeGroup = 512;  // average rows an expert from which 128-row tiles (pairs: 256) waste under 1/4

// Stops the device where offsets are not 0 = offsets[0] <= ... <= offsets[E] <= rows. The product's kernels, next on the
// stream, do not run then.
__global__ void __launch_bounds__(kThreads) check_offsets(const int64_t* offsets, int64_t E, int64_t rows) {
  if (threadIdx.x == 0 && (offsets[0] != 0 || offsets[E] > rows)) __trap();
  for (int64_t e = threadIdx.x; e < E; e += blockDim.x) {
    if (offsets[e + 1] < offsets[e]) __trap();
  }
}

template <class V>
__global__ void __launch_bounds__(kThreads)
zero_tail(V* y, const int64_t* offsets, int64_t E, int64_t rows, int64_t width) {
  const int64_t begin = offsets[E] * width, end = rows * width;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = begin + static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < end; i += step) y[i] = V{};
}

template <class V>
__global__ void __launch_bounds__(kThreads) zero_empty_experts(V* dw, const int64_t* offsets, int64_t width) {
  const int64_t e = blockIdx.y;
  if (offsets[e + 1] > offsets[e]) return;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < width; i += step) {
    dw[e * width + i] = V{};
  }
}

void launch_zero_tail(void* y, const int64_t* offsets, int64_t E, int64_t rows, int64_t row_bytes, void* stream) {
  const auto go = [&](auto unit) {
    using V = decltype(unit);
    OMNI_LAUNCH(zero_tail<V>, 128, kThreads, 0, stream, static_cast<V*>(y), offsets, E, rows,
                row_bytes / static_cast<int64_t>(sizeof(V)));
  };
  row_bytes % 16 == 0 && is_aligned(y, 16) ? go(uint4{}) : go(uint16_t{});
}

// The tensor-core kernels read and write 16 bytes at a time.
enum class Path { Cutlass, Mma, Simt };

int capability_major() {
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) {
    throw std::runtime_error("grouped_gemm: no CUDA device");
  }
  return major;
}

Path path_for(DType dtype, int64_t K, int64_t N, const void* a, const void* b, const void* d, bool few_rows) {
  const bool is_16_bit = dtype == DType::BF16 || dtype == DType::F16;
  const bool fits = K % 8 == 0 && N % 8 == 0 && K > 0 && N > 0 && is_aligned(a, 16) && is_aligned(b, 16) && is_aligned(d, 16);
  if (!is_16_bit || !fits) return Path::Simt;
  const int major = capability_major();
#if defined(OMNI_WITH_CUTLASS)
  if (major == 9 && !few_rows) return Path::Cutlass;
#endif
  return major >= 8 ? Path::Mma : Path::Simt;
}

#if defined(OMNI_WITH_CUTLASS)
sm90::Problem hopper_problem(const void* a, const void* b, void* d, const int64_t* offsets, int64_t rows, int64_t E,
                             int64_t K, int64_t N, float beta, void* workspace, void* stream) {
  return {a, b, d, offsets, E, K, N, rows >= kLargeGroup * E, beta, workspace, grouped_gemm_workspace(rows, E), stream};
}
#endif

}  // namespace

size_t grouped_gemm_workspace(int64_t rows, int64_t E) {
  size_t bytes = sizeof(Tile) * static_cast<size_t>(max_row_tiles(rows, E, kSmallestTile));
#if defined(OMNI_WITH_CUTLASS)
  const size_t hopper = sm90::workspace_bytes(E);
  bytes = bytes > hopper ? bytes : hopper;
#endif
  return bytes;
}

void grouped_gemm(const void* x, const void* w, const int64_t* offsets, int64_t rows, int64_t E, int64_t K, int64_t N,
                  DType dtype, bool transpose_w, void* y, void* workspace, void* stream) {
  const int64_t width = transpose_w ? K : N;
  if (rows == 0 || width == 0) return;
  OMNI_LAUNCH(check_offsets, 1, kThreads, 0, stream, offsets, E, rows);
  launch_zero_tail(y, offsets, E, rows, width * size_of(dtype), stream);
  check_launch("grouped_gemm");
  if (E == 0) return;
  const Kind kind = transpose_w ? Kind::Dgrad : Kind::Forward;
  const Path path = path_for(dtype, K, N, x, w, y, rows <= kFewRows * E);
#if defined(OMNI_WITH_CUTLASS)
  if (path == Path::Cutlass) {
    const auto problem = hopper_problem(x, w, y, offsets, rows, E, K, N, 0.0f, workspace, stream);
    if (dtype == DType::BF16) return transpose_w ? sm90::dgrad_bf16(problem) : sm90::forward_bf16(problem);
    return transpose_w ? sm90::dgrad_fp16(problem) : sm90::forward_fp16(problem);
  }
#endif
  const auto run = path == Path::Mma ? mma_grouped_gemm : simt_grouped_gemm;
  run(kind, dtype, dtype, x, w, y, offsets, rows, E, K, N, false, workspace, stream);
}

void grouped_wgrad(const void* x, const void* dy, const int64_t* offsets, int64_t rows, int64_t E, int64_t K, int64_t N,
                   DType dtype, DType dtype_dw, bool accumulate, void* dw, void* workspace, void* stream) {
  if (E == 0 || K == 0 || N == 0) return;
  if (dtype_dw != dtype && (dtype_dw != DType::F32 || dtype == DType::F64)) {
    throw std::runtime_error("grouped_wgrad: dw is of the rows' dtype, or float32 for 16-bit rows");
  }
  OMNI_LAUNCH(check_offsets, 1, kThreads, 0, stream, offsets, E, rows);
  const Path path = path_for(dtype, K, N, x, dy, dw, false);
#if defined(OMNI_WITH_CUTLASS)
  if (path == Path::Cutlass) {
    if (!accumulate) {  // CUTLASS gives an expert without rows no tile at all
      const int64_t units = K * N * size_of(dtype_dw) / static_cast<int64_t>(sizeof(uint4));
      OMNI_LAUNCH(zero_empty_experts<uint4>, dim3(32, static_cast<unsigned>(E)), kThreads, 0, stream, static_cast<uint4*>(dw),
                  offsets, units);
      check_launch("grouped_wgrad");
    }
    if (rows == 0) return;
    const auto problem = hopper_problem(x, dy, dw, offsets, rows, E, K, N, accumulate ? 1.0f : 0.0f, workspace, stream);
    const bool into_fp32 = dtype_dw == DType::F32;
    return dtype == DType::BF16 ? sm90::wgrad_bf16(problem, into_fp32) : sm90::wgrad_fp16(problem, into_fp32);
  }
#endif
  const auto run = path == Path::Mma ? mma_grouped_gemm : simt_grouped_gemm;
  run(Kind::Wgrad, dtype, dtype_dw, x, dy, dw, offsets, rows, E, K, N, accumulate, workspace, stream);
}

}  // namespace omni::cuda
