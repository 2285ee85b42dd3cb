// The selective scan on NVIDIA GPUs, any scan order and strides: forward, and what segments pass on either way.
//
// Compiled by cuda_layout.py through NVRTC, behind scan_tiles.cuh, one ENTRY at a time. Loads of the next tile are in
// flight while the present one is worked on. Long sequences are cut into segments that run side by side: `reach` sums
// what each passes on, `carry` chains them, then all start right.

struct alignas(8) ForwardStep {
    static constexpr bool HAS_SLOPE = false;
    float dt, x;
};

// x and delta; a lane that holds both of a step stores them together
template <class X> INLINE void publish(ForwardStep *tile, const Delta<false> &delta, const X &x) {
    if constexpr (X::BY_TOKENS == DELTA_BY_TOKEN) {
#pragma unroll
        for (int j = 0; j < OWN; j++) {
            ForwardStep step;
            float slope;
            step.dt = delta.dt(j, slope), step.x = x.value(j);
            tile[delta.at(j)] = step;
        }
    } else {
        delta.publish(tile);
        x.publish(tile, &ForwardStep::x);
    }
}

// One barrier a tile: what is shared by the team has a second buffer, rows are staged two tiles ahead in a ring of 4.
// With a team for each scan their outputs meet in dynamic shared memory, (SCANS, length, CHANNELS).
template <bool ONLY_STARTS> INLINE void forward(const Call &c) {
    __shared__ int shared_rows[SCANS][4][TILE];
    __shared__ __align__(16) ForwardStep steps[WARPS][TILE * PITCH];
    __shared__ __align__(16) float shared_B[SCANS][2][TILE * PADDED];
    __shared__ __align__(16) float shared_C[SCANS][2][TILE * PADDED];
    __shared__ float2 gates[GATED ? WARPS : 1][TILE * PITCH];
    const Place at(c, false);
    int(*rows)[TILE] = shared_rows[at.team];
    Channels<X_TYPE, X_BY_TOKEN> x(c, at, c.x, c.x_view);
    Delta<false> delta(c, at);
    Gate z(c, at);
    States<B_TYPE, B_BY_TOKEN> B(at, c.B, c.B_view);
    States<C_TYPE, C_BY_TOKEN> C(at, c.C, c.C_view);
    const Output<X_TYPE> out(c, at, c.y);
    float *all_parts = (float *)dynamic_shared(), *parts = all_parts + at.team * (int)c.length * CHANNELS;
    parts += at.thread / 32 * WIDTH + at.c;
    ForwardStep *tile = steps[at.warp];
    float A[STATES], h[STATES] = {};
    load_decays(A, c, at);
    if (c.segments > 1) load_states(h, c.ends, at.in_segment(c, at.s), at.part, at.alive);
    else if (c.initial) load_states(h, c.initial, at.in_scan(c), at.part, at.alive);
    const float skip = c.D ? c.D[at.channel(c)] : 0.f;
    constexpr int PERIOD = EVERY ? EVERY : 1;
    const i64 first_start = (at.b * c.scans + at.k) * ROUND_UP(c.length, PERIOD);

    auto fetch = [&](const int *from) {
        x.fetch(from), delta.fetch(from), B.fetch(from);
        if (!ONLY_STARTS) C.fetch(from);
        if (GATED && !ONLY_STARTS) z.fetch(from);
    };
    int ahead = 0;
    if (at.thread < TILE) rows[0][at.thread] = at.row(c, 0), ahead = at.row(c, 1);
    __syncthreads();
    fetch(rows[0]);
    for (int i = 0; i < at.tiles; i++) {
        const int count = at.steps(i), *here = rows[i % 4];
        const float *B_t = shared_B[at.team][i % 2] + at.part * STATES;
        const float *C_t = shared_C[at.team][i % 2] + at.part * STATES;
        __syncwarp();
        publish(tile, delta, x);
        if (GATED && !ONLY_STARTS) z.publish(gates[at.warp]);
        blank_outside(tile, at, count);
        B.publish(shared_B[at.team][i % 2]);
        if (!ONLY_STARTS) C.publish(shared_C[at.team][i % 2]);
        if (at.thread < TILE) rows[(i + 1) % 4][at.thread] = ahead;
        __syncthreads();
        fetch(rows[(i + 1) % 4]);
        if (at.thread < TILE) ahead = at.row(c, i + 2);
        const i64 t0 = at.t0(i);
        float y[SPLIT];
#pragma unroll
        for (int t = 0; t < TILE; t++) {
            if (EVERY && t % PERIOD == 0 && (PERIOD <= TILE || t0 % PERIOD == 0))
                Start::store(h, c.starts, (first_start + (t0 + t) / PERIOD) * c.channels + at.d(), at.part,
                             at.alive && t < count);
            const ForwardStep step = tile[t * PITCH + at.c];
            const float input = step.dt * step.x;
            y[t % SPLIT] = 0.f;
#pragma unroll
            for (int n = 0; n < STATES; n++) {
                h[n] = exp2_fast(step.dt * A[n]) * h[n] + input * B_t[t * PADDED + n];
                if (!ONLY_STARTS) y[t % SPLIT] += h[n] * C_t[t * PADDED + n];
            }
            if (!ONLY_STARTS && t % SPLIT == SPLIT - 1) {
                const int own = t - (SPLIT - 1) + at.part;
                sum_parts<SPLIT / 2>(y, at);
                float v = y[0] + skip * tile[own * PITCH + at.c].x;
                if (GATED) v *= gates[at.warp][own * PITCH + at.c].x;
                if (at.alive && own < count) {
                    if (SCANS == 1) out.store(here[own], v);
                    else parts[here[own] * CHANNELS] = v;
                }
            }
        }
    }
    if (!ONLY_STARTS && c.last && at.s == c.segments - 1) store_states(h, c.last, at.in_scan(c), at.part, at.alive);
    if constexpr (SCANS > 1 && !ONLY_STARTS) {
        __syncthreads();
        const int count = (int)c.length * CHANNELS;
        const i64 d0 = blockIdx.x % ROUND_UP(c.channels, CHANNELS) * CHANNELS;
        for (int i = threadIdx.x; i < count; i += THREADS) {
            float sum = 0.f;
#pragma unroll
            for (int k = 0; k < SCANS; k++) sum += all_parts[k * count + i];
            const i64 d = d0 + i % CHANNELS;
            typedef typename Element<X_TYPE>::bits bits;
            if (d < c.channels)
                ((bits *)c.y)[(at.b * c.length + i / CHANNELS) * c.channels + d] = encode<X_TYPE>(sum);
        }
    }
}

