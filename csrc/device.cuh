// What the kernels share: number types, wide access, launching. No torch header is included here. Not run on a GPU.
#pragma once

#include <cstdint>

#ifndef FASTLENS_SIMT
// tests/csrc/simt.h defines these for a run on the CPU.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define FASTLENS_SHARED(type, name, count) __shared__ type name[count]
#define FASTLENS_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif

namespace fastlens {

// 16-bit numbers are computed with in float.
template <typename T> struct Wide { using type = float; };
template <> struct Wide<double> { using type = double; };
template <typename T> using wide_t = typename Wide<T>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounds to nearest, ties to even; from double to 16 bits by way of float, as torch does.
template <typename T> __device__ __forceinline__ T narrow(double x) { return static_cast<T>(x); }
template <> __device__ __forceinline__ __half narrow<__half>(double x) {
    return __float2half_rn(static_cast<float>(x));
}
template <> __device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(double x) {
    return __float2bfloat16_rn(static_cast<float>(x));
}
template <typename T> __device__ __forceinline__ T narrow(float x) { return static_cast<T>(x); }
template <> __device__ __forceinline__ __half narrow<__half>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// N numbers that are read or written by one instruction.
template <typename T, int N> struct alignas(N * sizeof(T)) Pack { T at[N]; };

constexpr int kWarp = 32;
constexpr int64_t kMaxGridX = 2147483647;
constexpr int64_t kMaxGridY = 65535;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// The launchers' dtype codes; fastlens/kernels/compiled.py has the same.
enum Dtype { kFloat32 = 0, kFloat64 = 1, kBfloat16 = 2, kFloat16 = 3 };

template <typename T> struct Type { using type = T; };

// Calls f(Type<T>{}) for the type of that code; false for a code that is none.
template <typename F> bool with_dtype(int code, F&& f) {
    switch (code) {
        case kFloat32: f(Type<float>{}); return true;
        case kFloat64: f(Type<double>{}); return true;
        case kBfloat16: f(Type<__nv_bfloat16>{}); return true;
        case kFloat16: f(Type<__half>{}); return true;
        default: return false;
    }
}

// nullptr when the last launch was accepted, else CUDA's sentence.
inline const char* launch_error() {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastlens
