// Runs one kernel of a source over its grid; to be included after the source, which defines Params.
#pragma once

static void (*kernel)(const Params&);
static const Params* given;

// 0, or 1 with the reason in `message`. conflicts: bank conflicts of matrix loads so far.
static int emulate_grid(void (*found)(const Params&), int grid_x, int grid_y, int threads, int shared_bytes,
                        const Params* params, char* message, long* conflicts) {
    if (!found) return strcpy(message, "no such kernel"), 1;
    kernel = found, given = params;
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