// What a segment alone passes on to the next: its last state from a zero start, sum_t exp(A sum_{i>t} dt_i) dt_t x_t
// B_t; ADJOINT, with dy for x and C for B: to the one before, sum_t exp(A sum_{i<=t} dt_i) dy_t C_t. Walked away from
// the receiving end, so that it can stop where every weight has underflowed to 0.
template <bool ADJOINT> INLINE void reach(const Call &c) {
    __shared__ int rows[4][TILE];
    __shared__ __align__(16) ForwardStep steps[WARPS][TILE * PITCH];
    __shared__ __align__(16) float shared_B[2][TILE * PADDED];
    constexpr bool GATES = GATED && ADJOINT;
    __shared__ float2 gates[GATES ? WARPS : 1][TILE * PITCH];
    const Place at(c, !ADJOINT);
    const i64 receiver = ADJOINT ? at.s - 1 : at.s + 1;
    if (receiver < 0 || receiver == c.segments) return;
    Channels<ADJOINT ? DY_TYPE : X_TYPE, ADJOINT ? DY_BY_TOKEN : X_BY_TOKEN> x(
        c, at, ADJOINT ? c.dy : c.x, ADJOINT ? c.dy_view : c.x_view);
    Delta<false> delta(c, at);
    Gate z(c, at);
    States<ADJOINT ? C_TYPE : B_TYPE, ADJOINT ? C_BY_TOKEN : B_BY_TOKEN> B(
        at, ADJOINT ? c.C : c.B, ADJOINT ? c.C_view : c.B_view);
    ForwardStep *tile = steps[at.warp];
    float A[STATES], ends[STATES] = {}, sum = 0.f, slowest = -__int_as_float(0x7f800000);
    load_decays(A, c, at);
#pragma unroll
    for (int n = 0; n < STATES; n++)
        if (at.part * STATES + n < N) slowest = fmaxf(slowest, A[n]);

    int ahead = 0;
    if (threadIdx.x < TILE) rows[0][threadIdx.x] = at.row(c, 0), ahead = at.row(c, 1);
    __syncthreads();
    x.fetch(rows[0]), delta.fetch(rows[0]), B.fetch(rows[0]);
    if (GATES) z.fetch(rows[0]);
    for (int i = 0; i < at.tiles; i++) {
        const int *next = rows[(i + 1) % 4];
        const float *B_t = shared_B[i % 2] + at.part * STATES;
        __syncwarp();
        publish(tile, delta, x);
        if (GATES) {
            float slopes[OWN];
            z.publish(gates[at.warp]);
            Gate::apply(tile, &ForwardStep::x, gates[at.warp], at, slopes);
        }
        blank_outside(tile, at, at.steps(i));
        B.publish(shared_B[i % 2]);
        if (threadIdx.x < TILE) rows[(i + 1) % 4][threadIdx.x] = ahead;
        const bool passed = SOFTPLUS && slowest * sum < -127.f;  // without softplus later steps may be negative
        if (__syncthreads_and(passed || !at.alive)) break;
        x.fetch(next), delta.fetch(next), B.fetch(next);
        if (GATES) z.fetch(next);
        if (threadIdx.x < TILE) ahead = at.row(c, i + 2);
        float within = 0.f;
#pragma unroll
        for (int j = 0; j < TILE; j++) {
            const int t = ADJOINT ? j : TILE - 1 - j;
            const ForwardStep step = tile[t * PITCH + at.c];
            const float input = ADJOINT ? step.x : step.dt * step.x;
            if (ADJOINT) within += step.dt;
#pragma unroll
            for (int n = 0; n < STATES; n++)
                ends[n] += exp2_fast((sum + within) * A[n]) * (input * B_t[t * PADDED + n]);
            if (!ADJOINT) within += step.dt;
        }
        sum += within;
    }
    store_states(ends, c.ends, at.in_segment(c, receiver), at.part, at.alive);
    if (at.alive && at.part == 0) c.sums[at.in_segment(c, receiver)] = sum;
}

