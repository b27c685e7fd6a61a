/* Brings rows of four channels into the work memory of dsp/depthwise_conv2d.c. */
#ifndef PLANISH_DSP_DEPTHWISE_ROWS_H
#define PLANISH_DSP_DEPTHWISE_ROWS_H

#include "dsp/depthwise_channel.h"

/* codes of four channels at a column */
static inline uint32_t codes_of(const int8_t *x)
{
    return planish_unpack_four(x, X_BITS);
}

/* How the columns of the image that are read lie in words of two: the first may share its word with padding, then come `fours` times
 * four columns, then 0 to 3. */
typedef struct {
    int32_t fours, rest;
    uint32_t zero; /* zero point, twice */
    int32_t odd;   /* 1: the first shares its word */
} columns_t;

static inline columns_t columns_of(const planish_dsp_depthwise_conv2d_layer *l)
{
    int32_t read = (l->out_columns - 1) * COLUMN_STRIDE + KERNEL_WIDTH - l->pad_left;
    columns_t p;
    read = read < l->in_columns ? read : l->in_columns;
    p.odd = read > 0 ? l->pad_left % 2 : 0;
    read = read > 0 ? read - p.odd : 0;
    p.fours = read / 4;
    p.rest = read % 4;
    p.zero = 0x10001u * (uint16_t)l->x_zero_point;
    return p;
}

