// Gathering rows of an activation and casting or quantising them, in one launch each. Not run on a GPU.

#include "device.cuh"
#include "launchers.h"

namespace fastlens {
namespace {

constexpr int kRowsPerBlock = 4;
constexpr int kNumbersPerThread = 4;

// A warp a row.
template <typename From, typename To>
__global__ void gather(const From* source, const int64_t* offsets, To* out, int64_t n_rows, int64_t length,
                       int64_t step) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.y;
    if (row >= n_rows) return;
    const From* from = source + offsets[row];
    To* to = out + row * length;
    const int64_t stride = static_cast<int64_t>(gridDim.y) * kWarp;
    for (int64_t j = static_cast<int64_t>(blockIdx.y) * kWarp + threadIdx.x; j < length; j += stride) {
        to[j] = narrow<To>(widen(from[j * step]));
    }
}

constexpr int kQuantizeThreads = 128;
constexpr int kQuantizeWarps = kQuantizeThreads / kWarp;
constexpr float kLargest = 127.0f;
// The smallest normal float: smaller scales lose digits.
constexpr float kTiny = 1.17549435e-38f;

// The larger of two, and NaN if either is: fmaxf would drop it.
__device__ __forceinline__ float larger(float a, float b) { return b > a || b != b ? b : a; }

// A block of threads a row at a time: its largest number first, then its bytes.
template <typename From>
__global__ void gather_int8(const From* source, const int64_t* offsets, int8_t* values, float* scales, int64_t n_rows,
                            int64_t length, int64_t step) {
    FASTLENS_SHARED(float, largest_of_warp, kQuantizeWarps);
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    for (int64_t row = blockIdx.x; row < n_rows; row += gridDim.x) {
        const From* from = source + offsets[row];
        float largest = 0.0f;
        for (int64_t j = threadIdx.x; j < length; j += kQuantizeThreads) {
            largest = larger(largest, fabsf(static_cast<float>(widen(from[j * step]))));
        }
        for (int apart = kWarp / 2; apart > 0; apart /= 2) {
            largest = larger(largest, __shfl_xor_sync(0xffffffffu, largest, apart));
        }
        if (lane == 0) largest_of_warp[warp] = largest;
        __syncthreads();
        for (int w = 0; w < kQuantizeWarps; ++w) largest = larger(largest, largest_of_warp[w]);
        // The next row writes what this one still reads.
        __syncthreads();

        const bool is_finite = largest <= 3.402823466e+38f;
        const bool is_kept = is_finite && largest >= kLargest * kTiny;
        const float scale = is_kept ? __fdiv_rn(largest, kLargest) : is_finite ? 0.0f : nanf("");
        if (threadIdx.x == 0) scales[row] = scale;
        for (int64_t j = threadIdx.x; j < length; j += kQuantizeThreads) {
            int q = 0;
            if (is_kept) {
                q = __float2int_rn(__fdiv_rn(static_cast<float>(widen(from[j * step])), scale));
                q = q < -127 ? -127 : q > 127 ? 127 : q;
            }
            values[row * length + j] = static_cast<int8_t>(q);
        }
    }
}

}  // namespace
}  // namespace fastlens

extern "C" const char* fastlens_capture(uint64_t source, uint64_t offsets, uint64_t out, int64_t n_rows,
                                        int64_t length, int64_t step, int source_dtype, int out_dtype,
                                        uint64_t stream) {
    using namespace fastlens;
    if (n_rows <= 0 || length <= 0) return "capture: nothing to capture";
    if (ceil_div(n_rows, kRowsPerBlock) > kMaxGridX) return "capture: more rows than a grid has blocks";
    const int64_t columns = at_most(ceil_div(length, kWarp * kNumbersPerThread), kMaxGridY);
    const dim3 grid(static_cast<unsigned>(ceil_div(n_rows, kRowsPerBlock)), static_cast<unsigned>(columns));
    bool known = false;
    with_dtype(source_dtype, [&](auto from) {
        known = with_dtype(out_dtype, [&](auto to) {
            using From = typename decltype(from)::type;
            using To = typename decltype(to)::type;
            FASTLENS_LAUNCH((gather<From, To>), grid, dim3(kWarp, kRowsPerBlock),
                            reinterpret_cast<cudaStream_t>(stream), reinterpret_cast<const From*>(source),
                            reinterpret_cast<const int64_t*>(offsets), reinterpret_cast<To*>(out), n_rows, length,
                            step);
        });
    });
    return known ? launch_error() : "capture: no such dtype";
}

extern "C" const char* fastlens_capture_int8(uint64_t source, uint64_t offsets, uint64_t values, uint64_t scale,
                                             int64_t n_rows, int64_t length, int64_t step, int source_dtype,
                                             uint64_t stream) {
    using namespace fastlens;
    if (n_rows <= 0 || length <= 0) return "capture_int8: nothing to capture";
    // Enough blocks to fill any GPU; each goes on to further rows.
    const dim3 grid(static_cast<unsigned>(at_most(n_rows, kMaxGridY)));
    const bool known = with_dtype(source_dtype, [&](auto from) {
        using From = typename decltype(from)::type;
        FASTLENS_LAUNCH((gather_int8<From>), grid, dim3(kQuantizeThreads), reinterpret_cast<cudaStream_t>(stream),
                        reinterpret_cast<const From*>(source), reinterpret_cast<const int64_t*>(offsets),
                        reinterpret_cast<int8_t*>(values), reinterpret_cast<float*>(scale), n_rows, length, step);
    });
    return known ? launch_error() : "capture_int8: no such dtype";
}
