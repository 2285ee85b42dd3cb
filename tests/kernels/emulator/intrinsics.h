// The functions of kernels/intrinsics.cuh on a CPU, from the PTX ISA. Asynchronous copies land where they are waited
// for; if fibers run in descending order, at once: a block that relies on neither gives the same bits.

#define INLINE inline

typedef long long i64;

template <class Target> inline Target *whole(Target *p) { return p; }
inline i64 offset(int row, int bytes) { return (i64)row * bytes; }

inline float flush(float v) { return fabsf(v) < 0x1p-126f ? copysignf(0.f, v) : v; }
inline float exp2_fast(float v) { return flush(exp2f(flush(v))); }
inline float reciprocal_fast(float v) { return flush(1.f / flush(v)); }

inline float half_to_float(unsigned short bits) {
    const unsigned sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, mantissa = bits & 0x3ff;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | mantissa << 13);
    const float v = exponent ? ldexpf(mantissa | 0x400, (int)exponent - 25) : ldexpf(mantissa, -24);
    return sign ? -v : v;
}

inline unsigned short float_to_half(float f) {
    if (f != f) return 0x7fff;
    const unsigned sign = __float_as_uint(f) >> 16 & 0x8000;
    const float v = fabsf(f);
    if (v >= 65520.f) return sign | 0x7c00;
    if (v < 0x1p-14f) return sign | (unsigned)nearbyintf(v * 0x1p24f);  // up to 0x400, the smallest normal number
    const int exponent = ilogbf(v);
    return sign | (unsigned)((exponent + 14) * 1024 + nearbyintf(ldexpf(v, 10 - exponent)));
}

inline unsigned short float_to_bfloat16(float f) {
    const unsigned u = __float_as_uint(f);
    return f != f ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}

template <int TYPE> inline float from_16(unsigned bits) {
    static_assert(TYPE == 1 || TYPE == 2);
    return TYPE == 1 ? __uint_as_float(bits << 16) : half_to_float(bits);
}
template <int TYPE> inline unsigned to_16(float f) { return TYPE == 1 ? float_to_bfloat16(f) : float_to_half(f); }
template <int TYPE> inline unsigned pack2(float low, float high) { return to_16<TYPE>(low) | to_16<TYPE>(high) << 16; }
template <int TYPE> inline float2 unpack2(unsigned pair) {
    return {from_16<TYPE>(pair & 0xffff), from_16<TYPE>(pair >> 16)};
}

inline char *dynamic_shared() { return emulator::dynamic_begin; }

namespace emulator {

struct Fragments { float *c, a[8], b[4]; };

// c += a b, (16, DEPTH) and (DEPTH, 8). at(i, &row, &column): where element i of a lane's a or b lies
template <int DEPTH, class AT_A, class AT_B> void multiply(void **data, AT_A at_a, AT_B at_b) {
    float a[16][DEPTH], b[DEPTH][8];
    for (int lane = 0; lane < 32; lane++) {
        const Fragments &of = *(Fragments *)data[lane];
        int row, column;
        for (int i = 0; i < DEPTH / 2; i++) at_a(lane, i, row, column), a[row][column] = of.a[i];
        for (int i = 0; i < DEPTH / 4; i++) at_b(lane, i, row, column), b[row][column] = of.b[i];
    }
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            double sum = ((Fragments *)data[lane])->c[i];
            for (int k = 0; k < DEPTH; k++) sum += (double)a[row][k] * b[k][column];
            ((Fragments *)data[lane])->c[i] = (float)sum;
        }
}

inline float cut_to_tf32(float v) { return __uint_as_float(__float_as_uint(v) & 0xffffe000); }

struct Rows { unsigned *r; const void *row; };

template <int MATRICES, bool TRANSPOSED> void load_matrices(unsigned *r, const void *row, int line) {
    if (threadIdx.x % 32 < 8 * MATRICES) check_shared(row, 16, line);
    Rows mine{r, row};
    collective(~0u, line, &mine, [](void **data, unsigned) {
        for (int lane = 0; lane < 32; lane++)
            for (int m = 0; m < MATRICES; m++) {
                unsigned short pair[2];
                for (int i = 0; i < 2; i++) {
                    const int row = TRANSPOSED ? lane % 4 * 2 + i : lane / 4;
                    const int column = TRANSPOSED ? lane / 4 : lane % 4 * 2 + i;
                    pair[i] = ((const unsigned short *)((Rows *)data[m * 8 + row])->row)[column];
                }
                ((Rows *)data[lane])->r[m] = pair[0] | (unsigned)pair[1] << 16;
            }
    });
}

}  // namespace emulator

inline void mma_16x8x8(float *c, const float *a, float b0, float b1, AT) {
    using emulator::cut_to_tf32;
    emulator::Fragments mine{c, {}, {cut_to_tf32(b0), cut_to_tf32(b1)}};
    for (int i = 0; i < 4; i++) mine.a[i] = cut_to_tf32(a[i]);
    emulator::collective(~0u, line, &mine, [](void **data, unsigned) {
        emulator::multiply<8>(
            data, [](int lane, int i, int &row, int &k) { row = lane / 4 + i % 2 * 8, k = lane % 4 + i / 2 * 4; },
            [](int lane, int i, int &k, int &column) { k = lane % 4 + i * 4, column = lane / 4; });
    });
}

template <int TYPE> inline void mma_16x8x16(float c[4], const unsigned a[4], const unsigned b[2], AT) {
    emulator::Fragments mine{c, {}, {}};
    for (int i = 0; i < 8; i++) mine.a[i] = from_16<TYPE>(a[i / 2] >> i % 2 * 16 & 0xffff);
    for (int i = 0; i < 4; i++) mine.b[i] = from_16<TYPE>(b[i / 2] >> i % 2 * 16 & 0xffff);
    emulator::collective(~0u, line, &mine, [](void **data, unsigned) {
        emulator::multiply<16>(
            data,
            [](int lane, int i, int &row, int &k) {
                row = lane / 4 + i / 2 % 2 * 8, k = lane % 4 * 2 + i % 2 + i / 4 * 8;
            },
            [](int lane, int i, int &k, int &column) { k = lane % 4 * 2 + i % 2 + i / 2 * 8, column = lane / 4; });
    });
}

inline void ldmatrix_x4(unsigned r[4], const void *row, AT) { emulator::load_matrices<4, false>(r, row, line); }
inline void ldmatrix_x4_trans(unsigned r[4], const void *row, AT) { emulator::load_matrices<4, true>(r, row, line); }
inline void ldmatrix_x2(unsigned r[2], const void *row, AT) { emulator::load_matrices<2, false>(r, row, line); }
inline void ldmatrix_x2_trans(unsigned r[2], const void *row, AT) { emulator::load_matrices<2, true>(r, row, line); }

inline void copy_async_16(void *shared, const void *global, bool inside, AT) {
    emulator::check_shared(shared, 16, line);
    if ((uintptr_t)global % 16) emulator::fail("line %d: copies from %p, not a multiple of 16", line, global);
    emulator::send((char *)shared, (const char *)global, inside);
}

inline void copy_async_commit() { emulator::fibers[emulator::current].group++; }
template <int YOUNGEST> inline void copy_async_wait() { emulator::receive(YOUNGEST); }
