// fastlens.kernels._cuda: the launchers as Python functions that raise what a launcher says. Not run on a GPU.

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "launchers.h"

namespace {

template <typename... Arguments> auto raising(const char* (*launcher)(Arguments...)) {
    return [launcher](Arguments... arguments) {
        if (const char* sentence = launcher(arguments...)) {
            throw std::runtime_error(std::string("CUDA kernel not launched: ") + sentence);
        }
    };
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "Launchers of fastlens' CUDA kernels (csrc/launchers.h). They check no index.";
    module.def("patch_sites", raising(fastlens_patch_sites));
    module.def("capture", raising(fastlens_capture));
    module.def("capture_int8", raising(fastlens_capture_int8));
    module.def("dequantize", raising(fastlens_dequantize));
}
