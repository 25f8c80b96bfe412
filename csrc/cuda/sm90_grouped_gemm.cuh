// CUTLASS sm_90a grouped GEMM (TMA, wgmma, warp-specialised), one template for every kind in sm90_grouped_gemm.h.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/dispatch_policy.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/dispatch_policy.hpp"
#include "cutlass/gemm/group_array_problem_shape.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "sm90_grouped_gemm.h"

namespace omni::cuda::sm90 {

enum class Kind { Forward, Dgrad, Wgrad };

inline constexpr int kGroupThreads = 256;
inline constexpr int kSegmentAlignment = 256;  // of every array inside the workspace

inline size_t aligned(size_t bytes) { return (bytes + kSegmentAlignment - 1) / kSegmentAlignment * kSegmentAlignment; }

inline void check(cutlass::Status status, const char* what) {
  if (status != cutlass::Status::kSuccess) {
    throw std::runtime_error(std::string("grouped_gemm: ") + what + ": " + cutlassGetStatusString(status));
  }
}

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("grouped_gemm: ") + what + ": " + cudaGetErrorString(status));
  }
}

// Leading dimension of a matrix whose other stride is the static 1: the one dynamic entry of a CUTLASS stride.
template <class Stride>
__device__ Stride packed_stride(int64_t leading) {
  Stride stride{};
  if constexpr (cute::is_constant<1, decltype(cute::get<0>(Stride{}))>::value) {
    cute::get<1>(stride) = leading;
  } else {
    cute::get<0>(stride) = leading;
  }
  return stride;
}

template <class Element, class ElementD, class StrideA, class StrideB, class StrideD, class Shape>
struct Groups {  // device arrays of length E, all inside the workspace
  Shape* shape;
  const Element** a;
  const Element** b;
  ElementD** d;
  StrideA* stride_a;
  StrideB* stride_b;
  StrideD* stride_d;
};

template <Kind kind, class G, class Element, class ElementD, class StrideA, class StrideB, class StrideD>
__global__ void __launch_bounds__(kGroupThreads)
build_groups(
    G groups, const Element* a, const Element* b, ElementD* d, const int64_t* offsets, int experts, int64_t k, int64_t n) {
  for (int e = blockIdx.x * blockDim.x + threadIdx.x; e < experts; e += gridDim.x * blockDim.x) {
    const int64_t first = offsets[e];
    const int rows = static_cast<int>(offsets[e + 1] - first);
    if constexpr (kind == Kind::Forward) {
      groups.shape[e] = {rows, static_cast<int>(n), static_cast<int>(k)};
      groups.a[e] = a + first * k;
      groups.b[e] = b + e * k * n;
      groups.d[e] = d + first * n;
      groups.stride_a[e] = packed_stride<StrideA>(k);
      groups.stride_b[e] = packed_stride<StrideB>(n);
      groups.stride_d[e] = packed_stride<StrideD>(n);
    } else if constexpr (kind == Kind::Dgrad) {
      groups.shape[e] = {rows, static_cast<int>(k), static_cast<int>(n)};
      groups.a[e] = a + first * n;
      groups.b[e] = b + e * k * n;
      groups.d[e] = d + first * k;
      groups.stride_a[e] = packed_stride<StrideA>(n);
      groups.stride_b[e] = packed_stride<StrideB>(n);
      groups.stride_d[e] = packed_stride<StrideD>(k);
    } else {
      groups.shape[e] = {rows > 0 ? static_cast<int>(k) : 0, static_cast<int>(n), rows};
      groups.a[e] = a + first * k;
      groups.b[e] = b + first * n;
      groups.d[e] = d + e * k * n;
      groups.stride_a[e] = packed_stride<StrideA>(k);
      groups.stride_b[e] = packed_stride<StrideB>(n);
      groups.stride_d[e] = packed_stride<StrideD>(n);
    }
  }
}

template <Kind kind_, class Element_, class ElementD_, class TileShape_, class ClusterShape_, bool pingpong>
struct GroupedGemm {
  static constexpr Kind kind = kind_;
  using Element = Element_;
  using ElementD = ElementD_;
  using RowMajor = cutlass::layout::RowMajor;
  using ColumnMajor = cutlass::layout::ColumnMajor;
  // x and dy are row-major as A; wgrad reads x as its transpose. w is row-major [K, N] as B; dgrad reads its transpose.
  using LayoutA = cute::conditional_t<kind == Kind::Wgrad, ColumnMajor, RowMajor>;
  using LayoutB = cute::conditional_t<kind == Kind::Dgrad, ColumnMajor, RowMajor>;
  using ElementC = cute::conditional_t<kind == Kind::Wgrad, ElementD, void>;  // only wgrad may add to its output
  static constexpr int kAlignment = 16 / sizeof(Element);
  static constexpr int kAlignmentD = 16 / sizeof(ElementD);

