/* Words of two int16 halves, four codes to a word, and the DSP instructions on them, each with the same result in plain C. */
#ifndef PLANISH_DSP_HALVES_H
#define PLANISH_DSP_HALVES_H

#include <stdint.h>

#if defined(__ARM_FEATURE_DSP) && defined(__ARM_FP)
#include <arm_acle.h>
#endif

/* For code that runs seldom and must stay small: a loop that is not unrolled, a function that is not copied into its callers. */
#if defined(__clang__)
#define PLANISH_ROLLED _Pragma("clang loop unroll(disable)")
#elif defined(__GNUC__)
#define PLANISH_ROLLED _Pragma("GCC unroll 1")
#else
#define PLANISH_ROLLED
#endif
#define PLANISH_APART __attribute__((noinline))
/* and one that must be copied, since constants among its arguments make it shorter */
#define PLANISH_COPIED inline __attribute__((always_inline))

/* four codes; p is a multiple of 4 */
static inline uint32_t planish_load_word(const int8_t *p)
{
    uint32_t word;
    __builtin_memcpy(&word, __builtin_assume_aligned(p, 4), 4);
    return word;
}

static inline void planish_store_word(int8_t *p, uint32_t word)
{
    __builtin_memcpy(__builtin_assume_aligned(p, 4), &word, 4);
}

/* (low half of a, low half of b) */
static inline uint32_t planish_low_halves(uint32_t a, uint32_t b)
{
    return (a & 0xFFFFu) | b << 16;
}

/* (high half of a, high half of b) */
static inline uint32_t planish_high_halves(uint32_t a, uint32_t b)
{
    return a >> 16 | (b & 0xFFFF0000u);
}

/* bytes 0 and 2, sign extended */
static inline uint32_t planish_even_bytes(uint32_t word)
{
#if defined(__ARM_FEATURE_DSP) && defined(__ARM_FP)
    return (uint32_t)__sxtb16(word);
#else
    return (uint16_t)(int8_t)word | (uint32_t)(uint16_t)(int8_t)(word >> 16) << 16;
#endif
}

/* bytes 1 and 3, sign extended */
static inline uint32_t planish_odd_bytes(uint32_t word)
{
    return planish_even_bytes(word >> 8 | word << 24);
}

/* halves of a, each with byte 0 or 2 of the word added, sign extended; modulo 2^16 */
static inline uint32_t planish_add_even_bytes(uint32_t a, uint32_t word)
{
#if defined(__ARM_FEATURE_DSP) && defined(__ARM_FP)
    return (uint32_t)__sxtab16((int16x2_t)a, (int8x4_t)word);
#else
    uint32_t bytes = planish_even_bytes(word);
    return ((a + bytes) & 0xFFFFu) | ((a & 0xFFFF0000u) + (bytes & 0xFFFF0000u));
#endif
}

/* ... with byte 1 or 3 */
static inline uint32_t planish_add_odd_bytes(uint32_t a, uint32_t word)
{
    return planish_add_even_bytes(a, word >> 8 | word << 24);
}

/* the larger of each two signed bytes */
static inline uint32_t planish_max_bytes(uint32_t a, uint32_t b)
{
#if defined(__ARM_FEATURE_DSP) && defined(__ARM_FP)
    __asm__("ssub8 r12, %0, %1\n" /* sets a flag for every byte of a that is no less than b's */
            "sel %0, %0, %1"
            : "+r"(a)
            : "r"(b)
            : "r12", "cc");
    return a;
#else
    uint32_t larger = 0;
    int32_t i;
    for (i = 0; i < 32; i += 8) {
        larger |= ((int8_t)(a >> i) > (int8_t)(b >> i) ? a : b) & (uint32_t)255 << i;
    }
    return larger;
#endif
}

/* each byte less that of b, modulo 256 */
static inline uint32_t planish_subtract_bytes(uint32_t a, uint32_t b)
{
#if defined(__ARM_FEATURE_DSP) && defined(__ARM_FP)
    return (uint32_t)__ssub8((int8x4_t)a, (int8x4_t)b);
#else
    return ((a | 0x80808080u) - (b & 0x7F7F7F7Fu)) ^ ((a ^ ~b) & 0x80808080u);
#endif
}

