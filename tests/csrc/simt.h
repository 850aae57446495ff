// Runs CUDA kernels on the CPU: blocks one after another, their threads as fibers of one OS thread.
//
//   g++ -std=c++17 -O1 -fPIC -shared -fsanitize=alignment -fsanitize-undefined-trap-on-error
//       -U_FORTIFY_SOURCE -include tests/csrc/simt.h -x c++ csrc/patch_sites.cu -o patch_sites.so
//
// A thread runs until it meets a barrier or ends. When none can run, barriers that are complete open; if
// none is, the launch fails with a sentence, which cudaGetErrorString returns as a GPU's driver would.
// Found this way: deadlock; __syncthreads met at two places or after a thread has left; shared memory that
// two threads touch with no barrier between (one of them writing), that no thread wrote, or beyond its
// end; addresses that are not mapped (tensors beside guard pages) and misaligned ones. Threads take
// turns in the order that simt_set_order chose, so a result that hangs on the order can be seen.
// Not modelled: races in global memory, speed, tensor cores, asynchronous copies, clusters.
#pragma once
#define FASTLENS_SIMT

#include <csetjmp>
#include <csignal>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include <ucontext.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
typedef void* cudaStream_t;
typedef int cudaError_t;
constexpr cudaError_t cudaSuccess = 0;

namespace simt {

constexpr unsigned kLanes = 32, kMostThreads = 1024;
constexpr size_t kStackBytes = 64 * 1024;

enum Wait { kRunning, kBlockBarrier, kWarpBarrier, kEnded };

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Wait wait;
    int line;
    unsigned mask;
};

// Who touched a number of shared memory, and when: barriers passed by the block and by the warp.
struct Access {
    unsigned thread, block_epoch, warp_epoch;
    bool ordered_before(const Access& later) const {
        return thread == later.thread || block_epoch != later.block_epoch ||
               (thread / kLanes == later.thread / kLanes && warp_epoch != later.warp_epoch);
    }
};

struct Shared {
    virtual void poison() = 0;
};

struct Machine {
    dim3 grid, block, block_index, thread_index;
    unsigned n_threads = 0, current = 0, block_epoch = 0;
    unsigned warp_epoch[kMostThreads / kLanes];
    uint64_t slots[2][kMostThreads];
    std::vector<Thread> threads;
    std::vector<Shared*> shared;
    ucontext_t scheduler;
    std::function<void()> body;
    std::string error, reported;
    int order = 0;
    uint64_t random = 88172645463325252ull;
    sigjmp_buf crash;
};

inline Machine& machine() {
    static Machine m;
    return m;
}

inline std::string place(unsigned thread) {
    const Machine& m = machine();
    char text[128];
    std::snprintf(text, sizeof text, "thread %u of block (%u, %u, %u)", thread, m.block_index.x, m.block_index.y,
                  m.block_index.z);
    return text;
}

inline void to_scheduler() {
    Machine& m = machine();
    swapcontext(&m.threads[m.current].context, &m.scheduler);
}

// Ends the launch: the scheduler sees the sentence and resumes nobody.
inline void fail(const std::string& sentence) {
    Machine& m = machine();
    if (m.error.empty()) m.error = sentence;
    to_scheduler();
}

inline void wait(Wait kind, int line, unsigned mask = 0) {
    Machine& m = machine();
    Thread& me = m.threads[m.current];
    me.wait = kind;
    me.line = line;
    me.mask = mask;
    to_scheduler();
}

// -- shared memory -----------------------------------------------------------------------------------

template <typename T> struct Cell {
    T value;
    bool is_written = false;
    Access writer;
    std::vector<Access> readers;  // since the last write

    static Access now() {
        const Machine& m = machine();
        return {m.current, m.block_epoch, m.warp_epoch[m.current / kLanes]};
    }
    void conflict(const char* what, const Access& other) {
        fail(std::string("shared memory race: ") + place(machine().current) + " " + what + " what thread " +
             std::to_string(other.thread) + " touches with no barrier between");
    }
    operator T() {
        const Access me = now();
        if (!is_written) fail("uninitialised shared memory is read by " + place(me.thread));
        if (!writer.ordered_before(me)) conflict("reads", writer);
        readers.push_back(me);
        return value;
    }
    Cell& operator=(T given) {
        const Access me = now();
        if (is_written && !writer.ordered_before(me)) conflict("writes", writer);
        for (const Access& reader : readers) {
            if (!reader.ordered_before(me)) conflict("writes", reader);
        }
        readers.clear();
        value = given;
        is_written = true;
        writer = me;
        return *this;
    }
    Cell& operator=(const Cell&) = delete;
};

