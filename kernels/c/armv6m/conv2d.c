/* Convolution, dense, two pixels at a time (pairs.h). Constants: TAPS of a chunk (2, 4, 8), ONE_SIDED and CLAMPED (requantize.h),
 * EXTRA (there are extra chunks), SKIPS (chunks are no multiple of the unrolled loop), GATHER: how the windows are read,
 * 0: a 1 x 1 kernel without padding, 1: whole chunks of one pixel's channels, 2: byte by byte, through scratch.
 */
#include "armv6m/conv2d.h"
#include "armv6m/pairs.h"

void PLANISH_KERNEL(const planish_armv6m_conv2d_layer *l, const int8_t *x, int8_t *y, int8_t *scratch);

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

#if GATHER == 0
static void gather(const planish_armv6m_conv2d_layer *l, const int8_t *x, const place_t *a, const place_t *b, int32_t *words,
                   int8_t *fill)
{
    int32_t depth = l->in_channels;
    (void)fill;
    expand(x + (a->top * l->in_width + a->left) * depth, x + (b->top * l->in_width + b->left) * depth, words, l->chunks);
}
#elif GATHER == 1
/* the pixel at a tap of a window, or the zero points that stand for the padding */
static inline const int8_t *tap(const planish_armv6m_conv2d_layer *l, const int8_t *x, int32_t row, int32_t column,
                                const int8_t *fill)
{
    if ((uint32_t)row >= (uint32_t)l->in_height || (uint32_t)column >= (uint32_t)l->in_width) {
        return fill;
    }
    return x + (row * l->in_width + column) * l->in_channels;
}

static void gather(const planish_armv6m_conv2d_layer *l, const int8_t *x, const place_t *a, const place_t *b, int32_t *words,
                   int8_t *fill)
{
    int32_t chunks = l->in_channels / TAPS;
    int32_t last = (l->kernel_width - 1) * l->dilation_width;
    int32_t whole = l->dilation_width == 1 && a->left >= 0 && b->left >= 0 && a->left + last < l->in_width
                    && b->left + last < l->in_width;
    int32_t i, j;
    for (i = 0; i < l->kernel_height; i++) {
        int32_t row_a = a->top + i * l->dilation_height, row_b = b->top + i * l->dilation_height;
        if (whole && row_a >= 0 && row_b >= 0 && row_a < l->in_height && row_b < l->in_height) {
            words = expand(x + (row_a * l->in_width + a->left) * l->in_channels,
                           x + (row_b * l->in_width + b->left) * l->in_channels, words, chunks * l->kernel_width);
            continue;
        }
        for (j = 0; j < l->kernel_width; j++) {
            words = expand(tap(l, x, row_a, a->left + j * l->dilation_width, fill),
                           tap(l, x, row_b, b->left + j * l->dilation_width, fill), words, chunks);
        }
    }
}
#else
static void window(const planish_armv6m_conv2d_layer *l, const int8_t *x, const place_t *p, int8_t *to)
{
    int32_t depth = l->in_channels, i, j, c;
    for (i = 0; i < l->kernel_height; i++) {
        int32_t row = p->top + i * l->dilation_height;
        for (j = 0; j < l->kernel_width; j++) {
            int32_t column = p->left + j * l->dilation_width;
            if ((uint32_t)row < (uint32_t)l->in_height && (uint32_t)column < (uint32_t)l->in_width) {
                const int8_t *source = x + (row * l->in_width + column) * depth;
                for (c = 0; c < depth; c++) {
                    *to++ = source[c];
                }
            } else {
                for (c = 0; c < depth; c++) {
                    *to++ = (int8_t)l->x_zero_point;
                }
            }
        }
    }
}

static void gather(const planish_armv6m_conv2d_layer *l, const int8_t *x, const place_t *a, const place_t *b, int32_t *words,
                   int8_t *fill)
{
    int32_t size = l->chunks * TAPS;
    window(l, x, a, fill);
    window(l, x, b, fill + size);
    expand(fill, fill + size, words, l->chunks);
}
#endif

void PLANISH_KERNEL(const planish_armv6m_conv2d_layer *l, const int8_t *x, int8_t *y, int8_t *scratch)
{
    int32_t *words = (int32_t *)(void *)scratch;
    int8_t *fill = scratch + l->chunks * CHUNK_WORDS * 4; /* codes behind the words */
    int32_t skipped = (0 - l->chunks) & (UNROLL - 1);
    int32_t pixels = l->out_height * l->out_width;
    place_t a = {0, 0, -l->pad_top, -l->pad_left};
    pairs_t p;
    int32_t i;
#if GATHER == 1
    for (i = 0; i < l->in_channels; i++) {
        fill[i] = (int8_t)l->x_zero_point;
    }
#elif GATHER == 2
    for (i = 0; i < 2 * TAPS * l->chunks; i++) {
        fill[i] = 0; /* taps that fill up the last chunk meet weights of 0 */
    }
#endif
    p.words = words;
    p.half = l->scale.half;
    p.before = l->scale.before;
    p.start = -(l->chunks << 15);
    p.skipped = skipped * TAPS;
    p.extra = l->extra;
    p.limit = l->scale.limit;
    p.scale = &l->scale;
    p.channel_end = l->channel + 2 * l->out_channels;
    p.entry = skipped * CHUNK_CODE;
    p.window = l->scale.window;
    p.low = l->scale.low;
    p.high = l->scale.high;
    p.channel = l->channel;
    p.words_end = words + l->chunks * CHUNK_WORDS;
    p.weight = l->weight;
    for (i = 0; i < pixels; i += 2) {
        place_t b = a;
        p.y = y;
        p.y_step = 0; /* an odd pixel at the end is computed twice */
        if (i + 1 < pixels) {
            step(l, &b);
            p.y_step = l->out_channels;
        }
        gather(l, x, &a, &b, words, fill);
        outputs_of(&p);
        y += 2 * l->out_channels;
        a = b;
        step(l, &a);
    }
}
