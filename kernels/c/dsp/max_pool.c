/* Largest code of a window, four channels at a time; padding never wins. */
#include "dsp/halves.h"
#include "dsp/pools.h"

void planish_dsp_max_pool(const planish_dsp_max_pool_layer *l, const int8_t *x, int8_t *y)
{
    int32_t row_step = l->dilation_height * l->in_width * l->channels, column_step = l->dilation_width * l->channels;
    int32_t channels = l->channels; /* copies: y might lie over the layer, for all that the compiler knows */
    const int8_t *table = l->table;
    int32_t row, column, channel, i, j, k;
    for (row = 0; row < l->out_height; row++) {
        planish_taps rows = planish_taps_of(row * l->stride_height - l->pad_top, l->kernel_height, l->dilation_height,
                                            l->in_height);
        for (column = 0; column < l->out_width; column++) {
            planish_taps columns = planish_taps_of(column * l->stride_width - l->pad_left, l->kernel_width,
                                                   l->dilation_width, l->in_width);
            const int8_t *window = x + (rows.position * l->in_width + columns.position) * channels;
            channel = 0;
            if (channels % 4 == 0) {
                PLANISH_ROLLED
                for (; channel < channels; channel += 4) {
                    const int8_t *line = window + channel;
                    uint32_t largest = 0x80808080u;
                    PLANISH_ROLLED
                    for (i = rows.first; i < rows.end; i++) {
                        const int8_t *tap = line;
                        PLANISH_ROLLED
                        for (j = columns.first; j < columns.end; j++) {
                            largest = planish_max_bytes(largest, planish_load_word(tap));
                            tap += column_step;
                        }
                        line += row_step;
                    }
                    if (table) {
                        for (k = 0; k < 4; k++) {
                            y[channel + k] = planish_look_up(table, (int8_t)(largest >> 8 * k));
                        }
                    } else {
                        planish_store_word(y + channel, largest);
                    }
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
            y += channels;
        }
    }
}
