// State-space duality on NVIDIA GPUs: forward, one or both directions, any strides but a contiguous last axis.
//
// Compiled by ssd_cuda.py through NVRTC behind intrinsics.cuh, one ENTRY at a time. Tokens are cut into chunks of
// STRIPS strips of 32. `outputs` is attention whose scores C B^T all heads of a group share: a warp forms those of its
// 16 or 32 rows once, keeps them in registers as bfloat16, and for every head weighs them with decays and multiplies
// by x. A decay between two strips is a product of three numbers, none above 1: token to its strip's border, strips in
// between, border to token. Only the 32 x 32 pairs of a strip with itself take an exponential each.
//
// What other chunks send are states: `sums` forms each chunk's own, with B^T in registers in place of the scores;
// `chain` turns them into those that enter each chunk; to `outputs` they are 2 N more columns, with C for scores.
//
// Macros: KERNEL, ENTRY; THREADS, RESIDENT (blocks a processor); X_TYPE (of x, B, C and y: 1 bfloat16); STRIPS;
// N, WIDTH: states and a slice of P, padded to multiples of 16; SLICES of P: a head and a slice are a job; DIRECTIONS;
// SOFTPLUS; DT_TYPE, D_TYPE (0 float, 1 bfloat16, 2 half, 3 none); ALL: every chunk and slice is full; STATES: those that
// enter, DIRECT: one from each other chunk of few, which `chain` has not seen; SLOTS: jobs in shared memory; BLOCKS of 16
// rows a warp; TENSOR_ASYNC: products by four warps together.

#define LOG2E 1.4426950408889634f
#define ROUND_UP(a, b) (((a) + (b) - 1) / (b))

constexpr int TOKENS = 32 * STRIPS, WARPS = THREADS / 32, OWN = ROUND_UP(STRIPS, WARPS);
constexpr int ROW = 128, SLICE = 64;                             // bytes and elements of a tile's row in shared memory
constexpr int PANELS = ROUND_UP(N, SLICE), STEPS = N / 16;       // tiles side by side that hold N states
constexpr int TILE_BYTES = TOKENS * ROW, STATE_BYTES = N * ROW;
constexpr int AHEAD = SLOTS - 1;  // jobs
constexpr bool BOTH = DIRECTIONS == 2;

struct View { i64 batch, token, head; };  // strides in bytes

struct Call {
    const char *x, *dt, *B, *C, *D;      // (batch, length, heads or groups, P or N or nothing); D may be null
    const float *A, *bias, *initial;     // (heads); null or (heads); null or (batch, DIRECTIONS, heads, P, N)
    char *y, *states;                    // (batch, length, heads, P); (batch, chunks, jobs, DIRECTIONS, N, WIDTH)
    float *totals, *last;                // (batch, chunks, heads); null or like initial
    View x_view, dt_view, B_view, C_view, D_view;
    i64 batch, length;
    int heads, groups, p, n, chunks;
    int parts, share;  // a group's jobs (heads times SLICES) go to so many blocks, each takes up to so many
    float diagonal;
};

// One head's decays: logarithms to base 2 but for `sent`. A strip's tokens lie as lanes want them: 2 q, 2 q + 1,
// 2 q + 8, 2 q + 9 of each 16 together
struct alignas(16) Sent {
    float total[STRIPS < 4 ? 4 : STRIPS];
    unsigned short sent[2][TOKENS];  // dt times decay to the strip's right border, left border
};
struct alignas(16) Decays : Sent {
    float prefix[TOKENS], suffix[TOKENS];  // sums from the left border, to the right border, own included
    float dt[TOKENS], D[TOKENS];
};

INLINE int column_place(int t) { return (t & 16) + (t % 8 / 2) * 4 + (t & 1) + (t & 8) / 4; }

template <int OF> INLINE unsigned fetch_scalar(const char *p) {
    return OF == 0 ? __ldg((const unsigned *)p) : __ldg((const unsigned short *)p);
}
template <int OF> INLINE float scalar(unsigned bits) {
    if (OF == 2) return half_to_float((unsigned short)bits);
    return __uint_as_float(OF == 0 ? bits : bits << 16);
}

// log(1 + exp(v)) = max(v, 0) + log(1 + e), as in scan.cu
INLINE float softplus(float v) {
    const float e = exp2_fast(-fabsf(v) * LOG2E), s = e * reciprocal_fast(e + 2.f), q = s * s;
    const float p = 2.001245514e-1f + q * (1.398030134e-1f + q * 1.408916763e-1f);
    return fmaxf(v, 0.f) + 2.f * s * (1.f + q * (3.333315734e-1f + q * p));
}

