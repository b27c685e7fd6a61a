/* Depthwise convolution, four channels at a time. Their rows are brought into `scratch` as int16, each channel on its own, so that
 * one SMLAD adds two neighbouring taps; padding is the zero point there, which the folded bias takes off again.
 *
 * Compiled for KERNEL_HEIGHT, KERNEL_WIDTH, COLUMN_STRIDE (1 or 2), ROW_BYTES (of a scratch row: int16, a multiple of 4),
 * WEIGHT_BITS, and
 *   WORDS      1: channels, and so all steps, are multiples of 4, and codes are read by the word
 *   ROWS_FIRST 1: row by row, all channels of a row: outputs may overwrite rows that are done;
 *              0: four channels of the whole image, then the next four: every row is brought in once
 *   SATURATE   0: codes from -128 to 127, 1: from 0 to 127, 2: as the layer says
 */
#include "dsp/depthwise_conv2d.h"
#include "dsp/halves.h"

enum {
    GROUP = 4,                               /* channels */
    TAPS = KERNEL_HEIGHT * KERNEL_WIDTH,
    PAIRS = KERNEL_WIDTH > 1 ? KERNEL_WIDTH - 1 : 1, /* words of a kernel row: (w0, w1), (w1, w2), ... */
    TURNS = ROWS_FIRST ? KERNEL_HEIGHT : 2 * KERNEL_HEIGHT - 1,
    PLANE = KERNEL_HEIGHT * ROW_BYTES        /* bytes of one channel's rows */
};

/* One channel. Its rows lie in a ring, slot = row % KERNEL_HEIGHT; for kernel rows to meet them in order, the weights of the
 * rows follow each other almost twice, and a row of outputs begins among them where its top row's slot says. */
typedef struct {
    int32_t bias[2]; /* twice the same */
    float rescale;
    const int8_t *end; /* in slot 0, where the last whole four outputs end */
    uint32_t rest;     /* outputs after that, 0 to 3 */
    const int8_t *rows;
    int32_t step; /* between outputs */
    int32_t zero_point;
    uint32_t weight[TURNS * PAIRS];
} channel_t;

