/* Codes from -128 to 127, as the products write them, to the output: clamped, and packed where they have Y_BITS 4 or 2. */
#ifndef PLANISH_DSP_EMIT_H
#define PLANISH_DSP_EMIT_H

#include <stdint.h>

/* `count` codes to element `at` of y and on, in ascending order */
static inline void planish_emit(const int8_t *codes, int32_t count, int32_t low, int32_t high, int8_t *y, int32_t at)
{
    int32_t i;
    for (i = 0; i < count; i++) {
        int32_t code = codes[i];
        code = code < low ? low : code;
        code = code > high ? high : code;
#if Y_BITS == 8
        y[at + i] = (int8_t)code;
#else
        {
            enum { EACH = 8 / Y_BITS, MASK = (1 << Y_BITS) - 1 };
            int32_t place = (at + i) % EACH;
            int32_t before = place ? y[(at + i) / EACH] : 0;
            y[(at + i) / EACH] = (int8_t)(before | (code & MASK) << (place * Y_BITS));
        }
#endif
    }
}

#endif