// What a block works on: a chunk, and jobs begin to end of one group
struct Place {
    i64 b, first;  // first: token
    int c, g, begin, end, tokens, rest;  // tokens: of the chunk; rest: of the block's index
    INLINE Place(const Call &call) {
        int i = blockIdx.x;
        const int part = i % (call.groups * call.parts), of_group = call.heads / call.groups * SLICES;
        i /= call.groups * call.parts, g = part / call.parts;
        begin = g * of_group + part % call.parts * call.share;
        end = min(begin + call.share, (g + 1) * of_group);
        c = i % call.chunks, i /= call.chunks;
        b = i % (int)call.batch, rest = i / (int)call.batch;
        first = (i64)c * TOKENS, tokens = (int)min(call.length - first, (i64)TOKENS);
    }
    INLINE const char *at(const char *v, const View &view, int head) const {
        return v + b * view.batch + first * view.token + head * view.head;
    }
};

// dt and D of a lane's tokens, one in each of the warp's strips warp + i WARPS, fetched ahead. Two warps a strip share
// the work: one sums from the left, the other from the right
template <bool PAIRS> struct Fetched {
    static constexpr bool SHARED = WARPS == 2 * STRIPS && PAIRS, EVEN = STRIPS % WARPS == 0 || SHARED;
    unsigned dt[OWN], D[OWN];  // as they lie in memory: to look at one is to wait for it
    float A, bias;
    INLINE int strip(int i) const {
        const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
        return SHARED ? warp / 2 : warp + i * WARPS;
    }
    INLINE void fetch(const Call &call, const Place &place, int h) {
        A = __ldg(call.A + h), bias = call.bias ? __ldg(call.bias + h) : 0;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const int t = strip(i) * 32 + threadIdx.x % 32;
            const bool inside = (ALL && EVEN) || t < place.tokens;
            dt[i] = D[i] = 0;
            if (inside) dt[i] = fetch_scalar<DT_TYPE>(place.at(call.dt, call.dt_view, h) + t * call.dt_view.token);
            if (PAIRS && D_TYPE < 3 && inside)
                D[i] = fetch_scalar<D_TYPE>(place.at(call.D, call.D_view, h) + t * call.D_view.token);
        }
    }
    template <class To> INLINE void store(const Place &place, To &to) const {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const int strip = this->strip(i), t = strip * 32 + lane, column = strip * 32 + column_place(lane);
            if (!EVEN && strip >= STRIPS) break;
            float step = scalar<DT_TYPE>(dt[i]) + bias;
            if (SOFTPLUS) step = softplus(step);
            if (!ALL && t >= place.tokens) step = 0;
            const float decay = step * (A * LOG2E);
#pragma unroll
            for (int part = 0; part < 2; part++) {
                if (SHARED && part != (strip ^ __shfl_sync(~0u, threadIdx.x / 32, 0)) % 2) continue;
                float sum = decay;
#pragma unroll
                for (int d = 1; d < 32; d *= 2) {
                    const float next = part ? __shfl_down_sync(~0u, sum, d) : __shfl_up_sync(~0u, sum, d);
                    sum += (part ? lane + d < 32 : lane >= d) ? next : 0;
                }
                const float outside = part ? __shfl_down_sync(~0u, sum, 1) : __shfl_up_sync(~0u, sum, 1);
                const float kept = exp2_fast(lane != (part ? 31 : 0) ? outside : 0);
                to.sent[1 - part][column] = pack2<X_TYPE>(step * kept, 0);
                if (!part && lane == 31) to.total[strip] = sum;
                if constexpr (PAIRS) {
                    (part ? to.suffix : to.prefix)[column] = sum;
                    if (part) to.dt[column] = step;
                    if (part && D_TYPE < 3) to.D[column] = scalar<D_TYPE>(D[i]);
                }
            }
        }
    }
};

// Rows of 128 bytes whose 16-byte pieces are exchanged, so that those of 8 rows in one place lie in different banks.
// COLUMNS elements a row are filled, with zeros where `from` has no such row or column; it has them all if it is WHOLE
template <int ROWS, int COLUMNS, bool WHOLE>
INLINE void load_tile(char *tile, const char *from, i64 stride, int rows, int columns) {
    constexpr int PIECES = COLUMNS / 8, EACH = ROUND_UP(ROWS * PIECES, THREADS), STEP = THREADS / PIECES;
    if constexpr (THREADS % (8 * PIECES) == 0) {
        const int row = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
        char *const to = tile + row * ROW + ((piece ^ row % 8) << 4);
        const char *const at = from + row * stride + piece * 16;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            if (ROWS % STEP && row + i * STEP >= ROWS) break;
            const bool inside = WHOLE || (row + i * STEP < rows && piece * 8 < columns);
            copy_async_16(to + i * STEP * ROW, inside ? at + i * STEP * stride : from, inside);
        }
    } else {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int at = threadIdx.x + i * THREADS, row = at / PIECES, piece = at % PIECES;
            if (ROWS * PIECES % THREADS && at >= ROWS * PIECES) break;
            const bool inside = WHOLE || (row < rows && piece * 8 < columns);
            copy_async_16(
                tile + row * ROW + ((piece ^ row % 8) << 4), from + (inside ? row * stride + piece * 16 : 0), inside
            );
        }
    }
}