/* One row of four channels, from its first column on; `step` bytes from column to column. */
#if defined(__ARM_FEATURE_DSP) && defined(__ARM_FP) && WORDS && X_BITS == 8 && 3 * PLANE_BYTES <= 1020
#define STORE(instruction, what, channel) instruction " " what ", [r2, #" TEXT(channel * PLANE_BYTES) "]\n"
static inline void spread_row(int8_t *to, const int8_t *x, int32_t step, const columns_t *columns)
{
    register const int8_t *from __asm__("r0") = x;
    register int32_t apart __asm__("r1") = step;
    register int8_t *place __asm__("r2") = to;
    register const columns_t *plan __asm__("r3") = columns;
    __asm__ volatile(
        "vldm r3, {s0-s3}\n"
        "vmov r10, r5, s2, s3\n"
        "cbz r5, 1f\n"
        "ldr r4, [r0]\n" /* (zero, x) */
        "add r0, r0, r1\n"
        "sxtb16 r8, r4\n"
        "sxtb16 r9, r4, ror #8\n"
        "pkhbt r4, r10, r8, lsl #16\n"
        "pkhbt r5, r10, r9, lsl #16\n"
        "pkhtb r8, r8, r10, asr #16\n"
        "pkhtb r9, r9, r10, asr #16\n"
        STORE("str", "r4", 0) STORE("str", "r5", 1) STORE("str", "r8", 2) STORE("str", "r9", 3)
        "add r2, r2, #4\n"
        "1:\n"
        "vmov r3, s0\n"
        "cbz r3, 3f\n"
        "2:\n" /* four columns */
        "ldr r4, [r0]\n"
        "ldr r5, [r0, r1]\n"
        "add r0, r0, r1, lsl #1\n"
        "ldr r6, [r0]\n"
        "ldr r8, [r0, r1]\n"
        "add r0, r0, r1, lsl #1\n"
        "sxtb16 r9, r4\n"
        "sxtb16 r10, r5\n"
        "sxtb16 r11, r6\n"
        "sxtb16 r12, r8\n"
        "pkhtb lr, r10, r9, asr #16\n"
        "pkhbt r9, r9, r10, lsl #16\n"
        "pkhbt r10, r11, r12, lsl #16\n"
        "pkhtb r11, r12, r11, asr #16\n"
        STORE("strd", "r9, r10", 0) STORE("strd", "lr, r11", 2)
        "sxtb16 r4, r4, ror #8\n"
        "sxtb16 r5, r5, ror #8\n"
        "sxtb16 r6, r6, ror #8\n"
        "sxtb16 r8, r8, ror #8\n"
        "pkhtb lr, r5, r4, asr #16\n"
        "pkhbt r9, r4, r5, lsl #16\n"
        "pkhbt r10, r6, r8, lsl #16\n"
        "pkhtb r11, r8, r6, asr #16\n"
        STORE("strd", "r9, r10", 1) STORE("strd", "lr, r11", 3)
        "add r2, r2, #8\n"
        "subs r3, r3, #1\n"
        "bne 2b\n"
        "3:\n"
        "vmov r3, r10, s1, s2\n"
        "lsls r3, r3, #31\n" /* carry: two are left; not zero: one is */
        "bcc 4f\n"
        "ldr r4, [r0]\n"
        "ldr r5, [r0, r1]\n"
        "add r0, r0, r1, lsl #1\n"
        "sxtb16 r8, r4\n"
        "sxtb16 r9, r5\n"
        "sxtb16 r4, r4, ror #8\n"
        "sxtb16 r5, r5, ror #8\n"
        "pkhbt r6, r8, r9, lsl #16\n"
        "pkhtb r8, r9, r8, asr #16\n"
        "pkhbt r9, r4, r5, lsl #16\n"
        "pkhtb r4, r5, r4, asr #16\n"
        STORE("str", "r6", 0) STORE("str", "r9", 1) STORE("str", "r8", 2) STORE("str", "r4", 3)
        "add r2, r2, #4\n"
        "4:\n"
        "beq 5f\n"
        "ldr r4, [r0]\n" /* (x, zero) */
        "sxtb16 r8, r4\n"
        "sxtb16 r9, r4, ror #8\n"
        "pkhbt r4, r8, r10, lsl #16\n"
        "pkhbt r5, r9, r10, lsl #16\n"
        "pkhtb r8, r10, r8, asr #16\n"
        "pkhtb r9, r10, r9, asr #16\n"
        STORE("str", "r4", 0) STORE("str", "r5", 1) STORE("str", "r8", 2) STORE("str", "r9", 3)
        "5:\n"
        : "+r"(from), "+r"(apart), "+r"(place), "+r"(plan)
        :
        : "r4", "r5", "r6", "r8", "r9", "r10", "r11", "r12", "lr", "s0", "s1", "s2", "s3", "cc", "memory");
}
#elif WORDS
static inline void spread_row(int8_t *to, const int8_t *x, int32_t step, const columns_t *columns)
{
    uint32_t zero = (columns->zero & 255u) * 0x01010101u;
    int32_t left = columns->fours * 4 + columns->rest;
    if (columns->odd) {
        spread(to, PLANE, zero, codes_of(x));
        x += step;
        to += 4;
    }
    PLANISH_ROLLED
    for (; left > 0; left -= 2) {
        spread(to, PLANE, codes_of(x), left > 1 ? codes_of(x + step) : zero);
        x += 2 * step;
        to += 4;
    }
}
#else
/* channels are read one by one here */
static inline void spread_row(int8_t *to, const int8_t *x, int32_t step, const columns_t *columns)
{
    int16_t *half = (int16_t *)(void *)to + columns->odd;
    int32_t left = columns->fours * 4 + columns->rest + columns->odd;
    PLANISH_ROLLED
    for (; left > 0; left--) {
        *half++ = *x;
        x += step;
    }
}
#endif

/* Brings one row of the padded image into its slot `to`, of `count` channels; x: the first one's code of the image's first pixel.
 * Padding before and behind the columns of the image is there already. */
static PLANISH_APART void expand(const planish_dsp_depthwise_conv2d_layer *l, const columns_t *columns, const int8_t *x,
                                 int32_t row, int32_t count, int8_t *to)
{
    row -= l->pad_top;
    to += l->pad_left / 2 * 4;
    if ((uint32_t)row >= (uint32_t)l->in_rows) {
        uint32_t zero = columns->zero;
        int32_t left = 2 * columns->odd + 4 * columns->fours + columns->rest; /* halves */
        PLANISH_ROLLED
        for (; left > 0; left -= 2) {
            planish_store_word(to, zero);
            planish_store_word(to + PLANE, zero);
            planish_store_word(to + 2 * PLANE, zero);
            planish_store_word(to + 3 * PLANE, zero);
            to += 4;
        }
        return;
    }
    x += row * l->in_row_step;
#if WORDS
    (void)count;
    spread_row(to, x, l->in_column_step, columns);
#else
    int32_t c;
    for (c = 0; c < count; c++) {
        spread_row(to + c * PLANE, x + c, l->in_column_step, columns);
    }
#endif
}

#endif
