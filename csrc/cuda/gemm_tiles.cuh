// Where each block of a ragged GEMM works: shared by the tensor-core and the plain kernels.
//
// D = A B per expert, in the three kinds of grouped_gemm (x [rows, K], w [E, K, N], y [rows, N]; r rows of an expert):
//   Forward  y  [r, N] = x  [r, K]   w[e]   [K, N]      reduces over K
//   Dgrad    dx [r, K] = dy [r, N]   w[e]^T [N, K]      reduces over N
//   Wgrad    dw [K, N] = x^T [K, r]  dy     [r, N]      reduces over r
// For the first two the tiles of the result's rows are listed in a tile map, built on the device from the offsets (the
// host does not know them); the grid covers the most tiles there can be and spare blocks leave at once.
#pragma once

#include "device.cuh"

namespace omni::cuda {

enum class Kind { Forward, Dgrad, Wgrad };

struct Tile {
  int expert;  // -1: no work
  int row;     // of the tile, from the expert's first row
};

inline constexpr int kSmallestTile = 16;    // rows of a tile at least: what a workspace must have room for
inline constexpr int64_t kFewRows = 16;     // rows an expert on average, up to which reading the weights is the whole work

// Every expert has less than one tile more than its rows fill.
inline int64_t max_row_tiles(int64_t rows, int64_t experts, int tile_rows) { return rows / tile_rows + experts; }

inline constexpr int kMapThreads = 256;

// One block. An expert's first tile is the number of tiles of those before it, which each thread counts for itself.
template <int tile_rows>
__global__ void __launch_bounds__(kMapThreads)
build_tile_map(const int64_t* offsets, int experts, int num_tiles, Tile* tiles) {
  for (int i = threadIdx.x; i < num_tiles; i += blockDim.x) tiles[i] = {-1, 0};
  __syncthreads();
  for (int e = threadIdx.x; e < experts; e += blockDim.x) {
    int tile = 0;
    for (int before = 0; before < e; ++before) {
      tile += static_cast<int>((offsets[before + 1] - offsets[before] + tile_rows - 1) / tile_rows);
    }
    const int64_t rows = offsets[e + 1] - offsets[e];
    for (int64_t row = 0; row < rows; row += tile_rows) tiles[tile++] = {e, static_cast<int>(row)};
  }
}

// One group's product, all matrices as the memory they lie in. A(m, k) = a[m a_m + k a_k], B(k, n) = b[k b_k + n b_n],
// D(m, n) = d[m d_m + n].
template <class T, class Out>
struct Group {
  const T* a;
  const T* b;
  Out* d;
  int64_t m, n, k;  // k: length of the reduction
  int64_t a_m, a_k, b_k, b_n, d_m;
};

template <class T, class Out>
struct GroupedProblem {
  const T* a;  // x, dy, x
  const T* b;  // w, w, dy
  Out* d;      // y, dx, dw
  const int64_t* offsets;
  int64_t K, N;  // sides of w
  const Tile* tiles;
  int row_tiles, column_tiles;  // of the result; wgrad: of one expert's dw
  bool accumulate;
};

template <Kind kind, class T, class Out>
__device__ inline Group<T, Out> group_of(const GroupedProblem<T, Out>& p, int expert) {
  const int64_t first = p.offsets[expert], rows = p.offsets[expert + 1] - first, w = expert * p.K * p.N;
  if constexpr (kind == Kind::Forward) {
    return {p.a + first * p.K, p.b + w, p.d + first * p.N, rows, p.N, p.K, p.K, 1, p.N, 1, p.N};
  } else if constexpr (kind == Kind::Dgrad) {
    return {p.a + first * p.N, p.b + w, p.d + first * p.K, rows, p.K, p.N, p.N, 1, 1, p.N, p.K};
  } else {
    return {p.a + first * p.K, p.b + first * p.N, p.d + w, p.K, p.N, rows, 1, p.K, p.N, 1, p.N};
  }
}

// Blocks in bands of kBand row tiles, columns outermost inside a band: blocks that run together share rows of A and tiles
// of B, so both are read from L2.
inline constexpr int kBand = 8;

struct TileIndex {
  int row, column;
};

__device__ inline TileIndex banded(int block, int row_tiles, int column_tiles) {
  const int per_band = kBand * column_tiles, first = block / per_band * kBand, within = block % per_band;
  const int height = row_tiles - first < kBand ? row_tiles - first : kBand;
  return {first + within % height, within / height};
}

// The block's expert and tile (in tiles); expert -1: nothing to do.
struct Work {
  int expert, column;
  int64_t row;  // first row of the tile in the group
};

template <Kind kind, class T, class Out>
__device__ inline Work work_of(const GroupedProblem<T, Out>& p, int tile_rows) {
  const TileIndex index = banded(blockIdx.x, p.row_tiles, p.column_tiles);
  if constexpr (kind == Kind::Wgrad) {
    return {static_cast<int>(blockIdx.y), index.column, static_cast<int64_t>(index.row) * tile_rows};
  } else {
    const Tile tile = p.tiles[index.row];
    return {tile.expert, index.column, tile.row};
  }
}

// The two hand-written families; both fill every row of every expert (and all of dw[e] for an expert without rows).
// 16-bit elements on tensor cores: K and N multiples of 8, pointers 16-byte aligned, compute capability 8.0 or later.
void mma_grouped_gemm(Kind kind, DType dtype, DType dtype_out, const void* a, const void* b, void* d, const int64_t* offsets,
                      int64_t rows, int64_t E, int64_t K, int64_t N, bool accumulate, void* workspace, void* stream);
// Shared memory that a block of a kernel of the first family asks for, by the rows of its tile (16, 64, 128; wgrad 128).
size_t mma_shared_bytes(Kind kind, int tile_rows);
// Any element, any size.
void simt_grouped_gemm(Kind kind, DType dtype, DType dtype_out, const void* a, const void* b, void* d, const int64_t* offsets,
                       int64_t rows, int64_t E, int64_t K, int64_t N, bool accumulate, void* workspace, void* stream);

// Fills in tiles and counts, launches build_tile_map where the kind needs one, and returns the grid.
template <Kind kind, int tile_rows, int tile_columns, class T, class Out>
dim3 plan_tiles(GroupedProblem<T, Out>& p, int64_t rows, int64_t E, void* workspace, void* stream) {
  p.column_tiles = static_cast<int>(div_up(kind == Kind::Dgrad ? p.K : p.N, tile_columns));
  if constexpr (kind == Kind::Wgrad) {
    p.row_tiles = static_cast<int>(div_up(p.K, tile_rows));
  } else {
    p.row_tiles = static_cast<int>(max_row_tiles(rows, E, tile_rows));
    auto* tiles = static_cast<Tile*>(workspace);
    p.tiles = tiles;
    OMNI_LAUNCH(build_tile_map<tile_rows>, 1, kMapThreads, 0, stream, p.offsets, static_cast<int>(E), p.row_tiles, tiles);
  }
  const int64_t blocks = static_cast<int64_t>(p.row_tiles) * p.column_tiles;
  if (blocks > INT32_MAX || E > 65535) throw std::runtime_error("grouped_gemm: too many tiles for one launch");
  return dim3(static_cast<unsigned>(blocks), kind == Kind::Wgrad ? static_cast<unsigned>(E) : 1u);
}

}  // namespace omni::cuda
