/* Fully connected layer, two outputs in one multiplication, for cores with a 32-bit product and nothing more. */
#ifndef PLANISH_ARMV6M_FULLY_CONNECTED_H
#define PLANISH_ARMV6M_FULLY_CONNECTED_H

#include "armv6m/requantize.h"

/* Outputs go in blocks of pairs, and for each of them inputs in blocks of chunks, so that little memory is needed; constants lie in
 * the order of use. */
typedef struct {
    int32_t in_features, out_features, block_chunks, block_pairs;
    planish_scale scale;
    const uint32_t *weight; /* (block of pairs, block of chunks, pair, chunk, words of TAPS weights), plus half their range */
    const int32_t *channel; /* (out_features, even number, 2): bias less x_zero_point * sum of weights, word of the rescale */
    const uint32_t *extra;  /* (block of pairs, block of chunks, pair): (bytes to the chunk's words, weights)..., 2^32 - 1; null
                             * where none are needed */
} planish_armv6m_fully_connected_layer;

#endif