template <int ROWS> INLINE void load_panels(char *tile, const char *from, i64 stride, int rows, int columns) {
#pragma unroll
    for (int i = 0; i < PANELS; i++)
        load_tile<ROWS, (N < SLICE ? N : SLICE), false>(
            tile + i * ROWS * ROW, from + i * ROW, stride, rows, columns - i * SLICE
        );
}

// Where ldmatrix finds a lane's row of four 8 x 8 matrices at a 16 x 16 corner of a tile: lower rows second, or right
// columns second. The corner's column is added by ^ (bytes)
INLINE int lane_rows_first() {
    const int lane = threadIdx.x % 32;
    return lane % 16 * ROW + ((lane / 16 ^ lane % 8) << 4);
}
INLINE int lane_columns_first() {
    const int lane = threadIdx.x % 32;
    return (lane % 8 + lane / 16 * 8) * ROW + ((lane / 8 % 2 ^ lane % 8) << 4);
}

// c (16 x WIDTH) += a (16 x 16) times 16 rows of a tile, for COUNT a at once; a is in use until it is freed
template <int COUNT, bool ADD>
INLINE void multiply(float (*c)[WIDTH / 8][4], const unsigned (*a)[4], const char *rows, int lane_offset) {
#if TENSOR_ASYNC
    tensor_begin();
#pragma unroll
    for (int m = 0; m < COUNT; m++) tensor_64x64x16<X_TYPE, ADD>(c[m], a[m], rows);
    tensor_commit();
#else
#pragma unroll
    for (int i = 0; i < WIDTH / 16; i++) {
        unsigned b[4];
        ldmatrix_x4_trans(b, rows + (lane_offset ^ i * 32));
#pragma unroll
        for (int m = 0; m < COUNT; m++) {
            mma_16x8x16<X_TYPE>(c[m][2 * i], a[m], b);
            mma_16x8x16<X_TYPE>(c[m][2 * i + 1], a[m], b + 2);
        }
    }
#endif
}

// What all products but the so many youngest take has been read
template <int YOUNGEST> INLINE void free_weights() {
#if TENSOR_ASYNC
    tensor_wait<YOUNGEST>();
#endif
}

template <int COUNT> INLINE void finish(float (*c)[WIDTH / 8][4]) {
#if TENSOR_ASYNC
    tensor_wait<0>();
    for (int m = 0; m < COUNT; m++) tensor_hold(c[m]);
#endif
}

// Copies of this thread have arrived, then those of all
INLINE void meet_copies() {
    copy_async_wait<0>();
#if TENSOR_ASYNC
    tensor_publish();
#endif
    meet_warps();
}

// Rows g and g + 8 of a warp's 16 x WIDTH to memory: neighbouring lanes exchange halves, so that 4 lanes fill 32 bytes
INLINE void store_rows(char *to, i64 stride, const float (*c)[4], int rows, int columns) {
    const int q = threadIdx.x % 4, g = threadIdx.x % 32 / 4, first = (q & 1) * 8 + q / 2 * 4;
    const bool odd = q & 1;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        char *const at = to + (g + 8 * half) * stride + first * 2;
        const bool inside = g + 8 * half < rows;
#pragma unroll
        for (int i = 0; i < WIDTH / 16; i++) {
            const unsigned left = pack2<X_TYPE>(c[2 * i][2 * half], c[2 * i][2 * half + 1]);
            const unsigned right = pack2<X_TYPE>(c[2 * i + 1][2 * half], c[2 * i + 1][2 * half + 1]);
            const unsigned other = __shfl_xor_sync(~0u, odd ? left : right, 1);
            const uint2 v = odd ? make_uint2(other, right) : make_uint2(left, other);
            if (!inside || first + i * 16 >= columns) continue;
            *(uint2 *)(at + i * 32) = v;
        }
    }
}

// The same through 8 rows of shared memory, 128 bytes of a row at once
INLINE void store_staged(char *to, i64 stride, const float (*c)[4], int rows, int columns, char *stage) {
    constexpr int PIECES = WIDTH / 8;
    const int lane = threadIdx.x % 32, q = lane % 4, g = lane / 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (half) __syncwarp();
#pragma unroll
        for (int i = 0; i < PIECES; i++)
            *(unsigned *)(stage + g * ROW + ((i ^ g) << 4) + q * 4) = pack2<X_TYPE>(c[i][2 * half], c[i][2 * half + 1]);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < ROUND_UP(PIECES, 4); i++) {
            const int at = lane + i * 32, row = at / PIECES, piece = at % PIECES;
            if ((8 * PIECES % 32 && at >= 8 * PIECES) || row + 8 * half >= rows || piece * 8 >= columns) continue;
            __stcs(
                (uint4 *)(to + (row + 8 * half) * stride + piece * 16),
                *(const uint4 *)(stage + row * ROW + ((piece ^ row) << 4))
            );
        }
    }
    __syncwarp();
}

