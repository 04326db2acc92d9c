// Products of 16 by 16 numbers. Every lane holds all of a fragment and does all of the work.
#pragma once
#include "cuda_bf16.h"

namespace nvcuda::wmma {
struct row_major {};
struct col_major {};
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
enum layout_t { mem_row_major };

template <typename Use, int, int, int, typename T, typename Layout = void> struct fragment {
    float x[16][16];
};

template <typename Use, typename Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, __nv_bfloat16, Layout> &to, const __nv_bfloat16 *from, int line) {
    // What the hardware asks for.
    if (reinterpret_cast<uintptr_t>(from) % 32 != 0 || line % 8 != 0) __builtin_trap();
    constexpr bool by_row = __is_same(Layout, row_major);
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) to.x[i][j] = __bfloat162float(by_row ? from[i * line + j] : from[j * line + i]);
}

template <typename Sums> void fill_fragment(Sums &sums, float x) {
    for (auto &row : sums.x)
        for (float &y : row) y = x;
}

template <typename Sums, typename A, typename B> void mma_sync(Sums &to, const A &a, const B &b, const Sums &sums) {
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) {
            float sum = sums.x[i][j];
            for (int k = 0; k < 16; k++) sum += a.x[i][k] * b.x[k][j];
            to.x[i][j] = sum;
        }
}

template <typename Sums> void store_matrix_sync(float *to, const Sums &sums, int line, layout_t) {
    if (reinterpret_cast<uintptr_t>(to) % 32 != 0 || line % 4 != 0) __builtin_trap();
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) to[i * line + j] = sums.x[i][j];
}
} // namespace nvcuda::wmma
