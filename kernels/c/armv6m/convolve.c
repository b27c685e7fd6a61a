/* Windows of convolutions, two pixels at a time, as words (expand.c) in scratch. */
#include "armv6m/conv2d.h"

typedef struct {
    int32_t row, column, top, left; /* output position, and where its window begins in the image */
} place_t;

static inline void step(const planish_armv6m_conv2d_layer *l, place_t *p)
{
    p->column++;
    p->left += l->stride_width;
    if (p->column == l->out_width) {
        p->column = 0;
        p->left = -l->pad_left;
        p->row++;
        p->top += l->stride_height;
    }
}

/* the pixel at a tap of a window, or the zero points that stand for the padding */
static inline const int8_t *tap(const planish_armv6m_conv2d_layer *l, const int8_t *x, int32_t row, int32_t column,
                                const int8_t *fill)
{
    if ((uint32_t)row >= (uint32_t)l->in_height || (uint32_t)column >= (uint32_t)l->in_width) {
        return fill;
    }
    return x + (row * l->in_width + column) * l->in_channels;
}

/* whole chunks of one pixel's channels: words come from the image */
static void gather(const planish_armv6m_conv2d_layer *l, const int8_t *x, const place_t *a, const place_t *b, int32_t *words,
                   const int8_t *fill, planish_expand *expand)
{
    int32_t chunks = l->pixel_chunks, last = (l->kernel_width - 1) * l->dilation_width;
    int32_t whole = (l->dilation_width == 1 || last == 0) && a->left >= 0 && b->left >= 0 && a->left + last < l->in_width
                    && b->left + last < l->in_width;
    int32_t i, j;
    PLANISH_SMALL_LOOP
    for (i = 0; i < l->kernel_height; i++) {
        int32_t row_a = a->top + i * l->dilation_height, row_b = b->top + i * l->dilation_height;
        if (whole && row_a >= 0 && row_b >= 0 && row_a < l->in_height && row_b < l->in_height) {
            words = expand(x + (row_a * l->in_width + a->left) * l->in_channels,
                           x + (row_b * l->in_width + b->left) * l->in_channels, words, chunks * l->kernel_width);
            continue;
        }
        PLANISH_SMALL_LOOP
        for (j = 0; j < l->kernel_width; j++) {
            words = expand(tap(l, x, row_a, a->left + j * l->dilation_width, fill),
                           tap(l, x, row_b, b->left + j * l->dilation_width, fill), words, chunks);
        }
    }
}

static int8_t *fill_codes(int8_t *to, int32_t count, int32_t code)
{
    PLANISH_SMALL_LOOP
    for (; count > 0; count--) {
        *to++ = (int8_t)code;
    }
    return to;
}

static int8_t *copy_codes(int8_t *to, const int8_t *from, int32_t count)
{
    const int8_t *end = from + count;
    PLANISH_SMALL_LOOP
    while (from != end) {
        *to++ = *from++;
    }
    return to;
}

/* other numbers of channels: the window in a row first */
static void window(const planish_armv6m_conv2d_layer *l, const int8_t *x, const place_t *p, int8_t *to)
{
    int32_t depth = l->in_channels, width = l->dilation_width == 1 ? l->kernel_width : 1, zero = l->x_zero_point, i, j;
    PLANISH_SMALL_LOOP
    for (i = 0; i < l->kernel_height; i++) {
        int32_t row = p->top + i * l->dilation_height;
        if ((uint32_t)row >= (uint32_t)l->in_height) {
            to = fill_codes(to, l->kernel_width * depth, zero);
            continue;
        }
        PLANISH_SMALL_LOOP
        for (j = 0; j < l->kernel_width; j += width) { /* runs of neighbouring columns, or one column */
            int32_t left = p->left + j * l->dilation_width, right = left + width;
            int32_t begin = left < 0 ? 0 : left, end = right > l->in_width ? l->in_width : right;
            if (begin >= end) {
                to = fill_codes(to, width * depth, zero);
                continue;
            }
            to = fill_codes(to, (begin - left) * depth, zero);
            to = copy_codes(to, x + (row * l->in_width + begin) * depth, (end - begin) * depth);
            to = fill_codes(to, (right - end) * depth, zero);
        }
    }
}

void planish_armv6m_convolve(const planish_armv6m_conv2d_layer *l, const int8_t *x, int8_t *y, int8_t *scratch,
                             planish_expand *expand, void (*outputs)(const planish_pairs *), int32_t skipped,
                             int32_t chunk_weights, int32_t chunk_code)
{
    int32_t *words = (int32_t *)(void *)scratch;
    int8_t *fill = scratch + l->chunks * (l->taps + 1) * 4; /* codes behind the words */
    int32_t pixels = l->out_height * l->out_width, size = l->chunks * l->taps;
    place_t a = {0, 0, 0, 0};
    planish_pairs p;
    int32_t i;
    PLANISH_SMALL_LOOP
    for (i = 0; i < l->behind; i++) {
        fill[i] = (int8_t)l->x_zero_point; /* taps that fill up the last chunk meet weights of 0 */
    }
    a.top = -l->pad_top;
    a.left = -l->pad_left;
    p.words = words;
    p.half = l->scale.half;
    p.before = l->scale.before;
    p.start = -(l->chunks << 15);
    p.skipped = skipped * chunk_weights;
    p.extra = l->extra;
    p.limit = l->scale.limit;
    p.scale = &l->scale;
    p.channel_end = l->channel + 2 * l->out_channels;
    p.entry = skipped * chunk_code;
    p.window = l->scale.window;
    p.low = l->scale.low;
    p.high = l->scale.high;
    p.channel = l->channel;
    p.words_end = words + l->chunks * (l->taps + 1);
    p.weight = l->weight;
    for (i = 0; i < pixels; i += 2) {
        place_t b = a;
        p.y = y;
        p.y_step = 0; /* an odd pixel at the end is computed twice */
        if (i + 1 < pixels) {
            step(l, &b);
            p.y_step = l->out_channels;
        }
        if (l->pixel_chunks) {
            gather(l, x, &a, &b, words, fill, expand);
        } else {
            window(l, x, &a, fill);
            window(l, x, &b, fill + size);
            expand(fill, fill + size, words, l->chunks);
        }
        outputs(&p);
        y += 2 * l->out_channels;
        a = b;
        step(l, &a);
    }
}
