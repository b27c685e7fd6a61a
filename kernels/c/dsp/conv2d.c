/* Two-dimensional convolution, dense or in groups of channels, two output pixels at a time.
 *
 * The windows of both pixels are expanded to pairs of 16-bit numbers, padding to the zero point, which the bias has taken in; then
 * every group of four outputs is multiplied with them (dsp/product.h). A template:
 *   WEIGHT_BITS 8, 4 or 2; FAR 1: sums may be of any size
 *   POINTWISE, SEGMENT, SEGMENTS, X_BITS: how windows are gathered, see the three headers; with SEGMENT all of the shape is constant
 *   STAGED      1: the codes are written to scratch first, for outputs that are clamped, packed (Y_BITS) or no multiple of 4
 */
#include "dsp/conv2d.h"
#include "dsp/emit.h"
#include "dsp/product.h"

#if POINTWISE
#include "dsp/gather_point.h"
#elif SEGMENT
#include "dsp/gather_segments.h"
#else
#include "dsp/gather_words.h"
#endif

#if SEGMENT
/* the shape as constants, which the compiler puts in their places */
static const planish_dsp_conv2d_layer shape = {
    .in_height = IN_HEIGHT, .in_width = IN_WIDTH, .in_channels = IN_CHANNELS, .out_height = OUT_HEIGHT,
    .out_width = OUT_WIDTH, .out_channels = OUT_CHANNELS, .groups = GROUPS, .kernel_height = KERNEL_HEIGHT,
    .kernel_width = KERNEL_WIDTH, .stride_height = STRIDE_HEIGHT, .stride_width = STRIDE_WIDTH,
    .dilation_height = DILATION_HEIGHT, .dilation_width = DILATION_WIDTH, .pad_top = PAD_TOP, .pad_left = PAD_LEFT,
    .x_zero_point = X_ZERO_POINT,
};
#define SHAPE (&shape)
#else
#define SHAPE l
#endif

#if FAR
#define PRODUCT PLANISH_NAME(PLANISH_NAME(planish_product_, WEIGHT_BITS), _far)
#else
#define PRODUCT PLANISH_NAME(planish_product_, WEIGHT_BITS)
#endif

/* scratch: 4 * units words of pairs, with STAGED the codes of both pixels, then what the gathering works in */
void PLANISH_KERNEL(const planish_dsp_conv2d_layer *l, const int8_t *x, int8_t *y, int8_t *scratch)
{
    uint32_t *pairs = (uint32_t *)(void *)scratch;
    int8_t *staged = scratch + 16 * l->units, *work;
    int32_t channels = SHAPE->out_channels, groups = SHAPE->groups, outputs = channels / groups, group;
    planish_product product;
    product.weight = l->weight;
    product.units = l->units;
    product.groups = (outputs + 3) / 4;
    product.zero_points = (uint32_t)(l->y_zero_point + 128) * 0x00010001u;
    work = staged + (STAGED ? 8 * product.groups : 0);
    prepare(SHAPE, work);
    for (group = 0; group < groups; group++) {
        pixel_t next = first_pixel(SHAPE, x);
        int32_t left, at = group * outputs;
        for (left = SHAPE->out_height * SHAPE->out_width; left > 0; left -= 2) {
            pixel_t a = next, b;
            next = next_pixel(SHAPE, next);
            b = left > 1 ? next : a; /* an odd pixel at the end is computed twice */
            gather(SHAPE, x, a, b, pairs, work);
#if STAGED
            PRODUCT(&product, pairs, staged, 4 * product.groups);
            planish_emit(staged, outputs, l->low, l->high, y, at);
            if (left > 1) {
                planish_emit(staged + 4 * product.groups, outputs, l->low, l->high, y, at + channels);
            }
#else
            PRODUCT(&product, pairs, y + at, left > 1 ? channels : 0);
#endif
            next = next_pixel(SHAPE, next);
            at += 2 * channels;
        }
        x += l->in_channels * X_BITS / 8 / groups;
        product.weight += product.groups * (l->units * (WEIGHT_BITS / 2) + 8);
    }
}
