/* Two-dimensional convolution, dense or in groups of channels, two output pixels at a time.
 *
 * The windows of both pixels are expanded to pairs of 16-bit numbers (dsp/gather.h), padding to the zero point, which the bias has
 * taken in; then every group of four outputs is multiplied with them (dsp/product.h). A template: WEIGHT_BITS is 8, 4 or 2, FAR
 * says that the weights are packed so; with STAGED the codes are written to scratch first, for outputs that are clamped, packed
 * (Y_BITS) or no multiple of 4; dsp/gather.h has the rest.
 */
#include "dsp/conv2d.h"
#include "dsp/emit.h"
#include "dsp/gather.h"
#include "dsp/product.h"

#if FAR
#define PRODUCT planish_product_8_far
#else
#define PRODUCT PLANISH_NAME(planish_product_, WEIGHT_BITS)
#endif

static inline void advance(const planish_dsp_conv2d_layer *l, pixel_t *p)
{
    p->left += l->stride_width;
    if (++p->column == l->out_width) {
        p->column = 0;
        p->left = -l->pad_left;
        p->top += l->stride_height;
    }
}

/* scratch: 4 * units words of pairs, with STAGED the codes of both pixels, then what dsp/gather.h works in */
void PLANISH_KERNEL(const planish_dsp_conv2d_layer *l, const int8_t *x, int8_t *y, int8_t *scratch)
{
    uint32_t *pairs = (uint32_t *)(void *)scratch;
    int8_t *staged = scratch + 16 * l->units, *work;
    int32_t channels = l->out_channels, outputs = channels / l->groups, group;
    planish_product product;
    product.weight = l->weight;
    product.units = l->units;
    product.groups = (outputs + 3) / 4;
    product.zero_points = (uint32_t)(l->y_zero_point + 128) * 0x00010001u;
    work = staged + (STAGED ? 8 * product.groups : 0);
    prepare(l, work);
    for (group = 0; group < l->groups; group++) {
        pixel_t next = {-l->pad_top, -l->pad_left, 0};
        int32_t left, at = group * outputs;
        for (left = l->out_height * l->out_width; left > 0; left -= 2) {
            pixel_t a = next, b;
            advance(l, &next);
            b = left > 1 ? next : a; /* an odd pixel at the end is computed twice */
            gather(l, x, a, b, pairs, work);
#if STAGED
            PRODUCT(&product, pairs, staged, 4 * product.groups);
            planish_emit(staged, outputs, l->low, l->high, y, at);
            if (left > 1) {
                planish_emit(staged + 4 * product.groups, outputs, l->low, l->high, y, at + channels);
            }
#else
            PRODUCT(&product, pairs, y + at, left > 1 ? channels : 0);
#endif
            advance(l, &next);
            at += 2 * channels;
        }
        x += l->in_channels * X_BITS / 8 / l->groups;
        product.weight += product.groups * (l->units * (WEIGHT_BITS / 2) + 8);
    }
}
