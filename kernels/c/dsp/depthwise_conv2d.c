/* Depthwise convolution, four channels at a time. Their rows are brought into `scratch` as int16, each channel on its own, so that
 * one SMLAD adds two neighbouring taps; padding is the zero point there, which the folded bias takes off again.
 *
 * Compiled for KERNEL_HEIGHT, KERNEL_WIDTH, COLUMN_STRIDE (1 or 2), ROW_BYTES (of a scratch row: int16, a multiple of 4),
 * WEIGHT_BITS, and
 *   WORDS      1: channels, and so all steps, are multiples of 4, and codes are read by the word
 *   ROWS_FIRST 1: row by row, all channels of a row: outputs may overwrite rows that are done;
 *              0: four channels of the whole image, then the next four: every row is brought in once
 *   SATURATE   0: all codes of Y_BITS, 1: all from 0 on, 2: as the layer says
 * X_BITS and Y_BITS are the widths of the codes; below 8, WORDS is 1 (four channels end with a byte). Narrow outputs of a row are
 * gathered as bytes behind the channels' records first.
 */
#include "dsp/depthwise_conv2d.h"
#include "dsp/halves.h"

#define PLANE_BYTES (KERNEL_HEIGHT * ROW_BYTES)

enum {
    GROUP = 4,                               /* channels */
    TAPS = KERNEL_HEIGHT * KERNEL_WIDTH,
    PAIRS = KERNEL_WIDTH > 1 ? KERNEL_WIDTH - 1 : 1, /* words of a kernel row: (w0, w1), (w1, w2), ... */
    TURNS = ROWS_FIRST ? KERNEL_HEIGHT : 2 * KERNEL_HEIGHT - 1,
    LEAST = -(1 << (Y_BITS - 1)),
    MOST = (1 << (Y_BITS - 1)) - 1,
    PLANE = PLANE_BYTES,                     /* bytes of one channel's rows */
    WEIGHT_WORDS = (TAPS * WEIGHT_BITS + 7) / 8 /* of four channels */
};

/* One channel. Its rows lie in a ring, slot = row % KERNEL_HEIGHT; for kernel rows to meet them in order, the weights of the
 * rows follow each other almost twice, and a row of outputs begins among them where its top row's slot says. */
typedef struct {
    uint32_t start_low, start_high; /* what sum * factor is added to, 64 bits; with a float factor: bias, and nothing */
    uint32_t end;                   /* address in slot 0 where the windows of the last whole four outputs end */
    uint32_t rest;                  /* outputs after that, 0 to 3 */
    int32_t zero_point;
    uint32_t rows; /* address of slot 0 */
    int32_t step;  /* between outputs */
    int32_t factor;
    uint32_t weight[TURNS * PAIRS];
} channel_t;

/* the weights of kernel position `tap` for four channels */
static inline uint32_t tap_of(const uint32_t *weight, uint32_t tap)
{
#if WEIGHT_BITS == 8
    return weight[tap];
#else
    enum { EACH = 8 / WEIGHT_BITS, MASK = 0x01010101 * ((1 << WEIGHT_BITS) - 1), HALF = 0x01010101 << (WEIGHT_BITS - 1) };
    uint32_t codes = planish_subtract_bytes(weight[tap / EACH] >> tap % EACH * WEIGHT_BITS & MASK, HALF);
    return WEIGHT_BITS == 2 ? codes << 2 & 0xFCFCFCFCu : codes; /* bias and factor of 2-bit weights are made for 4 times them */
#endif
}

/* one word (a, b) for each of four channels, `step` bytes apart, from the codes of two columns or taps */
static inline void spread(int8_t *to, int32_t step, uint32_t a, uint32_t b)
{
    uint32_t even_a = planish_even_bytes(a), even_b = planish_even_bytes(b);
    uint32_t odd_a = planish_odd_bytes(a), odd_b = planish_odd_bytes(b);
    planish_store_word(to, planish_low_halves(even_a, even_b));
    planish_store_word(to + step, planish_low_halves(odd_a, odd_b));
    planish_store_word(to + 2 * step, planish_high_halves(even_a, even_b));
    planish_store_word(to + 3 * step, planish_high_halves(odd_a, odd_b));
}

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

