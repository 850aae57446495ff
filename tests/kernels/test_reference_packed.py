"""The table of packed formats is llama.cpp's."""

from fastlens.kernels.reference_packed import FORMATS, unpacked_width


def test_block_sizes_are_those_of_the_gguf_package():
    import gguf

    for name, block in FORMATS.items():
        if name != "int8":
            kind = gguf.GGMLQuantizationType[name]
            assert tuple(block) == gguf.constants.GGML_QUANT_SIZES[kind]


def test_widths():
    assert unpacked_width(54, "Q4_0") == 96
    assert unpacked_width(7, "int8") == 7
