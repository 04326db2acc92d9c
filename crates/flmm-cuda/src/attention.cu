// Attention that also returns the log-sum-exp of every row of scores, without a matrix of scores in memory.
//
// q [groups, rows, D]; k, v [batch * kv_heads, keys, D], whose heads lie k_stride and v_stride elements apart;
// out [batch, rows, heads * D]; lse [groups, rows], where groups = batch * heads. Query head h reads key head
// h * kv_heads / heads. The rows are the last of the keys, and no row sees a later key.
//
// Arithmetic is that of flmm's `attend` (crates/flmm/src/text/attend.rs): product and quotient of a score are rounded
// to the type of the queries, the softmax is f32, normalised probabilities are rounded before they meet the values.
// That is why both kernels know a row's sum before its first probability: `tiles` makes the scores twice, which costs
// half as much again and needs no rescaling of what is already summed.

#include <cuda_bf16.h>
#include <mma.h>

using namespace nvcuda;
typedef __nv_bfloat16 bf16;

// The test that runs this file on the processor has its own.
#ifndef DYNAMIC_SHARED
#define DYNAMIC_SHARED(TYPE, NAME) extern __shared__ TYPE NAME[]
#endif

struct Sizes {
    int heads, kv_heads, rows, keys;
    long long k_stride, v_stride;
    float scale;
};

static __device__ float wide(float x) { return x; }
static __device__ float wide(bf16 x) { return __bfloat162float(x); }
static __device__ void narrow(float x, float &y) { y = x; }
static __device__ void narrow(float x, bf16 &y) { y = __float2bfloat16(x); }

template <typename T> static __device__ float rounded(float x) {
    T y;
    narrow(x, y);
    return wide(y);
}

// The key head of a group (batch, head).
static __device__ int key_head(int group, const Sizes &sizes) {
    int batch = group / sizes.heads, head = group % sizes.heads;
    return batch * sizes.kv_heads + head / (sizes.heads / sizes.kv_heads);
}

// The sum over the lanes of a warp, on each of them.
static __device__ float warp_sum(float x) {
    for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
    return x;
}

// ---- few rows: one block per row and head, all scores of the row in shared memory ----

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;

// Shared memory in floats: keys + D + 2 * THREADS + WARPS.
template <typename T, int D>
static __device__ void few(const T *q, const T *k, const T *v, T *out, float *lse, const Sizes &sizes, float *shared) {
    const int row = blockIdx.x, group = blockIdx.y, thread = threadIdx.x;
    const int warp = thread / 32, lane = thread % 32;
    const int seen = sizes.keys - sizes.rows + row + 1;
    float *scores = shared, *query = scores + sizes.keys, *sums = query + D, *warps = sums + 2 * THREADS;
    const int head = key_head(group, sizes);
    k += head * sizes.k_stride;
    v += head * sizes.v_stride;

    for (int i = thread; i < D; i += THREADS) query[i] = wide(q[((long long)group * sizes.rows + row) * D + i]);
    __syncthreads();

    // A warp per key.
    float max = -INFINITY;
    for (int key = warp; key < seen; key += WARPS) {
        const T *of = k + (long long)key * D;
        float sum = 0;
        for (int i = lane; i < D; i += 32) sum += query[i] * wide(of[i]);
        float score = rounded<T>(rounded<T>(warp_sum(sum)) * sizes.scale);
        if (lane == 0) scores[key] = score;
        max = fmaxf(max, score);
    }
    if (lane == 0) warps[warp] = max;
    __syncthreads();
    max = warps[0];
    for (int i = 1; i < WARPS; i++) max = fmaxf(max, warps[i]);
    __syncthreads();

    float sum = 0;
    for (int key = thread; key < seen; key += THREADS) {
        float e = expf(scores[key] - max);
        scores[key] = e;
        sum += e;
    }
    sum = warp_sum(sum);
    if (lane == 0) warps[warp] = sum;
    __syncthreads();
    sum = 0;
    for (int i = 0; i < WARPS; i++) sum += warps[i];
    if (thread == 0) lse[(long long)group * sizes.rows + row] = max + logf(sum);

    // A thread takes two columns of every slices-th key.
    constexpr int PAIRS = D / 2, SLICES = THREADS / PAIRS;
    const int slice = thread / PAIRS, column = thread % PAIRS * 2;
    if (slice < SLICES) {
        float left = 0, right = 0;
        for (int key = slice; key < seen; key += SLICES) {
            float p = rounded<T>(scores[key] / sum);
            left += p * wide(v[(long long)key * D + column]);
            right += p * wide(v[(long long)key * D + column + 1]);
        }
        sums[slice * D + column] = left;
        sums[slice * D + column + 1] = right;
    }
    __syncthreads();
    const int batch = group / sizes.heads, query_head = group % sizes.heads;
    T *to = out + (((long long)batch * sizes.rows + row) * sizes.heads + query_head) * D;
    for (int i = thread; i < D; i += THREADS) {
        float total = 0;
        for (int slice = 0; slice < SLICES; slice++) total += sums[slice * D + i];
        narrow(total, to[i]);
    }
}