#define TEXT(...) TEXT_OF(__VA_ARGS__)
#define TEXT_OF(...) #__VA_ARGS__

/* One row of four channels, from its first column on; `step` bytes from column to column. */
#if defined(__ARM_FEATURE_DSP) && WORDS && X_BITS == 8 && 3 * PLANE_BYTES <= 1020
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

/* what is the same for all channels: records, and rows that hold nothing but padding */
static void prepare(const planish_dsp_depthwise_conv2d_layer *l, int8_t *rows, channel_t *channel)
{
    uint32_t zero = 0x10001u * (uint16_t)l->x_zero_point;
    int32_t i;
    PLANISH_ROLLED
    for (i = 0; i < GROUP * PLANE; i += 4) {
        planish_store_word(rows + i, zero);
    }
    PLANISH_ROLLED
    for (i = 0; i < GROUP; i++) {
        channel[i].rows = (uint32_t)(uintptr_t)(rows + i * PLANE); /* of use on 32-bit cores only */
        channel[i].end = channel[i].rows + (uint32_t)l->out_columns / 4 * (8 * COLUMN_STRIDE);
        channel[i].rest = (uint32_t)l->out_columns & 3u;
        channel[i].step = Y_BITS == 8 ? l->out_column_step : GROUP;
        channel[i].zero_point = l->y_zero_point;
    }
}

/* the constants of `count` channels from c on */
static PLANISH_APART void load(const planish_dsp_depthwise_conv2d_layer *l, int32_t c, int32_t count, channel_t *channel)
{
    const uint32_t *weight = l->weight + c / GROUP * WEIGHT_WORDS;
    const uint32_t *factors = l->factor + c;
    const int32_t *biases = l->bias + c;
    const int64_t half = (int64_t)(2 * l->y_zero_point + 1) * 2147483648LL; /* zero point and a half, times 2^32 */
    int32_t i;
    uint32_t tap = 0, end;
    PLANISH_ROLLED
    for (i = 0; i < KERNEL_HEIGHT; i++) {
        int8_t *to = (int8_t *)&channel->weight[i * PAIRS];
        uint32_t last = tap_of(weight, tap++);
        for (end = tap + (PAIRS * (KERNEL_WIDTH > 1)); tap < end; tap++) {
            uint32_t next = tap_of(weight, tap);
            spread(to, sizeof(channel_t), last, next);
            if (!ROWS_FIRST && i + 1 < KERNEL_HEIGHT) {
                spread(to + KERNEL_HEIGHT * PAIRS * 4, sizeof(channel_t), last, next);
            }
            to += 4;
            last = next;
        }
        if (KERNEL_WIDTH == 1) {
            spread(to, sizeof(channel_t), last, 0);
            if (!ROWS_FIRST && i + 1 < KERNEL_HEIGHT) {
                spread(to + KERNEL_HEIGHT * PAIRS * 4, sizeof(channel_t), last, 0);
            }
        }
    }
    PLANISH_ROLLED
    for (i = 0; i < count; i++) {
        int32_t factor = (int32_t)factors[i], bias = biases[i];
        int64_t start = factor < 0 ? (int64_t)(uint32_t)bias : (int64_t)bias * factor + half;
        channel->start_low = (uint32_t)start;
        channel->start_high = (uint32_t)(start >> 32);
        channel->factor = factor;
        channel++;
    }
}

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

#if defined(__ARM_FEATURE_DSP) && defined(__ARM_FP) && (__ARM_FP & 4) && KERNEL_HEIGHT == 3 && KERNEL_WIDTH == 3 \
    && SATURATE < 2 && 2 * ROW_BYTES + 16 <= 1020

/* r0 to r5: weights (w0, w1), (w1, w2) of each row; r6, r7: codes; r8, r9: sums; r10: slot 0 at the window; r11: output;
 * r12: step; lr: factor */
#define AT(slot, byte) "[r10, #" TEXT(slot * ROW_BYTES + byte) "]\n"
#if COLUMN_STRIDE == 1
#define TOP_SECOND(byte) "smultb r9, r6, r0\n" "smlad r9, r7, r1, r9\n"
#define NEXT_SECOND(slot, byte, first, second) \
    "smlatb r9, r6, " first ", r9\n" \
    "smlad r9, r7, " second ", r9\n"
