// A kernel source of cuda/, named by the macro SOURCE, as a library for the CPU: its kernels by their names, and what runs one.
#define SVG2_EMULATOR
#include SOURCE

typedef void (*Function)(const Params);
static Function kernel;
static const Params* given;

// Run a kernel over its grid. 0, or 1 with the reason in `message`. conflicts: bank conflicts of matrix loads so far.
extern "C" int emulate(Function function, int grid_x, int grid_y, int threads, int shared_bytes, const Params* params,
                       char* message, long* conflicts) {
    kernel = function, given = params;
    emulator::body = [] { kernel(*given); };
    emulator::blocks = grid_x;
    emulator::prepare(threads, shared_bytes);
    volatile int failed = 0;
    if (!_setjmp(emulator::failure)) {
        for (volatile int y = 0; y < grid_y && !failed; y++)
            for (volatile int x = 0; x < grid_x && !failed; x++) {
                emulator::at_x = x, emulator::at_y = y;
                if (emulator::run_block()) continue;
                snprintf(emulator::message, 256, "block (%d, %d) waits for ever", x, y);
                failed = 1;
            }
    } else {
        failed = 1;
    }
    free(emulator::shared);
    strcpy(message, emulator::message);
    *conflicts = emulator::conflicts;
    return failed;
}

// How a launcher has to size shared memory, and the size of the parameters. A program is made for a head dimension, and
// may be for a number of rows.
template <template <class, int, int> class Program>
static int shared_of(int head_dim, int rows) {
    const int sizes[2][2] = {{Program<bf16, 64, 64>::SHARED, Program<bf16, 64, 128>::SHARED},
                             {Program<bf16, 128, 64>::SHARED, Program<bf16, 128, 128>::SHARED}};
    return sizes[head_dim == 128][rows == 128];
}
template <template <class, int> class Program>
static int shared_of(int head_dim, int) {
    return head_dim == 128 ? +Program<bf16, 128>::SHARED : +Program<bf16, 64>::SHARED;
}
extern "C" int shared_bytes(int head_dim, int rows) { return shared_of<Program>(head_dim, rows); }
extern "C" int parameter_bytes() { return sizeof(Params); }