// ---- many rows: 16 rows per warp, 32 keys at a time, products on tensor cores ----

constexpr int TILE = 32;
// Rows in shared memory are longer than what they hold, so that rows do not meet in one bank; fragments stay aligned.
constexpr int SCORE_ROW = TILE + 4, PROB_ROW = TILE + 8;

typedef wmma::fragment<wmma::accumulator, 16, 16, 16, float> Sums;
typedef wmma::fragment<wmma::matrix_a, 16, 16, 16, bf16, wmma::row_major> Left;

// `count` rows of D numbers from row `from` of `data` on; rows from `end` on are zero. 16 bytes at a time.
template <int D, int BLOCK>
static __device__ void stage(bf16 *to, const bf16 *data, int from, int end, int count) {
    constexpr int CHUNKS = D / 8;
    for (int i = threadIdx.x; i < count * CHUNKS; i += BLOCK) {
        int row = i / CHUNKS, chunk = i % CHUNKS * 8;
        uint4 numbers = make_uint4(0, 0, 0, 0);
        if (from + row < end) {
            numbers = *reinterpret_cast<const uint4 *>(data + (long long)(from + row) * D + chunk);
        }
        *reinterpret_cast<uint4 *>(to + row * (D + 8) + chunk) = numbers;
    }
}

// The scores of 16 rows with the TILE keys at hand: `scores [16, SCORE_ROW]`, as summed.
template <int D> static __device__ void score(const bf16 *q, const bf16 *k, float *scores) {
    for (int n = 0; n < TILE; n += 16) {
        Sums sums;
        wmma::fill_fragment(sums, 0.0f);
        for (int i = 0; i < D; i += 16) {
            Left left;
            wmma::fragment<wmma::matrix_b, 16, 16, 16, bf16, wmma::col_major> right;
            wmma::load_matrix_sync(left, q + i, D + 8);
            wmma::load_matrix_sync(right, k + n * (D + 8) + i, D + 8);
            wmma::mma_sync(sums, left, right, sums);
        }
        wmma::store_matrix_sync(scores + n, sums, SCORE_ROW, wmma::mem_row_major);
    }
    __syncwarp();
}

