/* int8 codes of two columns to interleaved pairs of 16-bit numbers. */
#include "dsp/product.h"

#if defined(__ARM_FEATURE_DSP)

#define PAIRS(A, B)                  \
    "sxtb16 r8, " A "\n"             \
    "sxtb16 r9, " B "\n"             \
    "sxtb16 r10, " A ", ror #8\n"    \
    "sxtb16 r11, " B ", ror #8\n"    \
    "stmia r2!, {r8-r11}\n"

/* r0 a, r1 b, r2 pairs, r3 words */
__attribute__((naked)) uint32_t *planish_expand(__attribute__((unused)) const int8_t *a,
                                                __attribute__((unused)) const int8_t *b,
                                                __attribute__((unused)) uint32_t *pairs,
                                                __attribute__((unused)) int32_t words)
{
    __asm__(".syntax unified\n"
            "push {r4-r11}\n"
            "lsrs r3, r3, #1\n"
            "bcc 1f\n"
            "ldr r4, [r0], #4\n"
            "ldr r6, [r1], #4\n"
            PAIRS("r4", "r6")
            "cbz r3, 2f\n"
            "1:\n"
            "ldmia r0!, {r4, r5}\n"
            "ldmia r1!, {r6, r7}\n"
            PAIRS("r4", "r6")
            PAIRS("r5", "r7")
            "subs r3, #1\n"
            "bne 1b\n"
            "2:\n"
            "mov r0, r2\n"
            "pop {r4-r11}\n"
            "bx lr\n");
}

#else

static uint32_t pair(int8_t low, int8_t high)
{
    return ((uint32_t)low & 0xFFFFu) | (uint32_t)high << 16;
}

uint32_t *planish_expand(const int8_t *a, const int8_t *b, uint32_t *pairs, int32_t words)
{
    int32_t i;
    for (i = 0; i < 4 * words; i += 4) {
        pairs[i] = pair(a[i], a[i + 2]);
        pairs[i + 1] = pair(b[i], b[i + 2]);
        pairs[i + 2] = pair(a[i + 1], a[i + 3]);
        pairs[i + 3] = pair(b[i + 1], b[i + 3]);
    }
    return pairs + 4 * words;
}

#endif