// Strips between the lane's strip and this one, a bit each; of lane STRIPS those left of it, of STRIPS + 1 right of it
INLINE unsigned strips_between(int strip) {
    const int lane = threadIdx.x % 32, first = lane >= STRIPS ? 0 : min(lane, strip) + 1;
    const unsigned left = (1u << strip) - 1, right = ~0u << (strip + 1);
    return lane == STRIPS ? left : lane > STRIPS ? right : ((1u << max(lane, strip)) - 1) & ~0u << first;
}

// Decay over some strips
INLINE float decay_over(unsigned strips, const Sent &decays) {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < STRIPS; k++)
        if (strips & 1u << k) sum += decays.total[k];
    return exp2_fast(sum);
}

INLINE float4 four(const float *p) { return *(const float4 *)p; }

// A 16 x 16 fragment with its columns scaled, and its rows g and g + 8
INLINE void scale(unsigned to[4], const unsigned from[4], uint2 columns, unsigned row, unsigned row_8) {
    to[0] = multiply2<X_TYPE>(multiply2<X_TYPE>(from[0], columns.x), row);
    to[1] = multiply2<X_TYPE>(multiply2<X_TYPE>(from[1], columns.x), row_8);
    to[2] = multiply2<X_TYPE>(multiply2<X_TYPE>(from[2], columns.y), row);
    to[3] = multiply2<X_TYPE>(multiply2<X_TYPE>(from[3], columns.y), row_8);
}

// y of a chunk's rows, BLOCKS of 16 a warp
INLINE void outputs(const Call &call) {
    constexpr int ROWS = WARPS * BLOCKS * 16;
    constexpr int TOGETHER = TENSOR_ASYNC ? 2 * BLOCKS : 1;  // strips of warps that go together
    char *const tiles = dynamic_shared(), *const B_tile = tiles + (SLOTS - PANELS) * TILE_BYTES;
    char *const C_tile = tiles + SLOTS * TILE_BYTES, *const entering = C_tile + PANELS * ROWS * ROW;
    char *const stage = entering + 2 * STATES * STATE_BYTES + threadIdx.x / 32 * (8 * ROW);
    char *const own_scores = entering + 2 * STATES * STATE_BYTES + WARPS * 8 * ROW + threadIdx.x * 16;
    Decays *const decays = (Decays *)(entering + 2 * STATES * STATE_BYTES + WARPS * 8 * ROW + BLOCKS * THREADS * 32);
    const Place place(call);
    const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0), g = lane / 4, q = lane % 4;
    const int own_row = warp * BLOCKS * 16, row = place.rest * ROWS + own_row;  // the warp's first
    const int strip = row / 32, part = row / 16 % 2, jobs = call.heads * SLICES;
    const int rows_first = lane_rows_first(), columns_first = lane_columns_first();
    const unsigned between_strips = strips_between(strip);
    // Strips in the order in which a warp takes them: from its own on, or the first of those that go together
    const int first = strip & ~(TOGETHER - 1);
    const bool alive = ALL || first * 32 < place.tokens;

    const auto load = [&](int job, int slot) {
        const int h = job / SLICES, p = (job - h * SLICES) * SLICE;
        load_tile<TOKENS, WIDTH, ALL>(
            tiles + slot * TILE_BYTES, place.at(call.x, call.x_view, h) + p * 2, call.x_view.token,
            place.tokens, call.p - p
        );
        copy_async_commit();
    };
    const auto load_states = [&](int job) {
#pragma unroll
        for (int s = 0; s < STATES; s++) {
            const int c = DIRECT ? s + (s >= place.c) : place.c, d = DIRECT ? s >= place.c : s;
            if (d >= DIRECTIONS) continue;
            const i64 at = ((place.b * call.chunks + c) * jobs + job) * DIRECTIONS + d;
            load_tile<N, WIDTH, true>(
                entering + (job % 2 * STATES + s) * STATE_BYTES, call.states + at * (N * WIDTH * 2), WIDTH * 2, N, WIDTH
            );
        }
    };

    load_panels<TOKENS>(B_tile, place.at(call.B, call.B_view, place.g), call.B_view.token, place.tokens, call.n);
    load_panels<ROWS>(
        C_tile, place.at(call.C, call.C_view, place.g) + place.rest * ROWS * call.C_view.token, call.C_view.token,
        place.tokens - place.rest * ROWS, call.n
    );
    copy_async_commit();
    const int last = place.end - 1;  // begins with the last job: what `sums` read last may still be in the L2 cache
    const auto next = [&](int k) { return max(last - k, place.begin); };
    constexpr int FREE = SLOTS - PANELS;  // slots that B does not take
