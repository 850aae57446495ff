// The launchers of csrc/*.cu. Each queues one kernel on a stream and returns nullptr, or a sentence that
// says why it could not. Pointers are addresses in GPU memory; strides and lengths count elements.
// The caller has checked every index against the tensors: a launcher cannot. Not run on a GPU.
#pragma once

#include <cstdint>

extern "C" {

// out[sites[i] * length + j] becomes, with v = values[row * site_stride + j * step] and row = i,
//   mode 0: v   1: out + v   2: out * v   3: 0
//   4: the mean over k < n_samples of values[k * sample_stride + places[i] * site_stride + j * step]
const char* fastlens_patch_sites(uint64_t out, uint64_t sites, uint64_t places, uint64_t values, int64_t n_sites,
                                 int64_t length, int64_t site_stride, int64_t step, int64_t n_samples,
                                 int64_t sample_stride, int mode, int dtype, uint64_t stream);

// out[i * length + j] = source[offsets[i] + j * step], cast.
const char* fastlens_capture(uint64_t source, uint64_t offsets, uint64_t out, int64_t n_rows, int64_t length,
                             int64_t step, int source_dtype, int out_dtype, uint64_t stream);

// scale[i] = max_j |x| / 127 and values[i * length + j] = round(x / scale[i]), for x as in capture.
const char* fastlens_capture_int8(uint64_t source, uint64_t offsets, uint64_t values, uint64_t scale, int64_t n_rows,
                                  int64_t length, int64_t step, int source_dtype, uint64_t stream);

// n_blocks packed blocks in format 0 int8 (a byte each, scale[block / width]), 1 Q4_0, 2 Q4_1, 3 Q8_0.
const char* fastlens_dequantize(uint64_t packed, uint64_t scale, uint64_t out, int64_t n_blocks, int64_t width,
                                int format, int out_dtype, uint64_t stream);

}