#else
#define TOP_SECOND(byte) "ldr r6, " AT(0, byte + 8) "smuad r9, r7, r0\n" "smlabt r9, r6, r1, r9\n"
#define NEXT_SECOND(slot, byte, first, second) \
    "ldr r6, " AT(slot, byte + 8) \
    "smlad r9, r7, " first ", r9\n" \
    "smlabt r9, r6, " second ", r9\n"
#endif
#define TOP_ROW(byte) \
    "ldrd r6, r7, " AT(0, byte) \
    "smuad r8, r6, r0\n" \
    "smlabt r8, r7, r1, r8\n"
#define NEXT_ROW(slot, byte, first, second) \
    "ldrd r6, r7, " AT(slot, byte) \
    "smlad r8, r6, " first ", r8\n" \
    "smlabt r8, r7, " second ", r8\n"
#define TWO_SUMS(byte) \
    TOP_ROW(byte) TOP_SECOND(byte) \
    NEXT_ROW(1, byte, "r2", "r3") NEXT_SECOND(1, byte, "r2", "r3") \
    NEXT_ROW(2, byte, "r4", "r5") NEXT_SECOND(2, byte, "r4", "r5")
#define ONE_SUM TOP_ROW(0) NEXT_ROW(1, 0, "r2", "r3") NEXT_ROW(2, 0, "r4", "r5")
#if SATURATE == 0
#define SATURATED(code) "ssat " code ", #" TEXT(Y_BITS) ", " code "\n"
#else
#define SATURATED(code) "usat " code ", #" TEXT(Y_BITS) " - 1, " code "\n"
#endif
/* s0, s1: start */
#define CODE(sum, place) \
    "vmov r6, r7, s0, s1\n" \
    "smlal r6, r7, " sum ", lr\n" \
    SATURATED("r7") \
    "strb r7, " place "\n"
/* s0: bias, s5: factor, lr: zero point */
#define FLOAT_CODE(sum, place) \
    "vmov r6, s0\n" \
    "add r6, r6, " sum "\n" \
    "vmov s6, r6\n" \
    "vcvt.f32.s32 s6, s6\n" \
    "vmul.f32 s6, s6, s5\n" \
    "vcvtr.s32.f32 s6, s6\n" \
    "vmov r7, s6\n" \
    "add r7, r7, lr\n" \
    SATURATED("r7") \
    "strb r7, " place "\n"
#define TWO_OUTPUTS(byte) TWO_SUMS(byte) CODE("r8", "[r11]") CODE("r9", "[r11, r12]") "add r11, r11, r12, lsl #1\n"

/* One row of outputs of `count` channels; `turn`: bytes from a channel's weights to those that slot 0 meets. s2: end, s3: rest,
 * s4: zero point, s8: channel, s9: its output, s10: turn, s11: end of the channels. r7 may be a frame pointer, which no clobber
 * may name: it is saved here. */
