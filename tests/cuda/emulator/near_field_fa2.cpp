// The kernels of cuda/near_field_fa2.cu as a library for the CPU.
#define SVG2_EMULATOR
#include "emulator.h"

#include "../../../cuda/near_field_fa2.cu"
#include "emulate.h"

#include <string>

#define ENTRY(name) if (std::string(#name) == wanted) found = [](const Params& p) { name(p); }
extern "C" int emulate(const char* wanted, int grid_x, int grid_y, int threads, int shared_bytes, const Params* params,
                       char* message, long* conflicts) {
    void (*found)(const Params&) = nullptr;
    ENTRY(svg2_near_field_bf16_128_128);
    ENTRY(svg2_near_field_bf16_128_64);
    ENTRY(svg2_near_field_fp16_128_128);
    ENTRY(svg2_near_field_fp16_128_64);
    ENTRY(svg2_near_field_bf16_64_128);
    ENTRY(svg2_near_field_bf16_64_64);
    ENTRY(svg2_near_field_fp16_64_128);
    ENTRY(svg2_near_field_fp16_64_64);
    return emulate_grid(found, grid_x, grid_y, threads, shared_bytes, params, message, conflicts);
}

// How a launcher has to size shared memory, and the size of the parameters.
extern "C" int shared_bytes(int head_dim, int rows) {
    const int sizes[2][2] = {{Program<bf16, 64, 64>::SHARED, Program<bf16, 64, 128>::SHARED},
                             {Program<bf16, 128, 64>::SHARED, Program<bf16, 128, 128>::SHARED}};
    return sizes[head_dim == 128][rows == 128];
}
extern "C" int parameter_bytes() { return sizeof(Params); }
