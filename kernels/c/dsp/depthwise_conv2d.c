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
#include "dsp/depthwise_rows.h"

#if defined(__ARM_FEATURE_DSP) && defined(__ARM_FP) && (__ARM_FP & 4) && KERNEL_HEIGHT == 3 && KERNEL_WIDTH == 3 \
    && SATURATE < 2 && 2 * ROW_BYTES + 16 <= 1020
#include "dsp/depthwise_asm.h"
#else
#include "dsp/depthwise_c.h"
#endif

/* the weights of kernel position `tap` for four channels */
static inline uint32_t tap_of(const uint32_t *weight, uint32_t tap)
{
#if WEIGHT_BITS == 8
    return weight[tap];
#else
    enum { EACH = 8 / WEIGHT_BITS, MASK = 0x01010101 * ((1 << WEIGHT_BITS) - 1), HALF = 0x01010101 << (WEIGHT_BITS - 1) };
    uint32_t codes = planish_subtract_bytes(weight[tap / EACH] >> tap % EACH * WEIGHT_BITS & MASK, HALF);
    /* 4 or 16 times the weights, for which bias and factor are made: SCALE of depthwise_conv2d.py */
    return WEIGHT_BITS == 4 ? codes << 2 & 0xFCFCFCFCu : codes << 4 & 0xF0F0F0F0u;
#endif
}

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
    enum { WORDS_OF_FOUR = (KERNEL_HEIGHT * KERNEL_WIDTH * WEIGHT_BITS + 7) / 8 };
    const uint32_t *weight = l->weight + c / GROUP * WORDS_OF_FOUR;
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