// ends[s] becomes the state before segment s (ADJOINT: the gradient after it); one thread a state
template <bool ADJOINT> INLINE void carry(const Call &c) {
    const i64 row = c.channels * N, i = (i64)blockIdx.x * THREADS + threadIdx.x, scan = i / row, at = i % row;
    if (scan >= c.batch * c.scans) return;
    const float A = c.A[scan % c.scans * row + at] * LOG2E;
    const float *outside = ADJOINT ? c.gradient : c.initial;
    float h = outside ? outside[i] : 0.f;
    constexpr int AHEAD = 8;
    for (i64 s0 = 0; s0 < c.segments; s0 += AHEAD) {
        float end[AHEAD], sum[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            const i64 s = min(s0 + j, c.segments - 1), from = scan * c.segments + (ADJOINT ? c.segments - 1 - s : s);
            end[j] = s ? c.ends[from * row + at] : 0.f;
            sum[j] = s ? c.sums[from * c.channels + at / N] : 0.f;
        }
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            const i64 s = s0 + j, to = scan * c.segments + (ADJOINT ? c.segments - 1 - s : s);
            h = exp2_fast(A * sum[j]) * h + end[j];
            if (s < c.segments) c.ends[to * row + at] = h;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) KERNEL(const ARGUMENT argument) { ENTRY(argument); }
