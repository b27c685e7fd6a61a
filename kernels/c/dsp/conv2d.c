/* Two-dimensional convolution, dense or in groups of channels, two output pixels at a time.
 *
 * The windows of both pixels are expanded to pairs of 16-bit numbers (dsp/product.h), padding to the zero point, which the bias
 * has taken in; then every group of four outputs is multiplied with them. A template: WEIGHT_BITS is 8, 4 or 2.
 */
#include "dsp/conv2d.h"
#include "dsp/product.h"

#if WEIGHT_BITS == 8
#define PRODUCT planish_product_8
#elif WEIGHT_BITS == 4
#define PRODUCT planish_product_4
#else
#define PRODUCT planish_product_2
#endif

/* the first tap of an output pixel's window, in the input; column counts the outputs of its row */
typedef struct {
    int32_t top, left, column;
} pixel_t;

static inline void advance(const planish_dsp_conv2d_layer *l, pixel_t *p)
{
    p->left += l->stride_width;
    if (++p->column == l->out_width) {
        p->column = 0;
        p->left = -l->pad_left;
        p->top += l->stride_height;
    }
}

#if POINTWISE

static inline void gather(const planish_dsp_conv2d_layer *l, const int8_t *x, pixel_t a, pixel_t b, uint32_t *pairs,
                          const int8_t *padding)
{
    (void)padding;
    (void)planish_expand(x + (a.top * l->in_width + a.left) * l->in_channels,
                         x + (b.top * l->in_width + b.left) * l->in_channels, pairs, l->units);
}

#else

static inline int inside(int32_t position, int32_t size)
{
    return (uint32_t)position < (uint32_t)size;
}

/* all columns of a kernel's row lie in the input */
static inline int covered(const planish_dsp_conv2d_layer *l, int32_t left)
{
    return left >= 0 && left + l->kernel_width <= l->in_width;
}

static inline void gather(const planish_dsp_conv2d_layer *l, const int8_t *x, pixel_t a, pixel_t b, uint32_t *pairs,
                          const int8_t *padding)
{
    int32_t channels = l->in_channels, depth = channels / l->groups;
    int contiguous = l->dilation_width == 1 && l->groups == 1 && covered(l, a.left) && covered(l, b.left);
    int32_t i, j;
    for (i = 0; i < l->kernel_height; i++) {
        int32_t row_a = a.top + i * l->dilation_height, row_b = b.top + i * l->dilation_height;
        int in_a = inside(row_a, l->in_height), in_b = inside(row_b, l->in_height);
        int32_t at_a = (row_a * l->in_width + a.left) * channels, at_b = (row_b * l->in_width + b.left) * channels;
        if (contiguous && in_a && in_b) {
            pairs = planish_expand(x + at_a, x + at_b, pairs, l->kernel_width * depth / 4);
            continue;
        }
        for (j = 0; j < l->kernel_width; j++) {
            int32_t column = j * l->dilation_width;
            const int8_t *from_a = in_a && inside(a.left + column, l->in_width) ? x + at_a + column * channels : padding;
            const int8_t *from_b = in_b && inside(b.left + column, l->in_width) ? x + at_b + column * channels : padding;
            pairs = planish_expand(from_a, from_b, pairs, depth / 4);
        }
    }
}

#endif

void PLANISH_KERNEL(const planish_dsp_conv2d_layer *l, const int8_t *x, int8_t *y, int8_t *scratch)
{
    uint32_t *pairs = (uint32_t *)(void *)scratch; /* 4 * units */
    int8_t *padding = scratch + 16 * l->units;     /* (in_channels / groups) */
    int32_t depth = l->in_channels / l->groups, channels = l->out_channels, outputs = channels / l->groups;
    planish_product product;
    int32_t group, i;
    product.weight = l->weight;
    product.units = l->units;
    product.groups = outputs / 4;
    product.zero_points = (uint32_t)(l->y_zero_point + 128) * 0x00010001u;
    for (i = 0; !POINTWISE && i < depth; i++) {
        padding[i] = (int8_t)l->x_zero_point;
    }
    for (group = 0; group < l->groups; group++) {
        pixel_t next = {-l->pad_top, -l->pad_left, 0};
        int8_t *to = y;
        int32_t left;
        for (left = l->out_height * l->out_width; left > 0; left -= 2) {
            pixel_t a = next, b;
            advance(l, &next);
            b = left > 1 ? next : a; /* an odd pixel at the end is computed twice */
            gather(l, x, a, b, pairs, padding);
            PRODUCT(&product, pairs, to, left > 1 ? channels : 0);
            advance(l, &next);
            to += 2 * channels;
        }
        x += depth;
        y += outputs;
        product.weight += product.groups * (l->units * (WEIGHT_BITS / 2) + 8);
    }
}
