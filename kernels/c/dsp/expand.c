/* Codes of two columns to interleaved pairs of 16-bit numbers; see product.h. */
#include "dsp/product.h"

#if defined(__ARM_FEATURE_DSP) && defined(__ARM_FP)

/* r0 a, r1 b, r2 pairs, r3 words; on the stack rows and step */
#define EXPAND(NAME)                                                                                        \
    __attribute__((naked)) uint32_t *NAME(                                                                  \
        __attribute__((unused)) const int8_t *a, __attribute__((unused)) const int8_t *b,                   \
        __attribute__((unused)) uint32_t *pairs, __attribute__((unused)) int32_t words,                     \
        __attribute__((unused)) int32_t rows, __attribute__((unused)) int32_t step)

/* label 1: a row; r12 rows left, lr words */
#define ROWS                         \
    ".syntax unified\n"              \
    "push {r4-r11, lr}\n"            \
    "ldr r12, [sp, #36]\n"           \
    "mov lr, r3\n"                   \
    "1:\n"

#define NEXT_ROW                     \
    "ldr r4, [sp, #40]\n"            \
    "add r0, r0, r4\n"               \
    "add r1, r1, r4\n"               \
    "subs r12, #1\n"                 \
    "bne 1b\n"                       \
    "mov r0, r2\n"                   \
    "pop {r4-r11, pc}\n"

#define PAIRS(A, B)                  \
    "sxtb16 r8, " A "\n"             \
    "sxtb16 r9, " B "\n"             \
    "sxtb16 r10, " A ", ror #8\n"    \
    "sxtb16 r11, " B ", ror #8\n"    \
    "stmia r2!, {r8-r11}\n"

EXPAND(planish_expand_8)
{
    __asm__(ROWS
            "lsrs r3, lr, #1\n"
            "bcc 2f\n"
            "ldr r4, [r0], #4\n"
            "ldr r6, [r1], #4\n"
            PAIRS("r4", "r6")
            "cbz r3, 3f\n"
            "2:\n"
            "ldmia r0!, {r4, r5}\n"
            "ldmia r1!, {r6, r7}\n"
            PAIRS("r4", "r6")
            PAIRS("r5", "r7")
            "subs r3, #1\n"
            "bne 2b\n"
            "3:\n"
            NEXT_ROW);
}

/* two pairs of each column: the fields in mask r10 of both words, shifted down by FIRST and by SECOND */
#define FIELDS(FIRST, SECOND)                  \
    "and r6, r10, r4, lsr #" FIRST "\n"        \
    "and r7, r10, r5, lsr #" FIRST "\n"        \
    "and r8, r10, r4, lsr #" SECOND "\n"       \
    "and r9, r10, r5, lsr #" SECOND "\n"       \
    "stmia r2!, {r6-r9}\n"

#define FIRST_FIELDS(SECOND)                   \
    "and r6, r10, r4\n"                        \
    "and r7, r10, r5\n"                        \
    "and r8, r10, r4, lsr #" SECOND "\n"       \
    "and r9, r10, r5, lsr #" SECOND "\n"       \
    "stmia r2!, {r6-r9}\n"

/* words r4 and r5, their sign bits turned */
#define NARROW_WORDS(MASK, SIGNS)              \
    "mov.w r10, #" MASK "\n"                   \
    "mov r3, lr\n"                             \
    "2:\n"                                     \
    "ldr r4, [r0], #4\n"                       \
    "ldr r5, [r1], #4\n"                       \
    "eor r4, r4, #" SIGNS "\n"                 \
    "eor r5, r5, #" SIGNS "\n"

#define NEXT_WORDS                             \
    "subs r3, #1\n"                            \
    "bne 2b\n"

EXPAND(planish_expand_4)
{
    __asm__(ROWS
            NARROW_WORDS("0x000F000F", "0x88888888")
            FIRST_FIELDS("4")
            FIELDS("8", "12")
            NEXT_WORDS
            NEXT_ROW);
}

EXPAND(planish_expand_2)
{
    __asm__(ROWS
            NARROW_WORDS("0x00030003", "0xAAAAAAAA")
            FIRST_FIELDS("2")
            FIELDS("4", "6")
            FIELDS("8", "10")
            FIELDS("12", "14")
            NEXT_WORDS
            NEXT_ROW);
}

#else
#include "dsp/halves.h"

/* two words of codes to the pairs that they give */
typedef uint32_t *expand_word(uint32_t a, uint32_t b, uint32_t *pairs);

static uint32_t *expand(expand_word *word, const int8_t *a, const int8_t *b, uint32_t *pairs, int32_t words, int32_t rows,
                        int32_t step)
{
    int32_t i;
    for (; rows > 0; rows--) {
        for (i = 0; i < words; i++) {
            pairs = word(planish_load_word(a + 4 * i), planish_load_word(b + 4 * i), pairs);
        }
        if (rows > 1) {
            a += 4 * words + step;
            b += 4 * words + step;
        }
    }
    return pairs;
}

static uint32_t *word_8(uint32_t a, uint32_t b, uint32_t *pairs)
{
    pairs[0] = planish_even_bytes(a);
    pairs[1] = planish_even_bytes(b);
    pairs[2] = planish_odd_bytes(a);
    pairs[3] = planish_odd_bytes(b);
    return pairs + 4;
}

static uint32_t *word_4(uint32_t a, uint32_t b, uint32_t *pairs)
{
    int32_t shift;
    for (shift = 0; shift < 16; shift += 4) {
        *pairs++ = (a ^ 0x88888888u) >> shift & 0x000F000Fu;
        *pairs++ = (b ^ 0x88888888u) >> shift & 0x000F000Fu;
    }
    return pairs;
}

static uint32_t *word_2(uint32_t a, uint32_t b, uint32_t *pairs)
{
    int32_t shift;
    for (shift = 0; shift < 16; shift += 2) {
        *pairs++ = (a ^ 0xAAAAAAAAu) >> shift & 0x00030003u;
        *pairs++ = (b ^ 0xAAAAAAAAu) >> shift & 0x00030003u;
    }
    return pairs;
}

uint32_t *planish_expand_8(const int8_t *a, const int8_t *b, uint32_t *pairs, int32_t words, int32_t rows, int32_t step)
{
    return expand(word_8, a, b, pairs, words, rows, step);
}

uint32_t *planish_expand_4(const int8_t *a, const int8_t *b, uint32_t *pairs, int32_t words, int32_t rows, int32_t step)
{
    return expand(word_4, a, b, pairs, words, rows, step);
}

uint32_t *planish_expand_2(const int8_t *a, const int8_t *b, uint32_t *pairs, int32_t words, int32_t rows, int32_t step)
{
    return expand(word_2, a, b, pairs, words, rows, step);
}

#endif