#pragma unroll
    for (int k = 0; k < FREE; k++)
        if (k < AHEAD) load(next(k), k);
    Fetched<true> fetched, second;
    fetched.fetch(call, place, last / SLICES);
    if (AHEAD == 2) second.fetch(call, place, next(1) / SLICES);
    copy_async_wait<FREE < AHEAD ? FREE : AHEAD>();
    __syncthreads();

    // Of strip (first + i) % STRIPS at max(i - 1, 0), its 16 columns each, the warp's 16 rows each. The warp's own strip,
    // one of the first TOGETHER, is in shared memory
    unsigned scores[STRIPS > 1 ? STRIPS - 1 : 1][2][BLOCKS][4];
    {
        unsigned c[STEPS][BLOCKS][4];
#pragma unroll
        for (int n = 0; n < STEPS; n++)
#pragma unroll
            for (int m = 0; m < BLOCKS; m++)
                ldmatrix_x4(c[n][m], C_tile + (n / 4 * ROWS + own_row + m * 16) * ROW + (rows_first ^ n % 4 * 32));
#pragma unroll
        for (int i = 0; i < STRIPS; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const char *rows = B_tile + ((first + i & STRIPS - 1) * 32 + half * 16) * ROW;
                float sum[BLOCKS][2][4] = {};
#pragma unroll
                for (int n = 0; n < STEPS; n++) {
                    unsigned b[4];
                    ldmatrix_x4(b, rows + n / 4 * TILE_BYTES + (columns_first ^ n % 4 * 32));
#pragma unroll
                    for (int m = 0; m < BLOCKS; m++)
                        mma_16x8x16<X_TYPE>(sum[m][0], c[n][m], b), mma_16x8x16<X_TYPE>(sum[m][1], c[n][m], b + 2);
                }
#pragma unroll
                for (int m = 0; m < BLOCKS; m++) {
                    unsigned v[4];
#pragma unroll
                    for (int k = 0; k < 4; k++) {
                        const float *const pair = sum[m][k / 2] + k % 2 * 2;
                        v[k] = pack2<X_TYPE>(pair[0], pair[1]);
                    }
                    const bool itself = TOGETHER == 1 ? i == 0 : i < TOGETHER && first + i == strip;
                    if (itself)
                        *(uint4 *)(own_scores + (half * BLOCKS + m) * (THREADS * 16)) =
                            make_uint4(v[0], v[1], v[2], v[3]);
                    if (TOGETHER == 1 ? i == 0 : i == 1 && itself) continue;
#pragma unroll
                    for (int k = 0; k < 4; k++) scores[i ? i - 1 : 0][half][m][k] = v[k];
                }
            }
    }
    static_assert(TOGETHER <= 2, "one other strip goes with the warp's own");
    if (FREE < AHEAD) __syncthreads();
