/* Two-dimensional convolution with MVE: three output pixels at a time, against all outputs.
 *
 * The window of each pixel is one row of bytes: a pixel of the input itself where the kernel is 1 x 1 without padding
 * (PLANISH_POINTWISE), else gathered into scratch, padding filled with the zero point.
 */
#include "mve/bytes.h"
#include "mve/conv2d.h"
#include "mve/windows.h"

#ifndef PLANISH_POINTWISE

/* the taps of one row of the kernel that lie inside the image: [begin, end), the first at `column` */
static void gather_clipped(const planish_mve_conv2d_layer *l, const int8_t *x, int32_t top, int32_t left, int8_t *window)
{
    int32_t depth = l->in_channels, step = l->dilation_width, begin = 0, end = l->kernel_width, i, j;
    fill_bytes(window, l->x_zero_point, l->kernel_height * l->kernel_width * depth);
    while (begin < end && left + begin * step < 0) {
        begin++;
    }
    while (end > begin && left + (end - 1) * step >= l->in_width) {
        end--;
    }
    for (i = 0; i < l->kernel_height; i++) {
        int32_t row = top + i * l->dilation_height;
        if (row >= 0 && row < l->in_height) {
            const int8_t *source = x + (row * l->in_width + left + begin * step) * depth;
            int8_t *to = window + begin * depth;
            if (step == 1) {
                copy_bytes(to, source, (end - begin) * depth);
            } else {
                for (j = begin; j < end; j++) {
                    copy_bytes(to, source, depth);
                    to += depth;
                    source += step * depth;
                }
            }
        }
        window += l->kernel_width * depth;
    }
}

static inline void gather(const planish_mve_conv2d_layer *l, const int8_t *x, int32_t top, int32_t left, int8_t *window)
{
    int32_t span_height = (l->kernel_height - 1) * l->dilation_height, span_width = l->kernel_width - 1;
    if (l->dilation_width == 1 && top >= 0 && left >= 0 && top + span_height < l->in_height
        && left + span_width < l->in_width) {
        int32_t run = l->kernel_width * l->in_channels, pitch = l->dilation_height * l->in_width * l->in_channels;
        const int8_t *source = x + (top * l->in_width + left) * l->in_channels;
        int32_t i;
        for (i = l->kernel_height; i > 0; i--) {
            copy_bytes(window, source, run);
            window += run;
            source += pitch;
        }
    } else {
        gather_clipped(l, x, top, left, window);
    }
}

#endif

#ifdef PLANISH_POINTWISE
void PLANISH_KERNEL(const planish_mve_conv2d_layer *l, const int8_t *x, int8_t *y)
#else
void PLANISH_KERNEL(const planish_mve_conv2d_layer *l, const int8_t *x, int8_t *y, int8_t *scratch)
#endif
{
    int32_t size = l->kernel_height * l->kernel_width * l->in_channels, pixels = l->out_height * l->out_width;
    int32_t row = 0, column = 0, i;
    windows_t job;
    job.stream = l->weight;
    job.end = l->weight + l->words;
    job.size = size;
    job.zero_point = l->y_zero_point;
    job.low = l->low;
    job.high = l->high;
    while (pixels > 0) {
        for (i = 0; i < WINDOWS; i++) {
            if (i < pixels) {
#ifdef PLANISH_POINTWISE
                job.window[i].x = x + (row * l->stride_height * l->in_width + column * l->stride_width) * size;
#else
                /* windows lie whole words apart */
                int8_t *window = scratch + i * ((size + 3) & ~3);
                gather(l, x, row * l->stride_height - l->pad_top, column * l->stride_width - l->pad_left, window);
                job.window[i].x = window;
#endif
                job.y[i] = y;
                y += l->out_channels;
                if (++column == l->out_width) {
                    column = 0;
                    row++;
                }
            } else { /* the last pixel again */
                job.window[i].x = job.window[i - 1].x;
                job.y[i] = y - l->out_channels;
            }
        }
        start_windows(&job);
        job.outputs = l->out_channels;
        multiply_windows(&job);
        pixels -= WINDOWS;
    }
}
