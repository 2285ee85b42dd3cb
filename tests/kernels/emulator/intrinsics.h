// The functions of kernels/intrinsics.cuh on a CPU, from the PTX ISA. Asynchronous copies and products take place where
// they are waited for; if fibers run in descending order, at once: a block that relies on neither gives the same bits.

#define INLINE inline

typedef long long i64;

template <class Target> inline Target *whole(Target *p) { return p; }
inline unsigned opaque(unsigned v) { return v; }
inline i64 offset(int row, int bytes) { return (i64)row * bytes; }
inline const char *beyond(const char *p, int row, int bytes) { return p + (i64)row * bytes; }

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

template <int TYPE> inline unsigned multiply2(unsigned a, unsigned b) {
    const float2 v = unpack2<TYPE>(a), w = unpack2<TYPE>(b);
    return pack2<TYPE>(v.x * w.x, v.y * w.y);
}

inline void meet_warps() { emulator::barrier(true, 0); }
inline void pass_on(int id, int line = __builtin_LINE()) { emulator::pass_on(id, line); }
inline void take_over(int id, int line = __builtin_LINE()) { emulator::take_over(id, line); }

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

template <bool TRANSPOSED> void load_matrices(unsigned *r, const void *row, int line) {
    check_shared(row, 16, line);
    Rows mine{r, row};
    collective(~0u, line, &mine, [](void **data, unsigned) {
        for (int lane = 0; lane < 32; lane++)
            for (int m = 0; m < 4; m++) {
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

inline void ldmatrix_x4(unsigned r[4], const void *row, AT) { emulator::load_matrices<false>(r, row, line); }
inline void ldmatrix_x4_trans(unsigned r[4], const void *row, AT) { emulator::load_matrices<true>(r, row, line); }

inline void copy_async_16(void *shared, const void *global, bool inside, AT) {
    emulator::check_shared(shared, 16, line);
    if ((uintptr_t)global % 16) emulator::fail("line %d: copies from %p, not a multiple of 16", line, global);
    const emulator::Copy copy{(char *)shared, (const char *)global, inside};
    if (emulator::order == emulator::DESCENDING) emulator::land(copy);
    else emulator::fibers[emulator::current].copies.add(copy);
}

inline void copy_async_16_of_line(void *shared, const void *global, int line = __builtin_LINE()) {
    copy_async_16(shared, global, true, line);
}
inline void copy_async_commit() { emulator::fibers[emulator::current].copies.open++; }
template <int YOUNGEST> inline void copy_async_wait() {
    emulator::fibers[emulator::current].copies.wait(YOUNGEST, emulator::land);
}

namespace emulator {

inline unsigned seen_by_products(const char *at, int line) {
    check_shared(at, 2, line);
    const unsigned short *mark = mark_of(at);
    if (mark && *mark) fail("line %d: a product reads what thread %u has copied but not published", line, *mark - 1);
    return *(const unsigned short *)at;
}

// Four warps' product, each warp's part on its own: 8 BLOCKS columns of b, in rows of 128 bytes or TRANSPOSED
template <int TYPE, bool ADD, int BLOCKS, bool TRANSPOSED> void multiply_from_shared(const Product &product) {
    const unsigned lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    for (unsigned i = 0; i < BLOCKS; i++) {
        unsigned b[2] = {};
        for (unsigned e = 0; e < 4; e++) {
            const unsigned k = e / 2 * 8 + 2 * q + e % 2, n = i * 8 + g;
            const uintptr_t place = (uintptr_t)product.from + (TRANSPOSED ? n * 128 + k * 2 : k * 128 + n * 2);
            const char *at = (const char *)(place ^ (place >> 7 & 7) << 4);
            b[e / 2] |= seen_by_products(at, product.line) << e % 2 * 16;
        }
        for (int e = 0; !ADD && e < 4; e++) product.c[i][e] = 0;
        mma_16x8x16<TYPE>(product.c[i], product.a, b, product.line);
    }
}

// Takes place where it is waited for, with the a and c of then; if fibers run in descending order, at once
inline void start(const Product &product, uintptr_t aligned) {
    if ((uintptr_t)product.from & aligned) fail("line %d: no product with a tile at %p", product.line, product.from);
    if (current / 128 * 128 + 128 > threads) fail("line %d: a product of fewer than four warps", product.line);
    Groups<Product> &products = fibers[current].products;
    if (order != DESCENDING) return products.add(product);
    products.total++;
    product.run(product);
}

}  // namespace emulator

template <int TYPE, bool ADD> inline void tensor_64x64x16(float (*c)[4], const unsigned a[4], const char *rows, AT) {
    emulator::start({emulator::multiply_from_shared<TYPE, ADD, 8, false>, c, a, rows, line}, 1023);
}
template <int TYPE, bool ADD>
inline void tensor_64x64x16_transposed(float (*c)[4], const unsigned a[4], const char *columns, AT) {
    emulator::start({emulator::multiply_from_shared<TYPE, ADD, 8, true>, c, a, columns, line}, 1023 & ~96);
}
template <int TYPE, bool ADD>
inline void tensor_64x32x16_transposed(float (*c)[4], const unsigned a[4], const char *columns, AT) {
    emulator::start({emulator::multiply_from_shared<TYPE, ADD, 4, true>, c, a, columns, line}, 1023 & ~96);
}

inline void tensor_begin() {}
inline void tensor_commit() { emulator::fibers[emulator::current].products.open++; }
template <int YOUNGEST> inline void tensor_wait() {
    emulator::fibers[emulator::current].products.wait(YOUNGEST, [](const emulator::Product &p) { p.run(p); });
}
inline void tensor_hold(float (*)[4]) {}
inline void tensor_hold(float &) {}
inline void tensor_publish() {
    for (size_t i = 0; i < emulator::dynamic_size / 16; i++)
        if (emulator::unpublished[i] == emulator::current + 1) emulator::unpublished[i] = 0;
}