template <typename T, int count> struct SharedArray : Shared {
    Cell<T> cells[count];
    SharedArray() {
        machine().shared.push_back(this);
        poison();
    }
    void poison() override {
        for (auto& cell : cells) {
            std::memset(static_cast<void*>(&cell.value), 0xff, sizeof(T));  // NaN, or -1
            cell.is_written = false;
            cell.readers.clear();
        }
    }
    Cell<T>& operator[](int64_t i) {
        if (i < 0 || i >= count) {
            fail("shared memory of " + std::to_string(count) + " numbers is indexed with " + std::to_string(i) +
                 " by " + place(machine().current));
        }
        return cells[i];
    }
};

// -- the scheduler -----------------------------------------------------------------------------------

inline void enter() {
    Machine& m = machine();
    m.body();
    m.threads[m.current].wait = kEnded;
    to_scheduler();
}

inline std::string described(unsigned thread) {
    const Thread& t = machine().threads[thread];
    if (t.wait == kEnded) return place(thread) + " has ended";
    return place(thread) + " waits at " + (t.wait == kBlockBarrier ? "__syncthreads" : "a warp operation") +
           " in line " + std::to_string(t.line);
}

// Opens every warp barrier that all its lanes have met; whether there was one.
inline bool open_warps() {
    Machine& m = machine();
    bool opened = false;
    for (unsigned first = 0; first < m.n_threads; first += kLanes) {
        const unsigned lanes = std::min(kLanes, m.n_threads - first);
        const unsigned present = lanes == kLanes ? ~0u : (1u << lanes) - 1;
        int waiting = -1;
        bool complete = true;
        for (unsigned lane = 0; lane < lanes; ++lane) {
            const Thread& t = m.threads[first + lane];
            if (t.wait != kWarpBarrier) continue;
            const Thread& one = m.threads[first + (waiting < 0 ? lane : waiting)];
            if ((t.mask & present) != (one.mask & present) || t.line != one.line) complete = false;
            if (waiting < 0) waiting = static_cast<int>(lane);
        }
        if (waiting < 0) continue;
        const unsigned mask = m.threads[first + waiting].mask & present;
        for (unsigned lane = 0; lane < lanes; ++lane) {
            if ((mask >> lane & 1) != (m.threads[first + lane].wait == kWarpBarrier)) complete = false;
        }
        if (!complete) continue;
        for (unsigned lane = 0; lane < lanes; ++lane) {
            if (mask >> lane & 1) m.threads[first + lane].wait = kRunning;
        }
        m.warp_epoch[first / kLanes]++;
        opened = true;
    }
    return opened;
}

// Opens the block's barrier if every thread stands at it; else says who does not.
inline void open_block() {
    Machine& m = machine();
    const Thread& first = m.threads[0];
    for (unsigned t = 0; t < m.n_threads; ++t) {
        const Thread& other = m.threads[t];
        if (first.wait != other.wait || first.wait != kBlockBarrier || first.line != other.line) {
            const unsigned one = first.wait == kEnded && other.wait == kEnded ? t : 0;
            const bool is_barrier = first.wait == kBlockBarrier || other.wait == kBlockBarrier;
            m.error = std::string(is_barrier ? "divergent barrier: " : "deadlock: ") + described(one) + ", " +
                      described(t);
            return;
        }
    }
    for (unsigned t = 0; t < m.n_threads; ++t) m.threads[t].wait = kRunning;
    m.block_epoch++;
}

inline void run_block() {
    Machine& m = machine();
    m.block_epoch = 0;
    std::memset(m.warp_epoch, 0, sizeof m.warp_epoch);
    for (Shared* array : m.shared) array->poison();
    std::vector<unsigned> turns(m.n_threads);
    for (unsigned t = 0; t < m.n_threads; ++t) {
        turns[t] = m.order == 1 ? m.n_threads - 1 - t : t;
        Thread& thread = m.threads[t];
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.get();
        thread.context.uc_stack.ss_size = kStackBytes;
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, enter, 0);
        thread.wait = kRunning;
    }
    while (m.error.empty()) {
        for (unsigned t = m.n_threads - 1; m.order == 2 && t > 0; --t) {
            m.random ^= m.random << 13, m.random ^= m.random >> 7, m.random ^= m.random << 17;
            std::swap(turns[t], turns[m.random % (t + 1)]);
        }
        unsigned ended = 0;
        for (unsigned t : turns) {
            if (m.threads[t].wait == kRunning) {
                m.current = t;
                m.thread_index = dim3(t % m.block.x, t / m.block.x % m.block.y, t / (m.block.x * m.block.y));
                swapcontext(&m.scheduler, &m.threads[t].context);
                if (!m.error.empty()) return;
            }
            ended += m.threads[t].wait == kEnded;
        }
        if (ended == m.n_threads) return;
        if (!open_warps()) open_block();
    }
}