/* four codes of `bits` 8, 4 or 2, stored in that many bits from a whole byte on, as four bytes; 8 bits: p is a multiple of 4 */
static inline uint32_t planish_unpack_four(const int8_t *p, int32_t bits)
{
    const uint8_t *byte = (const uint8_t *)p;
    uint32_t v;
    if (bits == 8) {
        return planish_load_word(p);
    }
    if (bits == 4) {
        v = byte[0] | (uint32_t)byte[1] << 16;
        v = (v | v << 4) & 0x0F0F0F0Fu;
        return planish_subtract_bytes(v ^ 0x08080808u, 0x08080808u);
    }
    v = byte[0];
    v = (v | v << 12) & 0x000F000Fu;
    v = (v | v << 6) & 0x03030303u;
    return planish_subtract_bytes(v ^ 0x02020202u, 0x02020202u);
}

/* the reverse */
static inline void planish_pack_four(int8_t *p, uint32_t codes, int32_t bits)
{
    if (bits == 8) {
        planish_store_word(p, codes);
    } else if (bits == 4) {
        codes &= 0x0F0F0F0Fu;
        codes |= codes >> 4;
        p[0] = (int8_t)codes;
        p[1] = (int8_t)(codes >> 16);
    } else {
        codes &= 0x03030303u;
        codes |= codes >> 6;
        codes |= codes >> 12;
        p[0] = (int8_t)codes;
    }
}

/* sum of both products of halves, and c */
static inline int32_t planish_dot(uint32_t a, uint32_t b, int32_t c)
{
#if defined(__ARM_FEATURE_DSP) && defined(__ARM_FP)
    return __smlad((int16x2_t)a, (int16x2_t)b, c);
#else
    return c + (int16_t)a * (int16_t)b + (int16_t)(a >> 16) * (int16_t)(b >> 16);
#endif
}

/* c + (a * low half of b >> 16), the product in 48 bits */
static inline int32_t planish_product_low(int32_t a, uint32_t b, int32_t c)
{
#if defined(__ARM_FEATURE_DSP) && defined(__ARM_FP)
    return __smlawb(a, (int32_t)b, c);
#else
    return c + (int32_t)((int64_t)a * (int16_t)b >> 16);
#endif
}

/* the same with the high half */
static inline int32_t planish_product_high(int32_t a, uint32_t b, int32_t c)
{
#if defined(__ARM_FEATURE_DSP) && defined(__ARM_FP)
    return __smlawt(a, (int32_t)b, c);
#else
    return c + (int32_t)((int64_t)a * ((int32_t)b >> 16) >> 16);
#endif
}

/* upper half of a * b + (high, low), 64 bits */
static inline int32_t planish_multiply_add_high(int32_t a, int32_t b, uint32_t low, uint32_t high)
{
#if defined(__ARM_FEATURE_DSP) && defined(__ARM_FP)
    __asm__("smlal %0, %1, %2, %3" : "+r"(low), "+r"(high) : "r"(a), "r"(b));
    return (int32_t)high;
#else
    uint64_t sum = (uint64_t)((int64_t)a * b) + ((uint64_t)high << 32 | low);
    return (int32_t)(uint32_t)(sum >> 32);
#endif
}

/* float to the nearest integer, halves to even. |v| < 2^31 */
static inline int32_t planish_nearest(float v)
{
#if defined(__ARM_FEATURE_DSP) && defined(__ARM_FP) && (__ARM_FP & 4)
    union { float f; int32_t i; } bits;
    __asm__("vcvtr.s32.f32 %0, %1" : "=t"(bits.f) : "t"(v)); /* by the rounding mode, which is this one after reset */
    return bits.i;
#else
    const float whole = 8388608.0f; /* from 2^23 on every float is an integer */
    if (v < whole && v > -whole) {
        v = v < 0 ? (v - whole) + whole : (v + whole) - whole;
    }
    return (int32_t)v;
#endif
}

#endif
