// Unpacking int8 rows and llama.cpp's 4- and 8-bit blocks. Not run on a GPU.

#include "device.cuh"
#include "launchers.h"

namespace fastlens {
namespace {

enum Format { kInt8 = 0, kQ4_0 = 1, kQ4_1 = 2, kQ8_0 = 3 };

constexpr int kBlock = 32;
constexpr int kBlocksAtOnce = 8;
constexpr int kThreads = 256;

// Blocks of 18, 20 or 34 bytes start at any address, so their float16 is put together from bytes.
__device__ __forceinline__ float half_at(const uint8_t* bytes) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bytes[0] | bytes[1] << 8)));
}

// A warp a block, one number a lane. The formulas round after each step, as the specification does:
// a fused multiply-add would not.
template <typename To, int format> __global__ void unpack_blocks(const uint8_t* packed, To* out, int64_t n_blocks) {
    constexpr int kBytes = format == kQ4_0 ? 18 : format == kQ4_1 ? 20 : 34;
    const int lane = threadIdx.x;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kBlocksAtOnce;
    for (int64_t b = static_cast<int64_t>(blockIdx.x) * kBlocksAtOnce + threadIdx.y; b < n_blocks; b += stride) {
        const uint8_t* block = packed + b * kBytes;
        const float d = half_at(block);
        float weight;
        if (format == kQ8_0) {
            weight = __fmul_rn(d, static_cast<float>(static_cast<int8_t>(block[2 + lane])));
        } else {
            const uint8_t byte = block[(format == kQ4_0 ? 2 : 4) + lane % 16];
            const int q = lane < 16 ? byte & 15 : byte >> 4;
            weight = format == kQ4_0 ? __fmul_rn(d, static_cast<float>(q - 8))
                                     : __fadd_rn(__fmul_rn(d, static_cast<float>(q)), half_at(block + 2));
        }
        out[b * kBlock + lane] = narrow<To>(weight);
    }
}

template <typename To>
__global__ void unpack_rows(const int8_t* packed, const float* scale, To* out, int64_t n, int64_t width) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += stride) {
        out[i] = narrow<To>(__fmul_rn(static_cast<float>(packed[i]), scale[i / width]));
    }
}

template <typename To, int format>
void launch_blocks(uint64_t packed, To* out, int64_t n_blocks, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(at_most(ceil_div(n_blocks, kBlocksAtOnce), kMaxGridX)));
    FASTLENS_LAUNCH((unpack_blocks<To, format>), grid, dim3(kBlock, kBlocksAtOnce), stream,
                    reinterpret_cast<const uint8_t*>(packed), out, n_blocks);
}

}  // namespace
}  // namespace fastlens

extern "C" const char* fastlens_dequantize(uint64_t packed, uint64_t scale, uint64_t out, int64_t n_blocks,
                                           int64_t width, int format, int out_dtype, uint64_t stream) {
    using namespace fastlens;
    if (n_blocks <= 0 || width <= 0) return "dequantize: nothing to unpack";
    if (format < kInt8 || format > kQ8_0) return "dequantize: no such format";
    const bool known = with_dtype(out_dtype, [&](auto type) {
        using To = typename decltype(type)::type;
        To* to = reinterpret_cast<To*>(out);
        const cudaStream_t queue = reinterpret_cast<cudaStream_t>(stream);
        if (format == kQ4_0) launch_blocks<To, kQ4_0>(packed, to, n_blocks, queue);
        if (format == kQ4_1) launch_blocks<To, kQ4_1>(packed, to, n_blocks, queue);
        if (format == kQ8_0) launch_blocks<To, kQ8_0>(packed, to, n_blocks, queue);
        if (format == kInt8) {
            const dim3 grid(static_cast<unsigned>(at_most(ceil_div(n_blocks, kThreads), kMaxGridX)));
            FASTLENS_LAUNCH((unpack_rows<To>), grid, dim3(kThreads), queue, reinterpret_cast<const int8_t*>(packed),
                            reinterpret_cast<const float*>(scale), to, n_blocks, width);
        }
    });
    return known ? launch_error() : "dequantize: no such dtype";
}