#pragma unroll
    for (int k = FREE; k < AHEAD; k++) load(next(k), k);
    if (STATES) {
        load_states(last);
        copy_async_commit();
    }
    const auto fetch_total = [&](int job) {
        return DIRECT && lane <= STATES
                   ? call.totals[(place.b * call.chunks + lane) * call.heads + job / SLICES] : 0.f;
    };
    float chunk_total = fetch_total(last), next_total = fetch_total(next(1));
    fetched.store(place, decays[0]);
    if (AHEAD == 2) second.store(place, decays[1]);
    fetched.fetch(call, place, next(AHEAD) / SLICES);
    if (SLOTS == 3) meet_copies();

    // Once a job all warps meet, half of them at its beginning and half in its middle: those of one scheduler are busy
    // with different things
    const bool late = SLOTS == 3 && warp >= WARPS / 2;
    int slot = 0, free_slot = AHEAD;
    for (int job = last; job >= place.begin; job--) {
        const auto meet = [&] {
            meet_copies();
            if (job > place.begin) load_states(job - 1);
            if (job - AHEAD >= place.begin) load(job - AHEAD, free_slot);
            else copy_async_commit();
        };
        const auto prepare = [&] {
            fetched.store(place, decays[free_slot]);
            fetched.fetch(call, place, max(job - AHEAD - 1, place.begin) / SLICES);
            chunk_total = next_total, next_total = fetch_total(max(job - 2, place.begin));
        };
        if (!late) meet();
        if (!alive) {
            if (late) meet();
            prepare();
            slot = slot + 1 == SLOTS ? 0 : slot + 1, free_slot = free_slot + 1 == SLOTS ? 0 : free_slot + 1;
            continue;
        }
        const char *const tile = tiles + slot * TILE_BYTES;
        const Decays &own = decays[slot];
        static_assert(SLOTS == 2 || WARPS % 8 == 0, "four warps of TENSOR_ASYNC go together");
        const float gate = decay_over(between_strips, own);
        float from_left[2 * BLOCKS], from_right[2 * BLOCKS];  // rows of 8 tokens each
        float out[BLOCKS][WIDTH / 8][4];
#if !TENSOR_ASYNC
#pragma unroll
        for (int i = 0; i < BLOCKS * WIDTH / 2; i++) out[i / (WIDTH / 2)][i / 4 % (WIDTH / 8)][i % 4] = 0;
#endif

        float left[2 * BLOCKS], right[2 * BLOCKS];
        const auto place_of = [&](int k) { return strip * 32 + column_place(part * 16 + k * 8 + g); };
#pragma unroll
        for (int k = 0; k < 2 * BLOCKS; k++) {
            left[k] = own.prefix[place_of(k)], right[k] = own.suffix[place_of(k)];
            from_left[k] = exp2_fast(left[k]), from_right[k] = BOTH ? exp2_fast(right[k]) : 0;
        }
        unsigned weight[2][BLOCKS][4];  // of 16 columns each: of 16 rows each
        // 16 x 16 pairs of the warp's own strip: rows after columns (1), before them (-1), the same (0)
        const auto weigh_pairs = [&](int of_all, unsigned to[4], const unsigned from[4], int m, int half) {
            const int columns = strip * 32 + half * 16 + q * 4;
            const float4 prefixes = four(own.prefix + columns), steps = four(own.dt + columns);
            const float4 suffixes = four(own.suffix + columns);
            const float l[4] = {prefixes.x, prefixes.y, prefixes.z, prefixes.w};
            const float r[4] = {suffixes.x, suffixes.y, suffixes.z, suffixes.w};
            const float dt[4] = {steps.x, steps.y, steps.z, steps.w};
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const int row = 2 * m + k % 2, order = of_all ? of_all : k % 2 - k / 2;
                float w[2];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int at = k / 2 * 2 + e;
                    const float forward = left[row] - l[at];
                    const float backward = BOTH ? right[row] - r[at] : __int_as_float(0xff800000);
                    w[e] = exp2_fast((order ? order > 0 : g >= 2 * q + e) ? forward : backward) * dt[at];
                }
                const float2 score = unpack2<X_TYPE>(from[k]);
                w[0] *= score.x, w[1] *= score.y;
                if (order == 0) {
                    const float D = D_TYPE < 3 ? own.D[place_of(row)] : 0;
                    if (g == 2 * q) w[0] = w[0] * call.diagonal + D;
                    if (g == 2 * q + 1) w[1] = w[1] * call.diagonal + D;
                }
                to[k] = pack2<X_TYPE>(w[0], w[1]);
            }
        };
        const auto weigh_own = [&](int half) {
#pragma unroll
            for (int m = 0; m < BLOCKS; m++) {
                const uint4 v = *(const uint4 *)(own_scores + (half * BLOCKS + m) * (THREADS * 16));
                const unsigned from[4] = {v.x, v.y, v.z, v.w};
                const int order = (BLOCKS == 2 ? m : part) - half;
                if (order == 0) weigh_pairs(0, weight[half][m], from, m, half);
                else if (order > 0) weigh_pairs(1, weight[half][m], from, m, half);
                else weigh_pairs(-1, weight[half][m], from, m, half);
            }
        };

        // strips of the chunk