static PLANISH_APART void convolve(const planish_dsp_depthwise_conv2d_layer *l, const int8_t *rows,
                                   const channel_t *channel, int32_t count, int32_t turn, int8_t *y)
{
    register const channel_t *first __asm__("r0") = channel;
    register const channel_t *last __asm__("r1") = channel + count;
    register int32_t weights __asm__("r9") = turn;
    register int8_t *out __asm__("r11") = y;
    (void)l;
    (void)rows;
    __asm__ volatile(
        "push {r7}\n"
        "vmov s10, s11, r9, r1\n"
        "1:\n" /* a channel */
        "vmov s8, s9, r0, r11\n"
        "vldm r0!, {s0-s4}\n"
        "ldm r0!, {r10, r12, lr}\n"
        "vmov r9, s10\n"
        "add r9, r9, r0\n"
        "ldm r9, {r0-r5}\n"
        "cmp lr, #0\n"
        "bge 5f\n"
        "bic lr, lr, #0x80000000\n"
        "vmov s5, lr\n"
        "vmov lr, s4\n"
        "vmov r6, r7, s2, s3\n"
        "tst r7, #2\n"
        "it ne\n"
        "addne r6, r6, #" TEXT(4 * COLUMN_STRIDE) "\n"
        "vmov s2, r6\n"
        "b 3f\n"
        "2:\n" TWO_SUMS(0) FLOAT_CODE("r8", "[r11]") FLOAT_CODE("r9", "[r11, r12]")
        "add r11, r11, r12, lsl #1\n"
        "add r10, r10, #" TEXT(4 * COLUMN_STRIDE) "\n"
        "3:\n"
        "vmov r6, r7, s2, s3\n"
        "cmp r10, r6\n"
        "bne 2b\n"
        "tst r7, #1\n"
        "beq 7f\n" ONE_SUM FLOAT_CODE("r8", "[r11]")
        "b 7f\n"
        "4:\n" TWO_OUTPUTS(0) TWO_OUTPUTS(4 * COLUMN_STRIDE)
        "add r10, r10, #" TEXT(8 * COLUMN_STRIDE) "\n"
        "5:\n"
        "vmov r6, s2\n"
        "cmp r10, r6\n"
        "bne 4b\n"
        "vmov r6, s3\n"
        "lsls r6, r6, #31\n" /* carry: two are left; not zero: one is */
        "bcc 6f\n" TWO_OUTPUTS(0)
        "add r10, r10, #" TEXT(4 * COLUMN_STRIDE) "\n"
        "6:\n"
        "beq 7f\n" ONE_SUM CODE("r8", "[r11]")
        "7:\n"
        "vmov r0, r11, s8, s9\n"
        "add r0, r0, %[size]\n"
        "add r11, r11, #1\n"
        "vmov r1, s11\n"
        "cmp r0, r1\n"
        "bne 1b\n"
        "pop {r7}\n"
        : "+r"(first), "+r"(last), "+r"(weights), "+r"(out)
        : [size] "I"(sizeof(channel_t))
        : "r2", "r3", "r4", "r5", "r6", "r8", "r10", "r12", "lr", "s0", "s1", "s2", "s3", "s4", "s5", "s6", "s8", "s9",
          "s10", "s11", "cc", "memory");
}

#else

static inline int32_t low(uint32_t halves)
{
    return (int16_t)halves;
}

static inline int32_t high(uint32_t halves)
{
    return (int32_t)halves >> 16;
}

/* taps of a window that begins with the low half of x[0] */
static inline int32_t even_row(const uint32_t *x, const uint32_t *w, int32_t sum)
{
    int32_t k;
    for (k = 0; k + 1 < KERNEL_WIDTH; k += 2) {
        sum = planish_dot(x[k / 2], w[k], sum);
    }
    if (KERNEL_WIDTH % 2) {
        sum += low(x[KERNEL_WIDTH / 2]) * (KERNEL_WIDTH > 1 ? high(w[PAIRS - 1]) : low(w[0]));
    }
    return sum;
}

#if COLUMN_STRIDE == 1
/* ... with the high half */
static inline int32_t odd_row(const uint32_t *x, const uint32_t *w, int32_t sum)
{
    int32_t k;
    sum += high(x[0]) * low(w[0]);
    for (k = 1; k + 1 < KERNEL_WIDTH; k += 2) {
        sum = planish_dot(x[(k + 1) / 2], w[k], sum);
    }
    if (KERNEL_WIDTH % 2 == 0) {
        sum += low(x[KERNEL_WIDTH / 2]) * high(w[PAIRS - 1]);
    }
    return sum;
}
#else
static inline int32_t odd_row(const uint32_t *x, const uint32_t *w, int32_t sum)
{
    return even_row(x + 1, w, sum);
}
#endif

static inline int8_t code_of(const planish_dsp_depthwise_conv2d_layer *l, const channel_t *channel, int32_t sum)
{
    int32_t least = SATURATE == 0 ? LEAST : SATURATE == 1 ? 0 : l->low;
    int32_t most = SATURATE < 2 ? MOST : l->high;
    int32_t code;
    if (channel->factor < 0) {
        union { uint32_t bits; float value; } factor;
        factor.bits = (uint32_t)channel->factor & 0x7FFFFFFFu;
        code = planish_nearest((float)(sum + (int32_t)channel->start_low) * factor.value) + l->y_zero_point;
    } else {
        code = planish_multiply_add_high(sum, channel->factor, channel->start_low, channel->start_high);
    }
    code = code < least ? least : code;
    return (int8_t)(code > most ? most : code);
}

