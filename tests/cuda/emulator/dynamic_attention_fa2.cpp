// The kernels of cuda/dynamic_attention_fa2.cu as a library for the CPU.
#define SVG2_EMULATOR
#include "emulator.h"

#include "../../../cuda/dynamic_attention_fa2.cu"

#include <string>

#define ENTRY(name) if (std::string(#name) == wanted) found = [](const Params& p) { name(p); }
static void (*kernel)(const Params&);
static const Params* given;

// 0, or 1 with the reason in `message`. conflicts: bank conflicts of matrix loads so far.
extern "C" int emulate(const char* wanted, int grid_x, int grid_y, int threads, int shared_bytes, const Params* params,
                       char* message, long* conflicts) {
    void (*found)(const Params&) = nullptr;
    ENTRY(svg2_plan);
    ENTRY(svg2_attention_bf16_128_128);
    ENTRY(svg2_attention_bf16_128_64);
    ENTRY(svg2_attention_fp16_128_128);
    ENTRY(svg2_attention_fp16_128_64);
    ENTRY(svg2_attention_bf16_64_128);
    ENTRY(svg2_attention_bf16_64_64);
    ENTRY(svg2_attention_fp16_64_128);
    ENTRY(svg2_attention_fp16_64_64);
    if (!found) return strcpy(message, "no such kernel"), 1;
    kernel = found, given = params;
    emulator::body = [] { kernel(*given); };
    emulator::prepare(threads, shared_bytes);
    volatile int failed = 0;
    if (!_setjmp(emulator::failure)) {
        for (volatile int y = 0; y < grid_y && !failed; y++)
            for (volatile int x = 0; x < grid_x && !failed; x++) {
                emulator::at_x = x, emulator::at_y = y;
                if (!emulator::run_block()) snprintf(emulator::message, 256, "block (%d, %d) waits for ever", x, y), failed = 1;
            }
    } else {
        failed = 1;
    }
    free(emulator::shared);
    strcpy(message, emulator::message);
    *conflicts = emulator::conflicts;
    return failed;
}

// How a launcher has to size shared memory, and the size of the parameters.
extern "C" int shared_bytes(int head_dim, int rows) {
    const int sizes[2][2] = {{Program<bf16, 64, 64>::SHARED, Program<bf16, 64, 128>::SHARED},
                             {Program<bf16, 128, 64>::SHARED, Program<bf16, 128, 128>::SHARED}};
    return sizes[head_dim == 128][rows == 128];
}
extern "C" int parameter_bytes() { return sizeof(Params); }
