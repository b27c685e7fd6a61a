/* Two-dimensional convolution with MVE: two to four output pixels at a time, against all outputs.
 *
 * The window of each pixel is one row of bytes: a pixel of the input itself where the kernel is 1 x 1 without padding
 * (PLANISH_POINTWISE), else gathered into scratch, padding filled with the zero point. What lies together of a row of the kernel
 * is copied as a whole; PLANISH_FORM tells how: 0 any number of bytes, 1 a word, 2 fewer than 16 bytes of up to four rows,
 * 3 a constant number. Forms above 0 define PLANISH_ROWS, PLANISH_RUN and PLANISH_STEP: the kernel's rows, the bytes that lie
 * together in each of them, and those from one window to the next. PLANISH_DILATED: the columns do not lie together.
 * PLANISH_STEPS: windows so short that they stay in registers (mve/resident.h).
 */
#include "mve/bytes.h"
#include "mve/conv2d.h"
#ifdef PLANISH_STEPS
#include "mve/resident.h"
#else
#include "mve/windows.h"
#endif

#ifdef PLANISH_POINTWISE

void PLANISH_KERNEL(const planish_mve_conv2d_layer *l, const int8_t *x, int8_t *y)
{
    int32_t pixels = l->out_height * l->out_width, depth = l->in_channels, outputs = l->out_channels;
    int32_t step = l->stride_width * depth, line = (l->stride_height * l->in_width - l->out_width * l->stride_width) * depth;
    int32_t column = l->out_width, i;
    windows_t job;
    job.stream = l->weight;
    job.end = l->weight + l->words;
    job.size = depth;
    job.zero_point = l->y_zero_point;
    job.low = l->low;
    job.high = l->high;
    for (; pixels > 0; pixels -= WINDOWS) {
        for (i = 0; i < WINDOWS; i++) {
            job.window[i].x = x;
            job.y[i] = y;
            if (i < pixels - 1) { /* else the last pixel again */
                x += step;
                y += outputs;
                if (--column == 0) {
                    column = l->out_width;
                    x += line;
                }
            }
        }
        job.outputs = outputs;
        start_windows(&job);
        multiply_windows(&job);
    }
}

#else

#ifndef PLANISH_RUN
#define PLANISH_RUN (l->kernel_width * l->in_channels)
#endif
#ifndef PLANISH_STEP
#define PLANISH_STEP (l->stride_width * l->in_channels)
#endif
#ifndef PLANISH_ROWS
#define PLANISH_ROWS l->kernel_height
#endif
#define SIZE (PLANISH_ROWS * PLANISH_RUN)
#define SPACE ((SIZE + 3) & ~3) /* bytes from window to window */

/* rows and columns of the kernel outside the image are left as the zero point */
static void gather_clipped(const planish_mve_conv2d_layer *l, const int8_t *x, int32_t top, int32_t left, int8_t *window)
{
    int32_t depth = l->in_channels, step = l->dilation_width, begin = 0, end = l->kernel_width, i;
    fill_bytes(window, l->x_zero_point, PLANISH_ROWS * l->kernel_width * depth);
    while (begin < end && left + begin * step < 0) {
        begin++;
    }
    while (end > begin && left + (end - 1) * step >= l->in_width) {
        end--;
    }
    for (i = 0; i < PLANISH_ROWS; i++) {
        int32_t row = top + i * l->dilation_height;
        if (row >= 0 && row < l->in_height) {
            const int8_t *source = x + (row * l->in_width + left + begin * step) * depth;
            int8_t *to = window + begin * depth;
#ifdef PLANISH_DILATED
            int32_t j;
            for (j = begin; j < end; j++) {
                copy_bytes(to, source, depth);
                to += depth;
                source += step * depth;
            }
#else
            copy_bytes(to, source, (end - begin) * depth);
#endif
        }
        window += l->kernel_width * depth;
    }
}

#ifndef PLANISH_DILATED