#pragma unroll
        for (int i = 0; i < STRIPS; i++) {
            if (i == STRIPS / 2 && late) meet();
            const int other = first + i & STRIPS - 1;
            const bool before = other < strip, itself = TOGETHER == 1 ? i == 0 : i < TOGETHER && other == strip;
            const float between = __shfl_sync(~0u, gate, other);
            if ((!BOTH && other >= first + TOGETHER) || (!ALL && i && other * 32 >= place.tokens))
                continue;
            unsigned received[2 * BLOCKS];
#pragma unroll
            for (int k = 0; k < 2 * BLOCKS; k++) {
                const float decay = (before ? from_left[k] : from_right[k]) * between;
                received[k] = pack2<X_TYPE>(decay, decay);
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                free_weights<1>();
                if (itself) {
                    weigh_own(half);
                } else {
                    const uint2 sent = *(const uint2 *)(own.sent[BOTH && !before] + other * 32 + half * 16 + q * 4);
#pragma unroll
                    for (int m = 0; m < BLOCKS; m++)
                        scale(
                            weight[half][m], scores[i ? i - 1 : 0][half][m], sent, received[2 * m], received[2 * m + 1]
                        );
                }
                const char *const rows = tile + (other * 32 + half * 16) * ROW;
                if (i || half) multiply<BLOCKS, true>(out, weight[half], rows, rows_first);
                else multiply<BLOCKS, false>(out, weight[half], rows, rows_first);
            }
        }

        // other chunks
        if (STATES) {
            const char *const state = entering + job % 2 * STATES * STATE_BYTES;
            const float outside[2] = {__shfl_sync(~0u, gate, STRIPS), __shfl_sync(~0u, gate, STRIPS + 1)};
#pragma unroll(DIRECT ? 1 : DIRECTIONS)
            for (int s = 0; s < STATES; s++) {
                const int c = s + (s >= place.c);
                const bool right = DIRECT ? s >= place.c : s;
                if (right && !BOTH) continue;
                float gap = 0;
#pragma unroll
                for (int k = 0; DIRECT && k <= STATES; k++) {
                    const float total = __shfl_sync(~0u, chunk_total, k);
                    gap += k > min(c, place.c) && k < max(c, place.c) ? total : 0;
                }
                const float between = outside[right] * exp2_fast(gap);
                unsigned received[2 * BLOCKS];
#pragma unroll
                for (int k = 0; k < 2 * BLOCKS; k++) {
                    const float decay = (right ? from_right[k] : from_left[k]) * between;
                    received[k] = pack2<X_TYPE>(decay, decay);
                }
#pragma unroll
                for (int n = 0; n < STEPS; n++) {
                    unsigned c[BLOCKS][4], (*const turn)[4] = weight[n % 2];
#pragma unroll
                    for (int m = 0; m < BLOCKS; m++)
                        ldmatrix_x4(
                            c[m], C_tile + (n / 4 * ROWS + own_row + m * 16) * ROW + (rows_first ^ n % 4 * 32)
                        );
                    free_weights<1 - STEPS % 2>();  // halves take turns if they are even
#pragma unroll
                    for (int m = 0; m < BLOCKS; m++)
#pragma unroll
                        for (int k = 0; k < 4; k++)
                            turn[m][k] = multiply2<X_TYPE>(c[m][k], received[2 * m + k % 2]);
                    multiply<BLOCKS, true>(out, turn, state + s * STATE_BYTES + n * 16 * ROW, rows_first);
                }
            }
        }

        prepare();
        slot = slot + 1 == SLOTS ? 0 : slot + 1, free_slot = free_slot + 1 == SLOTS ? 0 : free_slot + 1;
        finish<BLOCKS>(out);
        const int h = job / SLICES, p = (job - h * SLICES) * SLICE;
        const i64 stride = (i64)call.heads * call.p * 2, token = place.first + row;
        char *const y = call.y + (place.b * call.length + token) * stride + ((i64)h * call.p + p) * 2;
#pragma unroll
        for (int m = 0; m < BLOCKS; m++)
            store_staged(
                y + m * 16 * stride, stride, out[m], ALL ? 16 : place.tokens - row - m * 16,
                ALL ? WIDTH : call.p - p, stage
            );
    }
}

// What a chunk alone sends over its borders, and its decay: a warp's 16 states of N, in one direction
INLINE void sums(const Call &call) {
    char *const tiles = dynamic_shared(), *const B_tile = tiles + (PANELS == 1 ? TILE_BYTES : 0);
    Sent *const decays = (Sent *)(tiles + 2 * TILE_BYTES);
    const Place place(call);
    const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0), q = lane % 4;
    const int d = warp / STEPS, own_state = warp % STEPS, jobs = call.heads * SLICES, rows_first = lane_rows_first();
    const bool received = place.c != (d ? 0 : call.chunks - 1) || call.last;  // by another chunk or by the caller
    const unsigned strips = d ? (1u << lane) - 1 : ~0u << lane << 1;          // between the lane's strip and the border

    const auto load = [&](int job, int buffer) {
        const int h = job / SLICES, p = (job - h * SLICES) * SLICE;
        load_tile<TOKENS, WIDTH, ALL>(
            tiles + buffer * TILE_BYTES, place.at(call.x, call.x_view, h) + p * 2, call.x_view.token,
            place.tokens, call.p - p
        );
        copy_async_commit();
    };

    load_panels<TOKENS>(B_tile, place.at(call.B, call.B_view, place.g), call.B_view.token, place.tokens, call.n);
    copy_async_commit();
    if (PANELS == 1) load(place.begin, 0);
    Fetched<false> fetched;
    fetched.fetch(call, place, place.begin / SLICES);
    copy_async_wait<PANELS == 1 ? 1 : 0>();
    __syncthreads();
    unsigned keys[STRIPS * 2][4];