/* One row of outputs of `count` channels; `turn`: bytes from a channel's weights to those that slot 0 meets. */
static PLANISH_APART void convolve(const planish_dsp_depthwise_conv2d_layer *l, const int8_t *rows,
                                   const channel_t *channel, int32_t count, int32_t turn, int8_t *y)
{
    for (; count > 0; count--) {
        const uint32_t *weight = channel->weight + turn / 4;
        const uint32_t *x = (const uint32_t *)(const void *)rows;
        int8_t *out = y++;
        int32_t column, i;
        for (column = l->out_columns; column > 0; column -= 2) {
            int32_t first = 0, second = 0;
            for (i = 0; i < KERNEL_HEIGHT; i++) {
                const uint32_t *row = x + i * (ROW_BYTES / 4);
                first = even_row(row, weight + i * PAIRS, first);
                second = odd_row(row, weight + i * PAIRS, second);
#if defined(__GNUC__)
                /* row by row, while its words are in registers: compilers would rather finish one sum and keep all words */
                __asm__ volatile("" : "+r"(first), "+r"(second));
#endif
            }
            *out = code_of(l, channel, first);
            if (column > 1) {
                out[channel->step] = code_of(l, channel, second);
            }
            x += COLUMN_STRIDE;
            out += 2 * channel->step;
        }
        rows += PLANE;
        channel++;
    }
}

#endif

/* one row of outputs, wherever and however wide they are stored */
static inline void outputs(const planish_dsp_depthwise_conv2d_layer *l, const int8_t *rows, const channel_t *channel,
                           int32_t count, int32_t turn, int8_t *y)
{
#if Y_BITS == 8
    convolve(l, rows, channel, count, turn, y);
#else
    int8_t *codes = (int8_t *)(uintptr_t)(channel + GROUP); /* (out_columns, 4) */
    int32_t column;
    convolve(l, rows, channel, count, turn, codes);
    PLANISH_ROLLED
    for (column = 0; column < l->out_columns; column++) {
        planish_pack_four(y, planish_load_word(codes), Y_BITS);
        codes += GROUP;
        y += l->out_column_step;
    }
#endif
}

void PLANISH_KERNEL(const planish_dsp_depthwise_conv2d_layer *l, const int8_t *x, int8_t *y, int8_t *scratch)
{
    channel_t *channel = (channel_t *)(void *)(scratch + GROUP * PLANE);
    columns_t columns = columns_of(l);
    int32_t c, row, i;
    prepare(l, scratch, channel);
#if ROWS_FIRST
    for (row = 0; row < l->out_rows; row++) {
        for (c = 0; c < l->channels; c += GROUP) {
            int32_t count = l->channels - c < GROUP ? l->channels - c : GROUP;
            load(l, c, count, channel);
            PLANISH_ROLLED
            for (i = 0; i < KERNEL_HEIGHT; i++) {
                expand(l, &columns, x + c * X_BITS / 8, row * l->row_stride + i, count, scratch + i * ROW_BYTES);
            }
            outputs(l, scratch, channel, count, 0, y + c * Y_BITS / 8);
        }
        y += l->out_row_step;
    }
#else
    for (c = 0; c < l->channels; c += GROUP) {
        int32_t count = l->channels - c < GROUP ? l->channels - c : GROUP;
        int8_t *out = y + c * Y_BITS / 8, *slot = scratch;
        int32_t turn = 0;
        load(l, c, count, channel);
        PLANISH_ROLLED
        for (i = 0; i + 1 < KERNEL_HEIGHT; i++) {
            expand(l, &columns, x + c * X_BITS / 8, i, count, slot);
            slot += ROW_BYTES;
        }
        for (row = 0; row < l->out_rows; row++) {
            expand(l, &columns, x + c * X_BITS / 8, row + KERNEL_HEIGHT - 1, count, slot);
            slot = slot + ROW_BYTES < scratch + PLANE ? slot + ROW_BYTES : scratch;
            outputs(l, scratch, channel, count, turn, out);
            turn = turn > 0 ? turn - PAIRS * 4 : (KERNEL_HEIGHT - 1) * PAIRS * 4;
            out += l->out_row_step;
        }
    }
#endif
}
