/* Codes of two columns to interleaved pairs of 16-bit numbers; see product.h. */
#include "dsp/product.h"

#if defined(__ARM_FEATURE_DSP)

/* r0 a, r1 b, r2 pairs, r3 words */
#define EXPAND(NAME)                                                                                              \
    __attribute__((naked)) uint32_t *NAME(__attribute__((unused)) const int8_t *a,                                \
                                          __attribute__((unused)) const int8_t *b,                                \
                                          __attribute__((unused)) uint32_t *pairs, __attribute__((unused)) int32_t words)

#define PAIRS(A, B)                  \
    "sxtb16 r8, " A "\n"             \
    "sxtb16 r9, " B "\n"             \
    "sxtb16 r10, " A ", ror #8\n"    \
    "sxtb16 r11, " B ", ror #8\n"    \
    "stmia r2!, {r8-r11}\n"

EXPAND(planish_expand_8)
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

/* two pairs of each column: the fields in mask r12 of both words, shifted down by FIRST and by SECOND */
#define FIELDS(FIRST, SECOND)                  \
    "and r6, r12, r4, lsr #" FIRST "\n"        \
    "and r7, r12, r5, lsr #" FIRST "\n"        \
    "and r8, r12, r4, lsr #" SECOND "\n"       \
    "and r9, r12, r5, lsr #" SECOND "\n"       \
    "stmia r2!, {r6-r9}\n"

#define FIRST_FIELDS(SECOND)                   \
    "and r6, r12, r4\n"                        \
    "and r7, r12, r5\n"                        \
    "and r8, r12, r4, lsr #" SECOND "\n"       \
    "and r9, r12, r5, lsr #" SECOND "\n"       \
    "stmia r2!, {r6-r9}\n"

/* words r4 and r5, their sign bits turned */
#define NARROW_WORDS(MASK, SIGNS)              \
    ".syntax unified\n"                        \
    "push {r4-r9}\n"                           \
    "mov.w r12, #" MASK "\n"                   \
    "1:\n"                                     \
    "ldr r4, [r0], #4\n"                       \
    "ldr r5, [r1], #4\n"                       \
    "eor r4, r4, #" SIGNS "\n"                 \
    "eor r5, r5, #" SIGNS "\n"

#define NEXT_WORDS                             \
    "subs r3, #1\n"                            \
    "bne 1b\n"                                 \
    "mov r0, r2\n"                             \
    "pop {r4-r9}\n"                            \
    "bx lr\n"

EXPAND(planish_expand_4)
{
    __asm__(NARROW_WORDS("0x000F000F", "0x88888888")
            FIRST_FIELDS("4")
            FIELDS("8", "12")
            NEXT_WORDS);
}

EXPAND(planish_expand_2)
{
    __asm__(NARROW_WORDS("0x00030003", "0xAAAAAAAA")
            FIRST_FIELDS("2")
            FIELDS("4", "6")
            FIELDS("8", "10")
            FIELDS("12", "14")
            NEXT_WORDS);
}

#else
#include "dsp/halves.h"

uint32_t *planish_expand_8(const int8_t *a, const int8_t *b, uint32_t *pairs, int32_t words)
{
    for (; words > 0; words--) {
        uint32_t first = planish_load_word(a), second = planish_load_word(b);
        *pairs++ = planish_even_bytes(first);
        *pairs++ = planish_even_bytes(second);
        *pairs++ = planish_odd_bytes(first);
        *pairs++ = planish_odd_bytes(second);
        a += 4;
        b += 4;
    }
    return pairs;
}

static uint32_t *fields(const int8_t *a, const int8_t *b, uint32_t *pairs, int32_t words, int32_t bits, uint32_t mask,
                        uint32_t signs)
{
    int32_t shift;
    for (; words > 0; words--) {
        for (shift = 0; shift < 16; shift += bits) {
            *pairs++ = (planish_load_word(a) ^ signs) >> shift & mask;
            *pairs++ = (planish_load_word(b) ^ signs) >> shift & mask;
        }
        a += 4;
        b += 4;
    }
    return pairs;
}

uint32_t *planish_expand_4(const int8_t *a, const int8_t *b, uint32_t *pairs, int32_t words)
{
    return fields(a, b, pairs, words, 4, 0x000F000Fu, 0x88888888u);
}

uint32_t *planish_expand_2(const int8_t *a, const int8_t *b, uint32_t *pairs, int32_t words)
{
    return fields(a, b, pairs, words, 2, 0x00030003u, 0xAAAAAAAAu);
}

#endif
