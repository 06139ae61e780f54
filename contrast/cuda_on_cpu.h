// The words of CUDA C that a kernel uses, for a C++ compiler. See cuda_on_cpu.py.
#pragma once
#include <utility>

struct Index3 { unsigned x, y, z; };
extern thread_local Index3 threadIdx, blockIdx;
extern Index3 blockDim, gridDim;
void __syncthreads();

#define __global__ static
#define __shared__ static __attribute__((section("shared_memory")))
struct alignas(16) float4 { float x, y, z, w; };

template <class... A, std::size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*(A*)arguments[I]...);
}
template <class... A>
void call(void (*kernel)(A...), void** arguments) {
  call(kernel, arguments, std::index_sequence_for<A...>{});
}
