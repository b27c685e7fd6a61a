/* Largest code of a window with MVE, sixteen channels at a time; padding never wins. */
#include "mve/pools.h"

#if defined(__ARM_FEATURE_MVE)
#include <arm_mve.h>
#endif

/* `channels` codes of the window whose taps inside the image begin at x */
static void largest(const planish_mve_max_pool_layer *l, const int8_t *x, int32_t rows, int32_t columns, int8_t *y)
{
    int32_t channels = l->channels, step = l->dilation_width * channels, line = l->dilation_height * l->in_width * channels;
    int32_t channel, i, j;
#if defined(__ARM_FEATURE_MVE)
    for (channel = 0; channel < channels; channel += 16) {
        const mve_pred16_t lanes = vctp8q((uint32_t)(channels - channel));
        int8x16_t code = vdupq_n_s8(-128);
        for (i = 0; i < rows; i++) {
            const int8_t *source = x + channel + i * line;
            for (j = columns; j > 0; j--) {
                code = vmaxq_m_s8(code, code, vld1q_z_s8(source, lanes), lanes);
                source += step;
            }
        }
        if (l->table) { /* its first entry belongs to code -128 */
            uint8x16_t place = veorq_u8(vreinterpretq_u8_s8(code), vdupq_n_u8(0x80));
            code = vldrbq_gather_offset_z_s8(l->table, place, lanes);
        }
        vst1q_p_s8(y + channel, code, lanes);
    }
#else
    for (channel = 0; channel < channels; channel++) {
        int8_t code = -128;
        for (i = 0; i < rows; i++) {
            for (j = 0; j < columns; j++) {
                int8_t other = x[i * line + j * step + channel];
                code = other > code ? other : code;
            }
        }
        y[channel] = planish_look_up(l->table, code);
    }
#endif
}

/* the taps along one axis that lie inside the image: *count of them, the first at the returned place */
static int32_t inside(int32_t start, int32_t kernel, int32_t dilation, int32_t size, int32_t *count)
{
    while (kernel > 0 && start < 0) {
        start += dilation;
        kernel--;
    }
    while (kernel > 0 && start + (kernel - 1) * dilation >= size) {
        kernel--;
    }
    *count = kernel;
    return start;
}

void planish_mve_max_pool(const planish_mve_max_pool_layer *l, const int8_t *x, int8_t *y)
{
    int32_t row, column, rows, columns;
    for (row = 0; row < l->out_height; row++) {
        int32_t top = inside(row * l->stride_height - l->pad_top, l->kernel_height, l->dilation_height, l->in_height, &rows);
        for (column = 0; column < l->out_width; column++) {
            int32_t left = inside(column * l->stride_width - l->pad_left, l->kernel_width, l->dilation_width, l->in_width,
                                  &columns);
            if (columns == 0 || rows == 0) {
                largest(l, x, 0, 0, y);
            } else {
                largest(l, x + (top * l->in_width + left) * l->channels, rows, columns, y);
            }
            y += l->channels;
        }
    }
}
