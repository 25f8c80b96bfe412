#include <cstring>
#include "kernels.h"
namespace omni::cpu {
void permute(const void* x, const int64_t* row_token, const int64_t* token_offsets, const int64_t* token_rows, int64_t T,
             int64_t A, int64_t num_rows, int64_t H, DType dtype, void* out, const Parallel& parallel) {
  const int64_t bytes = H * size_of(dtype);
  parallel(A, [&](int64_t a) {
    std::memcpy(static_cast<char*>(out) + a * bytes, static_cast<const char*>(x) + row_token[a] * bytes, bytes);
  });
  std::memset(static_cast<char*>(out) + A * bytes, 0, (num_rows - A) * bytes);
}
}  // namespace omni::cpu
