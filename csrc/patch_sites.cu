// Patching many sites of one activation in one launch. Not run on a GPU.

#include "device.cuh"
#include "launchers.h"

namespace fastlens {
namespace {

enum Mode { kReplace = 0, kAdd = 1, kScale = 2, kZero = 3, kMean = 4 };

constexpr int kSitesPerBlock = 4;
constexpr int kPacksPerThread = 4;

template <typename T> struct Values {
    const T* at;
    int64_t site_stride, step, n_samples, sample_stride;
};

template <typename T> __device__ __forceinline__ T mean_over_samples(const T* first, int64_t n, int64_t stride) {
    wide_t<T> sum = 0;
    for (int64_t k = 0; k < n; ++k) sum += widen(first[k * stride]);
    return narrow<T>(sum / static_cast<wide_t<T>>(n));
}

// A warp a site, N neighbouring numbers a thread: a block of threads is 32 x kSitesPerBlock.
template <typename T, int N>
__global__ void patch_sites(T* out, const int64_t* sites, const int64_t* places, Values<T> values, int64_t n_sites,
                            int64_t length, int mode) {
    const int64_t site = static_cast<int64_t>(blockIdx.x) * kSitesPerBlock + threadIdx.y;
    if (site >= n_sites) return;
    T* here = out + sites[site] * length;
    const int64_t row = mode == kMean ? places[site] : site;
    const T* given = mode == kZero ? nullptr : values.at + row * values.site_stride;
    const int64_t stride = static_cast<int64_t>(gridDim.y) * kWarp * N;
    for (int64_t j = (static_cast<int64_t>(blockIdx.y) * kWarp + threadIdx.x) * N; j < length; j += stride) {
        Pack<T, N> v = {}, x = {};
        if (mode == kMean) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
                v.at[n] = mean_over_samples(given + (j + n) * values.step, values.n_samples, values.sample_stride);
            }
        } else if (mode != kZero) {
            // N > 1 only where the values lie as the sites do (see the launcher).
            v = N > 1 ? *reinterpret_cast<const Pack<T, N>*>(given + j) : Pack<T, N>{{given[j * values.step]}};
        }
        if (mode == kAdd || mode == kScale) {
            x = *reinterpret_cast<const Pack<T, N>*>(here + j);
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const wide_t<T> a = widen(x.at[n]), b = widen(v.at[n]);
                v.at[n] = narrow<T>(mode == kAdd ? a + b : a * b);
            }
        }
        *reinterpret_cast<Pack<T, N>*>(here + j) = v;
    }
}

template <typename T, int N>
void launch(T* out, const int64_t* sites, const int64_t* places, Values<T> values, int64_t n_sites, int64_t length,
            int mode, cudaStream_t stream) {
    const int64_t columns = ceil_div(length, static_cast<int64_t>(kWarp) * N * kPacksPerThread);
    const dim3 grid(static_cast<unsigned>(ceil_div(n_sites, kSitesPerBlock)),
                    static_cast<unsigned>(at_most(columns, kMaxGridY)));
    FASTLENS_LAUNCH((patch_sites<T, N>), grid, dim3(kWarp, kSitesPerBlock), stream, out, sites, places, values,
                    n_sites, length, mode);
}

}  // namespace
}  // namespace fastlens

extern "C" const char* fastlens_patch_sites(uint64_t out, uint64_t sites, uint64_t places, uint64_t values,
                                            int64_t n_sites, int64_t length, int64_t site_stride, int64_t step,
                                            int64_t n_samples, int64_t sample_stride, int mode, int dtype,
                                            uint64_t stream) {
    using namespace fastlens;
    if (mode < kReplace || mode > kMean) return "patch_sites: no such mode";
    if (n_sites <= 0 || length <= 0) return "patch_sites: nothing to patch";
    if (mode == kMean && n_samples <= 0) return "patch_sites: a mean needs a sample";
    if (ceil_div(n_sites, kSitesPerBlock) > kMaxGridX) return "patch_sites: more sites than a grid has blocks";
    const bool known = with_dtype(dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        constexpr int kWide = 16 / sizeof(T);
        const Values<T> from{reinterpret_cast<const T*>(values), site_stride, step, n_samples, sample_stride};
        // 16 bytes at a time where every site and its values start on such a boundary.
        const bool values_fit = mode == kZero || mode == kMean ||
                                (step == 1 && values % 16 == 0 && site_stride % kWide == 0);
        const bool wide = values_fit && length % kWide == 0 && out % 16 == 0;
        auto run = wide ? launch<T, kWide> : launch<T, 1>;
        run(reinterpret_cast<T*>(out), reinterpret_cast<const int64_t*>(sites),
            reinterpret_cast<const int64_t*>(places), from, n_sites, length, mode,
            reinterpret_cast<cudaStream_t>(stream));
    });
    return known ? launch_error() : "patch_sites: no such dtype";
}
