/* Codes from -128 to 127, as the products write them, to the output: clamped, and packed where they have Y_BITS 4 or 2. */
#ifndef PLANISH_DSP_EMIT_H
#define PLANISH_DSP_EMIT_H

#include "dsp/halves.h"

#if Y_BITS == 8

/* `count` codes to element `at` of y and on */
static inline void planish_emit(const int8_t *codes, int32_t count, int32_t low, int32_t high, int8_t *y, int32_t at)
{
    int32_t i;
    for (i = 0; i < count; i++) {
        int32_t code = codes[i] < low ? low : codes[i];
        y[at + i] = (int8_t)(code > high ? high : code);
    }
}

#else

enum { LOWEST = -(1 << (Y_BITS - 1)), HIGHEST = -LOWEST - 1, EACH = 8 / Y_BITS, MASK = (1 << Y_BITS) - 1 };

/* both halves saturated to Y_BITS, and the bits above cleared */
static inline uint32_t saturate(uint32_t halves)
{
#if defined(__ARM_FEATURE_DSP) && defined(__ARM_FP)
    return (uint32_t)__ssat16((int16x2_t)halves, Y_BITS) & MASK * 0x00010001u;
#else
    int32_t low = (int16_t)halves, high = (int16_t)(halves >> 16);
    low = low < LOWEST ? LOWEST : low > HIGHEST ? HIGHEST : low;
    high = high < LOWEST ? LOWEST : high > HIGHEST ? HIGHEST : high;
    return ((uint32_t)low & MASK) | ((uint32_t)high & MASK) << 16;
#endif
}

/* `count` codes to element `at` of y and on; codes is a multiple of 4. In ascending order: a byte's first code clears the others */
static inline void planish_emit(const int8_t *codes, int32_t count, int32_t low, int32_t high, int8_t *y, int32_t at)
{
    int32_t i = 0;
    if (low == LOWEST && high == HIGHEST && at % 4 == 0) {
        for (; i + 4 <= count; i += 4) {
            uint32_t word = planish_load_word(codes + i);
            uint32_t four = saturate(planish_even_bytes(word)) | saturate(planish_odd_bytes(word)) << Y_BITS;
            four |= four >> (16 - 2 * Y_BITS);
            y[(at + i) / EACH] = (int8_t)four;
#if Y_BITS == 4
            y[(at + i) / EACH + 1] = (int8_t)(four >> 8);
#endif
        }
    }
    for (; i < count; i++) {
        int32_t code = codes[i] < low ? low : codes[i], place = (at + i) % EACH;
        int32_t before = place ? y[(at + i) / EACH] : 0;
        code = code > high ? high : code;
        y[(at + i) / EACH] = (int8_t)(before | (code & MASK) << (place * Y_BITS));
    }
}

#endif

#endif