template <int D, int ROW_WARPS>
static __device__ void tiles(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, float *lse, const Sizes &sizes) {
    constexpr int ROWS = 16 * ROW_WARPS, BLOCK = 32 * ROW_WARPS;
    __shared__ __align__(32) bf16 queries[ROWS * (D + 8)];
    __shared__ __align__(32) bf16 tile[TILE * (D + 8)];
    __shared__ __align__(32) float all_scores[ROW_WARPS * 16 * SCORE_ROW];
    __shared__ __align__(32) bf16 all_probs[ROW_WARPS * 16 * PROB_ROW];

    const int group = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // Later rows see more keys: the longest blocks start first.
    const int first = (gridDim.x - 1 - blockIdx.x) * ROWS;
    const int past = sizes.keys - sizes.rows;
    const int limit = min(sizes.keys, past + first + ROWS);
    const int head = key_head(group, sizes);
    k += head * sizes.k_stride;
    v += head * sizes.v_stride;
    stage<D, BLOCK>(queries, q + (long long)group * sizes.rows * D, first, sizes.rows, ROWS);

    const bf16 *own = queries + warp * 16 * (D + 8);
    float *scores = all_scores + warp * 16 * SCORE_ROW;
    bf16 *probs = all_probs + warp * 16 * PROB_ROW;
    // Two lanes share a row: each takes 16 of the keys of a tile.
    const int row = lane / 2, column = lane % 2 * 16;
    const int last = past + first + warp * 16 + row;

    float max = -INFINITY, sum = 0;
    for (int from = 0; from < limit; from += TILE) {
        stage<D, BLOCK>(tile, k, from, sizes.keys, TILE);
        __syncthreads();
        score<D>(own, tile, scores);
        float of[16], high = max;
        for (int i = 0; i < 16; i++) {
            float s = rounded<bf16>(rounded<bf16>(scores[row * SCORE_ROW + column + i]) * sizes.scale);
            of[i] = from + column + i <= last ? s : -INFINITY;
            high = fmaxf(high, of[i]);
        }
        if (high > -INFINITY) {
            sum *= expf(max - high);
            for (int i = 0; i < 16; i++) sum += expf(of[i] - high);
            max = high;
        }
        __syncthreads();
    }
    // The first key is seen by every row, so one of the two lanes has a maximum.
    const float high = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 1));
    sum = max > -INFINITY ? sum * expf(max - high) : 0.0f;
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    if (column == 0 && first + warp * 16 + row < sizes.rows) {
        lse[(long long)group * sizes.rows + first + warp * 16 + row] = high + logf(sum);
    }

    Sums mixed[D / 16];
    for (int i = 0; i < D / 16; i++) wmma::fill_fragment(mixed[i], 0.0f);
    for (int from = 0; from < limit; from += TILE) {
        stage<D, BLOCK>(tile, k, from, sizes.keys, TILE);
        __syncthreads();
        score<D>(own, tile, scores);
        for (int i = 0; i < 16; i++) {
            float s = rounded<bf16>(rounded<bf16>(scores[row * SCORE_ROW + column + i]) * sizes.scale);
            float p = from + column + i <= last ? expf(s - high) / sum : 0.0f;
            narrow(p, probs[row * PROB_ROW + column + i]);
        }
        __syncthreads();
        stage<D, BLOCK>(tile, v, from, sizes.keys, TILE);
        __syncthreads();
        for (int key = 0; key < TILE; key += 16) {
            Left left;
            wmma::load_matrix_sync(left, probs + key, PROB_ROW);
#pragma unroll
            for (int i = 0; i < D / 16; i++) {
                wmma::fragment<wmma::matrix_b, 16, 16, 16, bf16, wmma::row_major> right;
                wmma::load_matrix_sync(right, tile + key * (D + 8) + i * 16, D + 8);
                wmma::mma_sync(mixed[i], left, right, mixed[i]);
            }
        }
        __syncthreads();
    }

    const int batch = group / sizes.heads, query_head = group % sizes.heads;
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        wmma::store_matrix_sync(scores, mixed[i], SCORE_ROW, wmma::mem_row_major);
        __syncwarp();
        for (int at = lane; at < 256; at += 32) {
            int to = first + warp * 16 + at / 16;
            if (to < sizes.rows) {
                long long line = ((long long)batch * sizes.rows + to) * sizes.heads + query_head;
                out[line * D + i * 16 + at % 16] = __float2bfloat16(scores[at / 16 * SCORE_ROW + at % 16]);
            }
        }
        __syncwarp();
    }
}

// The sizes travel as single numbers: the launching side then has no layout of a structure to agree on.
#define SIZES \
    int heads, int kv_heads, int rows, int keys, long long k_stride, long long v_stride, float scale
#define FEW(NAME, T, D)                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                      \
        few_##NAME##_##D(const T *q, const T *k, const T *v, T *out, float *lse, SIZES) {                      \
        DYNAMIC_SHARED(float, shared);                                                                         \
        few<T, D>(q, k, v, out, lse, Sizes{heads, kv_heads, rows, keys, k_stride, v_stride, scale}, shared);   \
    }
#define TILES(D, WARPS)                                                                                        \
    extern "C" __global__ void __launch_bounds__(32 * WARPS)                                                   \
        tiles_bf16_##D(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, float *lse, SIZES) {            \
        tiles<D, WARPS>(q, k, v, out, lse, Sizes{heads, kv_heads, rows, keys, k_stride, v_stride, scale});     \
    }

FEW(f32, float, 64)
FEW(f32, float, 80)
FEW(f32, float, 128)
FEW(f32, float, 256)
FEW(bf16, bf16, 64)
FEW(bf16, bf16, 80)
FEW(bf16, bf16, 128)
FEW(bf16, bf16, 256)
TILES(64, 4)
TILES(80, 4)
TILES(128, 4)
TILES(256, 2)