/* the weights of kernel position `tap` for four channels */
static inline uint32_t tap_of(const uint32_t *weight, uint32_t tap)
{
#if WEIGHT_BITS == 8
    return weight[tap];
#else
    enum { EACH = 8 / WEIGHT_BITS, MASK = 0x01010101 * ((1 << WEIGHT_BITS) - 1), HALF = 0x01010101 << (WEIGHT_BITS - 1) };
    return planish_subtract_bytes(weight[tap / EACH] >> tap % EACH * WEIGHT_BITS & MASK, HALF);
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

/* constants of channels c .. c + 3 */
static void load(const planish_depthwise_rows_layer *l, int32_t c, const int8_t *rows, channel_t *channel)
{
    const uint32_t *weight = l->weight + c / GROUP * ((TAPS * WEIGHT_BITS + 7) / 8);
    int32_t count = l->channels - c < GROUP ? l->channels - c : GROUP;
    int32_t i, j;
    for (i = 0; i < TURNS; i++) {
        uint32_t tap = (uint32_t)((i < KERNEL_HEIGHT ? i : i - KERNEL_HEIGHT) * KERNEL_WIDTH);
        uint32_t last = tap_of(weight, tap);
        for (j = 0; j < PAIRS; j++) {
            uint32_t next = KERNEL_WIDTH > 1 ? tap_of(weight, tap + (uint32_t)j + 1) : 0;
            spread((int8_t *)&channel->weight[i * PAIRS + j], sizeof(channel_t), last, next);
            last = next;
        }
    }
    for (i = 0; i < count; i++) {
        channel[i].bias[0] = l->bias[c + i];
        channel[i].bias[1] = l->bias[c + i];
        channel[i].rescale = l->rescale[c + i];
        channel[i].rows = rows + i * PLANE;
        channel[i].end = channel[i].rows + l->out_columns / 4 * (8 * COLUMN_STRIDE);
        channel[i].rest = (uint32_t)l->out_columns & 3u;
        channel[i].step = l->out_column_step;
        channel[i].zero_point = l->y_zero_point;
    }
}

/* Brings one row of the padded image into its slot `to`. x: channel c of the image's first code */
static void expand(const planish_depthwise_rows_layer *l, const int8_t *x, int32_t row, int32_t count, int8_t *to)
{
    int32_t columns = (l->out_columns - 1) * COLUMN_STRIDE + KERNEL_WIDTH; /* that are read */
    int32_t step = l->in_column_step;
    int32_t end = l->in_columns; /* columns before it come from the image */
    int32_t column = -l->pad_left;
    row -= l->pad_top;
    if (row < 0 || row >= l->in_rows) {
        end = column;
    }
    columns += column;
    x += row * l->in_row_step;
#if WORDS
    uint32_t zero = 0x01010101u * (uint8_t)l->x_zero_point;
    (void)count;
    for (; column < columns && (column < 0 || column + 1 >= end); column += 2) { /* before the image, or one column wide */
        uint32_t a = column >= 0 && column < end ? planish_load_word(x + column * step) : zero;
        uint32_t b = column + 1 >= 0 && column + 1 < end ? planish_load_word(x + (column + 1) * step) : zero;
        spread(to, PLANE, a, b);
        to += 4;
    }
    if (column < columns) {
        const int8_t *from = x + column * step;
        int32_t stop = (columns < end ? columns : end) - 1;
        for (; column < stop; column += 2) {
            spread(to, PLANE, planish_load_word(from), planish_load_word(from + step));
            from += 2 * step;
            to += 4;
        }
        for (; column < columns; column += 2) {
            spread(to, PLANE, column < end ? planish_load_word(from) : zero, zero);
            from += 2 * step;
            to += 4;
        }
    }
#else
    int32_t c, k;
    for (c = 0; c < count; c++) {
        int16_t *half = (int16_t *)(void *)(to + c * PLANE);
        const int8_t *from = x + c;
        for (k = column; k < columns && (k < 0 || k >= end); k++) {
            *half++ = (int16_t)l->x_zero_point;
        }
        from += k * step;
        for (; k < columns && k < end; k++) {
            *half++ = *from;
            from += step;
        }
        for (; k < columns; k++) {
            *half++ = (int16_t)l->x_zero_point;
        }
    }
#endif
}

#define TEXT(...) TEXT_OF(__VA_ARGS__)
#define TEXT_OF(...) #__VA_ARGS__

#if defined(__ARM_FEATURE_DSP) && defined(__ARM_FP) && (__ARM_FP & 4) && KERNEL_HEIGHT == 3 && KERNEL_WIDTH == 3 \
    && SATURATE < 2 && 2 * ROW_BYTES + 16 <= 1020

/* r0 to r5: weights (w0, w1), (w1, w2) of each row; r6, r7: codes; r8, r9: sums; r10: slot 0 at the window; r11: output;
 * r12: step; lr: zero point; s0, s1: bias; s2: rescale */
#define AT(slot, byte) "[r10, #" TEXT(slot * ROW_BYTES + byte) "]\n"
#define TAPS_OF_ONE(slot, byte, first, second) \
    "ldrd r6, r7, " AT(slot, byte) \
    "smlad r8, r6, " first ", r8\n" \
    "smlabt r8, r7, " second ", r8\n"
#if COLUMN_STRIDE == 1
#define TAPS_OF_TWO(slot, byte, first, second) \
    TAPS_OF_ONE(slot, byte, first, second) \
    "smlatb r9, r6, " first ", r9\n" \
    "smlad r9, r7, " second ", r9\n"
#else
#define TAPS_OF_TWO(slot, byte, first, second) \
    TAPS_OF_ONE(slot, byte, first, second) \
    "ldr r6, " AT(slot, byte + 8) \
    "smlad r9, r7, " first ", r9\n" \
    "smlabt r9, r6, " second ", r9\n"
#endif
#if SATURATE == 0
#define CODE(sum) "ssat " sum ", #8, " sum "\n"
#else
#define CODE(sum) "usat " sum ", #7, " sum "\n"
#endif
#define TWO_OUTPUTS(byte) \
    "vmov r8, r9, s0, s1\n" \
    TAPS_OF_TWO(0, byte, "r0", "r1") \
    TAPS_OF_TWO(1, byte, "r2", "r3") \
    TAPS_OF_TWO(2, byte, "r4", "r5") \
    "vmov s6, s7, r8, r9\n" \
    "vcvt.f32.s32 s6, s6\n" \
    "vcvt.f32.s32 s7, s7\n" \
    "vmul.f32 s6, s6, s2\n" \
    "vmul.f32 s7, s7, s2\n" \
    "vcvtr.s32.f32 s6, s6\n" \
    "vcvtr.s32.f32 s7, s7\n" \
    "vmov r8, r9, s6, s7\n" \
    "add r8, r8, lr\n" \
    "add r9, r9, lr\n" \
    CODE("r8") \
    CODE("r9") \
    "strb r8, [r11]\n" \
    "strb r9, [r11, r12]\n" \
    "add r11, r11, r12, lsl #1\n"
#define ONE_OUTPUT \
    "vmov r8, s0\n" \
    TAPS_OF_ONE(0, 0, "r0", "r1") \
    TAPS_OF_ONE(1, 0, "r2", "r3") \
    TAPS_OF_ONE(2, 0, "r4", "r5") \
    "vmov s6, r8\n" \
    "vcvt.f32.s32 s6, s6\n" \
    "vmul.f32 s6, s6, s2\n" \
    "vcvtr.s32.f32 s6, s6\n" \
    "vmov r8, s6\n" \
    "add r8, r8, lr\n" \
    CODE("r8") \
    "strb r8, [r11]\n"

/* One row of outputs of one channel; `turn`: bytes from its weights to those that slot 0 meets. r7 may be a frame pointer, and is
 * saved here because no clobber may name it. */
static inline void convolve(const planish_depthwise_rows_layer *l, const channel_t *channel, int32_t turn, int8_t *y)
{
    register const channel_t *layer __asm__("r0") = channel;
    register int32_t weights __asm__("r9") = turn;
    register int8_t *out __asm__("r11") = y;
    (void)l;
    __asm__ volatile(
        "push {r7}\n"
        "vldm r0!, {s0-s4}\n"
        "ldm r0!, {r10, r12, lr}\n"
        "add r9, r9, r0\n"
        "ldm r9, {r0-r5}\n"
        "b 2f\n"
        "1:\n" TWO_OUTPUTS(0) TWO_OUTPUTS(4 * COLUMN_STRIDE)
        "add r10, r10, #" TEXT(8 * COLUMN_STRIDE) "\n"
        "2:\n"
        "vmov r6, s3\n"
        "cmp r10, r6\n"
        "bne 1b\n"
        "vmov r6, s4\n"
        "lsls r6, r6, #31\n" /* carry: two are left; not zero: one is */
        "bcc 3f\n" TWO_OUTPUTS(0)
        "add r10, r10, #" TEXT(4 * COLUMN_STRIDE) "\n"
        "3:\n"
        "beq 4f\n" ONE_OUTPUT
        "4:\n"
        "pop {r7}\n"
        : "+r"(layer), "+r"(weights), "+r"(out)
        :
        : "r1", "r2", "r3", "r4", "r5", "r6", "r8", "r10", "r12", "lr", "s0", "s1", "s2", "s3", "s4", "s6", "s7", "cc",
          "memory");
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

static inline int8_t code_of(const planish_depthwise_rows_layer *l, int32_t sum, float rescale)
{
    int32_t code = planish_nearest((float)sum * rescale) + l->y_zero_point;
    int32_t least = SATURATE == 0 ? -128 : SATURATE == 1 ? 0 : l->low;
    int32_t most = SATURATE < 2 ? 127 : l->high;
    code = code < least ? least : code;
    return (int8_t)(code > most ? most : code);
}

/* One row of outputs of one channel; `turn`: bytes from its weights to those that slot 0 meets. */
static inline void convolve(const planish_depthwise_rows_layer *l, const channel_t *channel, int32_t turn, int8_t *y)
{
    const uint32_t *weight = channel->weight + turn / 4;
    const uint32_t *x = (const uint32_t *)(const void *)channel->rows;
    int32_t column, i;
    for (column = l->out_columns; column > 0; column -= 2) {
        int32_t first = channel->bias[0], second = first;
        for (i = 0; i < KERNEL_HEIGHT; i++) {
            const uint32_t *row = x + i * (ROW_BYTES / 4);
            first = even_row(row, weight + i * PAIRS, first);
            second = odd_row(row, weight + i * PAIRS, second);
        }
        *y = code_of(l, first, channel->rescale);
        if (column > 1) {
            y[channel->step] = code_of(l, second, channel->rescale);
        }
        x += COLUMN_STRIDE;
        y += 2 * channel->step;
    }
}

#endif

void PLANISH_KERNEL(const planish_depthwise_rows_layer *l, const int8_t *x, int8_t *y, int8_t *scratch)
{
    channel_t *channel = (channel_t *)(void *)(scratch + GROUP * PLANE);
    int32_t c, k, row, i;
#if ROWS_FIRST
    for (row = 0; row < l->out_rows; row++) {
        for (c = 0; c < l->channels; c += GROUP) {
            int32_t count = l->channels - c < GROUP ? l->channels - c : GROUP;
            load(l, c, scratch, channel);
            for (i = 0; i < KERNEL_HEIGHT; i++) {
                expand(l, x + c, row * l->row_stride + i, count, scratch + i * ROW_BYTES);
            }
            for (k = 0; k < count; k++) {
                convolve(l, channel + k, 0, y + row * l->out_row_step + c + k);
            }
        }
    }
#else
    for (c = 0; c < l->channels; c += GROUP) {
        int32_t count = l->channels - c < GROUP ? l->channels - c : GROUP;
        int8_t *out = y + c;
        int32_t top_slot = 0, slot = 0, next = 0; /* slots of the window's top row and of the next row, and that row */
        load(l, c, scratch, channel);
        for (row = 0; row < l->out_rows; row++) {
            int32_t top = row * l->row_stride;
            int32_t turn = top_slot ? KERNEL_HEIGHT - top_slot : 0;
            for (; next < top + KERNEL_HEIGHT; next++) {
                if (next >= top) {
                    expand(l, x + c, next, count, scratch + slot * ROW_BYTES);
                }
                slot = slot + 1 < KERNEL_HEIGHT ? slot + 1 : 0;
            }
            for (k = 0; k < count; k++) {
                convolve(l, channel + k, turn * PAIRS * 4, out + k);
            }
            for (i = l->row_stride; i > 0; i--) {
                top_slot = top_slot + 1 < KERNEL_HEIGHT ? top_slot + 1 : 0;
            }
            out += l->out_row_step;
        }
    }
#endif
}
