// The kernels of cuda/near_field_fa3.cu as a library for the CPU.
#define SVG2_EMULATOR
#include "warpgroup.h"

#include "../../../cuda/near_field_fa3.cu"
#include "emulate.h"

#include <string>

#define ENTRY(name) if (std::string(#name) == wanted) found = [](const Params& p) { name(p); }

extern "C" int emulate(const char* wanted, int grid_x, int grid_y, int threads, int shared_bytes, const Params* params,
                       char* message, long* conflicts) {
    void (*found)(const Params&) = nullptr;
    ENTRY(svg2_near_field_bf16_128);
    ENTRY(svg2_near_field_fp16_128);
    ENTRY(svg2_near_field_bf16_64);
    ENTRY(svg2_near_field_fp16_64);
    return emulate_grid(found, grid_x, grid_y, threads, shared_bytes, params, message, conflicts);
}

// How a launcher has to size shared memory, and the size of the parameters.
extern "C" int shared_bytes(int head_dim) {
    return head_dim == 128 ? +Program<bf16, 128>::SHARED : +Program<bf16, 64>::SHARED;
}
extern "C" int parameter_bytes() { return sizeof(Params); }
