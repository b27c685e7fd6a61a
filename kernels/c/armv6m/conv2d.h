/* Convolution of two pixels in one multiplication, for cores with a 32-bit product and nothing more. */
#ifndef PLANISH_ARMV6M_CONV2D_H
#define PLANISH_ARMV6M_CONV2D_H

#include "armv6m/pairs.h"

typedef struct {
    int16_t in_height, in_width, in_channels, out_height, out_width, out_channels;
    int16_t kernel_height, kernel_width, stride_height, stride_width, dilation_height, dilation_width, pad_top, pad_left;
    int16_t x_zero_point, taps, chunks; /* of the window; the last chunk is filled up with weights of 0 */
    int16_t pixel_chunks; /* of a pixel; 0: windows go through scratch code by code, since channels are not whole chunks */
    int32_t behind;       /* codes in scratch behind the words: a pixel of zero points, two windows, or none */
    planish_scale scale;
    const void *weight;     /* (out_channels, chunks, taps), plus half their range; 4 and 2 bits: a 32-bit word a chunk */
    const int32_t *channel; /* (out_channels, 2): bias less x_zero_point * sum of weights, word of the rescale */
    const uint8_t *extra;   /* for every output: (chunk, taps weights)..., 255; null where no chunk has more than fits */
} planish_armv6m_conv2d_layer;

/* all pixels: their words by `expand`, their outputs by `outputs`. `skipped` chunks of the unrolled loop, of `chunk_weights`
 * bytes of weights and `chunk_code` bytes of code, lie before the first */
void planish_armv6m_convolve(const planish_armv6m_conv2d_layer *layer, const int8_t *x, int8_t *y, int8_t *scratch,
                             planish_expand *expand, void (*outputs)(const planish_pairs *), int32_t skipped,
                             int32_t chunk_weights, int32_t chunk_code);

#endif