  using ProblemShape = cutlass::gemm::GroupProblemShape<cute::Shape<int, int, int>>;
  using Schedule = cute::conditional_t<pingpong, cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpong,
                                       cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative>;
  using EpilogueSchedule = cute::conditional_t<pingpong, cutlass::epilogue::PtrArrayTmaWarpSpecializedPingpong,
                                               cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape_, ClusterShape_,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, ElementC, RowMajor*, kAlignmentD, ElementD,
      RowMajor*, kAlignmentD, EpilogueSchedule>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, LayoutA*, kAlignment, Element, LayoutB*, kAlignment,
      float, TileShape_, ClusterShape_,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      Schedule>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<ProblemShape, Mainloop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  using StrideA = typename Kernel::InternalStrideA;
  using StrideB = typename Kernel::InternalStrideB;
  using StrideD = typename Kernel::InternalStrideD;
  using Shape = typename ProblemShape::UnderlyingProblemShape;
  using GroupArrays = Groups<Element, ElementD, StrideA, StrideB, StrideD, Shape>;

  // Carves the arrays out of `base`; returns the bytes used. With base 0 it only measures.
  static size_t carve(uintptr_t base, int64_t experts, GroupArrays* groups) {
    size_t used = 0;
    const auto take = [&](auto** pointer) {
      *pointer = reinterpret_cast<std::remove_pointer_t<decltype(pointer)>>(base + used);
      used += aligned(sizeof(**pointer) * experts);
    };
    take(&groups->shape);
    take(&groups->a);
    take(&groups->b);
    take(&groups->d);
    take(&groups->stride_a);
    take(&groups->stride_b);
    take(&groups->stride_d);
    return used;
  }

  static void run(const Problem& p) {
    if (p.experts == 0 || p.k == 0 || p.n == 0) return;
    const auto stream = static_cast<cudaStream_t>(p.stream);
    GroupArrays groups;
    const size_t used = carve(reinterpret_cast<uintptr_t>(p.workspace), p.experts, &groups);
    const auto* a = static_cast<const Element*>(p.a);
    const auto* b = static_cast<const Element*>(p.b);
    auto* d = static_cast<ElementD*>(p.d);
    build_groups<kind, GroupArrays, Element, ElementD, StrideA, StrideB, StrideD>
        <<<1, kGroupThreads, 0, stream>>>(groups, a, b, d, p.offsets, static_cast<int>(p.experts), p.k, p.n);
    check(cudaGetLastError(), "build_groups");

    cutlass::KernelHardwareInfo hardware;
    check(cudaGetDevice(&hardware.device_id), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&hardware.sm_count, cudaDevAttrMultiProcessorCount, hardware.device_id), "SM count");

    typename Gemm::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGrouped,
        {static_cast<int>(p.experts), groups.shape, nullptr},  // sizes live on the device only
        {groups.a, groups.stride_a, groups.b, groups.stride_b},
        {{}, nullptr, groups.stride_d, groups.d, groups.stride_d},
        hardware};
    if constexpr (kind == Kind::Wgrad) arguments.epilogue.ptr_C = const_cast<const ElementD**>(groups.d);
    arguments.epilogue.thread.alpha = 1.0f;
    arguments.epilogue.thread.beta = p.beta;

    Gemm gemm;
    const size_t needed = used + Gemm::get_workspace_size(arguments);
    if (needed > p.workspace_bytes) {
      throw std::runtime_error("grouped_gemm: workspace of " + std::to_string(p.workspace_bytes) + " bytes, " +
                               std::to_string(needed) + " needed");
    }
    check(gemm.can_implement(arguments), "shape");
    check(gemm.initialize(arguments, static_cast<char*>(p.workspace) + used, stream), "initialize");
    check(gemm.run(stream), "launch");
  }
};

using LargeTile = cute::Shape<cute::_128, cute::_256, cute::_64>;
using SmallTile = cute::Shape<cute::_64, cute::_256, cute::_64>;
using Pair = cute::Shape<cute::_2, cute::_1, cute::_1>;
using Single = cute::Shape<cute::_1, cute::_1, cute::_1>;

// y or dx. 128 x 256 fills the register file of two consumer warpgroups; the pair of a cluster shares each tile of w. 64
// rows a tile: less padding below about 512 rows an expert; one warpgroup's epilogue hides behind the other's products.
template <Kind kind, class Element>
void run_by_rows(const Problem& problem) {
  if (problem.large) {
    GroupedGemm<kind, Element, Element, LargeTile, Pair, false>::run(problem);
  } else {
    GroupedGemm<kind, Element, Element, SmallTile, Single, true>::run(problem);
  }
}

// Tiles lie in [K, N], so their shape does not depend on the rows of an expert; those are the length of the reduction.
template <class Element>
void run_wgrad(const Problem& problem, bool into_fp32) {
  if (into_fp32) {
    GroupedGemm<Kind::Wgrad, Element, float, LargeTile, Pair, false>::run(problem);
  } else {
    GroupedGemm<Kind::Wgrad, Element, Element, LargeTile, Pair, false>::run(problem);
  }
}

}  // namespace omni::cuda::sm90