/* a window inside the image */
static inline void gather(const planish_mve_conv2d_layer *l, const int8_t *source, int32_t line, int8_t *window)
{
    int32_t i;
    (void)l;
#if defined(__ARM_FEATURE_MVE) && PLANISH_FORM == 2
    /* whole vectors are stored: what they hold too much is overwritten by the next row or window, or lies in the spare end of scratch */
    const mve_pred16_t lanes = vctp8q(PLANISH_RUN);
    int8x16_t rows[PLANISH_ROWS];
    for (i = 0; i < PLANISH_ROWS; i++) {
        rows[i] = vld1q_z_s8(source + i * line, lanes);
    }
    for (i = 0; i < PLANISH_ROWS; i++) {
        vst1q_s8(window + i * PLANISH_RUN, rows[i]);
    }
#else
    for (i = 0; i < PLANISH_ROWS; i++) {
#if defined(__ARM_FEATURE_MVE) && PLANISH_FORM == 1
        int32_t word;
        __builtin_memcpy(&word, source, 4);
        __builtin_memcpy(window, &word, 4);
#elif defined(__ARM_FEATURE_MVE) && PLANISH_FORM == 3
        enum { WHOLE = PLANISH_RUN / 16 * 16 };
        int32_t j;
        for (j = 0; j < WHOLE; j += 16) {
            vst1q_s8(window + j, vld1q_s8(source + j));
        }
        if (PLANISH_RUN > WHOLE) {
            const mve_pred16_t lanes = vctp8q(PLANISH_RUN - WHOLE);
            vst1q_p_s8(window + WHOLE, vld1q_z_s8(source + WHOLE, lanes), lanes);
        }
#else
        copy_bytes(window, source, PLANISH_RUN);
#endif
        window += PLANISH_RUN;
        source += line;
    }
#endif
}

#endif

/* windows of pixels in one row */
static __attribute__((noinline)) void gather_each(const planish_mve_conv2d_layer *l, const int8_t *x, int32_t top,
                                                  int32_t column, int32_t count, int8_t *window)
{
    int32_t left = column * l->stride_width - l->pad_left;
    for (; count > 0; count--) {
#ifndef PLANISH_DILATED
        if (top >= 0 && top + (PLANISH_ROWS - 1) * l->dilation_height < l->in_height && left >= 0
            && left + l->kernel_width <= l->in_width) {
            gather(l, x + (top * l->in_width + left) * l->in_channels, l->dilation_height * l->in_width * l->in_channels, window);
        } else
#endif
        {
            gather_clipped(l, x, top, left, window);
        }
        window += SPACE;
        left += l->stride_width;
    }
}

void PLANISH_KERNEL(const planish_mve_conv2d_layer *l, const int8_t *x, int8_t *y, int8_t *scratch)
{
    int32_t pixels = l->out_height * l->out_width, outputs = l->out_channels, width = l->out_width;
    int32_t column = 0, top = -l->pad_top, i;
#ifndef PLANISH_DILATED
    int32_t line = l->dilation_height * l->in_width * l->in_channels;
    int32_t most_top = l->in_height - (PLANISH_ROWS - 1) * l->dilation_height - 1;
    /* WINDOWS windows that begin at column `first` to `last` lie inside */
    int32_t first = (l->pad_left + l->stride_width - 1) / l->stride_width;
    int32_t inside = l->in_width - l->kernel_width + l->pad_left;
    int32_t last = (inside < 0 ? -1 : inside / l->stride_width < width - 1 ? inside / l->stride_width : width - 1) - (WINDOWS - 1);
#endif
    windows_t job;
    job.stream = l->weight;
    job.end = l->weight + l->words;
    job.size = SIZE;
    job.zero_point = l->y_zero_point;
    job.low = l->low;
    job.high = l->high;
    for (i = 0; i < WINDOWS; i++) { /* windows lie whole words apart */
        job.window[i].x = scratch + i * SPACE;
    }
    for (; pixels > 0; pixels -= WINDOWS) {
#ifndef PLANISH_DILATED
        if (top >= 0 && top <= most_top && column >= first && column <= last) {
            const int8_t *source = x + (top * l->in_width - l->pad_left) * l->in_channels + column * PLANISH_STEP;
            for (i = 0; i < WINDOWS; i++) {
                gather(l, source + i * PLANISH_STEP, line, scratch + i * SPACE);
            }
            column += WINDOWS;
        } else
#endif
        {
            int32_t left = pixels < WINDOWS ? pixels : WINDOWS;
            int8_t *window = scratch;
            while (left > 0) { /* pixels of one row after those of another */
                int32_t count = left < width - column ? left : width - column;
                if (count == 0) {
                    column = 0;
                    top += l->stride_height;
                    continue;
                }
                gather_each(l, x, top, column, count, window);
                column += count;
                left -= count;
                window += count * SPACE;
            }
        }
        if (column == width) {
            column = 0;
            top += l->stride_height;
        }
        for (i = 0; i < WINDOWS; i++) {
            job.y[i] = y;
            if (i < pixels - 1) {
                y += outputs;
            } else if (i + 1 < WINDOWS) { /* the last pixel again */
                job.window[i + 1].x = job.window[i].x;
            }
        }
        job.outputs = outputs;
        start_windows(&job);
        multiply_windows(&job);
    }
}

#endif
