// As much of CUDA as src/attention.cu uses, on the processor: the threads of one block at a time, each a context of its
// own that runs until it meets a barrier. Nothing here is fast; the point is that the kernels themselves are run.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#define __device__
#define __global__
#define __shared__ static
#define __align__(N) __attribute__((aligned(N)))
#define __launch_bounds__(N)
#define DYNAMIC_SHARED(TYPE, NAME) TYPE *NAME = dynamic_shared

struct Index {
    int x, y;
};
extern Index threadIdx, blockIdx, gridDim;
extern float dynamic_shared[];

// Waits for the threads of the block, or of the warp.
void __syncthreads();
void __syncwarp();
float __shfl_xor_sync(unsigned, float x, int lanes);

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int min(int x, int y) { return x < y ? x : y; }

struct __nv_bfloat16 {
    uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
inline __nv_bfloat16 __float2bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
