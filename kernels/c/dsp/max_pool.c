/* Largest code of a window, four channels at a time; padding never wins. Compiled for codes of X_BITS and Y_BITS, which are 8 where
 * channels are no multiple of 4. */
#include "dsp/halves.h"
#include "dsp/pools.h"

void PLANISH_KERNEL(const planish_dsp_max_pool_layer *l, const int8_t *x, int8_t *y)
{
    int32_t row_step = l->dilation_height * l->in_width * l->channels * X_BITS / 8; /* bytes */
    int32_t column_step = l->dilation_width * l->channels * X_BITS / 8;
    int32_t channels = l->channels; /* copies: y might lie over the layer, for all that the compiler knows */
    const int8_t *table = l->table;
    int32_t row, column, channel, i, j, k;
    for (row = 0; row < l->out_height; row++) {
        planish_taps rows = planish_taps_of(row * l->stride_height - l->pad_top, l->kernel_height, l->dilation_height,
                                            l->in_height);
        for (column = 0; column < l->out_width; column++) {
            planish_taps columns = planish_taps_of(column * l->stride_width - l->pad_left, l->kernel_width,
                                                   l->dilation_width, l->in_width);
            const int8_t *window = x + (rows.position * l->in_width + columns.position) * channels * X_BITS / 8;
            channel = 0;
            if (channels % 4 == 0) {
                PLANISH_ROLLED
                for (; channel < channels; channel += 4) {
                    const int8_t *line = window + channel * X_BITS / 8;
                    uint32_t largest = 0x80808080u;
                    PLANISH_ROLLED
                    for (i = rows.first; i < rows.end; i++) {
                        const int8_t *tap = line;
                        PLANISH_ROLLED
                        for (j = columns.first; j < columns.end; j++) {
                            largest = planish_max_bytes(largest, planish_unpack_four(tap, X_BITS));
                            tap += column_step;
                        }
                        line += row_step;
                    }
                    if (table) {
                        uint32_t codes = largest;
                        largest = 0;
                        PLANISH_ROLLED
                        for (k = 0; k < 32; k += 8) {
                            largest |= (uint32_t)(uint8_t)planish_look_up(table, (int8_t)(codes >> k)) << k;
                        }
                    }
                    planish_pack_four(y + channel * Y_BITS / 8, largest, Y_BITS);
                }
            }
            PLANISH_ROLLED
            for (; channel < channels; channel++) {
                const int8_t *line = window + channel;
                int32_t largest = -128;
                PLANISH_ROLLED
                for (i = rows.first; i < rows.end; i++) {
                    const int8_t *tap = line;
                    PLANISH_ROLLED
                    for (j = columns.first; j < columns.end; j++) {
                        largest = *tap > largest ? *tap : largest;
                        tap += column_step;
                    }
                    line += row_step;
                }
                y[channel] = planish_look_up(table, (int8_t)largest);
            }
            y += channels * Y_BITS / 8;
        }
    }
}
