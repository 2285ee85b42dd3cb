// Sums of what blocks or scans left side by side in memory, in order: always the same bits. Behind scan.cuh.

// In float32 and in order
template <int IN, int OUT> INLINE void sum(const Job &job, const void *from, void *to_all, i64 block) {
    constexpr int EACH = IN == 0 ? VECTOR : WIDE;
    const i64 i = block * THREADS + threadIdx.x, inner = job.inner / EACH, count = job.outer * inner;
    if (i >= count) return;
    const i64 o = count < 1LL << 32 ? (unsigned)i / (unsigned)inner : i / inner;  // of 64 bits it takes 100 instructions
    const Pack<IN, EACH> *in = (const Pack<IN, EACH> *)from + o * (job.terms - 1) * inner + i;
    float total[EACH] = {};
#pragma unroll 8
    for (i64 j = 0; j < job.terms; j++) {
        const Pack<IN, EACH> term = in[j * inner];
#pragma unroll
        for (int v = 0; v < EACH; v++) total[v] += decode<IN>(term.v[v]);
    }
    Pack<OUT, EACH> out;
#pragma unroll
    for (int v = 0; v < EACH; v++) out.v[v] = encode<OUT>(total[v]);
    i64 to = i * EACH;
    if (job.row) {
        const i64 row = to < 1LL << 32 ? (unsigned)to / (unsigned)job.row : to / job.row;
        to += row * (job.pitch - job.row);
    }
    *(Pack<OUT, EACH> *)((typename Element<OUT>::bits *)to_all + to) = out;
}

// Several sums, one after the other in the grid
INLINE void sums(const Sum &s) {
    i64 block = blockIdx.x;
    int j = 0;
    while (block >= s.job[j].blocks) block -= s.job[j++].blocks;
    const Job &job = s.job[j];
    if (job.in_type == job.out_type) {
        if (job.in_type == 0) sum<0, 0>(job, s.in[j], s.out[j], block);
        if (job.in_type == 1) sum<1, 1>(job, s.in[j], s.out[j], block);
        if (job.in_type == 2) sum<2, 2>(job, s.in[j], s.out[j], block);
    } else {
        if (job.out_type == 1) sum<0, 1>(job, s.in[j], s.out[j], block);
        if (job.out_type == 2) sum<0, 2>(job, s.in[j], s.out[j], block);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) KERNEL(const ARGUMENT argument) { ENTRY(argument); }
