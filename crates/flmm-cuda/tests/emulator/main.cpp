// Runs one kernel: KERNEL heads kv_heads batch rows keys k_stride v_stride grid threads, then q, k, v on standard input;
// out and lse on standard output.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <ucontext.h>
#include <vector>

#include "../../src/attention.cu"

Index threadIdx, blockIdx, gridDim;
float dynamic_shared[1 << 16];

enum State { RUNS, AT_WARP, AT_BLOCK, ENDED };
struct Thread {
    ucontext_t context;
    State state;
    std::vector<char> stack;
};
static std::vector<Thread> threads;
static std::vector<float> exchanged;
static ucontext_t scheduler;
static std::function<void()> body;

static void wait(State state) {
    Thread &thread = threads[threadIdx.x];
    thread.state = state;
    swapcontext(&thread.context, &scheduler);
}
void __syncthreads() { wait(AT_BLOCK); }
void __syncwarp() { wait(AT_WARP); }
float __shfl_xor_sync(unsigned, float x, int lanes) {
    exchanged[threadIdx.x] = x;
    __syncwarp();
    float y = exchanged[threadIdx.x ^ lanes];
    __syncwarp();
    return y;
}

static void run() {
    body();
    wait(ENDED);
}

// Lets threads `from..to` go on if all that have not ended wait at `state`.
static bool release(size_t from, size_t to, State state) {
    bool any = false;
    for (size_t i = from; i < to; i++) {
        if (threads[i].state != state && threads[i].state != ENDED) return false;
        any |= threads[i].state == state;
    }
    for (size_t i = from; any && i < to; i++)
        if (threads[i].state == state) threads[i].state = RUNS;
    return any;
}

static void run_block() {
    for (Thread &thread : threads) {
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = thread.stack.size();
        thread.context.uc_link = nullptr;
        thread.state = RUNS;
        makecontext(&thread.context, run, 0);
    }
    for (bool more = true; more;) {
        for (size_t i = 0; i < threads.size(); i++) {
            if (threads[i].state != RUNS) continue;
            threadIdx.x = int(i);
            swapcontext(&scheduler, &threads[i].context);
        }
        more = release(0, threads.size(), AT_BLOCK);
        for (size_t i = 0; i < threads.size(); i += 32) more |= release(i, i + 32, AT_WARP);
    }
    // Threads that still wait have met different barriers.
    for (Thread &thread : threads)
        if (thread.state != ENDED) exit(3);
}

template <typename T> static std::vector<T> read(size_t count) {
    std::vector<T> numbers(count);
    if (fread(numbers.data(), sizeof(T), count, stdin) != count) exit(2);
    return numbers;
}

template <typename T, typename Kernel> static void launch(Kernel kernel, char **argv) {
    auto number = [&](int i) { return atoi(argv[i]); };
    int heads = number(2), kv_heads = number(3), batch = number(4), rows = number(5), keys = number(6);
    int k_stride = number(7), v_stride = number(8);
    size_t dim = atoi(strrchr(argv[1], '_') + 1), groups = size_t(heads) * batch;
    auto q = read<T>(groups * rows * dim);
    auto k = read<T>(size_t(kv_heads) * batch * k_stride), v = read<T>(size_t(kv_heads) * batch * v_stride);
    std::vector<T> out(q.size());
    std::vector<float> lse(groups * rows);
    gridDim = {number(9), int(groups)};
    threads.resize(number(10));
    exchanged.resize(threads.size());
    for (Thread &thread : threads) thread.stack.resize(1 << 18);
    float scale = 1 / std::sqrt(float(dim));
    body = [&] {
        kernel(q.data(), k.data(), v.data(), out.data(), lse.data(), heads, kv_heads, rows, keys, k_stride, v_stride,
               scale);
    };
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++) run_block();
    fwrite(out.data(), sizeof(T), out.size(), stdout);
    fwrite(lse.data(), sizeof(float), lse.size(), stdout);
}

int main(int, char **argv) {
#define KERNEL(T, NAME)                                                                                        \
    if (!strcmp(argv[1], #NAME)) return launch<T>(NAME, argv), 0;
    KERNEL(float, few_f32_64)
    KERNEL(float, few_f32_80)
    KERNEL(float, few_f32_128)
    KERNEL(float, few_f32_256)
    KERNEL(bf16, few_bf16_64)
    KERNEL(bf16, few_bf16_80)
    KERNEL(bf16, few_bf16_128)
    KERNEL(bf16, few_bf16_256)
    KERNEL(bf16, tiles_bf16_64)
    KERNEL(bf16, tiles_bf16_80)
    KERNEL(bf16, tiles_bf16_128)
    KERNEL(bf16, tiles_bf16_256)
    return 4;
}