inline void crashed(int number, siginfo_t* info, void*) {
    Machine& m = machine();
    char text[256];
    const char* what = number == SIGILL ? "misaligned or undefined access" : "address outside every tensor";
    std::snprintf(text, sizeof text, "%s (%p) by thread %u of block (%u, %u, %u)", what, info->si_addr, m.current,
                  m.block_index.x, m.block_index.y, m.block_index.z);
    m.error = text;
    siglongjmp(m.crash, 1);
}

template <typename Body> void launch(dim3 grid, dim3 block, Body&& body) {
    Machine& m = machine();
    m.grid = grid, m.block = block, m.n_threads = block.x * block.y * block.z, m.body = body;
    m.error.clear();
    if (m.n_threads == 0 || m.n_threads > kMostThreads || grid.x == 0 || grid.x > 2147483647u || grid.y == 0 ||
        grid.y > 65535 || grid.z == 0 || grid.z > 65535) {
        m.reported = "invalid configuration argument";
        return;
    }
    while (m.threads.size() < m.n_threads) {
        m.threads.emplace_back();
        m.threads.back().stack.reset(new char[kStackBytes]);
    }
    static char handler_stack[64 * 1024];
    stack_t mine = {}, before = {};
    mine.ss_sp = handler_stack, mine.ss_size = sizeof handler_stack;
    sigaltstack(&mine, &before);
    const int caught[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
    struct sigaction action = {}, old[4];
    action.sa_sigaction = crashed, action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 4; ++i) sigaction(caught[i], &action, &old[i]);
    if (sigsetjmp(m.crash, 1) == 0) {
        for (unsigned z = 0; z < grid.z && m.error.empty(); ++z) {
            for (unsigned y = 0; y < grid.y && m.error.empty(); ++y) {
                for (unsigned x = 0; x < grid.x && m.error.empty(); ++x) {
                    m.block_index = dim3(x, y, z);
                    run_block();
                }
            }
        }
    }
    for (int i = 0; i < 4; ++i) sigaction(caught[i], &old[i], nullptr);
    sigaltstack(&before, nullptr);
    m.reported = m.error;
}

// -- warp operations ---------------------------------------------------------------------------------

// Each lane lays its value in a slot and waits for the others; two sets of slots in turn, so that a fast
// lane's next value does not overwrite what a slow one still reads.
template <typename T> T shuffled(unsigned mask, T value, int source, int line) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves at most eight bytes");
    Machine& m = machine();
    const unsigned first = m.current / kLanes * kLanes;
    uint64_t* slots = m.slots[m.warp_epoch[first / kLanes] & 1];
    std::memcpy(&slots[m.current], &value, sizeof value);
    wait(kWarpBarrier, line, mask);
    if (source < 0 || source >= static_cast<int>(kLanes) || !(mask >> source & 1) ||
        first + source >= m.n_threads) {
        fail("a shuffle reads lane " + std::to_string(source) + ", which takes no part, in " + place(m.current));
    }
    T found;
    std::memcpy(&found, &slots[first + source], sizeof found);
    return found;
}

inline int lane() { return static_cast<int>(machine().current % kLanes); }

}  // namespace simt

#define threadIdx (simt::machine().thread_index)
#define blockIdx (simt::machine().block_index)
#define blockDim (simt::machine().block)
#define gridDim (simt::machine().grid)
#define __syncthreads() simt::wait(simt::kBlockBarrier, __LINE__)
#define __syncwarp() simt::wait(simt::kWarpBarrier, __LINE__, ~0u)
#define __shfl_sync(mask, value, from) simt::shuffled(mask, value, from, __LINE__)
#define __shfl_xor_sync(mask, value, bits) simt::shuffled(mask, value, simt::lane() ^ (bits), __LINE__)
#define FASTLENS_SHARED(type, name, count) static simt::SharedArray<type, count> name
#define FASTLENS_LAUNCH(kernel, grid, block, stream, ...) \
    simt::launch(grid, block, [=] { kernel(__VA_ARGS__); })

inline cudaError_t cudaGetLastError() { return simt::machine().reported.empty() ? cudaSuccess : 1; }
inline const char* cudaGetErrorString(cudaError_t) {
    static std::string sentence;
    sentence.swap(simt::machine().reported);
    simt::machine().reported.clear();
    return sentence.c_str();
}

// Turns are taken forward (0), backward (1) or at random (2).
extern "C" __attribute__((visibility("default"))) inline void simt_set_order(int order);
extern "C" __attribute__((used, visibility("default"))) inline void simt_set_order(int order) {
    simt::machine().order = order;
}

// -- numbers -----------------------------------------------------------------------------------------

struct __half { _Float16 value; };
struct __nv_bfloat16 { uint16_t bits; };
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
inline __half __ushort_as_half(unsigned short bits) {
    __half x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
inline float __bfloat162float(__nv_bfloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    if (x != x) return {0x7fff};
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
// Built without contraction and fast-math, plain operators round once each.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyintf(x)); }