#pragma unroll
    for (int i = 0; i < STRIPS * 2; i++)
        ldmatrix_x4_trans(
            keys[i], B_tile + own_state / 4 * TILE_BYTES + i * 16 * ROW + (lane_columns_first() ^ own_state % 4 * 32)
        );
    if (PANELS > 1) {
        __syncthreads();
        load(place.begin, 0);
    }
    fetched.store(place, decays[0]);
    fetched.fetch(call, place, min(place.begin + 1, place.end - 1) / SLICES);

    for (int job = place.begin, buffer = 0; job < place.end; job++, buffer ^= 1) {
        meet_copies();
        if (job + 1 < place.end) load(job + 1, buffer ^ 1);
        fetched.store(place, decays[buffer ^ 1]);
        fetched.fetch(call, place, min(job + 2, place.end - 1) / SLICES);
        const char *const tile = tiles + buffer * TILE_BYTES;
        const Sent &own = decays[buffer];
        if (threadIdx.x == 0 && job % SLICES == 0) {
            float total = 0;
#pragma unroll
            for (int k = 0; k < STRIPS; k++) total += own.total[k];
            call.totals[(place.b * call.chunks + place.c) * call.heads + job / SLICES] = total;
        }
        if (!received && (!TENSOR_ASYNC || STEPS % 4 == 0)) continue;  // four warps of TENSOR_ASYNC go together
        const float gates = decay_over(strips, own);
        float state[1][WIDTH / 8][4] = {};
        unsigned weight[2][1][4];
#pragma unroll
        for (int i = 0; i < STRIPS; i++) {
            if (!ALL && i * 32 >= place.tokens) break;
            const float gate = __shfl_sync(~0u, gates, i);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint2 sent = *(const uint2 *)(own.sent[d] + i * 32 + half * 16 + q * 4);
                const float2 left = unpack2<X_TYPE>(sent.x), right = unpack2<X_TYPE>(sent.y);
                const unsigned factors[2] = {
                    pack2<X_TYPE>(left.x * gate, left.y * gate), pack2<X_TYPE>(right.x * gate, right.y * gate)
                };
                free_weights<1>();
#pragma unroll
                for (int k = 0; k < 4; k++)
                    weight[half][0][k] = multiply2<X_TYPE>(keys[2 * i + half][k], factors[k / 2]);
                multiply<1, true>(state, weight[half], tile + (i * 32 + half * 16) * ROW, rows_first);
            }
        }
        finish<1>(state);
        const i64 at = ((place.b * call.chunks + place.c) * jobs + job) * DIRECTIONS + d;
        if (received)
            store_rows(call.states + (at * N + own_state * 16) * (WIDTH * 2), WIDTH * 2, state[0], 16, WIDTH);
    }
}

// States of each chunk alone become those that enter it; those that leave the last one go to `last`. 8 columns a thread
INLINE void chain(const Call &call) {
    constexpr int AT_ONCE = 8, PIECES = WIDTH / 8;
    const int jobs = call.heads * SLICES;
    i64 i = (i64)blockIdx.x * THREADS + threadIdx.x;
    if (i >= call.batch * jobs * (DIRECTIONS * N * PIECES)) return;
    const int e = (int)(i % (N * PIECES));
    i /= N * PIECES;
    const int d = (int)(i % DIRECTIONS), job = (int)(i / DIRECTIONS % jobs);
    const i64 b = i / DIRECTIONS / jobs, step = (i64)jobs * DIRECTIONS * N * PIECES;
    const int h = job / SLICES, p = (job - h * SLICES) * SLICE + e % PIECES * 8, n = e / PIECES;
    uint4 *states = (uint4 *)call.states + (b * call.chunks * jobs * DIRECTIONS + job * DIRECTIONS + d) * (N * PIECES) + e;
    const float *totals = call.totals + b * call.chunks * call.heads + h;
    const i64 outside = (((b * DIRECTIONS + d) * call.heads + h) * call.p + p) * call.n + n;
    float state[8];
#pragma unroll
    for (int k = 0; k < 8; k++)
        state[k] = call.initial && n < call.n && p + k < call.p ? call.initial[outside + (i64)k * call.n] : 0;
    for (int first = 0; first < call.chunks; first += AT_ONCE) {
        uint4 own[AT_ONCE];
        float decay[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            if (first + j >= call.chunks) break;
            const int c = d ? call.chunks - 1 - first - j : first + j;
            own[j] = states[c * step], decay[j] = totals[(i64)c * call.heads];
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            if (first + j >= call.chunks) break;
            const int c = d ? call.chunks - 1 - first - j : first + j;
            states[c * step] = make_uint4(
                pack2<X_TYPE>(state[0], state[1]), pack2<X_TYPE>(state[2], state[3]), pack2<X_TYPE>(state[4], state[5]),
                pack2<X_TYPE>(state[6], state[7])
            );
            const unsigned pairs[4] = {own[j].x, own[j].y, own[j].z, own[j].w};
            const float kept = exp2_fast(decay[j]);
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const float2 v = unpack2<X_TYPE>(pairs[k]);
                state[2 * k] = state[2 * k] * kept + v.x, state[2 * k + 1] = state[2 * k + 1] * kept + v.y;
            }
        }
    }
    if (call.last)
#pragma unroll
        for (int k = 0; k < 8; k++)
            if (n < call.n && p + k < call.p) call.last[outside + (i64)k * call.n] = state[k];
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) KERNEL(const Call call) { ENTRY(call); }
